"""Keys and values of the text, computed once a call: a cache for the projections of cross-attention layers.

At every step of a picture, each cross-attention layer projects the same text embeddings to keys and values. The cache
stands at the linear layers that do it, so attention processors stay as they are, also those of an IP-Adapter. A linear
layer depends on its input and its weights alone; the cache returns a result again only where both are the very same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from threading import Lock
from typing import Any, NamedTuple

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from finelip_sdxl.attribution.sums import is_compiled

# Names of the projections of the text: apart, or fused by `fuse_qkv_projections`.
_PROJECTIONS = ("to_k", "to_v", "to_kv")


class _Result(NamedTuple):
    """The projection of a text by one layer.

    Attributes:
        tensors: the text, its projection, and the layer's weights. As they are held, no other tensor can take their
            places in memory.
        state: versions of these tensors, which PyTorch counts up at every change in place, and LoRAs fused with them.
    """

    tensors: list[Tensor]
    state: tuple[object, ...]


# The results of the call that runs in this thread, by layer; None if it has no cache. Every thread has its own: UNets
# are shared by pipelines that draw at the same time.
_results: ContextVar[dict[nn.Module, _Result] | None] = ContextVar("results", default=None)


class _Replaced(NamedTuple):
    """A layer's `forward` that was replaced, what stands in its place, and the calls that use it now."""

    before: Any  # accelerate's, with sequential offloading; None for the class's own
    cached: Any
    users: list[object]


_replaced: dict[nn.Module, _Replaced] = {}
_replaced_lock = Lock()


@contextmanager
def cached_text_projections(models: Iterable[nn.Module | None]) -> Iterator[None]:
    """Within this context, and in this thread, project a text once by each cross-attention layer of some models.

    Results are bit for bit those without a cache. They are computed again where the text is another tensor or was
    changed in place, or where the layer's weights were; and they are forgotten when the context ends. Compiled models,
    and layers with hooks of Diffusers (group offloading of leaves, layerwise casting), are left as they are. So are
    calls with gradients or in inference mode, in which PyTorch counts no changes.

    Args:
        models: UNet and ControlNets; None counts for nothing. Without any there is no cache, also within the context of
            another call.
    """
    results: dict[nn.Module, _Result] = {}
    layers = [pair for model in models if model is not None for pair in _text_layers(model)]
    with ExitStack() as stack:
        for layer, projection in layers:
            stack.enter_context(_replaced_forward(layer, projection))
        token = _results.set(results if layers else None)
        try:
            yield
        finally:
            _results.reset(token)
            results.clear()


def _text_layers(model: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """The linear layers that project the text, each with the module that stands in its place: itself, or a LoRA around
    it. A LoRA's own part is not cached: its scale may change, and it is small."""
    modules = list(model.modules())
    if any(is_compiled(module) for module in modules):
        return []
    attentions = [module for module in modules if isinstance(module, Attention) and module.is_cross_attention]
    projections = [getattr(attention, name, None) for attention in attentions for name in _PROJECTIONS]
    pairs = [(_base_layer(projection), projection) for projection in projections if projection is not None]
    return [(layer, projection) for layer, projection in pairs if isinstance(layer, nn.Linear) and not _hooked(layer)]


def _base_layer(projection: nn.Module) -> nn.Module:
    while isinstance(inner := getattr(projection, "base_layer", None), nn.Module):
        projection = inner
    return projection


def _hooked(layer: nn.Module) -> bool:
    return bool(getattr(getattr(layer, "_diffusers_hook", None), "hooks", None))


@contextmanager
def _replaced_forward(layer: nn.Module, projection: nn.Module) -> Iterator[None]:
    """The cache in place of a layer's `forward`, from the first of the calls that use it to the end of the last."""
    user = object()
    with _replaced_lock:
        if layer not in _replaced:
            before, cached = vars(layer).get("forward"), _cached(layer, projection, layer.forward)
            _replaced[layer] = _Replaced(before, cached, [])
            vars(layer)["forward"] = cached
        _replaced[layer].users.append(user)
    try:
        yield
    finally:
        with _replaced_lock:
            replaced = _replaced[layer]
            replaced.users.remove(user)
            if not replaced.users:
                del _replaced[layer]
                # Offloading that was switched on or off meanwhile has put its own there: then the cache does nothing.
                if vars(layer).get("forward") is replaced.cached:
                    del vars(layer)["forward"]
                    if replaced.before is not None:
                        vars(layer)["forward"] = replaced.before


def _cached(layer: nn.Module, projection: nn.Module, forward: Callable[[Tensor], Tensor]) -> Any:
    """The `forward` of a layer, which returns the result of before if nothing has changed since."""

    def cached(input: Tensor) -> Tensor:  # the name in `nn.Linear`
        results = None if torch.compiler.is_compiling() else _results.get()
        if results is None or not _can_be_cached(input, layer):
            return forward(input)
        last = results.get(layer)
        if last is not None:
            tensors = [input, last.tensors[1], *_weights(layer)]
            is_same = len(tensors) == len(last.tensors) and all(map(_is, tensors, last.tensors))
            if is_same and _state(tensors, projection) == last.state:
                return last.tensors[1]
            del results[layer], last, tensors  # its memory is free for the next
        projected = forward(input)
        tensors = [input, projected, *_weights(layer)]
        results[layer] = _Result(tensors, _state(tensors, projection))
        return projected

    return cached


def _is(one: Tensor, other: Tensor) -> bool:
    return one is other


def _can_be_cached(text: Tensor, layer: nn.Module) -> bool:
    """Whether changes of the text and of the weights can be seen, and a result of now may serve later."""
    if torch.is_grad_enabled() or torch.is_inference_mode_enabled() or torch._C._get_tracing_state() is not None:
        return False
    if any(tensor.is_inference() for tensor in (text, *_weights(layer))):
        return False
    # A CUDA graph computes from memory that is filled anew before each replay, which no version shows.
    return not (text.is_cuda and torch.cuda.is_current_stream_capturing())


def _weights(layer: nn.Module) -> list[Tensor]:
    """The weights of a layer, without those that sequential offloading holds elsewhere: they are new at each step."""
    return [weight for weight in layer.parameters(recurse=False) if not weight.is_meta]


def _state(tensors: Iterable[Tensor], projection: Any) -> tuple[object, ...]:
    # A LoRA is fused and unfused through `.data`, which counts no version.
    fused = tuple(getattr(projection, "merged_adapters", ()))
    scales = tuple(projection.scaling.items()) if fused and hasattr(projection, "scaling") else ()
    return (*(tensor._version for tensor in tensors), fused, scales)
