"""The prompt meter: how much of a prompt each column of the demo reads, as HTML in the colors of the Gradio page.

`render_meter` gives the HTML and `STYLE` the CSS, both with classes that begin with `meter-`.
"""

from collections.abc import Collection, Iterator, Mapping
from html import escape
from itertools import accumulate, pairwise

from finelip_sdxl.prompts.plan import EncoderPlan

STOCK = "stock"
MARKERS = 2  # start and end token

HINT = "Write a prompt, and see here how much of it is read."

# Gradio wraps rules in selectors of its own and drops @container and nested rules on the way: plain rules only.
STYLE = """
:root { --stock: #c02626; --compel: #966500; --finelip: #0b7285; --meter-on-color: #ffffff; }
.dark { --stock: #ff8f87; --compel: #f5b041; --finelip: #4fc3d9; --meter-on-color: #18181b; }

.meter-stock { --meter-color: var(--stock); }
.meter-compel { --meter-color: var(--compel); }
.meter-finelip { --meter-color: var(--finelip); }

.meter {
  --meter-muted: color-mix(in srgb, var(--body-text-color) 68%, var(--background-fill-secondary));
  display: flex; flex-direction: column; gap: 12px;
  color: var(--body-text-color); font-size: 14px; line-height: 1.4;
}
.meter-line { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 4px 12px; }
.meter-title, .meter-loses { font-weight: 600; color: var(--meter-color); }
.meter-bar { display: flex; flex: 0 0 100%; gap: 3px; height: 10px; }
.meter-read, .meter-dropped { flex-basis: 0; min-width: 2px; border-radius: 3px; }
.meter-read { background: var(--meter-color); }
.meter-dropped {
  border: 1px solid var(--meter-color); opacity: 0.55;
  background: repeating-linear-gradient(135deg, var(--meter-color) 0 1px, transparent 1px 6px);
}
.meter-legend { display: flex; flex-wrap: wrap; gap: 4px 20px; font-size: 13px; }
.meter-text {
  max-height: 26em; overflow-y: auto; padding: 12px 14px;
  border: 1px solid var(--border-color-primary); border-radius: 8px;
  background: var(--background-fill-secondary);
  line-height: 1.75; white-space: pre-line; overflow-wrap: anywhere;
}
.meter-cut {
  color: var(--meter-muted);
  text-decoration: line-through; text-decoration-color: var(--meter-color); text-decoration-thickness: 1px;
}
.meter-mark {
  display: inline-block; margin: 0 4px 0 1px; padding: 0 5px; border-radius: 4px;
  background: var(--meter-color); color: var(--meter-on-color);
  font-size: 11px; font-weight: 700; line-height: 16px; white-space: nowrap; vertical-align: 1px; user-select: none;
}
.meter-good { font-weight: 600; color: var(--finelip); }
.meter-hint { color: var(--meter-muted); }
@media (max-width: 480px) { .meter-title { flex-basis: 100%; } }
"""


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
        HTML for `STYLE`; text that came in is escaped. Where a column's windows do not join to the prompt (compel's
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
        return f'<div class="meter"><div class="meter-hint">{HINT}</div></div>'
    names = {column: escape(titles[column]) for column in plans}
    lines = "".join(
        _line(column, names[column], plans[column]) if column in plans else _pending(column, escape(title))
        for column, title in titles.items()
        if column in plans or column in pending
    )
    legend = "".join(f"<span>{item}</span>" for item in _legend(prompt, plans, names))
    legend = f'<div class="meter-legend">{legend}</div>' if legend else ""
    return f'<div class="meter">{lines}{_praise(plans, names)}{legend}{_text(prompt, plans, names)}</div>'


