"""Train a FineLIP: a CLIP of 248 text positions, with token refinement and late interaction, on long captions.

    python training/train_finelip.py
    python training/train_finelip.py --base openai/clip-vit-large-patch14 --data sharegpt4v:captions.json
    accelerate launch --num_processes 8 training/train_finelip.py --base ... --data ... --mixed-precision bf16

Without arguments it trains the miniature's first CLIP on scenes of the miniature world. With another --base, the
defaults are the paper's (arXiv 2504.01916): its triplet loss on late interaction, AdamW, cosine, six epochs. Both are
presets, TOML files to copy and change for --config.

Batches, captions and augmentation depend on the seed, the epoch and the image alone (with shards also on the number of
workers), and the learning rate on the step. So a stopped run, even after kill -9, goes on from its last checkpoint as
if nothing had happened.
"""

from __future__ import annotations

import argparse
import copy
import math
import shlex
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

from finelip_sdxl.console import announce, quiet_imports, quiet_transformers
from finelip_sdxl.training.command_line import run_recipe
from finelip_sdxl.training.flags import train_finelip as flags

if __name__ == "__main__":  # wrong flags are refused before the imports that take seconds and would print warnings
    quiet_imports()
    run_recipe("train_finelip.py", flags.check, partial(flags.parse, description=__doc__), None)
    announce("The flags are in order; opening the models…")


import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, send_to_device, set_seed
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from finelip_sdxl import FineLIPModel, load_finelip
from finelip_sdxl.data import (
    CaptionAugmentation,
    ImageTextDataset,
    ResumableBatchSampler,
    TrainingShards,
    collate,
    load_image_processor,
    load_tokenizer,
    open_dataset,
)
from finelip_sdxl.evaluation import RetrievalResult, evaluate_retrieval
from finelip_sdxl.options import REFINED_SHARE
from finelip_sdxl.provenance import forget_stretch
from finelip_sdxl.training.command_line import MOST_STEPS, build_accelerator, end_run, fixed_settings, say_disk_needs
from finelip_sdxl.training.health import Health, count_broken
from finelip_sdxl.training.processes import only_run, together
from finelip_sdxl.training.run_folder import RunFolder
from finelip_sdxl.training.schedule import endless, learning_rate_factor
from finelip_sdxl.training.task import LOSSES, FineLIPTask, FrozenTeacher

parse, check = partial(flags.parse, description=__doc__), flags.check
PAPER, MINIATURE = flags.PAPER, flags.MINIATURE
# Flags that may change when a run goes on, beside those of every recipe.
FREE = {"images", "eval_data", "eval_images", "epochs", "max_steps", "eval_every", "dataloader_num_workers"}


def load_base(arguments: argparse.Namespace) -> FineLIPModel:
    """Loads any CLIP in memory of its own, with a token refinement, stretched if it has 77 positions."""
    name, keep = arguments.base, arguments.stretch_keep
    model = copy.deepcopy(load_finelip(name, keep=keep))
    model.float()  # type: ignore[no-untyped-call]
    if model.vision_model is None or model.text_projection is None:
        raise ValueError(f"--base {name} is a text encoder alone: training needs a CLIP with an image tower.")
    if not model.has_token_refinement:
        add_refinement(model, arguments.refined_share, arguments.refinement)
    elif arguments.refined_share or arguments.refinement:
        raise ValueError(f"--base {name} has a token refinement: leave out --refined-share and --refinement.")
    for option in ("interaction_slope", "interaction_pooling"):
        if getattr(arguments, option) is not None:
            setattr(model.config, option, getattr(arguments, option))
    if not arguments.new_positions:
        # As FineLIP and Long-CLIP do: the well-trained first rows stay.
        table = model.text_model.embeddings.position_embedding.weight
        table.register_hook(lambda gradient: torch.cat([torch.zeros_like(gradient[:keep]), gradient[keep:]]))
    return model


