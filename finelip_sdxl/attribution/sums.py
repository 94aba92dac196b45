"""Sums of the UNet's cross-attention over heads, layers and steps: their size does not grow with the steps.

Forward hooks stand at the layers of queries and keys, so attention processors stay as they are, also those of an
IP-Adapter, whose image tokens have keys of their own and are left out. What a LoRA adds is in both, and so is the
cache of projections.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

# Places of a map. Layers with more, such as those of pictures above 1024 pixels, are averaged to a quarter of them.
MAX_PLACES = 64 * 64

# Numbers of an attention that is computed at once; 32 MiB.
_AT_ONCE = 2**23


class AttentionSums:
    """Attention of a picture's places to the tokens of its text, averaged over heads, layers and steps.

    Args:
        conditional: a function of the number of rows that go through the UNet; it returns those with the prompt.
    """

    def __init__(self, conditional: Callable[[int], slice]) -> None:
        self._conditional = conditional
        self._latents: tuple[int, int] | None = None
        self._queries: dict[nn.Module, Tensor] = {}
        self._keys: dict[nn.Module, Tensor] = {}
        # By height and width: the sum, (pictures, tokens, height, width), and the number of maps in it
        self._sums: dict[tuple[int, int], Tensor] = {}
        self._counts: dict[tuple[int, int], int] = {}

    @property
    def latents(self) -> tuple[int, int] | None:
        """Height and width of the latents; None before the first step."""
        return self._latents

    def mean(self) -> Tensor | None:
        """The mean of all maps, in the size of the largest: (pictures, tokens, height, width), in float32 on the CPU.

        Layers count by their number of places: fine maps say more of where. The attentions of a place to all tokens
        add up to 1. None if nothing was summed.
        """
        if not self._sums:
            return None
        finest = max(self._sums, key=prod)
        weighted = [prod(size) * F.interpolate(part, finest, mode="bilinear") for size, part in self._sums.items()]
        total = sum(prod(size) * count for size, count in self._counts.items())
        return torch.stack(weighted).sum(dim=0).cpu() / total

    @contextmanager
    def summing(self, unet: nn.Module) -> Iterator[None]:
        """Sum what the UNet attends to within this context and in this thread.

        Raises:
            ValueError: the UNet is compiled, so that no hook would run.
        """
        if any(is_compiled(module) for module in unet.modules()):
            raise ValueError(
                "The attention of a compiled UNet cannot be traced: draw within `trace_attention` before it is"
                " compiled, or with another copy."
            )
        handles = [unet.register_forward_pre_hook(self._note_latents, with_kwargs=True)]
        for layer in unet.modules():
            if isinstance(layer, Attention) and layer.is_cross_attention:
                handles += [
                    layer.to_q.register_forward_hook(self._noting(self._queries, layer)),
                    layer.to_k.register_forward_hook(self._noting(self._keys, layer)),
                    layer.register_forward_hook(self._add),
                ]
                if getattr(layer, "to_kv", None) is not None:  # fused: keys, then values
                    handles.append(layer.to_kv.register_forward_hook(self._noting(self._keys, layer, parts=2)))
        token = _summing.set(self)
        try:
            yield
        finally:
            _summing.reset(token)
            self._queries.clear()
            self._keys.clear()
            for handle in handles:
                handle.remove()

    # Hooks. Other pipelines may share the UNet: calls from other threads, or from a callback, are not ours.

    def _note_latents(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _summing.get() is self:
            height, width = (args[0] if args else kwargs["sample"]).shape[-2:]
            self._latents = height, width

    def _noting(self, noted: dict[nn.Module, Tensor], layer: nn.Module, parts: int = 1) -> Callable[..., None]:
        def note(_: nn.Module, __: Any, output: Tensor) -> None:
            if _summing.get() is self:
                noted[layer] = output.detach().chunk(parts, dim=-1)[0]

        return note

    def _add(self, layer: Attention, *_: Any) -> None:
        query, key = self._queries.pop(layer, None), self._keys.pop(layer, None)
        if query is None or key is None or self._latents is None:
            return
        size = size_of(query.shape[1], self._latents)
        if size is None:
            return
        rows = self._conditional(len(query))
        with torch.no_grad():
            maps = torch.stack(
                [_attention(one, other, layer) for one, other in zip(query[rows], key[rows], strict=True)]
            ).unflatten(-1, size)
            while maps.shape[-2] * maps.shape[-1] > MAX_PLACES:
                maps = F.avg_pool2d(maps, 2, ceil_mode=True)
        place = (maps.shape[-2], maps.shape[-1])
        before = self._sums.get(place)
        if before is None or before.shape != maps.shape:  # a callback has replaced the embeddings by longer ones
            self._sums[place], self._counts[place] = maps, 1
        else:
            before += maps
            self._counts[place] += 1


def is_compiled(module: nn.Module) -> bool:
    """Whether `module.compile()`, `torch.compile(module)` or `module.forward = torch.compile(module.forward)` ran."""
    forward = vars(module).get("forward")
    is_whole = module._compiled_call_impl is not None or "_orig_mod" in module._modules
    return is_whole or hasattr(forward, "_torchdynamo_orig_callable")


_summing: ContextVar[AttentionSums | None] = ContextVar("summing", default=None)


@contextmanager
def not_summing() -> Iterator[None]:
    """Within the context of another call, such as one whose callback draws: this call is not its."""
    token = _summing.set(None)
    try:
        yield
    finally:
        _summing.reset(token)


def _attention(query: Tensor, key: Tensor, layer: Attention) -> Tensor:
    """The attention of one picture's places, averaged over heads: (tokens, places)."""
    queries, keys = (part.float().unflatten(-1, (layer.heads, -1)).transpose(0, 1) for part in (query, key))
    total = torch.zeros(len(query), len(key), device=query.device)
    step = max(1, _AT_ONCE // total.numel())
    for first in range(0, layer.heads, step):
        scores = queries[first : first + step] @ keys[first : first + step].transpose(1, 2)
        total += (scores * layer.scale).softmax(dim=-1).sum(dim=0)
    return total.T / layer.heads


def size_of(places: int, latents: tuple[int, int]) -> tuple[int, int] | None:
    """Height and width of a layer's places: the latents', halved some times; None if it is another number."""
    height, width = latents
    while height * width > places and height * width > 1:
        height, width = (height + 1) // 2, (width + 1) // 2
    return (height, width) if height * width == places else None
