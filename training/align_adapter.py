"""Align swapped text encoders with SDXL's UNet, which was trained on the states of others.

    python training/align_adapter.py
    python training/align_adapter.py --method lora
    python training/align_adapter.py --base stabilityai/stable-diffusion-xl-base-1.0 --finelip runs/finelip/last \\
        --captions sharegpt4v:captions.json --images /data --mixed-precision bf16

Stage 1 needs texts alone: states are drawn towards those of SDXL's own encoders, on short captions whole, on long ones
sentence by sentence. Stage 2 draws pictures: the denoising loss through the UNet, which stays as it is.

Two methods. An *adapter* is a small network between encoders and UNet, for `conditioning_adapter=`; it leaves the
encoders as they are, and its scale can be set at every call. A *LoRA* changes the encoders' own weights; it is merged,
so that the result is a pair of plain text encoders for `finelip=` and `finelip_2=`, which stock Diffusers reads too.

Without arguments it aligns the miniature's FineLIPs, in minutes on a CPU. A run that was stopped goes on from its last
checkpoint with the same command.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before the imports that would speak
    from finelip_sdxl.console import quiet_imports

    quiet_imports()

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import StableDiffusionXLPipeline
from diffusers.training_utils import EMAModel
from diffusers.utils import logging as diffusers_logging
from diffusers.utils import make_image_grid
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from finelip_sdxl import ConditioningAdapter, FineLIPSDXLPipeline
from finelip_sdxl.data import CaptionDataset, ResumableBatchSampler, open_dataset
from finelip_sdxl.files import written_whole
from finelip_sdxl.names import sdxl_path
from finelip_sdxl.options import ENCODERS, STOCK_POSITIONS
from finelip_sdxl.pipelines.encoder_swap import loading_errors, single_file_errors
from finelip_sdxl.provenance import forget_stretch
from finelip_sdxl.text_encoders import num_positions
from finelip_sdxl.texts import lines_of, read_text
from finelip_sdxl.training.alignment import Alignment, ImageAlignment, TextAlignment, captions_of, word_rarity
from finelip_sdxl.training.precompute import Precomputed, precompute
from finelip_sdxl.training.recipe import (
    AMOUNT,
    BATCH,
    MOST_STEPS,
    SEED,
    SHARE,
    STEPS_OR_NONE,
    Health,
    add_accelerator_flags,
    add_preset,
    add_run_flags,
    build_accelerator,
    check_run,
    count_broken,
    end,
    endless,
    fill_in,
    fixed_settings,
    number,
    path,
    run_recipe,
    schedule,
)
from finelip_sdxl.training.run_folder import RunFolder, only_run, together

# For SDXL.
SDXL = {
    "text_steps": 1000,
    "image_steps": 2000,
    "batch_size": 8,
    "learning_rate": 1e-4,
    "resolution": 1024,
    "hidden_dim": 512,
    "rank": 16,
    "guidance_scale": 5.0,
}
# For the miniature; benchmarks/miniature_alignment.py shows what these buy.
MINIATURE = {
    "captions": "miniature:2000",
    "finelip": "miniature-finelip-1",
    "finelip_2": "miniature-finelip-2",
    "text_steps": 60,
    "image_steps": 200,
    "batch_size": 24,
    "learning_rate": 1e-3,
    "resolution": 96,
    "hidden_dim": 256,
    "rank": 16,
    "guidance_scale": 3.0,
}
# Flags that may change when a run goes on.
FREE = {"images", "precomputed", "validate_every", "validation_prompts", "guidance_scale"}
TEACHERS = tuple(f"stock_{name}" for name in ENCODERS)
# Linear layers of a CLIP text encoder.
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


class Adapter:
    """What trains a conditioning adapter."""

    def __init__(self, pipe: FineLIPSDXLPipeline, hidden_dim: int) -> None:
        dims = (pipe.text_encoder.config.hidden_size, pipe.text_encoder_2.config.hidden_size)
        self.adapter = ConditioningAdapter(dims, pipe.text_encoder_2.config.projection_dim, hidden_dim)
        pipe.register_modules(conditioning_adapter=self.adapter)
        self.parameters = list(self.adapter.parameters())

    def save(self, run: RunFolder, name: str) -> None:
        run.save_model(name, self.adapter)


class Lora:
    """What trains low-rank changes of the text encoders' linear layers."""

    def __init__(self, pipe: FineLIPSDXLPipeline, rank: int) -> None:
        self.encoders: dict[str, PeftModel] = {}
        for name in ENCODERS:
            # A copy: what was only stretched shares its weights with stock's encoder, which teaches.
            encoder = copy.deepcopy(getattr(pipe, name))
            forget_stretch(encoder.config)
            layers = encoder.config.num_hidden_layers
            # The states before the last layer are read; behind it is the pooled vector, of the second encoder alone.
            trained = layers if name == "text_encoder_2" else layers - 1
            config = LoraConfig(
                r=rank, lora_alpha=rank, target_modules=list(LORA_TARGETS), layers_to_transform=list(range(trained))
            )
            self.encoders[name] = get_peft_model(encoder, config)
            setattr(pipe, name, encoder)
        self.parameters = [
            parameter for model in self.encoders.values() for parameter in model.parameters() if parameter.requires_grad
        ]

    def save(self, run: RunFolder, name: str) -> None:
        merged = {name: copy.deepcopy(model).merge_and_unload() for name, model in self.encoders.items()}
        run.save_model(name, **merged)


