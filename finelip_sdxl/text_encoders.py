"""Plain `transformers` CLIP text encoders: built from tensors, stretched to 248 positions, and checked.

A FineLIP text encoder is a stock `CLIPTextModel` or `CLIPTextModelWithProjection` with a longer positional table, so
there is no model class here.
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
    """Number of an encoder's positions: the rows of its positional table, not the number in its config.

    Examples:
        >>> config = CLIPTextConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=1)
        >>> num_positions(CLIPTextModel(config))
        77
    """
    tower: Any = getattr(encoder, "text_model", encoder)
    rows: int = tower.embeddings.position_embedding.weight.shape[0]
    return rows


def stretch_text_encoder(encoder: TextEncoder, keep: int = KEEP, factor: int = FACTOR) -> TextEncoder:
    """A new text encoder of the same class with a stretched positional table, 248 positions from 77.

    The argument is not modified, and its weights are not copied: on the CPU, all parameters but the positional table
    share memory with it. `copy.deepcopy` the result before training it, if the original is still needed.

    The config records `stretched_from` (the positions before), `stretch_keep` and `stretch_factor`, also in saved
    folders. The record promises that the weights are exactly the original's, and that the rows
    `stretched_row_indices(stretched_from, stretch_keep, stretch_factor)` are its whole table. Delete it if you train
    the result (`finelip_sdxl.provenance.forget_stretch`).

    Args:
        encoder: a text encoder without adapters (merge or unload a LoRA first).
        keep: leading positions that stay as they are.
        factor: positions made of each later one.

    Returns:
        The stretched encoder, in evaluation mode, on the device and in the dtype of `encoder`.

    Raises:
        ValueError: the encoder is stretched already, quantized or has adapters; or `keep` or `factor` is out of range.

    Examples:
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
            "This text encoder is quantized, so its weights cannot be stretched: save the SDXL with 248 positions by"
            " `finelip-sdxl convert` first, and load the result quantized."
        )
    tensors = text_encoder_tensors(encoder)
    config = copy.deepcopy(encoder.config)
    record.with_stretch(num_positions(encoder), keep, factor).write(config)
    tensors[POSITION_TABLE] = stretch_positions(tensors[POSITION_TABLE], keep=keep, factor=factor)
    config.max_position_embeddings = tensors[POSITION_TABLE].shape[0]
    return build_text_encoder(config, tensors)


