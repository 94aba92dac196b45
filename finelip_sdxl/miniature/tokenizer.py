"""The miniature's tokenizer: CLIP's byte-pair encoding, trained on the captions' own words.

Every word of a caption is one token; any other text still encodes, byte by byte at worst.
"""

from __future__ import annotations

from pathlib import Path

from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

_START, _END = "<|startoftext|>", "<|endoftext|>"
MERGES = Path(__file__).parent / "merges.txt"  # by training/miniature/train_tokenizer.py


def build_tokenizer(pad_token: str = _END, max_length: int = 77) -> CLIPTokenizer:
    """A `CLIPTokenizer` for the miniature; SDXL's second one pads with `"!"`, its first with the end token.

    The vocabulary has CLIP's layout: 256 bytes in CLIP's order, the same at a word's end, the merges, then start and
    end token.
    """
    merges = [tuple(line.split(" ")) for line in MERGES.read_text(encoding="utf-8").splitlines()]
    symbols = bytes_to_unicode().values()  # the printable ones first, so that "!" has id 0
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), *("".join(pair) for pair in merges), _START, _END]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    # Pairs are what `merges` takes, whatever its annotation says.
    return CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad_token, model_max_length=max_length)  # type: ignore[arg-type]
