"""Plain CLIP text encoders: stretched, built from tensors, saved under keys that every transformers reads."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from finelip_sdxl.stretch import stretch_positions, stretched_row_indices
from finelip_sdxl.text_encoders import (
    build_text_encoder,
    num_positions,
    stretch_text_encoder,
    text_encoder_tensors,
    with_max_length,
)
from tests.helpers.tiny_sdxl import make_tokenizer

OLD_TRANSFORMERS = ("transformers==4.57.6", "huggingface_hub==0.36.0", "tokenizers==0.22.1")


def tiny_config(**overrides) -> CLIPTextConfig:
    sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "projection_dim": 16}
    depth = {"num_hidden_layers": 3, "num_attention_heads": 2}
    return CLIPTextConfig(**{**sizes, **depth, "bos_token_id": 97, "eos_token_id": 98, **overrides})


@pytest.fixture(params=[CLIPTextModel, CLIPTextModelWithProjection])
def encoder(request) -> CLIPTextModel | CLIPTextModelWithProjection:
    torch.manual_seed(0)
    return request.param(tiny_config()).eval()


@pytest.fixture
def input_ids() -> torch.Tensor:
    ids = torch.randint(0, 97, (2, 77), generator=torch.Generator().manual_seed(1))
    ids[:, 0], ids[:, 50:] = 97, 98
    return ids


def saved_keys(directory: Path) -> set[str]:
    with safe_open(directory / "model.safetensors", "pt") as file:
        return set(file.keys())


def position_table(encoder) -> torch.Tensor:
    return getattr(encoder, "text_model", encoder).embeddings.position_embedding.weight


def test_stretches_the_positional_table_and_nothing_else(encoder) -> None:
    stretched = stretch_text_encoder(encoder)
    assert type(stretched) is type(encoder)
    assert not stretched.training
    assert num_positions(stretched) == stretched.config.max_position_embeddings == 248
    before, after = encoder.state_dict(), stretched.state_dict()
    assert before.keys() == after.keys()
    for key in before:
        expected = stretch_positions(before[key]) if "position_embedding" in key else before[key]
        assert torch.equal(after[key], expected), key


def test_does_not_touch_its_argument_and_does_not_copy_its_weights(encoder) -> None:
    before = copy.deepcopy(encoder.state_dict())
    stretched = stretch_text_encoder(encoder)
    assert encoder.config.max_position_embeddings == num_positions(encoder) == 77
    assert not hasattr(encoder.config, "stretched_from")
    assert all(torch.equal(encoder.state_dict()[key], before[key]) for key in before)
    shared = encoder.get_input_embeddings().weight.data_ptr() == stretched.get_input_embeddings().weight.data_ptr()
    assert shared


def test_at_the_original_rows_it_is_the_original_bit_for_bit(encoder, input_ids) -> None:
    stretched = stretch_text_encoder(encoder)
    rows = stretched_row_indices(77)[None]
    with torch.no_grad():
        expected = encoder(input_ids, output_hidden_states=True)
        found = stretched(input_ids, position_ids=rows, output_hidden_states=True)
    assert torch.equal(found[0], expected[0])
    for state, expected_state in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert torch.equal(state, expected_state)


def test_reads_248_tokens(encoder) -> None:
    stretched = stretch_text_encoder(encoder)
    states = stretched(torch.full((1, 248), 98)).last_hidden_state
    assert states.shape == (1, 248, 32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_keeps_the_dtype(encoder, dtype, tmp_path) -> None:
    stretched = stretch_text_encoder(encoder.to(dtype))
    assert {parameter.dtype for parameter in stretched.parameters()} == {dtype}
    assert torch.equal(position_table(stretched), stretch_positions(position_table(encoder)))
    stretched.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")


def test_records_the_stretch_through_saving(encoder, tmp_path) -> None:
    stretch_text_encoder(encoder, keep=10, factor=2).save_pretrained(tmp_path)
    reloaded = type(encoder).from_pretrained(tmp_path)
    config = reloaded.config
    assert (config.stretched_from, config.stretch_keep, config.stretch_factor) == (77, 10, 2)
    assert num_positions(reloaded) == config.max_position_embeddings == 10 + 2 * 67


def test_counts_positions_in_the_tensor_not_in_the_config(encoder) -> None:
    encoder.config.max_position_embeddings = 1000
    assert num_positions(encoder) == 77
    assert stretch_text_encoder(encoder).config.stretched_from == 77


def test_saved_keys_begin_with_text_model(encoder, tmp_path) -> None:
    stretched = stretch_text_encoder(encoder)
    stretched.save_pretrained(tmp_path)
    keys = saved_keys(tmp_path)
    assert len(keys) == len(stretched.state_dict())
    assert all(key.startswith("text_model.") for key in keys - {"text_projection.weight"})
    reloaded = type(encoder).from_pretrained(tmp_path)
    assert all(torch.equal(value, stretched.state_dict()[key]) for key, value in reloaded.state_dict().items())


def test_saved_keys_keep_their_prefix_after_a_copy_and_a_merged_lora(encoder, tmp_path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "fc1"], r=2)
    adapted = peft.get_peft_model(copy.deepcopy(stretch_text_encoder(encoder)), config)
    adapted.merge_and_unload().save_pretrained(tmp_path)
    assert {key.split(".")[0] for key in saved_keys(tmp_path)} <= {"text_model", "text_projection"}


def test_a_copied_tokenizer_does_not_remember_how_it_was_called(tmp_path) -> None:
    tokenizer = make_tokenizer()
    tokenizer("a red fox", truncation=True, max_length=5, padding="max_length")
    copied = with_max_length(tokenizer, 248)
    copied.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    assert (saved["truncation"], saved["padding"]) == (None, None)
    assert tokenizer.backend_tokenizer.truncation["max_length"] == 5, "the argument is left alone"


def test_builds_the_class_that_the_tensors_call_for(encoder) -> None:
    built = build_text_encoder(encoder.config, text_encoder_tensors(encoder))
    assert type(built) is type(encoder)


def test_refuses_to_stretch_twice(encoder) -> None:
    with pytest.raises(ValueError, match="stretched already, from 77 to 248"):
        stretch_text_encoder(stretch_text_encoder(encoder))


def test_refuses_an_encoder_that_carries_a_lora(encoder) -> None:
    peft = pytest.importorskip("peft")
    encoder.add_adapter(peft.LoraConfig(target_modules=["q_proj"], r=2))
    with pytest.raises(ValueError, match="merge or unload the LoRA"):
        stretch_text_encoder(encoder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("text_model.final_layer_norm.bias"), "1 weights.*missing.*final_layer_norm.bias"),
        (lambda tensors: tensors.update({"text_model.extra": torch.ones(1)}), "1 weights have no place.*extra"),
        (lambda tensors: tensors.update({"text_model.final_layer_norm.bias": torch.ones(5)}), r"\(5,\).*\(32,\)"),
    ],
)
def test_refuses_weights_that_do_not_fit(encoder, change, message) -> None:
    tensors = text_encoder_tensors(encoder)
    change(tensors)
    with pytest.raises(ValueError, match=message):
        build_text_encoder(encoder.config, tensors)


@pytest.fixture(scope="session")
def old_transformers(pytestconfig) -> Path:
    """A directory with transformers 4.57, the last major version that reads prefixed keys only."""
    directory = pytestconfig.cache.mkdir("-".join(OLD_TRANSFORMERS).replace("==", "-"))
    complete = directory / "complete"
    if not complete.exists():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--upgrade", "--target", str(directory)]
        try:
            subprocess.run([*command, *OLD_TRANSFORMERS], check=True, capture_output=True, text=True, timeout=300)
        except (subprocess.SubprocessError, OSError) as error:
            reason = str(getattr(error, "stderr", None) or error).strip().splitlines()[-1]
            pytest.skip(f"transformers 4.57 could not be installed beside the present one: {reason}")
        complete.touch()
    return directory


@pytest.mark.slow
def test_transformers_4_57_loads_what_we_save(encoder, input_ids, old_transformers, tmp_path) -> None:
    stretched = stretch_text_encoder(encoder)
    stretched.save_pretrained(tmp_path)
    script = f"""
import json, torch, transformers
from transformers import {type(encoder).__name__} as Model
model, info = Model.from_pretrained({str(tmp_path)!r}, output_loading_info=True)
ids = torch.tensor({input_ids.tolist()})
states = model.eval()(ids).last_hidden_state.double()
print(json.dumps([transformers.__version__, sorted(info["missing_keys"]), sorted(info["unexpected_keys"]),
                  states.abs().sum().item()]))
"""
    environment = {**os.environ, "PYTHONPATH": str(old_transformers)}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    version, missing, unexpected, total = json.loads(run.stdout.splitlines()[-1])
    assert version.startswith("4.57")
    assert (missing, unexpected) == ([], [])
    with torch.no_grad():
        expected = stretched(input_ids).last_hidden_state.double().abs().sum().item()
    assert total == pytest.approx(expected, rel=1e-5)
