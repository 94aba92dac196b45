"""The demo in a real browser: headless Chromium, if it is installed."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from compel import Compel
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from finelip_sdxl.images import read_parameters
from finelip_sdxl.miniature.drawing import IMAGE_SIZE
from tests.helpers.demo_server import Demo, served

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = os.environ.get("CHROMIUM", shutil.which("chromium") or "/usr/bin/chromium")
pytestmark = [
    pytest.mark.slow,  # all together: a browser's start, and some seconds for each page
    pytest.mark.skipif(
        not Path(CHROMIUM).exists(), reason=f"THE DEMO IS NOT TESTED IN A BROWSER: there is no Chromium at {CHROMIUM}"
    ),
]

COLUMNS = ("stock", "compel", "finelip")
# A minute, on a machine that is busy.
PATIENCE = 60_000
LONG = (
    "The whole picture is quiet. A red star is in the top left, with some air on every side. In the center there is a"
    " blue ring, flat and without any shadow. The top right holds a green moon, plain but easy to like. In the middle"
    " left sits a yellow heart, as calm and still as everything around it. Look at the bottom left of the picture and"
    " you will find a purple arrow. A leaf of the same color as the star is in the bottom right."
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Demo:
    with served(tmp_path_factory.mktemp("demo")) as demo:
        demo.page._draw_opening()  # so that no test's page draws but what the test asks for
        yield demo


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(demo, browser) -> Iterator[Callable[..., Any]]:
    """Opens the page in a window of this size; what it asks of other machines, or what goes wrong in it, fails."""
    pages, wrong = [], []

    def notice(request) -> None:
        if not request.url.startswith((demo.url, "data:", "blob:")):
            wrong.append(f"asked for {request.url}")

    def open_it(width: int = 1280, height: int = 1000, scheme: str = "light") -> Any:
        page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        page.set_default_timeout(PATIENCE)
        page.on("request", notice)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(demo.url)
        page.locator("#meter .meter-line").first.wait_for()
        assert len(shares(page)) == 3, "it opens with finished pictures"
        pages.append(page)
        return page

    yield open_it
    for page in pages:
        page.close()
    assert not wrong


def write(page, prompt: str) -> None:
    page.locator("#prompt textarea").fill(prompt)


# The meter's lines once compel's part is there, in one look: the part of the text before may come between, and what
# was whole is planned again if the page sends the same text twice.
WHOLE_METER = """() => !document.querySelector("#meter .meter-pending")
    && document.querySelector("#meter .meter-text").textContent == document.querySelector("#prompt textarea").value
    && [...document.querySelectorAll("#meter .meter-line")].map((line) => line.innerText.replaceAll("\\n", " "))"""


def meter_lines(page) -> list[str]:
    return page.wait_for_function(WHOLE_METER).json_value()


def set_number(page, slider: str, value: int) -> None:
    """Until it stays: what was only just mounted takes its first value again."""
    box = page.locator(f"{slider} input[type=number]")
    box.fill(str(value))
    box.blur()
    page.wait_for_timeout(300)
    if box.input_value() != str(value):
        set_number(page, slider, value)


def set_steps(page, steps: int) -> None:
    if not page.locator("#steps input[type=number]").is_visible():
        page.get_by_text("Advanced").click()
    set_number(page, "#steps", steps)


def keep_seed(page) -> None:
    page.get_by_role("checkbox", name="Keep the seed").check()


def load(page, file: Path | dict[str, Any]) -> None:
    with page.expect_file_chooser() as chooser:
        page.click("#load")
    chooser.value.set_files(file)


def wait_until_drawn(page) -> None:
    page.wait_for_function("!document.querySelector('#draw').disabled && document.querySelector('#stop').disabled")


def shares(page) -> list[int]:
    """How many objects are right in each column, once all are drawn."""
    page.wait_for_function("[...document.querySelectorAll('.heading-share')].filter(e => e.textContent).length == 3")
    return [int(text.split()[0]) for text in page.locator(".heading-share").all_inner_texts()]


def wait_for_status(page, text: str, column: str = "finelip") -> None:
    page.locator(f"#column-{column} .status", has_text=re.compile(text)).wait_for()


def test_a_long_prompt_is_measured_drawn_downloaded_and_loaded_again(open_page, tmp_path) -> None:
    page = open_page()
    page.get_by_text("Short one by night").wait_for()
    write(page, LONG)
    page.locator("#meter .meter-line", has_text="in 2 windows of 77").wait_for()  # the first example's has 4
    stock, compel, finelip = meter_lines(page)
    assert re.fullmatch(r"Stock SDXL encodes 77 of \d+ tokens; \d+ are left out", stock)
    assert re.fullmatch(r"compel encodes all \d+ tokens in 2 windows of 77", compel)
    assert re.fullmatch(r"FineLIP-SDXL encodes all \d+ tokens at once", finelip)
    assert "leaf of the same color as the star" in page.locator("#meter del.meter-cut").last.inner_text()

    page.locator("#column-finelip.earlier").wait_for()  # its picture is the first example's
    keep_seed(page)
    page.click("#draw")
    page.locator("#draw:disabled", has_text=re.compile(r"Drawing… step \d+ of 20")).wait_for()
    page.locator("#column-finelip:not(.earlier)").wait_for()
    wait_until_drawn(page)
    wait_for_status(page, "20 steps in .* s, seed 0")
    right = shares(page)
    assert right[2] > right[0]  # late objects are there, and not in stock's picture
    assert page.locator(".column img").count() == 3
    assert page.locator("#column-finelip .verdict li").count() == 6

    with page.expect_download() as download:
        page.locator("#column-finelip").get_by_text("Download PNG").click()
    file = tmp_path / "picture.png"
    download.value.save_as(file)
    assert read_parameters(file)["prompt"] == LONG
    assert Image.open(file).size == (IMAGE_SIZE, IMAGE_SIZE)

    write(page, "a star")
    set_steps(page, 3)
    load(page, file)
    page.wait_for_function("document.querySelector('#prompt textarea').value.includes('purple arrow')")
    page.wait_for_function("document.querySelector('#steps input[type=number]').value == '20'")


def test_clicking_on_an_example_fills_the_prompt(open_page) -> None:
    page = open_page()
    page.get_by_text("Short one by night").click()
    page.locator("#meter", has_text="Short enough: all three encode the whole prompt.").wait_for()
    assert page.locator("#meter del").count() == 0


def test_a_run_is_stopped_at_the_next_step_and_the_next_one_works(open_page) -> None:
    page = open_page()
    set_steps(page, 100)
    page.click("#draw")
    wait_for_status(page, r"step \d+ of 100", "stock")
    page.click("#stop")
    wait_for_status(page, "stopped", "stock")
    wait_for_status(page, "stopped")
    wait_until_drawn(page)
    set_steps(page, 2)
    page.click("#draw")
    wait_for_status(page, "2 steps in")
    assert len(shares(page)) == 3


def test_closing_the_page_ends_its_run_and_deletes_its_pictures(demo, open_page, monkeypatch) -> None:
    seen, draw = [], demo.comparison.draw

    def watched(column, settings, on_step, **options) -> object:
        def noticed(step: int, steps: int) -> None:
            seen.append(step)
            on_step(step, steps)

        return draw(column, settings, noticed, **options)

    monkeypatch.setattr(demo.comparison, "draw", watched)
    of_others = set((demo.folder / "pictures").glob("*"))  # pages that were closed just before
    page = open_page()
    set_steps(page, 100)
    page.click("#draw")
    wait_for_status(page, r"step \d+ of 100", "stock")
    page.close()
    deadline = time.monotonic() + PATIENCE / 1000
    while time.monotonic() < deadline:
        before = len(seen)
        time.sleep(1)
        left = set((demo.folder / "pictures").glob("*")) - of_others
        if len(seen) == before and not left:
            break
    assert len(seen) < 300
    assert not left


@pytest.mark.parametrize(
    ("prompt", "message"), [("   ", "The prompt is empty"), ("(" * 400 + "a star", "compel would take minutes")]
)
def test_a_prompt_that_cannot_be_drawn_is_explained(open_page, prompt, message) -> None:
    page = open_page()
    write(page, prompt)
    page.click("#draw")
    page.locator(".toast-body", has_text=message).first.wait_for()


def test_a_long_text_is_not_cut_in_silence(open_page) -> None:
    page = open_page()
    write(page, "a star " * 1000)
    page.locator("#meter", has_text="The text has 7,000 characters; at most 6,000 are allowed here").wait_for()
    page.click("#draw")
    page.locator(".toast-body", has_text="The text has 7,000 characters").first.wait_for()


def test_columns_that_an_error_leaves_undrawn_say_so(open_page, demo, monkeypatch) -> None:
    draw = demo.comparison.draw

    def run_out(column: str, *rest, **options) -> object:
        if column == "compel":
            raise MemoryError("The memory did not suffice.")
        return draw(column, *rest, **options)

    monkeypatch.setattr(demo.comparison, "draw", run_out)
    page = open_page()
    set_steps(page, 2)
    page.click("#draw")
    wait_for_status(page, "not drawn$", "compel")
    wait_for_status(page, "not drawn$")
    wait_for_status(page, "2 steps in", "stock")


def test_a_png_of_another_program_is_explained(open_page) -> None:
    page = open_page()
    page.get_by_text("Advanced").click()
    data = io.BytesIO()
    Image.new("RGB", (8, 8)).save(data, "PNG")
    payload = {"name": "other.png", "mimeType": "image/png", "buffer": data.getvalue()}
    load(page, payload)
    page.locator(".toast-body", has_text="holds no parameters").wait_for()


def test_html_in_a_picture_is_shown_as_text(open_page, demo) -> None:
    page = open_page()
    page.get_by_text("Advanced").click()
    hostile = '<img src="http://192.0.2.1/x.png" onerror="document.title = 1"><b>'
    data, info = io.BytesIO(), PngInfo()
    info.add_itxt("parameters", json.dumps({"prompt": hostile, "steps": hostile}))
    Image.new("RGB", (8, 8)).save(data, "PNG", pnginfo=info)
    load(page, {"name": "<i>picture.png", "mimeType": "image/png", "buffer": data.getvalue()})
    page.locator(".toast-body", has_text='`steps` is \'<img src="http://192.0.2.1/x.png"').wait_for()
    assert page.locator(".toast-body").locator("b, img[src*='192']").count() == 0
    assert not list(demo.folder.rglob("*picture.png"))  # an uploaded file is deleted once it is read
    write(page, hostile)
    page.wait_for_function("document.querySelector('#meter .meter-text')?.textContent.includes('192.0.2.1')")
    assert page.locator("#meter img").count() == 0
    assert page.title() == "FineLIP-SDXL"  # what the page asks of others, `open_page` sees


def test_typing_does_not_wait_for_compel_s_parser(open_page, monkeypatch) -> None:
    page = open_page()
    parse, may_parse = Compel.parse_prompt_string, threading.Event()
    # It waits longer than the page is waited for, so that it never answers by itself.
    monkeypatch.setattr(Compel, "parse_prompt_string", lambda text: may_parse.wait(PATIENCE / 100) and parse(text))
    try:
        for thing, times in (("(a green star)1.2 ", 100), ("a blue ring ", 20)):
            write(page, thing * times)
            page.locator("#meter .meter-text", has_text=thing).wait_for()
            page.locator("#meter .meter-pending", has_text="is still planning").wait_for()
    finally:
        may_parse.set()
    page.locator("#meter .meter-line", has_text=re.compile("encodes all 62 tokens at once")).nth(1).wait_for()
    page.wait_for_timeout(1000)  # the first text's part comes late, and must not take the second's place
    assert "green" not in page.locator("#meter").inner_text()


def test_two_visitors_take_turns(open_page) -> None:
    first, second = open_page(), open_page()
    set_steps(first, 100)
    set_steps(second, 2)
    first.click("#draw")
    wait_for_status(first, r"step \d+ of 100", "stock")
    second.click("#draw")
    wait_for_status(first, r"step [3-9]\d of 100", "stock")
    assert "2 steps in" not in second.locator("#column-stock .status").inner_text()
    first.click("#stop")
    wait_for_status(first, "stopped")
    wait_for_status(second, "2 steps in")
    assert len(shares(second)) == 3


def test_many_seeds_make_one_picture(open_page, tmp_path) -> None:
    page = open_page()
    set_steps(page, 1)
    page.get_by_role("button", name="Many seeds").click()
    set_number(page, "#seeds", 2)
    keep_seed(page)
    page.click("#draw-grid")
    page.locator("#many-seeds .status", has_text="6 pictures").wait_for()
    page.locator("#many-seeds .picture").hover()
    icon, status, image = (
        page.locator(f"#many-seeds {part}").bounding_box()
        for part in (".picture .icon-button-wrapper", ".status", ".picture img")
    )
    assert status["y"] - 10 < icon["y"] < icon["y"] + icon["height"] <= image["y"], "it covers neither mark nor button"
    with page.expect_download() as download:
        page.locator("#download-grid").click()
    download.value.save_as(tmp_path / "grid.png")
    assert read_parameters(tmp_path / "grid.png")["seeds"] == [0, 1]
    assert Image.open(tmp_path / "grid.png").width > 3 * 256


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_its_window(open_page, width, scheme) -> None:
    page = open_page(width, 844, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("document.body.classList.contains('dark')") == (scheme == "dark")
    boxes = [page.locator(f"#column-{column}").bounding_box() for column in ("stock", "compel", "finelip")]
    assert len({round(box["y"]) for box in boxes}) == 1, "side by side; on a phone they are swiped"
    assert page.locator("#draw").bounding_box()["y"] < 844
    if width == 1280:
        assert all(box["x"] + box["width"] <= width for box in boxes)


def test_prompt_button_and_pictures_are_on_one_screen(open_page) -> None:
    page = open_page(1280, 900)
    for thing in ("#prompt textarea", "#meter", "#draw", *(f"#column-{column} .picture" for column in COLUMNS)):
        box = page.locator(thing).bounding_box()
        assert box["y"] >= 0
        assert box["y"] + box["height"] <= 900, thing


def test_left_edges_are_aligned(open_page) -> None:
    page = open_page()
    things = ("h1", "#examples", "#prompt-and-meter", "#draw", "#column-stock", "#advanced", "#sources")
    edges = {thing: page.locator(thing).first.bounding_box()["x"] for thing in things}
    assert max(edges.values()) - min(edges.values()) <= 1, edges


@pytest.mark.parametrize("width", [1280, 390])
def test_marks_lie_over_the_text_that_they_mark(open_page, width) -> None:
    page = open_page(width, 844)
    write(page, f"{LONG} {LONG}")
    page.locator("#meter .meter-line", has_text=re.compile(r"are left out")).wait_for()
    measured = page.evaluate("""() => {
      const box = document.querySelector("#prompt textarea"), layer = document.querySelector(".meter-text");
      box.scrollTop = 50;
      box.dispatchEvent(new Event("scroll"));
      const [a, b] = [box.getBoundingClientRect(), layer.getBoundingClientRect()];
      return {text: layer.textContent == box.value, left: a.left + box.clientLeft - b.left,
        top: a.top + box.clientTop - b.top, height: layer.scrollHeight - box.scrollHeight,
        scrolled: layer.scrollTop - box.scrollTop, width: layer.clientWidth - box.clientWidth};
    }""")
    assert measured.pop("text")
    assert all(abs(value) < 1 for value in measured.values()), measured


def test_marks_follow_their_text_until_it_is_planned_again(open_page, demo, monkeypatch) -> None:
    page = open_page()
    struck = page.locator("#meter del.meter-cut").last.inner_text()
    may_plan = threading.Event()
    render = demo.page._meter
    monkeypatch.setattr(demo.page, "_meter", lambda *job, **options: may_plan.wait(PATIENCE / 1000) and render(*job))
    page.locator("#prompt textarea").focus()
    page.keyboard.press("Control+Home")
    page.keyboard.type("Hm. ")
    try:
        page.wait_for_function("document.querySelector('.meter-text').textContent.startsWith('Hm. All')")
        assert page.locator("#meter del.meter-cut").last.inner_text() == struck
    finally:
        may_plan.set()


def test_a_picture_of_another_prompt_is_marked_until_the_prompt_is_back(open_page) -> None:
    page = open_page()
    prompt = page.locator("#prompt textarea").input_value()
    for text, is_earlier in ((prompt, False), ("a star", True), (prompt, False)):
        write(page, text)
        for column in COLUMNS:
            note = page.locator(f"#column-{column}").get_by_text("Drawn from an earlier prompt")
            note.wait_for(state="visible" if is_earlier else "hidden")


def test_a_typed_prompt_is_there_after_a_reload(open_page) -> None:
    page = open_page()
    write(page, "a star that was typed")
    page.locator("#meter", has_text="Short enough").wait_for()
    page.wait_for_function("Object.keys(localStorage).some((key) => key.startsWith('finelip-sdxl-prompt'))")
    page.reload()
    page.wait_for_function("document.querySelector('#prompt textarea')?.value == 'a star that was typed'")


def test_ctrl_enter_draws(open_page) -> None:
    page = open_page()
    set_steps(page, 2)
    page.locator("#prompt textarea").focus()
    page.keyboard.press("Control+Enter")
    wait_for_status(page, "2 steps in")


def test_each_run_has_a_new_seed_unless_it_is_kept(open_page) -> None:
    page = open_page()
    set_steps(page, 1)
    seeds = []
    for keeps in (False, False, True):
        if keeps:
            keep_seed(page)
        page.click("#draw")
        wait_for_status(page, "1 steps? in")
        wait_until_drawn(page)
        seeds.append(page.locator("#column-finelip .status").inner_text().split()[-1])
    assert seeds[0] != seeds[1] == seeds[2]


def test_the_full_screen_button_is_beside_the_picture(open_page) -> None:
    page = open_page()
    picture = page.locator("#column-stock .picture")
    picture.hover()
    button, image = picture.locator(".icon-button-wrapper").bounding_box(), picture.locator("img").bounding_box()
    assert button["y"] >= image["y"] + image["height"]


def test_who_waits_sees_their_place_and_may_stop_at_once(open_page, demo) -> None:
    page = open_page()
    assert page.locator("#stop").is_disabled()
    with demo.page.line.join(IMAGE_SIZE**2 * 1000) as other:
        list(other.wait(threading.Event()))
        page.click("#draw")
        page.locator("#draw:disabled", has_text=re.compile(r"Waiting… place 1 in line, about \d+ s")).wait_for()
        page.click("#stop:not(:disabled)")
        wait_for_status(page, "stopped")
        wait_until_drawn(page)


def test_the_page_keeps_its_width_while_the_prompt_grows(open_page) -> None:
    page = open_page()
    # Its long lines would hold the page open; another SDXL's page has none.
    page.locator("#about-miniature").evaluate("about => about.remove()")
    widths = []
    for prompt, said in (("a star", "Short enough"), (LONG, "left out")):
        write(page, prompt)
        page.locator("#meter", has_text=said).wait_for()
        widths.append(page.locator(".gradio-container").bounding_box()["width"])
    assert widths[0] == widths[1]


SHOWN = "[...document.querySelectorAll('.phrase')].filter(phrase => phrase.ariaPressed == 'true').map(e => e.innerText)"


def pictures(page) -> list[str]:
    return page.evaluate("[...document.querySelectorAll('.column .picture img')].map(image => image.src)")


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_a_phrase_is_shown_by_click_and_by_key_and_a_button_takes_it_away(open_page, width, scheme) -> None:
    page = open_page(width, 844, scheme)
    prompt, whole = page.locator("#prompt textarea").input_value(), pictures(page)
    phrases = page.locator(".phrase")
    assert page.locator(".phrases-whole").is_hidden()
    phrases.nth(2).click()
    page.wait_for_function(f"{SHOWN}.length == 1")
    clicked = pictures(page)
    assert len({*whole, *clicked}) == 6, "each column shows another picture"
    assert page.evaluate("document.activeElement.dataset.number") == "2"
    for _ in range(7):
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_function(f"{SHOWN}[0] == document.querySelectorAll('.phrase')[9].innerText")
    assert len({*whole, *clicked, *pictures(page)}) >= 8  # stock cuts it
    picture, pressed = (page.locator(one).bounding_box() for one in ("#column-stock .picture", ".phrase >> nth=9"))
    assert 0 <= picture["y"] < picture["y"] + picture["height"] <= pressed["y"] < 844, "both are in sight"
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.mouse.move(0, 0)
    page.wait_for_timeout(500)  # colors fade in
    assert page.evaluate(FAINT) == []

    page.get_by_role("button", name="Show the whole pictures").click()
    page.wait_for_function(f"{SHOWN}.length == 0")
    assert page.locator("#column-finelip .verdict").is_visible()
    assert page.evaluate("document.activeElement.dataset.number") == "9"
    page.keyboard.press("Space")
    page.wait_for_function(f"{SHOWN}.length == 1")
    page.keyboard.press("Space")  # the phrase itself takes it away, too
    page.wait_for_function(f"{SHOWN}.length == 0")
    assert page.locator("#prompt textarea").input_value() == prompt


def test_phrases_are_those_of_the_pictures(open_page) -> None:
    page = open_page()
    page.locator(".phrase").first.click()
    page.wait_for_function(f"{SHOWN}.length == 1")
    write(page, "A red star is in the top left. A blue ring is in the center.")
    page.locator("#phrases").get_by_text("Of an earlier prompt").wait_for()
    set_steps(page, 2)
    page.click("#draw")
    page.wait_for_function("document.querySelectorAll('.phrase').length == 2")
    wait_until_drawn(page)
    assert page.evaluate(SHOWN) == []
    assert page.locator("#phrases").get_by_text("Of an earlier prompt").is_hidden()
    page.locator(".phrase", has_text="blue ring").click()
    page.wait_for_function(f"{SHOWN}.length == 1")


def test_a_phrase_whose_pictures_are_gone_says_so_and_is_not_pressed(open_page, demo) -> None:
    page = open_page()
    for folder in (demo.folder / "pictures").glob("*"):
        shutil.rmtree(folder)
    page.locator(".phrase").first.click()
    page.locator(".toast-body", has_text="The pictures of this phrase are here no longer").wait_for()
    assert page.evaluate(SHOWN) == []


# What stands out too little: text below a contrast of 4.5 to what is behind it, boxes to tick below one of 3. Colors
# come in many notations, so a canvas reads them.
FAINT = """() => {
  const context = Object.assign(document.createElement("canvas"), {width: 1, height: 1}).getContext("2d");
  const rgba = (color) => {
    context.clearRect(0, 0, 1, 1); context.fillStyle = color; context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data].map((value) => value / 255);
  };
  const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3]));
  const behind = (element) => element
    ? over(rgba(getComputedStyle(element).backgroundColor), behind(element.parentElement)) : [1, 1, 1];
  const light = (color) => color.map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0.05);
  const contrast = (color, below) => {
    const [a, b] = [light(over(rgba(color), below)), light(below)];
    return Math.max(a, b) / Math.min(a, b);
  };
  const faint = [];
  const note = (what, ratio, least) => ratio < least && faint.push(`${what}: ${ratio.toFixed(2)}`);
  for (const element of document.querySelectorAll("body *")) {
    if (!element.checkVisibility({visibilityProperty: true}) || element.matches(":disabled")) continue;
    const style = getComputedStyle(element);
    const text = [...element.childNodes].filter((node) => node.nodeType == 3 && node.data.trim());
    if (text.length) note(text[0].data.trim(), contrast(style.color, behind(element)), 4.5);
    if (element.matches("input[type=checkbox]:not(:checked), input[type=radio]:not(:checked), textarea, .picture"))
      note(element.outerHTML.slice(0, 60), contrast(style.borderTopColor, behind(element.parentElement)), 3);
  }
  return faint;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_what_is_on_the_page_stands_out(open_page, scheme) -> None:
    page = open_page(scheme=scheme)
    page.get_by_text("Advanced").click()
    page.get_by_role("checkbox", name="compel").uncheck()
    page.mouse.move(0, 0)
    page.wait_for_timeout(500)  # colors fade in
    assert page.evaluate(FAINT) == []
