"""The parts of training recipes: what a run folder keeps beside the model, and what recipes say of their input."""

import argparse
import doctest
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from finelip_sdxl.data import load_tokenizer
from finelip_sdxl.training import command_line, health, manifest, schedule
from finelip_sdxl.training.processes import held, only_run, together
from finelip_sdxl.training.run_folder import RunFolder
from tests.helpers.full_disk import files_of_at_most
from tests.helpers.recipes import die, forget_accelerator, on_two_processes, processes


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
    command_line.add_accelerator_flags(command_line.add_run_flags(parser, Path("runs/new"), models="last/ model"))
    return parser.parse_args(flags)


def make_encoder(width: int) -> CLIPTextModelWithProjection:
    small = {"intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 10}
    return CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=width, projection_dim=width, **small))


@pytest.mark.parametrize("module", [command_line, health, manifest, schedule])
def test_examples_run(module) -> None:
    results = doctest.testmod(module)
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


# Damage


FILES = ("model.safetensors", "optimizer.bin", "random_states_0.pkl", "average.pt", "progress.json")
DAMAGES: dict[str, Callable[[Path], Any]] = {
    "empty": lambda file: file.write_bytes(b""),
    "cut": lambda file: os.truncate(file, file.stat().st_size // 2),
    "missing": lambda file: file.unlink(),
    "flipped": lambda file: flip_a_bit(file),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
}


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def make_old(folder: Path) -> None:
    """The checkpoints as versions wrote them that knew no manifest."""
    for checkpoint in (folder / "checkpoints").iterdir():
        (checkpoint / "manifest.json").unlink()
        progress = json.loads((checkpoint / "progress.json").read_text())
        del progress["manifest"]
        (checkpoint / "progress.json").write_text(json.dumps(progress))


def state(run: Run) -> list[torch.Tensor]:
    return [value.clone() for value in (*run.layer.parameters(), *run.average.shadow_params)]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", [*FILES, "manifest.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_goes_on(tmp_path, capsys, file, damage) -> None:
    expected = state(Run(tmp_path).train(2))
    Run(tmp_path).train(2)
    DAMAGES[damage](tmp_path / "checkpoints" / "step-0000004" / file)
    run = Run(tmp_path)
    printed = capsys.readouterr().out
    assert run.progress == {"step": 2}
    assert all(torch.equal(mine, its) for mine, its in zip(state(run), expected, strict=True))
    assert "step-0000004 is damaged: " in printed
    assert file in printed or (file, damage) == ("manifest.json", "flipped")  # then it accuses another
    assert "The run goes on from step-0000002." in printed
    run.train(2)  # in the place of the damaged one
    assert checkpoints(tmp_path) == ["step-0000002", "step-0000004"]
    assert Run(tmp_path).progress == {"step": 4}


@pytest.mark.parametrize("content", ["{}", "[]", "null", "5", '{"model.safetensors": 3}', "[" * 100_000, '{"a": {}}'])
def test_a_manifest_may_hold_anything(tmp_path, capsys, content) -> None:
    for _ in range(2):
        Run(tmp_path).train(1)
    (tmp_path / "checkpoints" / "step-0000002" / "manifest.json").write_text(content)
    assert Run(tmp_path).progress == {"step": 1}
    assert "step-0000002 is damaged: " in capsys.readouterr().out


def test_a_file_or_nothing_in_the_place_of_a_checkpoint_is_damage_too(tmp_path, capsys) -> None:
    Run(tmp_path).train(1)
    (tmp_path / "checkpoints" / "step-0000002").mkdir()
    (tmp_path / "checkpoints" / "step-0000003").write_text("no folder")
    run = Run(tmp_path)
    assert run.progress == {"step": 1}
    assert capsys.readouterr().out.count("is damaged: progress.json is missing") == 2
    run.train(1)
    assert checkpoints(tmp_path) == ["step-0000001", "step-0000002"]


def test_damaged_newer_checkpoints_take_no_place_of_those_that_are_kept(tmp_path) -> None:
    for _ in range(2):
        Run(tmp_path).train(3)
    DAMAGES["empty"](tmp_path / "checkpoints" / "step-0000006" / "optimizer.bin")
    run = Run(tmp_path)
    for _ in range(2):
        run.train(1)
    assert checkpoints(tmp_path) == ["step-0000004", "step-0000005"]


def test_a_run_does_not_begin_anew_where_all_its_checkpoints_are_damaged(tmp_path) -> None:
    for _ in range(2):
        Run(tmp_path).train(1)
    for checkpoint in (tmp_path / "checkpoints").iterdir():
        flip_a_bit(checkpoint / "model.safetensors")
    with pytest.raises(ValueError, match=r"0002 is damaged: .*0001 is damaged: .*delete .*checkpoints to begin anew"):
        Run(tmp_path)
    assert checkpoints(tmp_path) == ["step-0000001", "step-0000002"]


def test_a_checkpoint_of_an_earlier_version_is_taken_and_said_to_be_one(tmp_path, capsys) -> None:
    expected = state(Run(tmp_path).train(2))
    make_old(tmp_path)
    run = Run(tmp_path)
    assert run.progress == {"step": 2}
    assert all(torch.equal(mine, its) for mine, its in zip(state(run), expected, strict=True))
    assert "step-0000002 is of an earlier version" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["empty", "cut", "missing"])
