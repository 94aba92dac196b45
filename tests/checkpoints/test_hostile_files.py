"""Damaged and hostile folders and files: each is loaded as it should be, or refused in one sentence that names it."""

import json
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from finelip_sdxl import ConditioningAdapter, FineLIPSDXLPipeline, load_finelip
from finelip_sdxl.foreign_files import check_finite, read_json, read_tensors, shard_names
from finelip_sdxl.text_encoders import check_tokenizer, text_encoder_tensors
from tests.helpers.tiny_sdxl import make_text_encoder, make_tokenizer

DEEP = "deeply nested"  # stands for lists in lists, which `json.dumps` does not write
VALUES = {
    "null": None,
    "negative": -1,
    "huge": 10**12,
    "a number of 30 digits": 10**30,
    "text": "x",
    "empty list": [],
    "list": [10**12],
    "object": {},
    "NaN": float("nan"),
    "half a surrogate pair": "\ud800",
    DEEP: DEEP,
}
NO_OBJECTS = {
    "nothing": b"",
    "half": b"{",
    "null": b"null",
    "list": b"[]",
    "number": b"3",
    "text": b'"x"',
    "no UTF-8": b"\xff\xfe\xfd",
    "deep list": b"[" * 100_000,
    "deep object": b'{"a":' * 100_000,
}


def in_every_field(config: dict[str, Any], kinds: Iterable[str] = VALUES) -> Iterator[tuple[str, str, str]]:
    """Field, kind of value and text of the file for each value in each field, those of objects in it as well."""

    def fields(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
        if isinstance(value, dict):
            for key, inner in value.items():
                yield (*path, key)
                yield from fields(inner, (*path, key))

    for path in fields(config):
        for kind in kinds:
            changed = json.loads(json.dumps(config))
            place = changed
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = VALUES[kind]
            yield ".".join(path), kind, json.dumps(changed).replace(f'"{DEEP}"', "[" * 5000 + "]" * 5000)


def refused(load: Callable[[], Any], source: Path | str) -> bool:
    """Whether it is refused; anything but one sentence that names the source is an error."""
    said = None
    try:
        load()
    except (ValueError, OSError) as error:
        said = str(error)
    assert said is None or (str(source) in said and "\n" not in said), said
    return said is not None


def accepted(file: Path, source: Path, load: Callable[[], Any], kinds: Iterable[str] = VALUES) -> set[tuple[str, str]]:
    """Fields of a config and the kinds of values in them with which something was loaded."""
    original = file.read_text()
    found = set()
    for field, kind, text in in_every_field(json.loads(original), kinds):
        file.write_text(text)
        if not refused(load, source):
            found.add((field.split(".")[-1], kind))
    for kind, content in NO_OBJECTS.items():
        file.write_bytes(content)
        assert refused(load, source), kind
    file.write_text(original)
    return found


def tiny_finelip(folder: Path) -> Path:
    text = {"hidden_size": 64, "intermediate_size": 32, "num_attention_heads": 1, "num_hidden_layers": 1}
    text |= {"vocab_size": 99, "bos_token_id": 97, "eos_token_id": 98}
    vision = {"hidden_size": 64, "intermediate_size": 32, "num_attention_heads": 1, "num_hidden_layers": 1}
    torch.manual_seed(0)
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision | {"image_size": 16, "patch_size": 8}))
    model = load_finelip(clip)
    model.add_token_refinement()
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def encoder(tmp_path) -> Path:
    make_text_encoder(48, projection_dim=24, seed=2).save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


@pytest.fixture
def sdxl(stock_folder, tmp_path) -> Path:
    shutil.copytree(stock_folder, tmp_path / "sdxl")
    return tmp_path / "sdxl"


# Configs. What does not change how a model computes may be absent, or anything that is no number.

HARMLESS = {"architectures", "dtype", "model_type", "transformers_version"}
MAY_BE_NULL = {"bos_token_id", "pad_token_id", "projection_dim", "refined_image_tokens", "refined_text_tokens"}
MAY_BE_NULL |= {"stretched_from"}


def assert_harmless(found: set[tuple[str, str]]) -> None:
    for field, kind in found:
        assert field in HARMLESS | MAY_BE_NULL, (field, kind)
        assert kind == "null" or (field in HARMLESS and kind in ("text", "empty list", "object")), (field, kind)


def test_every_field_of_an_encoder_s_config(encoder) -> None:
    assert_harmless(accepted(encoder / "config.json", encoder, lambda: load_finelip(encoder)))


def test_every_field_of_a_finelip_s_config(tmp_path) -> None:
    folder = tiny_finelip(tmp_path)
    kinds = ("null", "negative", "huge", "object")  # the others are refused as in an encoder's
    assert_harmless(accepted(folder / "config.json", folder, lambda: load_finelip(folder), kinds))


