"""The prompt meter: how much of a prompt each column of the demo reads, as HTML in the colors of the Gradio page.

`render_meter` fills `templates/meter.html`; `styles/meter.css` is its CSS. Their classes begin with `meter-`.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise

from demo.rendering import render
from finelip_sdxl.prompts.plan import EncoderPlan

STOCK = "stock"
MARKERS = 2  # start and end token

HINT = "Write a prompt, and see here how much of it is read."


def render_meter(
    prompt: str,
    plans: Mapping[str, EncoderPlan],
    titles: Mapping[str, str],
    pending: Collection[str] = (),
) -> str:
    """How much of a prompt each column reads: a line with a bar for each, then the prompt with what is lost struck out.

    Start and end token are counted once, however many windows have them, so that the columns' numbers can be compared.

    Args:
        prompt: the text as it was written.
        plans: for each column, such as `"stock"`, what its encoder gets of it. Windows must know their tokens.
        titles: for each column its name for people.
        pending: columns whose plan follows.

    Returns:
        HTML; text that came in is escaped. Where a column's windows do not join to the prompt (compel's
        syntax of weights is taken out before it reads), they are counted but not marked in the text.

    Example:
        >>> from finelip_sdxl.prompts.plan import Window
        >>> windows = (Window("a fox & ", (320, 3240, 261)), Window("a hare", (320, 14036)))
        >>> plan = EncoderPlan("text_encoder", "prompt", 0, windows, positions=5)
        >>> html = render_meter("a fox & a hare", {"compel": plan}, {"compel": "compel"})
        >>> "reads all 7 tokens in 2 windows of 5" in html, "a fox &amp; <span" in html
        (True, True)
    """
    if not prompt.strip():
        return render("no_prompt", sentence=HINT)
    kept, cut = _text(prompt, plans)
    return render(
        "meter",
        titles=titles,
        lines=[_line(column, plans.get(column)) for column in titles if column in plans or column in pending],
        praise=_praise(plans, titles),
        legend=list(_legend(prompt, plans)),
        kept=kept,
        cut=cut,
        stock=STOCK,
    )


@dataclass(frozen=True)
class _Line:
    """A column's line: a sentence, and a bar whose parts are as long as their tokens are many."""

    column: str
    sentence: str
    parts: tuple[tuple[str, int], ...] = ()
    loses: bool = False
    is_pending: bool = False


@dataclass(frozen=True)
class _Piece:
    """A part of the prompt, with the columns and numbers of the windows that begin before it."""

    text: str
    windows: tuple[tuple[str, int], ...] = ()


def _line(column: str, plan: EncoderPlan | None) -> _Line:
    if plan is None:
        return _Line(column, "is still reading", is_pending=True)
    parts = [("read", len(window.token_ids)) for window in plan.windows]
    if plan.cut_tokens:
        parts.append(("dropped", plan.cut_tokens))
    return _Line(column, _sentence(plan), tuple(parts), loses=bool(plan.cut_tokens))


def _sentence(plan: EncoderPlan) -> str:
    read = sum(len(window.token_ids) for window in plan.windows) + MARKERS
    if plan.cut_tokens:
        are = "is" if plan.cut_tokens == 1 else "are"
        return f"reads {read:,} of {read + plan.cut_tokens:,} tokens; {plan.cut_tokens:,} {are} dropped"
    if len(plan.windows) == 1:
        return f"reads all {read:,} tokens at once"
    return f"reads all {read:,} tokens in {len(plan.windows)} windows of {plan.positions}"


def _praise(plans: Mapping[str, EncoderPlan], titles: Mapping[str, str]) -> str:
    if not plans or any(plan.cut_tokens for plan in plans.values()):
        return ""
    short = all(len(plan.windows) == 1 for plan in plans.values())
    first = titles[next(iter(plans))]
    who = {1: f"{first} reads", 2: "both read", 3: "all three read"}[len(plans)]
    return f"{'Short enough' if short else 'Nothing is lost'}: {who} the whole prompt."


def _legend(prompt: str, plans: Mapping[str, EncoderPlan]) -> Iterator[tuple[str, str]]:
    """Columns, and what their marks in the text mean, or why they have none."""
    for column, plan in plans.items():
        parted = len(plan.windows) > 1 or plan.cut_tokens
        if parted and not _joins(prompt, plan):
            yield column, "rewritten"
        elif column == STOCK and plan.cut_tokens:
            yield column, "struck out"
        elif len(plan.windows) > 1:
            yield column, "window"


def _text(prompt: str, plans: Mapping[str, EncoderPlan]) -> tuple[list[_Piece], list[_Piece]]:
    """The prompt up to where stock stops, and the rest, both in pieces that begin where a window does."""
    windows: dict[int, tuple[tuple[str, int], ...]] = {}  # by the character before which they begin
    stop = len(prompt)
    for column, plan in plans.items():
        if not _joins(prompt, plan):
            continue
        if column == STOCK:
            stop -= len(plan.cut_text)
        starts = accumulate(len(window.text) for window in plan.windows[:-1])
        for number, start in enumerate(starts, start=2):
            windows[start] = (*windows.get(start, ()), (column, number))

    def pieces(first: int, last: int) -> list[_Piece]:
        borders = sorted({first, last, *(place for place in windows if first < place < last)})
        return [_Piece(prompt[left:right], windows.get(left, ())) for left, right in pairwise(borders)]

    return pieces(0, stop), pieces(stop, len(prompt))


def _joins(prompt: str, plan: EncoderPlan) -> bool:
    """Whether the windows are slices of the prompt as it was written."""
    return "".join(window.text for window in plan.windows) + plan.cut_text == prompt
