"""One prompt in three columns: the plan and the picture of each, with one UNet."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compel import CompelForSDXL
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image, ImageChops

from finelip_sdxl import FineLIPSDXLImg2ImgPipeline, FineLIPSDXLPipeline
from finelip_sdxl.comparison import COLUMNS, Settings
from finelip_sdxl.comparison.comparison import Comparison, Picture, label_pictures
from finelip_sdxl.miniature.drawing import IMAGE_SIZE
from finelip_sdxl.miniature.parsing import parse_description
from finelip_sdxl.recommended import Recommended
from finelip_sdxl.text_encoders import num_positions
from tests.helpers.tiny_sdxl import make_text_encoder, make_tokenizer

SENTENCE = "a red fox above the blue square. "
LONG = SENTENCE * 20  # 162 tokens
SETTINGS = Settings(LONG, steps=2, seed=3)


def make_comparison(components: dict, refiner=None, **arguments) -> Comparison:
    pipe = FineLIPSDXLPipeline(**components)
    pipe.swap_text_encoders()
    return Comparison(pipe, refiner, **arguments)


@pytest.fixture
def comparison(components) -> Comparison:
    return make_comparison(components)


@pytest.fixture
def stock(components) -> StableDiffusionXLPipeline:
    pipe = StableDiffusionXLPipeline(**copy.deepcopy(components))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, settings: Settings = SETTINGS, prompt: str | None = LONG, **arguments) -> Image.Image:
    settings = settings.filled(Recommended())
    return pipe(
        prompt,
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance_scale,
        generator=torch.Generator().manual_seed(settings.seed),
        **arguments,
    ).images[0]


def difference(left: Image.Image, right: Image.Image) -> int:
    """The largest of a pixel's channel, of 255; memory's alignment may change a value's last bit."""
    return max(high for _, high in ImageChops.difference(left, right).getextrema())


# Drawing


@pytest.mark.parametrize("negative_prompt", ["", "a quiet hare"])
def test_the_first_column_is_what_stock_draws(comparison, stock, negative_prompt) -> None:
    settings = Settings(LONG, negative_prompt, steps=2, seed=3)
    expected = draw(stock, settings, negative_prompt=negative_prompt or None)
    assert difference(comparison.draw("stock", settings).image, expected) <= 1


@pytest.mark.parametrize("negative_prompt", ["", "a quiet hare"])
def test_the_second_column_is_what_compel_gives_stock(comparison, stock, negative_prompt) -> None:
    read = CompelForSDXL(stock)(LONG, negative_prompt=negative_prompt or None)
    expected = draw(
        stock,
        prompt=None,
        prompt_embeds=read.embeds,
        pooled_prompt_embeds=read.pooled_embeds,
        negative_prompt_embeds=read.negative_embeds,
        negative_pooled_prompt_embeds=read.negative_pooled_embeds,
    )
    drawn = comparison.draw("compel", Settings(LONG, negative_prompt, steps=2, seed=3))
    assert difference(drawn.image, expected) <= 1


def test_the_third_column_is_what_our_pipeline_draws(comparison, components) -> None:
    pipe = FineLIPSDXLPipeline(**components)
    pipe.swap_text_encoders()
    assert difference(comparison.draw("finelip", SETTINGS).image, draw(pipe)) <= 1


def test_the_text_encoders_of_a_column_are_those_that_draw_it(comparison) -> None:
    positions = {column: [num_positions(one) for one in comparison.text_encoders(column)] for column in COLUMNS}
    assert positions == {"stock": [77, 77], "compel": [77, 77], "finelip": [248, 248]}
    with pytest.raises(ValueError, match="`column` must be one of"):
        comparison.text_encoders("sd3")


def test_columns_differ_after_77_tokens_alone(comparison) -> None:
    def images(prompt: str) -> list[Image.Image]:
        return [comparison.draw(column, Settings(prompt, steps=2)).image for column in COLUMNS]

    first, *others = images(SENTENCE)
    assert all(difference(first, other) <= 1 for other in others)
    first, second, third = images(LONG)
    assert min(difference(first, second), difference(first, third), difference(second, third)) > 1


# Up to one window compel gives just what stock does, so stock says what is right.
SHORT = ["", "a red fox", SENTENCE * 2, "the small blue square, of a quiet hare."]
NEGATIVES = ["", "  ", "a fox", "a large red square in the quiet. " * 2]


