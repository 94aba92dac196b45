"""Cost of `trace_attention` at real size: SDXL's UNet at 1024 × 1024 pixels, with guidance.

    python benchmarks/attention_maps.py
    python benchmarks/attention_maps.py --repeats 0

The first table is of the whole UNet on PyTorch's meta device, by its real config and without weights: the maps that
are summed, their bytes, the most bytes that tracing holds at once, and the operations of a step with tracing, relative
to a step without. It is exact, and the same for every step. The second table is the processor time of one real
transformer block of each of the UNet's two sizes on the CPU, with random weights, relative to the same without.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from finelip_sdxl.attribution import sums
from finelip_sdxl.attribution.sums import AttentionSums
from finelip_sdxl.report import command_line, report_header
from finelip_sdxl.sdxl_sizes import UNET

POSITIONS = (77, 248, 992)
LATENTS = 128
# Width and heads of the UNet's transformer blocks by the side of their maps
BLOCKS = {64: (640, 10), 32: (1280, 20)}
MB = 1e6


class MostMemory(TorchDispatchMode):
    """The most bytes of tensors made within this context that live at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.most, self._now, self._known = 0, 0, set[int]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **kwargs or {})
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, torch.Tensor):
                self._hold(tensor.untyped_storage())
        return made

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._known:
            self._known.add(key)
            self._now += storage.nbytes()
            self.most = max(self.most, self._now)
            weakref.finalize(storage, self._free, key, storage.nbytes())

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._now -= size


def step(unet: nn.Module, positions: int, tracing: AttentionSums | None) -> tuple[int, int]:
    """Operations of a step, and the most bytes that its tracing holds at once."""
    made = {"device": "meta", "dtype": torch.float16}
    pooled_dim = UNET["projection_class_embeddings_input_dim"] - 6 * UNET["addition_time_embed_dim"]
    added = {"text_embeds": torch.empty(2, pooled_dim, **made), "time_ids": torch.empty(2, 6, **made)}
    latents, text = torch.empty(2, 4, LATENTS, LATENTS, **made), torch.empty(2, positions, 2048, **made)
    memory = MostMemory()
    with torch.no_grad(), ExitStack() as stack:
        if tracing is not None:
            stack.enter_context(tracing.summing(unet))
            stack.callback(setattr, sums, "_attention", sums._attention)
            sums._attention = _within(memory, sums._attention)
        operations = stack.enter_context(FlopCounterMode(display=False))
        unet(latents, torch.empty(1, device="meta"), text, added_cond_kwargs=added)
    return operations.get_total_flops(), memory.most


def _within(memory: MostMemory, function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def call(*arguments: Any) -> torch.Tensor:
        with memory:
            return function(*arguments)

    return call


class OneBlock(nn.Module):
    """A transformer block in the place of the UNet."""

    def __init__(self, side: int) -> None:
        super().__init__()
        width, heads = BLOCKS[side]
        self.block = BasicTransformerBlock(width, heads, width // heads, cross_attention_dim=2048)

    def forward(self, sample: torch.Tensor, states: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return self.block(states, encoder_hidden_states=text)


def block_seconds(side: int, positions: int, repeats: int) -> list[float]:
    """Processor time of a block with tracing, relative to the same without, in turns."""
    block, ratios = OneBlock(side), []
    inputs = torch.empty(2, 4, LATENTS, LATENTS), torch.randn(2, side * side, BLOCKS[side][0])
    text = torch.randn(2, positions, 2048)
    with torch.no_grad():
        for number in range(repeats):
            seconds = {}
            for is_traced in (False, True) if number % 2 else (True, False):
                with ExitStack() as stack:
                    if is_traced:
                        stack.enter_context(AttentionSums(lambda rows: slice(1, 2)).summing(block))
                    started = time.process_time()
                    block(*inputs, text)
                    seconds[is_traced] = time.process_time() - started
            ratios.append(seconds[True] / seconds[False])
    return ratios


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    text = "measurements of each block; 0 for the first table alone (default: %(default)s)"
    flags.add_argument("--repeats", type=int, default=3, metavar="N", help=text)
    arguments = flags.parse_args()
    if arguments.repeats < 0:
        flags.error("--repeats begin at 0")
    command = command_line("python benchmarks/attention_maps.py", sys.argv[1:])
    print(f"{report_header(device=f'{torch.get_num_threads()} threads')}: `{command}`\n")

    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNET).half()
    print("| positions | maps: tokens × height × width (layers) | sums, MB | most at once, MB | operations |")
    print("|---" * 5 + "|")
    for positions in POSITIONS:
        tracing = AttentionSums(lambda rows: slice(1, 2))
        traced, most = step(unet, positions, tracing)
        plain, _ = step(unet, positions, None)
        maps = ", ".join(
            f"{' × '.join(map(str, part.shape[1:]))} ({tracing._counts[size]})" for size, part in tracing._sums.items()
        )
        held = sum(part.numel() * part.element_size() for part in tracing._sums.values())
        print(
            f"| {positions} | {maps} | {held / MB:.1f} | {(held + most) / MB:.0f} | {traced / plain:.4f} |", flush=True
        )
    if not arguments.repeats:
        return
    print("\n| block | positions | time with tracing, of the time without | least | most |\n" + "|---" * 5 + "|")
    for side in BLOCKS:
        ratios = block_seconds(side, 248, arguments.repeats)
        values = (statistics.median(ratios), min(ratios), max(ratios))
        print(f"| {side} × {side} | 248 |", " | ".join(f"{value:.3f}" for value in values), "|", flush=True)


if __name__ == "__main__":
    main()
