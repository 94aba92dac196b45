"""Schedules in prompts, as A1111's grammar reads them."""

import re

import pytest

from finelip_sdxl.prompts.composition import Share, compose
from finelip_sdxl.prompts.schedules import ScheduledText, describe_steps, is_scheduled, split_conjunction

# Prompts, and their texts in 10 steps, each with its last step: what A1111's own parser makes of them
# (`get_learned_conditioning_prompt_schedules` in `modules/prompt_parser.py`, run with lark 1.1.2).
TEN_STEPS: list[tuple[str, list[tuple[int, str]]]] = [
    ("test", [(10, "test")]),
    ("a [b:3]", [(3, "a "), (10, "a b")]),
    ("a [b: 3 ]", [(3, "a "), (10, "a b")]),
    ("a [[[b]]:2]", [(2, "a "), (10, "a [[b]]")]),
    ("[(a:2):3]", [(3, ""), (10, "(a:2)")]),
    ("a [b : c : 1] d", [(1, "a b  d"), (10, "a  c  d")]),
    ("a[b:[c:d:2]:1]e", [(1, "abe"), (2, "ace"), (10, "ade")]),
    ("a [unbalanced", [(10, "a [unbalanced")]),
    ("a [b:.5] c", [(5, "a  c"), (10, "a b c")]),
    ("a [b::0.5] c", [(5, "a b c"), (10, "a  c")]),
    ("a [::3] c", [(10, "a  c")]),
    ("a [b:c:1.0] d", [(10, "a b d")]),
    ("a [b:c:1.] d", [(10, "a b d")]),
    ("a [b:c:0] d", [(10, "a c d")]),
    ("a [b:c:-2] d", [(10, "a c d")]),
    ("a [b:c:0.05] d", [(10, "a c d")]),
    ("a [b:c:1e0] d", [(1, "a b d"), (10, "a c d")]),
    ("a [b:c:12] d", [(10, "a b d")]),
    ("a [b:c:+4] d", [(4, "a b d"), (10, "a c d")]),
    ("((a][:b:c [d:3]", [(3, "((a][:b:c "), (10, "((a][:b:c d")]),
    (
        "[a|(b:1.1)]",
        [
            (1, "a"),
            (2, "(b:1.1)"),
            (3, "a"),
            (4, "(b:1.1)"),
            (5, "a"),
            (6, "(b:1.1)"),
            (7, "a"),
            (8, "(b:1.1)"),
            (9, "a"),
            (10, "(b:1.1)"),
        ],
    ),
    (
        "[fe|]male",
        [
            (1, "female"),
            (2, "male"),
            (3, "female"),
            (4, "male"),
            (5, "female"),
            (6, "male"),
            (7, "female"),
            (8, "male"),
            (9, "female"),
            (10, "male"),
        ],
    ),
    ("[fe|||]male", [(1, "female"), (4, "male"), (5, "female"), (8, "male"), (9, "female"), (10, "male")]),
    (
        "[|a]b",
        [(1, "b"), (2, "ab"), (3, "b"), (4, "ab"), (5, "b"), (6, "ab"), (7, "b"), (8, "ab"), (9, "b"), (10, "ab")],
    ),
    (
        "a [b|c [d:e:4]|f] g",
        [
            (1, "a b g"),
            (2, "a c d g"),
            (3, "a f g"),
            (4, "a b g"),
            (5, "a c e g"),
            (6, "a f g"),
            (7, "a b g"),
            (8, "a c e g"),
            (9, "a f g"),
            (10, "a b g"),
        ],
    ),
    ("a [b|c:3] d", [(10, "a [b|c:3] d")]),
    ("a | b [c:3]", [(10, "a | b [c:3]")]),
    ("a (b|c) [d:3]", [(10, "a (b|c) [d:3]")]),
    ("a \\[b:c:3\\] d", [(10, "a \\[b:c:3\\] d")]),
    ("a [b\\:c:d:3] e", [(3, "a b\\:c e"), (10, "a d e")]),
    ("a [b\\", [(10, "a [b\\")]),
    ("a [b:c:3] d\\", [(10, "a [b:c:3] d\\")]),
    ("a [b (c:d:3] e", [(10, "a [b (c:d:3] e")]),
    ("a [(b:c):d:3] e", [(3, "a (b:c) e"), (10, "a d e")]),
    ("a [b:c] d", [(10, "a [b:c] d")]),
    ("a [b:c:d:3] e", [(10, "a [b:c:d:3] e")]),
    ("a [b:c:three] d", [(10, "a [b:c:three] d")]),
    ("a [b:c:3] : d", [(3, "a b : d"), (10, "a c : d")]),
    (
        "[a:b:3][c:d:5][e|f]",
        [
            (1, "ace"),
            (2, "acf"),
            (3, "ace"),
            (4, "bcf"),
            (5, "bce"),
            (6, "bdf"),
            (7, "bde"),
            (8, "bdf"),
            (9, "bde"),
            (10, "bdf"),
        ],
    ),
    ("a [b:c:3 4] d", [(10, "a [b:c:3 4] d")]),
    ("", [(10, "")]),
    ("[]", [(10, "[]")]),
    ("[:]", [(10, "[:]")]),
    ("[|]", [(10, "")]),
]


