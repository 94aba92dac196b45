"""The benchmark of heat maps against the truth, and that of their cost."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import attention_maps, miniature_attribution
from benchmarks.miniature_attribution import ALIGNED, WAYS
from finelip_sdxl.attribution.phrases import TokenPlaces, split_phrases
from finelip_sdxl.attribution.trace import Phrase
from finelip_sdxl.miniature.captions import long_caption
from finelip_sdxl.miniature.drawing import draw_scene
from finelip_sdxl.miniature.tokenizer import build_tokenizer
from finelip_sdxl.miniature.world import make_scene
from finelip_sdxl.prompts.plan import tokenize
from tests.helpers.tiny_sdxl import UNET


class Trace:
    """A trace whose maps are those of a picture that does what its prompt says, or the opposite."""

    def __init__(self, prompt: str, cells: dict[int, int]) -> None:
        """`cells` are the objects' cells by the last character of their sentences."""
        _, offsets = tokenize(build_tokenizer(), prompt)
        self.places = TokenPlaces(prompt, offsets, range(1, len(offsets) + 1))
        self.maps = torch.full((1, len(offsets) + 1, 3, 3), 0.01)
        self.spans = split_phrases(prompt)
        for (_, end), position in zip(offsets, self.places.positions, strict=True):
            if end in cells:
                self.maps[0, position].view(-1)[cells[end]] = 1.0

    def _drawn(self) -> torch.Tensor:
        return self.maps

    def _text_places(self, index: int) -> list[TokenPlaces]:
        return [self.places]

    def heat_map(self, span: tuple[int, int]) -> np.ndarray:
        position = self.places.last_position(*span)
        return np.kron(self.maps[0, position].numpy(), np.ones((8, 8), dtype=np.float32))

    def overlay(self, image: Image.Image, span: tuple[int, int], index: int) -> Image.Image:
        return image

    def phrases(self, index: int = 0) -> list[Phrase]:
        text = self.places.text
        return [Phrase(text[start:end], start, end, 0.5, 0.1, 0.5, 0.5) for start, end in self.spans]


class Fake:
    """A comparison that draws every scene as its caption says; `wrong` maps lie in the next cell."""

    drawn = 0

    def __init__(self, wrong: bool = False) -> None:
        self.wrong = wrong

    def draw(self, column: str, settings, traced: bool) -> SimpleNamespace:
        Fake.drawn += 1
        scene = make_scene(f"unseen-{settings.seed}")
        caption = long_caption(scene, f"unseen-{settings.seed}")
        assert (caption.text, traced) == (settings.prompt, True)
        cells = {mention.end: (mention.index + self.wrong) % 9 for mention in caption.described}
        return SimpleNamespace(image=draw_scene(scene), trace=Trace(caption.text, cells))


@pytest.fixture
def fake(monkeypatch) -> type[Fake]:
    monkeypatch.setattr(miniature_attribution.Way, "open", lambda way: Fake(wrong=way.column == "stock"))
    monkeypatch.setattr(Fake, "drawn", 0)
    return Fake


def run(monkeypatch, *flags: str) -> None:
    monkeypatch.setattr(sys, "argv", ["miniature_attribution.py", *flags])
    miniature_attribution.main()


def row(text: str, name: str) -> list[str]:
    (line, *_) = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in line[1:-1].split("|")][1:]


def test_maps_in_the_objects_cells_are_hits_and_others_are_none(fake, monkeypatch, capsys) -> None:
    run(monkeypatch, "--scenes", "3")
    printed = capsys.readouterr().out
    assert all(cell.startswith("100.0") for cell in row(printed, ALIGNED)[:2])
    assert all(float(cell.split()[0]) > 90 for cell in row(printed, ALIGNED)[2:6])  # the mass, and right objects
    assert all(cell.startswith("0.0") for cell in row(printed, "stock, cut at 77")[:2])
    assert "| last token alone | 100.0" in printed
    assert "3 scenes, 20 steps, guidance 5" in printed


def test_a_stopped_run_goes_on_and_the_page_is_whole(fake, monkeypatch, capsys, tmp_path) -> None:
    results, page = tmp_path / "a.json", tmp_path / "attribution.md"
    run(monkeypatch, "--scenes", "2", "--json", str(results), "--only", ALIGNED)
    assert fake.drawn == 2
    run(monkeypatch, "--scenes", "2", "--json", str(results), "--report", str(page))
    assert fake.drawn == 2 * len(WAYS) + 1  # one more for the sheet
    assert len(json.loads(results.read_text())["2 scenes, 20 steps, guidance 5"]) == len(WAYS)
    text = page.read_text(encoding="utf-8")
    assert f"`python benchmarks/miniature_attribution.py --scenes 2 --json {results}" in text
    for name in ("attribution-plot.png", "attribution-sheet.png"):
        assert f"({name})" in text
        assert Image.open(tmp_path / name).width > 200
    assert all(f"| {name} |" in text for name in WAYS)


def test_the_area_under_the_curve() -> None:
    area = miniature_attribution.area_under_curve
    assert area([(3, 1), (2, 1), (1, 0)]) == 1
    assert area([(1, 1), (2, 0)]) == 0
    assert area([(1, 1), (1, 0)]) == 0.5
    assert np.isnan(area([(1, 1), (2, 1)]))


def test_cells_of_maps_that_three_does_not_divide() -> None:
    heat = np.zeros((16, 16))
    heat[-1, 0] = 2
    assert miniature_attribution._cells(heat).tolist() == [0, 0, 0, 0, 0, 0, 1, 0, 0]
    assert not miniature_attribution._cells(np.zeros((16, 16))).any()


def test_the_cost_of_tracing_is_counted_without_weights(monkeypatch, capsys) -> None:
    unet = {**UNET, "cross_attention_dim": 2048}
    monkeypatch.setattr(attention_maps, "UNET", unet)
    monkeypatch.setattr(attention_maps, "LATENTS", 16)
    monkeypatch.setattr(sys, "argv", ["attention_maps.py", "--repeats", "0"])
    attention_maps.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("`python benchmarks/attention_maps.py --repeats 0`")
    cells = [cell.strip() for cell in lines[4][1:-1].split("|")]
    assert cells[:3] == ["77", "77 × 8 × 8 (5), 77 × 4 × 4 (6)", "0.0"]
    assert float(cells[4]) > 1
    assert Path(attention_maps.__file__).name in lines[0]


def test_the_cost_of_a_block_is_a_ratio(monkeypatch) -> None:
    monkeypatch.setattr(attention_maps, "BLOCKS", {8: (32, 2)})
    monkeypatch.setattr(attention_maps, "LATENTS", 16)
    assert len(attention_maps.block_seconds(8, 77, 2)) == 2
