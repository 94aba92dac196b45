"""How texts are split, padded and reported, without any model."""

import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from finelip_sdxl.options import MAX_CHARACTERS, MAX_POSITIONS, check_choice, check_length_buckets, check_texts
from finelip_sdxl.prompts.plan import EncoderSpec, padded_token_ids, plan_prompts, tokenize
from finelip_sdxl.prompts.windows import split_windows
from tests.helpers.tiny_sdxl import make_tokenizer

TOKENIZER = make_tokenizer(248)


def windows(text: str, size: int) -> list[str]:
    """The texts of the windows that hold `size` tokens without start and end token."""
    spec = EncoderSpec("text_encoder", TOKENIZER, positions=size + 2)
    report = plan_prompts([spec], [[text]], length_buckets=())
    return [window.text for window in report.plans[0].windows]


def spec(positions: int = 248, has_stock: bool = False, encoder: str = "text_encoder") -> EncoderSpec:
    return EncoderSpec(encoder, TOKENIZER, positions, has_stock)


@pytest.mark.parametrize(
    ("text", "size", "expected"),
    [
        # sentence ends before commas before words; the last one that fits
        ("a fox. a hare, a fox of the", 8, ["a fox. a hare, ", "a fox of the"]),
        ("a fox a hare. the fox, a hare", 8, ["a fox a hare. ", "the fox, a hare"]),
        ("a fox a hare! a fox. the hare a fox", 8, ["a fox a hare! a fox. ", "the hare a fox"]),
        ("a fox, a hare, the fox of a hare", 8, ["a fox, a hare, ", "the fox of a hare"]),
        ("a fox a hare a fox a hare a fox", 8, ["a fox a hare a fox a hare ", "a fox"]),
        # marks inside words and numbers are no boundaries
        ("a fox a 3.5 a hare a fox", 6, ["a fox a 3.5 ", "a hare a fox"]),
        # closing quotes and brackets belong to their sentence, a line break ends one
        ('a fox "a hare." the fox of a', 7, ['a fox "a hare." ', "the fox of a"]),
        ("a fox a hare\na fox of the hare", 6, ["a fox a hare\n", "a fox of the hare"]),
        # a boundary in the first half would make windows degenerate
        ("a. fox hare fox hare fox hare fox hare fox", 8, ["a. fox hare fox hare fox hare ", "fox hare fox"]),
    ],
)
def test_windows_end_where_the_text_does(text, size, expected) -> None:
    assert windows(text, size) == expected


def test_scripts_without_spaces_are_cut_at_their_own_marks() -> None:
    text = "赤い狐。青い鳥。" * 3  # three tokens a character in this vocabulary
    assert windows(text, 40) == ["赤い狐。青い鳥。赤い狐。", "青い鳥。赤い狐。青い鳥。"]
    assert windows("赤い狐、青い鳥、赤い狐と", 30) == ["赤い狐、青い鳥、", "赤い狐と"]


def test_characters_are_not_torn() -> None:
    text = "🦊" * 30  # four tokens each, and no boundary at all
    parts = windows(text, 10)
    assert "".join(parts) == text
    assert all(len(part) in (1, 2) for part in parts)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50, 246])
@pytest.mark.parametrize(
    "text",
    ["", " ", "fox", "a fox. " * 40, "fox" * 200, "  a\n\n fox\t, " * 30, "a\x00🦊 ﬁ狐。İ " * 20, "!!!???,,," * 30],
)
def test_windows_hold_every_token_once_and_every_character_in_order(text, size) -> None:
    report = plan_prompts([spec(size + 2)], [[text]], length_buckets=())
    (plan,) = report.plans
    expected = TOKENIZER(text, add_special_tokens=False, verbose=False).input_ids
    assert [token for window in plan.windows for token in window.token_ids] == expected
    assert "".join(window.text for window in plan.windows) == text
    assert all(window.tokens <= size + 2 for window in plan.windows)
    assert all(2 * len(window.token_ids) >= size for window in plan.windows[:-1]), "no window is less than half full"
    assert not plan.cut_tokens


def test_windows_need_room() -> None:
    assert split_windows("", [], 1) == [(0, 0)]
    with pytest.raises(ValueError, match="at least 1 token"):
        split_windows("a", [(0, 1)], 0)


