"""`<lora:name:0.8>` in a prompt: loaded for the call from `lora_dir`, or left out with a sentence; never encoded."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from finelip_sdxl.cli.main import main
from tests.helpers.drawing import draw, embeddings
from tests.helpers.prompts import ALL_LENGTHS, LONG, SHORT

WIDTHS = {"unet": 32, "text_encoder": 32}
LAYERS = {
    "unet": ["down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_q"],
    "text_encoder": [f"text_model.encoder.layers.0.self_attn.{layer}" for layer in ("q_proj", "out_proj")],
}


@pytest.fixture
def folder(tmp_path) -> Path:
    """LoRAs of the UNet and the first text encoder: one above, one in a folder."""
    (tmp_path / "styles").mkdir()
    for seed, place in enumerate((tmp_path / "ink.safetensors", tmp_path / "styles" / "old film v1.2.safetensors")):
        random = torch.Generator().manual_seed(seed)
        weights = {}
        for part, layers in LAYERS.items():
            for layer in layers:
                width = WIDTHS[part]
                weights[f"{part}.{layer}.lora_A.weight"] = torch.randn(2, width, generator=random) / 2
                weights[f"{part}.{layer}.lora_B.weight"] = torch.randn(width, 2, generator=random) / 2
        save_file(weights, place)
    return tmp_path


def differ(one: np.ndarray, other: np.ndarray) -> bool:
    """By more than rounding does."""
    return float(np.abs(one - other).max()) > 1e-3


@ALL_LENGTHS
@pytest.mark.parametrize("weighting", [None, "compel", "a1111"])
def test_it_never_reaches_the_encoders(pipe, prompt, weighting, caplog) -> None:
    pipe.weighting = weighting
    expected = embeddings(pipe, f"{prompt} ")
    caplog.clear()
    assert torch.equal(embeddings(pipe, f"{prompt} <lora:ink:0.8>"), expected)
    (said,) = [record.message for record in caplog.records]
    assert said.startswith("Left out, not encoded and not loaded: <lora:ink:0.8>. Pass lora_dir=")
    plan = pipe.describe_prompt(f"{prompt} <lora:ink:0.8>")
    assert "LoRAs, not encoded: <lora:ink:0.8>" in str(plan)
    assert "lora" not in "".join(window.text for part in plan.plans for window in part.windows)


def test_it_may_stand_within_a_weight(pipe) -> None:
    pipe.weighting = "a1111"
    assert torch.equal(embeddings(pipe, "a (red <lora:ink:0.8> fox:1.3)"), embeddings(pipe, "a (red  fox:1.3)"))


@ALL_LENGTHS
def test_with_its_folder_it_acts_in_this_call_alone(pipe, folder, prompt, caplog) -> None:
    usual = draw(pipe, f"{prompt} ")
    caplog.clear()
    strong, weak = (draw(pipe, f"{prompt} <lora:ink:{scale}>", lora_dir=folder) for scale in (1, 0.3))
    assert not [record for record in caplog.records if record.name.startswith("finelip_sdxl")]
    assert differ(strong, usual)
    assert differ(strong, weak)
    assert np.array_equal(draw(pipe, f"{prompt} "), usual)
    pipe.load_lora_weights(str(folder), weight_name="ink.safetensors", adapter_name="own")
    assert not differ(draw(pipe, f"{prompt} "), strong)


def test_a_scale_of_1_is_the_default_and_several_act_together(pipe, folder) -> None:
    one = draw(pipe, "a fox <lora:ink>", lora_dir=str(folder))
    assert np.array_equal(draw(pipe, "a fox <lora:ink:1>", lora_dir=folder), one)
    both = draw(pipe, "a fox <lora:ink:1><lora:old film v1.2:-0.5>", lora_dir=folder)
    assert differ(both, one)
    assert not differ(draw(pipe, "a fox <lora:ink:1><lora:old film v1.2:0>", lora_dir=folder), one)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("<lora:inc:1>", "<lora:inc:1> names no LoRA in .*: did you mean ink"),
        ("<lora:something else:1>", r"names no LoRA in .*: its \.safetensors file has to be there"),
        ("<lora:../ink:1>", "names no LoRA"),
        ("<lora:ink:strong>", "expected <lora:name> or <lora:name:scale>"),
        ("<lora:ink:nan>", "expected <lora:name> or <lora:name:scale>"),
        ("<lora:ink:1:2>", "expected <lora:name> or <lora:name:scale>"),
        ("<lora:>", "expected <lora:name> or <lora:name:scale>"),
        ("<lora:broken:1>", "broken.safetensors cannot be loaded into this SDXL"),
        ("<lora:other:1>", "other.safetensors (holds no weights for|cannot be loaded into) this SDXL"),
    ],
)
def test_what_cannot_be_loaded_is_explained(pipe, folder, prompt, message) -> None:
    (folder / "broken.safetensors").write_bytes(b"no weights")
    save_file({"a": torch.zeros(2)}, folder / "other.safetensors")
    usual = draw(pipe, SHORT)
    with pytest.raises(ValueError, match=message):
        draw(pipe, f"{SHORT} {prompt}", lora_dir=folder)
    assert np.array_equal(draw(pipe, SHORT), usual)


def test_two_files_of_one_name_are_named(pipe, folder) -> None:
    (folder / "styles" / "ink.safetensors").write_bytes((folder / "ink.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"is the name of .* and of .*: rename one"):
        draw(pipe, "a fox <lora:ink:1>", lora_dir=folder)


def test_loras_of_one_s_own_are_not_disturbed(pipe, folder) -> None:
    pipe.load_lora_weights(str(folder), weight_name="ink.safetensors", adapter_name="own")
    pipe.set_adapters("own", 0.4)
    before = draw(pipe, LONG)
    with pytest.raises(ValueError, match="this pipeline has LoRAs already: unload them"):
        draw(pipe, "a fox <lora:ink:1>", lora_dir=folder)
    assert np.array_equal(draw(pipe, LONG, lora_dir=folder), before)


def test_an_error_in_the_call_unloads_it(pipe, folder) -> None:
    def fail(*_) -> None:
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        draw(pipe, "a fox <lora:ink:1>", lora_dir=folder, callback_on_step_end=fail)
    assert not any(pipe.get_list_adapters().values())


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [("nowhere", ValueError, "'nowhere', which is no folder"), (3, TypeError, "`lora_dir` is 3; expected a folder")],
)
def test_a_folder_that_is_none_is_refused(pipe, value, error, message) -> None:
    with pytest.raises(error, match=message):
        draw(pipe, SHORT, lora_dir=value)


def test_the_command_line_reports_it(capsys) -> None:
    assert main(["tokens", "a red star <lora:ink:0.8>"]) == 0
    assert "LoRAs, not encoded: <lora:ink:0.8>" in capsys.readouterr().out
