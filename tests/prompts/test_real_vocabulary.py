"""CLIP's vocabulary of 49,408 tokens; and counts, windows and reports of real prompts in it.

The other tests have a vocabulary of 14 words.
"""

from pathlib import Path

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTokenizer

from finelip_sdxl import FineLIPSDXLPipeline
from finelip_sdxl.comparison.comparison import Comparison
from finelip_sdxl.miniature.tokenizer import build_tokenizer
from finelip_sdxl.prompts.plan import EncoderSpec, plan_prompts, tokenize
from finelip_sdxl.prompts.vocabulary import MINIATURE, OTHER, SDXL, clip_tokenizer, name_tokens
from tests.helpers.tiny_sdxl import make_tokenizer

EXAMPLES = Path(__file__).parents[2] / "demo" / "examples" / "sdxl"
TOKENS = {
    "breakfast-above-the-clouds": 176,
    "canyon-of-bridges": 216,
    "harbor-at-dawn": 184,
    "the-clockmaker": 182,
    "the-fox-bookshop": 175,
    "train-across-the-sea": 183,
}
TRICKY = [
    "🦊🦊 a fox 👩‍👩‍👧 and 🇯🇵 flags",
    "赤い狐と青い鳥。狐狸在森林里，月光下。",
    "wait… no... a fox…yes",
    "  double  spaces   and\ttabs ",
    "first line\nsecond line\r\n\nthird",
    "“curly quotes,” she said, ‘the fox’s den’",
    "the fox's den isn't the hares' den; they'll've known",
    "naïve café, e\u0301tude, İstanbul, ﬁgure, Straße",
    "f/1.8, 85mm, 4k, ISO-100, #1, 50% & $3.50",
    "<|endoftext|> a fox <|startoftext|>",
    "supercalifragilisticexpialidocious" * 3,
]


def example(name: str) -> str:
    return (EXAMPLES / f"{name}.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return clip_tokenizer(max_length=248)


@pytest.fixture
def pipe(session_components) -> FineLIPSDXLPipeline:
    return make_pipe(session_components)


@pytest.fixture(scope="module")
def comparison(session_components) -> Comparison:
    return Comparison(make_pipe(session_components))


def make_pipe(session_components: dict) -> FineLIPSDXLPipeline:
    """The tiny SDXL with encoders that know all of CLIP's words."""
    components = dict(session_components)
    for number, name in enumerate(("text_encoder", "text_encoder_2")):
        config = components[name].config.to_dict()
        config |= {"vocab_size": 49_408, "bos_token_id": 49_406, "eos_token_id": 49_407}
        torch.manual_seed(number)
        components[name] = type(components[name])(CLIPTextConfig(**config)).eval()
    components["tokenizer"] = clip_tokenizer()
    components["tokenizer_2"] = clip_tokenizer(pad_token="!")
    pipe = FineLIPSDXLPipeline(**components)
    pipe.swap_text_encoders()
    return pipe


def windows_of(text: str, tokenizer: CLIPTokenizer, positions: int = 248) -> tuple:
    return plan_prompts([EncoderSpec("text_encoder", tokenizer, positions)], [[text]]).plans[0].windows


def ids_of(windows: tuple) -> list[int]:
    return [token for window in windows for token in window.token_ids]


def test_it_is_clip_s_vocabulary(tokenizer) -> None:
    assert len(tokenizer) == 49_408
    # As in the model cards of OpenAI's CLIP.
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer.tokenize("A quiet clockmaker's café") == [
        "a</w>",
        "quiet</w>",
        "clock",
        "maker</w>",
        "'s</w>",
        "cafÃ©</w>",
    ]
    assert clip_tokenizer(pad_token="!").pad_token_id == 0


# The ids of OpenAI's own code, `SimpleTokenizer().encode(text)` of clip-anytorch 2.6.0.
@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello, world!", [3306, 267, 1002, 256]),
        (
            "An astronaut's café, 85mm, f/1.8 🦊",
            [550, 18376, 568, 15304, 267, 279, 276, 2848, 267, 325, 270, 272, 269, 279, 6040, 488],
        ),
        (
            "A quiet clockmaker's bench; it isn't 1,024 gears.",
            [320, 7557, 19878, 4836, 568, 8771, 282, 585, 2923, 713, 272, 267, 271, 273, 275, 21147, 269],
        ),
    ],
)
def test_its_ids_are_openai_s(tokenizer, text, ids) -> None:
    assert tokenize(tokenizer, text)[0] == ids


def test_tokens_have_the_name_of_their_model() -> None:
    assert name_tokens(clip_tokenizer(pad_token="!")) == SDXL
    assert name_tokens(build_tokenizer()) == MINIATURE
    assert name_tokens(make_tokenizer()) == OTHER
    inverted = clip_tokenizer()
    inverted.add_tokens(["<my-cat>", "<my-dog>"])
    assert name_tokens(inverted) == SDXL


