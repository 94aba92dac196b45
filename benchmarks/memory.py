"""Memory of SDXL's weights, random but of real size, by the parts of a pipeline and the way of offloading.

    python benchmarks/memory.py
    python benchmarks/memory.py --device cuda
    python benchmarks/memory.py --only swaps

On a GPU, each row is measured: peak memory, activations included, while a prompt of two windows is encoded, while one
step is denoised, and while a picture is decoded. Without a GPU, weights are counted: a real pipeline is built and its
encoders are swapped, but nothing runs, and its memory is never written.

A second table has the cost of a swap on the CPU: checkpoints of real size are loaded from files and take the place of
text encoders. Each row is measured in a process of its own: the growth of the process at its peak, mapped files
included, and the seconds of `swap_text_encoders`.
"""

# ruff: noqa: E402  (flags are parsed before the imports that take seconds)

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from finelip_sdxl.console import Parser, number


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    flags = Parser(prog="memory.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--only", choices=("pipelines", "swaps"), help="table to print (default: both)")
    text, side = "width and height of pictures (default: %(default)s)", number(int, least=64, most=4096)
    flags.add_argument("--resolution", type=side, default=1024, metavar="PIXELS", help=text)
    text = "device to measure (default: cuda if there is one)"
    flags.add_argument("--device", choices=("cpu", "cuda"), help=text)
    return flags.parse_args(arguments)


if __name__ == "__main__":  # wrong flags are refused before the imports that take seconds
    parse()

import torch
from torch import nn

from finelip_sdxl import FineLIPConfig, FineLIPModel, FineLIPSDXLPipeline
from finelip_sdxl.options import ENCODERS
from finelip_sdxl.report import most_memory, report_header
from finelip_sdxl.sdxl_sizes import BIG_G, CLIP_L, VIT_L

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that this runs as a script

from benchmarks.real_size import build_pipeline, build_swapped, materialize

GIB = 2**30

PHASES = ("encoding", "denoising", "decoding")
OFFLOADS = ("none", "model", "group, by blocks", "group, by layers", "sequential")
PROMPT = "a red star above a blue ring. " * 60
SWAPS = {
    "CLIP-L, from a whole FineLIP": ("text_encoder",),
    "bigG, from a text tower": ("text_encoder_2",),
    "both": tuple(ENCODERS),
}
FULLEST = 'both replaced, `"original"`, adapter'


def contents() -> dict[str, Callable[[bool], FineLIPSDXLPipeline]]:
    """Builders of the pipelines by name. Its argument says whether weights are filled, for computing with them."""
    return {
        "stock SDXL": build_pipeline,
        "both encoders stretched": build_swapped,
        'CLIP-L replaced, `short_prompt_encoder="original"`': partial(build_swapped, replaced=("text_encoder",)),
        'CLIP-L replaced, `"long"`': partial(build_swapped, replaced=("text_encoder",), short_prompt_encoder="long"),
        'both replaced, `"original"`': partial(build_swapped, replaced=ENCODERS),
        'both replaced, `"long"`': partial(build_swapped, replaced=ENCODERS, short_prompt_encoder="long"),
        FULLEST: partial(build_swapped, replaced=ENCODERS, has_adapter=True),
    }


def offload(pipe: FineLIPSDXLPipeline, how: str, device: str) -> None:
    """Move a pipeline to `device`, with offloading as `how` says."""
    if how == "none":
        pipe.to(device)
    elif how == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif how == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        kind = "block_level" if how == "group, by blocks" else "leaf_level"
        blocks = 1 if kind == "block_level" else None
        pipe.enable_group_offload(torch.device(device), offload_type=kind, num_blocks_per_group=blocks)


# Counting


def total(pipe: FineLIPSDXLPipeline) -> int:
    """Bytes of all weights."""
    return _size(part for part in pipe.components.values() if isinstance(part, nn.Module))


def counted(pipe: FineLIPSDXLPipeline, how: str) -> list[int]:
    """Most bytes of weights on the accelerator at once, in each phase."""
    encoding = [getattr(pipe, name) for name in (*ENCODERS, "conditioning_adapter")]
    phases = [[part for part in encoding if part is not None], [pipe.unet], [pipe.vae]]
    at_once: dict[str, Callable[[nn.Module], int]] = {
        "model": lambda part: _size([part]),
        "group, by blocks": _largest_block,
        "group, by layers": _largest_layer,
        "sequential": _largest_layer,
    }
    if how == "none":
        return [total(pipe)] * len(phases)
    return [max(map(at_once[how], parts)) for parts in phases]


def _size(modules: Iterable[nn.Module]) -> int:
    weights = {id(weight): weight for module in modules for weight in module.parameters()}
    return sum(weight.numel() * weight.element_size() for weight in weights.values())