@pytest.mark.parametrize("force_zeros", [True, False])
@pytest.mark.parametrize("guidance_scale", [5.0, 1.0])
def test_a_short_prompt_and_its_negative_are_stock_s_in_compel_s_column(
    components, force_zeros, guidance_scale
) -> None:
    comparison = make_comparison({**components, "force_zeros_for_empty_prompt": force_zeros})
    for settings in (
        Settings(prompt, negative, steps=1, guidance_scale=guidance_scale) for prompt in SHORT for negative in NEGATIVES
    ):
        assert_same_states(comparison._base, settings)
    for negative in ("", "a quiet hare"):
        settings = Settings(SENTENCE, negative, steps=1, guidance_scale=guidance_scale)
        stock, compel = (comparison.draw(column, settings).image for column in ("stock", "compel"))
        assert difference(stock, compel) <= 1


def assert_same_states(stage, settings: Settings) -> None:
    """That stock and compel give the UNet the same, to the last bit."""
    stock, compel = stage._encode_by_stock(settings), stage._encode_by_compel(settings)
    for name, expected in stock.items():
        if expected is None:  # without guidance
            continue
        found = compel[name]
        if found is None:  # an absent negative prompt, for which the pipeline takes zeros
            assert stage.pipe.config.force_zeros_for_empty_prompt
            found = torch.zeros_like(expected)
        assert torch.equal(found, expected), name


def test_a_negative_prompt_is_negative_in_every_column_of_the_miniature() -> None:
    comparison = Comparison.load("miniature")
    prompt = "In the top left is a red star."
    settings = Settings(prompt, "In the middle right is a blue ring.", steps=1)
    stock, compel, finelip = (comparison.draw(column, settings).image for column in COLUMNS)
    assert difference(stock, compel) <= 1
    assert difference(stock, finelip) <= 1
    assert difference(stock, comparison.draw("stock", Settings(prompt, steps=1)).image) > 1


@pytest.mark.slow
@pytest.mark.parametrize(("prompt", "negative"), [(SENTENCE, LONG), (LONG, SENTENCE), (LONG, LONG * 2)])
def test_prompt_and_negative_of_several_lengths_fit_in_compel_s_column(components, prompt, negative) -> None:
    comparison = make_comparison({**components, "force_zeros_for_empty_prompt": False})
    settings = Settings(prompt, negative, steps=1)
    read = comparison._base._encode_by_compel(settings)
    assert read["prompt_embeds"].shape == read["negative_prompt_embeds"].shape
    # The two encoders read the same text: where they did not, these were those of another prompt.
    alone = comparison._base._encode_by_compel(Settings(prompt, prompt, steps=1))
    length = alone["prompt_embeds"].shape[1]
    assert torch.equal(read["prompt_embeds"][:, :length], alone["prompt_embeds"])
    assert torch.equal(read["pooled_prompt_embeds"], alone["pooled_prompt_embeds"])
    comparison.draw("compel", settings)
    comparison.draw("compel", Settings(prompt, steps=1))


def test_columns_share_their_unet_and_vae(comparison) -> None:
    base = comparison._base
    assert base.stock.unet is base.pipe.unet
    assert base.stock.vae is base.pipe.vae


def test_encoders_that_were_only_stretched_take_no_memory_twice(comparison) -> None:
    ours = {weight.data_ptr() for weight in comparison._base.pipe.text_encoder.parameters()}
    stock = [weight for weight in comparison._base.stock.text_encoder.parameters() if weight.data_ptr() not in ours]
    assert [tuple(weight.shape) for weight in stock] == [(77, 32)]


def test_hidden_states_are_chosen_for_one_picture_alone(comparison) -> None:
    usual = comparison.draw("finelip", SETTINGS).image
    last = comparison.draw("finelip", Settings(LONG, steps=2, seed=3, hidden_states="last")).image
    assert difference(usual, last) > 1
    assert difference(comparison.draw("finelip", SETTINGS).image, usual) <= 1


def test_where_weights_were_replaced_stock_s_own_draw_stock_s_columns() -> None:
    base = Comparison.load("miniature")._base
    assert base.stock.text_encoder is base.pipe.stock_text_encoder
    ours, stock = (
        pipe.text_encoder.state_dict()["embeddings.token_embedding.weight"] for pipe in (base.pipe, base.stock)
    )
    assert not torch.equal(ours, stock)


def test_an_encoder_that_holds_no_stock_one_is_refused(components) -> None:
    components["text_encoder"] = make_text_encoder(32, positions=248)
    components["tokenizer"] = make_tokenizer(248)
    with pytest.raises(ValueError, match=r"248 positions was trained and holds no stock one: pass the stock SDXL"):
        make_comparison(components)


