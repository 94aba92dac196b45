"""The effect of a weight: compel's, A1111's with and without the mean restored, and ComfyUI's, each by its own rule."""

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image

from finelip_sdxl import ConditioningAdapter, FineLIPSDXLPipeline
from finelip_sdxl.cli.main import main
from finelip_sdxl.images import read_parameters
from finelip_sdxl.options import EMPHASIS
from finelip_sdxl.prompts.weighting import multiply_states, parse_weights
from tests.helpers.drawing import embeddings
from tests.helpers.prompts import ALL_LENGTHS, ENDLESS, LONG, SHORT

POSITIONS = 248


@pytest.fixture
def pipe(components) -> FineLIPSDXLPipeline:
    """A pipeline that encodes texts of all lengths in windows of 248, which keeps the oracles small."""
    pipe = FineLIPSDXLPipeline(**components, weighting="a1111", short_prompt_encoder="long", length_buckets=())
    pipe.swap_text_encoders()
    return pipe


# The oracles: one text in one window, token by token, from the tools' sources as they were looked up.


def window(tokenizer, parts: list[tuple[str, float]]) -> tuple[list[int], list[float]]:
    """Token ids and weights of a window of 248, one part after the other."""
    ids, weights = [], []
    for text, weight in parts:
        found = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        ids += found
        weights += [weight] * len(found)
    assert len(ids) <= POSITIONS - 2
    padding = POSITIONS - 2 - len(ids)
    row = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id, *[tokenizer.pad_token_id] * padding]
    return row, [1.0, *weights, 1.0, *[1.0] * padding]


def a1111(encode: Callable, ids: list[int], weights: list[float], empty: list[int]) -> torch.Tensor:
    """`modules/sd_emphasis.py`: states times multipliers, then times the old mean over the new."""
    states = encode(ids)
    changed = torch.stack([state * weight for state, weight in zip(states, weights, strict=True)])
    return changed * (states.mean() / changed.mean())


def a1111_no_norm(encode: Callable, ids: list[int], weights: list[float], empty: list[int]) -> torch.Tensor:
    return torch.stack([state * weight for state, weight in zip(encode(ids), weights, strict=True)])


def comfyui(encode: Callable, ids: list[int], weights: list[float], empty: list[int]) -> torch.Tensor:
    """`comfy/sd1_clip.py`: from the empty prompt's state of the same position, through the text's, by the weight."""
    nothing, states = encode(empty), encode(ids).clone()
    for place, weight in enumerate(weights):
        if weight != 1.0:
            states[place] = (states[place] - nothing[place]) * weight + nothing[place]
    return states


ORACLES = {"a1111": a1111, "a1111_no_norm": a1111_no_norm, "comfyui": comfyui}


@pytest.mark.parametrize("emphasis", ORACLES)
@pytest.mark.parametrize(
    "parts",
    [
        [("a ", 1.0), ("red", 1.3), (" fox", 1.0)],
        [("a ", 1.0), ("red", 0.4), (" fox", 1.0), (" in the quiet", 2.5)],
        [("a ", 1.0), ("red", -1.0), (" fox", 0.0)],
        [(LONG, 1.0), (" hare", 1.7), (" of", -0.5)],
        [(LONG, 1.2)],
    ],
)
def test_states_are_those_of_the_tool(pipe, emphasis, parts) -> None:
    prompt = "".join(text if weight == 1 else f"({text}:{weight})" for text, weight in parts)
    found = embeddings(pipe, prompt, emphasis=emphasis)
    expected = []
    for encoder, tokenizer in ((pipe.text_encoder, pipe.tokenizer), (pipe.text_encoder_2, pipe.tokenizer_2)):

        def encode(ids: list[int], encoder=encoder) -> torch.Tensor:
            with torch.no_grad():
                return encoder(torch.tensor([ids]), output_hidden_states=True).hidden_states[-2][0]

        ids, weights = window(tokenizer, parts)
        empty, _ = window(tokenizer, [])
        expected.append(ORACLES[emphasis](encode, ids, weights, empty))
    expected = torch.cat(expected, dim=-1)[None]
    scale = expected.abs().max()  # states are large: rounding is a share of them
    torch.testing.assert_close(found / scale, expected / scale, atol=1e-5, rtol=1e-5)


