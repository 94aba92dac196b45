"""Cost of a picture's steps by the length of its prompt, with and without the cache of the text's keys and values.

    python benchmarks/text_projections.py
    python benchmarks/text_projections.py --pictures 0

The first table counts operations of SDXL's UNet at 1024 × 1024 pixels with guidance, relative to a UNet without the
cache at 77 positions. It is exact, and needs no memory: the weights are on PyTorch's meta device. The second table is
the time of the miniature's pictures with the cache, relative to the same without, taken in turns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence

import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from finelip_sdxl import FineLIPSDXLPipeline
from finelip_sdxl.pipelines.text_projections import cached_text_projections
from finelip_sdxl.report import command_line, report_header
from finelip_sdxl.sdxl_sizes import UNET

POSITIONS = (77, 154, 248, 496, 992)


def operations(unet: UNet2DConditionModel, positions: int, steps: int, cache: bool) -> int:
    """Operations of a picture's steps, all of which cost the same after the second."""
    options = {"device": "meta"}
    text = torch.empty(2, positions, UNET["cross_attention_dim"], **options)
    pooled_dim = UNET["projection_class_embeddings_input_dim"] - 6 * UNET["addition_time_embed_dim"]
    added = {"text_embeds": torch.empty(2, pooled_dim, **options), "time_ids": torch.empty(2, 6, **options)}
    latents, timestep, counts = torch.empty(2, 4, 128, 128, **options), torch.empty(1, **options), []
    with torch.no_grad(), cached_text_projections([unet] if cache else []):
        for _ in range(2):
            with FlopCounterMode(display=False) as counter:
                unet(latents, timestep, text, added_cond_kwargs=added)
            counts.append(counter.get_total_flops())
    return counts[0] + (steps - 1) * counts[1]


def seconds(pipe: FineLIPSDXLPipeline, embeddings: Sequence[torch.Tensor], steps: int, cache: bool) -> float:
    """Time of a picture from embeddings."""
    (pipe.enable_text_projection_cache if cache else pipe.disable_text_projection_cache)()
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    started = time.perf_counter()
    pipe(**dict(zip(names, embeddings, strict=True)), num_inference_steps=steps, output_type="latent")
    return time.perf_counter() - started


def print_row(*cells: object) -> None:
    print("|", " | ".join(map(str, cells)), "|", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--steps", type=int, default=30, metavar="N", help="steps of a picture (default: %(default)s)")
    add(
        "--pictures", type=int, default=5, metavar="N", help="pictures of the miniature each way (default: %(default)s)"
    )
    flags = parser.parse_args()
    if flags.steps < 1 or flags.pictures < 0:
        parser.error("steps begin at 1, pictures at 0")
    command = command_line("python benchmarks/text_projections.py", sys.argv[1:])
    print(f"{report_header(device=f'{torch.get_num_threads()} threads')}: `{command}`\n")

    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNET)
    stock = operations(unet, POSITIONS[0], flags.steps, cache=False)
    print_row("positions", "operations without", "with the cache")
    print_row(*["---"] * 3)
    for positions in POSITIONS:
        counts = [operations(unet, positions, flags.steps, cache) / stock for cache in (False, True)]
        print_row(positions, *(f"{count:.4f}" for count in counts))
    if not flags.pictures:
        return

    pipe = FineLIPSDXLPipeline.from_pretrained("miniature")
    pipe.set_progress_bar_config(disable=True)
    print()
    print_row("positions", "time of the miniature with the cache, of the time without", "least", "most")
    print_row(*["---"] * 4)
    for sentences in (1, 12, 20):
        with torch.no_grad():
            embeddings = pipe.encode_prompt("A red star is in the top left. " * sentences)
        ratios = []
        for number in range(flags.pictures + 1):
            ways = (False, True) if number % 2 else (True, False)
            taken = {cache: seconds(pipe, embeddings, flags.steps, cache) for cache in ways}
            ratios += [taken[True] / taken[False]] if number else []
        print_row(
            embeddings[0].shape[1], *(f"{part:.3f}" for part in (statistics.median(ratios), min(ratios), max(ratios)))
        )


if __name__ == "__main__":
    main()