def test_offloaded_models_draw_the_same(components) -> None:
    expected = [make_comparison(components).draw(column, SETTINGS).image for column in COLUMNS]
    offloaded = make_comparison(copy.deepcopy(components), offload=True)
    # In another order: whatever ran before has to make room.
    drawn = {column: offloaded.draw(column, SETTINGS).image for column in reversed(COLUMNS)}
    assert all(difference(drawn[column], image) <= 1 for column, image in zip(COLUMNS, expected, strict=True))
    pipe = offloaded._base.pipe
    assert {hook.model for hook in pipe._all_hooks} >= {pipe.stock_text_encoder, pipe.text_encoder_2, pipe.unet}


def test_an_unknown_column_is_refused(comparison) -> None:
    with pytest.raises(ValueError, match="`column` must be one of 'stock', 'compel', 'finelip', but is 'long'"):
        comparison.draw("long", SETTINGS)


# Steps


def test_steps_are_told_one_by_one(comparison) -> None:
    steps = []
    comparison.draw("finelip", Settings(LONG, steps=3), lambda *step: steps.append(step))
    assert steps == [(1, 3), (2, 3), (3, 3)]


def test_what_is_raised_at_a_step_ends_the_drawing_there(comparison) -> None:
    steps = []

    def stop(step: int, of: int) -> None:
        steps.append(step)
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        comparison.draw("stock", Settings(LONG, steps=9), stop)
    assert steps == [1, 2]
    comparison.draw("stock", SETTINGS)


def test_memory_that_runs_out_is_told_in_a_sentence_and_the_next_picture_works(comparison, monkeypatch) -> None:
    def run_out(*args, **kwargs) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    with monkeypatch.context() as patch:
        patch.setattr(comparison._base.pipe.vae, "decode", run_out)
        with pytest.raises(MemoryError, match="did not suffice for a picture of 16 × 16 pixels: try a smaller one"):
            comparison.draw("finelip", SETTINGS)
    comparison.draw("finelip", SETTINGS)


@pytest.mark.parametrize("column", list(COLUMNS))
def test_a_picture_that_is_no_number_is_told_in_a_sentence_and_the_next_one_works(
    comparison, monkeypatch, column
) -> None:
    decode = comparison._base.pipe.vae.decode

    def overflow(*args, **kwargs) -> tuple[torch.Tensor]:
        (pixels,) = decode(*args, **kwargs)
        pixels[0, 0, 2, 3] = torch.nan
        return (pixels,)

    with monkeypatch.context() as patch:
        patch.setattr(comparison._base.pipe.vae, "decode", overflow)
        with pytest.raises(ValueError, match=r"^1 of the picture's 256 pixels are not a number \(NaN\): .*float32"):
            comparison.draw(column, SETTINGS)
    comparison.draw(column, SETTINGS)


# Threads


@pytest.mark.slow
def test_drawings_of_several_threads_are_those_of_one(comparison) -> None:
    settings = [
        Settings(LONG, "a fox", steps=3, seed=seed, hidden_states=states)
        for seed, states in enumerate(("last", "penultimate", "last", None))
    ]
    jobs = [(column, each) for each in settings for column in COLUMNS]
    expected = [comparison.draw(*job).image for job in jobs]
    running, most = [], []

    def draw(job: tuple[str, Settings]) -> Image.Image:
        def on_step(step: int, steps: int) -> None:
            most.append(len({*running, threading.get_ident()}))
            running.append(threading.get_ident())
            if step == steps:
                running.clear()

        return comparison.draw(*job, on_step).image

    with ThreadPoolExecutor(4) as threads:
        drawn = list(threads.map(draw, jobs))
    assert max(most) == 1
    assert all(difference(one, other) <= 1 for one, other in zip(drawn, expected, strict=True))


def test_a_drawing_that_ends_in_an_error_lets_the_waiting_one_begin(comparison) -> None:
    begun = threading.Event()

    def fail(step: int, steps: int) -> None:
        begun.set()
        raise KeyError("stopped")

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(comparison.draw, "finelip", SETTINGS, fail)
        begun.wait()
        second = threads.submit(comparison.draw, "finelip", SETTINGS)
        with pytest.raises(KeyError):
            first.result()
        assert second.result().image.size == (16, 16)