def test_truncation_keeps_the_first_tokens_and_reports_the_rest() -> None:
    text = "a red fox and the hare. " * 20
    report = plan_prompts([spec(77)], [[text]], overflow="truncate")
    (plan,) = report.cut
    assert plan.tokens == report.positions == 77
    assert plan.cut_tokens == 7 * 20 - 75
    assert plan.windows[0].text + plan.cut_text == text
    assert f"{plan.cut_tokens} tokens are CUT" in str(report)


@pytest.mark.parametrize(
    ("tokens", "buckets", "short_prompt_encoder", "has_stock", "positions"),
    [
        (10, (77, 154), "long", False, 77),
        (77, (77, 154), "long", False, 77),
        (78, (77, 154), "long", False, 154),
        (200, (77, 154), "long", False, 248),
        (10, (), "long", False, 248),
        (10, (20, 300), "long", False, 20),
        (30, (20, 300), "long", False, 248),
        (10, (20,), "original", True, 77),
        (77, (), "original", True, 77),
        (78, (), "original", True, 248),
        (10, (20,), "original", False, 20),
    ],
)
def test_padded_length(tokens, buckets, short_prompt_encoder, has_stock, positions) -> None:
    text = " ".join(["fox"] * (tokens - 2))
    report = plan_prompts(
        [spec(has_stock=has_stock)], [[text]], length_buckets=buckets, short_prompt_encoder=short_prompt_encoder
    )
    assert (report.positions, report.windows) == (positions, 1)
    assert report.plans[0].as_stock == (short_prompt_encoder == "original" and has_stock and positions == 77)


def test_two_encoders_share_the_length_of_the_smaller() -> None:
    specs = [spec(248), spec(100, encoder="text_encoder_2")]
    text = " ".join(["fox"] * 150)
    report = plan_prompts(specs, [["fox"], [text]])
    assert (report.positions, report.windows) == (100, 2)


def test_rows_are_what_the_tokenizer_itself_makes() -> None:
    for tokenizer in (TOKENIZER, make_tokenizer(248, pad_token="!")):
        report = plan_prompts([EncoderSpec("text_encoder", tokenizer, 248)], [["a red fox", "a"]])
        (first,), (second,) = padded_token_ids(report.plans, tokenizer, windows=1)
        expected = tokenizer(["a red fox", "a"], padding="max_length", max_length=77).input_ids
        assert [first, second] == expected
        rows = padded_token_ids(report.plans, tokenizer, windows=3)
        empty = tokenizer("", padding="max_length", max_length=77).input_ids
        assert rows == [[first, empty, empty], [second, empty, empty]]


def test_report_reads_well() -> None:
    specs = [spec(has_stock=True), spec(has_stock=True, encoder="text_encoder_2")]
    report = plan_prompts(specs, [["a fox", "the hare"], ["a fox", "a hare"]], [["red", "red"], ["red", "red"]])
    assert str(report) == (
        "text_encoder and text_encoder_2 encode prompt 1:"
        " 4 tokens in 1 window of 77 positions, as stock SDXL encodes it; nothing is cut\n"
        '  window 1, 4 tokens: "a fox"\n'
        "text_encoder encodes prompt 2:"
        " 4 tokens in 1 window of 77 positions, as stock SDXL encodes it; nothing is cut\n"
        '  window 1, 4 tokens: "the hare"\n'
        "text_encoder_2 encodes prompt 2:"
        " 4 tokens in 1 window of 77 positions, as stock SDXL encodes it; nothing is cut\n"
        '  window 1, 4 tokens: "a hare"\n'
        "text_encoder and text_encoder_2 encode negative prompt 1:"
        " 3 tokens in 1 window of 77 positions, as stock SDXL encodes it; nothing is cut\n"
        '  window 1, 3 tokens: "red"\n'
        "text_encoder and text_encoder_2 encode negative prompt 2:"
        " 3 tokens in 1 window of 77 positions, as stock SDXL encodes it; nothing is cut\n"
        '  window 1, 3 tokens: "red"\n'
        "Counted in this model's own tokens."
    )
    single = str(report.plans[0])
    assert single.startswith("text_encoder encodes prompt: 4 tokens")


def test_texts_of_every_kind_are_checked() -> None:
    assert check_texts("prompt", "a" * MAX_CHARACTERS) == ["a" * MAX_CHARACTERS]
    assert check_texts("prompt", ("a", "")) == ["a", ""]
    for value in (b"fox", {"a": 1}, 1.5, ["a", None]):
        with pytest.raises(TypeError, match="must be a string"):
            check_texts("prompt", value)


