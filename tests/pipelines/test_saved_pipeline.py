"""Loading, saving and reopening, with this package and without it."""

import json
import logging
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from peft import LoraConfig
from safetensors import safe_open
from transformers import CLIPTextModel

from finelip_sdxl import (
    ConditioningAdapter,
    FineLIPSDXLControlNetPipeline,
    FineLIPSDXLImg2ImgPipeline,
    FineLIPSDXLInpaintPipeline,
    FineLIPSDXLPipeline,
    load_finelip,
)
from finelip_sdxl.pipelines.export import stock_pipeline
from finelip_sdxl.text_encoders import num_positions
from tests.helpers.drawing import draw
from tests.helpers.prompts import SENTENCES, SHORT
from tests.helpers.tiny_sdxl import make_text_encoder, make_tokenizer


def weights(pipe) -> dict[str, torch.Tensor]:
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    return {f"{name}.{key}": value for name, module in modules.items() for key, value in module.state_dict().items()}


def assert_same_pipelines(one, other) -> None:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in ours)
    assert one.parameters == other.parameters


# from_pretrained


def test_both_encoders_are_stretched_and_one_line_says_what_that_means(stock_folder, caplog) -> None:
    pipe = FineLIPSDXLPipeline.from_pretrained(stock_folder)
    assert num_positions(pipe.text_encoder) == num_positions(pipe.text_encoder_2) == 248
    assert pipe.tokenizer.model_max_length == pipe.tokenizer_2.model_max_length == 248
    assert pipe.stock_text_encoder is None
    assert pipe.stock_text_encoder_2 is None
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("finelip_sdxl")]
    assert len(messages) == 1
    assert "not trained" in messages[0]
    assert "finelip=" in messages[0]
    assert "text_encoder and text_encoder_2" in messages[0]


def test_the_stretch_copies_no_weights(components) -> None:
    pipe = FineLIPSDXLPipeline(**components)
    pipe.swap_text_encoders()
    pairs = zip(components["text_encoder_2"].parameters(), pipe.text_encoder_2.parameters(), strict=True)
    own = [theirs.shape for ours, theirs in pairs if ours.data_ptr() != theirs.data_ptr()]
    assert own == [(248, 48)]


@pytest.mark.parametrize("source", ["model", "encoder", "file", "folder"])
def test_a_finelip_replaces_the_first_encoder_and_the_original_reads_short_prompts(
    stock_folder, tmp_path, source, caplog
) -> None:
    encoder = make_text_encoder(32, positions=248, seed=7)
    if source == "model":
        finelip = load_finelip(encoder)
    elif source == "encoder":
        finelip = encoder
    else:
        encoder.save_pretrained(tmp_path)
        finelip = tmp_path if source == "folder" else load_finelip(encoder)
        if source == "file":
            finelip.save_pretrained(tmp_path)
            finelip = str(tmp_path)
    pipe = FineLIPSDXLPipeline.from_pretrained(stock_folder, finelip)
    assert not [record for record in caplog.records if "not trained" in record.getMessage()]
    ids = torch.arange(248)[None]
    assert torch.equal(pipe.text_encoder(ids)[0], encoder(ids)[0])
    assert num_positions(pipe.stock_text_encoder) == 77
    assert pipe.text_encoder_2.config.stretched_from == 77
    assert pipe.stock_text_encoder_2 is None
    stock = StableDiffusionXLPipeline.from_pretrained(stock_folder)
    assert np.array_equal(draw(pipe, SHORT), draw(stock, SHORT))


def test_both_encoders_may_be_replaced(stock_folder, tmp_path) -> None:
    first = make_text_encoder(32, positions=248, seed=7)
    second = make_text_encoder(48, projection_dim=24, positions=248, seed=8)
    pipe = FineLIPSDXLPipeline.from_pretrained(stock_folder, finelip=first, finelip_2=second)
    stock = StableDiffusionXLPipeline.from_pretrained(stock_folder)
    assert np.array_equal(draw(pipe, SHORT), draw(stock, SHORT))
    # In a folder that was saved by us, another FineLIP takes the place and stock stays stock.
    pipe.save_pretrained(tmp_path)
    third = make_text_encoder(32, positions=248, seed=9)
    again = FineLIPSDXLPipeline.from_pretrained(tmp_path, finelip=third)
    assert np.array_equal(draw(again, SHORT), draw(pipe, SHORT))
    assert not np.array_equal(draw(again, SENTENCES), draw(pipe, SENTENCES))