def test_prompts_are_read_while_pictures_are_drawn(comparison) -> None:
    # A tokenizer that is told to cut for stock's column must not cut, or be left uncut, for plans made meanwhile.
    expected = comparison.plan(LONG)
    states = comparison._base._encode_by_stock(SETTINGS)
    with ThreadPoolExecutor(3) as threads:
        plans = [threads.submit(comparison.plan, LONG) for _ in range(12)]
        again = [comparison._base._encode_by_stock(SETTINGS) for _ in range(12)]
        assert all(plan.result() == expected for plan in plans)
    assert all(torch.equal(each["prompt_embeds"], states["prompt_embeds"]) for each in again)


def test_other_errors_of_the_model_stay_what_they_are(comparison, monkeypatch) -> None:
    def fail(*args, **kwargs) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(comparison._base.pipe.vae, "decode", fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        comparison.draw("finelip", SETTINGS)


# The refiner


@pytest.fixture
def refiner(components) -> dict:
    """Components of a tiny refiner: the second encoder alone, and a UNet that is told an aesthetic score."""
    torch.manual_seed(5)
    config = dict(components["unet"].config)
    unet = UNet2DConditionModel.from_config(
        {**config, "cross_attention_dim": 48, "projection_class_embeddings_input_dim": 5 * 8 + 24}
    ).eval()
    parts = copy.deepcopy({name: components[name] for name in ("vae", "text_encoder_2", "tokenizer_2", "scheduler")})
    return {**parts, "unet": unet, "text_encoder": None, "tokenizer": None}


def make_refiner(refiner: dict, force_zeros: bool = False) -> FineLIPSDXLImg2ImgPipeline:
    pipe = FineLIPSDXLImg2ImgPipeline(
        **refiner, requires_aesthetics_score=True, force_zeros_for_empty_prompt=force_zeros
    )
    pipe.swap_text_encoders()
    return pipe


def test_a_refiner_draws_the_last_fifth_as_stock_s_would(components, refiner, stock) -> None:
    comparison = make_comparison(components, make_refiner(refiner))
    steps = []
    drawn = comparison.draw("stock", Settings(LONG, steps=10, seed=3), lambda *step: steps.append(step))
    assert steps == [(step, 10) for step in range(1, 11)]

    last = StableDiffusionXLImg2ImgPipeline(
        **copy.deepcopy(refiner), requires_aesthetics_score=True, force_zeros_for_empty_prompt=False
    )
    generator = torch.Generator().manual_seed(3)
    common = {"num_inference_steps": 10, "generator": generator}
    latents = stock(LONG, denoising_end=0.8, output_type="latent", guidance_scale=5.0, **common).images
    expected = last(LONG, image=latents, denoising_start=0.8, guidance_scale=5.0, **common).images[0]
    assert difference(drawn.image, expected) <= 1


@pytest.mark.parametrize("force_zeros", [True, False])
def test_a_short_prompt_and_its_negative_are_stock_s_in_the_refiner_too(components, refiner, force_zeros) -> None:
    comparison = make_comparison(components, make_refiner(refiner, force_zeros))
    for settings in (Settings(prompt, negative, steps=5) for prompt in SHORT for negative in NEGATIVES):
        assert_same_states(comparison._refiner, settings)
    stock, compel = (
        comparison.draw(column, Settings("a fox", "a hare", steps=5)).image for column in ("stock", "compel")
    )
    assert difference(stock, compel) <= 1


def test_too_few_steps_for_a_refiner_are_named(components, refiner) -> None:
    comparison = make_comparison(components, make_refiner(refiner))
    with pytest.raises(ValueError, match=r"`steps` is 4; with a refiner, .* expected at least 5"):
        comparison.draw("stock", Settings(LONG, steps=4))
    comparison.draw("stock", Settings(LONG, steps=5))


def test_the_refiner_too_reads_the_prompt_in_each_column_s_way(components, refiner) -> None:
    comparison = make_comparison(components, make_refiner(refiner))
    images = [comparison.draw(column, Settings(LONG, steps=10)).image for column in COLUMNS]
    assert len({image.tobytes() for image in images}) == 3
    read = comparison._refiner._encode_by_compel(Settings(LONG))
    assert read["prompt_embeds"].shape == read["negative_prompt_embeds"].shape == (1, 3 * 77, 48)
    assert read["pooled_prompt_embeds"].shape == read["negative_pooled_prompt_embeds"].shape == (1, 24)


def test_the_refiner_reads_with_the_options_of_the_base(stock_folder, refiner, tmp_path) -> None:
    make_refiner(refiner).save_pretrained(tmp_path)
    encoder = f"{stock_folder}/text_encoder_2"
    options = {"weighting": "a1111", "overflow": "truncate", "hidden_states": "last"}
    comparison = Comparison.load(stock_folder, refiner=str(tmp_path), finelip_2=encoder, **options)
    base, refining = comparison._base.pipe, comparison._refiner.pipe
    assert comparison.sources == {
        "base": Path(stock_folder).name,
        "refiner": tmp_path.name,
        "finelip_2": "text_encoder_2",
        "dtype": "float32",
    }
    assert refining.weighting == base.weighting == "a1111"
    assert refining.overflow == base.overflow == "truncate"
    found, expected = refining.text_encoder_2.state_dict(), base.text_encoder_2.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    # These are what an adapter or a FineLIP of the base was trained for.
    assert (base.hidden_states, refining.hidden_states) == ("last", "penultimate")
    spied = []
    refining.encode_prompt = lambda *_, **__: spied.append(refining.hidden_states) or 1 / 0
    with pytest.raises(ZeroDivisionError):
        comparison.draw("finelip", Settings("a fox", steps=5, hidden_states="last"))
    assert spied == ["penultimate"]


def test_weights_of_the_prompt_are_read_by_base_and_refiner(components, refiner) -> None:
    comparison = make_comparison(components, make_refiner(refiner))
    pipes, encoded = (comparison._base.pipe, comparison._refiner.pipe), []
    for pipe in pipes:

        def encode(*texts, pipe=pipe, by=pipe.encode_prompt, **given) -> tuple:
            found = by(*texts, **given)
            if given.get("prompt_embeds") is None:  # a picture is drawn from embeddings
                encoded.append((given.get("weighting", pipe.weighting), found[0]))
            return found

        pipe.encode_prompt = encode
    comparison.draw("finelip", Settings("a (fox:1.4) sleeps", steps=5, weighting="a1111"))
    comparison.draw("finelip", Settings("a fox sleeps", steps=5, weighting="a1111"))
    assert [weighting for weighting, _ in encoded] == ["a1111"] * 4
    weighted, plain = encoded[:2], encoded[2:]
    for (_, heavy), (_, light) in zip(weighted, plain, strict=True):
        assert heavy.shape == light.shape
        assert not torch.allclose(heavy, light)
    assert [pipe.weighting for pipe in pipes] == [None, None]


def test_a_finelip_is_added_to_the_refiner_s_encoder_as_to_the_base_s(stock_folder, refiner, tmp_path) -> None:
    with torch.no_grad():
        refiner["text_encoder_2"].text_projection.weight += 1
    make_refiner(refiner).save_pretrained(tmp_path)
    arguments = {"finelip_2": f"{stock_folder}/text_encoder_2", "finelip_merge": "delta", "finelip_base": stock_folder}
    comparison = Comparison.load(stock_folder, refiner=str(tmp_path), **arguments)
    # What the base's own encoder has changed against the base is nothing.
    found = comparison._refiner.pipe.text_encoder_2.text_projection.weight
    torch.testing.assert_close(found, refiner["text_encoder_2"].text_projection.weight)


def test_stock_draws_though_short_prompts_are_stretched(stock_folder) -> None:
    encoder = f"{stock_folder}/text_encoder"
    comparison = Comparison.load(stock_folder, finelip=encoder, short_prompt_encoder="long")
    assert comparison.pipe.short_prompt_encoder == "long"
    assert comparison.draw("stock", SETTINGS).image.size == (16, 16)


# Planning


def test_each_column_plans_the_prompt(comparison) -> None:
    prompt = LONG.strip()
    plans = comparison.plan(prompt)
    assert [len(plan.windows) for plan in plans.values()] == [1, 3, 1]
    assert plans["stock"].windows[0].tokens == 77
    assert plans["stock"].cut_tokens == 162 - 77
    assert all("".join(w.text for w in plan.windows) + plan.cut_text == prompt for plan in plans.values())
    assert all(window.text.rstrip().endswith(".") for window in plans["compel"].windows)  # it cuts at sentences


def test_compel_s_windows_are_those_that_it_encodes(comparison) -> None:
    windows = comparison.plan(LONG, ["compel"])["compel"].windows
    read = comparison._base.compel(LONG, None)
    rows = read.tokenization_info["main_positive"][0].reshape(-1, 77).tolist()
    end = comparison._base.stock.tokenizer.eos_token_id
    assert [tuple(row[1 : row.index(end)]) for row in rows] == [window.token_ids for window in windows]


def test_compel_s_syntax_is_taken_out_of_its_plan(comparison) -> None:
    (window,) = comparison.plan("a (red)1.3 fox++", ["compel"])["compel"].windows
    assert window.text == "a red fox"


def test_white_space_is_shown_as_it_was_written(comparison) -> None:
    (window,) = comparison.plan("a red\n\n fox", ["compel"])["compel"].windows
    assert window.text == "a red\n\n fox"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("(" * 3000, "compel would take minutes for so many nested brackets"),
        ("(" * 10 + "a fox", "compel would take minutes for so many nested brackets"),
        ("((((a fox, " + "a hare, " * 50, "compel would take minutes for so many nested brackets"),
        ('("a fox", "a hare").blend(0.5, 0.5) above', "compel cannot parse this prompt .*: take out its syntax"),
        ("a fox" + "+" * 7448, "compel cannot parse this prompt .a weight too large to be a number.: take out"),
        ("a fox\x0b in the snow", "compel cannot parse this prompt .*: take out its syntax"),
    ],
)
def test_what_compel_cannot_parse_is_told_in_a_sentence(comparison, prompt, message) -> None:
    with pytest.raises(ValueError, match=message):
        comparison.plan(prompt)
    with pytest.raises(ValueError, match=message):
        comparison.draw("compel", Settings(prompt, steps=1))
    with pytest.raises(ValueError, match=message):
        comparison.draw("compel", Settings("a fox", prompt, steps=1))
    assert comparison.plan(prompt, ["stock", "finelip"])