@pytest.mark.parametrize("name", sorted(TOKENS))
def test_the_demo_s_examples_are_long_and_fit_one_window(tokenizer, name) -> None:
    (window,) = windows_of(example(name), tokenizer)
    assert window.tokens == TOKENS[name] == len(tokenizer(example(name)).input_ids)
    assert 150 <= window.tokens <= 240
    assert {path.stem for path in EXAMPLES.glob("*.txt")} == set(TOKENS)


def test_a_prompt_of_600_tokens_is_cut_at_sentence_ends(tokenizer) -> None:
    text = " ".join(map(example, ["the-clockmaker", "harbor-at-dawn", "canyon-of-bridges"]))
    whole, _ = tokenize(tokenizer, text)
    assert 570 < len(whole) < 600
    windows = windows_of(text, tokenizer)
    assert len(windows) == 3
    assert "".join(window.text for window in windows) == text
    assert ids_of(windows) == whole
    for window in windows:
        assert window.tokens <= 248
        assert window.text.rstrip().endswith(".")
        assert tuple(tokenize(tokenizer, window.text)[0]) == window.token_ids  # nothing was torn


@pytest.mark.parametrize("text", TRICKY)
@pytest.mark.parametrize("positions", [6, 11, 248])
def test_windows_hold_all_tokens_of_a_tricky_text_in_order(tokenizer, text, positions) -> None:
    windows = windows_of(text, tokenizer, positions)
    assert ids_of(windows) == tokenizer(text, add_special_tokens=False).input_ids
    assert "".join(window.text for window in windows) == text
    assert all(window.tokens <= positions for window in windows)


# Where there are spaces, windows end at them. (Text without any is one word to CLIP, and torn where it must be.)
@pytest.mark.parametrize("text", [text for text in TRICKY if len(text.split()) > 2 and "🦊" not in text])
def test_a_window_s_text_alone_has_the_window_s_tokens(tokenizer, text) -> None:
    windows = windows_of(text, tokenizer, 16)
    for window in windows:
        assert tuple(tokenize(tokenizer, window.text)[0]) == window.token_ids, window


def test_a_report_counts_what_the_encoders_get(pipe) -> None:
    text = example("the-clockmaker")
    report = pipe.describe_prompt(text, negative_prompt="blurry, low-res… 🦊")
    assert (report.positions, report.windows, report.cut) == (248, 1, ())
    assert str(report).startswith(
        "text_encoder and text_encoder_2 encode prompt: 182 tokens in 1 window of 248 positions; nothing is cut\n"
    )
    negative = report.negative_prompts["text_encoder"][0]
    assert negative.tokens == len(pipe.tokenizer("blurry, low-res… 🦊").input_ids)
    assert pipe.encode_prompt(text)[0].shape == (1, 248, 80)


def test_short_and_very_long_prompts(pipe) -> None:
    short = "a portrait photograph of an old clockmaker at his bench, 85mm, f/1.8"
    report = pipe.describe_prompt(short)
    assert all(plan.as_stock and plan.tokens == len(pipe.tokenizer(short).input_ids) for plan in report.plans)
    assert pipe.encode_prompt(short)[0].shape == (1, 77, 80)

    long = "\n".join(map(example, sorted(TOKENS)))
    report = pipe.describe_prompt(long)
    plan = report.prompts["text_encoder"][0]
    assert ids_of(plan.windows) == tokenize(pipe.tokenizer, long)[0]
    assert report.windows == len(plan.windows) == 5
    assert pipe.encode_prompt(long)[0].shape == (1, 5 * 248, 80)
    pipe.overflow = "truncate"
    (cut, _) = pipe.describe_prompt(long).plans
    assert cut.tokens == 248
    assert cut.tokens - 2 + cut.cut_tokens == len(tokenize(pipe.tokenizer, long)[0])
    assert cut.windows[0].text + cut.cut_text == long


def test_stock_and_compel_beside_it(comparison, tokenizer) -> None:
    text = example("the-clockmaker").strip()
    plans = comparison.plan(text)
    whole, _ = tokenize(tokenizer, text)
    assert (plans["stock"].tokens, plans["stock"].cut_tokens) == (77, len(whole) - 75)
    assert plans["stock"].windows[0].text + plans["stock"].cut_text == text
    first, *others = plans["compel"].windows
    assert len(others) == 2
    assert all(window.tokens <= 77 for window in (first, *others))
    assert first.text.rstrip().endswith(".")
    assert ids_of(plans["compel"].windows) == whole == ids_of(plans["finelip"].windows)
    assert "".join(window.text for window in plans["compel"].windows) == text
    assert len(plans["finelip"].windows) == 1


@pytest.mark.parametrize("text", [text for text in TRICKY if "<|" not in text])  # compel stops at an end token
def test_compel_s_windows_of_a_tricky_text(comparison, tokenizer, text) -> None:
    text = (text + " and the ") * 20
    windows = comparison.plan(text, ["compel"])["compel"].windows
    read = text.replace(",”", ", ”")  # compel sets a space after a comma here
    assert ids_of(windows) == tokenize(tokenizer, read)[0]
    assert len(windows) > 1
    assert all(window.tokens <= 77 for window in windows)
