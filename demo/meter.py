"""The prompt meter: the plan of a prompt in each column of the demo, as HTML in the colors of the Gradio page.

`render_meter` fills `templates/meter.html`; `styles/meter.css` is its CSS. Their classes begin with `meter-`.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise

from demo.rendering import render
from finelip_sdxl.prompts.plan import EncoderPlan, counted_in

STOCK = "stock"
MARKERS = 2  # start and end token

HINT = "Write a prompt, and see here how much of it is encoded."


def render_meter(
    prompt: str,
    plans: Mapping[str, EncoderPlan],
    titles: Mapping[str, str],
    pending: Collection[str] = (),
    note: str = "",
) -> str:
    """Show the plans of a prompt: a line with a bar for each column, and a layer over the prompt's box in which the
    left-out text is struck out.

    Start and end token are counted once, however many windows there are, so that the columns' numbers can be compared.

    Args:
        prompt: the text as it was written.
        plans: for each column, such as `"stock"`, the plan of its first encoder. Windows must hold their tokens.
        titles: for each column, its name on the page.
        pending: columns whose plan follows.
        note: a sentence after the line that says whose tokens are counted.

    Returns:
        HTML, with all text escaped. Where a column's windows do not join to the prompt (compel takes its syntax of
        weights out first), they are counted but not marked in the text.

    Examples:
        >>> from finelip_sdxl.prompts.plan import Window
        >>> windows = (Window("a fox & ", (320, 3240, 261)), Window("a hare", (320, 14036)))
        >>> plan = EncoderPlan("text_encoder", "prompt", 0, windows, positions=5)
        >>> html = render_meter("a fox & a hare", {"compel": plan}, {"compel": "compel"})
        >>> "encodes all 7 tokens in 2 windows of 5" in html, "a fox &amp; <span" in html
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
        sentence=" ".join([*counted_in(plans.values()), *([note] if note else [])]),
    )


@dataclass(frozen=True)
class _Line:
    """A column's line: a sentence, and a bar. Each part of the bar is as long as its number of tokens."""

    column: str
    sentence: str
    parts: tuple[tuple[str, int], ...] = ()
    leaves_out: bool = False
    is_pending: bool = False


@dataclass(frozen=True)
class _Piece:
    """A part of the prompt, with the columns and numbers of the windows that begin before it."""

    text: str
    windows: tuple[tuple[str, int], ...] = ()


def _line(column: str, plan: EncoderPlan | None) -> _Line:
    if plan is None:
        return _Line(column, "is still planning", is_pending=True)
    parts = [("encoded", len(window.token_ids)) for window in plan.windows]
    if plan.cut_tokens:
        parts.append(("left-out", plan.cut_tokens))
    return _Line(column, _sentence(plan), tuple(parts), leaves_out=bool(plan.cut_tokens))


def _sentence(plan: EncoderPlan) -> str:
    encoded = sum(len(window.token_ids) for window in plan.windows) + MARKERS
    if plan.cut_tokens:
        are = "is" if plan.cut_tokens == 1 else "are"
        return f"encodes {encoded:,} of {encoded + plan.cut_tokens:,} tokens; {plan.cut_tokens:,} {are} left out"
    if len(plan.windows) == 1:
        return f"encodes all {encoded:,} tokens at once"
    return f"encodes all {encoded:,} tokens in {len(plan.windows)} windows of {plan.positions}"


def _praise(plans: Mapping[str, EncoderPlan], titles: Mapping[str, str]) -> str:
    if not plans or any(plan.cut_tokens for plan in plans.values()):
        return ""
    short = all(len(plan.windows) == 1 for plan in plans.values())
    first = titles[next(iter(plans))]
    who = {1: f"{first} encodes", 2: "both encode", 3: "all three encode"}[len(plans)]
    return f"{'Short enough' if short else 'Nothing is left out'}: {who} the whole prompt."


def _legend(prompt: str, plans: Mapping[str, EncoderPlan]) -> Iterator[tuple[str, str]]:
    """Columns, each with the meaning of its marks in the text, or the reason why it has none."""
    counts = {column: _tokens(plan) for column, plan in plans.items()}
    for column, plan in plans.items():
        differs = counts[column] != counts.get(STOCK, counts[column])
        if not _joins(prompt, plan) and (differs or len(plan.windows) > 1 or plan.cut_tokens):
            yield column, "rewritten"
        elif column == STOCK and plan.cut_tokens:
            yield column, "struck out"
        elif len(plan.windows) > 1:
            yield column, "window"


def _tokens(plan: EncoderPlan) -> int:
    return sum(len(window.token_ids) for window in plan.windows) + plan.cut_tokens


def _text(prompt: str, plans: Mapping[str, EncoderPlan]) -> tuple[list[_Piece], list[_Piece]]:
    """The prompt up to stock's cut, and the rest, both in pieces. A piece begins where a window begins."""
    windows: dict[int, tuple[tuple[str, int], ...]] = {}  # by their first character
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
