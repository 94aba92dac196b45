"""The config of a checkpoint, from its tensors and from the config beside them."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import CLIPConfig, CLIPTextConfig, CLIPVisionConfig

from finelip_sdxl.checkpoints.layouts import PATCHES
from finelip_sdxl.foreign_files import Shapes, config_errors
from finelip_sdxl.model import FineLIPConfig
from finelip_sdxl.text_encoders import (
    POSITION_TABLE,
    TOKEN_TABLE,
    check_text_config,
    check_tower_config,
    dims,
    tower_sizes,
)

# Head widths of the authors' models: 64, except in the image towers of open_clip's H, g and bigG.
_HEAD_WIDTH = 64

_VISION_HEAD_WIDTHS = {1280: 80, 1408: 88, 1664: 104}

# open_clip's large text towers (H, g, bigG); OpenAI's, Long-CLIP's and FineLIP's are 512 and 768 wide.
_OPEN_CLIP_TEXT_WIDTHS = (1024, 1280)


def derive_config(
    tensors: Mapping[str, Tensor], given: dict[str, Any] | None, activation: str | None, is_published: bool, name: str
) -> FineLIPConfig:
    """The config of the model: sizes from the tensors, the rest from the given config, or inferred without one."""
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    config = _infer_config(shapes, is_published, name) if given is None else _read_config(given, name)
    text = config.text_config
    text.vocab_size, _ = dims(shapes, TOKEN_TABLE, 2, name)
    text.max_position_embeddings, _ = dims(shapes, POSITION_TABLE, 2, name)
    if PATCHES not in tensors:
        config.vision_config = None
    config.projection_dim = _rows(shapes, "text_projection.weight", name)
    for tower in filter(None, (text, config.vision_config)):
        tower.hidden_act = activation or tower.hidden_act
        tower.projection_dim = config.projection_dim or tower.projection_dim
    config.refined_image_tokens = _rows(shapes, "image_refinement.weight.3.weight", name)
    config.refined_text_tokens = _rows(shapes, "text_refinement.weight.3.weight", name)
    check_text_config(text, shapes, name)
    if config.vision_config is not None:
        check_tower_config(config.vision_config, shapes, "vision_model", name)
    return config


# The model types that a config may have, and the class of transformers that knows their fields.
_CONFIG_CLASSES = {
    FineLIPConfig.model_type: FineLIPConfig,
    CLIPConfig.model_type: CLIPConfig,
    "longclip": CLIPConfig,
    CLIPTextConfig.model_type: CLIPTextConfig,
    "longclip_text_model": CLIPTextConfig,
}


def check_model_type(config: dict[str, Any], name: str) -> None:
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in _CONFIG_CLASSES:
        raise ValueError(
            f"{name} is no CLIP with a text tower: its config says model_type {model_type!r}, and SDXL's text encoders"
            " can be replaced by a CLIP only."
        )


def _read_config(given: dict[str, Any], name: str) -> FineLIPConfig:
    check_model_type(given, name)
    known: Any = _CONFIG_CLASSES[given["model_type"]]
    with config_errors(f"The config of {name}"):
        config = known.from_dict({key: value for key, value in given.items() if key != "model_type"})
    if known is CLIPConfig:
        return FineLIPConfig(text_config=config.text_config, vision_config=config.vision_config)
    return FineLIPConfig(text_config=config) if known is CLIPTextConfig else config


def _infer_config(shapes: Shapes, is_published: bool, name: str) -> FineLIPConfig:
    vocab_size, width = dims(shapes, TOKEN_TABLE, 2, name)
    is_open_clip = width in _OPEN_CLIP_TEXT_WIDTHS and not is_published
    hidden_act = "gelu" if is_open_clip else "quick_gelu"
    text_config = CLIPTextConfig(
        hidden_act=hidden_act,
        vocab_size=vocab_size,
        # CLIP's vocabularies end with the start and the end token, and its tokenizer pads with 0.
        bos_token_id=max(vocab_size - 2, 0),
        eos_token_id=vocab_size - 1,
        pad_token_id=0,
        **_tower_sizes(shapes, "text_model", _HEAD_WIDTH, name),
    )
    if PATCHES not in shapes:
        return FineLIPConfig(text_config=text_config)
    width, channels, _, patch_size = dims(shapes, PATCHES, 4, name)
    patches = dims(shapes, "vision_model.embeddings.position_embedding.weight", 2, name)[0] - 1
    vision_config = CLIPVisionConfig(
        hidden_act=hidden_act,
        num_channels=channels,
        patch_size=patch_size,
        image_size=patch_size * round(patches**0.5),
        **_tower_sizes(shapes, "vision_model", _VISION_HEAD_WIDTHS.get(width, _HEAD_WIDTH), name),
    )
    return FineLIPConfig(text_config=text_config, vision_config=vision_config)


def _tower_sizes(shapes: Shapes, tower: str, head_width: int, name: str) -> dict[str, Any]:
    sizes = tower_sizes(shapes, tower, name)
    width = sizes["hidden_size"]
    if width % head_width:
        raise ValueError(f"{name} has a {tower} {width} wide, which does not split into heads of {head_width}.")
    return {**sizes, "num_attention_heads": width // head_width}


def _rows(shapes: Shapes, key: str, name: str) -> int | None:
    return dims(shapes, key, 2, name)[0] if key in shapes else None