@dataclass
class Stage:
    """One of the two: the batches that it goes through, and the models that it needs where they are computed."""

    name: str
    steps: int
    batches: Callable[[int], Iterator[dict[str, Any]]]  # from a number on, without end
    models: tuple[str, ...]


def align(arguments: argparse.Namespace) -> dict[str, Any]:
    """The whole run; gives its progress."""
    check(arguments)
    accelerator = build_accelerator(arguments)
    with only_run(arguments.output_dir, accelerator):
        progress = align_alone(arguments, accelerator)
    end(accelerator, progress)
    return progress


def align_alone(arguments: argparse.Namespace, accelerator: Accelerator) -> dict[str, Any]:
    """`align`, in a folder that no other run writes to."""
    device = accelerator.device
    set_seed(arguments.seed)
    data = open_dataset(
        arguments.captions, split="train", images=arguments.images, skip_missing=arguments.skip_missing_images
    )
    if data.left_out:
        accelerator.print(data.left_out)
    prompts = validation_prompts(arguments, data)
    stock = load_stock(arguments)
    pipe = FineLIPSDXLPipeline(**stock.components, short_prompt_encoder="long", length_buckets=(STOCK_POSITIONS,))
    pipe.swap_text_encoders(arguments.finelip, arguments.finelip_2)
    for model in models_of(pipe, stock).values():
        model.requires_grad_(False)

    is_lora = arguments.method == "lora"
    pictures = None
    if arguments.image_steps:  # encoded before anything is trained: an adapter gets what the encoders give
        place(models_of(pipe, stock), (*ENCODERS, "vae"), device)
        folder = precomputed_folder(arguments)
        with together(accelerator):
            if accelerator.is_local_main_process:
                precompute(data, pipe, arguments.resolution, not is_lora, folder)
        pictures = Precomputed(folder)
    method = Lora(pipe, arguments.rank) if is_lora else Adapter(pipe, arguments.hidden_dim)
    models = models_of(pipe, stock)
    if arguments.gradient_checkpointing:
        save_memory(pipe)
    stages = [
        Stage(
            "text",
            arguments.text_steps,
            partial(text_batches, data, pipe.tokenizer, arguments, accelerator),
            (*ENCODERS, *TEACHERS),
        ),
        Stage(
            "image",
            arguments.image_steps,
            partial(image_batches, pictures, arguments, accelerator),
            (*(ENCODERS if is_lora else ()), "unet"),
        ),
    ]

    place(models, ENCODERS, device)
    rarity = word_rarity([data.captions(index)[0] for index in range(min(len(data), 1000))])
    losses = {"text": TextAlignment(pipe, stock, rarity), "image": ImageAlignment(pipe, arguments.snr_gamma)}
    objective, optimizer = accelerator.prepare(
        Alignment(method.parameters, losses),
        torch.optim.AdamW(method.parameters, lr=arguments.learning_rate, weight_decay=arguments.weight_decay),
    )
    average = EMAModel(method.parameters, decay=arguments.ema_decay, use_ema_warmup=True, power=0.75)
    fixed = fixed_settings(arguments, FREE, accelerator.num_processes)
    run = RunFolder(
        arguments.output_dir, accelerator, fixed, keep=arguments.checkpoints_total_limit, also={"average": average}
    )
    progress = run.resume() or {"step": 0}
    if progress["step"] >= arguments.text_steps + arguments.image_steps:
        accelerator.print(
            f"{arguments.output_dir} is complete, with {progress['step']} steps: nothing is left to train."
        )
    if arguments.report_to != "none":
        accelerator.init_trackers("align_adapter", config=fixed)

    health = Health()

    def train_stage(stage: Stage, first: int) -> None:
        """From the step of `progress` on; `first` is the one that the stage began with."""
        source = stage.batches((progress["step"] - first) * arguments.gradient_accumulation_steps)
        pairs = arguments.batch_size * arguments.gradient_accumulation_steps * accelerator.num_processes
        with tqdm(
            initial=progress["step"] - first,
            total=stage.steps,
            desc=f"aligning by {stage.name}s",
            unit="step",
            disable=not accelerator.is_main_process,
        ) as bar:
            while progress["step"] < first + stage.steps:
                started = time.perf_counter()
                factor = schedule(progress["step"] - first, stage.steps // 20, stage.steps)
                for group in optimizer.param_groups:
                    group["lr"] = arguments.learning_rate * factor
                sums: dict[str, Tensor] = {}
                for _ in range(arguments.gradient_accumulation_steps):
                    with accelerator.accumulate(objective):
                        parts = objective(stage.name, next(source))
                        accelerator.backward(parts["loss"])
                        if accelerator.sync_gradients and arguments.max_grad_norm:
                            accelerator.clip_grad_norm_(method.parameters, arguments.max_grad_norm)
                        optimizer.step()
                        optimizer.zero_grad()
                    for name, part in parts.items():
                        sums[name] = sums.get(name, 0) + part.detach() / arguments.gradient_accumulation_steps
                average.step(method.parameters)
                sums["broken"] = count_broken(method.parameters)
                progress["step"] = step = progress["step"] + 1
                figures = {name: part.item() for name, part in accelerator.reduce(sums, reduction="mean").items()}
                health.check(step, figures["loss"], figures.pop("broken"), optimizer.step_was_skipped)
                figures["captions_per_second"] = pairs / (time.perf_counter() - started)
                bar.set_postfix({name: f"{figure:.3g}" for name, figure in figures.items()})
                bar.update()
                accelerator.log({f"{stage.name}/{name}": figure for name, figure in figures.items()}, step=step)
                if step == first + stage.steps:  # the average is what comes out, and what the next stage begins with
                    average.copy_to(method.parameters)
                    optimizer.state.clear()
                if step % arguments.checkpointing_steps == 0 or step == first + stage.steps:
                    run.save(progress)
                if arguments.validate_every and (step % arguments.validate_every == 0 or step == first + stage.steps):
                    place(models, (*ENCODERS, *TEACHERS, "unet", "vae"), device)
                    with together(accelerator):
                        validate(step)
                    place(models, stage.models, device)

    def validate(step: int) -> None:
        """Draw the validation captions by stock, which cuts them, and aligned; to a file and to TensorBoard."""
        if not accelerator.is_main_process:
            return
        average.store(method.parameters)
        average.copy_to(method.parameters)
        grid = draw(stock, pipe, prompts, arguments)
        average.restore(method.parameters)
        folder = run.folder / "validation"
        folder.mkdir(parents=True, exist_ok=True)
        with written_whole(folder / f"step-{step:06d}.png") as temporary:
            grid.save(temporary, format="PNG")
        if arguments.report_to == "tensorboard":
            writer = accelerator.get_tracker("tensorboard", unwrap=True)
            writer.add_image("validation", np.asarray(grid), step, dataformats="HWC")

    first = 0
    for stage in stages:
        if stage.steps and progress["step"] <= first + stage.steps:
            place(models, stage.models, device)
            train_stage(stage, first)
            is_last = stage is stages[-1] or not arguments.image_steps
            with together(accelerator):
                method.save(run, "last" if is_last else f"after-{stage.name}")
        first += stage.steps
    return progress


def check(arguments: argparse.Namespace) -> None:
    """What is known to go wrong, before anything is loaded."""
    check_run(arguments)
    steps = arguments.text_steps + arguments.image_steps
    if not steps:
        raise ValueError("--text-steps and --image-steps are both 0: give one of the stages steps.")
    if steps > MOST_STEPS:
        raise ValueError(f"--text-steps and --image-steps are {steps:,} in all: {MOST_STEPS:,} are the most.")
    if arguments.batch_size < 2 or not 0 < arguments.short_share < 1:
        raise ValueError(
            f"--batch-size is {arguments.batch_size} and --short-share {arguments.short_share:g}: each batch needs long"
            " and short captions, so pass at least 2, and a share between 0 and 1."
        )
    if arguments.resolution % 8:
        raise ValueError(f"--resolution is {arguments.resolution}; expected a multiple of 8, such as 512.")
    if arguments.captions.startswith("txt:") and arguments.image_steps:
        raise ValueError(f"{arguments.captions} has no images: pass --image-steps 0 to align by texts alone.")
    is_file = Path(arguments.base).is_file()
    if arguments.config is not None and not is_file:
        raise ValueError(
            f"--config {arguments.config} goes with a single file, but --base {arguments.base} is none: leave it out."
        )
    if arguments.variant is not None and is_file:
        raise ValueError(
            f"--variant {arguments.variant} goes with a directory or hub id, but --base {arguments.base} is a single"
            " file: leave it out."
        )


def load_stock(arguments: argparse.Namespace) -> StableDiffusionXLPipeline:
    """SDXL as it is: the teacher, and the UNet to align with."""
    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[arguments.mixed_precision]
    if Path(arguments.base).is_file():
        with single_file_errors(arguments.base, arguments.config):
            stock = StableDiffusionXLPipeline.from_single_file(arguments.base, config=arguments.config, dtype=dtype)
    else:
        base = sdxl_path(arguments.base)
        with loading_errors(base, arguments.variant):
            stock = StableDiffusionXLPipeline.from_pretrained(base, variant=arguments.variant, dtype=dtype)
    encoders = stock.text_encoder, stock.text_encoder_2
    if any(encoder is None or num_positions(encoder) != STOCK_POSITIONS for encoder in encoders):
        raise ValueError(
            f"--base {arguments.base} has not the two text encoders of {STOCK_POSITIONS} positions that SDXL was"
            " trained with: pass a stock SDXL, and what replaces its encoders as --finelip and --finelip-2."
        )
    stock.set_progress_bar_config(disable=True)
    return stock


def models_of(pipe: FineLIPSDXLPipeline, stock: StableDiffusionXLPipeline) -> dict[str, nn.Module]:
    """All that takes memory and is not trained, by name."""
    own = {name: getattr(pipe, name) for name in (*ENCODERS, "unet", "vae")}
    return {**own, **{f"stock_{name}": getattr(stock, name) for name in ENCODERS}}


def place(models: dict[str, nn.Module], needed: Sequence[str], device: torch.device) -> None:
    """Models that are needed go to the device, the others out of its memory."""
    for name, model in sorted(models.items(), key=lambda item: item[0] in needed):
        model.to(device if name in needed else "cpu")


def save_memory(pipe: FineLIPSDXLPipeline) -> None:
    """Compute activations again in the backward pass, wherever gradients pass through."""
    pipe.unet.enable_gradient_checkpointing()
    pipe.unet.train()  # there is no dropout in SDXL: this only turns on what was enabled
    for name in ENCODERS:
        encoder = getattr(pipe, name)
        encoder.activation_checkpointing_enable()
        encoder.train()


def precomputed_folder(arguments: argparse.Namespace) -> Path:
    """One of its own for whatever gives other latents or states."""
    names = ("base", "finelip", "finelip_2", "captions", "images", "resolution", "mixed_precision")
    made_of: dict[str, Any] = {name: str(getattr(arguments, name)) for name in names}
    made_of |= {"states": arguments.method == "adapter", "skip_missing_images": arguments.skip_missing_images}
    digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
    return (arguments.precomputed or arguments.output_dir / "precomputed") / digest[:16]


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
    """Noise and timesteps depend on the seed and on the batch's number among those of all processes."""
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
    """Batches of this process without end, from number `first` on."""
    order = ResumableBatchSampler(
        size, 1, arguments.batch_size, arguments.seed, accelerator.num_processes, accelerator.process_index
    )
    return endless(order, order.set_epoch, first)


def num_long(arguments: argparse.Namespace) -> int:
    """Long captions in a batch; the others are short."""
    return min(max(1, round(arguments.batch_size * (1 - arguments.short_share))), arguments.batch_size - 1)


def validation_prompts(arguments: argparse.Namespace, data: CaptionDataset) -> list[str]:
    if arguments.validation_prompts is None:
        return [data.captions(index)[0] for index in range(min(4, len(data)))]
    if not arguments.validation_prompts.is_file():
        raise FileNotFoundError(f"--validation-prompts {arguments.validation_prompts} does not exist, or is no file.")
    prompts = [line.strip() for _, line in lines_of(read_text(arguments.validation_prompts))]
    if not prompts:
        raise ValueError(f"--validation-prompts {arguments.validation_prompts} holds no text: write a prompt a line.")
    return prompts


def draw(
    stock: StableDiffusionXLPipeline, pipe: FineLIPSDXLPipeline, prompts: list[str], arguments: argparse.Namespace
) -> Image.Image:
    """Two rows: stock, and aligned, from the same noise."""
    images = []
    for drawing in (stock, pipe):
        for seed, prompt in enumerate(prompts):
            images += drawing(
                prompt,
                width=arguments.resolution,
                height=arguments.resolution,
                num_inference_steps=20,
                guidance_scale=arguments.guidance_scale,
                generator=torch.Generator().manual_seed(seed),
            ).images
    return make_image_grid(images, rows=2, cols=len(prompts))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="align_adapter.py",
        usage="%(prog)s [--base SDXL] [--finelip CLIP] [--finelip-2 CLIP] [--captions KIND:PATH] [flags]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    hidden_dim, rank = number(int, above=0, most=16_384), number(int, above=0, most=1024)
    resolution, guidance = number(int, above=0, most=4096), number(float, least=0, most=100)
    gamma, decay = number(float, above=0), number(float, least=0, below=1)
    presets = SDXL, MINIATURE

    group = parser.add_argument_group("what is aligned with what")
    add = group.add_argument
    add("--base", default="miniature", metavar="SDXL", help="hub id, directory or single file (.safetensors) of any "
        "SDXL, whose own encoders teach (default: %(default)s, the small one that comes with the package)")  # fmt: skip
    add("--config", metavar="NAME", help="hub id or directory of configs and tokenizers for a single file (default: "
        "Diffusers' choice on the hub)")  # fmt: skip
    add("--variant", metavar="NAME", help="of the base's files, such as fp16")
    add("--finelip", metavar="CLIP", help="replaces the first text encoder: hub id, directory or checkpoint file "
        "(default: that encoder, stretched; for the miniature miniature-finelip-1)")  # fmt: skip
    add("--finelip-2", metavar="CLIP", help="replaces the second (default: as above)")
    add("--method", choices=("adapter", "lora"), default="adapter", help="what is trained (default: %(default)s)")
    add_preset(group, "hidden-dim", hidden_dim, "N", "width of the adapter's hidden layers", presets)
    add_preset(group, "rank", rank, "N", "of the LoRA", presets)

    group = parser.add_argument_group("what it learns from")
    add = group.add_argument
    add("--captions", metavar="KIND:PATH", help="sharegpt4v, docci, urban1k, coco, flickr30k, csv, jsonl or, for stage "
        "1 alone, txt (a caption a line) and a path, or miniature:SCENES (default for the miniature: "
        f"{MINIATURE['captions']})")  # fmt: skip
    add("--images", type=path, metavar="FOLDER", help="of the images, if they are not beside the captions")
    add("--skip-missing-images", action="store_true", help="leave out, and count, images whose files are not there")
    add("--short-share", type=SHARE, default=0.4, metavar="SHARE", help="of short captions in a batch: without them, "
        "short prompts get worse (default: %(default)s)")  # fmt: skip
    add_preset(
        group, "resolution", resolution, "PIXELS", "of the square that is cut from the middle of each image", presets
    )
    add("--precomputed", type=path, metavar="FOLDER", help="of latents and text states, which runs can share (default: "
        "precomputed/ in --output-dir)")  # fmt: skip

    group = parser.add_argument_group("optimization")
    add_preset(group, "text-steps", STEPS_OR_NONE, "N", "of stage 1; 0 leaves it out", presets)
    add_preset(group, "image-steps", STEPS_OR_NONE, "N", "of stage 2; 0 leaves it out", presets)
    add_preset(group, "batch-size", BATCH, "CAPTIONS", "of each process and step", presets)
    add_preset(group, "learning-rate", AMOUNT, "X", "peak, in both stages", presets)
    add = group.add_argument
    add(
        "--gradient-accumulation-steps",
        type=BATCH,
        default=1,
        metavar="N",
        help="batches a step (default: %(default)s)",
    )
    add("--weight-decay", type=AMOUNT, default=1e-2, metavar="X", help="of AdamW (default: %(default)s)")
    add("--max-grad-norm", type=AMOUNT, default=1.0, metavar="X", help="0 for no limit (default: %(default)s)")
    add("--snr-gamma", type=gamma, metavar="X", help="weigh timesteps by min-SNR, customarily "
        "with 5 (default: all alike)")  # fmt: skip
    add("--ema-decay", type=decay, default=0.995, metavar="X", help="of the average of weights that comes "
        "out (default: %(default)s)")  # fmt: skip
    add("--seed", type=SEED, default=0, metavar="N", help="of weights, order and noise (default: %(default)s)")

    group = add_run_flags(parser, Path("runs/alignment"), models="last/ and, of two stages, after-text/ result")
    add = group.add_argument
    add("--validate-every", type=STEPS_OR_NONE, default=100, metavar="STEPS", help="between pictures of the "
        "validation prompts by stock and aligned, to validation/ and TensorBoard; 0 for none (default: "
        "%(default)s)")  # fmt: skip
    add("--validation-prompts", type=path, metavar="FILE", help="a prompt a line (default: the first four captions)")
    add_preset(group, "guidance-scale", guidance, "X", "of those pictures", presets)
    add_accelerator_flags(group)
    options = parser.parse_args(arguments)

    is_miniature = options.base == "miniature"
    if options.captions is None and not is_miniature:
        parser.error(f"--base {options.base} needs --captions, such as sharegpt4v:captions.json")
    fill_in(options, MINIATURE if is_miniature else SDXL)
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    diffusers_logging.set_verbosity_error()  # stock would name all that it cuts of the validation prompts
    diffusers_logging.disable_progress_bar()
    run_recipe("align_adapter.py", align, parse, arguments)


if __name__ == "__main__":
    main()
