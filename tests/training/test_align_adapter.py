"""The alignment recipe: what it learns from and minimizes, what comes out, what a stop costs, and what it refuses."""

import copy
import doctest
import json
import os
import shutil
import signal
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
from diffusers.training_utils import EMAModel
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from finelip_sdxl import ConditioningAdapter, FineLIPSDXLPipeline
from finelip_sdxl.data import UnreadableImageError, load_tokenizer, open_dataset, split_sentences
from finelip_sdxl.data.file_dataset import FileDataset
from finelip_sdxl.miniature.dataset import MiniatureScenes
from finelip_sdxl.text_encoders import num_positions
from finelip_sdxl.training import alignment, precompute
from finelip_sdxl.training import processes as training_processes
from finelip_sdxl.training.alignment import (
    Alignment,
    ImageAlignment,
    TextAlignment,
    build_teacher_contexts,
    captions_of,
    encode,
    fit,
    relative_error,
    word_rarity,
)
from finelip_sdxl.training.command_line import read_preset
from finelip_sdxl.training.precompute import Precomputed, cut_square
from finelip_sdxl.training.processes import held
from finelip_sdxl.training.run_folder import RunFolder
from tests.helpers.recipes import KillIn, Stop, forget_accelerator, nothing, on_two_processes, processes, refusal
from tests.helpers.single_file import save_single_file
from training import align_adapter
from training.align_adapter import ENCODERS, Adapter, Lora

SHORT = ["A red star is in the middle.", "The top left holds a small ring in green."]


