"""Cells of the paper in miniature: results and trainings in a folder, each by its settings and made once."""

from __future__ import annotations

import hashlib
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

from finelip_sdxl.files import written_whole
from finelip_sdxl.names import bundled_model
from finelip_sdxl.training.flags.train_finelip import parse

BASE = "miniature-clip-1"
SCRIPT = Path(__file__).parents[2] / "training" / "train_finelip.py"
SECONDS_PER_STEP = 1.5  # of 40 pairs on two CPU cores (2.2 to 2.6 on one), until a training of the folder tells its own
_TAIL = 8000  # bytes of a recipe's messages that are searched for its reason
_DIVERGED = "training has diverged"  # in the message of `finelip_sdxl.training.health`
# The recipe has the ratio of the miniature's preset between both learning rates.
_REFINEMENT_RATIO = 4


class MissingError(Exception):
    """A cell is not there, and may not be made now."""


@dataclass(frozen=True)
class Budget:
    """How much is trained, drawn and compared.

    Attributes:
        steps: steps of each training; its data is as many batches, so the schedule shrinks with it.
        batch_size: pairs of a step.
        learning_rates: CLIP's learning rates, of which every loss gets its best.
        seeds: seeds of the rows of retrieval.
        ablation_seeds: seeds of the ablations.
        scenes: unseen scenes for retrieval, and as many others to choose learning rates.
        pictures: pictures of each row.
        drawing_steps: steps of a picture; None for the recommended number.
    """

    steps: int
    batch_size: int
    learning_rates: tuple[float, ...]
    seeds: int
    ablation_seeds: int
    scenes: int
    pictures: int
    drawing_steps: int | None = None


@dataclass(frozen=True)
class Training:
    """A training of the miniature's FineLIP: flags of training/train_finelip.py beside those of the budget."""

    flags: str
    rate: float
    seed: int

    @property
    def all_tokens(self) -> bool:
        """Whether late interaction compares all tokens of both sides, though nothing is refined."""
        return "--refinement none" in self.flags

    @property
    def trains_interaction(self) -> bool:
        """Whether a loss is of late interaction. Without one, its refinement learns nothing."""
        arguments = parse(["--base", BASE, *self.flags.split()])
        return bool(arguments.triplet_weight + arguments.fine_contrastive_weight > 0)

    def command(self, budget: Budget) -> list[str]:
        """The arguments of the recipe, without the folder."""
        own = f"--base {BASE} --data miniature:{budget.steps * budget.batch_size} --epochs 1"
        own += f" --batch-size {budget.batch_size} --warmup-steps {max(1, budget.steps // 10)} --eval-data none"
        own += f" --learning-rate {self.rate:g} --refinement-learning-rate {_REFINEMENT_RATIO * self.rate:g}"
        own += f" --seed {self.seed} --checkpointing-steps 25 --checkpoints-total-limit 1"
        return [*own.split(), *self.flags.split()]


class Cells:
    """The folder of all cells.

    Args:
        folder: the folder, which need not exist.
        budget: how much is trained.
        may_make: whether missing cells are made; otherwise they raise a `MissingError`.
    """

    def __init__(self, folder: Path, budget: Budget, may_make: bool = True) -> None:
        self.folder, self.budget, self.may_make = folder, budget, may_make
        self.used: list[dict[str, Any]] = []

    def result(self, kind: str, settings: dict[str, Any], make: Callable[[], Any]) -> Any:
        """The result of JSON's types for these settings, from its file or else from `make`."""
        file = self.folder / kind / f"{digest(settings)}.json"
        cell = _read(file, settings)
        if cell is None:
            self._check(f"{kind} {settings}")
            started = time.monotonic()
            made = make()
            seconds = round(time.monotonic() - started, 1)
            cell = {"settings": settings, "date": date.today().isoformat(), "seconds": seconds, "result": made}
            file.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(file) as temporary:
                temporary.write_text(json.dumps(cell), encoding="utf-8")
        self.used.append(cell)
        return cell["result"]

    def settings_of(self, training: Training) -> dict[str, Any]:
        """Everything that a training depends on."""
        return {"command": training.command(self.budget), "base": base_digest()}

    def trained(self, training: Training) -> Path | None:
        """The folder of a trained model; None if it has diverged. A missing one is trained, or goes on."""
        settings = self.settings_of(training)
        run = self.folder / "trainings" / digest(settings)

        def train() -> dict[str, bool]:
            if (run / "last").exists():  # the benchmark was stopped before its result was written
                return {"diverged": False}
            print(f"\ntraining {' '.join(settings['command'])}", file=sys.stderr, flush=True)
            command = [sys.executable, str(SCRIPT), *settings["command"], "--output-dir", str(run)]
            status, messages = run_and_show(command)
            diverged = _DIVERGED in messages
            if status and not diverged:
                sys.exit(f"This training failed (see its messages above): {' '.join(command[1:])}")
            shutil.rmtree(run / "checkpoints", ignore_errors=True)
            return {"diverged": diverged}

        if self.may_make and not self.is_trained(training):  # the model may be gone, and its result still there
            (self.folder / "trained" / f"{digest(settings)}.json").unlink(missing_ok=True)
        return None if self.result("trained", settings, train)["diverged"] else run / "last"

    def is_trained(self, training: Training) -> bool:
        """Whether a training is complete, or is known to diverge."""
        settings = self.settings_of(training)
        cell = _read(self.folder / "trained" / f"{digest(settings)}.json", settings)
        whole = (self.folder / "trainings" / digest(settings) / "last").is_dir()
        return cell is not None and (whole or cell["result"]["diverged"])

    def seconds_per_step(self) -> float:
        """The median of this folder's trainings, or an estimate for two cores."""
        files = (self.folder / "trained").glob("*.json") if self.folder.is_dir() else []
        found = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        times = [cell["seconds"] / self.budget.steps for cell in found if not cell["result"]["diverged"]]
        return statistics.median(times) if times else SECONDS_PER_STEP

    def _check(self, what: str) -> None:
        if not self.may_make:
            raise MissingError(what)


def digest(settings: Any) -> str:
    """A short name for settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


@cache
def base_digest() -> str:
    """A digest of the weights that all trainings begin with."""
    base = bundled_model(BASE)
    assert base is not None
    return hashlib.sha256(b"".join(file.read_bytes() for file in base.weights)).hexdigest()[:16]


def run_and_show(command: list[str]) -> tuple[int, str]:
    """Runs a command, shows its messages, and returns its status and the end of its messages."""
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        tail = b""
        while some := process.stderr.read1(4096):
            sys.stderr.write(some.decode(errors="replace"))
            sys.stderr.flush()
            tail = (tail + some)[-_TAIL:]
    return process.returncode, " ".join(tail.decode(errors="replace").split())


def _read(file: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """A cell; None if it is missing or damaged."""
    try:
        cell = json.loads(file.read_text(encoding="utf-8"))
        same = cell["settings"] == json.loads(json.dumps(settings)) and {"date", "seconds", "result"} <= cell.keys()
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError):
        same = False
    if not same:
        print(f"{file} is damaged, and is made again.", file=sys.stderr)
        return None
    return dict(cell)