@pytest.mark.parametrize("prompt", ["((((a fox))))", r"\(" * 50, ":( " + "a fox, " * 200, ")" * 99, "(a fox) " * 50])
def test_what_compel_parses_soon_is_not_refused(comparison, prompt) -> None:
    assert comparison.plan(prompt, ["compel"])["compel"].windows


def test_a_text_that_is_too_long_is_refused_before_it_is_planned(comparison) -> None:
    with pytest.raises(ValueError, match="has 30,000 characters; expected at most 20,000"):
        comparison.plan("a fox " * 5000)


@pytest.mark.parametrize(
    ("columns", "error", "message"),
    [
        (["stock"] * 300, ValueError, "`columns` names 'stock' 300 times: pass each column once"),
        (["finelip", "stock", "finelip"], ValueError, "`columns` names 'finelip' 2 times"),
        ([], ValueError, "`columns` is empty; pass at least one of 'stock', 'compel', 'finelip'"),
        (["other"], ValueError, "`column` must be one of 'stock', 'compel', 'finelip', but is 'other'"),
        ("stock", TypeError, "`columns` must be a list of .*, but is 'stock'"),
        (None, TypeError, "`columns` must be a list of .*, but is None"),
        ([["stock"]], TypeError, "`columns` must be a list of"),
        ({"stock": 1}, TypeError, "`columns` must be a list of"),
    ],
)
def test_columns_that_are_no_columns_are_named(comparison, columns, error, message) -> None:
    with pytest.raises(error, match=message):
        comparison.plan("a fox", columns)