def test_the_four_effects_differ(pipe) -> None:
    found = [embeddings(pipe, "a (red:0.5) fox", emphasis=emphasis) for emphasis in EMPHASIS]
    for index, one in enumerate(found):
        assert all((one - other).abs().max() > 1e-2 for other in found[index + 1 :])


def test_above_1_compel_and_comfyui_are_the_same(pipe) -> None:
    one, other = (embeddings(pipe, "a (red:1.5) fox", emphasis=emphasis) for emphasis in ("compel", "comfyui"))
    assert torch.equal(one, other)


@ALL_LENGTHS
@pytest.mark.parametrize("emphasis", EMPHASIS)
def test_weights_of_one_change_no_bit(pipe, prompt, emphasis) -> None:
    pipe.short_prompt_encoder = "original"
    expected = embeddings(pipe, prompt, weighting=None)
    assert torch.equal(embeddings(pipe, prompt, emphasis=emphasis), expected)


@pytest.mark.parametrize("emphasis", EMPHASIS)
def test_windows_and_texts_have_effects_of_their_own(pipe, emphasis) -> None:
    """A window without weights, or a text of the batch, is what it is alone."""
    plain = embeddings(pipe, f"{LONG} BREAK a hare")
    weighted = embeddings(pipe, f"{LONG} BREAK a (hare:0.5)", emphasis=emphasis)
    assert torch.equal(weighted[:, :POSITIONS], plain[:, :POSITIONS])
    assert not torch.equal(weighted[:, POSITIONS:], plain[:, POSITIONS:])
    texts = ["a (red:1.5) fox", "a (blue:-0.5) hare" if emphasis != "compel" else "a (blue:0.5) hare", SHORT]
    together = embeddings(pipe, texts, emphasis=emphasis)
    alone = torch.cat([embeddings(pipe, text, emphasis=emphasis) for text in texts])
    torch.testing.assert_close(together, alone, atol=1e-3, rtol=1e-4)


