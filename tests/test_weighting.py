"""Weights in the prompt: two syntaxes, and what they do to states."""

import pytest
import torch
from compel import CompelForSDXL
from diffusers import StableDiffusionXLPipeline

from finelip_sdxl import ConditioningAdapter, FineLIPSDXLPipeline
from finelip_sdxl.weighting import MAX_DEPTH, parse_weights

SHORT = "a red fox above the blue square"
LONG = " ".join([SHORT] * 20)  # 142 tokens
ENDLESS = " ".join([SHORT] * 60)  # 422


@pytest.fixture
def pipe(components) -> FineLIPSDXLPipeline:
    pipe = FineLIPSDXLPipeline(**components)
    pipe.swap_text_encoders()
    return pipe


def embeddings(pipe, prompt: str) -> torch.Tensor:
    with torch.no_grad():
        return pipe.encode_prompt(prompt, device="cpu")[0]


@pytest.mark.parametrize(
    ("syntax", "text", "plain", "weights"),
    [
        ("a1111", "a (red:1.3) fox", "a red fox", [1.3]),
        ("a1111", "((red)) [fox]", "red fox", [1.21, 1 / 1.1]),
        ("a1111", r"\\(red\\) fox", "(red) fox", []),
        ("a1111", "a) red] fox:1.3)", "a) red] fox:1.3)", []),
        ("compel", "a (red)1.3 fox++", "a red fox", [1.3, 1.21]),
        ("compel", "a  red\n fox", "a  red\n fox", []),
        (None, "a (red:1.3) fox++", "a (red:1.3) fox++", []),
    ],
)
def test_syntax_is_taken_out(syntax, text, plain, weights) -> None:
    found = parse_weights(text.replace("\\\\", "\\"), syntax)
    assert found.text == plain
    assert [weight for _, _, weight in found.spans] == pytest.approx(weights)


@pytest.mark.parametrize(
    ("syntax", "text", "message"),
    [
        ("a1111", "(red:11)", "'red' has weight 11; expected one from 0 to 10"),
        ("a1111", "(red:-1)", "'red' has weight -1"),
        ("a1111", "(" * 2000, f"more than {MAX_DEPTH} brackets within one another"),
        ("compel", "(" * 2000, "compel cannot read this prompt"),
        ("compel", "a fox " * 1000, "at most 4,000 are read"),
        ("compel", '("a fox", "a hare").blend(0.5, 0.5)', "more than weights"),
    ],
)
def test_what_cannot_be_read_is_explained(syntax, text, message) -> None:
    with pytest.raises(ValueError, match=message):
        parse_weights(text, syntax)


@pytest.mark.parametrize("syntax", ["compel", "a1111"])
@pytest.mark.parametrize("prompt", [SHORT, LONG, ENDLESS], ids=["77", "248", "past-248"])
def test_weights_of_one_change_no_bit(pipe, prompt, syntax) -> None:
    expected = embeddings(pipe, prompt)
    pipe.weighting = syntax
    assert torch.equal(embeddings(pipe, prompt), expected)


@pytest.mark.parametrize("prompt", [SHORT, LONG, ENDLESS], ids=["77", "248", "past-248"])
def test_a_weight_changes_its_token_alone(pipe, prompt) -> None:
    expected = embeddings(pipe, f"{prompt} fox")
    pipe.weighting = "a1111"
    found = embeddings(pipe, f"{prompt} (fox:1.5)")
    changed = (found != expected).any(dim=-1)
    assert changed.sum() == 1
    assert pipe.describe_prompt(f"{prompt} (fox:1.5)").readings[0].windows[-1].weights[-1] == 1.5


def test_a_weight_above_one_is_compel_s(components) -> None:
    stock = StableDiffusionXLPipeline(**components)
    expected = CompelForSDXL(stock)("a (red)1.3 fox above the square").embeds
    pipe = FineLIPSDXLPipeline(**components, weighting="compel")
    pipe.swap_text_encoders()
    torch.testing.assert_close(embeddings(pipe, "a (red)1.3 fox above the square"), expected, atol=1e-2, rtol=1e-4)


def test_a_break_begins_a_window(pipe) -> None:
    pipe.weighting = "a1111"
    windows = pipe.describe_prompt("a fox BREAK a hare").readings[0].windows
    assert [window.text for window in windows] == ["a fox ", "a hare"]
    assert embeddings(pipe, "a fox BREAK a hare").shape[1] == 2 * 248


def test_the_conditioning_adapter_sees_states_without_weights(pipe) -> None:
    pipe.weighting = "a1111"
    plain = embeddings(pipe, f"{LONG} (fox:1.5)")
    pipe.register_modules(conditioning_adapter=ConditioningAdapter([32, 48], 24, 8))  # changes nothing when new
    torch.testing.assert_close(embeddings(pipe, f"{LONG} (fox:1.5)"), plain)


def test_only_the_encoder_whose_prompt_has_weights_gets_them(pipe) -> None:
    pipe.weighting = "a1111"
    with torch.no_grad():
        weighted = pipe.encode_prompt("a (red:1.5) fox", prompt_2="a red fox", device="cpu")[0]
    plain = embeddings(pipe, "a red fox")
    assert torch.equal(weighted[..., 32:], plain[..., 32:])
    assert not torch.equal(weighted[..., :32], plain[..., :32])


def test_encoders_of_77_positions_are_refused(components) -> None:
    pipe = FineLIPSDXLPipeline(**components, weighting="a1111")
    with pytest.raises(ValueError, match=r"needs text encoders of 248 positions: call swap_text_encoders\(\)"):
        pipe.encode_prompt(SHORT, device="cpu")


def test_it_is_saved_with_the_pipeline(pipe, tmp_path) -> None:
    pipe.weighting = "a1111"
    pipe.save_pretrained(tmp_path)
    assert FineLIPSDXLPipeline.from_pretrained(tmp_path).weighting == "a1111"