@pytest.mark.parametrize("prompt", [None, 3, ["a fox"], {}])
def test_only_strings_are_planned(comparison, prompt) -> None:
    with pytest.raises(TypeError, match="`prompt` must be a string, but is"):
        comparison.plan(prompt)


# Settings


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("steps", 0, "`steps` is 0; expected a whole number from 1 to 200"),
        ("steps", 2.5, "`steps` is 2.5; expected a whole number"),
        ("steps", True, "`steps` is True"),
        ("guidance_scale", float("nan"), "`guidance_scale` is nan; expected a number from 0 to 50"),
        ("seed", -1, "`seed` is -1; expected a whole number from 0 to 4294967295"),
        ("seed", 2**32, "`seed` is 4294967296"),
        ("height", 8, "`height` is 8; expected a whole number from 64 to 2048"),
        ("conditioning_adapter_scale", 1.5, "`conditioning_adapter_scale` is 1.5; expected a number from 0 to 1"),
        ("hidden_states", "first", "`hidden_states` must be one of 'penultimate', 'last', but is 'first'"),
        ("prompt", "a fox " * 5000, "`prompt` has 30,000 characters"),
    ],
)
def test_settings_out_of_range_are_named(name, value, message) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**{"prompt": "a fox", name: value})


@pytest.mark.parametrize(("factor", "near"), [(8, 104), (16, 96)])
def test_a_size_that_a_model_cannot_draw_is_named_with_its_factor(factor, near) -> None:
    with pytest.raises(ValueError, match=f"`height` is 108; expected a multiple of {factor}, such as {near}"):
        Settings("a fox", width=112, height=108).check_size(factor)
    Settings("a fox", width=112).check_size(factor)


