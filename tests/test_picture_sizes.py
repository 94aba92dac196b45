"""Sizes of pictures: each model's own factor is asked, wherever a size is passed."""

import argparse
import re

import pytest
import torch
from PIL import Image

from finelip_sdxl import FineLIPSDXLImg2ImgPipeline, FineLIPSDXLInpaintPipeline, FineLIPSDXLPipeline
from finelip_sdxl.cli.drawing import read_init_image
from finelip_sdxl.comparison import Settings
from finelip_sdxl.comparison.comparison import Comparison
from finelip_sdxl.picture_sizes import check_side, read_side_factor, side_factor
from finelip_sdxl.training.precompute import precompute

REFUSED = "expected a multiple of 16, such as 192"


@pytest.fixture(scope="module")
def miniature() -> FineLIPSDXLPipeline:
    return FineLIPSDXLPipeline.from_pretrained("miniature")


@pytest.mark.parametrize("side", ["width", "height"])
def test_a_call_refuses_what_diffusers_would_draw_smaller(miniature, side) -> None:
    with pytest.raises(ValueError, match=f"`{side}` is 200; {REFUSED}"):
        miniature("a red star", **{side: 200})
    inpainting = FineLIPSDXLInpaintPipeline.from_pipe(miniature)
    picture = Image.new("RGB", (200, 200))
    with pytest.raises(ValueError, match=f"`{side}` is 200; {REFUSED}"):
        inpainting("a red star", image=picture, mask_image=picture.convert("L"), **{side: 200})


def test_a_comparison_refuses_it_for_every_column(miniature) -> None:
    comparison = Comparison(miniature)
    for column in ("stock", "compel", "finelip"):
        with pytest.raises(ValueError, match=f"`width` is 200; {REFUSED}"):
            comparison.draw(column, Settings("a red star", width=200))


def test_a_size_that_fits_is_drawn_as_it_is(miniature) -> None:
    miniature.set_progress_bar_config(disable=True)
    assert miniature("a red star", width=208, height=64, num_inference_steps=1).images[0].size == (208, 64)


def test_a_picture_to_begin_with_is_cut_to_what_the_model_draws(tmp_path) -> None:
    file = tmp_path / "first.png"
    Image.new("RGB", (200, 140)).save(file)
    options = argparse.Namespace(init_image=str(file), width=None, height=None)
    assert [read_init_image(options, factor).size for factor in (8, 16)] == [(200, 136), (192, 128)]
    options.width = 200
    with pytest.raises(ValueError, match=f"`width` is 200; {REFUSED}"):
        read_init_image(options, 16)


def test_images_are_not_encoded_for_training_at_another_resolution(miniature, tmp_path) -> None:
    with pytest.raises(ValueError, match=f"`resolution` is 200; {REFUSED}"):
        precompute([], miniature, 200, False, tmp_path / "encoded")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_configs_alone_say_the_factor_of_the_pipeline(miniature, stock_folder) -> None:
    assert read_side_factor("miniature") == side_factor(miniature) == miniature.vae_scale_factor
    tiny = FineLIPSDXLImg2ImgPipeline.from_pretrained(stock_folder)
    assert read_side_factor(stock_folder) == side_factor(tiny) == 8 > tiny.vae_scale_factor
    assert read_side_factor("no/such/folder") == 8


@pytest.mark.parametrize(
    ("value", "near"),
    [(7, ", such as 16"), (-32, ", such as 16"), (511, ", such as 496"), (192.5, ""), ("192", ""), (torch.nan, "")],
)
def test_every_value_that_is_no_side_is_named(value, near) -> None:
    with pytest.raises(ValueError, match=re.escape(f"`width` is {value!r}; expected a multiple of 16{near}.")):
        check_side("width", value, 16)
