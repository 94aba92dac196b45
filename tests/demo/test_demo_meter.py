"""The demo's prompt meter and example prompts."""

import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from demo.meter import HINT, render_meter
from demo.rendering import read_style
from finelip_sdxl.miniature.captions import count_words
from finelip_sdxl.miniature.tokenizer import build_tokenizer
from finelip_sdxl.prompts.plan import EncoderPlan, EncoderSpec, Window, plan_prompts
from tests.helpers.tiny_sdxl import make_tokenizer

EXAMPLES = Path(__file__).parents[2] / "demo" / "examples"
TITLES = {"stock": "Stock SDXL", "compel": "compel", "finelip": "FineLIP-SDXL"}
TOKENIZER = make_tokenizer(248)
FOX = "a red fox and the hare. "  # seven tokens


def plan_of(prompt: str, positions: int, overflow: str = "window", tokenizer=TOKENIZER) -> EncoderPlan:
    spec = EncoderSpec("text_encoder", tokenizer, positions)
    return plan_prompts([spec], [[prompt]], overflow=overflow, length_buckets=(77,)).plans[0]


def plan(*windows: str) -> EncoderPlan:
    """A plan whose windows hold a token for each word."""
    return EncoderPlan(
        "text_encoder", "prompt", 0, tuple(Window(text, (1,) * len(text.split())) for text in windows), positions=77
    )


def plans_of(prompt: str, *columns: str) -> dict[str, EncoderPlan]:
    every = {
        "stock": plan_of(prompt, 77, "truncate"),
        "compel": plan_of(prompt, 77),
        "finelip": plan_of(prompt, 248),
    }
    return {column: every[column] for column in columns or every}


class Page(HTMLParser):
    """A rendered meter: its texts by the classes they stand in.

    Attributes:
        tags: all that are opened.
        classes: all that are used.
        lines: the text of each column's line.
        legend: the legend's text.
        text: the prompt as it is shown, without marks.
        struck: the part of it that is struck out.
        marks: for each mark in the prompt its column, its label and the length of the prompt before it.
    """

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags, self.classes, self.lines = [], set(), []
        self.legend, self.text, self.struck, self.marks = "", "", "", []
        self._open: list[tuple[str, list[str]]] = []
        self.feed(html)
        self.close()
        assert not self._open, "every tag is closed"

    def handle_starttag(self, tag: str, attrs: list) -> None:
        classes = (dict(attrs).get("class") or "").split()
        self.tags.append(tag)
        self.classes.update(classes)
        self._open.append((tag, classes))
        if "meter-line" in classes:
            self.lines.append("")
        if "meter-mark" in classes:
            (column,) = [name for name in classes if name != "meter-mark"]
            self.marks.append((column.removeprefix("meter-"), dict(attrs)["data-label"], len(self.text)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        inside = {name for _, classes in self._open for name in classes}
        if "meter-line" in inside:
            self.lines[-1] += data
        elif "meter-legend" in inside:
            self.legend += data
        elif "meter-text" not in inside:
            return
        else:
            self.text += data
            self.struck += data if "del" in {tag for tag, _ in self._open} else ""


def page(prompt: str, plans: dict[str, EncoderPlan]) -> Page:
    return Page(render_meter(prompt, plans, TITLES))


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (
            217,
            [
                "Stock SDXLencodes 77 of 219 tokens; 142 are left out",
                "compelencodes all 219 tokens in 3 windows of 77",
                "FineLIP-SDXLencodes all 219 tokens at once",
            ],
        ),
        (
            76,
            [
                "Stock SDXLencodes 77 of 78 tokens; 1 is left out",
                "compelencodes all 78 tokens in 2 windows of 77",
                "FineLIP-SDXLencodes all 78 tokens at once",
            ],
        ),
        (
            75,
            [
                "Stock SDXLencodes all 77 tokens at once",
                "compelencodes all 77 tokens at once",
                "FineLIP-SDXLencodes all 77 tokens at once",
            ],
        ),
        (
            2000,
            [
                "Stock SDXLencodes 77 of 2,002 tokens; 1,925 are left out",
                "compelencodes all 2,002 tokens in 27 windows of 77",
                "FineLIP-SDXLencodes all 2,002 tokens in 9 windows of 248",
            ],
        ),
    ],
)
def test_each_column_says_how_much_it_encodes(words, lines) -> None:
    prompt = " ".join(["fox"] * words)
    assert page(prompt, plans_of(prompt)).lines == lines


