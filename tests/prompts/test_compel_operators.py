"""compel's `.and()` and `.blend()`: parts that are encoded by themselves, with compel's own numbers."""

import re

import numpy as np
import pytest
import torch
from compel import Compel, CompelForSDXL, ReturnedEmbeddingsType
from compel.prompt_parser import Blend
from diffusers import StableDiffusionXLPipeline

from finelip_sdxl import FineLIPSDXLPipeline
from finelip_sdxl.prompts.compel_operators import Operator, read_operator
from tests.helpers.drawing import draw, embeddings
from tests.helpers.prompts import ENDLESS, LONG


@pytest.fixture
def pipe(components) -> FineLIPSDXLPipeline:
    pipe = FineLIPSDXLPipeline(**components, weighting="compel")
    pipe.swap_text_encoders()
    return pipe


# The syntax


@pytest.mark.parametrize(
    ("text", "parts", "shares", "name"),
    [
        ('("a fox", "a hare").and()', ("a fox", "a hare"), (1, 1), "and"),
        ('("a fox", "a hare").add(1, 0.5)', ("a fox", "a hare"), (1, 0.5), "and"),
        ('("a red++ fox", "a (hare)1.3").blend(3, 1)', ("a red++ fox", "a (hare)1.3"), (0.75, 0.25), "blend"),
        ('("a fox","a hare","a square").blend()', ("a fox", "a hare", "a square"), (1 / 3,) * 3, "blend"),
        ('("a fox", "a hare").blend(1, -0.5, no_normalize)', ("a fox", "a hare"), (1, -0.5), "blend"),
        ("(fox, hare).blend(1, 1)", ("fox", "hare"), (0.5, 0.5), "blend"),
        ('("a fox, red", (a hare)).and()', ("a fox, red", "a hare"), (1, 1), "and"),
        (' ( "a fox" , "a hare" ) .and ( 1 , .5 ) ', ("a fox", "a hare"), (1, 0.5), "and"),
        ('("one",).and()', ("one",), (1,), "and"),
        ('("a \\"red\\" fox", "a hare").and()', ('a \\"red\\" fox', "a hare"), (1, 1), "and"),
    ],
)
def test_operators_are_read(text, parts, shares, name) -> None:
    assert read_operator(text) == Operator(name, parts, pytest.approx(shares))


@pytest.mark.parametrize(
    "text",
    [
        '("a fox", "a hare").and()',
        '("a fox", "a hare").and(1, 0.5)',
        '("a fox", "a hare").blend(0.7, 0.3)',
        '("a fox", "a hare", "a square").blend(1, 2, -0.5, no_normalize)',
        "(fox, hare).blend(1, 1)",
    ],
)
def test_compel_s_own_parser_reads_the_same(text) -> None:
    found, read = Compel.parse_prompt_string(text), read_operator(text)
    prompts, shares = found.prompts, found.weights
    if isinstance(prompts[0], Blend):
        blend = prompts[0]
        total = sum(blend.weights) if blend.normalize_weights else 1
        prompts, shares = blend.prompts, [weight / total for weight in blend.weights]
    assert [" ".join(part.text for part in prompt.children) for prompt in prompts] == list(read.parts)
    assert list(read.shares) == pytest.approx(shares)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('a fox ("a red", "a blue").blend(1, 1)', "in a way that is not read here"),
        ('("a fox", "a hare").and() in the quiet', "in a way that is not read here"),
        ('("a fox.swap(hare)", "a hare").and()', "in a way that is not read here"),
        ('(("a fox", "a hare").blend(1, 1), "a hare").and()', "in a way that is not read here"),
        ("a fox.swap(hare)", "in a way that is not read here"),
        ("a fox withLora(ink, 0.5)", "in a way that is not read here"),
        ("().and()", "in a way that is not read here"),
        ('("a fox", "a hare").blend(1)', r".blend(1) stands behind 2 parts; expected as many numbers from -10 to 10"),
        ('("a fox", "a hare").and(1, x)', ".and(1, x) stands behind 2 parts"),
        ('("a fox", "a hare").and(1, 11)', ".and(1, 11) stands behind 2 parts"),
        ('("a fox", "a hare").and(1, 1, no_normalize)', "stands behind 2 parts"),
        (f'("a fox", "a hare").blend(1, {"9" * 400})', "stands behind 2 parts"),
        ('("a fox", "a hare").blend(1, -1)', "add up to 0: write others, or no_normalize"),
    ],
)
def test_what_cannot_be_read_is_refused(pipe, text, said) -> None:
    for read in (read_operator, pipe.describe_prompt, pipe.encode_prompt):
        with pytest.raises(ValueError, match=re.escape(said)):
            read(text)


def test_long_texts_are_read_at_once() -> None:
    text = f'("{ENDLESS * 10}", "{ENDLESS}").blend(1, 1)'
    assert read_operator(text).parts == (ENDLESS * 10, ENDLESS)
    with pytest.raises(ValueError, match="is not read here"):
        read_operator("(" + '"a\\"' * 5000 + ".and()")


