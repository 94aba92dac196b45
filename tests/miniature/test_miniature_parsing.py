"""What is read off texts in the miniature's language, written by its captions or typed by people."""

import pytest

from finelip_sdxl.miniature.captions import long_caption, short_caption
from finelip_sdxl.miniature.parsing import DescribedObject, parse_description
from finelip_sdxl.miniature.world import PLACES, make_scene


def _read(text: str) -> list[tuple]:
    return [(thing.place, thing.size, thing.color, thing.shape) for thing in parse_description(text)]


@pytest.mark.parametrize("write", [short_caption, long_caption])
def test_captions_are_read_back_exactly(write) -> None:
    linked = 0
    for k in range(300):
        scene = make_scene(f"parsing-{k}")
        caption = write(scene, f"parsing-{k}")
        expected = []
        for mention in caption.described:
            thing = scene.objects[mention.index]
            size = thing.size if mention.size_named else None
            is_linked = mention.kind == "linked"
            expected.append(
                DescribedObject(thing.place, thing.shape, thing.color, size, is_linked, mention.start, mention.end)
            )
            linked += is_linked
        assert list(parse_description(caption.text)) == expected
    assert linked > 100


@pytest.mark.parametrize(
    "text",
    [
        "a red star, top left",
        "top left: red star",
        "Top-left: a star in red!",
        "A RED STAR in the UPPER LEFT of the picture",
        "red star in the left top",
        "In the upper left-hand corner stands a\nred star",
        "The star in the top left is red",
        "a red star in the top left, on a blue background",
        "a red star (top left), next to a starfish",
    ],
)
def test_typed_variants_are_understood(text) -> None:
    assert _read(text) == [("top left", None, "red", "star")]


@pytest.mark.parametrize("text", ["a large, red star, center", "a large star in red, center", "center: red large star"])
def test_a_size_is_read_wherever_it_stands_before_the_shape(text) -> None:
    assert _read(text) == [("center", "large", "red", "star")]


@pytest.mark.parametrize("place", PLACES)
def test_no_place_is_taken_for_another(place) -> None:
    for said in (place, place.upper(), place.replace("top", "upper").replace("bottom", "lower")):
        for text in (f"The {said} holds a red star.", f"Look at the {said} of the picture: a red star"):
            assert _read(text) == [(place, None, "red", "star")]


@pytest.mark.parametrize(
    ("said", "place"),
    [
        ("center left", "middle left"),
        ("right center", "middle right"),
        ("top middle", "top center"),
        ("center bottom", "bottom center"),
        ("middle", "center"),
        ("centre", "center"),
    ],
)
def test_center_and_middle_mean_the_same(said, place) -> None:
    assert _read(f"a red star in the {said}") == [(place, None, "red", "star")]


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n",
        "...",
        "A portrait of a cat, oil on canvas, 3.5 mm",
        "It is a simple picture, made with care. The background is white paper.",
        "a red star",
        "a star in the center",
        "a red star on the left",
        "a red thing in the center",
        "a starfish in red, center",
        "a red heart-shaped stone in the center",
        "starred, centered, red stars",
        "a red ſtar in the top rıght, 赤い星",
        "a red star and a ring in the center",
        "a red star and a blue ring in the center",
    ],
)
def test_what_lacks_a_part_describes_nothing(text) -> None:
    assert parse_description(text) == ()


@pytest.mark.parametrize(
    "link",
    [
        "of the same color as the star",
        "that has the color of the star",
        "painted in the color of the star",
        "whose color is that of the star",
        "in the same colour as the large red star",
    ],
)
def test_a_link_takes_the_color_from_the_object_named_before(link) -> None:
    star, ring = parse_description(f"The center holds a red star. In the top left there is a small ring {link}.")
    assert not star.linked
    assert ring.linked
    assert (ring.place, ring.size, ring.color, ring.shape) == ("top left", "small", "red", "ring")


def test_links_are_followed_through_chains() -> None:
    text = "Top left: a teal star. Center: a ring of the color of the star. A moon of the color of the ring, top right"
    assert [(thing.shape, thing.color, thing.linked) for thing in parse_description(text)] == [
        ("star", "teal", False),
        ("ring", "teal", True),
        ("moon", "teal", True),
    ]


def test_a_link_to_what_comes_later_or_never_is_passed_over_and_so_is_the_next_in_the_chain() -> None:
    text = (
        "The center holds a ring that has the color of the star. A moon of the color of the ring is in the top left. "
        "The top right holds a red star."
    )
    assert _read(text) == [("top right", None, "red", "star")]


def test_a_link_goes_to_the_last_object_of_that_shape() -> None:
    text = "top left: red star. top right: blue star. center: ring of the color of the star. middle left: green star."
    assert parse_description(text)[2].color == "blue"


def test_an_object_without_a_place_still_has_a_color_to_link_to() -> None:
    assert _read("There is a red star. A ring of the same color as the star is in the center.") == [
        ("center", None, "red", "ring")
    ]


@pytest.mark.parametrize(
    "text",
    [
        "A red star in the top left, a small blue ring in the center and a leaf in the color of the ring, lower right.",
        "Top left: red star, center: small blue ring and bottom right: a leaf of the color of the ring.",
        "- top left: red star\n- center: small blue ring\n- bottom right: leaf in the color of the ring",
        "In the top left a red star, a small blue ring in the center, lower right: a leaf of the color of the ring",
    ],
)
def test_several_objects_of_a_sentence_are_told_apart(text) -> None:
    assert _read(text) == [
        ("top left", None, "red", "star"),
        ("center", "small", "blue", "ring"),
        ("bottom right", None, "blue", "leaf"),
    ]
    parts = [text[thing.start : thing.end] for thing in parse_description(text)]
    for part, shape in zip(parts, ("star", "ring", "leaf"), strict=True):
        assert shape in part
    assert "star" not in parts[1]
    assert "star" not in parts[2]
    assert text.endswith(parts[2])


def test_a_place_described_twice_is_given_twice() -> None:
    assert _read("A red star is in the center. A blue ring is in the center.") == [
        ("center", None, "red", "star"),
        ("center", None, "blue", "ring"),
    ]


def test_spans_leave_out_what_is_between_sentences() -> None:
    text = "  Nothing here moves.  a red star, top left \n"
    (thing,) = parse_description(text)
    assert text[thing.start : thing.end] == "a red star, top left"
