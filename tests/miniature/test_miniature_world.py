"""Scenes, captions, tokenizer and scorer of the miniature world; no weights are needed here."""

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageFilter
from transformers import CLIPTokenizer

from finelip_sdxl.miniature.captions import count_words, long_caption, short_caption
from finelip_sdxl.miniature.dataset import MiniatureScenes
from finelip_sdxl.miniature.drawing import CELL_SIZE, draw_scene
from finelip_sdxl.miniature.scoring import drawing_errors, read_picture, score_objects, score_picture
from finelip_sdxl.miniature.tokenizer import build_tokenizer
from finelip_sdxl.miniature.world import COLORS, PLACES, make_scene

SCENES = [make_scene(f"test-{k}") for k in range(200)]
WRITERS = {"short": short_caption, "long": long_caption}


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return build_tokenizer()


def test_a_name_gives_the_same_scene_and_captions_in_another_process() -> None:
    program = (
        "from finelip_sdxl.miniature.world import make_scene\n"
        "from finelip_sdxl.miniature.captions import long_caption\n"
        "scene = make_scene('test-0'); print(scene); print(long_caption(scene, 'test-0').text)"
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert printed.splitlines() == [str(SCENES[0]), long_caption(SCENES[0], "test-0").text]


def test_a_scene_fills_every_place_and_repeats_no_shape() -> None:
    for scene in SCENES:
        assert tuple(thing.place for thing in scene.objects) == PLACES
        assert len({thing.shape for thing in scene.objects}) == len(PLACES)


@pytest.mark.parametrize("kind", WRITERS)
def test_mentions_say_what_is_true(kind) -> None:
    for k, scene in enumerate(SCENES):
        caption = WRITERS[kind](scene, f"test-{k}")
        for mention in caption.mentions:
            thing = scene.objects[mention.index]
            words = caption.text[mention.start : mention.end]
            assert thing.shape in words
            if mention.kind == "reference":
                continue
            assert words.endswith(".")
            assert (thing.size in words) == mention.size_named
            if mention.kind == "plain":
                assert thing.color in words
            else:  # its color is only in the sentence about the object that it names, earlier in the caption
                assert not any(color in count_words(words) for color in COLORS)
                reference = caption.mentions[caption.mentions.index(mention) - 1]
                assert scene.objects[reference.index].color == thing.color
                named = [m for m in caption.mentions if m.index == reference.index and m.kind == "plain"]
                assert named
                assert named[0].end <= mention.start


@pytest.mark.parametrize(("kind", "fewest", "most"), [("short", 2, 77), ("long", 202, 248)])
def test_captions_have_the_promised_length_in_tokens(tokenizer, kind, fewest, most) -> None:
    lengths = [len(tokenizer(WRITERS[kind](scene, f"test-{k}").text).input_ids) for k, scene in enumerate(SCENES)]
    assert min(lengths) >= fewest
    assert max(lengths) <= most


def test_long_captions_describe_eight_or_nine_objects_and_link_about_a_third() -> None:
    captions = [long_caption(scene, f"test-{k}") for k, scene in enumerate(SCENES)]
    counts = [len(caption.described) for caption in captions]
    assert set(counts) == {8, 9}
    linked = sum(mention.kind == "linked" for caption in captions for mention in caption.described)
    assert 0.28 < linked / sum(counts) < 0.40


def test_siblings_share_what_their_captions_say_within_77_tokens(tokenizer) -> None:
    scenes = MiniatureScenes("siblings", size=100)
    told_apart_late = 0
    for family in range(20):
        indices = range(5 * family, 5 * family + 5)
        things = [scenes.scene(index).objects for index in indices]
        shared = {place for place, alike in enumerate(zip(*things, strict=True)) if len(set(alike)) == 1}
        assert len(shared) >= 4
        assert len({scenes.scene(index) for index in indices}) == 5
        for index in indices:
            caption = scenes.caption(index)
            assert {mention.index for mention in caption.described[:4]} <= shared
            first_other = next(mention for mention in caption.mentions if mention.index not in shared)
            token = tokenizer(caption.text).char_to_token(first_other.end - 1)
            told_apart_late += token >= 76
    assert told_apart_late >= 95


def test_regions_are_the_cells_of_the_objects_that_phrases_name() -> None:
    scenes = MiniatureScenes("regions", size=10)
    for index in range(10):
        caption, objects = scenes.captions(index)[0], scenes.scene(index).objects
        for region in scenes.regions(index):
            left, top, right, bottom = region.box
            thing = objects[round(3 * top) * 3 + round(3 * left)]
            assert (right - left, bottom - top) == pytest.approx((1 / 3, 1 / 3))
            assert thing.shape in caption[region.start : region.end]
            assert region.label == f"{thing.place} {thing.shape} {thing.color}"


def test_tokenizer_has_clips_rules(tokenizer) -> None:
    assert tokenizer("!").input_ids == [
        tokenizer.bos_token_id,
        tokenizer.convert_tokens_to_ids("!</w>"),
        len(tokenizer) - 1,
    ]
    assert tokenizer.convert_tokens_to_ids("!") == 0
    assert tokenizer.eos_token_id == len(tokenizer) - 1 == tokenizer.pad_token_id
    assert build_tokenizer(pad_token="!").pad_token_id == 0
    assert tokenizer("A  RED star").input_ids == tokenizer("a red star").input_ids


@pytest.mark.parametrize("text", ["xylophones, 3.5 of them", "猫は赤い", "😀", "Zürich", "\x00\x07"])
def test_tokenizer_encodes_what_it_never_saw(tokenizer, text) -> None:
    ids = tokenizer(text).input_ids
    assert len(ids) > 2
    assert tokenizer.unk_token_id not in ids[1:-1]


def test_scorer_reads_clean_renderings() -> None:
    right = [
        thing == seen for scene in SCENES for thing, seen in zip(scene.objects, _read(draw_scene(scene)), strict=True)
    ]
    assert np.mean(right) >= 0.995
    assert all(read_picture(draw_scene(scene)).background == scene.background for scene in SCENES)


def test_scorer_reads_blurred_and_noisy_renderings() -> None:
    random = np.random.default_rng(0)
    for scene in SCENES[:20]:
        blurred = np.asarray(draw_scene(scene).filter(ImageFilter.GaussianBlur(0.8)), dtype=float)
        noisy = Image.fromarray((blurred + random.normal(0, 12, blurred.shape)).clip(0, 255).astype(np.uint8))
        assert all(score.right for score in score_picture(noisy, scene))


def test_scorer_sees_what_is_wrong_and_where() -> None:
    scene = SCENES[0]
    picture = draw_scene(scene)
    swapped = picture.copy()
    swapped.paste(picture.crop(_box(8)), _box(0))
    swapped.paste(picture.crop(_box(0)), _box(8))
    scores = score_picture(swapped, scene)
    assert [score.right for score in scores] == [False, *[True] * 7, False]
    assert not scores[0].place
    assert not scores[8].place


def test_a_twin_elsewhere_does_not_count_against_an_object_in_its_place() -> None:
    scene = SCENES[2]
    picture = draw_scene(scene)
    picture.paste(picture.crop(_box(0)), _box(8))
    blurred = picture.crop(_box(0)).filter(ImageFilter.GaussianBlur(0.8))
    picture.paste(blurred, _box(0))  # so that the twin looks more like it
    scores = score_picture(picture, scene)
    assert scores[0].right
    assert not scores[8].right


def test_scorer_sees_an_empty_cell() -> None:
    scene = SCENES[1]
    picture = draw_scene(scene)
    picture.paste(picture.getpixel((0, 0)), _box(4))
    assert read_picture(picture).objects[4] is None
    assert not score_picture(picture, scene)[4].right


def test_a_drawn_object_is_clean_and_a_smeared_or_mixed_one_is_not() -> None:
    for scene, other in zip(SCENES[:20], SCENES[20:40], strict=True):
        picture = draw_scene(scene)
        assert all(score.clean for score in score_picture(picture, scene))
        smeared = picture.filter(ImageFilter.GaussianBlur(4))
        assert not any(score.clean for score in score_picture(smeared, scene))
        mixture = Image.blend(picture, draw_scene(replace(other, background=scene.background)), 0.5)
        clean = [
            score.clean
            for score, one, two in zip(score_picture(mixture, scene), scene.objects, other.objects, strict=True)
            if one.shape != two.shape and one.color != two.color
        ]
        assert sum(clean) <= 1  # of pale objects a half is little


def test_a_blur_is_the_same_error_whatever_is_drawn() -> None:
    found = [drawing_errors(draw_scene(scene).filter(ImageFilter.GaussianBlur(2))) for scene in SCENES[:20]]
    assert np.percentile(found, 95) < 1.3 * np.percentile(found, 5)


def test_nothing_is_no_clean_object() -> None:
    picture = draw_scene(SCENES[1])
    picture.paste(picture.getpixel((0, 0)), _box(4))
    assert np.isinf(drawing_errors(picture)).nonzero()[0].tolist() == [4]
    assert [score.clean for score in score_picture(picture, SCENES[1])] == [True] * 4 + [False] + [True] * 4


def test_objects_are_scored_one_by_one_as_with_their_scene() -> None:
    random = np.random.default_rng(0)
    for scene, other in zip(SCENES[:20], SCENES[20:40], strict=True):
        half = np.asarray(Image.blend(draw_scene(scene), draw_scene(other), random.uniform(0.3, 0.7)))
        picture = Image.fromarray(half)
        one_by_one = [score_objects(picture, [thing])[0] for thing in reversed(scene.objects)]
        assert one_by_one[::-1] == list(score_picture(picture, scene))


def test_an_object_of_unknown_size_is_right_in_either_and_has_no_score_for_it() -> None:
    for scene in SCENES[:20]:
        things = [SimpleNamespace(place=o.place, shape=o.shape, color=o.color, size=None) for o in scene.objects]
        scores = score_objects(draw_scene(scene), things)
        assert all(score.right and score.size is None for score in scores)


def test_of_two_objects_in_one_place_the_one_that_is_there_is_right() -> None:
    thing = SCENES[0].objects[4]
    other = replace(thing, color=next(color for color in COLORS if color != thing.color))
    assert [score.right for score in score_objects(draw_scene(SCENES[0]), [other, thing])] == [False, True]


def _read(picture: Image.Image) -> tuple:
    return read_picture(picture).objects


def _box(place: int) -> tuple[int, int, int, int]:
    """The pixels of a place: left, top, right, bottom."""
    row, column = divmod(place, 3)
    return column * CELL_SIZE, row * CELL_SIZE, (column + 1) * CELL_SIZE, (row + 1) * CELL_SIZE