def test_bars_are_as_long_as_windows_have_tokens() -> None:
    prompt = " ".join(["fox"] * 100)
    html = render_meter(prompt, plans_of(prompt), TITLES)
    bar = re.findall(r'meter-(encoded|left-out)" style="flex-grow: (\d+)"', html)
    stock, compel = [("encoded", "75"), ("left-out", "25")], [("encoded", "75"), ("encoded", "25")]
    finelip = [("encoded", "100")]
    assert bar == [*stock, *compel, *finelip]


def test_a_cut_prompt_is_struck_through_where_stock_stops() -> None:
    prompt = FOX * 20
    plans = plans_of(prompt)
    shown = page(prompt, plans)
    assert shown.text == prompt, "once, and whole"
    assert shown.struck == plans["stock"].cut_text
    stop = len(prompt) - len(shown.struck)
    assert ("stock", "Stock SDXL stops", stop) in shown.marks
    assert "Stock SDXL leaves it out" in shown.legend


def test_windows_are_marked_where_they_begin() -> None:
    prompt = FOX * 50  # 350 tokens
    plans = plans_of(prompt)
    shown = page(prompt, plans)
    for column in ("compel", "finelip"):
        windows = plans[column].windows
        assert len(windows) > 1
        starts = [sum(len(window.text) for window in windows[:index]) for index in range(1, len(windows))]
        expected = [(column, str(number), start) for number, start in enumerate(starts, start=2)]
        assert [mark for mark in shown.marks if mark[0] == column] == expected
        assert f"a new window of {TITLES[column]} begins" in shown.legend
    assert shown.text == prompt


def test_borders_at_the_same_place_are_all_marked() -> None:
    prompt = " ".join(["fox"] * 300)
    plans = {"compel": plan_of(prompt, 77), "finelip": plan_of(prompt, 77), "stock": plan_of(prompt, 77, "truncate")}
    stop = len(prompt) - len(plans["stock"].cut_text)
    assert {column for column, _, start in page(prompt, plans).marks if start == stop} == set(TITLES)


def test_windows_of_a_rewritten_prompt_are_counted_but_not_marked() -> None:
    prompt = "a (red fox)1.5 and a hare"
    shown = page(prompt, {"compel": plan("a red fox ", "and a hare"), "finelip": plan(prompt)})
    assert shown.lines[0] == "compelencodes all 8 tokens in 2 windows of 77"
    assert not shown.marks
    assert "compel takes the signs of weights out of the prompt: it counts other tokens" in shown.legend
    assert shown.text == prompt
    assert not page(prompt, {"compel": plan("a red fox and a hare")}).legend, "one window has no borders to miss"


def test_another_count_is_explained() -> None:
    prompt = "a (red fox)1.5 and a hare"
    plans = {"stock": plan("a (red fox) 1.5 and a hare"), "compel": plan("a red fox and a hare")}
    assert "it counts other tokens" in page(prompt, plans).legend


def test_the_layer_over_the_prompt_holds_nothing_but_its_text() -> None:
    prompt = FOX * 50
    html = render_meter(prompt, plans_of(prompt), TITLES)
    layer = html[html.index('<div class="meter-text"') :]
    assert re.sub(r"<[^>]*>", "", layer) == prompt, "its lines are those of the box"
    assert 'aria-hidden="true"' in layer.split(">")[0], "the box itself is read aloud"


@pytest.mark.parametrize(
    "odd",
    [
        "<script>alert(1)</script> ",
        "\"a\" 'fox' & &amp; <b ",
        "a fox\n\n  and\na hare\n",
        "שועל אדום ",
        "🦊👩‍👩‍👧 狐。",
        "</del></div><div class='meter-line'>",
    ],
)
def test_a_prompt_of_any_kind_is_shown_as_it_was_written(odd) -> None:
    prompt = odd * 40
    shown = page(prompt, plans_of(prompt))
    assert shown.text == prompt
    assert shown.struck
    assert set(shown.tags) <= {"div", "span", "del"}
    assert len(shown.lines) == len(TITLES)


def test_titles_are_escaped() -> None:
    prompt = FOX * 20
    html = render_meter(prompt, plans_of(prompt), {column: f'<i title="{column}">' for column in TITLES})
    assert "i" not in Page(html).tags


@pytest.mark.parametrize(
    ("columns", "praise"),
    [
        ((), "Short enough: all three encode the whole prompt."),
        (("stock", "finelip"), "Short enough: both encode the whole prompt."),
        (("finelip",), "Short enough: FineLIP-SDXL encodes the whole prompt."),
    ],
)
def test_a_short_prompt_is_told_to_be_short_enough(columns, praise) -> None:
    html = render_meter(FOX, plans_of(FOX, *columns), TITLES)
    shown = Page(html)
    assert praise in html
    assert (shown.text, shown.struck, shown.marks, shown.legend) == (FOX, "", [], "")


