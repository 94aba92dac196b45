"""Plain `transformers` CLIP text encoders: build them from tensors, stretch them to 248 positions.

A FineLIP text encoder is a stock `CLIPTextModel` or `CLIPTextModelWithProjection` with a longer positional table,
so nothing here defines a model class.
"""

import copy
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from finelip_sdxl.foreign_files import Shapes, config_errors
from finelip_sdxl.provenance import Provenance, forget_stretch
from finelip_sdxl.stretch import FACTOR, KEEP, stretch_positions

TextEncoder = CLIPTextModel | CLIPTextModelWithProjection
ModelT = TypeVar("ModelT", bound=PreTrainedModel)

POSITION_TABLE = "text_model.embeddings.position_embedding.weight"
TOKEN_TABLE = "text_model.embeddings.token_embedding.weight"


def num_positions(encoder: TextEncoder) -> int:
    """How many tokens an encoder reads: the rows of its positional table, whatever its config says.

    Example:
        >>> config = CLIPTextConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=1)
        >>> num_positions(CLIPTextModel(config))
        77
    """
    tower: Any = getattr(encoder, "text_model", encoder)
    rows: int = tower.embeddings.position_embedding.weight.shape[0]
    return rows


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
    record = Provenance.of(encoder.config)
    if record.stretched_from is not None:
        raise ValueError(
            f"This text encoder was stretched already, from {record.stretched_from} to "
            f"{num_positions(encoder)} positions: use it as it is."
        )
    if getattr(encoder, "is_quantized", False):
        raise ValueError(
            "This text encoder is quantized, so its weights cannot be taken over into a longer one: save the SDXL with"
            " 248 positions by `finelip-sdxl convert` first, and load that quantized."
        )
    tensors = text_encoder_tensors(encoder)
    config = copy.deepcopy(encoder.config)
    record.with_stretch(num_positions(encoder), keep, factor).write(config)
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
    record = Provenance.of(config)
    rows = record.original_row_indices()
    if rows is None:
        raise ValueError(
            f"This text encoder of {num_positions(encoder)} positions holds no stock one: it was trained. Pass the"
            " stock SDXL as base, and this encoder as what replaces its own."
        )
    twin = copy.deepcopy(encoder, {id(parameter): parameter for parameter in encoder.parameters()})
    tower: Any = getattr(twin, "text_model", twin)
    embeddings = tower.embeddings
    table = embeddings.position_embedding.weight.detach()[rows]
    embeddings.position_embedding = torch.nn.Embedding.from_pretrained(table)
    embeddings.position_ids = embeddings.position_ids[:, : len(rows)]
    config.max_position_embeddings = len(rows)
    forget_stretch(config)
    twin.config = config
    return twin


def with_max_length(tokenizer: CLIPTokenizer, length: int) -> CLIPTokenizer:
    """A copy of a tokenizer that reads `length` tokens, and neither cuts nor pads by itself.

    A deep copy of `CLIPTokenizer` decodes wrongly; and how the last call has cut and padded is saved with a tokenizer,
    where other programs take it for a rule.
    """
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        copied: CLIPTokenizer = type(tokenizer).from_pretrained(folder, model_max_length=length)
    copied.backend_tokenizer.no_truncation()
    copied.backend_tokenizer.no_padding()
    return copied


def check_tokenizer(tokenizer: CLIPTokenizer, name: str) -> None:
    """That a tokenizer knows words. Without its files, transformers makes one that knows letters, or nothing, and says
    nothing of it.

    Args:
        tokenizer: of a CLIP.
        name: of where it comes from, for messages.

    Raises:
        ValueError: it does not, or hardly any of its own.

    Example:
        >>> check_tokenizer(CLIPTokenizer(), "tokenizer")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: tokenizer knows no words: ...
    """
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    added = tokenizer.get_added_vocab()
    words = [word for word in model["vocab"] if len(word.removesuffix("</w>")) > 1 and word not in added]
    merges = len(model.get("merges", []))  # each makes a word, or the beginning of one
    if merges == 0 or merges < len(words) / 2:
        raise ValueError(
            f"{name} knows no words: its tokenizer.json, or its vocab.json and merges.txt, are missing or incomplete, "
            "so fetch them again."
        )


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


def build_model(
    model_class: type[ModelT], config: PreTrainedConfig, tensors: Mapping[str, Tensor], name: str | None = None
) -> ModelT:
    """`model_class` with exactly the given weights: none missing, none left over, none copied on the CPU.

    Args:
        model_class: of transformers, or a `FineLIPModel`.
        config: its own.
        tensors: all on one device, of one dtype.
        name: of what they come from, for messages.

    Raises:
        ValueError: if a tensor is missing, unknown or of another shape than `config` says, or `config` is broken.
    """
    check_shapes(model_class, config, {key: tuple(tensor.shape) for key, tensor in tensors.items()}, name)
    return fill_model(model_class, config, tensors, name)


def fill_model(
    model_class: type[ModelT], config: PreTrainedConfig, tensors: Mapping[str, Tensor], name: str | None = None
) -> ModelT:
    """As `build_model`, for weights that `check_shapes` has seen."""
    sample = next(iter(tensors.values()))
    with _without_progress_bar(), config_errors(_config_of(model_class, name)):
        model: Any = model_class.from_pretrained(None, config=config, state_dict=dict(tensors), dtype=sample.dtype)
    filled: ModelT = model.to(sample.device)
    return filled