@pytest.fixture(autouse=True)
def one_thread_and_no_state(monkeypatch) -> Any:
    """Sums are the same bit for bit, no accelerator hears of the one before, and pictures on the way cost two steps."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(align_adapter, "VALIDATION_STEPS", 2)
    yield
    forget_accelerator()
    torch.set_num_threads(threads)


def load_pair(base: Path, **options: Any) -> tuple[FineLIPSDXLPipeline, StableDiffusionXLPipeline]:
    """The pipeline that is aligned, of stretched encoders, and stock."""
    stock = StableDiffusionXLPipeline.from_pretrained(base)
    pipe = FineLIPSDXLPipeline(**stock.components, length_buckets=(77,), **{"short_prompt_encoder": "long", **options})
    pipe.swap_text_encoders()
    for model in (pipe.text_encoder, pipe.text_encoder_2, pipe.unet, pipe.vae):
        model.requires_grad_(False)
    return pipe, stock


def build(method: str, pipe: FineLIPSDXLPipeline) -> Adapter | Lora:
    """What is trained, somewhat changed: a new one gives no gradient to what stands before its zeros."""
    torch.manual_seed(0)
    made = Adapter(pipe, hidden_dim=8) if method == "adapter" else Lora(pipe, rank=2)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters:
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return made


def parse(base: Path, out: Path, *flags: str) -> Namespace:
    """Three steps of each stage on 20 scenes; flags change it."""
    common = f"--base {base} --output-dir {out} --cpu --captions miniature:20 --batch-size 5 --resolution 16"
    common += " --checkpointing-steps 2"
    steps = "--text-steps 3 --image-steps 3 --learning-rate 1e-2 --hidden-dim 8 --rank 2 --validate-every 0"
    return align_adapter.parse([*common.split(), *steps.split(), *flags])


def align(base: Path, out: Path, *flags: str) -> dict[str, Any]:
    forget_accelerator()
    return align_adapter.align(parse(base, out, *flags))


def weights(folder: Path) -> dict[str, Tensor]:
    """Of all models in a folder, by file and name."""
    files = sorted(folder.rglob("*.safetensors"))
    return {f"{file.relative_to(folder)} {key}": value for file in files for key, value in load_file(file).items()}


def assert_same_weights(one: Path, other: Path) -> None:
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys() != set()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


@pytest.fixture(scope="module")
def undisturbed(base, tmp_path_factory) -> Callable[..., tuple[Path, dict[int, dict[str, float]]]]:
    """The folder of a run of these flags, made once for all tests that compare with it, and what was logged."""
    runs: dict[tuple[str, ...], tuple[Path, dict[int, dict[str, float]]]] = {}

    def run(*flags: str) -> tuple[Path, dict[int, dict[str, float]]]:
        if flags not in runs:
            with pytest.MonkeyPatch.context() as patch:
                folder, figures = tmp_path_factory.mktemp("undisturbed"), record_figures(patch)
                align(base, folder, *flags)
            runs[flags] = folder, figures
        return runs[flags]

    return run


def checkpoints(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def record_figures(monkeypatch: pytest.MonkeyPatch) -> dict[int, dict[str, float]]:
    """What is logged, by step."""
    figures: dict[int, dict[str, float]] = {}
    monkeypatch.setattr(Accelerator, "log", lambda self, values, step: figures.update({step: dict(values)}))
    return figures


def write_images(folder: Path, sizes: list[tuple[int, int] | None]) -> str:
    """A data set of noise in these sizes (None for a broken file), with captions of three sentences."""
    folder.mkdir()
    lines = []
    for k, size in enumerate(sizes):
        pixels = np.random.default_rng(k).integers(0, 256, (*reversed(size or (4, 4)), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{k}.png")
        if size is None:
            (folder / f"{k}.png").write_bytes(b"no image")
        side = ("left", "right")[k % 2]
        caption = f"Picture {k} is here. A red star is in the middle. A blue ring is in the top {side}."
        lines.append(json.dumps({"image": f"{k}.png", "caption": caption}))
    (folder / "captions.jsonl").write_text("\n".join(lines))
    return f"jsonl:{folder / 'captions.jsonl'}"


@pytest.mark.parametrize("module", [alignment, precompute])
def test_examples_run(module) -> None:
    results = doctest.testmod(module)
    assert results.attempted > 0
    assert results.failed == 0


# What stage 1 learns from


@pytest.fixture(scope="module", params=[1, 2])
def tokenizer(request) -> Any:
    return load_tokenizer(f"miniature-clip-{request.param}", 248)


def ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def test_a_caption_is_cut_to_whole_sentences(tokenizer) -> None:
    for index in range(10):
        caption = MiniatureScenes("test", 10).captions(index)[0]
        cut = fit(caption, tokenizer, positions=77)
        sentences, kept = split_sentences(caption), split_sentences(cut)
        assert 0 < len(kept) < len(sentences)
        assert kept == sentences[: len(kept)]
        assert len(tokenizer(cut).input_ids) <= 77
        assert len(tokenizer(f"{cut} {sentences[len(kept)]}").input_ids) > 77
        assert fit(caption, tokenizer, positions=248) == caption


@pytest.mark.parametrize(
    "text", ["a red star and " * 40, "starstar" * 40, "日本語" * 60, "a 🦊 is here " * 40, "🦊" * 90]
)
@pytest.mark.parametrize("positions", [77, 248])
def test_a_first_sentence_that_does_not_fit_is_cut(tokenizer, text, positions) -> None:
    whole = text.strip() + ". A ring is green."
    cut = fit(whole, tokenizer, positions)
    assert whole.startswith(cut)
    if len(ids(tokenizer, text)) > positions - 2:
        assert "green" not in cut
    assert positions - 6 < len(tokenizer(cut).input_ids) <= positions or cut == whole or cut == text.strip() + "."


def test_both_captions_of_an_image_fit(tokenizer) -> None:
    class OneImage(MiniatureScenes):
        def captions(self, index: int) -> tuple[str, ...]:
            return ("A red star and a blue ring are here, " * 12 + "all of them. " + "Nothing else is here. " * 60,)

        short_caption = FileDataset.short_caption

    captions = captions_of(OneImage("test", 5), 0, tokenizer)
    assert len(tokenizer(captions["short"]).input_ids) == 77
    assert 240 < len(tokenizer(captions["long"]).input_ids) <= 248
    assert captions["long"].endswith("Nothing else is here.")


def test_a_context_knows_where_its_sentence_ends_in_both_texts(tokenizer) -> None:
    for index in range(20):
        caption = MiniatureScenes("test", 20).captions(index)[0]
        sentences, contexts = split_sentences(caption), build_teacher_contexts(caption, tokenizer, {})
        assert ids(tokenizer, caption) == [token for sentence in sentences for token in ids(tokenizer, sentence)]
        for sentence, context in zip(sentences, contexts, strict=True):
            tokens = ids(tokenizer, sentence)
            for text, end in ((caption, context.end_in_caption), (context.text, context.end)):
                assert tokenizer(text).input_ids[end - len(tokens) + 1 : end + 1] == tokens
            assert len(tokenizer(context.text).input_ids) <= 77
            assert context.text.endswith(sentence)
            assert set(split_sentences(context.text)) <= set(sentences)


def test_a_context_holds_what_its_sentence_refers_to() -> None:
    tokenizer, scenes = load_tokenizer("miniature-clip-1"), MiniatureScenes("test", 50)
    rarity = word_rarity([MiniatureScenes("train", 200).captions(index)[0] for index in range(200)])
    held = []
    for index in range(50):
        caption = scenes.caption(index)
        contexts = dict(
            zip(split_sentences(caption.text), build_teacher_contexts(caption.text, tokenizer, rarity), strict=True)
        )
        text_of = {mention.index: caption.text[mention.start : mention.end] for mention in caption.described}
        for reference, linked in zip(caption.mentions, caption.mentions[1:], strict=False):
            if reference.kind == "reference":
                held.append(text_of[reference.index] in contexts[text_of[linked.index]].text)
    assert len(held) > 50
    assert np.mean(held) >= 0.95


def test_what_is_just_before_fills_a_context_where_nothing_is_related(tokenizer) -> None:
    caption = "Green. Gray paper lies. Stars rise. White sand. One ring."
    *_, last = build_teacher_contexts(caption, tokenizer, {})
    assert last.text == caption


def test_of_a_sentence_of_more_than_77_tokens_as_much_is_taught_as_they_hold(tokenizer) -> None:
    long = "A red star is here" + " and a ring" * 30 + "."
    before, context, after = build_teacher_contexts(f"It is quiet. {long} Nothing moves.", tokenizer, {})
    assert context.text == long
    assert context.end == 75
    assert context.end_in_caption == before.end_in_caption + 75
    whole = tokenizer(f"It is quiet. {long}").input_ids
    assert whole[context.end_in_caption] == tokenizer(long).input_ids[75]
    assert after.text == "It is quiet. Nothing moves."
    assert after.end_in_caption == len(whole) - 1 + after.end - before.end - 1


# What is minimized


def test_the_error_is_relative_to_the_target_and_summed_over_encoders() -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(2, 3, 5, generator=generator)
    wrong = target.clone()
    wrong[..., :2] *= 2  # off by all of the first encoder's
    wrong[..., 2:] *= 1.5  # and by half of the second's
    torch.testing.assert_close(relative_error(wrong, target, (2, 3)), torch.tensor(1.25))
    assert relative_error(target, target, (2, 3)) == 0
    assert relative_error(wrong.bfloat16(), target.bfloat16(), (2, 3)).dtype == torch.float32


def test_who_reads_as_stock_makes_no_error_on_short_captions(base) -> None:
    pipe, stock = load_pair(base, short_prompt_encoder="original")
    losses = TextAlignment(pipe, stock, {})(long=[MiniatureScenes("test", 5).captions(0)[0]], short=SHORT)
    assert losses["short"] < 1e-10
    assert losses["pooled"] < 1e-10
    assert losses["long"] > 1e-3
    assert losses["loss"] == losses["long"] + losses["short"] + losses["pooled"]
    # Nor on a caption that 77 tokens hold, since each of its contexts is how it begins.
    held = "A star is here. The star is red. It is the star that is in the middle."
    assert TextAlignment(pipe, stock, {})(long=[held, SHORT[0]], short=SHORT)["long"] < 1e-10


def make_group(prompt: str | None = None, size: int = 2) -> dict[str, Any]:
    """Noise in place of pictures, at timesteps from early to late."""
    generator = torch.Generator().manual_seed(0)
    group = {
        "latents": torch.randn(size, 4, 8, 8, generator=generator),
        "noise": torch.randn(size, 4, 8, 8, generator=generator),
        "timesteps": torch.tensor([20, 700, 980])[:size],
        "time_ids": torch.tensor([[16, 16, 0, 0, 16, 16]] * size),
    }
    return group if prompt is None else {**group, "captions": [prompt] * size}


@pytest.mark.parametrize("method", ["adapter", "lora"])
@pytest.mark.parametrize("stage", ["text", "image"])
def test_gradients_reach_all_that_is_trained_and_nothing_else(base, method, stage) -> None:
    pipe, stock = load_pair(base)
    stock.text_encoder.requires_grad_(False), stock.text_encoder_2.requires_grad_(False)
    trained = build(method, pipe).parameters
    long = MiniatureScenes("test", 5).captions(0)[0]
    if stage == "text":
        losses = TextAlignment(pipe, stock, {})(long=[long], short=SHORT)
    else:
        losses = ImageAlignment(pipe)([make_group(long)])
    losses["loss"].backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in trained)
    mine = {id(parameter) for parameter in trained}
    for model in align_adapter.models_of(pipe, stock).values():
        assert all(parameter.grad is None for parameter in model.parameters() if id(parameter) not in mine)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("gamma", [None, 5.0])
def test_the_denoising_loss_by_hand(base, prediction, gamma) -> None:
    pipe, _ = load_pair(base)
    pipe.register_modules(scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", prediction_type=prediction))
    group = make_group(SHORT[0], size=3)
    betas = torch.linspace(pipe.scheduler.config.beta_start**0.5, pipe.scheduler.config.beta_end**0.5, 1000) ** 2
    kept = (1 - betas).cumprod(0)[group["timesteps"]]  # of the latents' variance
    signal, noise = kept.sqrt()[:, None, None, None], (1 - kept).sqrt()[:, None, None, None]
    states, pooled = encode(pipe, group["captions"])
    with torch.no_grad():
        predicted = pipe.unet(
            signal * group["latents"] + noise * group["noise"],
            group["timesteps"],
            states,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": group["time_ids"]},
        ).sample
    by_noise = prediction == "epsilon"
    target = group["noise"] if by_noise else signal * group["noise"] - noise * group["latents"]
    losses = (predicted - target).square().mean(dim=(1, 2, 3))
    if gamma is not None:
        ratio = kept / (1 - kept)
        assert ratio[0] > gamma > ratio[1]
        losses = losses * torch.minimum(ratio, torch.tensor(gamma)) / (ratio if by_noise else ratio + 1)
    torch.testing.assert_close(ImageAlignment(pipe, gamma)([group])["loss"], losses.mean(), rtol=1e-4, atol=1e-5)


def test_precomputed_states_give_the_loss_of_their_captions(base) -> None:
    pipe, _ = load_pair(base)
    group = make_group(SHORT[0])
    states, pooled = encode(pipe, group["captions"])
    encoded = {name: value for name, value in group.items() if name != "captions"} | {
        "states": states,
        "pooled": pooled,
    }
    for change in (lambda: None, lambda: build("adapter", pipe)):
        change()
        losses = [ImageAlignment(pipe)([one])["loss"].item() for one in (group, encoded)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_groups_count_by_their_pictures(base) -> None:
    pipe, _ = load_pair(base)
    one, two = make_group(SHORT[0], size=1), make_group(SHORT[1], size=3)
    losses = [ImageAlignment(pipe)(groups)["loss"].item() for groups in ([one], [two], [one, two])]
    assert losses[2] == pytest.approx((losses[0] + 3 * losses[1]) / 4, rel=1e-5)


def test_a_checkpoint_of_the_alignment_holds_nothing_of_sdxl(base) -> None:
    pipe, stock = load_pair(base)
    trained = build("adapter", pipe).parameters
    stages = {"text": TextAlignment(pipe, stock, {}), "image": ImageAlignment(pipe)}
    assert len(Alignment(trained, stages).state_dict()) == len(trained)


# What is precomputed


@pytest.mark.parametrize(
    ("size", "time_ids", "box"),
    [
        ((64, 32), [32, 64, 0, 8, 16, 16], (16, 0, 48, 32)),
        ((32, 64), [64, 32, 8, 0, 16, 16], (0, 16, 32, 48)),
        ((8, 8), [8, 8, 0, 0, 16, 16], (0, 0, 8, 8)),
    ],
    ids=["landscape", "portrait", "small square"],
)
def test_the_largest_square_in_the_middle_is_cut_and_time_ids_say_so(size, time_ids, box) -> None:
    ramp = np.add.outer(np.arange(size[1]), np.arange(size[0]))
    image = Image.fromarray(np.repeat(ramp[..., None], 3, axis=2).astype(np.uint8))
    cut, found = cut_square(image, 16)
    assert (cut.size, found) == ((16, 16), time_ids)
    expected = np.asarray(image.crop(box).resize((16, 16), Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(np.asarray(cut) - expected)[1:-1, 1:-1].max() <= 2


def test_odd_sizes_give_the_resolution() -> None:
    for size in ((33, 100), (100, 33), (17, 16), (1, 300)):
        cut, time_ids = cut_square(Image.new("RGB", size), 16)
        assert cut.size == (16, 16)
        assert min(time_ids) >= 0


@pytest.fixture
def small_chunks(monkeypatch) -> None:
    monkeypatch.setattr(precompute, "CHUNK", 3)


def test_precomputed_is_what_vae_and_encoders_give(base, tmp_path, small_chunks) -> None:
    pipe, _ = load_pair(base)
    data = open_dataset(write_images(tmp_path / "data", [(16, 16), (32, 16), (16, 40), (16, 16), (24, 24)]), "train")
    items = precompute.precompute(data, pipe, 16, True, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "chunk-000000.safetensors",
        "chunk-000001.safetensors",
    ]
    assert len(items) == 5
    for index, item in enumerate(items[number] for number in range(5)):
        cut, time_ids = cut_square(data.image(index), 16)
        assert item["time_ids"].tolist() == time_ids
        pixels = torch.from_numpy(np.array(cut)).permute(2, 0, 1)[None] / 127.5 - 1
        with torch.no_grad():
            latents = pipe.vae.encode(pixels).latent_dist.mean[0] * pipe.vae.config.scaling_factor
        torch.testing.assert_close(item["latents"], latents, atol=1e-5, rtol=1e-5)
        assert item["long"] == data.captions(index)[0]
        assert item["short"] == data.short_caption(index)
        for kind, buckets, length in (("long", (), 248), ("short", (77,), 77)):
            pipe.length_buckets = buckets
            with torch.no_grad():
                states, pooled = encode(pipe, [item[kind]])
            assert item[f"{kind}_states"].shape == (length, 80)
            torch.testing.assert_close(item[f"{kind}_states"], states[0], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(item[f"{kind}_pooled"], pooled[0], atol=1e-5, rtol=1e-5)


def test_latents_may_have_a_mean_and_a_deviation(base) -> None:
    pipe, _ = load_pair(base)
    image = cut_square(MiniatureScenes("test", 5).image(0), 16)[0]
    plain = precompute.to_latents(pipe, [image])
    mean, deviation = [0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0]
    pipe.vae.register_to_config(latents_mean=mean, latents_std=deviation)
    factor = pipe.vae.config.scaling_factor
    expected = (plain / factor - torch.tensor(mean)[:, None, None]) * factor / torch.tensor(deviation)[:, None, None]
    torch.testing.assert_close(precompute.to_latents(pipe, [image]), expected)


def test_states_are_left_out_where_what_trains_makes_them(base, tmp_path) -> None:
    pipe, _ = load_pair(base)
    items = precompute.precompute(open_dataset("miniature:5", "train"), pipe, 16, False, tmp_path)
    assert items[0].keys() == {"latents", "time_ids", "long", "short"}


def test_goes_on_from_files_that_are_there_and_reads_back_the_same(base, tmp_path, monkeypatch, small_chunks) -> None:
    pipe, _ = load_pair(base)
    data = open_dataset("miniature:10", "train")
    whole = precompute.precompute(data, pipe, 16, True, tmp_path)
    before = [whole[index] for index in range(10)]
    lost = tmp_path / "chunk-000001.safetensors"
    lost.unlink()
    encoded, to_latents = [], precompute.to_latents
    monkeypatch.setattr(
        precompute, "to_latents", lambda pipe, images: encoded.extend(images) or to_latents(pipe, images)
    )
    again = precompute.precompute(data, pipe, 16, True, tmp_path)
    assert len(encoded) == 3
    for items in (again, Precomputed(tmp_path)):
        assert len(items) == 10
        for index, item in enumerate(before):
            assert items[index].keys() == item.keys()
            for name, value in item.items():
                assert (
                    torch.equal(items[index][name], value) if isinstance(value, Tensor) else items[index][name] == value
                )


def test_a_file_is_written_whole_or_not_at_all(base, tmp_path, monkeypatch, small_chunks) -> None:
    def stop(tensors: dict[str, Tensor], file: Path, **options: Any) -> None:
        Path(file).write_bytes(b"half of it")
        raise Stop

    pipe, _ = load_pair(base)
    data = open_dataset("miniature:5", "train")
    with monkeypatch.context() as patch:
        patch.setattr(precompute, "save_file", stop)
        with pytest.raises(Stop):
            precompute.precompute(data, pipe, 16, False, tmp_path)
    assert not list(tmp_path.glob("chunk-*.safetensors"))
    assert len(precompute.precompute(data, pipe, 16, False, tmp_path)) == 5


def test_an_image_that_cannot_be_read_is_named_and_left_out(base, tmp_path, capsys, small_chunks) -> None:
    pipe, _ = load_pair(base)
    spec = write_images(tmp_path / "data", [(16, 16), None, (16, 16), None, None, None, (16, 16)])
    items = precompute.precompute(open_dataset(spec, "train"), pipe, 16, False, tmp_path / "out")
    printed = capsys.readouterr().out
    for number in (1, 3, 4, 5):
        assert f"skipped: {tmp_path / 'data' / f'{number}.png'} cannot be read" in printed
    assert [items[index]["short"] for index in range(len(items))] == [f"Picture {k} is here." for k in (0, 2, 6)]


def test_none_that_can_be_read_is_an_error(base, tmp_path) -> None:
    pipe, _ = load_pair(base)
    data = open_dataset(write_images(tmp_path / "data", [None, None]), "train")
    with pytest.raises(UnreadableImageError, match="None of the 2 images can be read: see the messages above"):
        precompute.precompute(data, pipe, 16, False, tmp_path / "out")


def encoded(monkeypatch: pytest.MonkeyPatch) -> list[Image.Image]:
    """The images that are encoded from here on."""
    seen, to_latents = [], precompute.to_latents
    monkeypatch.setattr(precompute, "to_latents", lambda pipe, images: seen.extend(images) or to_latents(pipe, images))
    return seen


def same(one: Precomputed, other: Precomputed) -> bool:
    def equal(mine: Any, its: Any) -> bool:
        return torch.equal(mine, its) if isinstance(mine, Tensor) else mine == its

    return len(one) == len(other) and all(
        equal(mine[name], its[name])
        for mine, its in zip((one[k] for k in range(len(one))), (other[k] for k in range(len(other))), strict=True)
        for name in mine
    )


def change_weights(module: nn.Module) -> None:
    with torch.no_grad():
        next(module.parameters()).view(-1)[0] += 1


CHANGES: dict[str, tuple[Callable[[Path, FineLIPSDXLPipeline], Any], int, str]] = {
    "an image": (
        lambda folder, pipe: Image.new("RGB", (20, 20), "red").save(folder / "4.png"),
        3,
        "1 of 3 files are encoded again, since captions or images have changed",
    ),
    "a caption": (
        lambda folder, pipe: (folder / "captions.jsonl").write_text(
            (folder / "captions.jsonl").read_text().replace("Picture 6", "Photo 6")
        ),
        1,
        "1 of 3 files are encoded again, since captions or images have changed",
    ),
    "fewer images": (
        lambda folder, pipe: (folder / "captions.jsonl").write_text(
            "\n".join((folder / "captions.jsonl").read_text().split("\n")[:3])
        ),
        0,
        "",
    ),
    "the VAE": (
        lambda folder, pipe: change_weights(pipe.vae.encoder),
        7,
        "3 of 3 files are encoded again, since the weig",
    ),
    "its scale": (
        lambda folder, pipe: pipe.vae.register_to_config(scaling_factor=0.5),
        7,
        "since the weights of the VAE",
    ),
    "the first encoder": (
        lambda folder, pipe: change_weights(pipe.text_encoder),
        7,
        "or the text encoders have changed",
    ),
    "the second": (lambda folder, pipe: change_weights(pipe.text_encoder_2), 7, "or the text encoders have changed"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_encoded_anew_and_said(base, tmp_path, monkeypatch, capsys, small_chunks, change) -> None:
    pipe, _ = load_pair(base)
    spec, out = write_images(tmp_path / "data", [(16, 16)] * 7), tmp_path / "out"
    precompute.precompute(open_dataset(spec, "train"), pipe, 16, True, out)
    capsys.readouterr()
    make, images, sentence = CHANGES[change]
    make(tmp_path / "data", pipe)
    seen, data = encoded(monkeypatch), open_dataset(spec, "train")
    items = precompute.precompute(data, pipe, 16, True, out)
    assert len(seen) == images
    assert sentence in capsys.readouterr().out
    assert same(items, precompute.precompute(data, pipe, 16, True, tmp_path / "anew"))
    seen.clear()
    precompute.precompute(data, pipe, 16, True, out)
    assert seen == []
    assert capsys.readouterr().out == ""


def test_latents_alone_do_not_depend_on_the_text_encoders(base, tmp_path, monkeypatch) -> None:
    pipe, _ = load_pair(base)
    precompute.precompute(open_dataset("miniature:5", "train"), pipe, 16, False, tmp_path)
    change_weights(pipe.text_encoder)
    seen = encoded(monkeypatch)
    precompute.precompute(open_dataset("miniature:5", "train"), pipe, 16, False, tmp_path)
    assert seen == []


@pytest.mark.parametrize("repaired", [True, False], ids=["repaired", "read by a later version"])
def test_an_image_that_was_left_out_comes_in_when_it_can_be_read(
    base, tmp_path, monkeypatch, capsys, small_chunks, repaired
) -> None:
    pipe, _ = load_pair(base)
    spec, out = write_images(tmp_path / "data", [(16, 16), None, (16, 16), None, None, None]), tmp_path / "out"
    assert len(precompute.precompute(open_dataset(spec, "train"), pipe, 16, False, out)) == 2
    capsys.readouterr()
    assert len(precompute.precompute(open_dataset(spec, "train"), pipe, 16, False, out)) == 2
    assert capsys.readouterr().out.count("skipped: ") == 4  # named each time
    if repaired:
        for k in (1, 4):
            Image.new("RGB", (16, 16), "red").save(tmp_path / "data" / f"{k}.png")
    else:
        image = FileDataset.image
        monkeypatch.setattr(
            FileDataset, "image", lambda self, k: Image.new("RGB", (16, 16)) if k in (1, 4) else image(self, k)
        )
    items = precompute.precompute(open_dataset(spec, "train"), pipe, 16, False, out)
    assert [items[k]["short"] for k in range(4)] == [f"Picture {k} is here." for k in (0, 1, 2, 4)]
    assert "1 of 2 files are encoded again, since " in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"half of it", None])
def test_a_damaged_or_earlier_file_is_encoded_anew(base, tmp_path, capsys, small_chunks, content) -> None:
    pipe, _ = load_pair(base)
    data, file = open_dataset("miniature:5", "train"), tmp_path / "chunk-000001.safetensors"
    precompute.precompute(data, pipe, 16, False, tmp_path)
    if content is None:
        save_file(load_file(file), file, metadata={"captions": "[]"})
    else:
        file.write_bytes(content)
    (tmp_path / ".finelip-sdxl-0123456789abcdef").mkdir()  # by a run that was killed
    assert len(precompute.precompute(data, pipe, 16, False, tmp_path)) == 5
    expected = "an earlier version made them" if content is None else "they are damaged"
    assert f"1 of 2 files are encoded again, since {expected}" in capsys.readouterr().out
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_that_cannot_be_written_to_can_be_read(base, tmp_path, monkeypatch) -> None:
    pipe, _ = load_pair(base)
    data = open_dataset("miniature:5", "train")
    precompute.precompute(data, pipe, 16, False, tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write to all but a read-only disk
    monkeypatch.setattr(training_processes, "FileLock", None)
    assert len(precompute.precompute(data, pipe, 16, False, tmp_path)) == 5


def test_a_disk_that_is_full_leaves_no_half_file(base, tmp_path, monkeypatch, small_chunks) -> None:
    def fail(tensors: dict[str, Tensor], file: Path, **options: Any) -> None:
        Path(file).write_bytes(b"half of it")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    pipe, _ = load_pair(base)
    monkeypatch.setattr(precompute, "save_file", fail)
    with pytest.raises(OSError, match=r"chunk-000000.safetensors cannot be written to \(No space left on device\)"):
        precompute.precompute(open_dataset("miniature:5", "train"), pipe, 16, False, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_other_settings_is_another(tmp_path) -> None:
    def folder(*flags: str) -> Path:
        return align_adapter.precomputed_folder(align_adapter.parse(["--output-dir", str(tmp_path), *flags]))

    for flags in (
        ("--resolution", "48"),
        ("--captions", "miniature:30"),
        ("--finelip", "miniature-clip-1"),
        ("--finelip-2", "miniature-clip-2"),
        ("--images", "pictures"),
        ("--mixed-precision", "bf16"),
        ("--method", "lora"),
        ("--base", "other", "--captions", "miniature:2000"),
    ):
        assert folder(*flags) != folder(), flags
    for flags in (("--seed", "1"), ("--hidden-dim", "8"), ("--image-steps", "7"), ("--output-dir", str(tmp_path))):
        assert folder(*flags) == folder(), flags
    assert folder().parent == tmp_path / "precomputed"
    assert folder("--precomputed", "shared") == Path("shared") / folder().name


# The recipe: what comes out


def test_without_arguments_the_miniature_is_aligned() -> None:
    arguments = align_adapter.parse([])
    for name, value in read_preset(align_adapter.MINIATURE).items():
        assert getattr(arguments, name) == value
    arguments = align_adapter.parse(["--base", "other", "--captions", "csv:captions.csv"])
    assert (arguments.finelip, arguments.finelip_2) == (None, None)
    for name, value in read_preset(align_adapter.SDXL).items():
        assert getattr(arguments, name) == value


def test_help_shows_what_flags_default_to(capsys) -> None:
    with pytest.raises(SystemExit):
        align_adapter.parse(["--help"])
    printed = " ".join(capsys.readouterr().out.split())  # lines are broken at the width of the terminal
    assert "(default: runs/alignment)" in printed
    sdxl, miniature = (read_preset(preset)["text_steps"] for preset in (align_adapter.SDXL, align_adapter.MINIATURE))
    assert f"(default: {sdxl} / {miniature})" in printed


@pytest.fixture
def seen(monkeypatch) -> dict[str, Any]:
    """The pipelines of a run, `pipe` and `stock`, and the models that it began with and their weights."""
    models_of, found = align_adapter.models_of, {}

    def observed(pipe: FineLIPSDXLPipeline, stock: StableDiffusionXLPipeline) -> dict[str, nn.Module]:
        models = models_of(pipe, stock)
        if "models" not in found:
            before = {name: copy.deepcopy(model.state_dict()) for name, model in models.items()}
            found.update(pipe=pipe, stock=stock, models=models, before=before)
        return models

    monkeypatch.setattr(align_adapter, "models_of", observed)
    return found


def made(out: Path) -> list[str]:
    return sorted(path.name for path in out.iterdir() if path.name not in ("checkpoints", "precomputed"))


@pytest.mark.parametrize("method", ["adapter", "lora"])
@pytest.mark.parametrize(
    ("steps", "folders"),
    [((2, 0), ["last"]), ((0, 2), ["last"]), ((2, 2), ["after-text", "last"])],
    ids=["text", "image", "both"],
)
def test_what_comes_out_loads_and_reads_as_what_was_trained(
    base, tmp_path, capsys, seen, method, steps, folders
) -> None:
    flags = ("--method", method, "--text-steps", str(steps[0]), "--image-steps", str(steps[1]))
    progress = align(base, tmp_path, *flags)
    assert progress == {"step": sum(steps)}
    printed = capsys.readouterr().out
    assert f"result: {tmp_path / 'last'}" in printed
    use = "--conditioning-adapter" if method == "adapter" else f"--finelip {tmp_path / 'last' / 'text_encoder'}"
    assert f"--base {base} {use}" in printed
    assert printed.index("disk: about") < printed.index("done:")
    assert ("precomputed" in printed) == (steps[1] > 0)
    assert made(tmp_path) == folders
    assert (tmp_path / "precomputed").exists() == (steps[1] > 0)

    # Nothing of SDXL has changed.
    for name, model in seen["models"].items():
        after = model.state_dict()
        assert after.keys() == seen["before"][name].keys()
        assert all(torch.equal(after[key], value) for key, value in seen["before"][name].items()), name

    if method == "adapter":
        given: dict[str, Any] = {"conditioning_adapter": tmp_path / "last"}
    else:
        given = {
            name: tmp_path / "last" / encoder for name, encoder in zip(("finelip", "finelip_2"), ENCODERS, strict=True)
        }
    loaded = FineLIPSDXLPipeline.from_pretrained(base, **given, short_prompt_encoder="long", length_buckets=(77,))
    untrained, _ = load_pair(base)
    texts = [SHORT[0], MiniatureScenes("test", 5).captions(0)[0]]
    with torch.no_grad():
        for mine, trained, before in zip(
            encode(loaded, texts), encode(seen["pipe"], texts), encode(untrained, texts), strict=True
        ):
            torch.testing.assert_close(mine, trained, atol=5e-5, rtol=1e-4)
            assert not torch.allclose(mine, before, atol=1e-3)
    # Short prompts are read as by stock, unless asked for otherwise.
    loaded = FineLIPSDXLPipeline.from_pretrained(base, **given)
    for mine, stocks in zip(encode(loaded, SHORT), encode(seen["stock"], SHORT), strict=True):
        assert torch.equal(mine, stocks)


def test_a_lora_comes_out_as_plain_encoders(base, tmp_path) -> None:
    align(base, tmp_path, "--method", "lora", "--text-steps", "2", "--image-steps", "0")
    for name, kind in (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection)):
        folder = tmp_path / "last" / name
        assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
        keys = load_file(folder / "model.safetensors").keys()
        assert all(key.startswith("text_model.") or key == "text_projection.weight" for key in keys)
        assert not [key for key in keys if "lora" in key or "base_layer" in key]
        config = json.loads((folder / "config.json").read_text())
        assert config["architectures"] == [kind.__name__]
        assert not {"stretched_from", "stretch_keep", "stretch_factor"} & config.keys()
        encoder = kind.from_pretrained(folder)
        assert num_positions(encoder) == config["max_position_embeddings"] == 248
        # What stands behind the states that are read, and so got no gradient, is as it was.
        stock = kind.from_pretrained(base / name).state_dict()
        changed = {key for key, value in encoder.state_dict().items() if not torch.equal(value, stock.get(key, value))}
        assert any("layers.1." in key for key in changed)
        assert any("layers.2." in key for key in changed) == (name == "text_encoder_2")


def test_a_merged_lora_reads_as_the_one_that_trained(base) -> None:
    # In double precision, where the two ways to add a product differ by rounding alone: some 1e-14.
    pipe, other = (load_pair(base)[0].to(torch.float64) for _ in range(2))
    torch.manual_seed(0)
    lora, merged = build("lora", pipe), {}
    lora.save(SimpleNamespace(save_model=lambda name, **parts: merged.update(parts)), "last")
    texts = MiniatureScenes("test", 5).captions(0) + MiniatureScenes("test", 5).captions(1)
    with torch.no_grad():
        trained, stretched = encode(pipe, texts), encode(other, texts)
        other.register_modules(**merged)
        for mine, expected, before in zip(encode(other, texts), trained, stretched, strict=True):
            torch.testing.assert_close(mine, expected, atol=1e-9, rtol=1e-9)
            assert not torch.allclose(mine, before, atol=1e-3)


def test_an_average_of_weights_comes_out(base, tmp_path, monkeypatch) -> None:
    step, trained = EMAModel.step, []

    def observed(self: EMAModel, parameters: list[nn.Parameter]) -> None:
        trained.append([parameter.detach().clone() for parameter in parameters])
        step(self, parameters)

    monkeypatch.setattr(EMAModel, "step", observed)
    align(base, tmp_path, "--text-steps", "6", "--image-steps", "0", "--ema-decay", "0.7")
    average = trained[0]
    for number, values in enumerate(trained[1:], 1):
        decay = min(0.7, 1 - (1 + number) ** -0.75)
        average = [decay * old + (1 - decay) * new for old, new in zip(average, values, strict=True)]
    last = list(ConditioningAdapter.from_pretrained(tmp_path / "last").parameters())
    for mine, expected, raw in zip(last, average, trained[-1], strict=True):
        torch.testing.assert_close(mine, expected)
        assert not torch.allclose(mine, raw)


def test_the_second_stage_begins_with_the_average(base, tmp_path, monkeypatch) -> None:
    losses, first = ImageAlignment.__call__, []

    def observed(self: ImageAlignment, groups: list[dict[str, Any]]) -> dict[str, Tensor]:
        first.append([parameter.detach().clone() for parameter in self.pipe.conditioning_adapter.parameters()])
        return losses(self, groups)

    monkeypatch.setattr(ImageAlignment, "__call__", observed)
    align(base, tmp_path)
    expected = ConditioningAdapter.from_pretrained(tmp_path / "after-text").parameters()
    assert all(torch.equal(mine, its) for mine, its in zip(first[0], expected, strict=True))


@pytest.mark.slow
def test_losses_fall(base, tmp_path, monkeypatch) -> None:
    history = record_figures(monkeypatch)
    align(base, tmp_path, "--captions", "miniature:5", "--text-steps", "60", "--image-steps", "0", "--method", "lora")
    for name in ("loss", "long", "short", "pooled"):
        assert history[60][f"text/{name}"] < 0.8 * history[1][f"text/{name}"], name
    assert all(type(figure) is float for figure in history[1].values())


def test_both_stages_have_long_and_short_captions_in_each_batch(base, tmp_path, monkeypatch) -> None:
    text, image, sizes = TextAlignment.__call__, ImageAlignment.__call__, []

    def observed_text(self: TextAlignment, long: list[str], short: list[str]) -> dict[str, Tensor]:
        sizes.append((len(long), len(short)))
        return text(self, long, short)

    def observed_image(self: ImageAlignment, groups: list[dict[str, Any]]) -> dict[str, Tensor]:
        assert [group["states"].shape[1] for group in groups] == [248, 77]
        sizes.append(tuple(len(group["latents"]) for group in groups))
        return image(self, groups)

    monkeypatch.setattr(TextAlignment, "__call__", observed_text)
    monkeypatch.setattr(ImageAlignment, "__call__", observed_image)
    align(base, tmp_path, "--text-steps", "1", "--image-steps", "1", "--batch-size", "10", "--short-share", "0.3")
    assert sizes == [(7, 3), (7, 3)]
    for share, expected in (("0.01", 9), ("0.99", 1)):
        assert align_adapter.num_long(parse(base, tmp_path, "--batch-size", "10", "--short-share", share)) == expected


@pytest.mark.slow
def test_gradient_checkpointing_changes_nothing(base, tmp_path, undisturbed) -> None:
    for flags in ((), ("--method", "lora")):
        align(base, tmp_path / str(len(flags)), *flags, "--gradient-checkpointing")
        plain, saving = (weights(out / "last") for out in (undisturbed(*flags)[0], tmp_path / str(len(flags))))
        for key in plain:
            torch.testing.assert_close(plain[key], saving[key], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ["adapter", "lora"])
def test_bfloat16_trains_as_well(base, tmp_path, monkeypatch, method) -> None:
    history = record_figures(monkeypatch)
    align(base, tmp_path, "--method", method, "--mixed-precision", "bf16", "--text-steps", "2", "--image-steps", "2")
    assert all(np.isfinite(figure) for figures in history.values() for figure in figures.values())
    expected = torch.float32 if method == "adapter" else torch.bfloat16
    assert {value.dtype for value in weights(tmp_path / "last").values()} == {expected}


def test_texts_alone_need_no_images(base, tmp_path) -> None:
    file = tmp_path / "captions.txt"
    file.write_text("\n\n".join(MiniatureScenes("train", 6).captions(k)[0] for k in range(6)))
    align(base, tmp_path / "run", "--captions", f"txt:{file}", "--image-steps", "0", "--validate-every", "0")
    assert made(tmp_path / "run") == ["last"]


def test_pictures_that_cannot_be_read_are_left_out_of_the_second_stage(base, tmp_path, capsys) -> None:
    data = write_images(tmp_path / "data", [(16, 16)] * 6 + [None])
    align(base, tmp_path / "run", "--captions", data)
    assert f"skipped: {tmp_path / 'data' / '6.png'} cannot be read" in capsys.readouterr().out
    assert made(tmp_path / "run") == ["after-text", "last"]


def test_a_finelip_takes_the_place_of_an_encoder(base, tmp_path, seen) -> None:
    align(base, tmp_path / "lora", "--method", "lora", "--text-steps", "1", "--image-steps", "0")
    folder = tmp_path / "lora" / "last" / "text_encoder"
    seen.clear()
    align(base, tmp_path / "run", "--finelip", str(folder), "--text-steps", "1", "--image-steps", "1")
    expected = CLIPTextModel.from_pretrained(folder).state_dict()
    found = seen["pipe"].text_encoder.state_dict()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_a_single_file_is_read_as_the_folder_that_it_was_made_of(base, tmp_path, undisturbed) -> None:
    file = tmp_path / "fine_tune.safetensors"
    save_single_file(StableDiffusionXLPipeline.from_pretrained(base), file)
    align(file, tmp_path / "file", "--base-config", str(base))
    for name in ("after-text", "last"):
        one, other = weights(undisturbed()[0] / name), weights(tmp_path / "file" / name)
        for key, value in one.items():
            torch.testing.assert_close(other[key], value, atol=1e-4, rtol=1e-3)


# Pictures on the way


@pytest.mark.slow
def test_pictures_are_drawn_by_stock_and_aligned(base, tmp_path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{SHORT[0]}\n\n  {MiniatureScenes('test', 5).captions(0)[0]}\n{SHORT[1]}\n")
    flags = ("--validate-every", "2", "--validation-prompts", str(prompts), "--report-to", "tensorboard")
    align(base, tmp_path / "run", *flags)
    # Every other step, and where a stage ends.
    steps = [2, 3, 4, 6]
    files = sorted((tmp_path / "run" / "validation").iterdir())
    assert [file.name for file in files] == [f"step-{step:06d}.png" for step in steps]
    grids = [np.asarray(Image.open(file)) for file in files]
    (height, width, _) = grids[0].shape
    assert {grid.shape for grid in grids} == {(height, width, 3)}
    assert (height, width) > (2 * 256, 3 * 256)  # with labels
    for grid in grids[1:]:
        assert np.array_equal(grid[: height // 2], grids[0][: height // 2])  # stock, and labels, stay
        assert not np.array_equal(grid[height // 2 :], grids[0][height // 2 :])
    events = EventAccumulator(str(tmp_path / "run" / "align_adapter")).Reload()
    assert [event.step for event in events.Images("validation")] == steps
    assert [event.step for event in events.Scalars("text/loss")] == [1, 2, 3]
    assert [event.step for event in events.Scalars("image/loss")] == [4, 5, 6]


def test_drawing_changes_nothing(base, tmp_path, undisturbed) -> None:
    align(base, tmp_path, "--validate-every", "2")
    assert_same_weights(undisturbed()[0] / "last", tmp_path / "last")


# What a stop costs


def stop_before_step(step: int, base: Path, out: Path, monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    """Align up to the step of this number, from 0 over both stages, whose learning rate is the last asked for."""
    schedule, left = align_adapter.learning_rate_factor, iter(range(step))

    def interrupted(*inputs: int) -> float:
        if next(left, None) is None:
            raise Stop
        return schedule(*inputs)

    with monkeypatch.context() as patch:
        patch.setattr(align_adapter, "learning_rate_factor", interrupted)
        with pytest.raises(Stop):
            align(base, out, *flags)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "stop", "saved"),
    [
        ((), 2, 2),  # in stage 1, just behind a checkpoint
        ((), 3, 3),  # at the border
        ((), 5, 4),  # in stage 2, a step behind a checkpoint
        (("--gradient-accumulation-steps", "3"), 5, 4),  # over several epochs
        (("--method", "lora"), 2, 2),
        (("--method", "lora"), 3, 3),
        (("--method", "lora"), 5, 4),
    ],
    ids=["text", "border", "image", "gradient_accumulation_steps", "lora text", "lora border", "lora image"],
)
def test_a_run_goes_on_as_if_nothing_had_happened(base, tmp_path, monkeypatch, undisturbed, flags, stop, saved) -> None:
    whole_folder, whole = undisturbed(*flags)
    stop_before_step(stop, base, tmp_path / "stopped", monkeypatch, *flags)
    assert checkpoints(tmp_path / "stopped")[-1] == f"step-{saved:07d}"
    history = record_figures(monkeypatch)
    align(base, tmp_path / "stopped", *flags)
    assert list(history) == list(range(saved + 1, 7))
    for step, figures in history.items():
        figures.pop(next(name for name in figures if name.endswith("captions_per_second")), None)
        assert all(whole[step][name] == figure for name, figure in figures.items())
    for name in ("after-text", "last"):
        assert_same_weights(whole_folder / name, tmp_path / "stopped" / name)
    assert checkpoints(tmp_path / "stopped") == ["step-0000004", "step-0000006"]


@pytest.mark.slow
def test_a_stop_between_a_stages_checkpoint_and_its_result_loses_none(base, tmp_path, monkeypatch, undisturbed) -> None:
    def stop(self: RunFolder, name: str, *parts: Any, **subfolders: Any) -> None:
        raise Stop

    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(RunFolder, "save_model", stop)
            with pytest.raises(Stop):
                align(base, tmp_path / "stopped")
    assert made(tmp_path / "stopped") == []
    align(base, tmp_path / "stopped")
    for name in ("after-text", "last"):
        assert_same_weights(undisturbed()[0] / name, tmp_path / "stopped" / name)


def test_a_complete_run_trains_no_further_and_says_so(base, tmp_path, capsys, monkeypatch) -> None:
    progress = align(base, tmp_path)
    before = {name: weights(tmp_path / name) for name in ("after-text", "last")}
    history = record_figures(monkeypatch)
    capsys.readouterr()
    assert align(base, tmp_path) == progress
    assert f"{tmp_path} is complete, with 6 steps: nothing is left to train." in capsys.readouterr().out
    assert not history
    for name, expected in before.items():
        assert all(torch.equal(value, expected[key]) for key, value in weights(tmp_path / name).items())


class KillAtStep:
    """Before a step of this number, counted from where the run begins."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self) -> None:
        schedule, left = align_adapter.learning_rate_factor, iter(range(self.step))

        def deadly(*inputs: int) -> float:
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return schedule(*inputs)

        align_adapter.learning_rate_factor = deadly