def test_without_stock_short_prompts_no_original_is_held_or_loaded(stock_folder, tmp_path) -> None:
    encoder = make_text_encoder(32, positions=248, seed=7)
    pipe = FineLIPSDXLPipeline.from_pretrained(stock_folder, finelip=encoder, short_prompt_encoder="long")
    assert pipe.stock_text_encoder is None
    FineLIPSDXLPipeline.from_pretrained(stock_folder, finelip=encoder).save_pretrained(tmp_path)
    assert (tmp_path / "stock_text_encoder").is_dir()
    again = FineLIPSDXLPipeline.from_pretrained(tmp_path, short_prompt_encoder="long")
    assert again.stock_text_encoder is None
    assert np.array_equal(draw(again, SHORT), draw(pipe, SHORT))
    again.short_prompt_encoder = "original"
    plans = again.describe_prompt(SHORT).plans
    assert [plan.as_stock for plan in plans] == [False, True], "only what can be is read as stock"


def test_a_finelip_of_77_positions_is_not_taken_for_stock(stock_folder) -> None:
    """Its rows are those of its own table, which only its own pictures are stock for."""
    source = make_text_encoder(32, positions=77, seed=7)
    pipe = FineLIPSDXLPipeline.from_pretrained(stock_folder, finelip=source, short_prompt_encoder="long")
    assert num_positions(pipe.text_encoder) == 248
    pipe.short_prompt_encoder = "original"
    assert [plan.as_stock for plan in pipe.describe_prompt(SHORT).plans] == [False, True]


@pytest.mark.parametrize("what", ["lora", "token"])
def test_a_held_original_does_not_replace_an_encoder_with_additions(stock_folder, what, caplog) -> None:
    encoder = make_text_encoder(32, positions=248, seed=7)
    pipe = FineLIPSDXLPipeline.from_pretrained(stock_folder, finelip=encoder)
    assert pipe.describe_prompt(SHORT).plans[0].as_stock
    if what == "lora":
        pipe.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    else:
        vector = {"<scene>": torch.ones(1, 32)}
        pipe.load_textual_inversion(vector, "<scene>", tokenizer=pipe.tokenizer, text_encoder=pipe.text_encoder)
    for _ in range(2):
        assert not pipe.describe_prompt(SHORT).plans[0].as_stock
        draw(pipe, SHORT)
    messages = [record.getMessage() for record in caplog.records if "lacks" in record.getMessage()]
    assert len(messages) == 1, "said once"


@pytest.mark.parametrize(
    ("argument", "encoder", "message"),
    [
        ("finelip", (48, None), "`text_encoder` has hidden_size 48, but this SDXL needs 32"),
        ("finelip_2", (32, 24), "`text_encoder_2` has hidden_size 32, but this SDXL needs 48"),
        ("finelip_2", (48, 16), "`text_encoder_2` has projection_dim 16, but this SDXL needs 24"),
        ("finelip_2", (48, None), "has no text projection"),
    ],
)
def test_a_finelip_of_the_wrong_width_is_refused(stock_folder, argument, encoder, message) -> None:
    hidden_size, projection_dim = encoder
    finelip = make_text_encoder(hidden_size, projection_dim=projection_dim, positions=248)
    with pytest.raises(ValueError, match=message):
        FineLIPSDXLPipeline.from_pretrained(stock_folder, **{argument: finelip})


def test_wrong_arguments_are_refused_before_anything_is_loaded(tmp_path) -> None:
    with pytest.raises(ValueError, match="`short_prompt_encoder` must be"):
        FineLIPSDXLPipeline.from_pretrained(tmp_path, short_prompt_encoder="shorter")
    with pytest.raises(OSError, match=r"missing\.pt"):
        FineLIPSDXLPipeline.from_pretrained(tmp_path, finelip=tmp_path / "missing.pt")
    encoder = make_text_encoder(32)
    with pytest.raises(ValueError, match="Both a FineLIP and `text_encoder`"):
        FineLIPSDXLPipeline.from_pretrained(tmp_path, finelip=encoder, text_encoder=encoder)