def test_every_field_of_an_adapter_s_config(tmp_path, stock_folder) -> None:
    torch.manual_seed(0)
    ConditioningAdapter([32, 48], 24, 8).save_pretrained(tmp_path)

    def load() -> None:
        FineLIPSDXLPipeline.from_pretrained(
            stock_folder,
            conditioning_adapter=tmp_path,
            **dict.fromkeys(("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")),
        )

    found = accepted(tmp_path / "config.json", tmp_path, load)
    assert {field for field, _ in found} <= {"_diffusers_version"}


def test_every_field_of_a_pipeline_s_encoder(sdxl) -> None:
    """Diffusers and transformers build what a config says, and fill what is missing with random numbers."""
    others = dict.fromkeys(("unet", "vae", "text_encoder", "tokenizer"))
    file = sdxl / "text_encoder_2" / "config.json"
    found = accepted(file, sdxl, lambda: FineLIPSDXLPipeline.from_pretrained(sdxl, **others))
    assert_harmless(found)


@pytest.mark.parametrize("component", ["unet", "vae"])
@pytest.mark.parametrize("kind", ["huge", "negative", DEEP, "NaN", "list"])
def test_sizes_that_no_weights_fill_are_refused_before_anything_is_built(component, kind, sdxl, monkeypatch) -> None:
    import diffusers

    def built(*args: Any, **kwargs: Any) -> None:
        pytest.fail("built")

    monkeypatch.setattr(diffusers.UNet2DConditionModel, "from_pretrained", built)
    monkeypatch.setattr(diffusers.AutoencoderKL, "from_pretrained", built)
    file = sdxl / component / "config.json"
    config = json.loads(file.read_text())
    numbers = {field for field, value in config.items() if type(value) is int}
    for field, changed, text in in_every_field(config):
        if field in numbers and changed == kind:
            file.write_text(text)
            assert refused(lambda: FineLIPSDXLPipeline.from_pretrained(sdxl), sdxl), field


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("unet/config.json", {"layers_per_block": 10**5}, "layers_per_block 100000, but there are only"),
        ("unet/config.json", {"transformer_layers_per_block": [1, [10**6]]}, "transformer_layers_per_block 1000000"),
        ("unet/config.json", {"down_block_types": ["DownBlock2D"] * 10**5}, "100000 entries in down_block_types"),
        ("unet/config.json", {"act_fn": "no function"}, "unet cannot be loaded"),
        ("unet/config.json", {"cross_attention_dim": 81}, "unet cannot be loaded"),
        ("vae/config.json", {"norm_num_groups": 0}, "vae cannot be loaded"),
        ("text_encoder/config.json", {"num_hidden_layers": 4}, "num_hidden_layers 4, but its weights have 3"),
        ("text_encoder/config.json", {"num_hidden_layers": 2}, "num_hidden_layers 2, but its weights have 3"),
        ("text_encoder/config.json", {"hidden_act": "no function"}, "does not describe a model"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**9}, "expected a number from 0 to 1000000"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "none"}, "scheduler cannot be loaded"),
        ("model_index.json", {"unet": None}, "unet None; expected its library and class"),
        ("model_index.json", {"unet": ["no_library", "UNet2DConditionModel"]}, "cannot be loaded"),
        ("model_index.json", {"unet": ["diffusers", "NoClass"]}, "cannot be loaded"),
        ("model_index.json", {"unet": []}, "cannot be loaded"),
    ],
)
def test_what_is_wrong_is_named(file, change, message, sdxl) -> None:
    path = sdxl / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message) as caught:
        FineLIPSDXLPipeline.from_pretrained(sdxl)
    assert str(sdxl) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_stretch_that_does_not_make_the_table_is_refused(tmp_path) -> None:
    folder = tiny_finelip(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    for change in ({"stretch_keep": 19}, {"stretch_factor": 3}, {"stretched_from": 78}, {"stretch_factor": None}):
        changed = {**config, "text_config": {**config["text_config"], **change}}
        (folder / "config.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match="which does not make its 248 positions"):
            load_finelip(folder)


# Files.


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def replaced_by_a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def replaced_by_a_loop(file: Path) -> None:
    file.unlink()
    file.symlink_to(file)


def removed(file: Path) -> None:
    file.unlink()


def a_page_of_html(file: Path) -> None:
    file.write_text("<html>not found</html>")


def a_git_lfs_pointer(file: Path) -> None:
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


DAMAGE = [emptied, cut, replaced_by_a_folder, replaced_by_a_loop, removed, a_page_of_html, a_git_lfs_pointer]


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_damaged_file_of_an_encoder(damage, name, encoder) -> None:
    damage(encoder / name)
    assert refused(lambda: load_finelip(encoder), encoder)


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(
    "name",
    [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder_2/model.safetensors",
        "tokenizer/tokenizer.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ],
)
def test_a_damaged_file_of_a_pipeline(damage, name, sdxl) -> None:
    damage(sdxl / name)
    assert refused(lambda: FineLIPSDXLPipeline.from_pretrained(sdxl), sdxl)


@pytest.mark.parametrize("missing", ["text_model.final_layer_norm.bias", "text_model.encoder.layers.1.mlp.fc1.weight"])
def test_weights_that_a_pipeline_s_encoder_lacks_are_not_made_up(missing, sdxl) -> None:
    file = sdxl / "text_encoder" / "model.safetensors"
    save_file({key: tensor for key, tensor in load_file(file).items() if key != missing}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=f"1 weights of a CLIPTextModel are missing, among them '{missing}'"):
        FineLIPSDXLPipeline.from_pretrained(sdxl)


def lying_safetensors(header: dict[str, Any] | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


@pytest.mark.parametrize(
    "content",
    [
        lying_safetensors({}, length=2**62),
        lying_safetensors({}, length=10**6),
        lying_safetensors(b"{" * 1000),
        lying_safetensors({"a": {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4]}}, b"\0" * 4),
        lying_safetensors({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"\0" * 4),
        lying_safetensors({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"\0" * 4),
        lying_safetensors({"a": {"dtype": "none", "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4),
        lying_safetensors({"a": {"dtype": "F32", "shape": [2**32, 2**32], "data_offsets": [0, 4]}}, b"\0" * 4),
        lying_safetensors({"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}),
    ],
)
def test_a_header_that_lies(content, tmp_path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    assert refused(lambda: load_finelip(file), file)


@pytest.mark.parametrize("shape", [(), (99,), (0, 48), (99, 0), (99, 48, 1)])
@pytest.mark.parametrize(
    "key",
    [
        "text_model.embeddings.token_embedding.weight",
        "text_model.embeddings.position_embedding.weight",
        "text_model.encoder.layers.0.mlp.fc1.weight",
        "text_projection.weight",
    ],
)
@pytest.mark.parametrize("with_config", [True, False])
def test_weights_of_odd_shapes(key, shape, with_config, encoder) -> None:
    file = encoder / "model.safetensors"
    save_file({**load_file(file), key: torch.zeros(shape)}, file)
    source = encoder if with_config else file
    assert refused(lambda: load_finelip(source), source)


def test_a_zip_that_unpacks_to_more_than_itself_is_not_unpacked(tmp_path, monkeypatch) -> None:
    torch.save({"a": torch.zeros(1 << 20)}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(tmp_path / "bomb.pt", "w", 8) as bomb:
        for entry in plain.infolist():
            bomb.writestr(entry.filename, plain.read(entry))
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("unpacked"))
    with pytest.raises(ValueError, match=r"bomb\.pt unpacks to 4 MB from 0\.0 MB"):
        load_finelip(tmp_path / "bomb.pt")
    shutil.copy(tmp_path / "bomb.pt", tmp_path / "bomb.ckpt")
    with pytest.raises(ValueError, match=r"bomb\.ckpt cannot be read as a checkpoint .*unpacks to 4 MB"):
        FineLIPSDXLPipeline.from_single_file(tmp_path / "bomb.ckpt", config="miniature")


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(1).expand(10**6, 10**6), "unpacks to 4000000 MB"),
        (torch.zeros(4, 4).to_sparse(), "sparse, quantized or without data"),
        (torch.zeros(4, device="meta"), "sparse, quantized or without data"),
    ],
)
def test_tensors_that_claim_more_than_they_hold(tensor, message, tmp_path) -> None:
    torch.save({"a": tensor}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=message):
        load_finelip(tmp_path / "x.pt")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("whole", [True, False])
def test_weights_that_are_no_numbers_are_refused(bad, whole, tmp_path) -> None:
    make_text_encoder(64, projection_dim=24).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    count = 53 if whole else 1
    save_file(spoilt(load_file(file), bad, whole), file, {"format": "pt"})
    for source in (tmp_path, file, load_file(file)):
        with pytest.raises(ValueError, match=f"holds NaN or infinite values in {count} of 54 weights, such as"):
            load_finelip(source)


@pytest.mark.parametrize("name", ["text_encoder", "text_encoder_2"])
def test_encoders_of_no_numbers_are_refused_in_a_pipeline(name, sdxl) -> None:
    file = sdxl / name / "model.safetensors"
    save_file(spoilt(load_file(file), torch.nan, whole=False), file, {"format": "pt"})
    with pytest.raises(ValueError, match=f"{sdxl}: {name} holds NaN or infinite values in 1 of"):
        FineLIPSDXLPipeline.from_pretrained(sdxl)


def spoilt(tensors: dict[str, torch.Tensor], bad: float, whole: bool) -> dict[str, torch.Tensor]:
    """All weights, or a single number in one, made `bad`."""
    if whole:
        return {key: torch.full_like(tensor, bad) for key, tensor in tensors.items()}
    key = "text_model.final_layer_norm.bias"
    return {**tensors, key: tensors[key].index_fill(0, torch.tensor([3]), bad)}


def test_an_adapter_of_no_numbers_is_refused(stock_folder, tmp_path) -> None:
    torch.manual_seed(0)
    adapter = ConditioningAdapter([32, 48], 24, 8)
    torch.nn.init.constant_(adapter.pooled[-1].bias, torch.nan)
    adapter.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"conditioning_adapter holds NaN or infinite values .* 'pooled\.3\.bias'"):
        FineLIPSDXLPipeline.from_pretrained(stock_folder, conditioning_adapter=tmp_path)


# An index of shards.


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/b", "..", ".", "", "..\\x", 3, None, ["a"], {}])
def test_an_index_leads_nowhere_else(name, encoder, sdxl, tmp_path) -> None:
    shutil.copy(encoder / "model.safetensors", tmp_path / "x.safetensors")
    (encoder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"text_model.final_layer_norm.bias": name}}
    (encoder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json names .*no file beside it"):
        load_finelip(encoder)
    shutil.rmtree(sdxl / "text_encoder_2")
    shutil.copytree(encoder, sdxl / "text_encoder_2")
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json names .*no file beside it"):
        FineLIPSDXLPipeline.from_pretrained(sdxl)


@pytest.mark.parametrize("content", [{}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": "x"}])
def test_an_index_without_a_map(content, encoder) -> None:
    (encoder / "model.safetensors").unlink()
    (encoder / "model.safetensors.index.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="has no weight_map"):
        load_finelip(encoder)


def test_a_shard_that_is_missing_is_named(encoder) -> None:
    file = encoder / "model.safetensors.index.json"
    file.write_text(json.dumps({"weight_map": {"a": "model-00001.safetensors"}}))
    assert shard_names(file) == ["model-00001.safetensors"]
    (encoder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"names model-00001\.safetensors, which is not beside it"):
        load_finelip(encoder)


# Tokenizers.


def test_a_tokenizer_without_its_files_is_refused(sdxl) -> None:
    (sdxl / "tokenizer_2" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"tokenizer_2 knows no words, since its tokenizer\.json, or its vocab\.json"):
        FineLIPSDXLPipeline.from_pretrained(sdxl)


def test_a_tokenizer_of_letters_is_refused_and_one_of_words_is_not() -> None:
    whole = make_tokenizer()
    check_tokenizer(whole, "whole")
    with pytest.raises(ValueError, match="no merges knows no words"):
        check_tokenizer(CLIPTokenizer(vocab=whole.get_vocab(), merges=[]), "no merges")


# The readers by themselves.


def test_json_that_is_no_config(tmp_path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"a": 1, "b": {"c": [None, "ä"]}}))
    assert read_json(file) == {"a": 1, "b": {"c": [None, "ä"]}}
    with file.open("wb") as opened:
        opened.truncate(1 << 30)  # takes no room
    with pytest.raises(ValueError, match=r"config\.json has 1074 MB, more than any config"):
        read_json(file)


def test_pickles_run_nothing_and_may_be_damaged_in_any_way(tmp_path) -> None:
    file, marker = tmp_path / "x.pt", tmp_path / "ran"

    class Payload:
        def __reduce__(self) -> tuple:
            return (open, (str(marker), "w"))

    torch.save({"a": Payload()}, file)
    assert refused(lambda: read_tensors(file), file)
    assert not marker.exists()
    torch.save({"a": torch.zeros(64)}, file)
    content = file.read_bytes()
    for place in range(4, len(content), 23):
        file.write_bytes(content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :])
        refused(lambda: load_finelip(file), file)  # what still loads is no CLIP


def test_an_encoder_in_memory_with_a_changed_config_is_read_by_its_tensors(encoder) -> None:
    model = make_text_encoder(48, projection_dim=24, seed=2)
    model.config.max_position_embeddings = 10**12
    assert torch.equal(
        text_encoder_tensors(load_finelip(model).to_text_encoder(projection=True))["text_projection.weight"],
        model.text_projection.weight,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_number_that_is_not_finite_is_found_anywhere(dtype, value) -> None:
    weight = torch.randn(37, 5).to(dtype)
    largest = torch.full((9,), torch.finfo(dtype).max, dtype=dtype)
    check_finite({"weight": weight, "largest": largest, "empty": weight[:0], "ids": torch.arange(3)}, "clip.pt")
    for place in range(weight.numel()):
        broken = weight.clone()
        broken.view(-1)[place] = value
        with pytest.raises(
            ValueError, match=r"clip\.pt holds NaN or infinite values in 1 of 1 weights, such as 'weight'"
        ):
            check_finite({"weight": broken}, "clip.pt")