def align_until_killed(arguments: Namespace, kill: Callable[[], None]) -> None:
    """Of a process: `kill` prepares its end."""
    torch.set_num_threads(1)
    precompute.CHUNK = 7
    kill()
    align_adapter.align(arguments)


@pytest.mark.slow
def test_a_kill_costs_nothing_of_the_result(base, tmp_path) -> None:
    def run(out: Path, kill: Callable[[], None]) -> int | None:
        process = processes.Process(target=align_until_killed, args=(parse(base, out), kill))
        process.start()
        process.join(timeout=120)
        return process.exitcode

    assert run(tmp_path / "whole", nothing) == 0
    kills = [
        KillIn(precompute, "save_file", "", half=b"half of it"),
        KillAtStep(1),
        KillIn(torch, "save", "average.pt", half=b"half of it"),
        KillIn(os, "rename", "step-0000003"),  # where a stage ends
        KillIn(os, "rename", "after-text"),
        KillAtStep(2),
        KillIn(os, "rename", "last"),
    ]
    assert [run(tmp_path / "killed", kill) for kill in kills] == [-signal.SIGKILL] * len(kills)
    assert run(tmp_path / "killed", nothing) == 0
    for name in ("after-text", "last"):
        assert_same_weights(tmp_path / "whole" / name, tmp_path / "killed" / name)
    assert made(tmp_path / "killed") == ["after-text", "last"]