@pytest.mark.parametrize("file", FILES)
def test_damage_of_an_earlier_version_is_seen_where_reading_shows_it(tmp_path, capsys, file, damage) -> None:
    for _ in range(2):
        Run(tmp_path).train(1)
    make_old(tmp_path)
    DAMAGES[damage](tmp_path / "checkpoints" / "step-0000002" / file)
    assert Run(tmp_path).progress == {"step": 1}
    assert f"step-0000002 is damaged: {file} " in capsys.readouterr().out


def test_weights_that_are_not_finite_are_damage_of_an_earlier_version(tmp_path, capsys) -> None:
    run = Run(tmp_path).train(1)
    with torch.no_grad():
        run.layer.weight.fill_(math.nan)
    run.train(1)
    make_old(tmp_path)
    assert Run(tmp_path).progress == {"step": 1}
    assert "model.safetensors holds numbers that are not finite" in capsys.readouterr().out


def umask() -> int:
    os.umask(found := os.umask(0o022))
    return found


def test_a_model_that_changed_or_is_gone_is_not_held(tmp_path) -> None:
    folder = Run(tmp_path).folder
    assert not folder.holds("best")
    folder.save_model("best", make_encoder(4))
    assert folder.holds("best")
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "best").iterdir()} == {0o666 & ~umask()}
    (tmp_path / "best" / "manifest.json").unlink()  # as of an earlier version
    assert folder.holds("best")
    folder.save_model("best", make_encoder(4))
    flip_a_bit(tmp_path / "best" / "model.safetensors")
    assert not folder.holds("best")


# A full disk


# Bytes that hold nothing, the weights, and the optimizer; random states have some 14,000.
@pytest.mark.parametrize("size", [0, 500, 1000, 2000, 4000])
def test_a_disk_that_is_full_costs_nothing_that_was_saved(tmp_path, size) -> None:
    run = Run(tmp_path).train(1)
    with (
        files_of_at_most(size),
        pytest.raises(OSError, match=r"step-0000002 cannot be written to \(.*\): make room, or pass another place"),
    ):
        run.train(1)
    assert checkpoints(tmp_path) == ["step-0000001"]
    assert Run(tmp_path).train(1).progress == {"step": 2}


