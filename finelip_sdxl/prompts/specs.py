"""The facts of an SDXL's text encoders that a plan needs, from its configs and tokenizers alone.

Neither PyTorch nor Diffusers is imported, so that a prompt is planned at once.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from finelip_sdxl.foreign_files import one_line, read_json
from finelip_sdxl.names import Location, resolve
from finelip_sdxl.old_names import with_new_names
from finelip_sdxl.options import ENCODERS, STOCK_POSITIONS, STRETCH_FACTOR, STRETCH_KEEP
from finelip_sdxl.prompts.plan import EncoderSpec
from finelip_sdxl.prompts.vocabulary import clip_tokenizer
from finelip_sdxl.provenance import Provenance


def read_specs(base: str) -> tuple[list[EncoderSpec], dict[str, Any]]:
    """The text encoders that `from_pretrained` makes of a base, and the content of its `model_index.json`.

    Args:
        base: hub id or directory of an SDXL, or `"miniature"`.

    Raises:
        OSError: a file is missing, or the hub cannot be reached.
        ValueError: a file is faulty, or the base has not the text encoders of an SDXL.

    Examples:
        >>> [(spec.encoder, spec.positions) for spec in read_specs("miniature")[0]]
        [('text_encoder', 248), ('text_encoder_2', 248)]
    """
    place = resolve(base)
    file = place.find("model_index.json")
    if file is None:
        raise FileNotFoundError(f"{base} holds no model_index.json: pass a directory or a hub id of an SDXL.")
    index = with_new_names(read_json(file))
    names = [name for name in ENCODERS if isinstance(entry := index.get(name), list) and entry[:1] not in ([], [None])]
    if not names or "text_encoder_2" not in index:
        raise ValueError(f"{base} lacks the CLIP text encoders of an SDXL: pass another base.")
    return [_read_spec(place, name, f"stock_{name}" in index) for name in names], index


def sdxl_specs() -> list[EncoderSpec]:
    """The text encoders that `from_pretrained` makes of any real SDXL, with CLIP's vocabulary, which ships here."""
    positions = _stretched(STOCK_POSITIONS)
    return [
        EncoderSpec(name, clip_tokenizer(pad_token, positions), positions, has_stock=True)
        for name, pad_token in zip(ENCODERS, ("<|endoftext|>", "!"), strict=True)
    ]


def _read_spec(place: Location, encoder: str, holds_original: bool) -> EncoderSpec:
    from transformers import CLIPTokenizer

    file = place.find("config.json", encoder)
    if file is None:
        raise FileNotFoundError(f"{place.name} has no {encoder}/config.json: pass a whole SDXL.")
    config = read_json(file)
    positions = config.get("max_position_embeddings", STOCK_POSITIONS)
    if type(positions) is not int or positions < 3:
        raise ValueError(f"{file} says max_position_embeddings {positions!r:.60}; expected a whole number from 3 on.")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(place.path or place.name, subfolder=ENCODERS[encoder])
    except Exception as error:  # transformers and tokenizers raise errors of all types for faulty files
        problem = f"{ENCODERS[encoder]} of {place.name} cannot be read ({one_line(error)})"
        raise OSError(f"{problem}: pass an SDXL with its tokenizers.") from error
    return EncoderSpec(
        encoder,
        tokenizer,
        positions=_stretched(positions) if positions <= STOCK_POSITIONS else positions,
        has_stock=holds_original or Provenance.of(SimpleNamespace(**config)).is_stock(positions),
    )


def _stretched(positions: int) -> int:
    return STRETCH_KEEP + STRETCH_FACTOR * (positions - STRETCH_KEEP)