# Two processes


def work_on_a_run(process: int, arguments: Namespace, stop: int | None) -> None:
    assert Accelerator(cpu=True).num_processes == 2
    forget_accelerator()
    if stop is None:
        align_adapter.align(arguments)
        return
    with pytest.MonkeyPatch.context() as patch:
        stop_before_step(stop, Path(arguments.base), arguments.output_dir, patch)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["adapter", "lora"])
def test_two_processes_train_what_one_does_with_two_batches_a_step(base, tmp_path, method) -> None:
    align(base, tmp_path / "one", "--method", method, "--gradient-accumulation-steps", "2")
    on_two_processes(work_on_a_run, parse(base, tmp_path / "two", "--method", method), None)
    for name in ("after-text", "last"):
        one, two = weights(tmp_path / "one" / name), weights(tmp_path / "two" / name)
        assert one.keys() == two.keys()
        for key, value in one.items():
            torch.testing.assert_close(two[key], value, atol=1e-4, rtol=1e-3)
    with pytest.raises(ValueError, match="processes was 2 and is 1"):
        align(base, tmp_path / "two", "--method", method)


# What is refused


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--base no/such/folder", "no/such/folder"),
        ("--batch-size 1", "--batch-size is 1 and --short-share 0.4: each batch needs long and short captions"),
        ("--short-share 1", "--batch-size is 5 and --short-share 1: each batch needs long and short captions"),
        ("--text-steps 0 --image-steps 0", "--text-steps and --image-steps are both 0: give one of the stages steps"),
        ("--captions txt:captions.txt", "txt:captions.txt has no images: pass --image-steps 0 to align by texts alone"),
        ("--captions txt:captions.txt --image-steps 0", "captions.txt does not exist"),
        ("--resolution 60", "--resolution is 60; expected a multiple of 8, such as 56"),
        ("--captions pictures:x", "pictures:x is no data set"),
        ("--batch-size 25", "The data set has 20 images, which do not fill one batch of 25"),
        ("--finelip miniature-finelip-1", "The FineLIP for `text_encoder` has hidden_size 128, but this SDXL needs 32"),
        ("--finelip-2 no/such/file", "no/such/file"),
        ("--mixed-precision fp16", "--mixed-precision fp16 needs a GPU: on the CPU pass bf16, or no"),
        ("--validation-prompts no.txt", "--validation-prompts no.txt does not exist, or is no file"),
        ("--rank 0", "--rank: expected a whole number above 0 instead of 0"),
        ("--text-steps -1", "--text-steps: expected a whole number of at least 0 instead of -1"),
        ("--snr-gamma 0", "--snr-gamma: expected a number above 0 instead of 0"),
        ("--rank 100000", "--rank: expected a whole number of at most 1,024 instead of 100000"),
        ("--hidden-dim 1000000", "--hidden-dim: expected a whole number of at most 16,384 instead of 1000000"),
        ("--resolution 100000", "--resolution: expected a whole number of at most 4,096 instead of 100000"),
        ("--short-share nan", "--short-share: expected a number of at least 0 instead of nan"),
        ("--ema-decay 1", "--ema-decay: expected a number below 1 instead of 1"),
        ("--guidance-scale inf", "--guidance-scale: expected a number of at most 100 instead of inf"),
        ("--text-steps 9999999", "--text-steps and --image-steps are 10,001,999 in all; expected at most 9,999,999"),
        ("--base-config there", "The config there goes with a single file, but"),
        ("--precomputed=", "--precomputed: expected a path instead of nothing"),
        ("--method prefix", "--method: invalid choice: 'prefix'"),
    ],
)
def test_refuses_in_one_sentence(base, tmp_path, capsys, flags, expected) -> None:
    common = (
        f"--base {base} --captions miniature:20 --batch-size 5 --resolution 16 --cpu --output-dir {tmp_path / 'run'}"
    )
    assert expected in refusal(align_adapter, capsys, *common.split(), *flags.split())
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_refuses_a_variant_of_a_single_file(tmp_path, capsys) -> None:
    (tmp_path / "sdxl.safetensors").touch()
    flags = (
        f"--base {tmp_path / 'sdxl.safetensors'} --variant fp16 --captions miniature:20 --cpu --output-dir {tmp_path}"
    )
    message = refusal(align_adapter, capsys, *flags.split())
    assert message.startswith("--variant fp16 goes with a directory or hub id, but --base")


