"""Heat maps on the command line, on the tiny SDXL: `generate --heat-maps` and `compare --list-ignored`."""

from pathlib import Path

import pytest
from PIL import Image

from finelip_sdxl.attribution import overlays
from finelip_sdxl.attribution.trace import AttentionTrace
from finelip_sdxl.cli.main import main

PROMPT = "The red fox is above the hare. The small blue square is quiet. " * 12


@pytest.fixture
def sheets(monkeypatch) -> list[tuple[str, int, int]]:
    """Of each sheet: the prompt of its trace, the number of phrases, and of the picture."""
    found: list[tuple[str, int, int]] = []
    make = overlays.heat_map_sheet

    def noting(image: Image.Image, trace: AttentionTrace, index: int) -> Image.Image:
        found.append((trace.text(index), len(trace.phrases(index)), index))
        return make(image, trace, index)

    monkeypatch.setattr(overlays, "heat_map_sheet", noting)
    return found


def generate(stock_folder: str, folder: Path, *flags: str) -> bytes:
    options = ["--base", stock_folder, "--steps", "2", "--seed", "0", "--device", "cpu", "--out", str(folder / "a.png")]
    assert main(["generate", PROMPT, *options, *flags]) == 0
    (first, *_) = sorted(folder.glob("a*.png"))
    return Image.open(first).tobytes()


def test_a_sheet_of_every_phrase_beside_the_same_picture(stock_folder, tmp_path, sheets, capsys) -> None:
    plain = generate(stock_folder, tmp_path)
    maps = tmp_path / "maps.png"
    assert generate(stock_folder, tmp_path, "--heat-maps", str(maps)) == plain
    assert sheets == [(PROMPT, 24, 0)]
    assert Image.open(maps).text["prompt"] == PROMPT
    assert Image.open(maps).width > 4 * 256
    assert f"{maps} (heat maps)" in capsys.readouterr().out


def test_every_picture_has_its_sheet(stock_folder, tmp_path, sheets) -> None:
    generate(stock_folder, tmp_path, "--num-images", "2", "--heat-maps", str(tmp_path / "maps.png"))
    assert [index for *_, index in sheets] == [0, 1]
    assert {file.name for file in tmp_path.glob("maps*")} == {"maps-1.png", "maps-2.png"}


@pytest.mark.parametrize("weighting", [(), ("--weighting", "a1111", "--negative-prompt", "a hare " * 200)])
def test_with_an_encoded_prompt_that_is_saved(stock_folder, tmp_path, sheets, weighting) -> None:
    saved = str(tmp_path / "encoded.safetensors")
    generate(stock_folder, tmp_path, "--heat-maps", str(tmp_path / "m.png"), "--save-conditioning", saved, *weighting)
    assert sheets[0][1:] == (24, 0)


def test_compare_lists_what_acted_nowhere(stock_folder, tmp_path, capsys) -> None:
    options = ["--base", stock_folder, "--steps", "2", "--device", "cpu", "--out", str(tmp_path / "c.png")]
    prompt = f"{PROMPT} A large hare is in the end."
    assert main(["compare", prompt, "--list-ignored", *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    starts = [number for number, line in enumerate(lines) if " drew seed " in line]
    assert len(starts) == 3
    assert all(" of 25 phrases acted nowhere" in lines[start + 1] for start in starts)
    stock = lines[starts[0] : starts[1]]
    assert "  A large hare is in the end. (cut)" in stock
    assert not any("(cut)" in line for line in lines[starts[1] :])
    assert main(["compare", prompt, *options]) == 0
    assert "phrases" not in capsys.readouterr().out
