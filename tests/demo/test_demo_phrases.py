"""The demo's phrases, without a browser: what each did in every column, and overlays that are asked for."""

from __future__ import annotations

import json
import threading
import urllib.request
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import numpy as np
import pytest
from PIL import Image

from demo import phrases_view
from demo.phrases_view import MAX_PHRASES, MAX_SIDE, Row, list_phrases, match, overlay_phrase, render_phrases, tile_maps
from demo.progress import Stopped
from finelip_sdxl.attribution.overlays import overlay
from finelip_sdxl.attribution.trace import Phrase
from finelip_sdxl.comparison.comparison import Picture
from finelip_sdxl.comparison.settings import Settings
from finelip_sdxl.miniature.drawing import IMAGE_SIZE
from finelip_sdxl.options import COLUMNS
from tests.helpers.demo_server import Demo, served

STAR, RING = "A red star is in the top left.", "A blue ring is in the bottom right."
LONG = f"{STAR} {'Nothing here moves. ' * 20}{RING}"  # stock cuts the ring
PICTURES = slice(1, None, 5)


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Demo:
    with served(tmp_path_factory.mktemp("demo")) as demo:
        yield demo


def session(name: str) -> Any:
    return SimpleNamespace(session_hash=name)


def values(prompt: str, weighting: str = "none") -> list[Any]:
    return [prompt, "", 2, 3.0, IMAGE_SIZE, IMAGE_SIZE, 1.0, "penultimate", weighting, "compel", 0, True]


def draw(demo: Demo, name: str, prompt: str = LONG, columns: tuple[str, ...] = tuple(COLUMNS), **other: Any) -> Any:
    """The list of phrases after each column, the last one last."""
    lists = [shown[-3] for shown in demo.page.draw_columns(session(name), *values(prompt, **other), list(columns))]
    return [shown for shown in lists if isinstance(shown, str)]


def ask(demo: Demo, name: str, number: Any, text: Any) -> list[Any]:
    return demo.page.show_phrase(gr.EventData(None, {"number": number, "text": text}), session(name))


def phrase(text: str, strength: float = 0.5, x: float | None = 0.5) -> Phrase:
    return Phrase(text, 0, len(text), strength, 0.2, x, x)