def test_a_prompt_that_is_no_text_is_named() -> None:
    with pytest.raises(TypeError, match="`prompt` must be a string, but is 3"):
        Settings(3)  # type: ignore[arg-type]


def test_a_picture_says_what_it_was_drawn_from(comparison) -> None:
    picture = comparison.draw("stock", SETTINGS)
    assert picture.parameters["column"] == "stock"
    assert (picture.parameters["width"], picture.parameters["height"]) == picture.image.size
    with pytest.raises(ValueError, match="`width` is 16"):  # smaller than anybody would ask for
        Settings.from_parameters(picture.parameters)
    comparison.sources = {"base": "some/sdxl"}
    assert comparison.draw("stock", SETTINGS).parameters["base"] == "some/sdxl"
    again = Settings.from_parameters({**picture.parameters, "width": None, "height": None})
    assert again == SETTINGS.filled(comparison.recommended)


def test_settings_are_read_from_what_the_command_line_wrote() -> None:
    written = {"prompt": "a fox", "negative_prompt": None, "steps": 4, "base": "miniature", "width": 96}
    assert Settings.from_parameters(written) == Settings("a fox", steps=4, width=96)


def test_parameters_without_a_prompt_are_refused() -> None:
    with pytest.raises(ValueError, match="hold no prompt"):
        Settings.from_parameters({"steps": 4})


# Pictures together


def test_a_grid_has_a_row_for_each_seed_and_counts_what_is_right() -> None:
    prompt = "A red star is in the top left."
    pictures = [
        Picture(column, Image.new("RGB", (96, 96)), settings, seconds=0.1)
        for settings in Settings(prompt).over_seeds(2)
        for column in ("stock", "finelip")
    ]
    plain, counted = label_pictures(pictures), label_pictures(pictures, parse_description(prompt))
    assert plain.height > 2 * 256
    assert counted.height > plain.height
    assert counted.width == plain.width < 3 * 256 + 200


@pytest.mark.parametrize("count", [0, -1, 101, 10**9, 2.0, None, True, float("nan")])
def test_a_number_of_seeds_out_of_range_is_named(count) -> None:
    with pytest.raises(ValueError, match=r"`seeds` is .*; expected a whole number from 1 to 100"):
        Settings("a fox").over_seeds(count)


def test_seeds_follow_one_another_up_to_the_largest() -> None:
    assert [settings.seed for settings in Settings("a fox", seed=7).over_seeds(3)] == [7, 8, 9]
    with pytest.raises(ValueError, match="`seed` is 4294967296"):
        Settings("a fox", seed=2**32 - 1).over_seeds(2)


# Loading


def test_the_miniature_is_known_as_such() -> None:
    comparison = Comparison.load()
    assert comparison.is_miniature
    assert comparison.size == (IMAGE_SIZE, IMAGE_SIZE)
    assert comparison.pipe.conditioning_adapter is not None
    assert num_positions(comparison._base.stock.text_encoder) == 77


def test_any_saved_sdxl_is_compared(stock_folder) -> None:
    comparison = Comparison.load(stock_folder)
    assert not comparison.is_miniature
    assert comparison.pipe.conditioning_adapter is None
    assert comparison.draw("finelip", SETTINGS).image.size == (16, 16)


def test_a_base_that_is_not_there_is_named() -> None:
    with pytest.raises(OSError, match="no-such-folder"):
        Comparison.load("./no-such-folder")


def test_keys_and_values_of_the_text_are_computed_once_a_picture(comparison, monkeypatch) -> None:
    layer = comparison.pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k
    linear, ran = torch.nn.functional.linear, []

    def counting(input, weight, bias=None) -> torch.Tensor:
        ran.append(weight is layer.weight)
        return linear(input, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", counting)
    for column in COLUMNS:
        ran.clear()
        comparison.draw(column, SETTINGS)
        assert sum(ran) == 1


def encodings(comparison) -> list[int]:
    """Grows at each run of a text encoder."""
    ran: list[int] = []
    for name in ("text_encoder", "text_encoder_2", "stock_text_encoder", "stock_text_encoder_2"):
        encoder = getattr(comparison.pipe, name)
        encoder.register_forward_pre_hook(
            lambda _, given, named: ran.append(len((*given, *named.values())[0])), with_kwargs=True
        )
    return ran


@pytest.mark.parametrize("column", COLUMNS)
def test_seeds_of_one_prompt_are_encoded_once(components, column) -> None:
    settings = replace(SETTINGS, negative_prompt="small").over_seeds(3)
    expected = [make_comparison(copy.deepcopy(components)).draw(column, one).image for one in settings]
    comparison = make_comparison(components)
    ran = encodings(comparison)
    comparison.draw(column, settings[0])
    once = len(ran)
    assert once >= 2
    drawn = [comparison.draw(column, one).image for one in settings]
    assert len(ran) == once
    for one, other in zip(drawn, expected, strict=True):
        assert difference(one, other) <= 1


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": SENTENCE},
        {"negative_prompt": "a hare"},
        {"guidance_scale": 1.0},
        {"hidden_states": "last"},
        {"weighting": "compel"},
        {"conditioning_adapter_scale": 0.5},
    ],
    ids=str,
)
def test_other_settings_are_encoded_anew(comparison, change) -> None:
    ran = encodings(comparison)
    comparison.draw("finelip", SETTINGS)
    once = len(ran)
    comparison.draw("finelip", replace(SETTINGS, **change))
    assert len(ran) > once


