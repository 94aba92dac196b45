"""Export of long-prompt SDXLs to programs that do not know this package: stock Diffusers and ComfyUI."""

import inspect
import logging
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from finelip_sdxl.files import written_whole
from finelip_sdxl.pipelines.protocol import LongPromptPipeline
from finelip_sdxl.provenance import without_paths
from finelip_sdxl.recommended import recommended_of, record_recommended
from finelip_sdxl.text_encoders import build_text_encoder, text_encoder_tensors, with_max_length

logger = logging.getLogger(__name__)

# ComfyUI's usual file names of SDXL's text encoders.
COMFYUI_FILES = {"text_encoder": "clip_l.safetensors", "text_encoder_2": "clip_g.safetensors"}

# ComfyUI takes a file with this key for bigG (comfy/sd.py, `detect_te_model`); CLIP-L ends at layer 11.
_LAYER_30 = "text_model.encoder.layers.30.mlp.fc1.weight"


def stock_pipeline(pipe: LongPromptPipeline) -> Any:
    """A pipeline's parts in Diffusers' own class. A folder that it saves holds nothing of this package.

    Args:
        pipe: a pipeline of this package, with text encoders of 248 positions. It shares its weights with the result.
            Of paths on this machine in its configs only the last part stays; nothing else in it changes.

    Returns:
        The stock pipeline. It pads each prompt to 248 tokens, and cuts longer ones.

    Raises:
        ValueError: LoRA layers are loaded.

    Examples:
        >>> from finelip_sdxl import FineLIPSDXLPipeline
        >>> pipe = FineLIPSDXLPipeline.from_pretrained("miniature", conditioning_adapter=None)
        >>> type(stock_pipeline(pipe)).__name__
        'StableDiffusionXLPipeline'
    """
    _check_plain(pipe.components)
    _say_what_is_lost(pipe)
    without_paths(pipe)
    parts: dict[str, Any] = {}
    for name in ("tokenizer", "tokenizer_2"):  # as copies without the truncation and padding of the last call
        if isinstance(tokenizer := getattr(pipe, name), CLIPTokenizer):
            parts[name] = with_max_length(tokenizer, tokenizer.model_max_length)
    if isinstance(encoder := pipe.text_encoder, CLIPTextModel):  # rebuilt, to be saved with keys for all versions
        parts["text_encoder"] = build_text_encoder(encoder.config, text_encoder_tensors(encoder))
    return in_stock_class(pipe, **parts)


def in_stock_class(pipe: LongPromptPipeline, **parts: Any) -> Any:
    """A pipeline's components in Diffusers' own class; `parts` replace components of their names."""
    stock_class = pipe._stock_class()
    # Options such as `force_zeros_for_empty_prompt` are in the config.
    given = {**pipe.config, **pipe.components, **parts}
    stock = stock_class(**{name: given[name] for name in inspect.signature(stock_class).parameters if name in given})
    record_recommended(stock, recommended_of(pipe.config))
    return stock


def save_comfyui(pipe: LongPromptPipeline, folder: Path) -> list[Path]:
    """Write a pipeline's text encoders as two files for ComfyUI's node DualCLIPLoader, type sdxl.

    ComfyUI takes the number of positions from the positional table of each file and lengthens its tokenizer to match
    (`comfy/text_encoders/long_clipl.py`), so no custom node is needed.

    Args:
        pipe: a pipeline of this package, with text encoders of 248 positions; UNet and VAE may be missing.
        folder: the folder for the files; files of these names are replaced, other files stay.

    Returns:
        The files, in the dtype of the encoders. A refiner has `clip_g.safetensors` alone.

    Raises:
        ValueError: the pipeline has no text encoder, or LoRA layers are loaded.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> from finelip_sdxl import FineLIPSDXLPipeline
        >>> pipe = FineLIPSDXLPipeline.from_pretrained("miniature", conditioning_adapter=None)
        >>> with TemporaryDirectory() as folder:
        ...     [file.name for file in save_comfyui(pipe, Path(folder))]
        ['clip_l.safetensors', 'clip_g.safetensors']
    """
    encoders = {name: getattr(pipe, name) for name in COMFYUI_FILES if getattr(pipe, name) is not None}
    if not encoders:
        raise ValueError("This pipeline has no text encoders for ComfyUI to load: pass one that has.")
    _check_plain(encoders)
    _say_what_is_lost(pipe)
    tensors = {name: text_encoder_tensors(encoder) for name, encoder in encoders.items()}
    if any((_LAYER_30 in weights) != (name == "text_encoder_2") for name, weights in tensors.items()):
        depths = " and ".join(str(encoder.config.num_hidden_layers) for encoder in encoders.values())
        logger.warning(
            "ComfyUI will not load these files: it knows only the text encoders of real SDXLs, with 12 and 32 layers,"
            " and recognizes clip_g by its layer 30, but these have %s layers.",
            depths,
        )
    elif len(encoders) == 1:
        logger.warning(
            "%s is the only text encoder here, as in SDXL's refiner: load its file with ComfyUI's CLIPLoader instead"
            " of DualCLIPLoader.",
            *encoders,
        )

    files = {folder / COMFYUI_FILES[name]: weights for name, weights in tensors.items()}
    with ExitStack() as stack:  # the files take their places when all are written
        for file, weights in files.items():
            plain = {key: weight.contiguous() for key, weight in weights.items()}
            save_file(plain, stack.enter_context(written_whole(file)), {"format": "pt"})
    return list(files)


def _check_plain(parts: Mapping[str, Any]) -> None:
    """Refuse LoRA layers: a plain model has none of their keys.

    Raises:
        ValueError: a part has LoRA layers.
    """
    for name, part in parts.items():
        if isinstance(part, nn.Module) and any(hasattr(module, "base_layer") for module in part.modules()):
            raise ValueError(
                f"{name} has LoRA layers, and a plain model has none: merge them by pipe.fuse_lora() and"
                " pipe.unload_lora_weights(), or only unload them, and then export."
            )


def _say_what_is_lost(pipe: LongPromptPipeline) -> None:
    if pipe.conditioning_adapter is not None:
        logger.warning(
            "conditioning_adapter is left out: it works between the text encoders and the UNet and cannot be merged"
            " into either. A LoRA from training/align_adapter.py is an alignment that merges into the encoders."
        )
    if pipe.hidden_states != "penultimate":
        logger.warning(
            'hidden_states="%s" is left out: stock Diffusers and ComfyUI take penultimate states.', pipe.hidden_states
        )
