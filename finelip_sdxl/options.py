"""Options of pipelines and comparisons: their values, their limits, and their checks. Imports nothing heavy."""

from __future__ import annotations

import re
from collections.abc import Sequence
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args

MAX_CHARACTERS = 20_000
"""Highest number of characters of a text. Longer texts are refused before any work is done on them."""

MAX_POSITIONS = 100 * 248
"""Highest number of positions of a text's windows in all: the UNet uses all of them at every step."""

STOCK_POSITIONS = 77
"""Number of positions of CLIP's own text encoders; stock SDXL pads every prompt to it."""

STRETCH_KEEP, STRETCH_FACTOR = 20, 4
"""Leading rows that a stretch of a positional table leaves unchanged, and rows that it makes from each later one."""

ENCODERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
"""SDXL's text encoders and their tokenizers, by the names of a pipeline's components."""

ShortPromptEncoder = Literal["original", "long"]
Overflow = Literal["window", "truncate", "error"]
HiddenStates = Literal["penultimate", "last"]
FineLIPMerge = Literal["replace", "delta"]
Weighting = Literal["compel", "a1111"]
Emphasis = Literal["compel", "a1111", "a1111_no_norm", "comfyui"]

# The values of each type, for checks and flags.
SHORT_PROMPT_ENCODER: tuple[str, ...] = get_args(ShortPromptEncoder)
OVERFLOW: tuple[str, ...] = get_args(Overflow)
HIDDEN_STATES: tuple[str, ...] = get_args(HiddenStates)
FINELIP_MERGE: tuple[str, ...] = get_args(FineLIPMerge)
WEIGHTING: tuple[str | None, ...] = (None, *get_args(Weighting))  # None: prompts are plain text
EMPHASIS: tuple[str, ...] = get_args(Emphasis)

LENGTH_BUCKETS = (77, 154)

# FineLIP's published values, and what its ablations compare them with.
MARGIN = 0.2  # of the triplet margin loss
NEGATIVE_SLOPE = 0.1  # of late interaction's LeakyReLU
Pooling = Literal["max", "mean"]
POOLING: tuple[str, ...] = get_args(Pooling)  # of late interaction: the best partner of a token, or the mean of all
REFINED_SHARE = 0.2  # refined tokens as a share of an image's patches: 0.4 · 0.5
REFINEMENT = ("both", "images", "texts", "none")  # whose tokens are refined
LOSSES = ("triplet", "contrastive", "fine_contrastive", "region", "distillation")  # of a FineLIP's training
LORA_LAYERS = ("cross-attention", "attention", "transformer")  # of the UNet, that a LoRA changes

# Names of a pipeline's options: for loading its parts, and for encoding prompts.
LOADED = ("config", "variant", "finelip", "finelip_2", "finelip_merge", "finelip_base", "conditioning_adapter")
ENCODING = ("short_prompt_encoder", "overflow", "hidden_states", "weighting", "emphasis")

# The kinds of data with images, for help texts.
DATA_KINDS = (
    "KIND:PATH, where KIND is folder (pictures with .txt files beside them), csv, jsonl, sharegpt4v, docci, urban1k, "
    "coco or flickr30k, or miniature:SCENES for drawn scenes"
)

PROMPT_KINDS = (
    f"{DATA_KINDS}; or prompts without images: dpg-bench:FOLDER, tiif:FOLDER, longbench-t2i:FILE, detailmaster:FILE or "
    "txt:FILE"
)

# Folders of pictures as published scorers read them; plain is ours.
LAYOUTS = ("plain", "dpg-bench", "tiif", "longbench-t2i", "detailmaster", "t2i-compbench")

# Columns of a comparison by their keys, with their titles.
COLUMNS = {"stock": "Stock SDXL", "compel": "compel", "finelip": "FineLIP-SDXL"}


class _Absent:
    def __init__(self, value: str) -> None:
        self._value = value

    def __repr__(self) -> str:
        return self._value


AS_SAVED: Any = _Absent("as saved")
"""Default of an option on loading: the value in a saved pipeline, or else the default of the class."""

AS_SET: Any = _Absent("as set")
"""Default of an option in a call: the pipeline's own value."""


def check_texts(name: str, value: Any) -> list[str]:
    """`value` as a list of texts.

    Raises:
        TypeError: it is no string and no list of strings.
        ValueError: it is an empty list, or a text has more than `MAX_CHARACTERS` characters, or half of a surrogate
            pair.
    """
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple):
        raise TypeError(f"`{name}` must be a string or a list of strings, but is {_a(value)}.")
    if not texts:
        raise ValueError(f"`{name}` is an empty list; pass at least one string.")
    for index, text in enumerate(texts):
        place = f"`{name}`" if isinstance(value, str) else f"`{name}[{index}]`"
        if not isinstance(text, str):
            raise TypeError(f"{place} must be a string, but is {_a(text)}.")
        if len(text) > MAX_CHARACTERS:
            raise ValueError(f"{place} has {len(text):,} characters; expected at most {MAX_CHARACTERS:,}: shorten it.")
        if re.search(r"[\ud800-\udfff]", text):
            raise ValueError(f"{place} holds half of a surrogate pair, which is no character: decode the text again.")
    return list(texts)


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> Any:
    """`value`, if it is one of `choices`.

    Raises:
        ValueError: it is another; the message names the choices.
    """
    if not isinstance(value, str | None) or value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, but is {value!r:.60}.")
    return value


def check_adapter_scale(value: float) -> float:
    """`value` as a share of the conditioning adapter.

    Raises:
        ValueError: it is no number from 0 to 1.
    """
    if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= value <= 1:
        raise ValueError(
            f"The scale of the conditioning adapter is {value!r:.60}; expected a number from 0, without the adapter,"
            " to 1, with all of it."
        )
    return float(value)


def check_length_buckets(value: Any) -> tuple[int, ...]:
    """`value` as an ascending tuple of lengths; None becomes the empty one, for padding to full length always.

    Raises:
        ValueError: it is no list of lengths of at least 3.
    """
    buckets = () if value is None else value
    if not isinstance(buckets, list | tuple) or not all(type(length) is int and length > 2 for length in buckets):
        raise ValueError(
            "`length_buckets` must be a list of lengths in tokens, each at least 3, such as (77, 154), or empty to"
            f" pad every prompt to full length, but is {value!r:.60}."
        )
    return tuple(sorted(set(buckets)))


def check_lora_dir(value: Any) -> Path | None:
    """`value` as a folder of LoRAs; None for none.

    Raises:
        TypeError: it is no path.
        ValueError: it is no folder.
    """
    if value is None:
        return None
    if not isinstance(value, str | PathLike):
        raise TypeError(f"`lora_dir` is {value!r:.60}; expected a folder of LoRAs.")
    folder = Path(value)
    if not folder.is_dir():
        raise ValueError(
            f"`lora_dir` is {str(value)!r:.200}, which is no folder; expected one with .safetensors files."
        )
    return folder


def check_config(base: str, config: str | None) -> None:
    """Refuse a config for a base that is no single file and so has its own configs.

    Raises:
        ValueError: both a config and such a base are passed.
    """
    if config is not None and not Path(base).is_file():
        raise ValueError(f"The config {config} goes with a single file, but {base} is none: leave it out.")


def _a(value: Any) -> str:
    return f"{type(value).__name__} ({value!r:.60})" if value is not None else "None"