def add_refinement(model: FineLIPModel, share: float | None, refined: str | None) -> None:
    """Adds a token refinement of a share of the patches, to both sides or to one."""
    model.add_token_refinement(
        model.refined_tokens_of(share or REFINED_SHARE),
        images=refined in (None, "both", "images"),
        texts=refined in (None, "both", "texts"),
    )


def build_optimizer(model: FineLIPModel, arguments: argparse.Namespace) -> torch.optim.AdamW:
    """Builds AdamW with two learning rates. Vectors and positions have no decay: the first rows must stay."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        rate = arguments.refinement_learning_rate if "_refinement." in name else arguments.learning_rate
        is_vector = parameter.squeeze().dim() < 2 or "position_embedding" in name
        groups.setdefault((rate, 0.0 if is_vector else arguments.weight_decay), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": group, "lr": rate, "peak": rate, "weight_decay": decay} for (rate, decay), group in groups.items()]
    )


def build_loader(
    arguments: argparse.Namespace, tokenizer: Any, image_processor: Any, accelerator: Accelerator
) -> DataLoader[Any]:
    """Builds the loader of this process's batches, from a data set or from shards."""
    augmentation = CaptionAugmentation(arguments.drop_first, arguments.sample_sentences, arguments.prefix_padding)
    share = {"processes": accelerator.num_processes, "process": accelerator.process_index}
    # A generator of its own: resuming draws no numbers from the one that dropout uses.
    options = {
        "collate_fn": collate(tokenizer),
        "num_workers": arguments.dataloader_num_workers,
        "generator": torch.Generator(),
    }
    regions_wanted = f"--region-weight is {arguments.region_weight:g}, but {arguments.data} has no regions: pass 0."
    if arguments.data.startswith("webdataset:"):
        if arguments.region_weight:
            raise ValueError(regions_wanted)
        shards = TrainingShards(
            arguments.data,
            image_processor,
            arguments.batch_size,
            arguments.epoch_size,
            augmentation,
            seed=arguments.seed,
            **share,
        )
        return DataLoader(shards, batch_size=None, **options)
    data = open_dataset(
        arguments.data, split="train", images=arguments.images, skip_missing=arguments.skip_missing_images
    )
    if data.left_out:
        accelerator.print(data.left_out)
    if arguments.region_weight and not data.regions(0):
        raise ValueError(regions_wanted)
    order = ResumableBatchSampler(len(data), data.group_size, arguments.batch_size, arguments.seed, **share)
    pairs = ImageTextDataset(data, image_processor, augmentation, seed=arguments.seed)
    return DataLoader(pairs, batch_sampler=order, **options)


def set_epoch(loader: DataLoader[Any], epoch: int, first_batch: int) -> None:
    """Chooses the epoch and the batch to begin at, for the order and for the draws of each image."""
    if isinstance(loader.dataset, TrainingShards):
        loader.dataset.set_epoch(epoch, first_batch)
    else:
        cast(ImageTextDataset, loader.dataset).set_epoch(epoch)
        cast(ResumableBatchSampler, loader.batch_sampler).set_epoch(epoch, first_batch)