def test_missing_files_and_other_checkpoints_are_refused(stock_folder, tmp_path) -> None:
    with pytest.raises(OSError, match=r"holds no model_index\.json"):
        FineLIPSDXLPipeline.from_pretrained(tmp_path)
    torch.save({"unet.weight": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt"):
        FineLIPSDXLPipeline.from_pretrained(stock_folder, finelip=tmp_path / "other.pt")


@pytest.mark.parametrize("argument", ["dtype", "torch_dtype"])
def test_dtype_is_that_of_every_component(stock_folder, argument) -> None:
    pipe = FineLIPSDXLPipeline.from_pretrained(
        stock_folder, finelip=make_text_encoder(32, positions=248), **{argument: torch.bfloat16}
    )
    assert {value.dtype for value in weights(pipe).values() if value.is_floating_point()} == {torch.bfloat16}
    assert draw(pipe, SENTENCES).shape == (1, 16, 16, 3)


def test_a_half_precision_repository_opens_in_float32_without_a_dtype(stock_folder, tmp_path) -> None:
    StableDiffusionXLPipeline.from_pretrained(stock_folder, dtype=torch.float16).save_pretrained(tmp_path)
    pipe = FineLIPSDXLPipeline.from_pretrained(tmp_path)
    assert {value.dtype for value in weights(pipe).values() if value.is_floating_point()} == {torch.float32}
    assert draw(pipe, SENTENCES).shape == (1, 16, 16, 3)


def test_components_passed_in_are_used_and_never_changed(stock_folder, caplog) -> None:
    tokenizer, encoder = make_tokenizer(), make_text_encoder(32, seed=7)
    long_encoder = make_text_encoder(48, projection_dim=24, positions=248, seed=8)
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    pipe = FineLIPSDXLPipeline.from_pretrained(
        stock_folder, tokenizer=tokenizer, text_encoder=encoder, text_encoder_2=long_encoder
    )
    assert tokenizer.model_max_length == 77
    assert num_positions(encoder) == 77
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())
    assert torch.equal(pipe.text_encoder.state_dict()["final_layer_norm.weight"], before["final_layer_norm.weight"])
    assert pipe.text_encoder_2 is long_encoder, "reads 248 already"
    pipe.tokenizer.add_tokens("<scene>")
    assert "<scene>" not in tokenizer.get_vocab()


def test_copied_tokenizers_read_and_write_as_the_originals(stock_folder, components) -> None:
    pipe = FineLIPSDXLPipeline.from_pretrained(stock_folder)
    for name in ("tokenizer", "tokenizer_2"):
        ours, original = (
            getattr(pipe, name),
            make_tokenizer(pad_token="!" if name == "tokenizer_2" else "<|endoftext|>"),
        )
        ids = original("A red foxhole, 狐", padding="max_length", max_length=77).input_ids
        assert ours("A red foxhole, 狐", padding="max_length", max_length=77).input_ids == ids
        assert ours.decode(ids) == original.decode(ids)


def test_the_other_classes_load_as_well(stock_folder, controlnet) -> None:
    for cls in (FineLIPSDXLImg2ImgPipeline, FineLIPSDXLInpaintPipeline):
        assert num_positions(cls.from_pretrained(stock_folder).text_encoder_2) == 248
    pipe = FineLIPSDXLControlNetPipeline.from_pretrained(stock_folder, controlnet=controlnet)
    assert num_positions(pipe.text_encoder) == 248


# Embeddings made elsewhere


ABSENT = [
    ("text_encoder", "text_encoder_2"),
    ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
    ("text_encoder",),
    ("text_encoder_2",),
    ("text_encoder", "tokenizer"),
]


def draw_embeddings(pipe, embeddings) -> np.ndarray:
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    arguments = dict(zip(names, embeddings, strict=True))
    return pipe(**arguments, num_inference_steps=2, generator=generator, output_type="np").images


@pytest.mark.parametrize("absent", ABSENT, ids=str)
def test_an_encoder_passed_as_none_is_none(absent, stock_folder, tmp_path) -> None:
    torch.manual_seed(0)
    whole = FineLIPSDXLPipeline.from_pretrained(
        stock_folder,
        finelip=make_text_encoder(32, positions=248, seed=7),
        finelip_2=make_text_encoder(48, projection_dim=24, positions=248, seed=8),
        conditioning_adapter=ConditioningAdapter([32, 48], 24, 8),
    )
    whole.save_pretrained(tmp_path)
    with torch.no_grad():
        embeddings = whole.encode_prompt(SENTENCES, negative_prompt=SHORT)
    for source in (stock_folder, tmp_path):
        pipe = FineLIPSDXLPipeline.from_pretrained(source, **dict.fromkeys(absent))
        for name in absent:
            assert getattr(pipe, name) is None
            assert getattr(pipe, f"stock_{name}", None) is None, "what it would stand in for is not there"
        assert pipe.conditioning_adapter is None, "it was trained with both"
        assert np.array_equal(draw_embeddings(pipe, embeddings), draw_embeddings(whole, embeddings))


@pytest.mark.parametrize("absent", ABSENT[:4], ids=str)
def test_the_miniature_has_no_finelip_for_an_encoder_passed_as_none(absent) -> None:
    pipe = FineLIPSDXLPipeline.from_pretrained("miniature", **dict.fromkeys(absent))
    assert [name for name in absent if getattr(pipe, name) is not None] == []
    whole = FineLIPSDXLPipeline.from_pretrained("miniature")
    with torch.no_grad():
        embeddings = whole.encode_prompt("In the middle is a red star.", negative_prompt="a blue ring")
    assert np.array_equal(draw_embeddings(pipe, embeddings), draw_embeddings(whole, embeddings))


def test_a_finelip_for_an_encoder_passed_as_none_is_refused() -> None:
    with pytest.raises(ValueError, match="A FineLIP was passed for `text_encoder`, but this pipeline has no such"):
        FineLIPSDXLPipeline.from_pretrained("miniature", text_encoder=None, finelip="miniature-finelip-1")


# What is not there


def test_a_variant_that_is_not_there_is_told_in_diffusers_words_and_ours(stock_folder) -> None:
    with pytest.raises(ValueError, match="You are trying to load the model files of the `variant=fp16`") as caught:
        FineLIPSDXLPipeline.from_pretrained(stock_folder, variant="fp16")
    assert f"{stock_folder} has no weights of variant fp16; leave the variant out" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_of_a_variant_that_was_not_asked_for_are_told(stock_folder, tmp_path) -> None:
    StableDiffusionXLPipeline.from_pretrained(stock_folder).save_pretrained(tmp_path, variant="fp16")
    with pytest.raises(FileNotFoundError, match="or pass variant= if their names hold one"):
        FineLIPSDXLPipeline.from_pretrained(tmp_path)


# save_pretrained


@pytest.mark.parametrize("save", [lambda pipe: pipe, stock_pipeline])
def test_how_a_tokenizer_was_last_called_is_not_saved(save, stock_folder, tmp_path) -> None:
    pipe = FineLIPSDXLPipeline.from_pretrained(stock_folder)
    for tokenizer in (pipe.tokenizer, pipe.tokenizer_2):
        tokenizer(SHORT, truncation=True, max_length=5, padding="max_length")
    save(pipe).save_pretrained(tmp_path)
    for name in ("tokenizer", "tokenizer_2"):
        saved = json.loads((tmp_path / name / "tokenizer.json").read_text())
        assert (saved["truncation"], saved["padding"]) == (None, None)
        assert getattr(pipe, name).model_max_length == 248
        assert json.loads((tmp_path / name / "tokenizer_config.json").read_text())["model_max_length"] == 248


def test_a_round_trip_keeps_every_bit_and_option(stock_folder, tmp_path) -> None:
    options = {
        "short_prompt_encoder": "long",
        "hidden_states": "last",
        "overflow": "error",
        "length_buckets": (100, 200),
    }
    pipe = FineLIPSDXLPipeline.from_pretrained(stock_folder, **options)
    pipe.save_pretrained(tmp_path)
    again = FineLIPSDXLPipeline.from_pretrained(tmp_path)
    assert_same_pipelines(again, pipe)
    assert {name: getattr(again, name) for name in options} == options
    assert np.array_equal(draw(again, SENTENCES), draw(pipe, SENTENCES))
    assert FineLIPSDXLPipeline.from_pretrained(tmp_path, overflow="window").overflow == "window"


def test_a_round_trip_keeps_originals_dtype_and_the_empty_bucket_list(stock_folder, tmp_path) -> None:
    encoder = make_text_encoder(32, positions=248, seed=7)
    pipe = FineLIPSDXLPipeline.from_pretrained(stock_folder, finelip=encoder, length_buckets=(), dtype=torch.float16)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["stock_text_encoder"] == ["transformers", "CLIPTextModel"]
    assert index["length_buckets"] is None, "an empty list there breaks Diffusers' downloads"
    again = FineLIPSDXLPipeline.from_pretrained(tmp_path, dtype=torch.float16)
    assert_same_pipelines(again, pipe)
    assert again.length_buckets == ()


@pytest.mark.parametrize(
    ("cls", "name"),
    [
        (FineLIPSDXLPipeline, "StableDiffusionXLPipeline"),
        (FineLIPSDXLImg2ImgPipeline, "StableDiffusionXLImg2ImgPipeline"),
        (FineLIPSDXLInpaintPipeline, "StableDiffusionXLInpaintPipeline"),
        (FineLIPSDXLControlNetPipeline, "StableDiffusionXLControlNetPipeline"),
    ],
)
def test_model_index_holds_nothing_that_stock_does_not_know(components, controlnet, tmp_path, cls, name) -> None:
    pipe = cls(**components, **({"controlnet": controlnet} if "ControlNet" in name else {}))
    pipe.swap_text_encoders()
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == name
    assert not {"short_prompt_encoder", "hidden_states", "overflow", "length_buckets"} & index.keys()
    assert not [key for key in index if key.startswith("stock_")]


@pytest.mark.parametrize("kwargs", [{}, {"max_shard_size": "20KB"}, {"variant": "fp16"}], ids=str)
def test_every_saved_text_encoder_has_the_keys_that_old_versions_read(components, tmp_path, kwargs) -> None:
    config = make_text_encoder(32, positions=248).config
    components["text_encoder"] = CLIPTextModel(config)  # built, not loaded: transformers would save other keys
    pipe = FineLIPSDXLPipeline(**components, stock_text_encoder=CLIPTextModel(config))
    pipe.save_pretrained(tmp_path, **kwargs)
    for name in ("text_encoder", "stock_text_encoder"):
        files = list((tmp_path / name).glob("*.safetensors"))
        assert len(files) > 1 or "max_shard_size" not in kwargs
        for file in files:
            with safe_open(file, "pt") as opened:
                assert all(key.startswith("text_model.") for key in opened.keys())  # noqa: SIM118
    assert pipe.text_encoder is components["text_encoder"]


STOCK = """
import sys
sys.modules["finelip_sdxl"] = None  # as on a machine without the package
import logging, numpy, torch
import diffusers
diffusers.StableDiffusionXLPipeline  # what it says on import, of torchao for one, is not about a folder
for folder in sys.argv[3:]:
    log = logging.FileHandler(f"{folder}/log.txt")
    logging.getLogger("diffusers").addHandler(log)
    for name in "StableDiffusionXLPipeline", "DiffusionPipeline", "AutoPipelineForText2Image":
        pipe = getattr(diffusers, name).from_pretrained(folder)
        assert type(pipe) is diffusers.StableDiffusionXLPipeline, type(pipe)
        pipe.set_progress_bar_config(disable=True)
        for kind, prompt in ("short", sys.argv[1]), ("long", sys.argv[2]):
            generator = torch.Generator().manual_seed(0)
            image = pipe(prompt, num_inference_steps=2, generator=generator, output_type="np").images
            numpy.save(f"{folder}/{name}-{kind}.npy", image)
    logging.getLogger("diffusers").removeHandler(log)
"""


@pytest.mark.slow
def test_without_the_package_stock_classes_open_it_and_draw_the_same(stock_folder, tmp_path) -> None:
    stretched, replaced = tmp_path / "stretched", tmp_path / "replaced"
    FineLIPSDXLPipeline.from_pretrained(stock_folder).save_pretrained(stretched)
    finelip = make_text_encoder(32, positions=248, seed=7)
    FineLIPSDXLPipeline.from_pretrained(stock_folder, finelip=finelip).save_pretrained(replaced)
    subprocess.run([sys.executable, "-c", STOCK, SHORT, SENTENCES, str(stretched), str(replaced)], check=True)

    for folder in (stretched, replaced):
        pipe = FineLIPSDXLPipeline.from_pretrained(folder)
        assert pipe.describe_prompt(SENTENCES).positions == 248
        images = {"long": draw(pipe, SENTENCES)}
        pipe.length_buckets, pipe.short_prompt_encoder = (), "long"
        images["short"] = draw(pipe, SHORT)
        files = list(folder.glob("*.npy"))
        assert len(files) == 6
        for file in files:
            assert np.array_equal(np.load(file), images[file.stem.partition("-")[2]]), file.name
    assert not (stretched / "log.txt").read_text()
    assert "stock_text_encoder" in (replaced / "log.txt").read_text(), "stock says that it ignores the original"


def test_saved_folders_need_nothing_outside_them(stock_folder, tmp_path) -> None:
    """A folder that was copied elsewhere still opens, and reopening stretches nothing again."""
    FineLIPSDXLPipeline.from_pretrained(stock_folder).save_pretrained(tmp_path / "saved")
    shutil.copytree(tmp_path / "saved", tmp_path / "copy")
    shutil.rmtree(tmp_path / "saved")
    pipe = FineLIPSDXLPipeline.from_pretrained(tmp_path / "copy")
    assert num_positions(pipe.text_encoder) == 248
    assert pipe.text_encoder.config.stretched_from == 77


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"short_prompt": "stretched"}, {"short_prompt_encoder": "long"}),
        ({"short_prompt": "stock"}, {"short_prompt_encoder": "original"}),
        ({"long_prompt": "truncate"}, {"overflow": "truncate"}),
        ({"long_prompt": "error"}, {"overflow": "error"}),
        ({"long_prompt": "window"}, {"overflow": "window"}),
        ({"hidden_states": "published"}, {"hidden_states": "last"}),
        ({"hidden_states": "penultimate"}, {"hidden_states": "penultimate"}),
    ],
)
def test_a_folder_with_the_options_of_older_versions_opens(stock_folder, tmp_path, caplog, old, new) -> None:
    FineLIPSDXLPipeline.from_pretrained(stock_folder).save_pretrained(tmp_path)
    file = tmp_path / "model_index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **old}))
    caplog.clear()
    pipe = FineLIPSDXLPipeline.from_pretrained(tmp_path)
    assert {name: getattr(pipe, name) for name in new} == new
    assert not caplog.records, "Diffusers ignores no option"
    assert not {"short_prompt", "long_prompt"} & pipe.config.keys()
    chosen = {"short_prompt_encoder": "original", "overflow": "error", "hidden_states": "penultimate"}
    again = FineLIPSDXLPipeline.from_pretrained(tmp_path, **chosen)
    assert {name: getattr(again, name) for name in chosen} == chosen, "an argument goes before the folder"