def unstretch_text_encoder(encoder: TextEncoder) -> TextEncoder:
    """The text encoder before `stretch_text_encoder`, made from its result.

    All weights but the positional table are shared with `encoder`, also when either is moved to another device.

    Raises:
        ValueError: the encoder was not stretched, or was trained afterward.

    Examples:
        >>> config = CLIPTextConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=1)
        >>> num_positions(unstretch_text_encoder(stretch_text_encoder(CLIPTextModel(config))))
        77
    """
    config = copy.deepcopy(encoder.config)
    record = Provenance.of(config)
    rows = record.original_row_indices()
    if rows is None:
        raise ValueError(
            f"This text encoder of {num_positions(encoder)} positions was trained and holds no stock one: pass the"
            " stock SDXL as base, and this encoder as its replacement."
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
    """A copy of a tokenizer for `length` tokens, without truncation or padding of its own.

    (A deep copy of `CLIPTokenizer` decodes wrongly. And truncation and padding of the last call would be saved with
    the tokenizer, where other programs follow them.)
    """
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        copied: CLIPTokenizer = type(tokenizer).from_pretrained(folder, model_max_length=length)
    copied.backend_tokenizer.no_truncation()
    copied.backend_tokenizer.no_padding()
    return copied


def check_tokenizer(tokenizer: CLIPTokenizer, name: str) -> None:
    """Check that a tokenizer knows words. If its files are missing, transformers silently makes one that knows letters
    only, or nothing.

    Args:
        tokenizer: tokenizer of a CLIP.
        name: name of its source, for messages.

    Raises:
        ValueError: it has no merges, or too few for its words.

    Examples:
        >>> check_tokenizer(CLIPTokenizer(), "tokenizer")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: tokenizer knows no words, ...
    """
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    added = tokenizer.get_added_vocab()
    words = [word for word in model["vocab"] if len(word.removesuffix("</w>")) > 1 and word not in added]
    merges = len(model.get("merges", []))  # each makes a word, or the beginning of one
    if merges == 0 or merges < len(words) / 2:
        raise ValueError(
            f"{name} knows no words, since its tokenizer.json, or its vocab.json and merges.txt, are missing or "
            "incomplete: fetch them again."
        )


def text_encoder_tensors(encoder: TextEncoder) -> dict[str, Tensor]:
    """The weights of a text encoder under the keys of its file: `text_model.…`, `text_projection.weight`. No copies.

    (Since transformers 5.6 the keys of a `CLIPTextModel` in memory lack the prefix.)
    """
    tensors = encoder.state_dict()
    if not hasattr(encoder, "text_model"):
        tensors = {f"text_model.{key}": tensor for key, tensor in tensors.items()}
    return {key: tensor.detach() for key, tensor in tensors.items()}


def build_text_encoder(config: CLIPTextConfig, tensors: Mapping[str, Tensor]) -> TextEncoder:
    """A plain text encoder of these weights that saves them under keys with `text_model.` at the beginning.

    A `CLIPTextModel` constructed by transformers 5.6 or later saves keys without that prefix, and older versions load
    such a file as random weights, with a warning only. An encoder that was *loaded* from prefixed keys saves them
    again, so this one is loaded.

    Args:
        config: config of the encoder; its `max_position_embeddings` must be the rows of the table in `tensors`.
        tensors: `text_model.…` and, for a `CLIPTextModelWithProjection`, `text_projection.weight`. On the CPU they are
            not copied: the encoder shares their memory.

    Returns:
        A `CLIPTextModelWithProjection` if there is a `text_projection.weight`, otherwise a `CLIPTextModel`; in
        evaluation mode, in the dtype of the tensors.

    Raises:
        ValueError: a tensor is missing, unknown or of another shape than in `config`.

    Examples:
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
    """A model with exactly these weights: none missing, none left over, none copied on the CPU.

    Args:
        model_class: a class of transformers, or `FineLIPModel`.
        config: config of the model.
        tensors: its weights, all on one device and of one dtype.
        name: name of their source, for messages.

    Raises:
        ValueError: a tensor is missing, unknown or of another shape than in `config`, or `config` is faulty.
    """
    check_shapes(model_class, config, {key: tuple(tensor.shape) for key, tensor in tensors.items()}, name)
    return fill_model(model_class, config, tensors, name)


def fill_model(
    model_class: type[ModelT], config: PreTrainedConfig, tensors: Mapping[str, Tensor], name: str | None = None
) -> ModelT:
    """As `build_model`, for weights that `check_shapes` has checked already."""
    sample = next(iter(tensors.values()))
    with _without_progress_bar(), config_errors(_config_of(model_class, name)):
        model: Any = model_class.from_pretrained(None, config=config, state_dict=dict(tensors), dtype=sample.dtype)
    filled: ModelT = model.to(sample.device)
    return filled


def check_shapes(model_class: type, config: PreTrainedConfig, shapes: Shapes, name: str | None = None) -> None:
    """Check that a model of this config has exactly weights of these shapes. Arguments are as in `build_model`.

    Raises:
        ValueError: a weight is missing, unknown or of another shape; or no model can be built from the config.
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
    """Check that the config of a text tower matches the shapes of its weights, before a model is built.

    Args:
        config: config of the tower.
        shapes: shapes of its weights, under the keys of its file, `text_model.…`.
        name: name of the source, for messages.

    Raises:
        ValueError: a field is wrong; the message names it.

    Examples:
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
            if value is None and field != "eos_token_id":  # pooling needs this one to find the end of a text
                continue
            raise ValueError(f"The config of {name} says {field} {value!r}; expected one of its {tokens} token ids.")
    Provenance.of(config).check_rows(rows, name)


def check_tower_config(config: Any, shapes: Shapes, tower: str, name: str) -> None:
    """As `check_text_config`, for the common fields of both towers, `text_model` and `vision_model`."""
    _check_fields(config, tower_sizes(shapes, tower, name), name)
    heads, width = config.num_attention_heads, config.hidden_size
    if heads < 1 or width % heads:
        raise ValueError(f"The config of {name} says num_attention_heads {heads}, into which {width} does not split.")
    for field in ("layer_norm_eps", "attention_dropout"):
        value = getattr(config, field)
        if value is None or not 0 <= value < 1:
            raise ValueError(f"The config of {name} says {field} {value!r}; expected a number from 0, and below 1.")


def tower_sizes(shapes: Shapes, tower: str, name: str) -> dict[str, int]:
    """The sizes in the config of a tower, `text_model` or `vision_model`, from its weights.

    Raises:
        ValueError: weights are missing, or of a shape that no CLIP has.
    """
    layers = {key.split(".")[3] for key in shapes if key.startswith(f"{tower}.encoder.layers.")}
    first = f"{tower}.encoder.layers.0.mlp.fc1.weight"
    if first not in shapes:
        raise ValueError(f"{name} lacks the first layer of its {tower}: pass a whole checkpoint.")
    if tower == "text_model":
        width = dims(shapes, TOKEN_TABLE, 2, name)[1]
    else:
        width = dims(shapes, "vision_model.embeddings.patch_embedding.weight", 4, name)[0]
    intermediate = dims(shapes, first, 2, name)[0]
    return {"hidden_size": width, "intermediate_size": intermediate, "num_hidden_layers": len(layers)}


def dims(shapes: Shapes, key: str, count: int, name: str) -> tuple[int, ...]:
    """The shape of a weight, which must have `count` dimensions, none of them empty.

    Raises:
        ValueError: the weight is missing, or has another shape.
    """
    shape = shapes.get(key)
    if shape is None:
        raise ValueError(f"{name} lacks {key!r}: pass a whole checkpoint.")
    if len(shape) != count or 0 in shape:
        raise ValueError(f"{name} has {key!r} of shape {tuple(shape)}; expected {count} dimensions, none empty.")
    return tuple(shape)


def _check_fields(config: Any, found: Mapping[str, int], name: str) -> None:
    for field, value in found.items():
        if getattr(config, field) != value:
            raise ValueError(
                f"The config of {name} says {field} {getattr(config, field)}, but its weights have {value}: use the"
                " config that belongs to them."
            )


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    """Hide the "Loading weights" bar: the weights are in memory already."""
    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()
