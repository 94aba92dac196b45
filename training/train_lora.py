"""Train a LoRA of SDXL on images whose captions are read whole, however long.

    python training/train_lora.py
    python training/train_lora.py --base stabilityai/stable-diffusion-xl-base-1.0 --finelip runs/finelip/last \\
        --captions folder:pictures --mixed-precision bf16
    accelerate launch --num_processes 2 training/train_lora.py --base ... --captions folder:pictures

`folder:` takes pictures with a .txt file of the same name beside each, as other trainers do. A caption is encoded as
the pipeline encodes a prompt: up to 248 tokens at once, longer ones in windows. The LoRA changes the UNet, and with
--train-text-encoders the text encoders. It comes out in Diffusers' layout and in kohya's, which ComfyUI, A1111 and
sd-scripts read.

Without arguments it trains on scenes of the miniature's world, in minutes on a CPU. A run that was stopped goes on from
its last checkpoint with the same command. Defaults are presets, TOML files to copy and change for --config.
"""

from __future__ import annotations

import argparse
import shlex
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from finelip_sdxl.console import announce, quiet_diffusers, quiet_imports
from finelip_sdxl.training.command_line import run_recipe
from finelip_sdxl.training.flags import train_lora as flags

if __name__ == "__main__":  # wrong flags are refused before the imports that take seconds and would print warnings
    quiet_imports()
    run_recipe("train_lora.py", flags.check, partial(flags.parse, description=__doc__), None)
    announce("The flags are in order; opening the models…")


import numpy as np
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import send_to_device, set_seed
from diffusers.utils import logging as diffusers_logging
from torch import nn
from tqdm import tqdm

from finelip_sdxl import FineLIPSDXLPipeline
from finelip_sdxl.data import CaptionDataset, ResumableBatchSampler, open_dataset
from finelip_sdxl.picture_sizes import side_factor
from finelip_sdxl.pipelines.opening import open_text_to_image
from finelip_sdxl.training.command_line import build_accelerator, end_run, fixed_settings, say_disk_needs
from finelip_sdxl.training.health import Health, count_broken
from finelip_sdxl.training.lora import DIFFUSERS_FILE, KOHYA_FILE, Lora, LoraTask
from finelip_sdxl.training.memory import place, save_memory
from finelip_sdxl.training.precompute import READERS, WHOLE, Precomputed, cut_bucket, cut_square, folder_of, precompute
from finelip_sdxl.training.processes import only_run, together
from finelip_sdxl.training.run_folder import RunFolder
from finelip_sdxl.training.schedule import endless, learning_rate_factor

parse, check = partial(flags.parse, description=__doc__), flags.check
SDXL, MINIATURE = flags.SDXL, flags.MINIATURE
# Flags that may change when a run goes on, beside those of every recipe.
FREE = {"images", "precomputed"}