def test_a_run_that_diverges_stops_at_its_step_and_keeps_what_was_saved(base, tmp_path, capsys, monkeypatch) -> None:
    align(base, tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "step-0000006")
    before = weights(tmp_path / "last")
    monkeypatch.setattr(
        ImageAlignment,
        "__call__",
        lambda self, groups: {"loss": next(iter(self.pipe.conditioning_adapter.parameters())).sum() * torch.nan},
    )
    with pytest.raises(
        ValueError, match="Step 5, of loss nan, made weights that are not finite: training has diverged"
    ):
        align(base, tmp_path)
    assert checkpoints(tmp_path) == ["step-0000004"]
    assert all(torch.equal(before[key], value) for key, value in weights(tmp_path / "last").items())


@pytest.mark.parametrize("method", ["adapter", "lora"])
def test_steps_that_are_too_large_stop_the_run(base, tmp_path, method) -> None:
    with pytest.raises(ValueError, match="training has diverged, and nothing of this is saved"):
        align(
            base, tmp_path / "run", *f"--learning-rate 1e9 --max-grad-norm 0 --text-steps 60 --method {method}".split()
        )
    assert not list((tmp_path / "run").glob("last*"))


def test_two_runs_do_not_write_to_one_folder(base, tmp_path) -> None:
    with held(tmp_path, "taken"), pytest.raises(OSError, match="Another run is writing to"):
        align(base, tmp_path)