@pytest.mark.parametrize(("prompt", "expected"), TEN_STEPS)
def test_texts_are_a1111_s(prompt, expected) -> None:
    text = ScheduledText.parse(prompt)
    by_step = [next(text for last, text in expected if step <= last) for step in range(1, 11)]
    assert [text.at(step, steps=10) for step in range(1, 11)] == by_step
    assert is_scheduled(prompt) == (len(expected) > 1 or expected[0][1] != prompt)


def test_a_bracket_without_a_partner_is_text_and_a_schedule_beside_it_is_none() -> None:
    """Where A1111's grammar can be read in two ways, as before a lone bracket, lark's choice is by chance."""
    assert ScheduledText.parse("a [b:c:3]) d").at(1, steps=10) == "a b) d"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a cat", [("a cat", 1.0)]),
        ("a cat AND a dog", [("a cat", 1.0), ("a dog", 1.0)]),
        ("a cat :1.2 AND a dog :0.7", [("a cat", 1.2), ("a dog", 0.7)]),
        ("a cat:.5AND a dog: -1 ", [("a cat:.5AND a dog", -1.0)]),
        ("a cat:2. AND a (dog:1.2) AND BRAND", [("a cat", 2.0), ("a (dog:1.2)", 1.0), ("BRAND", 1.0)]),
        ("a cat: 1: 2 AND a dog:x", [("a cat: 1", 2.0), ("a dog:x", 1.0)]),
        ("a\ncat\n:3 AND\na dog", [("a\ncat", 3.0), ("a dog", 1.0)]),
        ("AND", [("", 1.0), ("", 1.0)]),
        ("a cat and a dog", [("a cat and a dog", 1.0)]),
    ],
)
def test_parts_are_a1111_s(prompt, expected) -> None:
    """As its `re_AND` and `re_weight` split them; only a prompt without `AND` keeps its last number as text."""
    found = [(part.strip(), weight) for part, weight in split_conjunction(prompt)]
    if len(expected) == 1:
        assert found == [(prompt.strip(), 1.0)]
    else:
        assert found == expected


def test_a_huge_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="weight that is no number of a usual size"):
        split_conjunction(f"a cat AND a dog :{'9' * 400}")


@pytest.mark.parametrize("bracket", ["[", "("])
def test_deep_nesting_is_refused_as_with_weights(bracket) -> None:
    with pytest.raises(ValueError, match="more than 50 nested brackets: take some out"):
        ScheduledText.parse(bracket * 10_000)
    ScheduledText.parse("[a:b:3] (c) " * 1_000 + bracket * 50)


def test_ranges_of_steps_are_short() -> None:
    assert describe_steps([(1, 2), (4, 4), (6, 7)]) == "steps 1–2, 4, 6–7"
    assert describe_steps([(step, step) for step in range(2, 51, 2)]) == "steps 2, 4, 6, … 50"


# Batches


def test_each_text_is_there_once() -> None:
    composition = compose([["a [b|c] d", "e"]], "a1111", steps=9)
    assert [text.texts for text in composition.texts] == [("a b d",), ("a c d",), ("e",)]
    assert composition.at(3) == ((Share(0),), (Share(2),))
    assert composition.at(4) == ((Share(1),), (Share(2),))


def test_the_encoders_change_at_their_own_steps() -> None:
    composition = compose([["[a:b:2]"], ["[c:d:4]"]], "a1111", steps=6)
    assert [(text.texts, text.label) for text in composition.texts] == [
        (("a", "c"), "steps 1–2"),
        (("b", "c"), "steps 3–4"),
        (("b", "d"), "steps 5–6"),
    ]


@pytest.mark.parametrize(("syntax", "steps"), [("a1111", None), ("compel", 4), (None, 4)])
def test_elsewhere_a_schedule_is_text(syntax, steps) -> None:
    composition = compose([["a [b:c:2] AND d"]], syntax, steps)
    assert composition.is_plain
    assert composition.texts[0].texts == ("a [b:c:2] AND d",)


def test_and_of_a_negative_prompt_is_text() -> None:
    assert len(compose([["a AND b"]], "a1111", 4).texts) == 2
    assert compose([["a AND b"]], "a1111", 4, conjoins=False).is_plain


def test_a_text_that_does_not_change_is_one_text() -> None:
    assert compose([["a [b:b:2]"]], "a1111", 4).is_plain
    with pytest.raises(ValueError, match=re.escape("more than 200 different texts in 1,000 steps")):
        compose([[f"[{'|'.join(f'a{number}' for number in range(201))}]"]], "a1111", 1000)