def _largest_block(module: nn.Module) -> int:
    """Bytes on the device when Diffusers loads one block at a time: the largest block, and all parts outside blocks."""
    within = getattr(module, "_group_offload_block_modules", None) or ()
    blocks, others = [0], sum(weight.numel() * weight.element_size() for weight in module.parameters(recurse=False))
    for name, child in module.named_children():
        if name in within:
            blocks.append(_largest_block(child))
        elif isinstance(child, nn.ModuleList | nn.Sequential):
            blocks += [_size([block]) for block in child]
        else:
            others += _size([child])
    return others + max(blocks)


def _largest_layer(module: nn.Module) -> int:
    return max(
        sum(weight.numel() * weight.element_size() for weight in layer.parameters(recurse=False))
        for layer in module.modules()
    )


# Measuring the swap


def write_checkpoints(folder: Path) -> None:
    """Write two FineLIPs of random weights: CLIP-L with image tower and refinement, and bigG's text tower alone."""
    with torch.device("meta"):
        whole = FineLIPConfig(
            text_config={**CLIP_L, "max_position_embeddings": 248},
            vision_config=VIT_L,
            projection_dim=768,
            refined_image_tokens=51,
            refined_text_tokens=51,
        )
        tower = FineLIPConfig(
            text_config={**BIG_G, "max_position_embeddings": 248}, projection_dim=BIG_G["projection_dim"]
        )
        models = {"text_encoder": FineLIPModel(whole), "text_encoder_2": FineLIPModel(tower)}
    for name, model in models.items():
        materialize(model, filled=True)
        model.save_pretrained(folder / name)


def measured_swap(folder: Path, replaced: Collection[str]) -> tuple[float, float]:
    """Growth of the process at its peak, in bytes, and seconds of a swap of these encoders."""
    pipe = build_pipeline(filled=False)
    before, started = most_memory(), time.perf_counter()
    pipe.swap_text_encoders(*(folder / name if name in replaced else None for name in ENCODERS))
    return most_memory() - before, time.perf_counter() - started


def print_swaps() -> None:
    """Print the table of swaps."""
    print("\n| swap, bfloat16, on the CPU | files | most memory | seconds |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            process.submit(write_checkpoints, folder).result()
        for what, replaced in SWAPS.items():
            size = sum(file.stat().st_size for part in replaced for file in (folder / part).iterdir())
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                grown, seconds = process.submit(measured_swap, folder, replaced).result()
            print(f"| {what} | {size / GIB:.2f} | {grown / GIB:.2f} | {seconds:.1f} |", flush=True)


# Measuring


@torch.no_grad()
def measured(pipe: FineLIPSDXLPipeline, how: str, device: str, resolution: int) -> list[int]:
    """Peak memory of a GPU in bytes, in each phase."""
    pipe.set_progress_bar_config(disable=True)
    offload(pipe, how, device)
    peaks = []

    def run(phase: Callable[[], Any]) -> Any:
        torch.cuda.reset_peak_memory_stats()
        result = phase()
        peaks.append(torch.cuda.max_memory_allocated())
        pipe.maybe_free_model_hooks()
        return result

    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    embeddings = dict(zip(names, run(lambda: pipe.encode_prompt(PROMPT)), strict=True))
    size = {"width": resolution, "height": resolution}
    latents = run(lambda: pipe(**embeddings, **size, num_inference_steps=1, output_type="latent").images)
    run(lambda: pipe.vae.decode(latents.to(pipe.vae.dtype) / pipe.vae.config.scaling_factor))
    return peaks


def print_pipelines(device: str, resolution: int) -> None:
    """Print the table of pipelines."""
    is_measured = device == "cuda"
    what = "measured, activations included" if is_measured else "weights alone, counted"
    print(
        f"\n| pipeline, bfloat16, {what} | offload | weights in all |",
        " | ".join(PHASES),
        "|\n|---|---|---|---|---|---|",
    )
    rows = [(name, "none") for name in contents()] + [(FULLEST, how) for how in OFFLOADS[1:]]
    for name, how in rows:
        pipe = contents()[name](is_measured)
        weights = total(pipe)
        peaks = measured(pipe, how, device, resolution) if is_measured else counted(pipe, how)
        cells = [f"{count / GIB:.2f}" for count in (weights, *peaks)]
        print(f"| {name} | {how} |", " | ".join(cells), "|", flush=True)
        del pipe


def main() -> None:
    arguments = parse()
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{report_header(device=torch.cuda.get_device_name() if device == 'cuda' else None)}; GiB")
    if arguments.only != "swaps":
        print_pipelines(device, arguments.resolution)
    if arguments.only != "pipelines":
        print_swaps()


if __name__ == "__main__":
    main()