def test_a_mean_of_0_stays(pipe) -> None:
    states, weights = torch.tensor([[[1.0], [-2.0]]]), torch.tensor([[[2.0, 1.0]]])
    assert multiply_states(states, weights, restore_mean=True).flatten().tolist() == [2.0, -2.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_mean_is_restored_in_half_precision(dtype) -> None:
    """In as many digits as the type has; a sum of so many states in it would have none."""
    torch.manual_seed(0)
    states = (torch.randn(1, 248, 768) + 3).to(dtype)
    weights = torch.ones(1, 1, 248)
    weights[..., 5:20] = 1.5
    found = multiply_states(states, weights, restore_mean=True)
    assert found.dtype == dtype
    assert found.float().mean().item() == pytest.approx(states.float().mean().item(), rel=1e-2)


def test_only_compel_and_comfyui_encode_the_empty_prompt(pipe) -> None:
    runs = []
    pipe.text_encoder.register_forward_hook(lambda *_: runs.append(1))
    counts = {}
    for emphasis in EMPHASIS:
        runs.clear()
        embeddings(pipe, "a (red:1.5) (fox:0.5) [hare]", emphasis=emphasis, do_classifier_free_guidance=False)
        counts[emphasis] = len(runs)
    assert counts == {"compel": 4, "a1111": 1, "a1111_no_norm": 1, "comfyui": 2}


@pytest.mark.parametrize("emphasis", ["a1111", "comfyui"])
def test_weights_come_after_the_conditioning_adapter(pipe, emphasis) -> None:
    torch.manual_seed(0)
    adapter = ConditioningAdapter([32, 48], 24, 8)
    for weight in adapter.parameters():
        torch.nn.init.normal_(weight, std=0.2)  # a new one changes nothing
    pipe.register_modules(conditioning_adapter=adapter.eval())
    plain, empty = embeddings(pipe, f"{LONG} fox"), embeddings(pipe, "")
    found = embeddings(pipe, f"{LONG} (fox:1.5)", emphasis=f"{emphasis}_no_norm" if emphasis == "a1111" else emphasis)
    place = (found != plain).any(dim=-1)[0].nonzero().item()
    base = 0.0 if emphasis == "a1111" else empty[0, place]
    torch.testing.assert_close(found[0, place], base + 1.5 * (plain[0, place] - base), atol=1e-3, rtol=1e-3)


# Limits


@pytest.mark.parametrize("emphasis", EMPHASIS[1:])
def test_other_tools_have_negative_weights_and_any_number_of_weak_parts(emphasis) -> None:
    assert parse_weights("(red:-1.5) fox", "a1111", emphasis=emphasis).spans == ((0, 3, -1.5),)
    assert len(parse_weights("[a] fox " * 60, "a1111", emphasis=emphasis).spans) == 60
    for weight in (-10.5, 10.5):
        with pytest.raises(ValueError, match=f"'red' has weight {weight}; expected one from -10 to 10"):
            parse_weights(f"(red:{weight})", "a1111", emphasis=emphasis)


@ALL_LENGTHS
def test_a_negative_weight_is_refused_with_compel_s_effect_alone(pipe, prompt) -> None:
    text = f"{prompt} (fox:-1)"
    with pytest.raises(ValueError, match=re.escape("expected one from 0 to 10 with compel's emphasis: A1111's and")):
        pipe.describe_prompt(text)
    assert torch.isfinite(embeddings(pipe, text, emphasis="a1111")).all()
    assert pipe.describe_prompt(text, emphasis="comfyui").plans[0].windows[-1].weights[-1] == -1


def test_compel_s_syntax_may_have_another_tool_s_effect(pipe) -> None:
    one = embeddings(pipe, "a (red)1.5 fox--", weighting="compel", emphasis="a1111")
    assert torch.equal(one, embeddings(pipe, "a (red:1.5) (fox:0.81)", emphasis="a1111"))


def test_it_is_saved_with_the_pipeline(pipe, tmp_path) -> None:
    pipe.emphasis = "comfyui"
    pipe.save_pretrained(tmp_path)
    assert FineLIPSDXLPipeline.from_pretrained(tmp_path).emphasis == "comfyui"
    assert FineLIPSDXLPipeline.from_pretrained(tmp_path, emphasis="a1111").emphasis == "a1111"
    with pytest.raises(ValueError, match="`emphasis` must be one of"):
        FineLIPSDXLPipeline.from_pretrained(tmp_path, emphasis="sdxl")


def test_the_command_line_counts_negative_weights(capsys) -> None:
    command = ["tokens", "a (red:-1) star", "--weighting", "a1111"]
    assert main([*command, "--emphasis", "a1111"]) == 0
    assert "1 of them weighted" in capsys.readouterr().out
    assert main(command) == 2
    assert "A1111's and ComfyUI's take negative ones" in capsys.readouterr().err


def test_the_command_line_draws_with_an_effect(tmp_path, capsys) -> None:
    files = []
    for emphasis in ("compel", "a1111"):
        files.append(tmp_path / f"{emphasis}.png")
        options = [
            "--steps",
            "1",
            "--seed",
            "0",
            "--weighting",
            "a1111",
            "--emphasis",
            emphasis,
            "--out",
            str(files[-1]),
        ]
        assert main(["generate", "A (red:1.8) star is in the top left.", *options]) == 0
    one, other = (np.asarray(Image.open(file)) for file in files)
    assert not np.array_equal(one, other)
    assert read_parameters(files[1])["emphasis"] == "a1111"


def test_past_248_tokens_every_window_is_weighted(pipe) -> None:
    text = f"(red:1.5) {ENDLESS} (hare:1.5)"
    changed = (embeddings(pipe, text, emphasis="a1111_no_norm") != embeddings(pipe, f"red {ENDLESS} hare")).any(dim=-1)
    assert changed.sum() == 2
    assert changed[0, 1]
    assert changed[0, POSITIONS:].any()
