"""`regional_prompts`: parts of a picture with prompts of their own, each of any length.

In every cross-attention layer of the UNet, the places of a region read the region's text in place of the picture's.
Forward hooks blend the outputs, so that attention processors and the denoising loop stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from PIL import Image
from torch import Tensor, nn

from finelip_sdxl.attribution.sums import is_compiled, not_summing, size_of
from finelip_sdxl.attribution.trace import conditional_rows
from finelip_sdxl.options import check_texts


@contextmanager
def regional_prompts(pipe: Any, regions: Sequence[tuple[Any, str]]) -> Iterator[None]:
    """Within this context, parts of the pictures that a pipeline draws have prompts of their own.

    Where no region is, the prompt of the call holds, and its pooled vector and the negative prompt hold everywhere. A
    region's text is encoded like a prompt, with the options of the call: up to 248 tokens at once, more in windows.
    Each region costs another pass of the UNet's cross-attention layers.

    Args:
        pipe: a pipeline of this package with text encoders. Its UNet must not be compiled, and have no IP-Adapter.
        regions: for each region its mask and its text. A mask is an image, or an array (height, width), in which white
            or 1 is the region; it is stretched to the picture. Where regions overlap, they share the place.

    A call of the pipeline raises:
        ValueError: the UNet is compiled or has an IP-Adapter; the pipeline has no text encoders, or edits by
            instructions; or a text is refused as a prompt would be.

    Raises:
        TypeError: `pipe` is no pipeline of this package; or a region is no pair of a mask and a text.
        ValueError: there are no regions; or a mask is empty, or no image and no array of numbers from 0 to 1.

    Examples:
        >>> import numpy as np
        >>> from finelip_sdxl import FineLIPSDXLPipeline, regional_prompts
        >>> pipe = FineLIPSDXLPipeline.from_pretrained("miniature")
        >>> pipe.set_progress_bar_config(disable=True)
        >>> corner = np.zeros((3, 3))
        >>> corner[0, 0] = 1
        >>> with regional_prompts(pipe, [(corner, "The top left holds a red star.")]):
        ...     image = pipe("The center holds a green leaf.", num_inference_steps=2).images[0]
        >>> image.size
        (192, 192)
    """
    if not hasattr(pipe, "describe_prompt"):
        raise TypeError(
            f"regional_prompts takes a pipeline of this package, but got {type(pipe).__name__}: make one with"
            " FineLIPSDXLPipeline.from_pipe."
        )
    checked, before = _checked(regions), _regions.get(pipe)
    _regions[pipe] = checked
    try:
        yield
    finally:
        del _regions[pipe]
        if before is not None:
            _regions[pipe] = before


# Masks, (height, width), and texts of each pipeline that is within `regional_prompts` now.
_regions: WeakKeyDictionary[Any, list[tuple[Tensor, str]]] = WeakKeyDictionary()


@contextmanager
def regional_call(pipe: Any, given: Mapping[str, Any]) -> Iterator[None]:
    """A call of a pipeline, with the regions of `regional_prompts` if it is within.

    Args:
        pipe: the pipeline.
        given: the arguments of the call, by name.
    """
    regions = _regions.get(pipe)
    if regions is None:
        token = _drawing.set(None)  # a call within another's callback is not the other's
        try:
            yield
        finally:
            _drawing.reset(token)
        return
    _check_call(pipe)
    texts = [_encoded(pipe, text, given) for _, text in regions]
    with _Blend(pipe, [mask for mask, _ in regions], texts).blending():
        yield


class _Blend:
    """The blend of a picture's text with those of its regions, in the layers of one call.

    Args:
        pipe: the pipeline.
        masks: the regions, (height, width) each.
        texts: their hidden states, (1, positions, dim) each.
    """

    def __init__(self, pipe: Any, masks: Sequence[Tensor], texts: Sequence[Tensor]) -> None:
        self._pipe, self._masks, self._texts = pipe, masks, texts
        self._latents = (1, 1)
        self._shares: dict[tuple[int, int], Tensor] = {}

    @contextmanager
    def blending(self) -> Iterator[None]:
        unet = self._pipe.unet
        handles = [unet.register_forward_pre_hook(self._note_latents, with_kwargs=True)]
        for layer in unet.modules():
            if isinstance(layer, Attention) and layer.is_cross_attention:
                handles.append(layer.register_forward_hook(self._blend, with_kwargs=True))
        token = _drawing.set(self)
        try:
            yield
        finally:
            _drawing.reset(token)
            for handle in handles:
                handle.remove()

    # Hooks. Other pipelines may share the UNet: calls from other threads, or from a callback, are not ours.

    def _note_latents(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _drawing.get() is self:
            height, width = (args[0] if args else kwargs["sample"]).shape[-2:]
            if (height, width) != self._latents:
                self._latents = height, width
                self._shares.clear()

    def _blend(self, layer: Attention, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        if _drawing.get() is not self:
            return output
        states = args[0] if args else kwargs["hidden_states"]
        own = ("hidden_states", "encoder_hidden_states")
        others = {name: value for name, value in kwargs.items() if name not in own}
        # Also the perturbed rows of perturbed-attention guidance, which come last.
        rows = slice(conditional_rows(self._pipe, len(states)).start, None)
        places = states[rows]
        shares = self._shares_of(places)
        blended = output.clone()
        blended[rows] *= 1 - shares.sum(dim=0)
        for text, share in zip(self._texts, shares, strict=True):
            with not_summing():  # heat maps are of the picture's own prompt
                part = layer.forward(places, text.to(places).expand(len(places), -1, -1), **others)
            blended[rows] += share * part
        return blended

    def _shares_of(self, places: Tensor) -> Tensor:
        """Each region's share of each of a layer's places, (regions, places, 1)."""
        size = size_of(places.shape[1], self._latents)
        if size is None:
            raise ValueError(f"A layer of the UNet has {places.shape[1]} places, which regions cannot be laid over.")
        if size not in self._shares:
            masks = torch.cat([F.interpolate(mask[None, None], size, mode="area") for mask in self._masks])
            shares = masks / masks.sum(dim=0).clamp(min=1)
            self._shares[size] = shares.flatten(1)[..., None].to(places)
        return self._shares[size]


_drawing: ContextVar[_Blend | None] = ContextVar("drawing", default=None)


def _encoded(pipe: Any, text: str, given: Mapping[str, Any]) -> Tensor:
    with torch.no_grad():
        states: Tensor = pipe.encode_prompt(
            text,
            device=pipe._execution_device,
            do_classifier_free_guidance=False,
            lora_scale=(given.get("cross_attention_kwargs") or {}).get("scale"),
            **({} if given.get("clip_skip") is None else {"clip_skip": given["clip_skip"]}),
        )[0]
    return states


def _check_call(pipe: Any) -> None:
    if any(is_compiled(module) for module in pipe.unet.modules()):
        raise ValueError("Regional prompts need a UNet that is not compiled: draw before it is, or with another copy.")
    if getattr(pipe.unet, "encoder_hid_proj", None) is not None:
        raise ValueError("Regional prompts do not go with an IP-Adapter: call unload_ip_adapter() first.")
    if hasattr(type(pipe), "image_guidance_scale") or not hasattr(type(pipe), "do_classifier_free_guidance"):
        raise ValueError(f"Regional prompts do not go with {type(pipe).__name__}: use a FineLIPSDXLPipeline.")
    if pipe.text_encoder_2 is None:
        raise ValueError("This pipeline has no text encoders to encode a region's text: load one with text encoders.")


def _checked(regions: Any) -> list[tuple[Tensor, str]]:
    if not isinstance(regions, list | tuple):
        raise TypeError(f"`regions` is {regions!r:.60}; expected a list of pairs, each of a mask and a text.")
    if not regions:
        raise ValueError("`regions` is empty; pass at least one pair of a mask and a text.")
    checked = []
    for number, region in enumerate(regions):
        if not isinstance(region, list | tuple) or len(region) != 2 or not isinstance(region[1], str):
            raise TypeError(f"`regions[{number}]` is {region!r:.60}; expected a pair of a mask and a text.")
        check_texts(f"regions[{number}][1]", region[1])
        checked.append((_mask(f"regions[{number}][0]", region[0]), region[1]))
    return checked


def _mask(name: str, given: Any) -> Tensor:
    """A mask as float32 (height, width) from 0 to 1."""
    if isinstance(given, Image.Image):
        given = np.asarray(given.convert("L"), dtype=np.float32) / 255
    if isinstance(given, Tensor):
        given = given.detach().cpu().float().numpy()
    is_numbers = isinstance(given, np.ndarray) and given.dtype.kind in "biuf" and given.ndim == 2 and given.size
    # NaN is in no range.
    if not is_numbers or not (given.min() >= 0 and given.max() <= 1):
        raise ValueError(f"`{name}` is {_shown(given)}; expected an image, or an array (height, width) from 0 to 1.")
    if not given.any():
        raise ValueError(f"`{name}` is empty: paint the region white.")
    return torch.from_numpy(given.astype(np.float32))


def _shown(given: Any) -> str:
    if not isinstance(given, np.ndarray):
        return f"{given!r:.60}"
    if given.dtype.kind not in "biuf" or not given.size:
        return f"an array {given.shape} of {given.dtype}"
    return f"an array {given.shape} of {given.dtype} from {given.min():g} to {given.max():g}"
