"""CLIP's vocabulary, with which every SDXL tokenizes prompts, and the layout that it shares with the miniature's.

The merges in `clip_vocabulary/` are OpenAI's, under the MIT license beside them.
"""

from __future__ import annotations

import bz2
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
SDXL, MINIATURE, OTHER = "SDXL's tokens", "the miniature's tokens", "this model's own tokens"

_MERGES = Path(__file__).parent / "clip_vocabulary" / "merges.txt.bz2"
# Number of entries of a vocabulary, one of them and its id, and the name of its tokens.
_NAMES = ((49_408, "photograph</w>", 8853, SDXL), (860, "hourglass</w>", None, MINIATURE))


def clip_tokenizer(pad_token: str = END, max_length: int = 77) -> CLIPTokenizer:
    """CLIP's own tokenizer, which ships with the package: 49,408 entries, 48,894 of them merges.

    Args:
        pad_token: SDXL's second tokenizer pads with `"!"`, its first with the end token.
        max_length: number of positions of the text encoder.

    Examples:
        >>> clip_tokenizer()("a photo of a cat").input_ids
        [49406, 320, 1125, 539, 320, 2368, 49407]
    """
    return build_tokenizer(_clip_merges(), pad_token, max_length)


def build_tokenizer(merges: Iterable[str], pad_token: str, max_length: int) -> CLIPTokenizer:
    """A `CLIPTokenizer` of a vocabulary in CLIP's layout.

    The layout is: 256 bytes in CLIP's order, the same bytes at a word's end, the merges, and start and end token.

    Args:
        merges: the merges in their order, each of two parts with a space between.
        pad_token, max_length: as in `clip_tokenizer`.

    Examples:
        >>> build_tokenizer(["f o", "fo x</w>"], pad_token="!", max_length=77)("Fox").input_ids
        [514, 513, 515]
    """
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    pairs = [tuple(merge.split(" ")) for merge in merges]
    symbols = bytes_to_unicode().values()  # printable ones come first, so "!" has id 0
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), *("".join(pair) for pair in pairs), START, END]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    # `merges` takes pairs; its annotation is wrong.
    return CLIPTokenizer(vocab=vocab, merges=pairs, pad_token=pad_token, model_max_length=max_length)  # type: ignore[arg-type]


def name_tokens(tokenizer: CLIPTokenizer) -> str:
    """Whose tokens a tokenizer counts, in a few words for reports: SDXL's, the miniature's, or a model's own.

    Added tokens, such as those of a textual inversion, change nothing.

    Examples:
        >>> name_tokens(clip_tokenizer())
        "SDXL's tokens"
    """
    size, find = tokenizer.vocab_size, tokenizer.backend_tokenizer.token_to_id
    for entries, token, index, name in _NAMES:
        found = find(token)
        if size == entries and found is not None and index in (None, found):
            return name
    return OTHER


@cache
def _clip_merges() -> tuple[str, ...]:
    return tuple(bz2.decompress(_MERGES.read_bytes()).decode("utf-8").splitlines())
