"""The loop of the scripts in training/miniature: what it saves, and how it goes on."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file
from torch import nn

from tests.helpers.recipes import die, forget_accelerator, processes
from training.miniature import common

STEPS = 6


@pytest.fixture(autouse=True)
def no_state() -> Iterator[None]:
    """No accelerator hears of the one before, and no test of the threads."""
    threads = torch.get_num_threads()
    forget_accelerator()
    yield
    forget_accelerator()
    torch.set_num_threads(threads)


def train(runs: Path, *flags: str, at: Callable[[int], float] = lambda step: 1.0) -> list[torch.Tensor]:
    """Train a tiny module on noise, with a checkpoint every 2 steps.

    Args:
        at: called at each step, with its number; what it returns multiplies the loss.

    Returns:
        The weights, and their average.
    """
    forget_accelerator()
    parser = common.parser("", steps=STEPS, batch_size=3, learning_rate=0.1)
    common_flags = ["--runs", str(runs), "--checkpointing-steps", "2", "--device", "cpu", "--threads", "1"]
    arguments = parser.parse_args([*common_flags, *flags])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    average = EMAModel(model.parameters(), decay=0.9, use_ema_warmup=True, power=0.75)

    def step_loss(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        loss = model(torch.randn(arguments.batch_size, 4)).square().mean() * at(step)
        return loss, {"loss": loss.item()}

    modules = nn.ModuleDict({"model": model})
    common.train(
        arguments, "part", modules, step_loss, lambda step: average.step(model.parameters()), {"average": average}
    )
    return [tensor.detach().clone() for tensor in (*model.parameters(), *average.shadow_params)]


def checkpoints(runs: Path) -> list[str]:
    return sorted(folder.name for folder in (runs / "part" / "checkpoints").iterdir())


def killed_at_step_3(step: int) -> float:
    return die() if step == 3 else 1.0


def stopped_at_step_3(step: int) -> float:
    if step == 3:
        raise KeyboardInterrupt
    return 1.0


def train_until_killed(runs: Path) -> None:
    train(runs, at=killed_at_step_3)


def test_a_run_that_was_killed_goes_on_to_the_same_weights(tmp_path) -> None:
    whole = train(tmp_path / "whole")
    process = processes.Process(target=train_until_killed, args=(tmp_path / "killed",))
    process.start()
    process.join()
    assert checkpoints(tmp_path / "killed") == ["step-0000002"]
    steps = []
    killed = train(tmp_path / "killed", at=lambda step: steps.append(step) or 1.0)
    assert steps == [2, 3, 4, 5]
    assert all(torch.equal(one, other) for one, other in zip(whole, killed, strict=True))
    assert checkpoints(tmp_path / "whole") == checkpoints(tmp_path / "killed") == ["step-0000004", "step-0000006"]


def test_a_run_that_is_stopped_ends_with_one_line(tmp_path) -> None:
    with pytest.raises(SystemExit, match=r"^part: stopped; the same command goes on from the last checkpoint$"):
        train(tmp_path, at=stopped_at_step_3)
    assert checkpoints(tmp_path) == ["step-0000002"]


def test_a_run_that_is_complete_trains_no_more(tmp_path) -> None:
    whole = train(tmp_path)
    steps = []
    again = train(tmp_path, at=lambda step: steps.append(step) or 1.0)
    assert steps == []
    assert all(torch.equal(one, other) for one, other in zip(whole, again, strict=True))
    train(tmp_path, "--steps", "8", at=lambda step: steps.append(step) or 1.0)
    assert steps == [6, 7]


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, capsys) -> None:
    whole = train(tmp_path)
    newest = tmp_path / "part" / "checkpoints" / "step-0000006" / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    again = train(tmp_path)
    assert "step-0000006 is damaged" in capsys.readouterr().out
    assert all(torch.equal(one, other) for one, other in zip(whole, again, strict=True))


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_nothing_is_saved_that_has_diverged(tmp_path, factor) -> None:
    with pytest.raises(SystemExit, match=r"^part: error: Step 4, of loss (nan|inf), .* training has diverged, and"):
        train(tmp_path, at=lambda step: factor if step == 3 else 1.0)
    assert checkpoints(tmp_path) == ["step-0000002"]
    saved = load_file(tmp_path / "part" / "checkpoints" / "step-0000002" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in saved.values())


def test_other_settings_are_refused(tmp_path) -> None:
    train(tmp_path)
    with pytest.raises(SystemExit, match=r"^part: error: .* a run with other settings .batch-size was 3 and is 4"):
        train(tmp_path, "--batch-size", "4")


@pytest.mark.parametrize(
    "flags", [("--steps", "0"), ("--batch-size", "two"), ("--checkpointing-steps", "-1"), ("--runs", "")]
)
def test_flags_that_mean_nothing_are_refused(tmp_path, capsys, flags) -> None:
    with pytest.raises(SystemExit):
        train(tmp_path, *flags)
    assert f"argument {flags[0]}: expected a" in capsys.readouterr().err