@pytest.mark.parametrize("place", ["write_text", "fsync", "rename"])
def test_nor_does_one_that_is_full_at_the_last_moment(tmp_path, monkeypatch, place) -> None:
    def fail(*inputs: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    run = Run(tmp_path).train(1)
    with monkeypatch.context() as patch:
        patch.setattr(*((Path, place) if place == "write_text" else (os, place)), fail)
        with pytest.raises(OSError, match=r"step-0000002 cannot be written to \(No space left on device\): make room"):
            run.train(1)
    assert checkpoints(tmp_path) == ["step-0000001"]
    assert Run(tmp_path).progress == {"step": 1}


def test_a_model_stays_where_its_next_one_finds_no_room(tmp_path) -> None:
    folder = Run(tmp_path).folder
    folder.save_model("last", make_encoder(4))
    with files_of_at_most(1000), pytest.raises(OSError, match=r"last cannot be written to \(File too large\)"):
        folder.save_model("last", make_encoder(8))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last"]
    assert folder.holds("last")


# Who writes to a run's folder


def hold_until_killed(folder: Path) -> None:
    with held(folder, "taken"):
        (folder / "held").touch()
        die()


@pytest.mark.slow
def test_a_folder_is_held_by_one_and_by_none_after_a_kill(tmp_path) -> None:
    with held(tmp_path / "run", "taken"):
        with pytest.raises(OSError, match=r"^taken$"), held(tmp_path / "run", "taken"):
            pass
        (tmp_path / "run" / "file").touch()
    process = processes.Process(target=hold_until_killed, args=(tmp_path / "run",))
    process.start()
    process.join(timeout=120)
    assert process.exitcode == -signal.SIGKILL
    with held(tmp_path / "run", "taken"):
        pass
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["file", "held"]
    with held(tmp_path / "new", "taken"):
        pass
    assert not (tmp_path / "new").exists()


def test_what_a_killed_run_left_half_is_cleared_and_what_it_was_replacing_given_back(tmp_path) -> None:
    Run(tmp_path).folder.save_model("best", make_encoder(4))
    Run(tmp_path).train(1)
    for place in (tmp_path, tmp_path / "checkpoints", tmp_path / "validation"):
        (place / ".finelip-sdxl-0123456789abcdef" / "new").mkdir(parents=True)
        (place / ".finelip-sdxl-0123456789abcdef" / "old").mkdir()
    for name in ("best", "checkpoints/step-0000001"):  # a system that cannot exchange folders moves them away first
        path = tmp_path / name
        path.rename(path.parent / ".finelip-sdxl-0123456789abcdef" / "old" / path.name)
    for name in ("mine.tmp", "best.old"):
        (tmp_path / name).mkdir()
    (tmp_path / "validation" / "step-000001.png").touch()
    with only_run(tmp_path, Accelerator(cpu=True)):
        assert Run(tmp_path).folder.holds("best")
    kept = ["best", "best.old", "checkpoints", "mine.tmp", "validation"]  # nothing of the user's
    assert sorted(path.name for path in tmp_path.iterdir()) == kept
    assert checkpoints(tmp_path) == ["step-0000001"]
    assert [path.name for path in (tmp_path / "validation").iterdir()] == ["step-000001.png"]


def fail_in(process: int) -> None:
    if process == 1:
        raise OSError("No room")


def end_one_of_two(process: int, folder: Path) -> None:
    accelerator = Accelerator(cpu=True)
    with pytest.raises(OSError, match="No room"), together(accelerator):
        fail_in(process)
    loss = accelerator.reduce(torch.tensor(math.nan if process == 1 else 1.0)).item()
    with pytest.raises(ValueError, match="The loss of step 7 is nan"):
        health.Health().check(7, loss, broken=0, skipped=False)
    with pytest.raises(OSError, match="Another run is writing to "), only_run(folder, accelerator):
        pass


@pytest.mark.slow
def test_what_ends_one_process_ends_the_other(tmp_path) -> None:
    with held(tmp_path, "taken"):
        on_two_processes(end_one_of_two, tmp_path)


# What has diverged


def test_a_run_that_diverges_ends_and_names_the_step() -> None:
    checks = health.Health()
    checks.check(1, loss=2.0, broken=0, skipped=False)
    for loss in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match=f"The loss of step 3 is {loss}: training has diverged, and nothing"):
            checks.check(3, loss, broken=0, skipped=False)
    with pytest.raises(ValueError, match="Step 4, of loss 2, made weights that are not finite"):
        checks.check(4, loss=2.0, broken=1, skipped=False)


