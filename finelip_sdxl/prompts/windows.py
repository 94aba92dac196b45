"""The cut of a long text into windows."""

from __future__ import annotations

from collections.abc import Sequence

# Marks of scripts without spaces: they end a sentence or a clause by themselves, Latin marks only before a space.
_WIDE_SENTENCE_ENDS = ("。", "！", "？", "｡")

_WIDE_CLAUSE_ENDS = ("，", "、", "；", "：")

_CLOSING = "\"'”’»)]」』）"


def split_windows(text: str, offsets: Sequence[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """Split a text into windows of at most `size` tokens, at sentence ends where possible.

    The next choices are commas, spaces between words, and borders between characters. Only cuts in the second half of
    a window count: windows that end early cost another run of the encoder and tear the text apart.

    Args:
        text: the text.
        offsets: the first and one past the last character of each token, without start and end token.
        size: number of tokens in a window, without start and end token.

    Returns:
        The first and one past the last token of each window. The windows hold all tokens, in order.

    Raises:
        ValueError: `size` is below 1.

    Examples:
        >>> text = "A fox. A hare, a bee."
        >>> offsets = [(0, 1), (2, 5), (5, 6), (7, 8), (9, 13), (13, 14), (15, 16), (17, 20), (20, 21)]
        >>> [text[offsets[a][0] : offsets[b - 1][1]] for a, b in split_windows(text, offsets, 5)]
        ['A fox.', 'A hare,', 'a bee.']
    """
    if size < 1:
        raise ValueError(f"size is {size}; expected at least 1 token in a window.")
    spans, start = [], 0
    while len(offsets) - start > size:
        cuts = range(start + (size + 1) // 2, start + size + 1)
        stop = max(cuts, key=lambda cut: (_boundary(text, offsets[cut - 1], offsets[cut]), cut))
        spans.append((start, stop))
        start = stop
    spans.append((start, len(offsets)))
    return spans


def _boundary(text: str, before: tuple[int, int], after: tuple[int, int]) -> int:
    """The rank of a cut between two tokens: 4 sentences, 3 clauses, 2 words, 1 characters, 0 within a character."""
    gap = text[before[1] : after[0]]
    left = text[max(0, before[1] - 8) : before[1]].rstrip(_CLOSING)
    if "\n" in gap or left.endswith(_WIDE_SENTENCE_ENDS) or (gap and left.endswith((".", "!", "?", "…"))):
        return 4
    if left.endswith(_WIDE_CLAUSE_ENDS) or (gap and left.endswith((",", ";", ":"))):
        return 3
    if gap:
        return 2
    return int(after[0] >= before[1])