def test_a_saved_folder_is_not_called_untrained_again(stock_folder, tmp_path, caplog) -> None:
    FineLIPSDXLPipeline.from_pretrained(stock_folder).save_pretrained(tmp_path)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "finelip_sdxl"):
        FineLIPSDXLPipeline.from_pretrained(tmp_path)
    assert not [record for record in caplog.records if record.name.startswith("finelip_sdxl")]


def test_what_was_built_with_77_positions_comes_back_so(components, tmp_path, caplog) -> None:
    FineLIPSDXLPipeline(**components).save_pretrained(tmp_path)
    pipe, stock = FineLIPSDXLPipeline.from_pretrained(tmp_path), StableDiffusionXLPipeline.from_pretrained(tmp_path)
    assert_same_pipelines(pipe, FineLIPSDXLPipeline(**components))
    assert np.array_equal(draw(pipe, SENTENCES), draw(stock, SENTENCES))
    assert "swap_text_encoders() makes them 248" in caplog.text
    stock.save_pretrained(tmp_path / "stock")
    assert num_positions(FineLIPSDXLPipeline.from_pretrained(tmp_path / "stock").text_encoder) == 248
    finelip = make_text_encoder(32, positions=248, seed=7)
    pipe = FineLIPSDXLPipeline.from_pretrained(tmp_path, finelip=finelip)
    assert num_positions(pipe.text_encoder_2) == 248
    pipe.save_pretrained(tmp_path / "swapped")
    assert "unswapped" not in (tmp_path / "swapped" / "model_index.json").read_text()


def test_swap_after_from_pipe(components) -> None:
    stock = StableDiffusionXLPipeline(**components)
    pipe = FineLIPSDXLPipeline.from_pipe(stock)
    assert pipe.text_encoder is stock.text_encoder, "nothing is swapped unasked"
    pipe.swap_text_encoders()
    pipe.swap_text_encoders()
    assert num_positions(pipe.text_encoder) == 248
    assert num_positions(stock.text_encoder) == 77
    assert pipe.unet is stock.unet
    assert np.array_equal(draw(pipe, SHORT), draw(stock, SHORT))