def train(arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains, and returns the run's progress."""
    check(arguments)
    accelerator = build_accelerator(arguments)
    with only_run(arguments.output_dir, accelerator):
        progress = train_alone(arguments, accelerator)
    end_run(accelerator, progress, results_of(arguments))
    return progress


def train_alone(arguments: argparse.Namespace, accelerator: Accelerator) -> dict[str, Any]:
    """Trains in a folder that no other run writes to."""
    set_seed(arguments.seed)
    fixed = fixed_settings(arguments, FREE, accelerator.num_processes)
    folder = RunFolder(arguments.output_dir, accelerator, fixed, keep=arguments.checkpoints_total_limit)
    folder.check_settings()  # before images are encoded
    data = open_dataset(
        arguments.captions, split="train", images=arguments.images, skip_missing=arguments.skip_missing_images
    )
    if data.left_out:
        accelerator.print(data.left_out)
    pipe = open_base(arguments)
    models = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    place(models, (*READERS, "vae"), accelerator.device)
    pictures = precompute_pictures(arguments, accelerator, data, pipe)
    lora = Lora(pipe, arguments.rank, arguments.layers, arguments.train_text_encoders)
    task = LoraTask(pipe, lora, arguments.snr_gamma)
    if arguments.gradient_checkpointing:
        save_memory(pipe)
    place(models, ("unet", *(READERS if arguments.train_text_encoders else ())), accelerator.device)

    timesteps = task.losses.num_timesteps
    task, optimizer = accelerator.prepare(
        task, torch.optim.AdamW(lora.parameters, lr=arguments.learning_rate, weight_decay=arguments.weight_decay)
    )
    say_disk_needs(accelerator, arguments.output_dir, disk_needs(arguments, pictures, lora))
    progress = folder.resume() or {"step": 0}
    if progress["step"] >= arguments.steps:
        accelerator.print(
            f"{arguments.output_dir} is complete, with {progress['step']} steps: nothing is left to train."
        )
    if arguments.report_to != "none":
        accelerator.init_trackers("train_lora", config=fixed)

    source = batches(
        pictures, timesteps, arguments, accelerator, first=progress["step"] * arguments.gradient_accumulation_steps
    )
    images_a_step = arguments.batch_size * arguments.gradient_accumulation_steps * accelerator.num_processes
    health = Health()
    with tqdm(
        initial=progress["step"],
        total=arguments.steps,
        desc="training",
        unit="step",
        disable=not accelerator.is_main_process,
    ) as bar:
        while progress["step"] < arguments.steps:
            started = time.perf_counter()
            factor = learning_rate_factor(progress["step"], arguments.steps // 20, arguments.steps)
            for group in optimizer.param_groups:
                group["lr"] = arguments.learning_rate * factor
            figures = take_step(arguments, accelerator, task, optimizer, lora, source)
            progress["step"] = step = progress["step"] + 1
            health.check(step, figures["loss"], figures.pop("broken"), optimizer.step_was_skipped)
            figures["images_per_second"] = images_a_step / (time.perf_counter() - started)
            bar.set_postfix({name: f"{figure:.3g}" for name, figure in figures.items()})
            bar.update()
            accelerator.log({**figures, "learning_rate": arguments.learning_rate * factor}, step=step)
            if step % arguments.checkpointing_steps == 0 or step == arguments.steps:
                folder.save(progress)
                save_lora(accelerator, folder, lora)
    save_lora(accelerator, folder, lora)  # again: the run may have been stopped just before
    return progress


def take_step(
    arguments: argparse.Namespace,
    accelerator: Accelerator,
    task: nn.Module,
    optimizer: AcceleratedOptimizer,
    lora: Lora,
    source: Iterator[list[dict[str, Any]]],
) -> dict[str, float]:
    """Takes one optimizer step and returns the mean loss over its batches and all processes."""
    loss = torch.zeros((), device=accelerator.device)
    for _ in range(arguments.gradient_accumulation_steps):
        batch = send_to_device(next(source), accelerator.device)
        with accelerator.accumulate(task):
            of_batch = task(batch)["loss"]
            accelerator.backward(of_batch)
            if accelerator.sync_gradients and arguments.max_grad_norm:
                accelerator.clip_grad_norm_(lora.parameters, arguments.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        loss += of_batch.detach() / arguments.gradient_accumulation_steps
    figures = {"loss": loss, "broken": count_broken(lora.parameters)}
    return {name: figure.item() for name, figure in accelerator.reduce(figures, reduction="mean").items()}


def save_lora(accelerator: Accelerator, folder: RunFolder, lora: Lora) -> None:
    with together(accelerator):
        folder.save_model("last", lora)


# Before the first step


def open_base(arguments: argparse.Namespace) -> FineLIPSDXLPipeline:
    """Opens the SDXL that the LoRA is for. It cuts no caption, and takes captions for plain text."""
    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[arguments.mixed_precision]
    names = ("variant", "finelip", "finelip_2", "conditioning_adapter")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    if given.get("conditioning_adapter") == "none":
        given["conditioning_adapter"] = None
    pipe = open_text_to_image(
        arguments.base, config=arguments.base_config, dtype=dtype, overflow="window", weighting=None, **given
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def precompute_pictures(
    arguments: argparse.Namespace, accelerator: Accelerator, data: CaptionDataset, pipe: FineLIPSDXLPipeline
) -> Precomputed:
    """Encodes the images, and the captions unless the text encoders train, once for all runs."""
    cut = cut_square if arguments.square else partial(cut_bucket, factor=side_factor(pipe))
    folder = precomputed_folder(arguments, pipe)
    with_states = not arguments.train_text_encoders
    with together(accelerator):
        if accelerator.is_local_main_process:
            precompute(data, pipe, arguments.resolution, with_states, folder, captions=WHOLE, cut=cut)
    return Precomputed(folder)


def precomputed_folder(arguments: argparse.Namespace, pipe: FineLIPSDXLPipeline) -> Path:
    """Returns the folder of latents and states. It depends on all flags and options that change them."""
    names = ("base", "finelip", "finelip_2", "conditioning_adapter", "captions", "images", "skip_missing_images")
    names += ("resolution", "square", "mixed_precision", "train_text_encoders")
    options = ("short_prompt_encoder", "hidden_states", "length_buckets")
    made_of = {
        "recipe": "train_lora",
        **{name: str(getattr(arguments, name)) for name in names},
        **{name: str(getattr(pipe, name)) for name in options},
    }
    return folder_of(arguments.precomputed or arguments.output_dir / "precomputed", made_of)


def batches(
    pictures: Precomputed, timesteps: int, arguments: argparse.Namespace, accelerator: Accelerator, first: int
) -> Iterator[list[dict[str, Any]]]:
    """Yields batches of this process without end, from number `first` on. Noise, timesteps and dropped captions depend
    on the seed and the batch's number over all processes."""
    processes, process = accelerator.num_processes, accelerator.process_index
    order = ResumableBatchSampler(len(pictures), 1, arguments.batch_size, arguments.seed, processes, process)
    for batch, indices in enumerate(endless(order, order.set_epoch, first), start=first):
        seed = np.random.default_rng([arguments.seed, batch * processes + process]).integers(2**63)
        random = torch.Generator().manual_seed(int(seed))
        items = []
        for item in (pictures[index] for index in indices):
            item["noise"] = torch.randn(item["latents"].shape, generator=random)
            item["timesteps"] = torch.randint(timesteps, (), generator=random)
            item["dropped"] = torch.rand((), generator=random).item() < arguments.caption_dropout
            items.append(item)
        yield items


def disk_needs(arguments: argparse.Namespace, pictures: Precomputed, lora: Lora) -> dict[str, int]:
    """Returns the bytes of a run's files: checkpoints hold weights and AdamW's two moments, and the LoRA is written in
    two layouts."""
    trained = 4 * sum(parameter.numel() for parameter in lora.parameters)
    item = pictures[0]
    stored = sum(part.numel() * part.element_size() for part in item.values() if isinstance(part, torch.Tensor))
    return {
        "checkpoints": 3 * trained * (arguments.checkpoints_total_limit + 1),
        "LoRA": 2 * 2 * trained,
        "precomputed": stored * len(pictures),
    }


def results_of(arguments: argparse.Namespace) -> list[str]:
    """Returns lines about a run's results, and the command that uses them."""
    last: Path = arguments.output_dir / "last"
    names = ("base", "finelip", "finelip_2", "conditioning_adapter")
    given = [(name, getattr(arguments, name)) for name in names]
    models = "".join(
        f" --{name.replace('_', '-')} {shlex.quote(value)}" for name, value in given if value and value != "miniature"
    )
    use = f'finelip-sdxl generate "A LONG PROMPT"{models} --lora {shlex.quote(str(last / DIFFUSERS_FILE))}'
    return [
        f"result: {last / DIFFUSERS_FILE}",
        f"for ComfyUI, A1111 and sd-scripts: {last / KOHYA_FILE}",
        f"to draw with it: {use}",
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    diffusers_logging.disable_progress_bar()
    quiet_diffusers()
    run_recipe("train_lora.py", train, parse, arguments)


if __name__ == "__main__":
    main()
