"""Caption augmentation: random changes, so an encoder learns more of a caption than the summary at its start."""

from __future__ import annotations

import random
from dataclasses import dataclass

from .caption_dataset import split_sentences


@dataclass(frozen=True)
class CaptionAugmentation:
    """Random changes of a long caption in training; by default none.

    Long captions tend to begin with a sentence that sums up the rest, and an encoder trained on them uses little else.

    Source: DeBias-CLIP (arXiv 2602.22419).

    Args:
        drop_first: probability that the first sentence is left out, if there are others.
        sample_sentences: probability that only some sentences remain, in their order. Their number is from one to all;
            all numbers, and all choices of that many, are equally likely.
        prefix_padding: highest number of padding tokens before a text; all numbers from 0 are equally likely.

    Raises:
        ValueError: an argument is out of range.

    Examples:
        >>> CaptionAugmentation(drop_first=1.0)("A quiet street. A fox sleeps. It is night.", random.Random(0))
        'A fox sleeps. It is night.'
    """

    drop_first: float = 0.0
    sample_sentences: float = 0.0
    prefix_padding: int = 0

    def __post_init__(self) -> None:
        for name in ("drop_first", "sample_sentences"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected a probability, from 0 to 1.")
        if self.prefix_padding < 0:
            raise ValueError(f"prefix_padding is {self.prefix_padding}: expected a number of tokens, at least 0.")

    def __call__(self, caption: str, rng: random.Random) -> str:
        """Returns the caption that remains."""
        sentences = split_sentences(caption)
        if rng.random() < self.drop_first and len(sentences) > 1:
            sentences = sentences[1:]
        if rng.random() < self.sample_sentences:
            kept = rng.sample(range(len(sentences)), rng.randint(1, len(sentences)))
            sentences = [sentences[number] for number in sorted(kept)]
        return " ".join(sentences)

    def padding(self, rng: random.Random) -> int:
        """Returns the number of padding tokens before a text."""
        return rng.randint(0, self.prefix_padding)
