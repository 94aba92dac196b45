"""The miniature world and the small SDXL that draws it, both of this project: real classes, weights that ship."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from transformers import CLIPModel, PreTrainedConfig, PreTrainedModel

    from finelip_sdxl.model import FineLIPModel

# What names one of the miniature's encoders, wherever a CLIP is named: its kind, and which of the pair.
MODEL_NAME = re.compile(r"miniature-(clip|finelip)-([12])")
_HERE = Path(__file__).parent
_Source = TypeVar("_Source")
_Model = TypeVar("_Model", bound="PreTrainedModel")


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
    from transformers import CLIPConfig, CLIPModel

    _check(pair)
    text = miniature_path() / ("text_encoder" if pair == 1 else "text_encoder_2") / "model.safetensors"
    rest = _HERE / "clips" / f"clip_{pair}.safetensors"
    return _build(CLIPModel, CLIPConfig, rest.with_suffix(".json"), text, rest)


def miniature_finelip(pair: int) -> FineLIPModel:
    """One of the miniature's two FineLIPs: its CLIP, trained on long captions by ``training/train_finelip.py``.

    Args:
        pair: 1 or 2, as SDXL's text encoders are counted.

    Raises:
        ValueError: if ``pair`` is neither.

    Example:
        >>> miniature_finelip(1).config.text_config.max_position_embeddings
        248
    """
    from finelip_sdxl.model import FineLIPConfig, FineLIPModel

    _check(pair)
    folder = _HERE / f"finelip_{pair}"
    return _build(FineLIPModel, FineLIPConfig, folder / "config.json", folder / "model.safetensors")


def resolve_finelip(source: _Source) -> _Source | CLIPModel | FineLIPModel:
    """The model by one of the miniature's names, and anything else as it is.

    Args:
        source: ``"miniature-clip-1"`` or ``"miniature-clip-2"`` for a stock CLIP, ``"miniature-finelip-1"`` or
            ``"miniature-finelip-2"`` for a FineLIP trained from it.

    Example:
        >>> resolve_finelip("miniature-clip-1").config.text_config.max_position_embeddings
        77
        >>> resolve_finelip("openai/clip-vit-large-patch14")
        'openai/clip-vit-large-patch14'
    """
    name = MODEL_NAME.fullmatch(source) if isinstance(source, str) else None
    if name is None:
        return source
    kind, pair = name.groups()
    return miniature_clip(int(pair)) if kind == "clip" else miniature_finelip(int(pair))


def _check(pair: int) -> None:
    if pair not in (1, 2):
        raise ValueError(f"pair is {pair!r}; expected 1 or 2, for SDXL's first or second text encoder")


def _build(model: type[_Model], config: type[PreTrainedConfig], config_file: Path, *weights: Path) -> _Model:
    """Weights ship in half precision; a model of float32 is what trains, and what runs well on a CPU."""
    from safetensors.torch import load_file

    from finelip_sdxl.text_encoders import build_model

    tensors = {key: tensor.float() for file in weights for key, tensor in load_file(file).items()}
    return build_model(model, config.from_dict(json.loads(config_file.read_text())), tensors)
