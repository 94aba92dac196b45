"""The miniature: a small world, and a small SDXL of the real classes that draws it, with weights that ship."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from finelip_sdxl.names import BundledModel, bundled_model, bundled_sdxl

if TYPE_CHECKING:
    from transformers import CLIPModel, PreTrainedConfig

    from finelip_sdxl.model import FineLIPModel
    from finelip_sdxl.text_encoders import ModelT


def miniature_path() -> Path:
    """The folder of the stock miniature SDXL: two CLIP text encoders of 77 positions, UNet, VAE, Euler scheduler.

    Examples:
        >>> from diffusers import StableDiffusionXLPipeline
        >>> stock = StableDiffusionXLPipeline.from_pretrained(miniature_path())
        >>> stock.tokenizer.model_max_length
        77
    """
    miniature = bundled_sdxl("miniature")
    assert miniature is not None
    return miniature.folder


def miniature_clip(pair: int) -> CLIPModel:
    """One of the miniature's two CLIPs: a text encoder of the stock folder with its image tower.

    Args:
        pair: number of the text encoder in SDXL, 1 or 2.

    Raises:
        ValueError: `pair` is neither 1 nor 2.

    Examples:
        >>> miniature_clip(1).config.vision_config.image_size
        96
    """
    from transformers import CLIPConfig, CLIPModel

    return _build(CLIPModel, CLIPConfig, _bundled("clip", pair))


def miniature_finelip(pair: int) -> FineLIPModel:
    """One of the miniature's two FineLIPs: a CLIP of the miniature, trained on long captions.

    Args:
        pair: number of the text encoder in SDXL, 1 or 2.

    Raises:
        ValueError: `pair` is neither 1 nor 2.

    Examples:
        >>> miniature_finelip(1).config.text_config.max_position_embeddings
        248
    """
    from finelip_sdxl.model import FineLIPConfig, FineLIPModel

    return _build(FineLIPModel, FineLIPConfig, _bundled("finelip", pair))


def _bundled(kind: str, pair: int) -> BundledModel:
    model = bundled_model(f"miniature-{kind}-{pair}")
    if model is None:
        raise ValueError(f"pair is {pair!r}; expected 1 or 2, for SDXL's first or second text encoder.")
    return model


def _build(model_class: type[ModelT], config_class: type[PreTrainedConfig], bundled: BundledModel) -> ModelT:
    from finelip_sdxl.checkpoints.sources import read_bundled
    from finelip_sdxl.text_encoders import build_model

    tensors, config = read_bundled(bundled)
    return build_model(model_class, config_class.from_dict(config), tensors)
