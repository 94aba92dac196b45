"""The report of a run: the same figures in Markdown, JSON and HTML, and the pictures sorted in a browser."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from finelip_sdxl.data.caption_dataset import UnreadableImageError
from finelip_sdxl.data.prompt_sets import Prompt, PromptSet
from finelip_sdxl.evaluation.intervals import Interval, mean_interval
from finelip_sdxl.miniature.dataset import MiniatureScenes
from finelip_sdxl.picture_evaluation.plan import PicturePlan
from finelip_sdxl.picture_evaluation.report import figure_table, write_report
from finelip_sdxl.picture_evaluation.scores import Figure, Scores
from tests.helpers.picture_runs import COLUMNS, miniature_run, write_manifest

COMMAND = "finelip-sdxl evaluate images --data 'txt:a<b>.txt'"
HOSTILE = 'A <script>alert("1")</script> & | fox.'


def some_scores(prompts: int) -> Scores:
    values: dict[str, list[float | None]] = {
        "stock": [0.5] * prompts,
        "finelip": [index / prompts for index in range(prompts - 1)] + [None],
    }
    means = {column: mean_interval(own) for column, own in values.items()}
    distance = {"stock": Interval(2.0, 1.0, 3.0, prompts), "finelip": None}
    judged = Figure("sentences", "Sentence fidelity", "clip|x, 77 positions", means, values, self_judged=("stock",))
    return Scores([judged, Figure("cmmd", "CMMD", "clip, 4 image features", distance, {}, False)], ["A note <i>."])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run of 25 prompts, with its report."""
    folder = tmp_path_factory.mktemp("run")
    plan = miniature_run(folder, scenes=25)
    prompts = [Prompt(HOSTILE, "x/../<b>"), *plan.prompts.prompts[1:]]
    prompt_set = PromptSet("txt:a<b>.txt", prompts)
    write_manifest(folder, prompt_set)
    write_report(PicturePlan(prompt_set, COLUMNS, plan.settings), folder, some_scores(25), COMMAND)
    return folder


def test_markdown_json_and_html_hold_the_same_figures(folder) -> None:
    content = json.loads((folder / "report.json").read_text())
    markdown, html = ((folder / f"report.{kind}").read_text() for kind in ("md", "html"))
    figure = content["figures"][0]
    mean = figure["values"]["finelip"]
    assert (mean["value"], mean["count"]) == (pytest.approx(0.46), 24)
    assert f"{mean['value']:.3f} ({mean['low']:.3f} to {mean['high']:.3f})" in markdown
    assert f"{mean['low']:.3f} to {mean['high']:.3f}" in html
    assert figure["self_judged"] == ["stock"]
    assert "0.500 (0.500 to 0.500) *" in markdown
    assert "Self-judged: this judge's own text encoder drew the column." in markdown
    assert content["figures"][1]["values"]["finelip"] is None
    assert "| – " in markdown
    assert content["prompts"][3]["scores"] == {"sentences": {"stock": 0.5, "finelip": 3 / 25}}
    assert content["command"] == COMMAND
    assert content["settings"]["steps"] == 1


def test_every_picture_of_the_report_is_there(folder) -> None:
    content = json.loads((folder / "report.json").read_text())
    named = [file for prompt in content["prompts"] for files in prompt["pictures"].values() for file in files]
    assert len(named) == 50
    assert sorted(re.findall(r'<img src="([^"]+)"', (folder / "report.html").read_text())) == sorted(named)
    assert all((folder / file).is_file() for file in named)


def test_texts_of_others_are_escaped(folder) -> None:
    html = (folder / "report.html").read_text()
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert" in html
    assert "A note &lt;i&gt;." in html
    assert "clip\\|x, 77 positions" in (folder / "report.md").read_text()


def test_the_table_has_one_width_for_each_column() -> None:
    lines = figure_table(some_scores(4), COLUMNS)[:4]
    bars = [[at for at, sign in enumerate(line) if sign == "|" and line[at - 1] != "\\"] for line in lines]
    assert all(one == bars[0] for one in bars)


def test_a_run_without_judges_has_a_report_of_pictures(tmp_path) -> None:
    plan = miniature_run(tmp_path, scenes=2)
    write_report(plan, tmp_path, Scores([], []), COMMAND)
    assert (tmp_path / "report.html").read_text().count("<img ") == 4 + 2  # drawn ones, and the data set's
    assert "Settings" in (tmp_path / "report.md").read_text()


class Broken(MiniatureScenes):
    def image(self, index: int) -> Image.Image:
        if index == 1:
            raise UnreadableImageError("scene 1 is broken")
        return super().image(index).resize((1024, 512))


def test_the_data_set_s_own_images_stand_beside_the_drawn_ones(tmp_path) -> None:
    plan = miniature_run(tmp_path, scenes=3)
    plan = replace(plan, prompts=replace(plan.prompts, images=Broken("test", 3)))
    write_report(plan, tmp_path, Scores([], []), COMMAND)
    assert sorted(file.name for file in (tmp_path / "data").iterdir()) == ["00000.png", "00002.png"]
    assert Image.open(tmp_path / "data" / "00002.png").size == (512, 256)
    html = (tmp_path / "report.html").read_text()
    assert [html.count(f'<img src="data/{index:05}.png"') for index in range(3)] == [1, 0, 1]
    content = json.loads((tmp_path / "report.json").read_text())
    assert [prompt["data_image"] for prompt in content["prompts"]] == ["data/00000.png", None, "data/00002.png"]


CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def page(folder) -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium to look at the page with")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.problems = []
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.on("request", lambda request: request.url.startswith("file:") or page.problems.append(request.url))
        page.goto(f"file://{folder}/report.html")
        yield page
        browser.close()


def numbers(page) -> list[int]:
    return [int(card.get_attribute("data-number")) for card in page.locator(".card").all()]


@pytest.mark.slow
def test_a_browser_shows_the_worst_and_the_best_ten_and_sorts_by_any_figure(page) -> None:
    page.reload()
    # The last prompt has no figure in FineLIP-SDXL's column; the others rise with their numbers.
    assert numbers(page) == [*range(1, 11), *range(24, 14, -1)]
    assert page.locator(".part").all_inner_texts() == ["Worst", "Best"]
    assert page.locator("output").inner_text() == "20 of 25 prompts; 1 have no such figure"
    page.select_option("select[name=show]", "best")
    assert numbers(page) == [*range(24, 0, -1), 25]
    page.select_option("select[name=column]", "stock-finelip")
    assert numbers(page) == [*range(1, 25), 25]
    page.select_option("select[name=show]", "data")
    assert numbers(page) == list(range(1, 26))
    assert page.problems == []


@pytest.mark.slow
@pytest.mark.parametrize("width", [320, 390, 768, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_every_width_and_scheme(page, width, scheme) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    page.emulate_media(color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    light = sum(map(int, re.findall(r"\d+", ground)[:3])) > 3 * 128
    assert light == (scheme == "light")
