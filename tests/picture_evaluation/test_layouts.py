"""Layouts for published scorers, each read back by the rules of its scorer's own code."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finelip_sdxl.comparison import Settings
from finelip_sdxl.data import open_prompts
from finelip_sdxl.data.prompt_sets import Prompt, PromptSet
from finelip_sdxl.images import save_png
from finelip_sdxl.options import LAYOUTS
from finelip_sdxl.picture_evaluation.layouts import check_layout, write_layout
from finelip_sdxl.picture_evaluation.plan import PicturePlan
from tests.helpers import prompt_sets
from tests.helpers.prompt_sets import PROMPTS

COLUMNS = ("stock", "finelip")
SIDE = 16


def drawn(prompts: PromptSet, folder: Path, images_per_prompt: int = 1) -> PicturePlan:
    """A plan whose pictures are there: each has a gray of its own."""
    plan = PicturePlan(prompts, COLUMNS, Settings(""), images_per_prompt)
    for place in plan.places():
        image = Image.new("RGB", (SIDE, SIDE), (gray(*place),) * 3)
        save_png(image, folder / place.file, {"prompt": prompts.prompts[place.prompt].text})
    return plan


def gray(column: str, prompt: int, number: int) -> int:
    return 100 * COLUMNS.index(column) + 10 * prompt + number


def seen(file: Path) -> int:
    """The gray of a picture of one gray."""
    with Image.open(file) as image:
        pixels = np.asarray(image.convert("L"))
    assert np.ptp(pixels) == 0
    return int(pixels[0, 0])


def test_dpg_bench_reads_quarters_of_pictures_named_as_their_prompts(tmp_path) -> None:
    prompts = open_prompts(prompt_sets.dpg_bench(tmp_path / "data"))
    place = write_layout("dpg-bench", drawn(prompts, tmp_path / "run", images_per_prompt=4), tmp_path / "run")
    for column in COLUMNS:
        found = {}
        for file in (place / column).iterdir():  # every file is taken for a picture
            key = file.name.split(".")[0]
            with Image.open(file) as grid:
                assert grid.size == (2 * SIDE, 2 * SIDE)
                corners = [(0, 0), (SIDE, 0), (0, SIDE), (SIDE, SIDE)]
                quarters = [grid.crop((left, top, left + SIDE, top + SIDE)) for left, top in corners]
            found[key] = [int(np.asarray(quarter)[3, 3, 0]) for quarter in quarters]
        expected = ["COCOval2014000000000042", "diffusiondb", "whoops12"]
        assert found == {name: [gray(column, index, n) for n in range(4)] for index, name in enumerate(expected)}


def test_tiif_reads_pictures_by_type_model_length_and_line(tmp_path) -> None:
    prompts = open_prompts(prompt_sets.tiif(tmp_path / "data"))
    plan = drawn(prompts, tmp_path / "run")
    place = write_layout("tiif", plan, tmp_path / "run")
    found = []
    for column in COLUMNS:
        for file in sorted((tmp_path / "data").glob("*.jsonl")):
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            for number, line in enumerate(lines):
                for length in ("short_description", "long_description"):
                    (picture,) = (place / lines[0]["type"] / column / length).glob(f"{number}.*")
                    text = [prompt.text for prompt in prompts.prompts].index(line[length])
                    assert seen(picture) == gray(column, text, 0)
                    found.append(picture)
    assert len(found) == len({*found}) == len(list(place.rglob("*.png"))) == 2 * 6


def test_longbench_t2i_reads_the_last_picture_of_the_last_step_of_numbered_folders_in_order(tmp_path) -> None:
    prompts = PromptSet("txt:x", [Prompt(f"prompt {n}", f"{n:05}") for n in range(9)] + [Prompt("ten", "00009")])
    place = write_layout("longbench-t2i", drawn(prompts, tmp_path), tmp_path)
    for column in COLUMNS:
        base = place / "outputs" / column
        folders = sorted((f for f in base.iterdir() if f.is_dir() and f.name.isdigit()), key=lambda f: int(f.name))
        assert len(folders) == 10
        for index, folder in enumerate(folders):
            steps = [step for step in folder.iterdir() if re.match(r"step\d+", step.name.lower())]
            last = max(steps, key=lambda step: int(re.search(r"\d+", step.name).group()))
            pictures = {int(re.search(r"_(\d+)\.jpg", f.name)[1]): f for f in last.glob("generated_image_*.jpg")}
            assert abs(seen(pictures[max(pictures)]) - gray(column, index, 0)) <= 1  # JPEG
            with Image.open(pictures[max(pictures)]) as image:
                assert image.format == "JPEG"


@pytest.mark.parametrize("images_per_prompt", [1, 3])
def test_detailmaster_reads_pictures_by_a_list_of_their_names(images_per_prompt, tmp_path) -> None:
    prompts = open_prompts(prompt_sets.detailmaster(tmp_path / "data"))
    place = write_layout("detailmaster", drawn(prompts, tmp_path / "run", images_per_prompt), tmp_path / "run")
    for column in COLUMNS:
        named: dict[str, list[str]] = {}
        for entry in json.loads((place / f"{column}.json").read_text()):
            named.setdefault(entry["image_id"], []).append(entry["output_image_name"])
        for row in prompt_sets.detailmaster_entries():
            names = named[f"{row['dataset_target']}_{row['image_id']}"]
            grays = [seen(place / column / name) for name in names]
            index = PROMPTS.index(row["polished_prompt"])
            assert grays == [gray(column, index, number) for number in range(images_per_prompt)]


def test_t2i_compbench_reads_the_prompt_and_a_number_from_the_names(tmp_path) -> None:
    prompts = open_prompts(prompt_sets.txt(tmp_path / "data"))
    place = write_layout("t2i-compbench", drawn(prompts, tmp_path / "run", images_per_prompt=2), tmp_path / "run")
    for column in COLUMNS:
        names = [file.name for file in (place / column / "samples").iterdir()]
        names.sort(key=lambda name: int(name.split("_")[-1].split(".")[0]))
        assert [name.split("_")[0] for name in names] == [prompt for prompt in PROMPTS for _ in range(2)]
        assert [int(name.split(".png")[0].split("_")[1]) for name in names] == list(range(6))
        grays = [seen(place / column / "samples" / name) for name in names]
        assert grays == [gray(column, index, number) for index in range(3) for number in range(2)]


def test_plain_pictures_are_those_of_the_run(tmp_path) -> None:
    plan = drawn(open_prompts(prompt_sets.txt(tmp_path / "data")), tmp_path / "run")
    before = sorted((tmp_path / "run").rglob("*"))
    place = write_layout("plain", plan, tmp_path / "run")
    assert sorted((tmp_path / "run").rglob("*")) == before
    assert len(list(place.rglob("*.png"))) == 6


def test_a_scorer_that_writes_to_its_pictures_does_not_change_those_of_the_run(tmp_path) -> None:
    plan = drawn(open_prompts(prompt_sets.detailmaster(tmp_path / "data")), tmp_path / "run")
    place = write_layout("detailmaster", plan, tmp_path / "run")
    for file in place.rglob("*.png"):
        file.write_bytes(b"")
    assert seen(next(iter(plan.files_of(tmp_path / "run", "finelip", 1)))) == gray("finelip", 1, 0)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "tiif"])
def test_other_prompts_fit_into_a_layout_too(layout, tmp_path) -> None:
    plan = drawn(open_prompts("miniature:2"), tmp_path)
    if layout == "t2i-compbench":  # whose names of files are prompts
        with pytest.raises(ValueError, match=r"of prompt 1 of miniature:2 is too long for the name of a file"):
            check_layout(layout, plan)
    else:
        check_layout(layout, plan)
        write_layout(layout, plan, tmp_path)


@pytest.mark.parametrize(
    ("layout", "prompts", "images_per_prompt", "message"),
    [
        ("dpg-bench", [Prompt("a", "x")], 2, "`images_per_prompt` is 2; expected 1, or 4 as quarters"),
        (
            "tiif",
            [Prompt("a", "x", ("t", "long_description"))],
            2,
            "`images_per_prompt` is 2; expected 1 in the layout",
        ),
        ("longbench-t2i", [Prompt("a", "x")], 4, "`images_per_prompt` is 4; expected 1 in the layout longbench-t2i"),
        ("tiif", [Prompt("a", "x")], 1, "needs the types and lines of TIIF-Bench, which txt:x lacks"),
        ("tiif", [Prompt("a", "0", ("../up", "short_description"))], 1, "'../up' of prompt 1 of txt:x is no name"),
        ("dpg-bench", [Prompt("a", "../../up")], 1, "'' of prompt 1 of txt:x is no name of a file"),
        ("dpg-bench", [Prompt("a", "up/x")], 1, "'up/x' of prompt 1 of txt:x is no name of a file"),
        ("dpg-bench", [Prompt("a", "x.1"), Prompt("b", "x.2")], 1, "Prompts 1 and 2 of txt:x would share the file"),
        ("t2i-compbench", [Prompt("a cat / a dog", "0")], 1, "'a cat / a dog' of prompt 1 of txt:x is no name"),
        ("t2i-compbench", [Prompt("a snake_case", "0")], 1, "Prompt 1 of txt:x holds an underscore"),
        ("t2i-compbench", [Prompt("é" * 123, "0")], 1, "is too long for the name of a file"),
    ],
)
def test_what_a_scorer_could_not_read_is_refused_before_anything_is_drawn(
    layout, prompts, images_per_prompt, message
) -> None:
    plan = PicturePlan(PromptSet("txt:x", prompts), COLUMNS, Settings(""), images_per_prompt)
    with pytest.raises(ValueError, match=re.escape(message)):
        check_layout(layout, plan)


def test_a_grid_holds_squares() -> None:
    settings = Settings("", width=64, height=128)
    plan = PicturePlan(PromptSet("txt:x", [Prompt("a", "x")]), COLUMNS, settings, 4)
    with pytest.raises(ValueError, match="`width` is 64 and `height` 128; expected squares"):
        check_layout("dpg-bench", plan)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "plain"])
def test_a_damaged_picture_is_named_with_what_to_do(layout, tmp_path) -> None:
    build = prompt_sets.tiif if layout == "tiif" else prompt_sets.txt
    plan = drawn(open_prompts(build(tmp_path / "data")), tmp_path / "run")
    (tmp_path / "run" / "pictures" / "stock" / "00001_00.png").write_bytes(b"half")
    with pytest.raises(OSError, match=r"00001_00\.png cannot be read .*: delete it, and run again to draw it again"):
        write_layout(layout, plan, tmp_path / "run")