def test_steps_that_fp16_leaves_out_are_none_that_diverge_unless_nothing_else_comes() -> None:
    checks = health.Health()
    for step in range(1, health.MOST_SKIPPED):
        checks.check(step, loss=math.inf if step % 2 else 2.0, broken=0, skipped=True)
    checks.check(health.MOST_SKIPPED, loss=2.0, broken=0, skipped=False)
    for step in range(1, health.MOST_SKIPPED):
        checks.check(step, loss=2.0, broken=0, skipped=True)
    with pytest.raises(ValueError, match=f"gradients of {health.MOST_SKIPPED} steps in a row"):
        checks.check(health.MOST_SKIPPED, loss=2.0, broken=0, skipped=True)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_counted(value) -> None:
    tensors = [torch.zeros(3, 2), torch.ones(4)]
    assert health.count_broken(tensors) == 0
    tensors[1][2] = value
    assert health.count_broken(tensors) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train_finelip", "align_adapter"])
def test_a_recipe_runs_where_it_was_copied_to(tmp_path, name) -> None:
    copied = shutil.copy(Path(__file__).parents[2] / "training" / f"{name}.py", tmp_path)
    done = subprocess.run([sys.executable, copied, "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "miniature.toml" in done.stdout


# What stays as it is


def test_flags_of_the_run_may_change_and_others_may_not() -> None:
    first, later = (
        parse("--output-dir", "a", "--checkpoints-total-limit", "3"),
        parse("--checkpointing-steps", "7", "--cpu", "--gradient-checkpointing"),
    )
    settings = [command_line.fixed_settings(arguments, free=(), processes=1) for arguments in (first, later)]
    assert settings[0] == settings[1] == {"mixed_precision": "no", "processes": 1}
    with_paths = argparse.Namespace(finelip=Path("runs/clip/last"), base="miniature", rank=16)
    settings = command_line.fixed_settings(with_paths, free={"rank"}, processes=2)
    assert json.loads(json.dumps(settings)) == {"finelip": "last", "base": "miniature", "processes": 2}


# Presets


def parse_preset(file: Path, *flags: str) -> argparse.Namespace:
    """The flags of a recipe with a preset that ships, a file, and flags."""
    parser = argparse.ArgumentParser(prog="recipe.py")
    paper = command_line.preset_path("train_finelip", "paper")
    command_line.add_config_flag(parser, [paper])
    command_line.add_preset_flag(parser, "--batch-size", command_line.BATCH, "PAIRS", "pairs", [paper])
    command_line.add_preset_flag(parser, "--learning-rate", command_line.AMOUNT, "X", "peak", [paper])
    command_line.add_run_flags(parser, Path("runs/new"), models="last/ model")
    parser.add_argument("--hardest", action="store_true")
    parser.add_argument("--method", choices=("adapter", "lora"), default="adapter")
    shipped = file.with_name("shipped.toml")
    shipped.write_text("batch-size = 64\nlearning-rate = 1e-6")
    return command_line.parse_flags(parser, ["--config", str(file), *flags], lambda given: [shipped])


def test_a_flag_counts_before_a_file_and_a_file_before_a_preset(tmp_path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('batch-size = 8\nhardest = true\nmethod = "lora"\noutput_dir = "runs/mine"\n')
    options = parse_preset(file)
    assert (options.batch_size, options.learning_rate, options.hardest, options.method) == (8, 1e-6, True, "lora")
    assert (options.output_dir, options.config) == (Path("runs/mine"), file)
    options = parse_preset(file, "--batch-size", "4", "--method", "adapter")
    assert (options.batch_size, options.hardest, options.method) == (4, True, "adapter")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("batchsize = 3", "mine.toml sets batchsize, which is no flag: did you mean batch-size?"),
        ("learning_rat = 3", "sets learning-rat, which is no flag: did you mean learning-rate?"),
        ("help = true", "sets help, which is no flag: did you mean "),
        ("batch-size = 0", "sets batch-size to 0: expected a whole number above 0 instead of 0."),
        ("batch-size = true", "sets batch-size to True: expected a number or a text."),
        ("batch-size = [1]", "sets batch-size to [1]: expected a number or a text."),
        ("hardest = 1", "sets hardest to 1: expected true or false."),
        ('method = "prefix"', "sets method to 'prefix': expected one of adapter, lora."),
        ('output-dir = ""', "sets output-dir to '': expected a path instead of nothing."),
        ("batch-size 3", "mine.toml is no TOML ("),
        (None, "mine.toml does not exist, or is no file: pass the name of a text file."),
    ],
)
def test_refuses_what_a_preset_may_not_say(tmp_path, capsys, content, expected) -> None:
    if content is not None:
        (tmp_path / "mine.toml").write_text(content)
    with pytest.raises(SystemExit):
        parse_preset(tmp_path / "mine.toml")
    assert expected in capsys.readouterr().err


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
        command_line.run_recipe("recipe.py", train, lambda flags: parse(*flags), [])
    assert stopped.value.code == expected


def test_what_is_a_mistake_of_ours_keeps_its_traceback() -> None:
    def train(arguments: argparse.Namespace) -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        command_line.run_recipe("recipe.py", train, lambda flags: parse(*flags), [])


@pytest.mark.usefixtures("heard_signals")  # which puts back the handlers
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_run_as_an_interrupt_does(number) -> None:
    def run() -> None:
        command_line.run_recipe(
            "recipe.py", lambda arguments: os.kill(os.getpid(), number), lambda flags: parse(*flags), []
        )

    with pytest.raises(SystemExit, match="the same command goes on from the last checkpoint"):
        run()
    assert signal.getsignal(number) is signal.SIG_DFL
    signal.signal(number, signal.SIG_IGN)  # as nohup does
    run()


# Numbers and paths of flags


@pytest.mark.parametrize(
    ("read", "good", "bad"),
    [
        (
            command_line.COUNT,
            ["1", "1000000000"],
            ["0", "-1", "1.5", "1e3", "nan", "inf", "", "9" * 5000, "1000000001"],
        ),
        (command_line.AMOUNT, ["0", "1e-6", "1e5"], ["-1e-9", "nan", "inf", "-inf", "1e300", "1e999", "x"]),
        (command_line.SHARE, ["0", "1", "0.5"], ["-0.1", "1.1", "nan", "inf"]),
        (command_line.SEED, ["0", "4294967295"], ["-1", "4294967296", "0.5"]),
        (command_line.STEPS, ["1", "9999999"], ["0", "10000000"]),
        (command_line.number(float, least=0, below=1), ["0", "0.999"], ["1", "-0.1", "nan"]),
    ],
)
def test_numbers_have_bounds(read, good, bad) -> None:
    for text in good:
        assert read(text) == float(text)
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=r"^expected a (whole )?number ") as refused:
            read(text)
        assert len(str(refused.value)) < 200


@pytest.mark.parametrize("text", ["", " ", "\t"])
def test_nothing_is_no_path(text) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="expected a path instead of nothing"):
        command_line.path(text)


def test_refuses_a_folder_that_is_none_for_a_run(tmp_path) -> None:
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("file", "fifo", "link"):
        with pytest.raises(ValueError, match=f"{name} is a file: pass the name of a folder"):
            command_line.check_run(parse("--output-dir", str(tmp_path / name)))
    for out in ("/", "/..", "//"):
        with pytest.raises(ValueError, match="is the root of all folders"):
            command_line.check_run(parse("--output-dir", out))
    for out in ("/proc/run", str(tmp_path / "file" / "run"), str(tmp_path / ("a" * 300))):
        with pytest.raises(OSError):  # noqa: PT011 (the system's words)
            command_line.check_run(parse("--output-dir", out))
    for name in ("checkpoints", "last"):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / name).touch()
        with pytest.raises(ValueError, match=f"{name} is no folder, but a run saves one there"):
            command_line.check_run(parse("--output-dir", str(tmp_path / "run")))
        shutil.rmtree(tmp_path / "run")
    command_line.check_run(parse("--output-dir", str(tmp_path / "new" / "run")))
    assert not (tmp_path / "new").exists()