def test_a_long_prompt_is_not_told_to_be_short() -> None:
    prompt = FOX * 20
    html = render_meter(prompt, plans_of(prompt, "compel", "finelip"), TITLES)
    assert "Nothing is left out: both encode the whole prompt." in html
    assert "whole prompt" not in render_meter(prompt, plans_of(prompt), TITLES)


@pytest.mark.parametrize("prompt", ["", " \n "])
def test_an_empty_prompt_gets_a_hint(prompt) -> None:
    html = render_meter(prompt, plans_of(prompt), TITLES)
    assert HINT in html
    assert not Page(html).lines


def test_the_meter_says_whose_tokens_are_counted() -> None:
    html = render_meter(FOX, plans_of(FOX), TITLES, note="<b> & a note.")
    assert "Counted in this model&#39;s own tokens. &lt;b&gt; &amp; a note." in html


def test_columns_can_be_left_out() -> None:
    prompt = FOX * 20
    shown = page(prompt, plans_of(prompt, "finelip"))
    assert len(shown.lines) == 1
    assert (shown.text, shown.struck, shown.marks) == (prompt, "", [])


def test_every_class_is_the_meters_own_and_has_a_style() -> None:
    prompt = FOX * 50
    html = render_meter(prompt, plans_of(prompt), TITLES) + render_meter(FOX, plans_of(FOX), TITLES)
    classes = Page(html + render_meter("", {}, TITLES)).classes
    assert classes == set(re.findall(r"\.(meter[\w-]*)", read_style("meter")))


@pytest.mark.parametrize(
    ("selector", "grounds"), [(":root", ("#ffffff", "#fafafa")), (".dark", ("#0f0f11", "#27272a"))]
)
def test_colors_of_the_columns_are_readable(selector, grounds) -> None:
    (rule,) = re.findall(rf"{re.escape(selector)} {{(.*)}}", read_style("meter"))
    colors = dict(re.findall(r"--([\w-]+): (#\w+)", rule))
    on_color = colors.pop("meter-on-color")
    assert set(colors) == set(TITLES)
    for color in colors.values():
        assert min(contrast(color, other) for other in (*grounds, on_color)) >= 4.5, "what WCAG asks of text"


def contrast(first: str, second: str) -> float:
    """The contrast of two colors by WCAG 2: from 1 to 21."""
    dark, light = sorted(map(luminance, (first, second)))
    return (light + 0.05) / (dark + 0.05)


def luminance(color: str) -> float:
    channels = [int(color[start:stop], 16) / 255 for start, stop in pairwise((1, 3, 5, 7))]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return sum(share * value for share, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def examples(folder: str) -> list:
    files = sorted((EXAMPLES / folder).glob("*.txt"))
    return [pytest.param(file.read_text(encoding="utf-8"), id=file.stem) for file in files]


@pytest.mark.parametrize("text", [*examples("miniature"), *examples("sdxl")])
def test_examples_are_one_paragraph(text) -> None:
    assert text == " ".join(text.split()) + "\n"


@pytest.mark.parametrize("text", examples("miniature"))
def test_examples_of_the_miniature_link_objects_behind_the_cut_or_are_short(text) -> None:
    tokenizer = build_tokenizer(max_length=248)
    prompt = text.strip()
    stock = plan_of(prompt, 77, "truncate", tokenizer)
    tokens = len(tokenizer(prompt, add_special_tokens=False).input_ids)
    assert tokens == len(count_words(prompt)), "the miniature knows every word"
    assert tokens <= 75 or 150 <= tokens <= 246
    assert tokens <= 75 or len(re.findall("same color as|color of|color is that of", stock.cut_text)) >= 2


def test_examples_of_the_miniature_are_four_long_ones_and_a_short_one() -> None:
    assert sorted(len(count_words(*example.values)) > 75 for example in examples("miniature")) == [False] + 4 * [True]


def test_there_are_six_examples_for_sdxl() -> None:
    assert len(examples("sdxl")) == 6


@pytest.mark.parametrize("text", examples("sdxl"))
def test_examples_of_sdxl_are_longer_than_stock_encodes(text) -> None:
    assert 150 <= len(count_words(text)) <= 240  # CLIP's own vocabulary splits hardly any of these words