def check_shapes(model_class: type, config: PreTrainedConfig, shapes: Shapes, name: str | None = None) -> None:
    """That a model of this config has exactly weights of these shapes. Arguments are as for `build_model`.

    Raises:
        ValueError: one is missing, unknown or of another shape; or the config makes no model.
    """
    kind, where = model_class.__name__, "" if name is None else f"{name}: "
    prefix = "text_model." if model_class is CLIPTextModel else ""
    with config_errors(_config_of(model_class, name)), torch.device("meta"):
        expected = {prefix + key: tuple(value.shape) for key, value in model_class(config).state_dict().items()}
    if unknown := sorted(shapes.keys() - expected.keys()):
        is_adapter = any("lora" in key or "base_layer" in key for key in unknown)
        raise ValueError(
            f"{where}{len(unknown)} weights have no place in a {kind}, among them {unknown[0]!r}"
            + (": merge or unload the LoRA first." if is_adapter else ".")
        )
    if missing := sorted(expected.keys() - shapes.keys()):
        raise ValueError(f"{where}{len(missing)} weights of a {kind} are missing, among them {missing[0]!r}.")
    for key, shape in expected.items():
        if shapes[key] != shape:
            raise ValueError(f"{where}{key!r} has shape {shapes[key]}, but the config of the {kind} says {shape}.")


def _config_of(model_class: type, name: str | None) -> str:
    return f"The config of {'a ' + model_class.__name__ if name is None else name}"


def check_text_config(config: CLIPTextConfig, shapes: Shapes, name: str) -> None:
    """That the config of a text tower is that of weights of these shapes, before a model is built of it.

    Args:
        config: of the tower.
        shapes: of its weights, under the keys of its file, `text_model.…`.
        name: of what holds them, for messages.

    Raises:
        ValueError: the field that is wrong, by name.

    Example:
        >>> config = CLIPTextConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=1)
        >>> tensors = text_encoder_tensors(CLIPTextModel(config))
        >>> config.eos_token_id = -1
        >>> check_text_config(config, {key: tuple(tensor.shape) for key, tensor in tensors.items()}, "clip")
        Traceback (most recent call last):
        ValueError: The config of clip says eos_token_id -1; expected one of its 49408 token ids.
    """
    check_tower_config(config, shapes, "text_model", name)
    rows, _ = dims(shapes, POSITION_TABLE, 2, name)
    tokens, _ = dims(shapes, TOKEN_TABLE, 2, name)
    _check_fields(config, {"max_position_embeddings": rows, "vocab_size": tokens}, name)
    for field in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value: Any = getattr(config, field)
        if not isinstance(value, int) or not 0 <= value < tokens:
            if value is None and field != "eos_token_id":  # by which pooling finds the end of a text
                continue
            raise ValueError(f"The config of {name} says {field} {value!r}; expected one of its {tokens} token ids.")
    Provenance.of(config).check_rows(rows, name)


def check_tower_config(config: Any, shapes: Shapes, tower: str, name: str) -> None:
    """That the config of a tower, `text_model` or `vision_model`, is that of its weights; see `check_text_config`."""
    _check_fields(config, tower_sizes(shapes, tower, name), name)
    heads, width = config.num_attention_heads, config.hidden_size
    if heads < 1 or width % heads:
        raise ValueError(f"The config of {name} says num_attention_heads {heads}, into which {width} does not split.")
    for field in ("layer_norm_eps", "attention_dropout"):
        value = getattr(config, field)
        if value is None or not 0 <= value < 1:
            raise ValueError(f"The config of {name} says {field} {value!r}; expected a number from 0 to 1.")


def tower_sizes(shapes: Shapes, tower: str, name: str) -> dict[str, int]:
    """What the weights of a tower, `text_model` or `vision_model`, say of its config.

    Raises:
        ValueError: weights are missing, or of a shape that no CLIP has.
    """
    layers = {key.split(".")[3] for key in shapes if key.startswith(f"{tower}.encoder.layers.")}
    first = f"{tower}.encoder.layers.0.mlp.fc1.weight"
    if first not in shapes:
        raise ValueError(f"{name} lacks the first layer of its {tower}: it is no whole checkpoint.")
    if tower == "text_model":
        width = dims(shapes, TOKEN_TABLE, 2, name)[1]
    else:
        width = dims(shapes, "vision_model.embeddings.patch_embedding.weight", 4, name)[0]
    intermediate = dims(shapes, first, 2, name)[0]
    return {"hidden_size": width, "intermediate_size": intermediate, "num_hidden_layers": len(layers)}


def dims(shapes: Shapes, key: str, count: int, name: str) -> tuple[int, ...]:
    """The shape of a weight that must be there, of `count` dimensions, none of them empty.

    Raises:
        ValueError: it is not so.
    """
    shape = shapes.get(key)
    if shape is None:
        raise ValueError(f"{name} lacks {key!r}: it is no whole checkpoint.")
    if len(shape) != count or 0 in shape:
        raise ValueError(f"{name} has {key!r} of shape {tuple(shape)}, which no CLIP has.")
    return tuple(shape)


def _check_fields(config: Any, found: Mapping[str, int], name: str) -> None:
    for field, value in found.items():
        if getattr(config, field) != value:
            raise ValueError(
                f"The config of {name} says {field} {getattr(config, field)}, but its weights have {value}: get the"
                " config that belongs to them."
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
