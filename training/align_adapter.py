"""Align new text encoders with SDXL's UNet, which was trained on the states of its original ones.

    python training/align_adapter.py
    python training/align_adapter.py --method lora
    python training/align_adapter.py --base stabilityai/stable-diffusion-xl-base-1.0 --finelip runs/finelip/last \\
        --captions sharegpt4v:captions.json --images /data --mixed-precision bf16

Stage 1 needs texts alone: states are drawn toward the states of SDXL's original encoders, on short captions whole, on
long ones sentence by sentence. Stage 2 needs images, too: it takes the denoising loss through the frozen UNet.

Two methods. An *adapter* is a small network between encoders and UNet, for `conditioning_adapter=`; it leaves the
encoders as they are, and its scale is set by `pipe.set_conditioning_adapter_scale`. A *LoRA* changes the encoders' own
weights; it is merged, so that the result is a pair of plain text encoders for `finelip=` and `finelip_2=`, which stock
Diffusers also opens.

Without arguments it aligns the miniature's FineLIPs, in minutes on a CPU. A run that was stopped goes on from its last
checkpoint with the same command. Defaults are presets, TOML files to copy and change for --config.
"""

from __future__ import annotations

import argparse
import copy
import shlex
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

from finelip_sdxl.console import announce, quiet_diffusers, quiet_imports
from finelip_sdxl.training.command_line import run_recipe
from finelip_sdxl.training.flags import align_adapter as flags

if __name__ == "__main__":  # wrong flags are refused before the imports that take seconds and would print warnings
    quiet_imports()
    run_recipe("align_adapter.py", flags.check, partial(flags.parse, description=__doc__), None)
    announce("The flags are in order; opening the models…")


import numpy as np
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import set_seed
from diffusers import StableDiffusionXLPipeline
from diffusers.training_utils import EMAModel
from diffusers.utils import logging as diffusers_logging
from peft import PeftModel, get_peft_model
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from finelip_sdxl import ConditioningAdapter, FineLIPSDXLPipeline
from finelip_sdxl.data import CaptionDataset, ResumableBatchSampler, open_dataset
from finelip_sdxl.files import written_whole
from finelip_sdxl.images import label_grid
from finelip_sdxl.names import sdxl_path
from finelip_sdxl.options import ENCODERS, STOCK_POSITIONS
from finelip_sdxl.pipelines.checking import loading_errors, single_file_errors
from finelip_sdxl.provenance import forget_stretch
from finelip_sdxl.text_encoders import num_positions
from finelip_sdxl.texts import lines_of, read_text
from finelip_sdxl.training.alignment import Alignment, ImageAlignment, TextAlignment, captions_of, word_rarity
from finelip_sdxl.training.command_line import build_accelerator, end_run, fixed_settings, say_disk_needs
from finelip_sdxl.training.health import Health, count_broken
from finelip_sdxl.training.lora import encoder_lora
from finelip_sdxl.training.memory import place, save_memory
from finelip_sdxl.training.precompute import Precomputed, folder_of, precompute
from finelip_sdxl.training.processes import only_run, together
from finelip_sdxl.training.run_folder import RunFolder
from finelip_sdxl.training.schedule import endless, learning_rate_factor

parse, check = partial(flags.parse, description=__doc__), flags.check
SDXL, MINIATURE = flags.SDXL, flags.MINIATURE
# Flags that may change when a run goes on, beside those of every recipe.
FREE = {"images", "precomputed", "validate_every", "validation_prompts", "guidance_scale"}
TEACHERS = tuple(f"stock_{name}" for name in ENCODERS)
VALIDATION_STEPS = 20  # of denoising, for each picture on the way


