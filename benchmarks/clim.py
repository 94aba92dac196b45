"""Time and memory of FineLIP's similarity and loss, forward and backward, against two other ways.

    python benchmarks/clim.py
    python benchmarks/clim.py --batch-sizes 128 --ours-only 256 512 1024
    python benchmarks/clim.py --tokens all --batch-sizes 8 16

The loop compares one caption after the other, as the published code does. "Twice" compares in blocks as the package
does, but computes each block again in the backward pass, as the package did before it kept the places of the maxima.

A step is token refinement, late interaction and triplet margin loss of random tokens, and the gradients of the tokens
and of the refinement's weights. Each row is measured in a process of its own; its memory is the peak without the
inputs. An error ends the script if the ways differ in loss or gradients.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from finelip_sdxl import TokenRefinement, late_interaction, triplet_margin_loss
from finelip_sdxl.report import command_line, most_memory, report_header

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that this runs as a script

from benchmarks.naive_clim import late_interaction_loop, late_interaction_twice, refined_similarity_loop

# A class token and 14 × 14 patches, FineLIP's positions, the width of CLIP-L.
IMAGE_TOKENS, TEXT_TOKENS, DIM = 197, 248, 768
REFINED_TOKENS = (IMAGE_TOKENS - 1) // 5


class Measured(NamedTuple):
    """One way to compute a step, at one batch size."""

    seconds: float
    mebibytes: float
    loss: float
    gradient: float  # norm of all gradients together


def refined_similarity(
    image_refinement: TokenRefinement,
    text_refinement: TokenRefinement,
    image_tokens: Tensor,
    text_tokens: Tensor,
    lengths: Tensor,
    compare: Callable[..., Tensor] = late_interaction,
) -> Tensor:
    """The package's way, for the whole batch at once; see `refined_similarity_loop`."""
    end = lengths[:, None] - 1
    before_end = torch.arange(text_tokens.shape[1], device=end.device) < end
    texts = torch.cat([text_refinement(text_tokens, before_end), text_tokens.take_along_dim(end[..., None], 1)], dim=1)
    images = torch.cat([image_tokens[:, :1], image_refinement(image_tokens[:, 1:])], dim=1)
    return compare(images, texts)


def all_similarity(
    image_tokens: Tensor,
    text_tokens: Tensor,
    lengths: Tensor,
    compare: Callable[..., Tensor] = late_interaction,
) -> Tensor:
    """The package's way, without refinement; see `late_interaction_loop`."""
    mask = torch.arange(text_tokens.shape[1], device=lengths.device) < lengths[:, None]
    return compare(image_tokens, text_tokens, text_mask=mask)


refined_twice = partial(refined_similarity, compare=late_interaction_twice)
all_twice = partial(all_similarity, compare=late_interaction_twice)


