"""Where a text that is too long for an encoder is cut."""

from __future__ import annotations

from collections.abc import Sequence

# Scripts that write no spaces: their marks end a sentence or a clause by themselves, Latin ones only before a space.
_WIDE_SENTENCE_ENDS = ("。", "！", "？", "｡")

_WIDE_CLAUSE_ENDS = ("，", "、", "；", "：")

_CLOSING = "\"'”’»)]」』）"


def split_windows(text: str, offsets: Sequence[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """Split a text into windows of at most `size` tokens, at sentence ends where possible.

    Otherwise at commas, else between words, else between characters. Only boundaries in the second half of a window
    count: windows that end early cost another run of the encoder and tear the text apart.

    Args:
        text: the text.
        offsets: for each token its first and one past its last character, without start and end token.
        size: tokens that a window holds, without start and end token.

    Returns:
        For each window its first and one past its last token; together they are all tokens, in order.

    Example:
        >>> text = "A fox. A hare, a bee."
        >>> offsets = [(0, 1), (2, 5), (5, 6), (7, 8), (9, 13), (13, 14), (15, 16), (17, 20), (20, 21)]
        >>> [text[offsets[a][0] : offsets[b - 1][1]] for a, b in split_windows(text, offsets, 5)]
        ['A fox.', 'A hare,', 'a bee.']
    """
    if size < 1:
        raise ValueError(f"A window must hold at least 1 token, but size is {size}.")
    spans, start = [], 0
    while len(offsets) - start > size:
        cuts = range(start + (size + 1) // 2, start + size + 1)
        stop = max(cuts, key=lambda cut: (_boundary(text, offsets[cut - 1], offsets[cut]), cut))
        spans.append((start, stop))
        start = stop
    spans.append((start, len(offsets)))
    return spans


def _boundary(text: str, before: tuple[int, int], after: tuple[int, int]) -> int:
    """How good a place to cut lies between two tokens: 4 sentences, 3 clauses, 2 words, 1 characters, 0 inside one."""
    gap = text[before[1] : after[0]]
    left = text[max(0, before[1] - 8) : before[1]].rstrip(_CLOSING)
    if "\n" in gap or left.endswith(_WIDE_SENTENCE_ENDS) or (gap and left.endswith((".", "!", "?", "…"))):
        return 4
    if left.endswith(_WIDE_CLAUSE_ENDS) or (gap and left.endswith((",", ";", ":"))):
        return 3
    if gap:
        return 2
    return int(after[0] >= before[1])
