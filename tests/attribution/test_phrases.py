"""The division of a text into phrases, and the positions of their tokens."""

import pytest

from finelip_sdxl.attribution.phrases import TokenPlaces, split_phrases
from finelip_sdxl.prompts.plan import EncoderSpec, plan_prompts
from finelip_sdxl.prompts.vocabulary import clip_tokenizer


def parts(text: str, unit=None) -> list[str]:
    return [text[start:end] for start, end in split_phrases(text, unit)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (" \n ", []),
        ("a fox", ["a fox"]),
        ("  a fox.  ", ["a fox."]),
        ("A fox. A hare! Is it? Yes… no", ["A fox.", "A hare!", "Is it?", "Yes…", "no"]),
        ("It is 3.5 feet tall. An e.g.-mark stays", ["It is 3.5 feet tall.", "An e.g.-mark stays"]),
        ('He says "no." She laughs.', ['He says "no."', "She laughs."]),
        ("a line\nanother line\n\n- ! -\nthe last", ["a line", "another line", "the last"]),
        ("狐がいる。兎もいる！", ["狐がいる。", "兎もいる！"]),
        ("masterpiece, best quality, a fox", ["masterpiece,", "best quality,", "a fox"]),
        ("A fox, 1,000 hares: many; all", ["A fox,", "1,000 hares:", "many;", "all"]),
        ("A fox, red. A hare, gray.", ["A fox, red.", "A hare, gray."]),
    ],
)
def test_phrases(text, expected) -> None:
    assert parts(text) == expected


def test_units() -> None:
    text = "A fox, red. A hare, gray."
    assert parts(text, "clause") == ["A fox,", "red.", "A hare,", "gray."]
    assert parts("a fox, red", "sentence") == ["a fox, red"]


def places(text: str, positions: int, **options) -> TokenPlaces:
    spec = EncoderSpec("text_encoder", clip_tokenizer(), positions)
    plan = plan_prompts([spec], [[text]], length_buckets=(), **options)
    return TokenPlaces.of(plan.plans[0], spec.tokenizer)


def test_positions_skip_the_start_and_end_tokens_of_windows() -> None:
    found = places("a fox. a hare. a bee.", positions=5)
    assert found.positions == [1, 2, 3, 6, 7, 8, 11, 12, 13]
    assert [found.text[first:last] for first, last in found.offsets[3:5]] == ["a", "hare"]
    assert found.last_position(7, 13) == found.last_position(7, 14) == 8


def test_the_part_that_is_cut_has_no_positions() -> None:
    found = places("a fox. a hare. a bee.", positions=7, overflow="truncate")
    assert found.text == "a fox. a hare. a bee."
    assert found.last_position(7, 14) == 5  # up to "hare"; the period is cut
    assert found.last_position(15, 21) is None


def test_a_mark_behind_a_phrase_is_its_end() -> None:
    found = places("a red fox, a hare", positions=77)
    assert found.last_position(2, 9) == 4
    assert found.last_position(2, 5) == 2