def test_changed_options_and_encoders_encode_anew(comparison) -> None:
    ran, pipe = encodings(comparison), comparison.pipe

    def turned() -> None:
        with torch.no_grad():
            pipe.text_encoder_2.get_input_embeddings().weight.neg_()

    comparison.draw("finelip", SETTINGS)
    for change in (lambda: setattr(pipe, "overflow", "truncate"), lambda: setattr(pipe, "length_buckets", ()), turned):
        before = len(ran)
        change()
        comparison.draw("finelip", SETTINGS)
        assert len(ran) > before


@pytest.mark.parametrize("negative_prompt", ["", "a hare " * 60])
@pytest.mark.parametrize("column", COLUMNS)
def test_a_traced_picture_is_the_same_and_knows_its_phrases(comparison, column, negative_prompt) -> None:
    prompt = SENTENCE * 40 + "the quiet hare of the end."
    settings = Settings(prompt, negative_prompt, steps=2, seed=3)
    plain, traced = comparison.draw(column, settings), comparison.draw(column, settings, traced=True)
    assert difference(plain.image, traced.image) <= 1
    assert plain.trace is None
    assert traced.trace is not None
    assert traced.trace.text() == prompt
    assert [phrase.is_encoded for phrase in traced.trace.phrases()][::40] == [True, column != "stock"]


def test_a_negative_weight_is_traced_with_the_effect_that_has_one(comparison) -> None:
    settings = Settings("a fox, (blur:-0.5)", steps=1, weighting="a1111", emphasis="comfyui")
    trace = comparison.draw("finelip", settings, traced=True).trace
    assert trace is not None
    assert trace.text() == "a fox, blur"


def test_what_is_more_than_weights_has_no_trace_in_compels_column(comparison) -> None:
    prompt = f'("{SENTENCE * 5}", "{SENTENCE * 5}").blend(0.5, 0.5)'
    traces = [comparison.draw(column, Settings(prompt, steps=1), traced=True).trace for column in COLUMNS]
    assert [trace is None for trace in traces] == [column == "compel" for column in COLUMNS]


def test_a_refiner_is_no_part_of_the_trace(components) -> None:
    refiner = FineLIPSDXLImg2ImgPipeline(**copy.deepcopy(components))
    refiner.swap_text_encoders()
    picture = make_comparison(components, refiner).draw("finelip", Settings(LONG, steps=5, seed=3), traced=True)
    assert picture.trace is not None
    assert len(picture.trace.phrases()) == 20


@pytest.mark.parametrize(
    ("prompt", "text"), [("a [red:blue:1] fox", "a red fox"), ("a red fox AND a hare :0.5", "a red fox ")]
)
def test_prompts_of_several_texts_are_drawn_without_a_trace(comparison, prompt, text) -> None:
    settings = Settings(prompt, steps=2, seed=3, weighting="a1111")
    picture = comparison.draw("finelip", settings, traced=True)
    assert picture.trace is None
    expected = draw(comparison.pipe, settings, prompt, weighting="a1111", hidden_states="penultimate")
    assert difference(picture.image, expected) <= 1
    assert comparison.plan(prompt, ["finelip"], weighting="a1111")["finelip"].windows[0].text == text


def test_a_blend_is_drawn_without_a_trace(comparison) -> None:
    settings = Settings('("a red fox", "a hare").blend(0.7, 0.3)', steps=2, seed=3, weighting="compel")
    assert comparison.draw("finelip", settings, traced=True).trace is None
    assert comparison.plan(settings.prompt, ["finelip"], weighting="compel")["finelip"].windows[0].text == "a red fox"