class Read(HTMLParser):
    """A rendered list: the texts of each button, the tags, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.buttons, self.tags, self.text = [], [], ""
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.tags.append(tag)
        if tag == "button":
            self.buttons.append("")

    def handle_data(self, text: str) -> None:
        self.text += text
        if self.buttons:
            self.buttons[-1] += text


# The list


def test_each_phrase_says_what_it_did_in_every_column() -> None:
    cut, nowhere, acted = phrase("A fox.", 0, None), phrase("A fox.", 0.1), phrase("A fox.", 0.74)
    shown = Read(render_phrases("A fox.", {"stock": [cut], "compel": [nowhere], "finelip": [acted]}))
    assert [text.strip() for text in shown.buttons[-1].split(": ")] == [
        "A fox. Stock SDXL",
        "cut compel",
        "nowhere FineLIP-SDXL",
        "center, 74\N{NO-BREAK SPACE}%",
    ]
    assert "Stock SDXL 1 cut" in shown.text
    assert "compel 1 nowhere" in shown.text
    assert "FineLIP-SDXL all acted" in shown.text
    assert "cut: it never reached" in shown.text
    assert "nowhere: less than" in shown.text


def test_the_tint_is_the_strength_and_the_legend_says_no_more_than_is_there() -> None:
    html = render_phrases("A fox.", {"finelip": [phrase("A fox.", 0.74)]})
    assert "--strength: 74%" in html
    assert "0 to 100 %" in html
    assert "never reached" not in html
    assert "less than its equal" not in html


def test_a_prompt_is_shown_as_text() -> None:
    text = '"><img src=x onerror=alert(1)>&amp;'
    shown = Read(render_phrases(text, {"finelip": [phrase(text)]}))
    assert not {"img", "script"} & set(shown.tags)
    assert text in shown.buttons[-1]


def test_phrases_that_differ_in_the_syntax_of_weights_are_one() -> None:
    rows = match({"stock": ["A (red)1.5 star++.", "A ring."], "compel": ["A red star."], "finelip": ["A ring."]})
    assert rows == [Row("A (red)1.5 star++.", {"stock": 0, "compel": 0}), Row("A ring.", {"stock": 1, "finelip": 0})]


def test_phrases_that_repeat_stay_apart() -> None:
    rows = match({column: ["A star.", "A ring.", "A star.", "3."] for column in COLUMNS})
    assert [row.text for row in rows] == ["A star.", "A ring.", "A star.", "3."]
    assert [set(row.numbers.values()) for row in rows] == [{0}, {1}, {2}, {3}]


def test_more_phrases_than_anybody_reads_are_not_listed() -> None:
    trace = SimpleNamespace(text=lambda: "A fox. " * (MAX_PHRASES + 1), phrases=lambda: pytest.fail("they were listed"))
    assert list_phrases(trace) == ()
    assert f"prompts of 1 to {MAX_PHRASES} phrases" in render_phrases("", {"finelip": ()})
    assert list_phrases(None) == ()


# The maps that are kept


def test_kept_maps_are_small_and_give_the_traces_overlay(demo) -> None:
    picture = demo.comparison.draw("finelip", Settings(f"{STAR} {RING}", steps=2, width=64, height=96), traced=True)
    phrases = picture.trace.phrases()
    tiles = tile_maps(picture.trace, phrases, picture.image.size)
    assert (tiles.mode, tiles.size) == ("L", (43, 2 * MAX_SIDE))
    for number, one in enumerate(phrases):
        kept = overlay_phrase(picture.image, tiles, number, len(phrases))
        own = overlay(picture.image, picture.trace.heat_map((one.start, one.end)))
        # Two resizes in place of one, and 256 values.
        assert np.abs(np.asarray(kept, np.int16) - np.asarray(own, np.int16)).mean() < 6


# Asking for a phrase


def test_a_phrase_is_shown_in_every_column_and_taken_away_again(demo) -> None:
    events = list(demo.page.draw_columns(session("asks"), *values(LONG), list(COLUMNS)))
    marked = [next(event[place] for event in events if isinstance(event[place], Image.Image)) for place in (2, 7, 12)]
    buttons = Read(events[-1][-3]).buttons
    assert STAR in buttons[1]
    assert RING in buttons[-1]
    overlays = ask(demo, "asks", len(buttons) - 2, RING)
    gray = [np.ptp(np.asarray(shown, np.int16), axis=-1).max() for shown in overlays]
    assert gray[0] == 0, "stock cuts it: all is faded"
    assert min(gray[1:]) > 0
    assert {shown.size for shown in overlays} == {shown.size for shown in marked}
    for whole, own in zip(ask(demo, "asks", None, None), marked, strict=True):
        assert whole.tobytes() == own.tobytes()
    demo.page.leave(session("asks"))


def test_phrases_of_columns_appear_as_they_are_drawn(demo) -> None:
    cleared, one, two = draw(demo, "appear", columns=("stock", "finelip"))
    assert cleared == ""
    assert ("FineLIP-SDXL" in one, "FineLIP-SDXL" in two) == (False, True)
    stock, compel, finelip = ask(demo, "appear", 0, STAR)
    assert compel == gr.skip()
    assert all(isinstance(shown, Image.Image) for shown in (stock, finelip))
    demo.page.leave(session("appear"))


def test_compels_syntax_beyond_weights_leaves_its_column_alone(demo) -> None:
    prompt = f'("{STAR * 8}", "{RING}").blend(0.5, 0.5)'
    assert "compel not known" in Read(draw(demo, "blend", prompt)[-1]).text
    demo.page.leave(session("blend"))


def test_a_prompt_without_phrases_is_drawn_and_has_no_list(demo) -> None:
    html = draw(demo, "dots", "...", ("finelip",))[-1]
    assert "for prompts of 1 to" in html
    with pytest.raises(gr.Error, match="here no longer: draw the prompt again"):
        ask(demo, "dots", 0, "...")
    demo.page.leave(session("dots"))


def test_a_phrase_of_an_earlier_list_is_not_mixed_up_with_a_new_one(demo) -> None:
    draw(demo, "mixed", f"{STAR} {RING}", ("finelip",))
    draw(demo, "mixed", "A green moon. A fox.", ("finelip",))
    for number, text in ((0, STAR), (1, STAR), (9, "A fox."), (10**30, "A fox."), (0, "")):
        with pytest.raises(gr.Error, match="The pictures of this phrase are here no longer: draw the prompt again"):
            ask(demo, "mixed", number, text)
    assert isinstance(ask(demo, "mixed", 1, "A fox.")[2], Image.Image)
    demo.page.leave(session("mixed"))
    for number, text in ((1, "A fox."), (None, None)):
        with pytest.raises(gr.Error, match="here no longer"):
            ask(demo, "mixed", number, text)


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        "x",
        {},
        {"number": "<b>", "text": STAR},
        {"number": -1, "text": STAR},
        {"number": True, "text": STAR},
        {"number": float("nan"), "text": STAR},
        {"number": 0.5, "text": STAR},
        {"number": 0, "text": None},
        {"number": None, "text": STAR},
        {"number": [0], "text": {}},
    ],
)
def test_what_is_no_phrase_is_refused_in_a_sentence(demo, data) -> None:
    with pytest.raises(gr.Error, match=r"The phrase is .*; expected its number in the list and its text") as raised:
        demo.page.show_phrase(gr.EventData(None, data), session("stranger"))
    assert "<" not in raised.value.message
    assert not raised.value.print_exception


@pytest.mark.parametrize("data", [None, {"number": 3, "text": STAR}, {"number": "x"}])
def test_a_stranger_by_plain_http_gets_a_sentence(demo, capsys, data) -> None:
    draw(demo, "owner", f"{STAR} {RING}", ("finelip",))
    number = next(n for n, fn in demo.blocks.fns.items() if fn.name == "show_phrase")
    body = {"data": [], "event_data": data, "fn_index": number, "session_hash": "a stranger"}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{demo.url}gradio_api/queue/join", json.dumps(body).encode(), headers)
    urllib.request.urlopen(request).read()
    with urllib.request.urlopen(f"{demo.url}gradio_api/queue/data?session_hash=a%20stranger") as stream:
        answer = next(line for line in map(bytes.decode, stream) if "process_completed" in line)
    assert '"success":false' in answer.replace(" ", "")
    assert "The phrase is" in answer or "here no longer" in answer
    assert "Traceback" not in capsys.readouterr().err
    demo.page.leave(session("owner"))


# Files


def files(demo: Demo, name: str) -> list[str]:
    return sorted(file.name for file in Path(demo.page._folder_of(session(name))).glob("*"))


def test_maps_lie_beside_the_pictures_and_go_with_them(demo) -> None:
    draw(demo, "files", columns=("stock", "finelip"))
    assert files(demo, "files") == [
        "finelip-sdxl-finelip-0.png",
        "finelip-sdxl-stock-0.png",
        "maps-finelip.png",
        "maps-stock.png",
    ]
    draw(demo, "files", columns=("finelip",))
    assert files(demo, "files") == ["finelip-sdxl-finelip-0.png", "maps-finelip.png"]
    demo.page.leave(session("files"))
    assert files(demo, "files") == []


def test_many_seeds_and_the_api_keep_no_maps_and_leave_those_of_the_page(demo) -> None:
    draw(demo, "grid", columns=("finelip",))
    list(demo.page.draw_grid(session("grid"), *values(STAR), ["finelip"], 1))
    list(demo.page.compare(STAR, session("grid"), ["stock"], steps=1))
    assert [name for name in files(demo, "grid") if name.startswith("maps")] == ["maps-finelip.png"]
    assert isinstance(ask(demo, "grid", 0, STAR)[2], Image.Image)
    demo.page.leave(session("grid"))


def test_a_prompt_that_cannot_be_drawn_leaves_what_is_shown(demo) -> None:
    draw(demo, "empty", columns=("finelip",))
    demo.page.ask(session("empty"))
    with pytest.raises(gr.Error, match="The prompt is empty"):
        next(demo.page.draw_columns(session("empty"), *values(" "), ["finelip"]))
    assert isinstance(ask(demo, "empty", 0, STAR)[2], Image.Image)
    demo.page.leave(session("empty"))


def test_a_page_that_is_closed_while_it_draws_keeps_no_maps(demo) -> None:
    picture = demo.comparison.draw("finelip", Settings(f"{STAR} {RING}", steps=1), traced=True)
    with demo.page.visitors.running("closed") as flag:
        demo.page.leave(session("closed"))
        with pytest.raises(Stopped):
            demo.page._save_picture(picture, session("closed"), flag)
    assert files(demo, "closed") == []


def test_a_page_that_opens_shows_the_phrases_of_its_first_example(demo, monkeypatch) -> None:
    monkeypatch.setattr(demo.page, "defaults", replace(demo.page.defaults, steps=1))
    *_, shown = demo.page.open(session("opens"))
    first = Read(shown[-1]).buttons[1]
    assert first.startswith(demo.page.defaults.prompt.split(".")[0])
    assert len(files(demo, "opens")) == 2 * len(COLUMNS)
    demo.page.leave(session("opens"))


def test_a_picture_without_a_trace_has_no_list(demo) -> None:
    picture = Picture("stock", Image.new("RGB", (8, 8)), Settings(STAR), seconds=1.0)
    demo.page._save_picture(picture, session("plain"), threading.Event())
    assert files(demo, "plain") == ["finelip-sdxl-stock-0.png"]
    assert phrases_view.list_phrases(picture.trace) == ()
    demo.page.leave(session("plain"))
