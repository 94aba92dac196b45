"""`finelip-sdxl export`: what it writes is opened without this package."""

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from finelip_sdxl import ConditioningAdapter, FineLIPSDXLPipeline
from finelip_sdxl.cli import export
from finelip_sdxl.cli.main import main
from finelip_sdxl.pipelines.export import save_comfyui, stock_pipeline
from finelip_sdxl.text_encoders import text_encoder_tensors
from tests.helpers.drawing import draw
from tests.helpers.prompts import SENTENCES
from tests.helpers.tiny_sdxl import make_text_encoder

FILES = ["clip_g.safetensors", "clip_l.safetensors"]

# The keys that ComfyUI 0.3.64 (commit a125cd84) reads from a text encoder's file: `CLIPTextModel` in
# comfy/clip_model.py, into which `SDClipModel.load_sd` in comfy/sd1_clip.py loads it. Shapes as functions of the
# config's d = hidden_size, f = intermediate_size, v = vocab_size and p = positions.
COMFYUI_ONCE = {
    "text_model.embeddings.token_embedding.weight": "v d",
    "text_model.embeddings.position_embedding.weight": "p d",
    "text_model.final_layer_norm.weight": "d",
    "text_model.final_layer_norm.bias": "d",
}
COMFYUI_LAYER = {
    "layer_norm1.weight": "d",
    "layer_norm1.bias": "d",
    "self_attn.q_proj.weight": "d d",
    "self_attn.q_proj.bias": "d",
    "self_attn.k_proj.weight": "d d",
    "self_attn.k_proj.bias": "d",
    "self_attn.v_proj.weight": "d d",
    "self_attn.v_proj.bias": "d",
    "self_attn.out_proj.weight": "d d",
    "self_attn.out_proj.bias": "d",
    "layer_norm2.weight": "d",
    "layer_norm2.bias": "d",
    "mlp.fc1.weight": "f d",
    "mlp.fc1.bias": "f",
    "mlp.fc2.weight": "d f",
    "mlp.fc2.bias": "d",
}
# A Linear, so not transposed; the loader transposes a `text_projection` without `.weight` only. SDXL takes no pooled
# vector from clip_l, whose files in SDXL's repositories have no projection.
COMFYUI_CLIP_G = {"text_projection.weight": "d d"}


def comfyui_layout(config: CLIPTextConfig, clip_g: bool) -> dict[str, tuple[int, ...]]:
    sizes = {"d": config.hidden_size, "f": config.intermediate_size, "v": config.vocab_size, "p": 248}
    layers = range(config.num_hidden_layers)
    keys = COMFYUI_ONCE | {
        f"text_model.encoder.layers.{n}.{key}": dims for n in layers for key, dims in COMFYUI_LAYER.items()
    }
    if clip_g:
        keys |= COMFYUI_CLIP_G
    return {key: tuple(sizes[letter] for letter in dims.split()) for key, dims in keys.items()}


def comfyui_kind(keys: dict) -> str | None:
    """As `detect_te_model` in comfy/sd.py of the same commit tells CLIPs apart."""
    for layer, kind in (30, "clip_g"), (22, "clip_h"), (0, "clip_l"):
        if f"text_model.encoder.layers.{layer}.mlp.fc1.weight" in keys:
            return kind
    return None


def encoder_of_depth(layers: int, projection: bool, seed: int) -> CLIPTextModel | CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=99,
        hidden_size=8,
        intermediate_size=16,
        num_attention_heads=2,
        num_hidden_layers=layers,
        projection_dim=8,
    )
    torch.manual_seed(seed)
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


# diffusers

STOCK = """
import sys
sys.modules["finelip_sdxl"] = None  # as on a machine without the package
import logging, numpy, torch
from diffusers import StableDiffusionXLPipeline
folder, prompt = sys.argv[1:]
logging.captureWarnings(True)
log = logging.FileHandler(f"{folder}/log.txt")
for name in "diffusers", "transformers", "py.warnings":
    logging.getLogger(name).addHandler(log)
pipe = StableDiffusionXLPipeline.from_pretrained(folder)
generator = torch.Generator().manual_seed(0)
image = pipe(prompt, num_inference_steps=2, generator=generator, output_type="np").images
numpy.save(f"{folder}/image.npy", image)
"""


