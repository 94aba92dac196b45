"""Text encoders of 248 positions in ComfyUI: loaded from a CLIP or from names, and encoding prompts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import comfy.model_management
import folder_paths
import torch
from torch import nn

from finelip_sdxl import FineLIPSDXLPipeline
from finelip_sdxl.checkpoints.load import read_finelip
from finelip_sdxl.options import ENCODERS
from finelip_sdxl.pipelines.encoder_swap import check_adapter, open_adapter
from finelip_sdxl.prompts.vocabulary import clip_tokenizer
from finelip_sdxl.provenance import Provenance
from finelip_sdxl.text_encoders import num_positions, unstretch_text_encoder

from .devices import ManagedModels, to_intermediate

# How the keys of each text encoder begin in a CLIP of ComfyUI, and whether it has a projection.
_IN_CLIP = {"text_encoder": ("clip_l.transformer.", False), "text_encoder_2": ("clip_g.transformer.", True)}

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class TextEncoders:
    """SDXL's text encoders, as a pipeline without UNet and VAE whose models ComfyUI moves.

    Args:
        pipe: the pipeline.
    """

    def __init__(self, pipe: FineLIPSDXLPipeline) -> None:
        self.pipe = pipe
        self._models = ManagedModels(
            {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)},
            comfy.model_management.text_encoder_device(),
            comfy.model_management.text_encoder_offload_device(),
        )

    def encode(
        self, text: str, negative_text: str, *, sizes: Mapping[str, int], **options: Any
    ) -> tuple[list[Any], list[Any], str]:
        """A prompt and its negative prompt as ComfyUI's conditionings, and the report.

        Both have the same number of positions, so that ComfyUI sends them through the UNet at once. Of those of other
        lengths it repeats the shorter one, or sends them one by one, which changes the time alone.

        Args:
            text, negative_text: the texts.
            sizes: SDXL's sizes by ComfyUI's names.
            **options: of `encode` of the pipeline.

        Raises:
            ValueError: see `encode_prompt` of the pipelines.
        """
        self._models.load()
        encoded = self.pipe.encode(text, negative_prompt=negative_text, **options)
        positive, negative = (
            [[to_intermediate(states), {"pooled_output": to_intermediate(pooled), **sizes}]]
            for states, pooled in (
                (encoded.prompt_embeds, encoded.pooled_prompt_embeds),
                (encoded.negative_prompt_embeds, encoded.negative_pooled_prompt_embeds),
            )
        )
        return positive, negative, encoded.report


def load_text_encoders(clip: Any, sdxl: str, finelip: str, finelip_2: str, conditioning_adapter: str) -> TextEncoders:
    """Text encoders of 248 positions, with the original ones for short prompts.

    Args:
        clip: a CLIP of ComfyUI with both of SDXL's encoders; None if `sdxl` is named.
        sdxl: folder or hub id of an SDXL in Diffusers' layout, or `miniature`; empty if there is a `clip`.
        finelip, finelip_2: names of replacements, see `finelip_sdxl.load_finelip`; empty for none. Files and folders in
            ComfyUI's models/text_encoders go by their names there.
        conditioning_adapter: folder or hub id of an adapter; empty for that of the SDXL.

    Raises:
        ValueError: both `clip` and `sdxl`, or neither; or as in `FineLIPSDXLPipeline.from_pretrained`.
        OSError: something is not there.
    """
    place = _place(sdxl, "diffusers")
    if (clip is None) == (place is None):
        raise ValueError(
            f"Text encoders come from a CLIP or from an SDXL, but there {'are both' if place else 'is neither'}:"
            " connect the CLIP of an SDXL checkpoint, or write the folder or hub id of an SDXL."
        )
    dtype = _dtype()
    first, second, adapter = (_place(name, "text_encoders") for name in (finelip, finelip_2, conditioning_adapter))
    if place is None:
        pipe = _pipeline_of(clip, dtype)
        pipe.swap_text_encoders(first, second)
        if adapter is not None:
            pipe.register_modules(conditioning_adapter=open_adapter(adapter, dtype))
            check_adapter(pipe)
        return TextEncoders(pipe)
    if os.path.isfile(place):
        raise ValueError(f"{place} is a single file: load it with Load Checkpoint, and connect its CLIP here instead.")
    parts: dict[str, Any] = {"unet": None, "vae": None}
    if adapter is not None:
        parts["conditioning_adapter"] = adapter
    pipe = FineLIPSDXLPipeline.from_pretrained(place, first, second, dtype=dtype, **parts)
    return TextEncoders(pipe)


def _dtype() -> torch.dtype:
    """ComfyUI's choice for text encoders, where their layers can compute in it."""
    device = comfy.model_management.text_encoder_device()
    if comfy.model_management.is_device_cpu(device):
        return torch.float32
    chosen = comfy.model_management.text_encoder_dtype(device)
    return chosen if chosen in _DTYPES else torch.float16


def _place(name: str, kind: str) -> str | None:
    """A file or folder of ComfyUI's models, by its name there; any other name unchanged, for the package to find.

    Returns:
        None for an empty name.
    """
    name = name.strip(' "')  # Windows copies paths with quotation marks
    if not name:
        return None
    there = (os.path.join(folder, name) for folder in folder_paths.get_folder_paths(kind))
    return next((path for path in there if os.path.exists(path)), name)


def _pipeline_of(clip: Any, dtype: torch.dtype) -> FineLIPSDXLPipeline:
    """A pipeline of a CLIP's text encoders, with CLIP's own tokenizers.

    Raises:
        ValueError: it is no CLIP of an SDXL.
    """
    # As ComfyUI saves a CLIP: the LoRAs on it are in its weights then, and those of its copies are not.
    comfy.model_management.load_models_gpu([clip.load_model()], force_patch_weights=True)
    tensors = clip.get_sd()
    weights = {
        name: {key.removeprefix(start): weight.cpu() for key, weight in tensors.items() if key.startswith(start)}
        for name, (start, _) in _IN_CLIP.items()
    }
    if not all(weights.values()):
        raise ValueError("This CLIP is not an SDXL's, which has two encoders: connect the CLIP of an SDXL checkpoint.")
    parts: dict[str, Any] = {}
    for name, (_, has_projection) in _IN_CLIP.items():
        encoder = read_finelip(weights[name], dtype=dtype).to_text_encoder(projection=has_projection)
        tokenizer = clip_tokenizer(max_length=num_positions(encoder))
        if name == "text_encoder_2":
            # As ComfyUI pads, and SDXL was trained. In Diffusers "!" is the padding, and so in a text no word either.
            tokenizer.pad_token_id = 0
        if Provenance.of(encoder.config).stretched_from is not None:  # the swap stretches it, and says so
            encoder = unstretch_text_encoder(encoder)
        parts |= {name: encoder, ENCODERS[name]: tokenizer}
    return FineLIPSDXLPipeline(**parts, vae=None, unet=None, scheduler=None)
