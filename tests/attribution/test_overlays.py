"""Pictures that show heat maps."""

import numpy as np
import pytest
from PIL import Image

from finelip_sdxl.attribution.overlays import describe, heat_map_sheet, overlay
from finelip_sdxl.attribution.trace import Phrase


def phrase(strength: float = 0.74, x: float | None = 0.2, y: float | None = 0.5) -> Phrase:
    return Phrase("a fox", 0, 5, strength, 0.25, x, y)


@pytest.mark.parametrize("color", ["white", "black", (200, 30, 30)])
@pytest.mark.parametrize("size", [(64, 48), (512, 512)])
def test_an_overlay_keeps_the_colors_of_its_place_alone(color, size) -> None:
    image = Image.new("RGB", size, color)
    heat = np.zeros((6, 8), dtype=np.float32)
    heat[:3, :4] = 1
    shown = overlay(image, heat)
    width, height = shown.size
    assert shown.size == size
    assert shown.getpixel((width // 8, height // 8)) == image.getpixel((0, 0))
    far = shown.getpixel((width - 1, height - 1))
    assert len(set(far)) == 1
    assert far != image.getpixel((0, 0))
    assert (255, 122, 0) in {color for _, color in shown.getcolors(size[0] * size[1])}


def test_an_overlay_of_nothing_is_faded() -> None:
    shown = np.asarray(overlay(Image.new("RGB", (8, 8), "red"), np.zeros((4, 4), dtype=np.float32)))
    assert len(np.unique(shown)) == 1


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_pictures_of_other_modes(mode) -> None:
    assert overlay(Image.new(mode, (8, 8)), np.ones((4, 4), dtype=np.float32)).mode == "RGB"


def test_what_is_no_picture_is_refused() -> None:
    with pytest.raises(TypeError, match="`image` is of type ndarray; expected a PIL"):
        overlay(np.zeros((8, 8, 3)), np.ones((4, 4)))  # type: ignore[arg-type]


def test_words() -> None:
    assert describe(phrase()) == "middle left, 74 %"
    assert describe(phrase(x=0.5)) == "center, 74 %"
    assert describe(phrase(x=1.0, y=0.0)) == "top right, 74 %"
    assert describe(phrase(strength=0.1)) == "acted nowhere"
    assert describe(phrase(strength=0.0, x=None, y=None)) == "cut: it never reached the picture"


class Trace:
    def __init__(self, count: int) -> None:
        self.count, self.shown = count, []

    def phrases(self, index: int) -> tuple[Phrase, ...]:
        return (phrase(),) * self.count

    def overlay(self, image: Image.Image, span: tuple[int, int], index: int) -> Image.Image:
        self.shown.append((image.size, index))
        return image


@pytest.mark.parametrize("count", [0, 1, 3, 4, 30])
def test_a_sheet_has_every_phrase(count) -> None:
    trace = Trace(count)
    sheet = heat_map_sheet(Image.new("RGB", (1024, 512)), trace, 2)
    assert trace.shown == [((1024, 512), 2)] * count or trace.shown[0][1] == 2
    assert len(trace.shown) == count
    assert sheet.width > 256


def test_a_sheet_of_very_many_phrases_stays_small() -> None:
    sheet = heat_map_sheet(Image.new("RGB", (1024, 1024)), Trace(400))
    assert sheet.width * sheet.height < 80e6
    assert 0.5 < sheet.width / sheet.height < 2
