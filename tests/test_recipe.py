"""The parts of training recipes: what a run folder keeps beside the model, and what recipes say of their input."""

import argparse
import doctest
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import recipe
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from recipes import forget_accelerator
from run_folder import RunFolder
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from finelip_sdxl.data import load_tokenizer


@pytest.fixture(autouse=True)
def no_state() -> Iterator[None]:
    """No accelerator hears of the one before."""
    yield
    forget_accelerator()


class Run:
    """A few steps of a linear layer, and the average of its weights."""

    def __init__(self, folder: Path, **also: Any) -> None:
        forget_accelerator()
        torch.manual_seed(0)
        accelerator = Accelerator(cpu=True)
        layer = nn.Linear(4, 2)
        self.layer, self.optimizer = accelerator.prepare(layer, torch.optim.AdamW(layer.parameters(), lr=0.1))
        self.average = EMAModel(self.layer.parameters(), decay=0.9, use_ema_warmup=True, power=0.75)
        self.folder = RunFolder(folder, accelerator, {"seed": 0}, keep=2, also=also or {"average": self.average})
        self.progress = self.folder.resume() or {"step": 0}

    def train(self, steps: int) -> "Run":
        for _ in range(steps):
            self.layer(torch.ones(1, 4)).sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.average.step(self.layer.parameters())
            self.progress["step"] += 1
        self.folder.save(self.progress)
        return self


def parse(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="recipe.py")
    recipe.add_accelerator_flags(recipe.add_run_flags(parser, Path("runs/new"), models="last/ model"))
    return parser.parse_args(flags)


def make_encoder(width: int) -> CLIPTextModelWithProjection:
    small = {"intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 10}
    return CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=width, projection_dim=width, **small))


def test_examples_run() -> None:
    results = doctest.testmod(recipe)
    assert results.attempted > 0
    assert results.failed == 0


# The run folder


def test_an_average_of_weights_goes_on(tmp_path) -> None:
    whole = Run(tmp_path / "whole").train(5)
    Run(tmp_path / "stopped").train(3)
    stopped = Run(tmp_path / "stopped")
    assert (stopped.progress["step"], stopped.average.optimization_step) == (3, 3)
    stopped.train(2)
    averages = whole.average.state_dict(), stopped.average.state_dict()
    for one, other in zip(*(average.pop("shadow_params") for average in averages), strict=True):
        assert torch.equal(one, other)
    assert averages[0] == averages[1]
    assert not torch.equal(stopped.average.shadow_params[0], stopped.layer.weight)


class Harmful:
    """An object that a checkpoint of someone else might hold."""

    def __init__(self) -> None:
        self.loaded = False

    def state_dict(self) -> dict[str, Any]:
        return {"path": Path("anything but tensors and numbers")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaded = True


def test_checkpoints_are_read_as_tensors_and_numbers_only(tmp_path) -> None:
    Run(tmp_path, average=Harmful()).train(1)
    harmful = Harmful()
    with pytest.raises(ValueError, match="step-0000001 holds more than tensors and numbers"):
        Run(tmp_path, average=harmful)
    assert not harmful.loaded


def test_a_model_of_parts_has_a_folder_for_each(tmp_path) -> None:
    folder = Run(tmp_path).folder
    folder.save_model("last", text_encoder=make_encoder(4), text_encoder_2=make_encoder(8))
    folder.save_model("last", load_tokenizer("miniature-clip-1"), text_encoder=make_encoder(4))  # in its place
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last"]
    assert (tmp_path / "last" / "tokenizer_config.json").exists()
    assert not (tmp_path / "last" / "text_encoder_2").exists()
    weights = load_file(tmp_path / "last" / "text_encoder" / "model.safetensors")
    assert weights["text_projection.weight"].shape == (4, 4)


# What stays as it is


def test_flags_of_the_run_may_change_and_others_may_not() -> None:
    first, later = parse("--out", "a", "--keep", "3"), parse("--save-every", "7", "--cpu", "--gradient-checkpointing")
    settings = [recipe.fixed_settings(arguments, free=(), processes=1) for arguments in (first, later)]
    assert settings[0] == settings[1] == {"mixed_precision": "no", "processes": 1}
    with_paths = argparse.Namespace(finelip=Path("runs/clip/last"), base="miniature", rank=16)
    settings = recipe.fixed_settings(with_paths, free={"rank"}, processes=2)
    assert json.loads(json.dumps(settings)) == {"finelip": "last", "base": "miniature", "processes": 2}


def test_a_trained_encoder_promises_nothing_of_its_base() -> None:
    config = CLIPTextConfig(stretched_from=77, stretch_keep=20, stretch_factor=4)
    for _ in range(2):
        recipe.forget_stretch(config)
        assert not {"stretched_from", "stretch_keep", "stretch_factor"} & config.to_dict().keys()


# How a recipe ends


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (KeyboardInterrupt(), "recipe.py: stopped; the same command goes on from the last checkpoint"),
        (ValueError("--rank is 0:\n  pass 1."), "recipe.py: error: --rank is 0: pass 1."),
        (OSError("The disk is full."), "recipe.py: error: The disk is full."),
        (ImportError("No peft: pip install peft"), "recipe.py: error: No peft: pip install peft"),
        (
            ValueError(
                "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (…):\nValueError: bad: x"
            ),
            "recipe.py: error: bad: x",
        ),
    ],
)
def test_an_end_is_one_line(error, expected) -> None:
    def train(arguments: argparse.Namespace) -> None:
        raise error

    with pytest.raises(SystemExit) as stopped:
        recipe.run_recipe("recipe.py", train, lambda flags: parse(*flags), [])
    assert stopped.value.code == expected


def test_what_is_a_mistake_of_ours_keeps_its_traceback() -> None:
    def train(arguments: argparse.Namespace) -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        recipe.run_recipe("recipe.py", train, lambda flags: parse(*flags), [])
