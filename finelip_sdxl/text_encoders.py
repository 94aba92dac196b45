"""Plain `transformers` CLIP text encoders: build them from tensors, stretch them to 248 positions.

A FineLIP text encoder is a stock `CLIPTextModel` or `CLIPTextModelWithProjection` with a longer positional table,
so nothing here defines a model class.
"""

import copy
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from finelip_sdxl.stretch import FACTOR, KEEP, stretch_positions, stretched_row_indices

TextEncoder = CLIPTextModel | CLIPTextModelWithProjection
ModelT = TypeVar("ModelT", bound=PreTrainedModel)

POSITION_TABLE = "text_model.embeddings.position_embedding.weight"


def num_positions(encoder: TextEncoder) -> int:
    """How many tokens an encoder reads: the rows of its positional table, whatever its config says.

    Example:
        >>> config = CLIPTextConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=1)
        >>> num_positions(CLIPTextModel(config))
        77
    """
    tower: Any = getattr(encoder, "text_model", encoder)
    return tower.embeddings.position_embedding.weight.shape[0]


def stretch_text_encoder(encoder: TextEncoder, keep: int = KEEP, factor: int = FACTOR) -> TextEncoder:
    """A new text encoder of the same class whose positional table is stretched, 77 positions to 248.

    The argument is not modified, and its weights are not copied: on the CPU, all parameters but the positional table
    share memory with it. `copy.deepcopy` the result before training it, if the original is still needed.

    The config records `stretched_from` (the positions before), `stretch_keep` and `stretch_factor`; they survive
    `save_pretrained`. They say that the weights are exactly the original's and that the rows
    `stretched_row_indices(stretched_from, stretch_keep, stretch_factor)` are its whole table. Whoever trains the
    result deletes them.

    Args:
        encoder: a text encoder without adapters (merge or unload a LoRA first).
        keep: leading positions that stay as they are.
        factor: positions made of each later one.

    Returns:
        The stretched encoder, in evaluation mode, on the device and in the dtype of `encoder`.

    Raises:
        ValueError: if the encoder is stretched already, quantized or carries adapters, or `keep` or `factor` is out of
            range.

    Example:
        >>> config = CLIPTextConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=1)
        >>> stretched = stretch_text_encoder(CLIPTextModel(config))
        >>> num_positions(stretched), stretched.config.max_position_embeddings, stretched.config.stretched_from
        (248, 248, 77)
    """
    if getattr(encoder.config, "stretched_from", None) is not None:
        raise ValueError(
            f"This text encoder was stretched already, from {encoder.config.stretched_from} to "
            f"{num_positions(encoder)} positions: use it as it is."
        )
    if getattr(encoder, "is_quantized", False):
        raise ValueError(
            "This text encoder is quantized, so its weights cannot be taken over into a longer one: save the SDXL with"
            " 248 positions by `finelip-sdxl convert` first, and load that quantized."
        )
    tensors = text_encoder_tensors(encoder)
    config = copy.deepcopy(encoder.config)
    config.stretched_from = num_positions(encoder)
    config.stretch_keep, config.stretch_factor = keep, factor
    tensors[POSITION_TABLE] = stretch_positions(tensors[POSITION_TABLE], keep=keep, factor=factor)
    config.max_position_embeddings = tensors[POSITION_TABLE].shape[0]
    return build_text_encoder(config, tensors)


def unstretch_text_encoder(encoder: TextEncoder) -> TextEncoder:
    """The text encoder that `stretch_text_encoder` was given, made of its result.

    All weights but the positional table are shared with `encoder`, also when either is moved to another device.

    Raises:
        ValueError: if the encoder was not stretched, or was trained since.

    Example:
        >>> config = CLIPTextConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=1)
        >>> num_positions(unstretch_text_encoder(stretch_text_encoder(CLIPTextModel(config))))
        77
    """
    config = copy.deepcopy(encoder.config)
    if getattr(config, "stretched_from", None) is None:
        raise ValueError(
            f"This text encoder of {num_positions(encoder)} positions holds no stock one: it was trained. Pass the"
            " stock SDXL as base, and this encoder as what replaces its own."
        )
    rows = stretched_row_indices(config.stretched_from, keep=config.stretch_keep, factor=config.stretch_factor)
    twin = copy.deepcopy(encoder, {id(parameter): parameter for parameter in encoder.parameters()})
    tower: Any = getattr(twin, "text_model", twin)
    embeddings = tower.embeddings
    table = embeddings.position_embedding.weight.detach()[torch.as_tensor(rows)]
    embeddings.position_embedding = torch.nn.Embedding.from_pretrained(table)
    embeddings.position_ids = embeddings.position_ids[:, : config.stretched_from]
    config.max_position_embeddings = config.stretched_from
    for name in ("stretched_from", "stretch_keep", "stretch_factor"):
        delattr(config, name)
    twin.config = config
    return twin