# compel's numbers


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    scale = expected.abs().max()  # states are large: rounding is a share of them
    torch.testing.assert_close(found / scale, expected / scale, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "prompt",
    [
        '("a red fox", "a blue hare").blend(0.7, 0.3)',
        '("a red fox", "a blue hare", "a square").blend(1, 2, -0.5)',
        '("a red fox", "a blue hare").blend(1, -0.5, no_normalize)',
        '("a red++ fox", "a (blue)0.5 hare").blend(1, 1)',
    ],
)
def test_a_blend_has_compel_s_states(components, pipe, prompt) -> None:
    compel = CompelForSDXL(StableDiffusionXLPipeline(**components))
    close(embeddings(pipe, prompt), compel(prompt).embeds)


@pytest.mark.parametrize(
    "prompt", ['("a red fox", "a blue hare").and()', '("a red++ fox", "a hare", "a square").and()']
)
def test_and_has_compel_s_states(pipe, prompt) -> None:
    """In windows of 248: parts that stand one after the other are more than one window."""
    pipe.length_buckets = ()
    close(embeddings(pipe, prompt), CompelForSDXL(pipe)(prompt).embeds)


@pytest.mark.parametrize("prompt", ['("a red fox", "a blue hare").and(1, 0.5)', '("a fox++", "a hare").and(0.7, -1.5)'])
def test_weights_of_and_are_compel_s(pipe, prompt) -> None:
    """Of the first encoder alone: with pooled vectors, compel 2.5.1 fails on weights of `.and()`."""
    compel = Compel(
        pipe.tokenizer,
        pipe.text_encoder,
        truncate_long_prompts=False,
        returned_embeddings_type=ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED,
    )
    expected = compel(prompt)
    close(embeddings(pipe, prompt)[..., : expected.shape[-1]], expected)


# At any length


def test_parts_of_any_length_have_windows_of_their_own(pipe) -> None:
    plan = pipe.describe_prompt(f'("{LONG}", "a hare", "{ENDLESS}").and(1, 0.5, 1)')
    assert [window.share for window in plan.plans[0].windows] == [1, 0.5, 1, 1]
    assert "3 tokens" not in str(plan)
    assert 'window 2, 4 tokens, all with weight 0.5: "a hare ' in str(plan)
    found = embeddings(pipe, f'("{LONG}", "a hare", "{ENDLESS}").and()')
    assert found.shape[1] == 4 * 248
    pipe.length_buckets = ()
    pipe.short_prompt_encoder = "long"
    parts = torch.cat([embeddings(pipe, part) for part in (LONG, "a hare", ENDLESS)], dim=1)
    assert torch.equal(found, parts)


@pytest.mark.parametrize(("one", "other"), [("a red fox", "a hare"), (LONG, "a hare"), (ENDLESS, LONG)])
def test_a_blend_is_the_sum_of_its_parts(pipe, one, other) -> None:
    with torch.no_grad():
        states, _, pooled, _ = pipe.encode_prompt(f'("{one}", "{other}").blend(3, 1)', device="cpu")
        # Beside a negative prompt as long as the other, each has the length of both.
        first, second = (
            pipe.encode_prompt(text, device="cpu", negative_prompt=beside)
            for text, beside in ((one, other), (other, one))
        )
    close(states, 0.75 * first[0] + 0.25 * second[0])
    close(pooled, 0.75 * first[2] + 0.25 * second[2])


def test_operators_stand_in_batches_negative_prompts_and_conditionings(pipe) -> None:
    prompts = ['("a red fox", "a blue hare").blend(0.7, 0.3)', "a quiet fox"]
    negative = '("a square", "a hare").blend(1, 1)'
    both = draw(pipe, prompts, negative_prompt=negative, latents=torch.ones(2, 4, 8, 8))
    for index, prompt in enumerate(prompts):
        alone = draw(pipe, prompt, negative_prompt=negative, latents=torch.ones(1, 4, 8, 8))
        assert np.abs(both[index] - alone[0]).max() < 1e-3
    conditioning = pipe.encode(prompts[0], negative_prompt=negative)
    assert np.array_equal(draw(pipe, None, **conditioning), draw(pipe, prompts[0], negative_prompt=negative))
    assert "encode prompt, part 1 of 2, weight 0.7: " in conditioning.report
    assert "encode negative prompt, part 2 of 2, weight 0.5: " in conditioning.report


def test_loras_beside_an_operator_are_left_out(pipe, caplog) -> None:
    prompt = '("a red fox", "a blue hare").blend(1, 1)'
    expected = embeddings(pipe, prompt)
    caplog.clear()
    assert torch.equal(embeddings(pipe, f"{prompt} <lora:ink:0.5>"), expected)
    assert "Left out, not encoded and not loaded: <lora:ink:0.5>" in caplog.text


def test_both_encoders_need_the_same_parts(pipe) -> None:
    with pytest.raises(ValueError, match="joined from different parts"):
        pipe.describe_prompt('("a fox", "a hare").blend(1, 1)', "a fox")
    pipe.describe_prompt('("a fox", "a hare").blend(1, 1)', '("a red fox", "a hare").blend(1, 1)')
    assert pipe.describe_prompt('("a fox", "a hare").and()', "a fox").windows == 2


def test_with_other_syntaxes_operators_are_text(pipe) -> None:
    text = '("a fox", "a hare").and()'
    for weighting in (None, "a1111"):
        assert pipe.describe_prompt(text, weighting=weighting).windows == 1
