"""The everyday flags of `generate` and `compare`, on the tiny SDXL."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import pytest
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import save_file

from finelip_sdxl import FineLIPSDXLPipeline
from finelip_sdxl.cli import drawing
from finelip_sdxl.cli.main import main
from finelip_sdxl.images import read_parameters
from tests.helpers.single_file import vae_tensors
from tests.pipelines.test_ecosystem import make_lora


@pytest.fixture
def draw(stock_folder, tmp_path) -> Callable[..., tuple[Image.Image, dict]]:
    """Draws "a fox" with further flags, and returns the picture and its parameters."""

    def draw(*flags: str) -> tuple[Image.Image, dict]:
        file = tmp_path / "drawn.png"
        options = ["--base", stock_folder, "--steps", "2", "--seed", "0", "--device", "cpu", "--out", str(file)]
        assert main(["generate", "a fox", *options, *flags]) == 0
        return Image.open(file).copy(), read_parameters(file)

    return draw


def test_loras_are_loaded_with_their_scales(draw, tmp_path) -> None:
    for seed, name in enumerate(("one", "two")):
        save_file(make_lora("kohya", seed=seed), tmp_path / f"{name}.safetensors")
    one, two = (str(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    plain, found = draw()
    assert "lora" not in found
    off, found = draw("--lora", f"{one}:0", "--lora", f"{two}:0.0")
    assert off.tobytes() == plain.tobytes()
    assert found["lora"] == [{"name": "one.safetensors", "scale": 0.0}, {"name": "two.safetensors", "scale": 0.0}]
    first, _ = draw("--lora", one)
    both, _ = draw("--lora", one, "--lora", f"{two}:0.5")
    assert len({picture.tobytes() for picture in (plain, first, both)}) == 3


def test_a_scheduler_draws_as_diffusers_does(draw, stock_folder) -> None:
    pictures = {
        name: draw("--scheduler", name, "--steps", "4") for name in ("euler_a", "dpmpp_2m_karras", "DDIMScheduler")
    }
    assert len({picture.tobytes() for picture, _ in pictures.values()}) == 3
    assert [found["scheduler"] for _, found in pictures.values()] == list(pictures)
    assert pictures["euler_a"][1]["sampler"] == "Euler a"


def test_every_scheduler_can_be_made_of_sdxls_own(stock_folder) -> None:
    pipe = FineLIPSDXLPipeline.from_pretrained(stock_folder)
    for name, (class_name, settings) in drawing.SCHEDULERS.items():
        drawing.set_scheduler(pipe, name)
        assert type(pipe.scheduler) is getattr(diffusers, class_name)
        assert settings.items() <= dict(pipe.scheduler.config).items()
        pipe.scheduler.set_timesteps(3)


def test_a_vae_takes_the_place_of_the_models_own(draw, stock_folder, tmp_path) -> None:
    vae = AutoencoderKL.from_pretrained(stock_folder, subfolder="vae")
    for parameter in vae.decoder.parameters():
        parameter.data += 0.05
    vae.save_pretrained(tmp_path / "my-vae")
    plain, _ = draw()
    same, found = draw("--vae", stock_folder)  # its folder `vae`
    assert same.tobytes() == plain.tobytes()
    assert found["vae"] == Path(stock_folder).name
    assert draw("--vae", str(tmp_path / "my-vae"))[0].tobytes() != plain.tobytes()


@pytest.mark.parametrize("layout", ["original", "original, in an SDXL", "diffusers"])
def test_a_vae_in_a_single_file_takes_the_place_of_the_models_own(draw, stock_folder, tmp_path, layout) -> None:
    vae = AutoencoderKL.from_pretrained(stock_folder, subfolder="vae")
    for parameter in vae.decoder.parameters():
        parameter.data += 0.05
    vae.save_pretrained(tmp_path / "folder")
    file = tmp_path / "folder" / "diffusion_pytorch_model.safetensors"
    if layout != "diffusers":
        file, prefix = tmp_path / "vae.safetensors", "first_stage_model." * ("SDXL" in layout)
        save_file({f"{prefix}{key}": weight.contiguous() for key, weight in vae_tensors(vae).items()}, file)
    picture, found = draw("--vae", str(file))
    assert picture.tobytes() == draw("--vae", str(tmp_path / "folder"))[0].tobytes() != draw()[0].tobytes()
    assert found["vae"] == file.name


def test_clip_skip_reaches_the_text_encoders(draw, stock_folder, tmp_path, capsys) -> None:
    plain, _ = draw()
    assert draw("--clip-skip", "0")[0].tobytes() == plain.tobytes()
    skipped, found = draw("--clip-skip", "1")
    assert skipped.tobytes() != plain.tobytes()
    assert found["clip_skip"] == 1


def test_a_picture_to_begin_with_is_kept_by_a_low_strength(draw, tmp_path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (100, 140, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "first.png")
    start = ["--init-image", str(tmp_path / "first.png")]
    weak, found = draw(*start, "--strength", "0.5")
    assert weak.size == (136, 96)  # multiples of 8
    assert (found["init_image"], found["strength"], found["width"]) == ("first.png", 0.5, 136)
    strong, _ = draw(*start, "--strength", "1", "--width", "64", "--height", "64")
    assert strong.size == (64, 64)


def test_a_small_picture_is_enlarged(draw) -> None:
    plain, _ = draw()
    large, found = draw("--upscale", "3")
    assert large.size == (48, 48)
    assert (found["upscale"], found["width"], found["height"]) == (3, 16, 16)
    assert large.tobytes() == plain.resize((48, 48), Image.Resampling.LANCZOS).tobytes()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lora", "gone.safetensors"], "gone.safetensors does not exist: pass a .safetensors file"),
        (["--lora", "gone.safetensors:0.5"], "gone.safetensors does not exist"),
        (["--lora", "{pickle}:0.5"], "is no .safetensors file"),
        (
            ["--lora", "a.safetensors:nan"],
            "has a wrong scale behind its colon: expected a number of at least -10 instead of nan",
        ),
        (["--lora", "a.safetensors:inf"], "of at most 10 instead of inf"),
        (["--lora", "a.safetensors:"], "instead of nothing; write it as in style.safetensors:0.8"),
        (["--lora", "a.safetensors:strong"], "instead of strong"),
        (["--scheduler", "eular"], "'eular' is no scheduler; expected ddim, "),
        (["--scheduler", "AutoencoderKL"], "is no scheduler"),
        (["--vae", "./gone"], "./gone does not exist"),
        (["--clip-skip", "-1"], "whole number"),
        (["--clip-skip", "1", "--hidden-states", "last"], "--clip-skip 1 counts from penultimate states"),
        (["--init-image", "gone.png"], "--init-image gone.png does not exist"),
        (["--strength", "0.5"], "--strength 0.5 goes with --init-image"),
        (["--init-image", "{pickle}", "--strength", "0"], "expected a number above 0 instead of 0"),
        (["--init-image", "{pickle}", "--strength", "nan"], "expected a number above 0 instead of nan"),
        (["--init-image", "{pickle}", "--steps", "2", "--strength", "0.1"], "leave no step to draw"),
        (["--upscale", "0"], "whole number of at least 1"),
        (["--upscale", "17"], "at most 16"),
        (["--upscale", "1.5"], "whole number"),
        (
            ["--upscale", "16", "--width", "2048"],
            "--upscale 16 makes a picture of 32,768 pixels; expected at most 16,384",
        ),
    ],
)
def test_bad_values_are_refused_before_anything_is_loaded(tmp_path, monkeypatch, capsys, flags, message) -> None:
    monkeypatch.chdir(tmp_path)
    Path("style.pt").touch()
    monkeypatch.setattr(FineLIPSDXLPipeline, "from_pretrained", lambda *names, **options: pytest.fail("loaded"))
    with pytest.raises(SystemExit) as stopped:
        sys.exit(main(["generate", "a fox", "--device", "cpu", *(flag.format(pickle="style.pt") for flag in flags)]))
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize("content", ["nothing of an SDXL", "another width", "no safetensors"])
def test_a_lora_of_another_model_is_refused(stock_folder, tmp_path, capsys, content) -> None:
    file, weights = tmp_path / "style.safetensors", make_lora("diffusers")
    if content == "no safetensors":
        file.write_text("<html>")
    elif content == "another width":
        save_file({key: weight.repeat(3, 3) for key, weight in weights.items()}, file)
    else:
        save_file({f"transformer.{key}": weight for key, weight in weights.items()}, file)
    options = ["--base", stock_folder, "--device", "cpu", "--lora", str(file), "--out", str(tmp_path / "a.png")]
    assert main(["generate", "a fox", *options]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"--lora {file}" in line
    assert "pass a LoRA that was trained from an SDXL" in line
    assert not (tmp_path / "a.png").exists()


def test_a_folder_that_is_no_vae_is_refused(stock_folder, tmp_path, capsys) -> None:
    options = ["--base", stock_folder, "--device", "cpu", "--out", str(tmp_path / "a.png")]
    assert main(["generate", "a fox", *options, "--vae", f"{stock_folder}/unet"]) == 2
    assert "cannot be loaded as a VAE of SDXL" in capsys.readouterr().err.splitlines()[-1]


def test_a_scale_stands_behind_the_last_colon(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("odd:2").touch()
    assert drawing.lora("odd:2") == ("odd:2", 1.0)
    assert drawing.lora("odd:2:-1.5") == ("odd:2", -1.5)
    assert drawing.lora("C:\\loras\\a.safetensors") == ("C:\\loras\\a.safetensors", 1.0)
    assert drawing.lora("some/repository:.8") == ("some/repository", 0.8)
    with pytest.raises(argparse.ArgumentTypeError):
        drawing.lora("a:11")


def test_compare_takes_a_scheduler_and_a_vae(stock_folder, tmp_path) -> None:
    file = str(tmp_path / "a.png")
    options = ["--base", stock_folder, "--steps", "1", "--seed", "0", "--device", "cpu", "--out", file]
    options += ["--columns", "stock", "--scheduler", "euler_a", "--vae", stock_folder]
    assert main(["compare", "a fox", *options]) == 0
    found = read_parameters(file)
    assert (found["scheduler"], found["sampler"], found["vae"]) == ("euler_a", "Euler a", Path(stock_folder).name)