def with_max_length(tokenizer: Any, length: int) -> Any:
    """A copy of a tokenizer that reads `length` tokens. (A deep copy of `CLIPTokenizer` decodes wrongly.)"""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        copied = type(tokenizer).from_pretrained(folder, model_max_length=length)
    # Saved with it is how its last call cut and padded, which programs that read the file alone would go on doing.
    copied.backend_tokenizer.no_truncation()
    copied.backend_tokenizer.no_padding()
    return copied


def text_encoder_tensors(encoder: TextEncoder) -> dict[str, Tensor]:
    """The weights of a text encoder under the keys of its file: `text_model.…`, `text_projection.weight`.

    The in-memory keys of a `CLIPTextModel` lack the prefix since transformers 5.6; the tensors are not copied.
    """
    tensors = encoder.state_dict()
    if not hasattr(encoder, "text_model"):
        tensors = {f"text_model.{key}": tensor for key, tensor in tensors.items()}
    return {key: tensor.detach() for key, tensor in tensors.items()}


def build_text_encoder(config: CLIPTextConfig, tensors: Mapping[str, Tensor]) -> TextEncoder:
    """A plain text encoder that holds the given weights and saves them under keys that begin with `text_model.`.

    A `CLIPTextModel` constructed by transformers 5.6 or later saves keys without that prefix, and versions before read
    such a file as random weights with no more than a warning. One that was *loaded* from prefixed keys saves them
    again, so this one is.

    Args:
        config: of the encoder; its `max_position_embeddings` must be the rows of the table in `tensors`.
        tensors: `text_model.…` and, for a `CLIPTextModelWithProjection`, `text_projection.weight`. On the CPU they are
            not copied: the encoder shares their memory.

    Returns:
        A `CLIPTextModelWithProjection` if there is a `text_projection.weight`, otherwise a `CLIPTextModel`; in
        evaluation mode, in the dtype of the tensors.

    Raises:
        ValueError: if a tensor is missing, unknown or of another shape than `config` says.

    Example:
        >>> config = CLIPTextConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=1)
        >>> tensors = text_encoder_tensors(CLIPTextModel(config))
        >>> type(build_text_encoder(config, tensors)).__name__
        'CLIPTextModel'
    """
    if "text_projection.weight" in tensors:
        return build_model(CLIPTextModelWithProjection, config, tensors)
    return build_model(CLIPTextModel, config, tensors)


def build_model(model_class: type[ModelT], config: PreTrainedConfig, tensors: Mapping[str, Tensor]) -> ModelT:
    """`model_class` with exactly the given weights: none missing, none left over, none copied on the CPU.

    Raises:
        ValueError: if a tensor is missing, unknown or of another shape than `config` says.
    """
    prefix = "text_model." if model_class is CLIPTextModel else ""
    with torch.device("meta"):
        expected = {prefix + key: tensor.shape for key, tensor in model_class(config).state_dict().items()}
    _check_tensors(model_class.__name__, expected, tensors)

    sample = next(iter(tensors.values()))
    with _without_progress_bar():
        model = model_class.from_pretrained(None, config=config, state_dict=dict(tensors), dtype=sample.dtype)
    return model.to(sample.device)  # type: ignore[arg-type]


def _check_tensors(name: str, expected: Mapping[str, torch.Size], tensors: Mapping[str, Tensor]) -> None:
    if unknown := sorted(tensors.keys() - expected.keys()):
        is_adapter = any("lora" in key or "base_layer" in key for key in unknown)
        raise ValueError(
            f"{len(unknown)} weights have no place in a {name}, among them {unknown[0]!r}"
            + (": merge or unload the LoRA first." if is_adapter else ".")
        )
    if missing := sorted(expected.keys() - tensors.keys()):
        raise ValueError(f"{len(missing)} weights of a {name} are missing, among them {missing[0]!r}.")
    for key, shape in expected.items():
        if tensors[key].shape != shape:
            raise ValueError(
                f"{key!r} has shape {tuple(tensors[key].shape)}, but the config of the {name} says {tuple(shape)}."
            )


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    """No "Loading weights" bar for weights that are in memory already."""
    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()
