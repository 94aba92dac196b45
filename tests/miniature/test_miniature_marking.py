"""Marks on the miniature's pictures."""

import numpy as np
import pytest
from PIL import Image, ImageChops

from finelip_sdxl.miniature.drawing import IMAGE_SIZE, coverage, draw_scene
from finelip_sdxl.miniature.marking import RIGHT, WRONG, mark_objects
from finelip_sdxl.miniature.scoring import ObjectScore
from finelip_sdxl.miniature.world import BACKGROUNDS, PLACES, SHAPES, Scene, SceneObject, make_scene

SCENE = make_scene("marking")
PICTURE = draw_scene(SCENE)
GOOD, BAD = (ObjectScore(True, color, None, True, clean=True) for color in (True, False))


SCALE = mark_objects(PICTURE, [], []).width // IMAGE_SIZE
PART = PICTURE.width * SCALE / 3 / 160  # marks are drawn in this fraction of a cell


def _at(*lengths: float) -> tuple[int, ...]:
    return tuple(round(length * PART) for length in lengths)


def _cell(picture: Image.Image, place: str) -> Image.Image:
    row, column = divmod(PLACES.index(place), 3)
    side = picture.width // 3
    return picture.crop((column * side, row * side, (column + 1) * side, (row + 1) * side))


def _frame_color(cell: Image.Image) -> tuple:
    return cell.getpixel(_at(4, 80))


def _changed(first: Image.Image, second: Image.Image) -> bool:
    return ImageChops.difference(first, second).getbbox() is not None


def test_the_picture_is_enlarged_and_only_described_cells_are_marked() -> None:
    plain = mark_objects(PICTURE, [], [])
    assert plain.size == (3 * PICTURE.width, 3 * PICTURE.height)
    marked = mark_objects(PICTURE, SCENE.objects[:2], [GOOD, BAD])
    changed = [_changed(_cell(marked, place), _cell(plain, place)) for place in PLACES]
    assert changed == [True, True] + [False] * 7


@pytest.mark.parametrize("place", PLACES)
def test_a_right_object_is_framed_in_green_and_a_wrong_one_in_red(place) -> None:
    thing = SCENE.objects[PLACES.index(place)]
    for score, color in ((GOOD, RIGHT), (BAD, WRONG)):
        assert _frame_color(_cell(mark_objects(PICTURE, [thing], [score]), place)) == color


def test_right_and_wrong_differ_without_color() -> None:
    right, wrong = (
        _cell(mark_objects(PICTURE, SCENE.objects[:1], [score]), PLACES[0]).crop(_at(140, 6, 154, 20))
        for score in (GOOD, BAD)
    )
    signs = [np.asarray(sign)[..., 0] > 230 for sign in (right, wrong)]  # white on green, white on red
    assert min(sign.sum() for sign in signs) > 15
    assert (signs[0] != signs[1]).sum() > 30


def test_objects_are_numbered_in_the_order_of_the_text() -> None:
    first, second = SCENE.objects[:2]
    badges = {}
    for order in ((first, second), (second, first)):
        marked = mark_objects(PICTURE, order, [GOOD, GOOD])
        for number, thing in enumerate(order, start=1):
            badges[thing.place, number] = _cell(marked, thing.place).crop(_at(6, 6, 20, 20))
    assert not _changed(badges[first.place, 1], badges[second.place, 1])
    assert not _changed(badges[first.place, 2], badges[second.place, 2])
    assert _changed(badges[first.place, 1], badges[first.place, 2])
    # A 1 is narrower than a 2, and than the 0 that counting must not begin with.
    widths = [(np.asarray(badges[first.place, number])[..., 0] > 200).any(axis=0).sum() for number in (1, 2)]
    assert 2 <= widths[0] < widths[1]


@pytest.mark.parametrize(
    ("scores", "frame", "above", "below"),
    [
        ([GOOD, GOOD], RIGHT, RIGHT, RIGHT),
        ([GOOD, BAD], WRONG, RIGHT, WRONG),
        ([BAD, GOOD], WRONG, WRONG, RIGHT),
        ([BAD, GOOD, GOOD], RIGHT, RIGHT, RIGHT),
    ],
)
def test_a_place_described_more_than_once_shows_its_last_two_marks(scores, frame, above, below) -> None:
    cell = _cell(mark_objects(PICTURE, [SCENE.objects[4]] * len(scores), scores), "center")
    assert _frame_color(cell) == frame
    assert (cell.getpixel(_at(13, 5)), cell.getpixel(_at(13, 155))) == (above, below)


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_marks_hide_no_object(background) -> None:
    for shapes in (SHAPES[:9], SHAPES[3:]):
        things = [SceneObject(place, shape, "yellow", "large") for place, shape in zip(PLACES, shapes, strict=True)]
        picture = draw_scene(Scene(tuple(things), background))
        plain, marked = mark_objects(picture, [], []), mark_objects(picture, things, [GOOD] * 9)
        for thing in things:
            same = np.asarray(_cell(marked, thing.place)) == np.asarray(_cell(plain, thing.place))
            inside = np.kron(coverage(thing.shape, "large"), np.ones((SCALE, SCALE))) > 0.5
            assert same.all(axis=2)[inside].mean() > 0.995


def test_pictures_of_other_sizes_and_modes_are_marked_too() -> None:
    picture = PICTURE.resize((200, 150)).convert("RGBA")
    marked = mark_objects(picture, SCENE.objects, [GOOD, BAD, GOOD] * 3, scale=2)
    assert (marked.size, marked.mode) == ((400, 300), "RGB")
    assert _changed(marked, mark_objects(picture, [], [], scale=2))


def test_too_few_scores_are_refused() -> None:
    with pytest.raises(ValueError, match="Got 2 objects and 1 scores; pass one score for each object"):
        mark_objects(PICTURE, SCENE.objects[:2], [GOOD])