@pytest.mark.slow
def test_stock_opens_it_without_the_package_and_draws_the_same(stock_folder, tmp_path, capsys) -> None:
    finelip, out = tmp_path / "finelip", tmp_path / "deep" / "exported"
    make_text_encoder(32, positions=248, seed=7).save_pretrained(finelip)
    assert main(["export", stock_folder, str(out), "--finelip", str(finelip)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert [path.name for path in out.parent.iterdir()] == ["exported"], "no temporary directory is left"

    ours = FineLIPSDXLPipeline.from_pretrained(
        stock_folder, finelip=finelip, length_buckets=(), short_prompt_encoder="long"
    )
    assert all(155 <= plan.tokens <= 248 for plan in ours.describe_prompt(SENTENCES).plans)
    subprocess.run([sys.executable, "-c", STOCK, str(out), SENTENCES], check=True)
    assert np.abs(np.load(out / "image.npy") - draw(ours, SENTENCES)).max() < 1e-5
    assert not (out / "log.txt").read_text(), "no unknown component or key, and nothing of the prompt was cut"


def test_nothing_of_ours_is_left_but_what_stretched_encoders_say_of_themselves(stock_folder, tmp_path) -> None:
    saved = tmp_path / "saved"
    finelip = make_text_encoder(32, positions=248, seed=7)
    FineLIPSDXLPipeline.from_pretrained(stock_folder, finelip=finelip, overflow="error").save_pretrained(saved)
    assert (saved / "stock_text_encoder").is_dir()
    assert main(["export", str(saved), str(tmp_path / "out"), "--dtype", "float16"]) == 0

    StableDiffusionXLPipeline.from_pretrained(stock_folder).save_pretrained(tmp_path / "stock")
    indices = [json.loads((tmp_path / name / "model_index.json").read_text()) for name in ("out", "stock")]
    assert indices[0].keys() - {"_name_or_path"} == indices[1].keys() - {"_name_or_path"}
    names = [{path.name for path in (tmp_path / name).iterdir()} for name in ("out", "stock")]
    assert names[0] == names[1]
    weights = load_file(tmp_path / "out" / "text_encoder" / "model.safetensors")
    assert all(key.startswith("text_model.") for key in weights), "older versions of transformers read no others"
    assert {weight.dtype for weight in weights.values()} == {torch.float16}

    again = FineLIPSDXLPipeline.from_pretrained(tmp_path / "out")
    assert again.text_encoder_2.config.stretched_from == 77
    assert [plan.as_stock for plan in again.describe_prompt("a fox").plans] == [False, True]


def test_a_pipeline_saved_with_77_positions_is_stretched(components, tmp_path) -> None:
    FineLIPSDXLPipeline(**components).save_pretrained(tmp_path / "saved")
    assert main(["export", str(tmp_path / "saved"), str(tmp_path / "out")]) == 0
    stock = StableDiffusionXLPipeline.from_pretrained(tmp_path / "out")
    assert stock.tokenizer.model_max_length == stock.text_encoder.config.max_position_embeddings == 248


def test_the_kind_of_pipeline_and_its_options_stay(components, tmp_path) -> None:
    components |= {"text_encoder": None, "tokenizer": None, "requires_aesthetics_score": True}
    StableDiffusionXLImg2ImgPipeline(**components).save_pretrained(tmp_path / "refiner")
    assert main(["export", str(tmp_path / "refiner"), str(tmp_path / "out")]) == 0
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionXLImg2ImgPipeline"
    assert index["requires_aesthetics_score"] is True


def test_a_conditioning_adapter_and_published_states_are_left_out_with_a_warning(components, tmp_path, caplog) -> None:
    adapter = ConditioningAdapter(state_dims=(32, 48), pooled_dim=24, hidden_dim=4)
    pipe = FineLIPSDXLPipeline(**components, conditioning_adapter=adapter, hidden_states="last")
    pipe.swap_text_encoders()
    pipe.save_pretrained(tmp_path / "saved")
    caplog.clear()
    assert main(["export", str(tmp_path / "saved"), str(tmp_path / "out")]) == 0
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith("conditioning_adapter is left out")
    assert "A LoRA from training/align_adapter.py" in first
    assert second.startswith('hidden_states="last" is left out')
    assert not (tmp_path / "out" / "conditioning_adapter").exists()
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert not {"conditioning_adapter", "hidden_states"} & index.keys()


@pytest.mark.parametrize("name", ["text_encoder", "text_encoder_2", "unet"])
def test_lora_layers_are_refused_until_they_are_merged(components, tmp_path, name) -> None:
    pipe = FineLIPSDXLPipeline(**components)
    pipe.swap_text_encoders()
    without = draw(pipe, SENTENCES)
    modules = ["to_q"] if name == "unet" else ["q_proj"]
    getattr(pipe, name).add_adapter(LoraConfig(r=2, target_modules=modules, init_lora_weights=False))
    expected = draw(pipe, SENTENCES)
    with pytest.raises(ValueError, match=rf"^{name} has LoRA layers.*pipe\.fuse_lora\(\)"):
        stock_pipeline(pipe)
    if name == "unet":  # of which ComfyUI gets nothing
        assert save_comfyui(pipe, tmp_path)
    else:
        with pytest.raises(ValueError, match=f"^{name} has LoRA layers"):
            save_comfyui(pipe, tmp_path)
        assert not list(tmp_path.iterdir())

    pipe.fuse_lora()
    pipe.unload_lora_weights()
    merged = draw(stock_pipeline(pipe), SENTENCES)
    assert np.abs(merged - expected).max() < 0.05 * np.abs(without - expected).max(), "but for rounding"


# comfyui


def test_comfyui_gets_the_keys_shapes_and_dtypes_that_it_reads(components, tmp_path, caplog) -> None:
    """Encoders as deep as SDXL's, 8 wide."""
    encoders = {
        "text_encoder": encoder_of_depth(12, projection=False, seed=1),
        "text_encoder_2": encoder_of_depth(32, projection=True, seed=2),
    }
    pipe = FineLIPSDXLPipeline(**components | encoders).to(torch.float16)
    pipe.swap_text_encoders()
    caplog.clear()
    assert save_comfyui(pipe, tmp_path / "out") == [tmp_path / "out" / name for name in reversed(FILES)]
    assert not caplog.records
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == FILES, "no temporary file is left"
    for file, name in zip(reversed(FILES), encoders, strict=True):
        weights = load_file(tmp_path / "out" / file)
        shapes = {key: tuple(weight.shape) for key, weight in weights.items()}
        assert shapes == comfyui_layout(encoders[name].config, clip_g=name == "text_encoder_2")
        assert comfyui_kind(weights) == file.partition(".")[0]
        assert {weight.dtype for weight in weights.values()} == {torch.float16}
        assert all(torch.equal(weights[key], value) for key, value in text_encoder_tensors(getattr(pipe, name)).items())


def test_the_miniature_is_exported_too_and_a_line_says_what_comfyui_wants(tmp_path, capsys, caplog) -> None:
    assert main(["export", "miniature", str(tmp_path), "--format", "comfyui"]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / name) for name in reversed(FILES)]
    (warning,) = (record.getMessage() for record in caplog.records if "ComfyUI" in record.getMessage())
    assert "recognizes clip_g by its layer 30, but these have 6 and 6 layers" in warning


def test_a_line_says_what_comfyui_cannot_load_before_anything_is_loaded(
    stock_folder, tmp_path, monkeypatch, caplog
) -> None:
    def open_base(*arguments: Any, **options: Any) -> None:
        assert "ComfyUI will not load these files" in caplog.text
        raise ValueError("loads")

    monkeypatch.setattr(export, "open_base", open_base)
    for base in (stock_folder, "miniature"):
        caplog.clear()
        assert main(["export", base, str(tmp_path / "out"), "--format", "comfyui"]) == 2
        assert "ComfyUI will not load these files" in caplog.text
    assert not (tmp_path / "out").exists()


def test_the_miniatures_files_hold_its_encoders(tmp_path, capsys) -> None:
    assert main(["export", "miniature", str(tmp_path), "--format", "comfyui"]) == 0
    pipe = FineLIPSDXLPipeline.from_pretrained("miniature")
    for file, encoder in (FILES[1], pipe.text_encoder), (FILES[0], pipe.text_encoder_2):
        weights = load_file(tmp_path / file)
        shapes = {key: tuple(weight.shape) for key, weight in weights.items()}
        assert shapes == comfyui_layout(encoder.config, clip_g=file == FILES[0])
        assert {weight.dtype for weight in weights.values()} == {torch.float16}


def test_comfyui_files_go_beside_others_and_replace_none_unasked(stock_folder, tmp_path, capsys) -> None:
    (tmp_path / "t5.safetensors").write_text("another's")
    (tmp_path / "clip_g.safetensors").write_text("another's")
    command = ["export", stock_folder, str(tmp_path), "--format", "comfyui"]
    assert main(command) == 2
    assert "clip_g.safetensors exists: pass --overwrite" in capsys.readouterr().err
    assert not (tmp_path / "clip_l.safetensors").exists()
    assert main([*command, "--overwrite", "--dtype", "bfloat16"]) == 0
    assert {weight.dtype for weight in load_file(tmp_path / "clip_g.safetensors").values()} == {torch.bfloat16}
    assert (tmp_path / "t5.safetensors").read_text() == "another's"
    assert len(list(tmp_path.iterdir())) == 3, "no temporary file is left"


def test_a_refiner_gives_clip_g_alone(components, tmp_path, caplog) -> None:
    components |= {"text_encoder": None, "text_encoder_2": encoder_of_depth(32, projection=True, seed=2)}
    pipe = FineLIPSDXLPipeline(**components)
    pipe.swap_text_encoders()
    caplog.clear()
    assert save_comfyui(pipe, tmp_path) == [tmp_path / "clip_g.safetensors"]
    assert "text_encoder_2 is the only text encoder" in caplog.text
    pipe.text_encoder_2 = None
    with pytest.raises(ValueError, match="no text encoders"):
        save_comfyui(pipe, tmp_path)


# Mistakes


@pytest.mark.parametrize("format", ["diffusers", "comfyui"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{other}"], "is a StableDiffusionPipeline, but only SDXL pipelines can be converted or exported"),
        (["{empty}"], "model_index.json"),
        (["{stock}", "--finelip", "none.pt"], "none.pt does not exist"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(stock_folder, tmp_path, capsys, format, arguments, message) -> None:
    names = {"stock": stock_folder, "other": tmp_path / "other", "empty": tmp_path / "empty"}
    names["empty"].mkdir()
    names["other"].mkdir()
    (names["other"] / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    base, *rest = (argument.format(**names) for argument in arguments)
    assert main(["export", base, str(tmp_path / "out"), "--format", format, *rest]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("finelip-sdxl export: error: ")
    assert message in line
    assert not (tmp_path / "out").exists()


def test_what_is_there_is_replaced_only_when_asked_and_only_a_pipeline(stock_folder, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "letter.txt").write_text("dear")
    command = ["export", stock_folder, str(out)]
    for more, message in ([], "exists: pass --overwrite"), (["--overwrite"], "not a saved pipeline"):
        assert main([*command, *more]) == 2
        assert message in capsys.readouterr().err
        assert (out / "letter.txt").read_text() == "dear"
    assert main([*command[:2], str(out / "letter.txt"), "--format", "comfyui"]) == 2
    assert "letter.txt is a file" in capsys.readouterr().err
    (out / "model_index.json").write_text("{}")
    assert main([*command, "--overwrite"]) == 0
    assert (out / "unet").is_dir()
    assert (out / "letter.txt").read_text() == "dear"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
