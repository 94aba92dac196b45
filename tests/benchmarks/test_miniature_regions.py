"""The benchmark of regional prompts."""

import json
import sys
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks import miniature_regions
from benchmarks.miniature_regions import REGIONS, WAYS, make_regions
from finelip_sdxl.miniature.captions import long_caption
from finelip_sdxl.miniature.drawing import draw_scene
from finelip_sdxl.miniature.tokenizer import build_tokenizer
from finelip_sdxl.miniature.world import Scene, make_scene


@pytest.fixture
def drawn(monkeypatch) -> list[Any]:
    """What was drawn: each picture does what its prompts say."""
    calls: list[Any] = []

    def draw(pipe, text, regions, seed, arguments) -> Image.Image:
        calls.append(regions)
        scene = make_scene(f"unseen-{seed}")
        assert text == long_caption(scene, f"unseen-{seed}").text
        objects = list(scene.objects)
        for region in regions:
            objects[region.cell] = region.scene.objects[region.cell]
        return draw_scene(Scene(tuple(objects), scene.background))

    monkeypatch.setattr(miniature_regions, "draw", draw)
    return calls


def run(monkeypatch, *flags: str) -> None:
    monkeypatch.setattr(sys, "argv", ["miniature_regions.py", *flags])
    miniature_regions.main()


def test_objects_of_regions_and_of_the_rest_count_and_a_stopped_run_goes_on(
    drawn, monkeypatch, capsys, tmp_path
) -> None:
    ways = {name: miniature_regions.Way(lambda: None, way.has_regions) for name, way in WAYS.items()}
    monkeypatch.setattr(miniature_regions, "WAYS", ways)
    results, sheet = tmp_path / "a.json", tmp_path / "sheet.png"
    for _ in range(2):
        run(monkeypatch, "--scenes", "3", "--json", str(results))
    printed = capsys.readouterr().out
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in printed.splitlines() if "100.0" in line}
    assert all(figure.startswith("100.0") for figure in rows["regions, FineLIP"])
    inside, elsewhere = rows["no regions"][::2], rows["no regions"][1::2]
    assert all(float(figure.split(" ")[0]) < 50 for figure in inside)
    assert all(figure.startswith("100.0") for figure in elsewhere)
    assert "3 scenes, 20 steps, guidance 5" in printed
    assert len(drawn) == 3 * (len(REGIONS) * (len(WAYS) - 1) + 1)  # without regions once
    assert json.loads(results.read_text())["3 scenes, 20 steps, guidance 5"].keys() == WAYS.keys()
    run(monkeypatch, "--scenes", "1", "--sheet", str(sheet))
    assert Image.open(sheet).width > 3 * 192


def test_regions_are_the_same_each_time_and_their_objects_are_described_past_stock_s_tokens() -> None:
    regions = make_regions(0, 3)
    assert regions == make_regions(0, 3)
    assert len({region.cell for region in regions}) == 3
    for region in regions:
        assert region.mask.sum() == 1
        assert np.flatnonzero(region.mask).tolist() == [region.cell]
        name = region.scene.objects[region.cell].shape
        tokens = build_tokenizer(max_length=10**4)(region.text)
        assert tokens.char_to_token(region.text.rindex(name)) >= 77
