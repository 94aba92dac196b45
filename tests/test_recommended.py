"""A model's recommended steps and guidance scale: every door uses them, and saved folders keep them."""

import inspect
import logging

import pytest
from diffusers import AutoPipelineForText2Image, DiffusionPipeline, StableDiffusionXLPipeline
from diffusers.utils import logging as diffusers_logging

from finelip_sdxl.cli.main import main
from finelip_sdxl.comparison.comparison import Comparison
from finelip_sdxl.comparison.settings import Settings
from finelip_sdxl.foreign_files import read_json
from finelip_sdxl.images import read_parameters
from finelip_sdxl.miniature import miniature_path
from finelip_sdxl.pipelines import FineLIPSDXLImg2ImgPipeline, FineLIPSDXLPipeline
from finelip_sdxl.pipelines.export import stock_pipeline
from finelip_sdxl.recommended import Recommended, recommended_of, record_recommended
from tests.helpers.single_file import save_single_file

OWN = Recommended(steps=3, guidance_scale=1.5)


@pytest.fixture
def pipe(stock_folder) -> FineLIPSDXLPipeline:
    pipe = FineLIPSDXLPipeline.from_pretrained(stock_folder)
    record_recommended(pipe, OWN)
    return pipe


@pytest.fixture
def folder(pipe, tmp_path) -> str:
    pipe.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def drawn_with(pipe, *arguments, **given) -> tuple[int, float]:
    """The number of steps of a call, and its guidance scale."""
    pipe.set_progress_bar_config(disable=True)
    pipe(*arguments, **given, output_type="latent")
    return len(pipe.scheduler.timesteps), pipe.guidance_scale


def test_a_call_uses_them_unless_it_has_its_own(pipe) -> None:
    assert drawn_with(pipe, "a fox") == (3, 1.5)
    assert drawn_with(pipe, "a fox", num_inference_steps=2) == (2, 1.5)
    assert drawn_with(pipe, "a fox", guidance_scale=1.0) == (3, 1.0)
    assert drawn_with(pipe, "a fox", None, 64, 64, 1) == (1, 1.5)  # by position


def test_a_model_without_has_those_of_diffusers(stock_folder) -> None:
    pipe = FineLIPSDXLPipeline.from_pretrained(stock_folder)
    assert recommended_of(pipe.config) is None
    assert drawn_with(pipe, "a fox", num_inference_steps=1) == (1, 5.0)
    parameters = inspect.signature(StableDiffusionXLPipeline.__call__).parameters
    own = Recommended(parameters["num_inference_steps"].default, parameters["guidance_scale"].default)
    assert Recommended() == Comparison(pipe).recommended == own


def test_saved_and_converted_pipelines_keep_them(pipe, folder) -> None:
    assert recommended_of(read_json(miniature_path() / "model_index.json")) == Recommended(20, 5.0)
    assert recommended_of(FineLIPSDXLPipeline.from_pretrained(folder).config) == OWN
    assert recommended_of(FineLIPSDXLImg2ImgPipeline.from_pipe(pipe).config) == OWN
    assert recommended_of(stock_pipeline(pipe).config) == OWN


def test_a_single_file_has_those_of_its_config(session_components, folder, tmp_path) -> None:
    stock = StableDiffusionXLPipeline(**session_components)
    save_single_file(stock, tmp_path / "fine_tune.safetensors")
    pipe = FineLIPSDXLPipeline.from_single_file(tmp_path / "fine_tune.safetensors", config=folder)
    assert recommended_of(pipe.config) == OWN


@pytest.mark.parametrize("opens", [DiffusionPipeline, StableDiffusionXLPipeline, AutoPipelineForText2Image])
def test_stock_diffusers_opens_such_a_folder_without_a_word_about_it(folder, opens) -> None:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    diffusers_logging.add_handler(handler)
    try:
        opens.from_pretrained(folder)
    finally:
        diffusers_logging.remove_handler(handler)
    assert not [message for message in said if "recommended" in message or "not expected" in message]


@pytest.mark.parametrize("entry", [7, {}, {"num_inference_steps": 0, "guidance_scale": 3}, {"num_inference_steps": 9}])
def test_an_entry_that_is_none_is_refused(entry) -> None:
    with pytest.raises(ValueError, match=r"_finelip_sdxl_recommended is .*: correct its model_index.json"):
        recommended_of({"_finelip_sdxl_recommended": entry})
    with pytest.raises(ValueError, match="_finelip_sdxl_recommended"):
        recommended_of({"_finelip_sdxl_recommended": {"num_inference_steps": 9, "guidance_scale": float("nan")}})


def test_a_comparison_uses_them_for_settings_without(pipe) -> None:
    comparison = Comparison(pipe)
    assert comparison.recommended == OWN
    drawn = comparison.draw("stock", Settings("a fox", steps=1))
    assert (drawn.settings.steps, drawn.settings.guidance_scale) == (1, 1.5)
    assert drawn.parameters["guidance_scale"] == 1.5


def test_settings_without_them_get_defaults_where_a_model_has_none() -> None:
    filled = Settings("a fox").filled(Recommended())
    assert (filled.steps, filled.guidance_scale) == (50, 5.0)


@pytest.mark.parametrize("command", ["generate", "compare"])
def test_commands_use_and_record_them(folder, tmp_path, command) -> None:
    file = str(tmp_path / "a.png")
    more = ["--columns", "stock"] if command == "compare" else []
    assert main([command, "a fox", "--base", folder, "--device", "cpu", "--out", file, *more]) == 0
    found = read_parameters(file)
    assert (found["steps"], found["guidance_scale"]) == (3, 1.5)
    assert main([command, "a fox", "--base", folder, "--device", "cpu", "--out", file, "--steps", "1", *more]) == 0
    found = read_parameters(file)
    assert (found["steps"], found["guidance_scale"]) == (1, 1.5)
