"""The phrases of a prompt, and the positions of their tokens."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from finelip_sdxl.prompts.plan import EncoderPlan, tokenize

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

Unit = Literal["sentence", "clause"]
UNITS: tuple[Unit, ...] = ("sentence", "clause")

_CLOSING = r"[\"'”’»)\]」』）]*"
# Latin marks end a phrase only before a space, those of scripts without spaces always.
_ENDS: dict[Unit, str] = {"sentence": rf"[.!?…]+{_CLOSING}(?=\s|$)|[。！？｡]+{_CLOSING}|\n"}
_ENDS["clause"] = rf"{_ENDS['sentence']}|[,;:]{_CLOSING}(?=\s|$)|[，、；：]"

# Marks right behind a phrase, which a causal encoder encodes after all of it
_MARKS_BEHIND = re.compile(r"[^\w\s]*")


def split_phrases(text: str, unit: Unit | None = None) -> list[tuple[int, int]]:
    """Split a text into phrases.

    Args:
        text: the text.
        unit: `"sentence"` or `"clause"`. By default sentences, and the clauses of a text that is one sentence.

    Returns:
        The first and one past the last character of each phrase, without white space around it and with its marks. A
        part without letters or digits is no phrase.

    Examples:
        >>> text = "A fox, 3.5 feet tall. A hare!"
        >>> [text[start:end] for start, end in split_phrases(text)]
        ['A fox, 3.5 feet tall.', 'A hare!']
        >>> [text[start:end] for start, end in split_phrases(text, "clause")]
        ['A fox,', '3.5 feet tall.', 'A hare!']
    """
    if unit is None:
        sentences = split_phrases(text, "sentence")
        return sentences if len(sentences) > 1 else split_phrases(text, "clause")
    ends = [match.end() for match in re.finditer(_ENDS[unit], text)]
    phrases = []
    for first, last in zip([0, *ends], [*ends, len(text)], strict=True):
        part = text[first:last]
        if re.search(r"\w", part):
            start = first + len(part) - len(part.lstrip())
            phrases.append((start, start + len(part.strip())))
    return phrases


@dataclass(frozen=True)
class TokenPlaces:
    """The tokens of a text in an encoder's windows.

    Attributes:
        text: the text, with the part that is cut, and without the syntax of weights.
        offsets: the first and one past the last character of each token that is encoded.
        positions: the position of each among the text's states, start and end tokens of windows counted.
    """

    text: str
    offsets: Sequence[tuple[int, int]]
    positions: Sequence[int]

    @classmethod
    def of(cls, plan: EncoderPlan, tokenizer: CLIPTokenizer) -> TokenPlaces:
        """The tokens of a plan.

        Examples:
            >>> from finelip_sdxl.prompts.plan import EncoderSpec, plan_prompts
            >>> from finelip_sdxl.prompts.vocabulary import clip_tokenizer
            >>> spec = EncoderSpec("text_encoder", clip_tokenizer(), positions=4)
            >>> places = TokenPlaces.of(plan_prompts([spec], [["a red fox"]]).plans[0], spec.tokenizer)
            >>> places.offsets, places.positions
            ([(0, 1), (2, 5), (6, 9)], [1, 2, 5])
        """
        text = "".join(window.text for window in plan.windows) + plan.cut_text
        positions = [
            number * plan.positions + 1 + place
            for number, window in enumerate(plan.windows)
            for place in range(len(window.token_ids))
        ]
        _, offsets = tokenize(tokenizer, text)
        return cls(text, offsets[: len(positions)], positions[: len(offsets)])

    def last_position(self, start: int, end: int) -> int | None:
        """The position of a phrase's last token that is encoded, or of the mark right behind it.

        The encoders are causal: a token's states know what stands before it, so a phrase's last token knows all of the
        phrase. None if nothing of the phrase is encoded.
        """
        marks = _MARKS_BEHIND.match(self.text, end)
        end = marks.end() if marks else end
        number = bisect_left(self.offsets, end, key=lambda offset: offset[0]) - 1  # the last that begins in the phrase
        return self.positions[number] if number >= 0 and self.offsets[number][1] > start else None