def measure(way: str, batch: int, flags: argparse.Namespace) -> Measured:
    torch.set_num_threads(flags.threads)
    torch.manual_seed(0)
    options = {"device": flags.device, "dtype": getattr(torch, flags.dtype)}
    image_tokens = torch.randn(batch, IMAGE_TOKENS, DIM, **options).requires_grad_()
    text_tokens = torch.randn(batch, TEXT_TOKENS, DIM, **options).requires_grad_()
    lengths = torch.randint(TEXT_TOKENS // 2, TEXT_TOKENS + 1, (batch,)).to(flags.device)
    learned = [image_tokens, text_tokens]
    if flags.tokens == "refined":
        refinements = [TokenRefinement(DIM, REFINED_TOKENS).to(**options) for _ in range(2)]
        learned += [weight for refinement in refinements for weight in refinement.parameters()]
        ways = {"loop": refined_similarity_loop, "twice": refined_twice, "ours": refined_similarity}
        similarity = partial(ways[way], *refinements)
    else:
        similarity = {"loop": late_interaction_loop, "twice": all_twice, "ours": all_similarity}[way]

    def step(count: int) -> Tensor:
        for tensor in learned:
            tensor.grad = None
        loss = triplet_margin_loss(
            similarity(image_tokens[:count], text_tokens[:count], lengths[:count]), torch.arange(count).to(flags.device)
        )
        loss.backward()
        return loss.detach()

    on_cuda = flags.device == "cuda"
    before, seconds = torch.cuda.memory_allocated() if on_cuda else most_memory(), []
    step(2)  # starts threads and kernels
    for _ in range(flags.repeats):
        started = time.perf_counter()
        loss = step(batch).item()  # waits for the device
        seconds.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() if on_cuda else most_memory()
    gradient = torch.stack([tensor.grad.float().norm() for tensor in learned]).norm().item()
    return Measured(statistics.median(seconds), (peak - before) / 2**20, loss, gradient)


def measure_apart(way: str, batch: int, flags: argparse.Namespace) -> Measured | None:
    """Call `measure` in a process of its own; None if the memory is not enough."""
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            return process.submit(measure, way, batch, flags).result()
    except (BrokenProcessPool, torch.OutOfMemoryError):  # killed by the system, or refused by the device
        return None


def check_equal(name: str, opponent: Measured, ours: Measured, dtype: str) -> None:
    """Raise a ValueError if loss or gradients differ."""
    for what in ("loss", "gradient"):
        one, other = getattr(opponent, what), getattr(ours, what)
        if not abs(one - other) <= (1e-3 if dtype == "float32" else 5e-2) * abs(one):
            raise ValueError(f"The {what} of the {name} is {one:.8g} and ours {other:.8g}: they should be equal.")


def print_row(*cells: object) -> None:
    print("|", " | ".join(map(str, cells)), "|", flush=True)


def cells_of(result: Measured | None) -> tuple[str, str]:
    """Seconds and MiB."""
    return ("does not fit", "–") if result is None else (f"{result.seconds:.3g}", f"{result.mebibytes:.0f}")


def compare(flags: argparse.Namespace) -> None:
    ways = ("loop", "twice", "ours")
    seconds, memory = ([f"{way}, {unit}" for way in ways] for unit in ("s", "MiB"))
    print_row("batch", *seconds, "loop / ours", "twice / ours", *memory, "loop / ours, MiB")
    print_row(*["---"] * 10)
    for batch in flags.batch_sizes:
        loop, twice, ours = found = [measure_apart(way, batch, flags) for way in ways]
        for name, opponent in (("loop", loop), ("way of before", twice)):
            if opponent and ours:
                check_equal(name, opponent, ours, flags.dtype)
        seconds, memory = zip(*map(cells_of, found), strict=True)
        faster = [ratio(opponent and opponent.seconds, ours and ours.seconds) for opponent in (loop, twice)]
        smaller = ratio(loop and loop.mebibytes, ours and max(ours.mebibytes, 1))
        print_row(batch, *seconds, *faster, *memory, smaller)


def ratio(one: float | None, other: float | None) -> str:
    return f"{one / other:.1f}" if one is not None and other is not None else "–"


def show_ours(flags: argparse.Namespace) -> None:
    print()
    print_row("batch", "ours, s", "ours, MiB", "KiB a pair")
    print_row(*["---"] * 4)
    for batch in flags.ours_only:
        ours = measure_apart("ours", batch, flags)
        print_row(batch, *cells_of(ours), "–" if ours is None else f"{2**10 * ours.mebibytes / batch:.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--batch-sizes",
        type=int,
        nargs="*",
        default=[16, 32, 64, 128],
        metavar="N",
        help="batch sizes of all ways (default: 16 32 64 128)",
    )
    add(
        "--ours-only",
        type=int,
        nargs="*",
        default=[],
        metavar="N",
        help="batch sizes of the package's way alone (default: none)",
    )
    add("--tokens", choices=("refined", "all"), default="refined", help="tokens to compare (default: %(default)s)")
    add("--repeats", type=int, default=3, metavar="N", help="steps; the median counts (default: %(default)s)")
    add("--threads", type=int, default=2, metavar="N", help="threads of the CPU (default: %(default)s)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="device to measure (default: %(default)s)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="type of all tensors "
        "(default: %(default)s)")  # fmt: skip
    flags = parser.parse_args()
    if min([*flags.batch_sizes, *flags.ours_only, 2]) < 2 or min(flags.repeats, flags.threads) < 1:
        parser.error("batch sizes begin at 2, repeats and threads at 1")
    if flags.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has no CUDA device, use --device cpu")

    device = torch.cuda.get_device_name() if flags.device == "cuda" else f"{flags.threads} threads"
    command = command_line("python benchmarks/clim.py", sys.argv[1:])
    print(f"{report_header(device=device)}: `{command}`\n")
    try:
        compare(flags)
    except ValueError as error:
        sys.exit(str(error))
    if flags.ours_only:
        show_ours(flags)


if __name__ == "__main__":
    main()
