"""SDXL as one file, in the original project's layout, offline: what fine-tunes are passed around as."""

import copy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from finelip_sdxl import (
    ConditioningAdapter,
    FineLIPSDXLControlNetPipeline,
    FineLIPSDXLImg2ImgPipeline,
    FineLIPSDXLInpaintPipeline,
    FineLIPSDXLPipeline,
    miniature_path,
)
from finelip_sdxl.cli.main import main
from finelip_sdxl.pipelines.export import stock_pipeline
from finelip_sdxl.text_encoders import num_positions, stretch_text_encoder
from tests.helpers.drawing import draw, embeddings
from tests.helpers.prompts import ENDLESS, LONG, SHORT
from tests.helpers.single_file import save_single_file
from tests.helpers.tiny_sdxl import make_text_encoder


@pytest.fixture(scope="module")
def stock(stock_folder) -> StableDiffusionXLPipeline:
    pipe = StableDiffusionXLPipeline.from_pretrained(stock_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def file(stock, tmp_path_factory) -> str:
    name = str(tmp_path_factory.mktemp("single") / "fine_tune.safetensors")
    save_single_file(stock, name)
    return name


@pytest.fixture(autouse=True)
def offline(monkeypatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_the_checkpoint_s_own_encoders_are_stretched(file, stock, stock_folder) -> None:
    pipe = FineLIPSDXLPipeline.from_single_file(file, config=stock_folder)
    for name in ("text_encoder", "text_encoder_2"):
        expected, found = stretch_text_encoder(getattr(stock, name)), getattr(pipe, name)
        assert num_positions(found) == 248
        for key, weight in expected.state_dict().items():
            torch.testing.assert_close(found.state_dict()[key], weight)
    assert (pipe.tokenizer.model_max_length, pipe.tokenizer_2.model_max_length) == (248, 248)


def test_prompts_of_every_length_are_read(file, stock, stock_folder) -> None:
    pipe = FineLIPSDXLPipeline.from_single_file(file, config=stock_folder)
    torch.testing.assert_close(embeddings(pipe, SHORT), embeddings(stock, SHORT), atol=1e-5, rtol=1e-4)
    assert [embeddings(pipe, prompt).shape[1] for prompt in (SHORT, LONG, ENDLESS)] == [77, 154, 2 * 248]
    assert np.abs(draw(pipe, SHORT, num_inference_steps=1) - draw(stock, SHORT, num_inference_steps=1)).max() < 1e-3
    assert np.abs(draw(pipe, LONG, num_inference_steps=1) - draw(stock, LONG, num_inference_steps=1)).max() > 1e-3


def test_a_config_may_be_a_path_and_a_file_a_pickle_of_weights(file, stock, stock_folder, tmp_path) -> None:
    torch.save({"state_dict": load_file(file)}, tmp_path / "fine_tune.ckpt")
    pipe = FineLIPSDXLPipeline.from_single_file(tmp_path / "fine_tune.ckpt", config=Path(stock_folder))
    torch.testing.assert_close(embeddings(pipe, SHORT), embeddings(stock, SHORT), atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def folders(stock, stock_folder, tmp_path_factory) -> dict[str, str]:
    """Folders that this package has saved of the same SDXL, and what goes with each of them."""
    swapped = FineLIPSDXLPipeline.from_pretrained(stock_folder)
    torch.manual_seed(0)
    full = FineLIPSDXLPipeline.from_pretrained(
        stock_folder,
        finelip=make_text_encoder(32, positions=248, seed=7),
        finelip_2=make_text_encoder(48, projection_dim=24, positions=248, seed=8),
        conditioning_adapter=ConditioningAdapter([32, 48], 24, 8),
        short_prompt_encoder="long",
    )
    full.register_modules(stock_text_encoder=stock.text_encoder, stock_text_encoder_2=stock.text_encoder_2)
    pipes = {
        "swapped": swapped,
        "with FineLIPs, original encoders and an adapter": full,
        "unswapped": FineLIPSDXLPipeline(**stock.components),
        "exported": stock_pipeline(swapped),
    }
    saved = {name: str(tmp_path_factory.mktemp("saved")) for name in pipes}
    for name, pipe in pipes.items():
        pipe.save_pretrained(saved[name])
    return saved


SAVED = ["swapped", "with FineLIPs, original encoders and an adapter", "unswapped", "exported"]


@pytest.mark.parametrize("saved", SAVED)
def test_a_pipeline_that_we_saved_is_a_config(saved, file, stock, folders) -> None:
    pipe = FineLIPSDXLPipeline.from_single_file(file, config=folders[saved], short_prompt_encoder="original")
    for name in ("text_encoder", "text_encoder_2"):
        encoder = getattr(pipe, name)
        assert (num_positions(encoder), encoder.config.stretched_from) == (248, 77)
        assert getattr(pipe, f"stock_{name}") is None
    assert pipe.tokenizer.model_max_length == pipe.tokenizer_2.model_max_length == 248
    assert pipe.conditioning_adapter is None
    torch.testing.assert_close(embeddings(pipe, SHORT), embeddings(stock, SHORT), atol=1e-5, rtol=1e-4)
    assert embeddings(pipe, LONG).shape[1] == 154


@pytest.mark.parametrize("saved", [*SAVED, "stock"])
def test_a_file_of_long_encoders_is_read_with_any_config(saved, stock_folder, folders, tmp_path) -> None:
    torch.manual_seed(0)
    long = FineLIPSDXLPipeline.from_pretrained(
        stock_folder,
        finelip=make_text_encoder(32, positions=248, seed=7),
        finelip_2=make_text_encoder(48, projection_dim=24, positions=248, seed=8),
        short_prompt_encoder="long",
    )
    save_single_file(long, tmp_path / "long.safetensors")
    config = {**folders, "stock": stock_folder}[saved]
    pipe = FineLIPSDXLPipeline.from_single_file(
        tmp_path / "long.safetensors", config=config, short_prompt_encoder="long"
    )
    assert num_positions(pipe.text_encoder) == num_positions(pipe.text_encoder_2) == 248
    assert not hasattr(pipe.text_encoder.config, "stretched_from"), "nothing says that it was only stretched"
    torch.testing.assert_close(embeddings(pipe, LONG), embeddings(long, LONG), atol=1e-5, rtol=1e-4)


def test_the_miniature_s_config_goes_with_its_weights(tmp_path) -> None:
    stock = StableDiffusionXLPipeline.from_pretrained(miniature_path())
    save_single_file(stock, tmp_path / "fine_tune.safetensors")
    pipe = FineLIPSDXLPipeline.from_single_file(tmp_path / "fine_tune.safetensors", config="miniature")
    prompt = "In the middle is a red star."
    torch.testing.assert_close(embeddings(pipe, prompt), embeddings(stock, prompt), atol=1e-4, rtol=1e-4)


def test_encoders_may_be_left_out(file, folders) -> None:
    absent = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    pipe = FineLIPSDXLPipeline.from_single_file(file, config=folders[SAVED[1]], **absent)
    assert pipe.text_encoder is pipe.text_encoder_2 is pipe.stock_text_encoder is None


def test_a_damaged_config_is_named(file, stock_folder, tmp_path) -> None:
    for name in ("model_index.json", "text_encoder/config.json"):
        folder = tmp_path / name.replace("/", "-")
        shutil.copytree(stock_folder, folder)
        (folder / name).write_text("{")
        assert f"{folder / name} is no JSON" in refusal(file, config=folder)
    folder = tmp_path / "huge"
    shutil.copytree(stock_folder, folder)
    (folder / "unet" / "config.json").write_text('{"layers_per_block": 1000000}')
    assert f"{folder}/unet/config.json says layers_per_block 1000000" in refusal(file, config=folder)
    for component in ("unet", "vae", "scheduler"):
        folder = tmp_path / component
        shutil.copytree(stock_folder, folder)
        next((folder / component).glob("*config.json")).write_text('{"act_fn": 3, "beta_schedule": 3}')
        assert f"with the {component} of config={folder}" in refusal(file, config=folder)


def test_a_controlnet_is_passed_beside_it(file, stock, stock_folder) -> None:
    controlnet = ControlNetModel.from_unet(stock.unet)
    pipe = FineLIPSDXLControlNetPipeline.from_single_file(file, config=stock_folder, controlnet=controlnet)
    assert num_positions(pipe.text_encoder) == 248
    assert pipe.controlnet is controlnet


@pytest.mark.parametrize("pipeline_class", [FineLIPSDXLImg2ImgPipeline, FineLIPSDXLInpaintPipeline])
def test_other_pipelines_open_it_too(file, stock_folder, pipeline_class) -> None:
    pipe = pipeline_class.from_single_file(file, config=stock_folder, dtype=torch.bfloat16)
    assert num_positions(pipe.text_encoder) == 248
    assert pipe.unet.dtype == pipe.text_encoder.dtype == torch.bfloat16


def test_a_finelip_replaces_an_encoder_and_options_are_kept(file, stock, stock_folder, tmp_path) -> None:
    other = copy.deepcopy(stretch_text_encoder(stock.text_encoder))  # whose weights are stock's
    with torch.no_grad():
        other.get_input_embeddings().weight.mul_(2)
    other.save_pretrained(tmp_path / "finelip")
    pipe = FineLIPSDXLPipeline.from_single_file(
        file, finelip=str(tmp_path / "finelip"), config=stock_folder, overflow="error", length_buckets=()
    )
    assert (pipe.overflow, pipe.length_buckets) == ("error", ())
    torch.testing.assert_close(
        pipe.text_encoder.get_input_embeddings().weight, 2 * stock.text_encoder.get_input_embeddings().weight
    )
    assert num_positions(pipe.stock_text_encoder) == 77  # for short prompts
    torch.testing.assert_close(embeddings(pipe, SHORT), embeddings(stock, SHORT), atol=1e-5, rtol=1e-4)


def test_an_adapter_comes_along(file, stock_folder, tmp_path) -> None:
    ConditioningAdapter([32, 48], 24, 8).save_pretrained(tmp_path)
    pipe = FineLIPSDXLPipeline.from_single_file(file, config=stock_folder, conditioning_adapter=tmp_path)
    assert isinstance(pipe.conditioning_adapter, ConditioningAdapter)


def test_the_command_line_converts_it(file, stock_folder, tmp_path, capsys) -> None:
    out = tmp_path / "converted"
    assert main(["convert", file, str(out), "--config", stock_folder]) == 0
    pipe = FineLIPSDXLPipeline.from_pretrained(str(out))
    direct = FineLIPSDXLPipeline.from_single_file(file, config=stock_folder)
    torch.testing.assert_close(embeddings(pipe, LONG), embeddings(direct, LONG))


def test_the_command_line_exports_it_for_stock_diffusers(file, stock_folder, tmp_path, capsys) -> None:
    out = tmp_path / "exported"
    assert main(["export", file, str(out), "--config", stock_folder, "--dtype", "float32"]) == 0
    plain = StableDiffusionXLPipeline.from_pretrained(out)
    direct = FineLIPSDXLPipeline.from_single_file(
        file, config=stock_folder, short_prompt_encoder="long", length_buckets=()
    )
    torch.testing.assert_close(embeddings(plain, LONG), embeddings(direct, LONG))


def test_the_command_line_draws_and_counts_with_it(file, stock_folder, tmp_path, capsys) -> None:
    base = ["--base", file, "--config", stock_folder]
    assert main(["tokens", LONG, *base]) == 0
    assert "142 tokens in 1 window of 154 positions" in capsys.readouterr().out
    drawing = ["--steps", "1", "--device", "cpu", "--width", "64", "--height", "64"]
    assert main(["generate", LONG, *base, *drawing, "--out", str(tmp_path / "a.png")]) == 0
    assert main(["compare", LONG, *base, *drawing, "--out", str(tmp_path / "b.png")]) == 0


# What goes wrong


def refusal(file, **arguments) -> str:
    with pytest.raises((ValueError, OSError)) as caught:
        FineLIPSDXLPipeline.from_single_file(file, **arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_without_configs_it_is_said_what_to_pass(file) -> None:
    assert "pass config=, the directory of an SDXL in Diffusers' layout" in refusal(file)


def test_a_config_that_is_none_is_named(file, tmp_path) -> None:
    assert f"config={tmp_path} has no model_index.json" in refusal(file, config=str(tmp_path))


def test_a_file_that_is_not_there_is_named() -> None:
    assert "nowhere.safetensors does not exist" in refusal("nowhere.safetensors")


def test_a_file_that_is_no_checkpoint_is_named(file, stock_folder, tmp_path) -> None:
    (tmp_path / "junk.safetensors").write_bytes(b"no weights" * 100)
    assert "junk.safetensors cannot be read as a checkpoint" in refusal(
        tmp_path / "junk.safetensors", config=stock_folder
    )
    with open(file, "rb") as whole:
        (tmp_path / "cut.safetensors").write_bytes(whole.read(10_000))
    assert "cut.safetensors cannot be read as a checkpoint" in refusal(
        tmp_path / "cut.safetensors", config=stock_folder
    )


def test_a_pickle_that_runs_code_is_not_opened(stock_folder, tmp_path) -> None:
    torch.save({"state_dict": print}, tmp_path / "evil.ckpt")
    assert "evil.ckpt cannot be read as a checkpoint" in refusal(tmp_path / "evil.ckpt", config=stock_folder)


def test_a_checkpoint_without_text_encoders_is_no_whole_sdxl(file, stock_folder, tmp_path) -> None:
    weights = {key: weight for key, weight in load_file(file).items() if not key.startswith("conditioner.")}
    save_file(weights, tmp_path / "unet.safetensors")
    assert "is no whole SDXL" in refusal(tmp_path / "unet.safetensors", config=stock_folder)


def test_a_checkpoint_of_another_kind_is_named_with_what_does_not_fit(file, stock_folder, tmp_path) -> None:
    second, first_of_sd_1 = "conditioner.embedders.1.", ("conditioner.embedders.0.", "cond_stage_model.")
    weights = {
        key.replace(*first_of_sd_1): weight for key, weight in load_file(file).items() if not key.startswith(second)
    }
    save_file(weights, tmp_path / "sd_1.safetensors")
    message = refusal(tmp_path / "sd_1.safetensors", config=stock_folder)
    assert "sd_1.safetensors is no SDXL of the sizes in its config" in message
    assert "expected shape torch.Size([77, 48]), but got torch.Size([77, 32])" in message


def test_what_no_single_file_holds_is_asked_for(file, stock_folder) -> None:
    with pytest.raises(ValueError, match="FineLIPSDXLControlNetPipeline needs a controlnet, which single files do not"):
        FineLIPSDXLControlNetPipeline.from_single_file(file, config=stock_folder)


def test_wrong_options_are_told_before_anything_is_loaded(monkeypatch, file) -> None:
    monkeypatch.setattr(StableDiffusionXLPipeline, "from_single_file", lambda *args, **kwargs: pytest.fail("loaded"))
    assert "`overflow` must be one of" in refusal(file, overflow="all")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["generate", LONG, "--config", "miniature"],
            "config miniature goes with a single file, but",
        ),
        (["tokens", LONG, "--base", "{file}"], "holds weights alone: pass --config"),
    ],
)
def test_the_command_line_says_when_configs_do_not_fit(arguments, message, file, capsys, tmp_path) -> None:
    arguments = [argument.format(file=file) for argument in arguments]
    more = ["--out", str(tmp_path / "a.png")] if arguments[0] == "generate" else []
    assert main([*arguments, *more]) == 2
    assert message in capsys.readouterr().err