def test_refuses_another_base_without_captions(capsys) -> None:
    assert (
        refusal(align_adapter, capsys, "--base", "other")
        == "--base other needs --captions, such as sharegpt4v:captions.json (see --help)"
    )


def test_validation_prompts_are_lines_of_a_file(tmp_path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffA star.\u2028It is red.\r\n\r\n  A ring.\x0cIt is blue. \rA moon.".encode())
    arguments = SimpleNamespace(validation_prompts=file)
    expected = ["A star.\u2028It is red.", "A ring.\x0cIt is blue.", "A moon."]
    assert align_adapter.validation_prompts(arguments, MiniatureScenes("test", 5)) == expected
    file.write_bytes(b"A star.\nA caf\xe9.")
    with pytest.raises(ValueError, match=r"prompts\.txt is not UTF-8 text \(in line 2, "):
        align_adapter.validation_prompts(arguments, MiniatureScenes("test", 5))


def test_missing_pictures_are_left_out_and_counted_if_that_is_asked_for(base, tmp_path, capsys) -> None:
    data = write_images(tmp_path / "data", [(16, 16)] * 7)
    first = tmp_path / "data" / "6.png"
    first.unlink()
    align(base, tmp_path / "run", "--captions", data, "--skip-missing-images", "--validate-every", "0")
    printed = capsys.readouterr().out
    assert f"1 of 7 images of {data} are not there and are left out; first {first}.\n" in printed
    assert "skipped:" not in printed
    assert made(tmp_path / "run") == ["after-text", "last"]


def test_refuses_prompts_that_hold_no_text(base, tmp_path, capsys) -> None:
    (tmp_path / "empty.txt").write_text("\n  \n")
    flags = f"--base {base} --captions miniature:20 --cpu --validation-prompts {tmp_path / 'empty.txt'}"
    assert refusal(align_adapter, capsys, *flags.split()).endswith("empty.txt holds no text: write a prompt a line.")


def test_refuses_a_base_that_is_swapped_already(base, tmp_path, capsys) -> None:
    pipe, _ = load_pair(base)
    pipe.save_pretrained(tmp_path / "swapped")
    message = refusal(align_adapter, capsys, *f"--base {tmp_path / 'swapped'} --captions miniature:20 --cpu".split())
    assert "swapped lacks the two text encoders of 77 positions that SDXL was trained with" in message


def test_refuses_to_go_on_with_other_settings(base, tmp_path, capsys) -> None:
    align(base, tmp_path, "--image-steps", "0")
    flags = f"--base {base} --output-dir {tmp_path} --cpu --captions miniature:20 --batch-size 5 --resolution 16"
    flags += " --hidden-dim 8 --learning-rate 1e-2 --rank 2 --validate-every 0 --text-steps 3 --image-steps 0"
    message = refusal(align_adapter, capsys, *flags.split(), "--seed", "1")
    assert message.endswith("holds a run with other settings (seed was 0 and is 1): pass another folder.")
    message = refusal(align_adapter, capsys, *flags.split(), "--method", "lora")
    assert "method was adapter and is lora" in message
    message = refusal(align_adapter, capsys, *flags.replace("--image-steps 0", "--image-steps 3").split())
    assert "image-steps was 0 and is 3" in message
    assert not (tmp_path / "precomputed").exists()  # refused before images are encoded
    align_adapter.main([*flags.split(), "--checkpointing-steps", "7", "--checkpoints-total-limit", "1"])


# The miniature


@pytest.mark.slow
@pytest.mark.parametrize("method", ["adapter", "lora"])
def test_the_miniature_is_aligned(tmp_path, monkeypatch, method) -> None:
    history = record_figures(monkeypatch)
    flags = f"--method {method} --captions miniature:50 --text-steps 20 --image-steps 4 --batch-size 10 --cpu"
    forget_accelerator()
    align_adapter.align(align_adapter.parse([*flags.split(), "--output-dir", str(tmp_path), "--validate-every", "0"]))
    first, last = ([history[step]["text/long"] for step in steps] for steps in (range(1, 6), range(16, 21)))
    assert np.mean(last) < 0.95 * np.mean(first)  # of the same 50 scenes
    assert made(tmp_path) == ["after-text", "last"]
