"""What the miniature's training scripts share: arguments, checkpoints, a loop that resumes where it stopped.

Every step draws its scenes, captions and noise from its own number, so that a run that was killed and resumed
sees exactly what an uninterrupted one would have seen.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from finelip_sdxl.files import written_whole
from finelip_sdxl.miniature.world import Scene, make_scene


def parser(description: str, steps: int, batch_size: int, learning_rate: float) -> argparse.ArgumentParser:
    """The flags that every script of the miniature has, with this script's defaults."""
    flags = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flags.add_argument("--runs", type=Path, default=Path("runs/miniature"), help="folder of checkpoints and results")
    flags.add_argument("--steps", type=int, default=steps, help="optimizer steps")
    flags.add_argument("--batch-size", type=int, default=batch_size, help="scenes a step")
    flags.add_argument("--learning-rate", type=float, default=learning_rate, help="peak learning rate")
    flags.add_argument("--checkpointing-steps", type=int, default=100, help="steps between checkpoints")
    flags.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    flags.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    return flags


def train(
    arguments: argparse.Namespace,
    name: str,
    modules: torch.nn.ModuleDict,
    step_loss: Callable[[int], tuple[torch.Tensor, dict[str, float]]],
    after_step: Callable[[int], None] = lambda step: None,
    extra_state: dict | None = None,
) -> None:
    """Trains the modules with AdamW (warm-up, then cosine), saving and resuming ``<runs>/<name>.pt``.

    ``step_loss(step)`` gives the loss and the figures to show; ``extra_state`` holds objects with ``state_dict``
    that are saved along, such as an average of the weights.

    Raises:
        SystemExit: if the loss or the weights are not finite; nothing of that is saved.
    """
    torch.set_num_threads(arguments.threads)
    optimizer = torch.optim.AdamW(modules.parameters(), lr=arguments.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 50, 0.5 + 0.5 * math.cos(math.pi * step / arguments.steps)) + 1e-3
    )
    saved = {"modules": modules, "optimizer": optimizer, "schedule": schedule, **(extra_state or {})}
    path = arguments.runs / f"{name}.pt"
    first = 0
    if path.exists():
        checkpoint = torch.load(path, weights_only=True, map_location=arguments.device)
        for key, part in saved.items():
            part.load_state_dict(checkpoint[key])
        first = checkpoint["step"]

    modules.train()
    path.parent.mkdir(parents=True, exist_ok=True)
    log = path.with_suffix(".log").open("a")
    bar = tqdm(range(first, arguments.steps), initial=first, total=arguments.steps, desc=name, mininterval=5)
    for step in bar:
        torch.manual_seed(step)
        loss, figures = step_loss(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        if not (loss.isfinite() and all(parameter.isfinite().all() for parameter in modules.parameters())):
            raise SystemExit(
                f"{name}: training has diverged at step {step + 1}, whose loss was {loss:g}: nothing of that is saved."
                f" Delete {path} and begin anew with a lower --learning-rate."
            )
        schedule.step()
        after_step(step)
        if step % 25 == 0:
            line = " ".join(f"{key}={value:.4g}" for key, value in figures.items())
            bar.set_postfix_str(line)
            print(f"step={step}", line, file=log, flush=True)
        if (step + 1) % arguments.checkpointing_steps == 0 or step + 1 == arguments.steps:
            state = {key: part.state_dict() for key, part in saved.items()}
            with written_whole(path) as temporary:
                torch.save({**state, "step": step + 1}, temporary)
    modules.eval()


def training_scenes(step: int, count: int) -> list[Scene]:
    """The scenes of this step; every step has its own."""
    return [make_scene(f"train-{step * count + k}") for k in range(count)]
