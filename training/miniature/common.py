"""What the miniature's training scripts share: flags, scenes, and a loop that resumes where it stopped.

Every step draws its scenes, captions and noise from its own number, so that a run that was killed and resumed
sees exactly what an uninterrupted one would have seen.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm import tqdm

from finelip_sdxl.miniature.world import Scene, make_scene
from finelip_sdxl.training.command_line import AMOUNT, BATCH, COUNT, STEPS, fixed_settings, path, run_recipe
from finelip_sdxl.training.health import Health, count_broken
from finelip_sdxl.training.processes import only_run
from finelip_sdxl.training.run_folder import RunFolder, Stateful

# Flags that may change when a run goes on, beside those of every recipe.
FREE = {"runs", "steps", "threads", "device"}

StepLoss = Callable[[int], tuple[torch.Tensor, dict[str, float]]]


def parser(description: str, steps: int, batch_size: int, learning_rate: float) -> argparse.ArgumentParser:
    """The flags that every script of the miniature has, with this script's defaults."""
    flags = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flags.add_argument("--runs", type=path, default=Path("runs/miniature"), help="folder of checkpoints and results")
    flags.add_argument("--steps", type=STEPS, default=steps, help="optimizer steps")
    flags.add_argument("--batch-size", type=BATCH, default=batch_size, help="scenes a step")
    flags.add_argument("--learning-rate", type=AMOUNT, default=learning_rate, help="peak learning rate")
    flags.add_argument("--checkpointing-steps", type=STEPS, default=100, help="steps between checkpoints")
    flags.add_argument("--threads", type=COUNT, default=torch.get_num_threads(), help="CPU threads")
    flags.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    return flags


def train(
    arguments: argparse.Namespace,
    name: str,
    modules: torch.nn.ModuleDict,
    step_loss: StepLoss,
    after_step: Callable[[int], None] = lambda step: None,
    extra_state: dict[str, Stateful] | None = None,
) -> None:
    """Trains modules with AdamW (warm-up, then cosine), in the run folder `<runs>/<name>`, whose checkpoints it
    resumes. `<runs>/<name>.log` shows the figures.

    Args:
        arguments: the flags of `parser`.
        name: the name of the run.
        modules: what is trained.
        step_loss: returns the loss of a step, by its number, and the figures to show.
        after_step: is called after each step with its number.
        extra_state: other objects that checkpoints hold, such as an average of the weights.

    Raises:
        SystemExit: if the loss or the weights are not finite, of which nothing is saved, or if the run was stopped, or
            its folder belongs to other settings or cannot be written to.
    """

    def run(arguments: argparse.Namespace) -> None:
        accelerator = Accelerator(cpu=arguments.device == "cpu")
        with only_run(arguments.runs / name, accelerator):
            _train_alone(arguments, name, accelerator, modules, step_loss, after_step, extra_state)

    run_recipe(name, run, parse=lambda _: arguments, arguments=None)


def _train_alone(
    arguments: argparse.Namespace,
    name: str,
    accelerator: Accelerator,
    modules: torch.nn.ModuleDict,
    step_loss: StepLoss,
    after_step: Callable[[int], None],
    extra_state: dict[str, Stateful] | None,
) -> None:
    """`train`, in a folder that no other run writes to."""
    torch.set_num_threads(arguments.threads)
    optimizer = torch.optim.AdamW(modules.parameters(), lr=arguments.learning_rate, weight_decay=0.01)
    _, optimizer = accelerator.prepare(modules, optimizer)  # of one process, which leaves the modules as they are
    fixed = fixed_settings(arguments, FREE, accelerator.num_processes)
    folder = RunFolder(arguments.runs / name, accelerator, fixed, keep=2, also=extra_state)
    progress = folder.resume() or {"step": 0}
    first = progress["step"]

    modules.train()
    health = Health()
    bar = tqdm(range(first, arguments.steps), initial=first, total=arguments.steps, desc=name, mininterval=5)
    with (arguments.runs / f"{name}.log").open("a") as log:
        for step in bar:
            torch.manual_seed(step)
            for group in optimizer.param_groups:
                group["lr"] = arguments.learning_rate * _learning_rate_factor(step, arguments.steps)
            loss, figures = step_loss(step)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
            optimizer.step()
            health.check(step + 1, loss.item(), count_broken(modules.parameters()).item(), skipped=False)
            after_step(step)
            progress["step"] = step + 1
            if step % 25 == 0:
                line = " ".join(f"{key}={value:.4g}" for key, value in figures.items())
                bar.set_postfix_str(line)
                print(f"step={step}", line, file=log, flush=True)
            if (step + 1) % arguments.checkpointing_steps == 0 or step + 1 == arguments.steps:
                folder.save(progress)
    modules.eval()


def _learning_rate_factor(step: int, steps: int) -> float:
    """Returns the share of the peak learning rate at a step: half a cosine, with a warm-up over 50 steps below it, and
    a thousandth that stays. The weights that ship were trained so."""
    return min((step + 1) / 50, 0.5 + 0.5 * math.cos(math.pi * step / steps)) + 1e-3


def training_scenes(step: int, count: int) -> list[Scene]:
    """The scenes of this step; every step has its own."""
    return [make_scene(f"train-{step * count + k}") for k in range(count)]