def align(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs both stages and returns the run's progress."""
    check(arguments)
    accelerator = build_accelerator(arguments)
    with only_run(arguments.output_dir, accelerator):
        progress = align_alone(arguments, accelerator)
    end_run(accelerator, progress, results_of(arguments))
    return progress


def align_alone(arguments: argparse.Namespace, accelerator: Accelerator) -> dict[str, Any]:
    """Aligns in a folder that no other run writes to."""
    set_seed(arguments.seed)
    fixed = fixed_settings(arguments, FREE, accelerator.num_processes)
    folder = RunFolder(arguments.output_dir, accelerator, fixed, keep=arguments.checkpoints_total_limit)
    folder.check_settings()  # before images are encoded
    data = open_dataset(
        arguments.captions, split="train", images=arguments.images, skip_missing=arguments.skip_missing_images
    )
    if data.left_out:
        accelerator.print(data.left_out)
    prompts = validation_prompts(arguments, data)
    stock = load_stock(arguments)
    pipe = build_pipeline(arguments, stock)
    pictures = None
    if arguments.image_steps:  # encoded before training: an adapter gets the states of untrained encoders
        pictures = precompute_pictures(arguments, accelerator, data, pipe, stock)
    method = Lora(pipe, arguments.rank) if arguments.method == "lora" else Adapter(pipe, arguments.hidden_dim)
    if arguments.gradient_checkpointing:
        save_memory(pipe)

    place(models_of(pipe, stock), ENCODERS, accelerator.device)
    rarity = word_rarity([data.captions(index)[0] for index in range(min(len(data), 1000))])
    losses: dict[str, Any] = {
        "text": TextAlignment(pipe, stock, rarity),
        "image": ImageAlignment(pipe, arguments.snr_gamma),
    }
    task, optimizer = accelerator.prepare(
        Alignment(method.parameters, losses),
        torch.optim.AdamW(method.parameters, lr=arguments.learning_rate, weight_decay=arguments.weight_decay),
    )
    average = EMAModel(method.parameters, decay=arguments.ema_decay, use_ema_warmup=True, power=0.75)
    folder.also["average"] = average
    trained = sum(parameter.numel() for parameter in method.parameters)
    say_disk_needs(accelerator, arguments.output_dir, disk_needs(arguments, data, pipe, trained))
    progress = folder.resume() or {"step": 0}
    if progress["step"] >= arguments.text_steps + arguments.image_steps:
        accelerator.print(
            f"{arguments.output_dir} is complete, with {progress['step']} steps: nothing is left to train."
        )
    if arguments.report_to != "none":
        accelerator.init_trackers("align_adapter", config=fixed)

    run = Run(arguments, accelerator, stock, pipe, method, task, optimizer, average, folder, progress, prompts)
    for stage in stages_of(arguments, accelerator, data, pictures, pipe):
        if stage.steps and progress["step"] <= stage.end:
            place(models_of(pipe, stock), stage.models, accelerator.device)
            train_stage(run, stage)
            with together(accelerator):
                method.save(folder, stage.result)
    return progress


@dataclass
class Stage:
    """One of the two stages.

    Attributes:
        name: `text` or `image`.
        first: the run's step that it begins with.
        steps: the number of its steps.
        batches: yields its batches from a number on, without end.
        models: the models that must be on the device.
        result: the name of the resulting model.
    """

    name: str
    first: int
    steps: int
    batches: Callable[[int], Iterator[dict[str, Any]]]
    models: tuple[str, ...]
    result: str

    @property
    def end(self) -> int:
        return self.first + self.steps


@dataclass
class Run:
    """Everything that the stages share. The trained weights are part of `pipe`, and averaged in `average`."""

    arguments: argparse.Namespace
    accelerator: Accelerator
    stock: StableDiffusionXLPipeline
    pipe: FineLIPSDXLPipeline
    method: Adapter | Lora
    task: nn.Module
    optimizer: AcceleratedOptimizer
    average: EMAModel
    folder: RunFolder
    progress: dict[str, Any]
    prompts: list[str]
    health: Health = field(default_factory=Health)


def stages_of(
    arguments: argparse.Namespace,
    accelerator: Accelerator,
    data: CaptionDataset,
    pictures: Precomputed | None,
    pipe: FineLIPSDXLPipeline,
) -> tuple[Stage, Stage]:
    """Returns the text stage and the image stage. A run leaves out a stage without steps."""
    trained_encoders = ENCODERS if arguments.method == "lora" else ()
    text = Stage(
        name="text",
        first=0,
        steps=arguments.text_steps,
        batches=partial(text_batches, data, pipe.tokenizer, arguments, accelerator),
        models=(*ENCODERS, *TEACHERS),
        result="after-text" if arguments.image_steps else "last",
    )
    image = Stage(
        name="image",
        first=text.end,
        steps=arguments.image_steps,
        batches=partial(image_batches, cast(Precomputed, pictures), arguments, accelerator),
        models=(*trained_encoders, "unet"),
        result="last",
    )
    return text, image


def train_stage(run: Run, stage: Stage) -> None:
    """Trains from the step of the run's progress to the stage's end."""
    arguments, accelerator, progress = run.arguments, run.accelerator, run.progress
    batches = stage.batches((progress["step"] - stage.first) * arguments.gradient_accumulation_steps)
    pairs = arguments.batch_size * arguments.gradient_accumulation_steps * accelerator.num_processes
    with tqdm(
        initial=progress["step"] - stage.first,
        total=stage.steps,
        desc=f"aligning by {stage.name}s",
        unit="step",
        disable=not accelerator.is_main_process,
    ) as bar:
        while progress["step"] < stage.end:
            started = time.perf_counter()
            figures = take_step(run, stage, batches)
            figures["captions_per_second"] = pairs / (time.perf_counter() - started)
            step, is_last = progress["step"], progress["step"] == stage.end
            bar.set_postfix({name: f"{figure:.3g}" for name, figure in figures.items()})
            bar.update()
            accelerator.log({f"{stage.name}/{name}": figure for name, figure in figures.items()}, step=step)
            if is_last:  # the average is the result, and the beginning of the next stage
                run.average.copy_to(run.method.parameters)
                run.optimizer.state.clear()
            if step % arguments.checkpointing_steps == 0 or is_last:
                run.folder.save(progress)
            if arguments.validate_every and (step % arguments.validate_every == 0 or is_last):
                validate(run, stage)


def take_step(run: Run, stage: Stage, batches: Iterator[dict[str, Any]]) -> dict[str, float]:
    """Takes one optimizer step and returns the mean losses over its batches and all processes."""
    arguments, accelerator, parameters = run.arguments, run.accelerator, run.method.parameters
    step = run.progress["step"]
    factor = learning_rate_factor(step - stage.first, stage.steps // 20, stage.steps)
    for group in run.optimizer.param_groups:
        group["lr"] = arguments.learning_rate * factor
    sums: dict[str, Tensor] = {}
    for _ in range(arguments.gradient_accumulation_steps):
        with accelerator.accumulate(run.task):
            parts = run.task(stage.name, next(batches))
            accelerator.backward(parts["loss"])
            if accelerator.sync_gradients and arguments.max_grad_norm:
                accelerator.clip_grad_norm_(parameters, arguments.max_grad_norm)
            run.optimizer.step()
            run.optimizer.zero_grad()
        for name, part in parts.items():
            sums[name] = sums.get(name, 0) + part.detach() / arguments.gradient_accumulation_steps
    run.average.step(parameters)
    sums["broken"] = count_broken(parameters)
    run.progress["step"] = step + 1
    figures = {name: part.item() for name, part in accelerator.reduce(sums, reduction="mean").items()}
    run.health.check(step + 1, figures["loss"], figures.pop("broken"), run.optimizer.step_was_skipped)
    return figures


def validate(run: Run, stage: Stage) -> None:
    """Draws the validation prompts, with all models on the device; after it only the stage's models stay there."""
    models, device = models_of(run.pipe, run.stock), run.accelerator.device
    place(models, (*ENCODERS, *TEACHERS, "unet", "vae"), device)
    with together(run.accelerator):
        if run.accelerator.is_main_process:
            save_pictures(run)
    place(models, stage.models, device)


def save_pictures(run: Run) -> None:
    """Draws with stock, which cuts the prompts, and with the aligned average, to a file and to TensorBoard."""
    step = run.progress["step"]
    run.average.store(run.method.parameters)
    run.average.copy_to(run.method.parameters)
    grid = draw(run.stock, run.pipe, run.prompts, run.arguments)
    run.average.restore(run.method.parameters)
    with written_whole(run.folder.folder / "validation" / f"step-{step:06d}.png") as temporary:
        grid.save(temporary, format="PNG")
    if run.arguments.report_to == "tensorboard":
        writer = run.accelerator.get_tracker("tensorboard", unwrap=True)
        writer.add_image("validation", np.asarray(grid), step, dataformats="HWC")


# The two methods


class Adapter:
    """Trains a conditioning adapter."""

    def __init__(self, pipe: FineLIPSDXLPipeline, hidden_dim: int) -> None:
        dims = (pipe.text_encoder.config.hidden_size, pipe.text_encoder_2.config.hidden_size)
        self.adapter = ConditioningAdapter(dims, pipe.text_encoder_2.config.projection_dim, hidden_dim)
        pipe.register_modules(conditioning_adapter=self.adapter)
        self.parameters = list(self.adapter.parameters())

    def save(self, run: RunFolder, name: str) -> None:
        run.save_model(name, self.adapter)


class Lora:
    """Trains low-rank changes of the text encoders' linear layers."""

    def __init__(self, pipe: FineLIPSDXLPipeline, rank: int) -> None:
        self.encoders: dict[str, PeftModel] = {}
        for name in ENCODERS:
            # A copy: a stretched encoder shares its weights with stock's encoder, the teacher.
            encoder = copy.deepcopy(getattr(pipe, name))
            forget_stretch(encoder.config)
            self.encoders[name] = get_peft_model(encoder, encoder_lora(name, encoder, rank))
            setattr(pipe, name, encoder)
        self.parameters = [
            parameter for model in self.encoders.values() for parameter in model.parameters() if parameter.requires_grad
        ]

    def save(self, run: RunFolder, name: str) -> None:
        merged = {name: copy.deepcopy(model).merge_and_unload() for name, model in self.encoders.items()}
        run.save_model(name, **merged)


# Before the first step


def load_stock(arguments: argparse.Namespace) -> StableDiffusionXLPipeline:
    """Loads SDXL as it is: the teacher, and the UNet to align with."""
    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[arguments.mixed_precision]
    if Path(arguments.base).is_file():
        with single_file_errors(arguments.base, arguments.base_config):
            stock = StableDiffusionXLPipeline.from_single_file(
                arguments.base, config=arguments.base_config, dtype=dtype
            )
    else:
        base = sdxl_path(arguments.base)
        with loading_errors(base, arguments.variant):
            stock = StableDiffusionXLPipeline.from_pretrained(base, variant=arguments.variant, dtype=dtype)
    encoders = stock.text_encoder, stock.text_encoder_2
    if any(encoder is None or num_positions(encoder) != STOCK_POSITIONS for encoder in encoders):
        raise ValueError(
            f"--base {arguments.base} lacks the two text encoders of {STOCK_POSITIONS} positions that SDXL was"
            " trained with: pass a stock SDXL, and the encoders that replace them as --finelip and --finelip-2."
        )
    stock.set_progress_bar_config(disable=True)
    return stock


def build_pipeline(arguments: argparse.Namespace, stock: StableDiffusionXLPipeline) -> FineLIPSDXLPipeline:
    """Builds the pipeline to align: stock with its text encoders swapped, and no weights that train yet."""
    pipe = FineLIPSDXLPipeline(**stock.components, short_prompt_encoder="long", length_buckets=(STOCK_POSITIONS,))
    pipe.set_progress_bar_config(disable=True)
    pipe.swap_text_encoders(arguments.finelip, arguments.finelip_2)
    for model in models_of(pipe, stock).values():
        model.requires_grad_(False)
    return pipe


def precompute_pictures(
    arguments: argparse.Namespace,
    accelerator: Accelerator,
    data: CaptionDataset,
    pipe: FineLIPSDXLPipeline,
    stock: StableDiffusionXLPipeline,
) -> Precomputed:
    place(models_of(pipe, stock), (*ENCODERS, "vae"), accelerator.device)
    folder = precomputed_folder(arguments)
    with together(accelerator):
        if accelerator.is_local_main_process:
            precompute(data, pipe, arguments.resolution, arguments.method == "adapter", folder)
    return Precomputed(folder)


def models_of(pipe: FineLIPSDXLPipeline, stock: StableDiffusionXLPipeline) -> dict[str, nn.Module]:
    """Returns all models that take memory and are not trained, by name."""
    own = {name: getattr(pipe, name) for name in (*ENCODERS, "unet", "vae")}
    return {**own, **{f"stock_{name}": getattr(stock, name) for name in ENCODERS}}


def disk_needs(
    arguments: argparse.Namespace, data: CaptionDataset, pipe: FineLIPSDXLPipeline, trained: int
) -> dict[str, int]:
    """Returns the bytes of a run's files: checkpoints hold weights, average and AdamW's two moments."""
    encoders = sum(parameter.numel() for name in ENCODERS for parameter in getattr(pipe, name).parameters())
    stages = bool(arguments.text_steps) + bool(arguments.image_steps)
    needed = {
        "checkpoints": 4 * 4 * trained * (arguments.checkpoints_total_limit + 1),
        "results": 4 * stages * (encoders if arguments.method == "lora" else trained),
    }
    if arguments.image_steps:
        side = arguments.resolution // pipe.vae_scale_factor
        values = pipe.vae.config.latent_channels * side**2
        if arguments.method == "adapter":
            dim = pipe.text_encoder.config.hidden_size + pipe.text_encoder_2.config.hidden_size
            values += (num_positions(pipe.text_encoder) + STOCK_POSITIONS) * dim
        needed["precomputed"] = 4 * values * len(data)
    return needed


def results_of(arguments: argparse.Namespace) -> list[str]:
    """Returns lines about a run's results, and the command that uses them."""
    last = arguments.output_dir / "last"
    use = f"--conditioning-adapter {shlex.quote(str(last))}"
    if arguments.method == "lora":
        use = " ".join(
            f"--finelip{suffix} {shlex.quote(str(last / f'text_encoder{suffix}'))}" for suffix in ("", "_2")
        ).replace("--finelip_2", "--finelip-2")
    elif arguments.finelip or arguments.finelip_2:
        given = {"--finelip": arguments.finelip, "--finelip-2": arguments.finelip_2}
        use += "".join(f" {flag} {shlex.quote(name)}" for flag, name in given.items() if name)
    base = "" if arguments.base == "miniature" else f" --base {shlex.quote(arguments.base)}"
    lines = [f"result: {last}", f'to draw with it: finelip-sdxl generate "A LONG PROMPT"{base} {use}']
    sheets = sorted((arguments.output_dir / "validation").glob("step-*.png"))
    return lines + [f"to look at: {sheets[-1]} (above by stock, below aligned)" for _ in sheets[-1:]]


def precomputed_folder(arguments: argparse.Namespace) -> Path:
    """Returns the folder of latents and states. It depends on all flags that change them."""
    names = ("base", "finelip", "finelip_2", "captions", "images", "resolution", "mixed_precision")
    made_of: dict[str, Any] = {name: str(getattr(arguments, name)) for name in names}
    made_of |= {"states": arguments.method == "adapter", "skip_missing_images": arguments.skip_missing_images}
    return folder_of(arguments.precomputed or arguments.output_dir / "precomputed", made_of)


def text_batches(
    data: CaptionDataset, tokenizer: Any, arguments: argparse.Namespace, accelerator: Accelerator, first: int
) -> Iterator[dict[str, Any]]:
    for indices in index_batches(len(data), arguments, accelerator, first):
        captions = [captions_of(data, index, tokenizer) for index in indices]
        longs = num_long(arguments)
        yield {
            "long": [caption["long"] for caption in captions[:longs]],
            "short": [caption["short"] for caption in captions[longs:]],
        }


def image_batches(
    pictures: Precomputed, arguments: argparse.Namespace, accelerator: Accelerator, first: int
) -> Iterator[dict[str, Any]]:
    """Yields batches of pictures. Noise and timesteps depend on the seed and the batch's number over all processes."""
    device = accelerator.device
    for batch, indices in enumerate(index_batches(len(pictures), arguments, accelerator, first), start=first):
        number_of_all = batch * accelerator.num_processes + accelerator.process_index
        seed = np.random.default_rng([arguments.seed, number_of_all]).integers(2**63)
        random = torch.Generator().manual_seed(int(seed))
        longs, groups = num_long(arguments), []
        for kind, chosen in (("long", indices[:longs]), ("short", indices[longs:])):
            items = [pictures[index] for index in chosen]
            latents = torch.stack([item["latents"] for item in items])
            # More of the noisy timesteps, where the text matters.
            timesteps = (torch.rand(len(items), generator=random).sqrt() * 1000).long().clamp(max=999)
            group = {
                "latents": latents,
                "noise": torch.randn(latents.shape, generator=random),
                "timesteps": timesteps,
                "time_ids": torch.stack([item["time_ids"] for item in items]),
            }
            if f"{kind}_states" in items[0]:
                group["states"] = torch.stack([item[f"{kind}_states"] for item in items])
                group["pooled"] = torch.stack([item[f"{kind}_pooled"] for item in items])
            group = {name: tensor.to(device) for name, tensor in group.items()}
            groups.append(group if "states" in group else {**group, "captions": [item[kind] for item in items]})
        yield {"groups": groups}


def index_batches(
    size: int, arguments: argparse.Namespace, accelerator: Accelerator, first: int
) -> Iterator[list[int]]:
    """Yields batches of this process without end, from number `first` on."""
    order = ResumableBatchSampler(
        size, 1, arguments.batch_size, arguments.seed, accelerator.num_processes, accelerator.process_index
    )
    return endless(order, order.set_epoch, first)


def num_long(arguments: argparse.Namespace) -> int:
    """Returns the number of long captions in a batch; the others are short."""
    batch_size: int = arguments.batch_size
    return min(max(1, round(batch_size * (1 - arguments.short_share))), batch_size - 1)


def validation_prompts(arguments: argparse.Namespace, data: CaptionDataset) -> list[str]:
    if arguments.validation_prompts is None:
        return [data.captions(index)[0] for index in range(min(4, len(data)))]
    prompts = [line.strip() for _, line in lines_of(read_text(arguments.validation_prompts))]
    if not prompts:
        raise ValueError(f"--validation-prompts {arguments.validation_prompts} holds no text: write a prompt a line.")
    return prompts


def draw(
    stock: StableDiffusionXLPipeline, pipe: FineLIPSDXLPipeline, prompts: list[str], arguments: argparse.Namespace
) -> Image.Image:
    """Draws two rows, by stock and aligned, from the same noise."""
    rows = [
        [
            drawing(
                prompt,
                width=arguments.resolution,
                height=arguments.resolution,
                num_inference_steps=VALIDATION_STEPS,
                guidance_scale=arguments.guidance_scale,
                generator=torch.Generator().manual_seed(seed),
            ).images[0]
            for seed, prompt in enumerate(prompts)
        ]
        for drawing in (stock, pipe)
    ]
    return label_grid(rows, ["stock", "aligned"], [textwrap.shorten(prompt, 80) for prompt in prompts])


def main(arguments: Sequence[str] | None = None) -> None:
    diffusers_logging.set_verbosity_error()  # stock would warn of all cut text in validation prompts
    diffusers_logging.disable_progress_bar()
    quiet_diffusers()
    run_recipe("align_adapter.py", align, parse, arguments)


if __name__ == "__main__":
    main()