def test_length_buckets_are_sorted_and_unique() -> None:
    assert check_length_buckets([154, 77, 77]) == (77, 154)
    assert check_length_buckets(None) == check_length_buckets([]) == ()


@pytest.mark.parametrize(
    "value", [5, None, ["original"], {"original"}, np.array(["original", "long"]), "s" * 10_000, True]
)
def test_what_is_no_choice_is_named_in_short(value) -> None:
    with pytest.raises(ValueError, match="`short_prompt_encoder` must be one of 'original', 'long', but is ") as raised:
        check_choice("short_prompt_encoder", value, ("original", "long"))
    assert len(str(raised.value)) < 150


@pytest.mark.parametrize("value", [[10**9] * 5000 + ["a"], "77", 77, {77}, [77.0], [True], [float("nan")], [[77]]])
def test_what_are_no_buckets_is_named_in_short(value) -> None:
    with pytest.raises(ValueError, match="`length_buckets` must be a list of lengths") as raised:
        check_length_buckets(value)
    assert len(str(raised.value)) < 250


# How many windows there may be


def test_windows_are_bounded() -> None:
    most = MAX_POSITIONS // 248
    fits = "fox " * (246 * most)
    (read,) = plan_prompts([spec()], [[fits[:MAX_CHARACTERS]]]).plans
    assert len(read.windows) == -(-MAX_CHARACTERS // 4 // 246)
    for prompts, negatives, role in (
        (["a", "狐" * MAX_CHARACTERS], None, "prompt"),
        (["a"], ["狐" * MAX_CHARACTERS], "negative prompt"),
    ):
        with pytest.raises(
            ValueError, match=rf"The {role} needs 244 windows of 248 positions.*expected at most {most}"
        ):
            plan_prompts([spec()], [prompts], None if negatives is None else [negatives])
    (read,) = plan_prompts([spec()], [["狐" * MAX_CHARACTERS]], overflow="truncate").plans
    assert read.cut_tokens == 3 * MAX_CHARACTERS - 246


def test_breaks_are_bounded_as_windows_are() -> None:
    most = MAX_POSITIONS // 248
    assert plan_prompts([spec()], [["a BREAK " * most]], weighting="a1111").windows == most
    with pytest.raises(ValueError, match=rf"needs 2,500 windows.*at most {most}, .*: shorten it, take BREAKs out"):
        plan_prompts([spec()], [["a BREAK " * 2500]], weighting="a1111")


# A tokenizer that others use as well


def test_tokens_are_read_whole_however_the_tokenizer_was_left() -> None:
    tokenizer = make_tokenizer()
    text = "a red fox, 狐 🦊, and the hare. " * 20
    expected = tokenize(tokenizer, text)
    called = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    assert expected == (called.input_ids, called.offset_mapping)
    for side in ("right", "left"):
        for padding_side in ("right", "left"):
            for length in (77, 10, 500):
                tokenizer.truncation_side, tokenizer.padding_side = side, padding_side
                tokenizer(text, truncation=True, padding="max_length", max_length=length)
                assert tokenize(tokenizer, text) == expected
                assert tokenize(tokenizer, "") == ([], [])


def test_reading_leaves_the_tokenizer_as_it_is() -> None:
    tokenizer = make_tokenizer()
    tokenizer("a fox", truncation=True, padding="max_length", max_length=77)
    before = tokenizer.backend_tokenizer.truncation, tokenizer.backend_tokenizer.padding
    plan_prompts([EncoderSpec("text_encoder", tokenizer, 248)], [["a red fox " * 100]])
    assert (tokenizer.backend_tokenizer.truncation, tokenizer.backend_tokenizer.padding) == before


def test_a_prompt_may_be_read_while_another_thread_encodes_with_the_same_tokenizer() -> None:
    tokenizer = make_tokenizer()
    text = "a red fox, 狐 🦊, and the hare. " * 20
    expected = tokenize(tokenizer, text)

    def encode() -> bool:
        return len(tokenizer(text, truncation=True, padding="max_length", max_length=77).input_ids) == 77

    def read() -> bool:
        return tokenize(tokenizer, text) == expected

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            done = [threads.submit(call) for call in [encode, read] * 400]
            wrong = sum(not call.result() for call in done)
    finally:
        sys.setswitchinterval(before)
    assert wrong == 0
