"""The miniature's tokenizer: CLIP's byte-pair encoding, trained on the words of captions.

Every word of a caption is one token. Any other text has tokens too, at worst one for each byte.
"""

from __future__ import annotations

from pathlib import Path

from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

_START, _END = "<|startoftext|>", "<|endoftext|>"
MERGES = Path(__file__).parent / "merges.txt"  # written by training/miniature/train_tokenizer.py


def build_tokenizer(pad_token: str = _END, max_length: int = 77) -> CLIPTokenizer:
    """A `CLIPTokenizer` for the miniature. SDXL's second tokenizer pads with `"!"`, its first with the end token.

    The vocabulary has CLIP's layout: 256 bytes in CLIP's order, the same bytes at a word's end, the merges, and start
    and end token.
    """
    merges = [tuple(line.split(" ")) for line in MERGES.read_text(encoding="utf-8").splitlines()]
    symbols = bytes_to_unicode().values()  # printable ones come first, so "!" has id 0
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), *("".join(pair) for pair in merges), _START, _END]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    # `merges` takes pairs; its annotation is wrong.
    return CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad_token, model_max_length=max_length)  # type: ignore[arg-type]
