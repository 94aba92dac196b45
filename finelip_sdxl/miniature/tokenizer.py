"""The miniature's tokenizer: CLIP's byte-pair encoding, trained on the captions' own words.

Every word of a caption is one token; any other text still encodes, byte by byte at worst.
"""

from __future__ import annotations

import json

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from .captions import vocabulary

_START, _END = "<|startoftext|>", "<|endoftext|>"
# CLIP's pattern (arXiv 2103.00020): contractions, words, single digits, runs of other marks.
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def build_tokenizer(pad_token: str = _END, max_length: int = 77) -> CLIPTokenizer:
    """A ``CLIPTokenizer`` for the miniature; SDXL's second one pads with ``"!"``, its first with the end token."""
    vocab, merges = _train()
    # Pairs are what `merges` takes, whatever its annotation says.
    return CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad_token, model_max_length=max_length)  # type: ignore[arg-type]


def _train() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's layout: 256 bytes in CLIP's order, the same at a word's end, the merges, then start and end token."""
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=10_000,
        min_frequency=1,
        end_of_word_suffix="</w>",
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learner.train_from_iterator(vocabulary(), trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    symbols = bytes_to_unicode().values()  # the printable ones first, so that "!" has id 0
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), *("".join(pair) for pair in merges), _START, _END]
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}, merges
