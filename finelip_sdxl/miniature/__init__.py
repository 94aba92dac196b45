"""The miniature world and the small SDXL that draws it, both of this project: real classes, weights that ship."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from transformers import CLIPModel

_HERE = Path(__file__).parent
_Source = TypeVar("_Source")


def miniature_path() -> Path:
    """The folder of the stock miniature SDXL: two CLIP text encoders of 77 positions, UNet, VAE, Euler scheduler.

    Example:
        >>> from diffusers import StableDiffusionXLPipeline
        >>> stock = StableDiffusionXLPipeline.from_pretrained(miniature_path())
        >>> stock.tokenizer.model_max_length
        77
    """
    return _HERE / "stock"


def resolve_base(base: str | os.PathLike) -> str:
    """What to open for a base: the folder of the miniature for ``"miniature"``, and anything else as it is.

    Example:
        >>> resolve_base("stabilityai/stable-diffusion-xl-base-1.0")
        'stabilityai/stable-diffusion-xl-base-1.0'
    """
    return os.fspath(miniature_path() if base == "miniature" else base)


def miniature_clip(pair: int) -> CLIPModel:
    """One of the miniature's two CLIPs whole: the text encoder of the stock folder with its image tower.

    Args:
        pair: 1 or 2, as SDXL's text encoders are counted.

    Raises:
        ValueError: if ``pair`` is neither.

    Example:
        >>> miniature_clip(1).config.vision_config.image_size
        96
    """
    from safetensors.torch import load_file
    from transformers import CLIPConfig, CLIPModel

    from finelip_sdxl.text_encoders import build_model

    if pair not in (1, 2):
        raise ValueError(f"pair is {pair!r}; expected 1 or 2, for SDXL's first or second text encoder")
    text = load_file(miniature_path() / ("text_encoder" if pair == 1 else "text_encoder_2") / "model.safetensors")
    rest = load_file(_HERE / "clips" / f"clip_{pair}.safetensors")
    config = CLIPConfig(**json.loads((_HERE / "clips" / f"clip_{pair}.json").read_text()))
    tensors = {key: tensor.float() for key, tensor in {**text, **rest}.items()}
    return build_model(CLIPModel, config, tensors)


def resolve_finelip(source: _Source) -> _Source | CLIPModel | Path:
    """What to load for the name of one of the miniature's encoders, and anything else as it is.

    Args:
        source: ``"miniature-clip-1"`` or ``"miniature-clip-2"`` for a stock CLIP; ``"miniature-finelip-1"`` or
            ``"miniature-finelip-2"`` for the folder of a FineLIP trained from it.

    Example:
        >>> resolve_finelip("miniature-clip-1").config.text_config.max_position_embeddings
        77
        >>> resolve_finelip("miniature-finelip-2").name
        'finelip_2'
        >>> resolve_finelip("openai/clip-vit-large-patch14")
        'openai/clip-vit-large-patch14'
    """
    name = re.fullmatch(r"miniature-(clip|finelip)-([12])", source) if isinstance(source, str) else None
    if name is None:
        return source
    kind, pair = name.groups()
    return miniature_clip(int(pair)) if kind == "clip" else _HERE / f"finelip_{pair}"