def train(arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains, and returns the progress: the step, the best score, and the number of skipped images."""
    check(arguments)
    parallel = DistributedDataParallelKwargs(find_unused_parameters=not trains_all(arguments))
    accelerator = build_accelerator(arguments, handlers=[parallel])
    with only_run(arguments.output_dir, accelerator):
        progress = train_alone(arguments, accelerator)
    end_run(accelerator, progress, results_of(arguments, progress))
    return progress


def train_alone(arguments: argparse.Namespace, accelerator: Accelerator) -> dict[str, Any]:
    """Trains in a folder that no other run writes to."""
    set_seed(arguments.seed)
    model = load_base(arguments)
    teacher = FrozenTeacher(model) if arguments.distillation_weight else None
    if arguments.new_positions:
        text = model.config.text_config
        nn.init.normal_(model.text_model.embeddings.position_embedding.weight, std=text.initializer_range)
    forget_stretch(model.config.text_config)
    if arguments.gradient_checkpointing:
        model.activation_checkpointing_enable()

    named = arguments.tokenizer or arguments.base
    tokenizer = load_tokenizer(named, model.config.text_config.max_position_embeddings)
    if len(tokenizer) > model.config.text_config.vocab_size:
        raise ValueError(f"The tokenizer of {named} has tokens that {arguments.base} does not know: pass its own.")
    image_processor = load_image_processor(named, model.config.vision_config.image_size)
    loader = build_loader(arguments, tokenizer, image_processor, accelerator)
    eval_data = None
    if arguments.eval_data != "none":
        eval_data = open_dataset(arguments.eval_data, split="test", images=arguments.eval_images)

    weights = {name: getattr(arguments, f"{name}_weight") for name in LOSSES}
    task, optimizer = accelerator.prepare(
        FineLIPTask(model, weights, arguments.margin, arguments.hardest), build_optimizer(model, arguments)
    )
    if teacher is not None:
        teacher.towers.to(accelerator.device)
    # The number of workers decides which of them reads which shard.
    free = FREE - {"dataloader_num_workers"} if arguments.data.startswith("webdataset:") else FREE
    fixed = fixed_settings(arguments, free, accelerator.num_processes)
    run = RunFolder(arguments.output_dir, accelerator, fixed, keep=arguments.checkpoints_total_limit)
    size = 4 * sum(parameter.numel() for parameter in model.parameters())
    needed = {
        "checkpoints": 3 * size * (arguments.checkpoints_total_limit + 1),  # weights and AdamW's two moments
        "models": size * (1 if eval_data is None else 2),
    }
    say_disk_needs(accelerator, arguments.output_dir, needed)
    progress = run.resume() or {"step": 0, "best": None, "skipped": 0}
    if progress["best"] is not None and not run.holds("best"):
        accelerator.print(f"{arguments.output_dir / 'best'} is damaged: the next evaluation writes it anew.")
        progress["best"] = None
    steps_an_epoch = len(loader) / arguments.gradient_accumulation_steps
    steps = arguments.max_steps or math.ceil(arguments.epochs * steps_an_epoch)
    if steps > MOST_STEPS:
        raise ValueError(f"--epochs {arguments.epochs:g} are {steps:,} steps of this data: pass --max-steps.")
    loss_warmup_steps = arguments.loss_warmup_epochs * steps_an_epoch
    if progress["step"] >= steps:
        accelerator.print(
            f"{arguments.output_dir} is complete, with {progress['step']} steps: nothing is left to train."
        )
    if arguments.report_to != "none":
        accelerator.init_trackers("train_finelip", config=fixed)

    source = endless(loader, partial(set_epoch, loader), first=progress["step"] * arguments.gradient_accumulation_steps)
    batches_a_step = arguments.gradient_accumulation_steps * accelerator.num_processes
    health = Health()
    task.train()
    with tqdm(
        initial=progress["step"], total=steps, desc="training", unit="step", disable=not accelerator.is_main_process
    ) as bar:
        while progress["step"] < steps:
            step, started = progress["step"], time.perf_counter()
            factor = learning_rate_factor(step, arguments.warmup_steps, steps)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
            loss_factor = min(1.0, (step + 1) / loss_warmup_steps) if loss_warmup_steps else 1.0
            sums: dict[str, Any] = dict.fromkeys(("loss", *(name for name in LOSSES if weights[name]), "skipped"), 0.0)
            for _ in range(arguments.gradient_accumulation_steps):
                batch = send_to_device(next(source), accelerator.device)
                for name in batch["skipped"]:
                    bar.write(f"skipped: {name}")
                if teacher is not None:
                    batch["teacher_states"], batch["teacher_embeds"] = teacher.encode(batch["short_input_ids"])
                with accelerator.accumulate(task):
                    losses = task(batch)
                    accelerator.backward(loss_factor * losses["loss"])
                    if accelerator.sync_gradients and arguments.max_grad_norm:
                        accelerator.clip_grad_norm_(task.parameters(), arguments.max_grad_norm)
                    optimizer.step()
                    optimizer.zero_grad()
                for name, loss in losses.items():
                    sums[name] += loss.detach()
                sums["skipped"] += torch.tensor(len(batch["skipped"]), device=accelerator.device)
            sums["broken"] = count_broken(task.parameters())
            progress["step"] = step = step + 1

            sums = {name: value.item() for name, value in accelerator.reduce(sums).items()}
            health.check(step, sums["loss"] / batches_a_step, sums.pop("broken"), optimizer.step_was_skipped)
            progress["skipped"] += int(sums.pop("skipped"))
            figures = {name: value / batches_a_step for name, value in sums.items()}
            figures["pairs_per_second"] = arguments.batch_size * batches_a_step / (time.perf_counter() - started)
            bar.set_postfix({name: f"{figure:.3g}" for name, figure in figures.items()})
            bar.update()
            figures["learning_rate"] = arguments.learning_rate * factor
            if eval_data is not None and (step % arguments.eval_every == 0 or step == steps):
                with together(accelerator):
                    if accelerator.is_main_process:
                        result = evaluate_retrieval(
                            model,
                            eval_data,
                            tokenizer,
                            image_processor,
                            all_tokens=arguments.refinement == "none",
                            progress=False,
                        )
                        figures |= retrieval_figures(result)
                        bar.write(f"step {step}\n{result}")
                        if result.unreadable:
                            count, first = len(result.unreadable), result.unreadable[0]
                            bar.write(f"left out {count:,} unreadable images; the first is {first}")
                        if progress["best"] is None or figures["recall"] > progress["best"]:
                            progress["best"] = figures["recall"]
                            run.save_model("best", model, tokenizer, image_processor)
            accelerator.log(figures, step=step)
            if step % arguments.checkpointing_steps == 0 or step == steps:
                run.save(progress)
    with together(accelerator):
        run.save_model("last", model, tokenizer, image_processor)
    return progress


def results_of(arguments: argparse.Namespace, progress: dict[str, Any]) -> list[str]:
    """Returns lines about a run's results, and the commands that use them."""
    best = arguments.output_dir / ("last" if progress["best"] is None else "best")
    name = shlex.quote(str(best))
    lines = [f"result: {best}"]
    if progress["best"] is not None:
        lines.append(f"best recall at 1: {100 * progress['best']:.1f} %, {arguments.output_dir / 'last'} is the last")
    if progress["skipped"]:
        lines.append(f"left out: {progress['skipped']:,} images that cannot be read")
    return [
        *lines,
        f"to measure it: finelip-sdxl evaluate retrieval --model {name}",
        f"to align it with SDXL: python training/align_adapter.py --finelip {name}",
    ]


def trains_all(arguments: argparse.Namespace) -> bool:
    """Returns whether all parameters have gradients. The triplet loss alone has none for the scale, losses without late
    interaction none for the refinement."""
    scaled = arguments.contrastive_weight + arguments.region_weight + arguments.fine_contrastive_weight
    return bool(arguments.triplet_weight + arguments.fine_contrastive_weight > 0 and scaled > 0)


def retrieval_figures(result: RetrievalResult) -> dict[str, float]:
    """Returns Recall@1 by similarity and direction, and under `recall` its mean for the fused similarity."""
    figures = {}
    for name, recall in result.recall.items():
        figures[f"{name}_image_to_text"] = recall.image_to_text[1]
        figures[f"{name}_text_to_image"] = recall.text_to_image[1]
    return {**figures, "recall": (figures["fused_image_to_text"] + figures["fused_text_to_image"]) / 2}


def main(arguments: Sequence[str] | None = None) -> None:
    quiet_transformers()
    run_recipe("train_finelip.py", train, parse, arguments)


if __name__ == "__main__":
    main()