def _line(column: str, name: str, plan: EncoderPlan) -> str:
    parts = [("read", len(window.token_ids)) for window in plan.windows]
    loses = ""
    if plan.cut_tokens:
        parts.append(("dropped", plan.cut_tokens))
        loses = ' class="meter-loses"'
    bar = "".join(f'<span class="meter-{kind}" style="flex-grow: {tokens}"></span>' for kind, tokens in parts)
    return (
        f'<div class="meter-line meter-{column}"><span class="meter-title">{name}</span>'
        f"<span{loses}>{_sentence(plan)}</span>"
        f'<span class="meter-bar" aria-hidden="true">{bar}</span></div>'
    )


def _pending(column: str, name: str) -> str:
    return (
        f'<div class="meter-line meter-pending meter-{column}"><span class="meter-title">{name}</span>'
        '<span>is still reading</span><span class="meter-bar" aria-hidden="true"></span></div>'
    )


def _sentence(plan: EncoderPlan) -> str:
    read = sum(len(window.token_ids) for window in plan.windows) + MARKERS
    if plan.cut_tokens:
        are = "is" if plan.cut_tokens == 1 else "are"
        return f"reads {read:,} of {read + plan.cut_tokens:,} tokens; {plan.cut_tokens:,} {are} dropped"
    if len(plan.windows) == 1:
        return f"reads all {read:,} tokens at once"
    return f"reads all {read:,} tokens in {len(plan.windows)} windows of {plan.positions}"


def _praise(plans: Mapping[str, EncoderPlan], names: Mapping[str, str]) -> str:
    if not plans or any(plan.cut_tokens for plan in plans.values()):
        return ""
    short = all(len(plan.windows) == 1 for plan in plans.values())
    who = {1: "{} reads".format(*names.values()), 2: "both read", 3: "all three read"}[len(names)]
    return f'<div class="meter-good">{"Short enough" if short else "Nothing is lost"}: {who} the whole prompt.</div>'


def _legend(prompt: str, plans: Mapping[str, EncoderPlan], names: Mapping[str, str]) -> Iterator[str]:
    """What the marks in the text mean, and whose are missing."""
    for column, plan in plans.items():
        parted = len(plan.windows) > 1 or plan.cut_tokens
        if parted and not _joins(prompt, plan):
            yield f"{names[column]} reads a rewritten prompt, so its windows are not marked"
        elif column == STOCK and plan.cut_tokens:
            yield f'<del class="meter-cut meter-{column}">struck out</del>: {names[column]} never sees it'
        elif len(plan.windows) > 1:
            yield f"{_mark(column, '2')} a new window of {names[column]} begins"


def _text(prompt: str, plans: Mapping[str, EncoderPlan], names: Mapping[str, str]) -> str:
    """The prompt, with a mark where a window begins, and struck out from where stock stops."""
    marks: dict[int, str] = {}  # by the character before which they stand
    stop = len(prompt)
    for column, plan in plans.items():
        if not _joins(prompt, plan):
            continue
        if column == STOCK:
            stop -= len(plan.cut_text)
        starts = accumulate(len(window.text) for window in plan.windows[:-1])
        for number, start in enumerate(starts, start=2):
            marks[start] = marks.get(start, "") + _mark(column, str(number), f"{names[column]}: window {number}")

    def marked(first: int, last: int) -> str:
        borders = sorted({first, last, *(place for place in marks if first < place < last)})
        return "".join(marks.get(left, "") + escape(prompt[left:right]) for left, right in pairwise(borders))

    html = marked(0, stop)
    if stop < len(prompt):
        html += _mark(STOCK, f"{names[STOCK]} stops here")
        html += f'<del class="meter-cut meter-{STOCK}">{marked(stop, len(prompt))}</del>'
    return f'<div class="meter-text" dir="auto">{html}</div>'


def _mark(column: str, text: str, label: str = "") -> str:
    """A small colored mark; `label` says what a bare number means."""
    spoken = f' role="img" aria-label="{label}" title="{label}"' if label else ""
    return f'<span class="meter-mark meter-{column}"{spoken}>{text}</span>'


def _joins(prompt: str, plan: EncoderPlan) -> bool:
    """Whether the windows are slices of the prompt as it was written."""
    return "".join(window.text for window in plan.windows) + plan.cut_text == prompt
