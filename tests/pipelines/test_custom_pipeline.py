"""`DiffusionPipeline.from_pretrained(base, custom_pipeline=<directory>)`: only `__init__` of ours is called there."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline

from finelip_sdxl import FineLIPSDXLPipeline
from finelip_sdxl.text_encoders import num_positions
from tests.helpers.drawing import draw
from tests.helpers.prompts import SHORT
from tests.helpers.tiny_sdxl import make_text_encoder

DIRECTORY = str(Path(__file__).parents[2] / "pipelines")
LONG = " ".join(["A large blue square of the quiet fox is above the hare."] * 12)


def load(base: str, **kwargs) -> FineLIPSDXLPipeline:
    pipe = DiffusionPipeline.from_pretrained(base, custom_pipeline=DIRECTORY, trust_remote_code=True, **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_encoders_are_swapped_on_construction(stock_folder) -> None:
    pipe = load(stock_folder)
    assert isinstance(pipe, FineLIPSDXLPipeline)
    assert num_positions(pipe.text_encoder) == num_positions(pipe.text_encoder_2) == 248
    assert pipe.tokenizer.model_max_length == pipe.tokenizer_2.model_max_length == 248
    stock = StableDiffusionXLPipeline.from_pretrained(stock_folder)
    stock.set_progress_bar_config(disable=True)
    assert np.array_equal(draw(pipe, SHORT), draw(stock, SHORT))
    ours = FineLIPSDXLPipeline.from_pretrained(stock_folder)
    assert np.array_equal(draw(pipe, LONG), draw(ours, LONG))


def test_options_and_a_finelip_are_arguments_of_construction(stock_folder) -> None:
    encoder = make_text_encoder(32, positions=248, seed=7)
    pipe = load(stock_folder, finelip=encoder, overflow="error", length_buckets=[100])
    assert torch.equal(pipe.text_encoder(torch.tensor([[1, 2]]))[0], encoder(torch.tensor([[1, 2]]))[0])
    assert num_positions(pipe.stock_text_encoder) == 77
    assert pipe.overflow == "error"
    assert pipe.length_buckets == (100,)


@pytest.mark.parametrize(
    ("name", "near"),
    [("fineclip", "did you mean `finelip`?"), ("overfow", "`overflow`?"), ("banana", "lists its argum")],
)
def test_an_unknown_argument_is_refused_with_the_nearest_name(stock_folder, name, near) -> None:
    with pytest.raises(TypeError, match=rf"`{name}` is no argument of .*{re.escape(near)}"):
        load(stock_folder, **{name: "x"})


def test_diffusers_own_arguments_are_taken(stock_folder) -> None:
    diffusers_own = {"dtype": torch.float32, "variant": None, "use_safetensors": True, "low_cpu_mem_usage": False}
    assert load(stock_folder, **diffusers_own, unet=None).unet is None


def test_it_saves_and_reopens_like_ours(stock_folder, tmp_path) -> None:
    pipe = load(stock_folder, overflow="truncate")
    pipe.save_pretrained(tmp_path)
    for again in (load(str(tmp_path)), FineLIPSDXLPipeline.from_pretrained(tmp_path)):
        assert again.overflow == "truncate"
        assert np.array_equal(draw(again, LONG), draw(pipe, LONG))


def test_a_folder_with_the_options_of_older_versions_opens(stock_folder, tmp_path) -> None:
    FineLIPSDXLPipeline.from_pretrained(stock_folder).save_pretrained(tmp_path)
    file = tmp_path / "model_index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "short_prompt": "stretched"}))
    assert load(str(tmp_path)).short_prompt_encoder == "long"


@pytest.mark.parametrize("blocked", ["finelip_sdxl", "finelip_sdxl.pipelines"])
def test_without_the_package_it_says_what_to_install(blocked) -> None:
    code = f"import sys; sys.modules[{blocked!r}] = None; import runpy; runpy.run_path({DIRECTORY + '/pipeline.py'!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last == "ImportError: This pipeline needs FineLIP-SDXL: run `pip install .` in a clone of its repository."
