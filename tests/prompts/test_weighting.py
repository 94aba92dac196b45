"""Weights in the prompt: two syntaxes, and what they do to states."""

import sys
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import pytest
import torch
from compel import Compel, CompelForSDXL
from diffusers import StableDiffusionXLPipeline

from finelip_sdxl import ConditioningAdapter, FineLIPSDXLImg2ImgPipeline, FineLIPSDXLPipeline
from finelip_sdxl.cli.main import main
from finelip_sdxl.prompts.weighting import MAX_DEPTH, parse_weights
from tests.helpers.drawing import embeddings
from tests.helpers.prompts import ALL_LENGTHS, ENDLESS, LONG, SHORT
from tests.helpers.tiny_sdxl import make_tokenizer


def difference(states: torch.Tensor, others: torch.Tensor) -> float:
    """The largest, as a share of the largest state."""
    return ((states - others).abs().max() / states.abs().max()).item()


# The syntaxes


@pytest.mark.parametrize(
    ("syntax", "text", "plain", "weights"),
    [
        ("a1111", "a (red:1.3) fox", "a red fox", [1.3]),
        ("a1111", "((red)) [fox]", "red fox", [1.21, 1 / 1.1]),
        ("a1111", "(a (red:1.5) fox:1.2)", "a red fox", [1.2, 1.8, 1.2]),
        ("a1111", "((((([[[[[red]]]]]))))) ([a]) (fox:1)", "red a fox", []),  # 1.1⁵ / 1.1⁵ is not quite 1
        ("a1111", r"\(red\) \[fox\] (a \(hare\):1.2)", "(red) [fox] a (hare)", [1.2]),
        ("a1111", "a) red] fox:1.3)", "a) red] fox:1.3)", []),
        (
            "a1111",
            r"a \ red \\ fox\, (a \hare:1.2)",
            r"a  red \ fox, a hare",
            [1.2],
        ),  # as A1111, which drops a lone one
        ("a1111", "a (red fox", "a red fox", [1.1]),
        ("a1111", "(red:1.2)fox", "red fox", [1.2]),
        ("a1111", "(re:1)d BREAKfast", "red BREAKfast", []),
        ("compel", "a (red)1.3 fox++ hare-", "a red fox hare", [1.3, 1.21, 0.9]),
        ("compel", '"red fox"1.3 \\(hare\\)', "red fox (hare)", [1.3]),
        ("compel", "a (red fox+)0.5", "a red fox", [0.5, 0.55]),
        ("compel", "(red)1.3fox", "red fox", [1.3]),
        ("compel", "(red)(fox)", "red fox", []),
        ("compel", "(red fox", "(red fox", []),
        ("compel", "fox" + "-" * 7448, "fox", [0]),
        ("compel", "+" * 7448, "+" * 7448, []),
        ("compel", "(red)1e999", "red e999", []),  # as compel itself reads it
        ("a1111", "(red:1e308)", "red:1e308", [1.1]),
        ("compel", "a well-known t-shirt - 1.5+ a+b", "a well-known t-shirt - 1.5+ a+b", []),
        ("compel", "a  red\n fox", "a  red\n fox", []),
        (None, "a (red:1.3) fox++", "a (red:1.3) fox++", []),
    ],
)
def test_syntax_is_taken_out(syntax, text, plain, weights) -> None:
    found = parse_weights(text, syntax)
    assert found.text == plain
    assert [weight for _, _, weight in found.spans] == pytest.approx(weights)


@pytest.mark.parametrize(
    "text",
    [
        "a (red)1.3 fox, above++ the (blue square)0.5.",
        "((red)1.2 fox)1.5 hare--",
        '"red fox"++, (a (hare- of)1.1 the)0.9',
        "(red)+++ (fox)- fox's (red)2, a t-shirt++",
        "red) (fox (a \\(red\\) fox)1.2",
        "(red)1.3fox (blue)1. square (a).5",
        "C++ a - b ++ -- 1.5 <my-hare>++",
    ],
)
def test_compel_s_own_parser_finds_the_same_weights(text) -> None:
    tokenizer = make_tokenizer()
    expected = [
        (token, pytest.approx(fragment.weight))
        for fragment in Compel.parse_prompt_string(text).prompts[0].children
        for token in tokenizer(fragment.text, add_special_tokens=False)["input_ids"]
    ]
    found = parse_weights(text, "compel")
    read = tokenizer(found.text, add_special_tokens=False, return_offsets_mapping=True)
    weights = [found.weight_at(start) for start, _ in read["offset_mapping"]]
    assert list(zip(read["input_ids"], weights, strict=True)) == expected


@pytest.mark.parametrize(
    ("syntax", "text", "message"),
    [
        ("a1111", "(red:11)", "'red' has weight 11; expected one from 0 to 10"),
        (
            "a1111",
            "(red:-1)",
            "'red' has weight -1; expected one from 0 to 10 with compel's emphasis: A1111's and Comfy",
        ),
        ("compel", "(red)11", "'red' has weight 11"),
        ("a1111", "(" * 2000, f"more than {MAX_DEPTH} nested brackets"),
        ("compel", "(" * 2000, f"more than {MAX_DEPTH} nested brackets"),
        ("compel", "a fox.swap(a hare)", "in a way that is not read here"),
        *[
            ("compel", f"{word}{'+' * 7448}", "has weight .* expected one from 0 to 10")
            for word in ("fox", "(a fox)", '"a"')
        ],
        ("compel", "(" * 50 + "a" + ")++++++" * 50, "'a' has weight .* expected one from 0 to 10"),
        ("compel", f"((a fox){'9' * 400})0", "has weight nan"),
        ("compel", f"(a fox){'9' * 10_000}", "'a fox' has weight inf"),
        ("a1111", f"(a fox:{'9' * 400})", "'a fox' has weight inf"),
        ("a1111", f"((a fox:{'9' * 400}):0)", "'a fox' has weight nan"),
        ("a1111", "(" * 50 + "a", "'a' has weight 117"),
        ("a1111", "[a] fox " * 51, "51 parts with weights below 1.*expected at most 50"),
    ],
)
def test_what_cannot_be_read_is_explained(syntax, text, message) -> None:
    with pytest.raises(ValueError, match=message):
        parse_weights(text, syntax)


@pytest.mark.parametrize("syntax", ["compel", "a1111"])
@pytest.mark.parametrize("part", ["(a", "(" * 25 + "a" + ")" * 25 + " ", "((a)1.1)1.1 ", '"a" ', "a-", "a++ ", ":1 "])
def test_the_work_grows_as_the_text_does(syntax, part) -> None:
    def lines_run(characters: int) -> int:
        events = []

        def trace(_frame, event, _arg) -> Callable:
            events.append(event)
            return trace

        text = "((((((((((" + (part * characters)[:characters]  # of which compel's own parser takes minutes
        tracing = sys.gettrace()
        sys.settrace(trace)
        try:
            with suppress(ValueError):  # too deep, or too heavy
                found = parse_weights(text, syntax)
                for character in range(len(found.text)):
                    found.weight_at(character)
        finally:
            sys.settrace(tracing)
        return events.count("line")

    assert 0 < lines_run(4000) < 2.2 * lines_run(2000)


# What weights do


@ALL_LENGTHS
@pytest.mark.parametrize(("syntax", "of_one"), [("compel", "({})1.0"), ("a1111", "({}:1)"), ("a1111", "([{}])")])
def test_weights_of_one_change_no_bit(pipe, prompt, syntax, of_one) -> None:
    expected = embeddings(pipe, prompt)
    pipe.weighting = syntax
    assert torch.equal(embeddings(pipe, prompt), expected)
    assert torch.equal(embeddings(pipe, prompt.replace("blue square", of_one.format("blue square"))), expected)


@ALL_LENGTHS
def test_a_weight_changes_its_token_alone(pipe, prompt) -> None:
    expected = embeddings(pipe, f"{prompt} fox")
    pipe.weighting = "a1111"
    found = embeddings(pipe, f"{prompt} (fox:1.5)")
    changed = (found != expected).any(dim=-1)
    assert changed.sum() == 1
    assert pipe.describe_prompt(f"{prompt} (fox:1.5)").plans[0].windows[-1].weights[-1] == 1.5


def test_both_syntaxes_come_to_the_same(pipe) -> None:
    pipe.weighting = "a1111"
    expected = embeddings(pipe, "a (red:1.3) fox above ((the)) square")
    pipe.weighting = "compel"
    assert torch.equal(embeddings(pipe, "a (red)1.3 fox above the++ square"), expected)


@pytest.mark.parametrize(
    "prompt",
    [
        SHORT,
        "a (red)1.3 fox above the++ square",
        "(a fox)1.7, a (red hare)2",
        "a (red)0.5 fox above the-- square",
        "a (red)0 fox, a (blue hare)1.4, (a square)0.3",
        "(a fox)0.6 (a hare)0.6 and a (red (small)0.5 square)0.8",
    ],
)
def test_weights_are_compel_s(components, prompt) -> None:
    compel = CompelForSDXL(StableDiffusionXLPipeline(**components))
    expected = compel(prompt).embeds
    pipe = FineLIPSDXLPipeline(**components, weighting="compel")
    pipe.swap_text_encoders()
    with torch.no_grad():
        states, _, pooled, _ = pipe.encode_prompt(prompt, device="cpu")
    scale = expected.abs().max()
    torch.testing.assert_close(states / scale, expected / scale, atol=1e-5, rtol=1e-5)
    # compel reads the pooled vector from the text with its syntax still in it, this from what is meant.
    plain = compel(parse_weights(prompt, "compel").text).pooled_embeds
    torch.testing.assert_close(pooled / scale, plain / scale, atol=1e-5, rtol=1e-5)


@ALL_LENGTHS
def test_no_weight_takes_a_token_out(pipe, prompt) -> None:
    pipe.weighting = "a1111"
    found, other = embeddings(pipe, f"{prompt} (fox:0)"), embeddings(pipe, f"{prompt} (hare:0)")
    assert difference(found, other) < 1e-4
    assert difference(embeddings(pipe, f"{prompt} fox"), embeddings(pipe, f"{prompt} hare")) > 1e-2


def test_a_weak_part_leaves_other_windows_as_they_are(pipe) -> None:
    pipe.weighting = "a1111"
    plain, weak = embeddings(pipe, "a fox BREAK a hare"), embeddings(pipe, "a fox BREAK a (hare:0.5)")
    assert torch.equal(weak[:, :248], plain[:, :248])
    assert not torch.equal(weak[:, 248:], plain[:, 248:])


def test_each_text_of_a_batch_has_its_own_weights(pipe) -> None:
    pipe.weighting = "a1111"
    texts = [SHORT, "a (red:1.5) fox", "[a] hare"]
    alone = torch.cat([embeddings(pipe, text) for text in texts])
    together = embeddings(pipe, texts, num_images_per_prompt=2)
    torch.testing.assert_close(together, alone.repeat_interleave(2, dim=0), atol=1e-3, rtol=1e-4)


@ALL_LENGTHS
def test_negative_prompts_have_weights_too(pipe, prompt) -> None:
    def negatives(text: str) -> torch.Tensor:
        with torch.no_grad():
            return pipe.encode_prompt(prompt, device="cpu", negative_prompt=text)[1]

    pipe.weighting = "a1111"
    changed = (negatives("a (fox:1.5)") != negatives("a fox")).any(dim=-1)
    assert changed.nonzero().tolist() == [[0, 2]]


def test_only_the_encoder_whose_prompt_has_weights_gets_them(pipe) -> None:
    pipe.weighting = "a1111"
    weighted, plain = embeddings(pipe, "a (red:1.5) fox", prompt_2="a red fox"), embeddings(pipe, "a red fox")
    assert torch.equal(weighted[..., 32:], plain[..., 32:])
    assert not torch.equal(weighted[..., :32], plain[..., :32])


@ALL_LENGTHS
def test_weights_stand_as_given_behind_the_conditioning_adapter(pipe, prompt) -> None:
    torch.manual_seed(0)
    adapter = ConditioningAdapter([32, 48], 24, 8)
    for weight in adapter.parameters():
        torch.nn.init.normal_(weight, std=0.2)  # a new one changes nothing
    pipe.register_modules(conditioning_adapter=adapter.eval())
    pipe.short_prompt_encoder, pipe.weighting = "long", "a1111"
    plain, weighted = embeddings(pipe, f"{prompt} fox"), embeddings(pipe, f"{prompt} (fox:1.5)")
    place = (weighted != plain).any(dim=-1)[0].nonzero().item()
    # Of the empty prompt, read in windows as long as these.
    pipe.length_buckets = (plain.shape[1],) if plain.shape[1] <= 248 else ()
    empty = embeddings(pipe, "")[0, place % 248]
    expected = empty + 1.5 * (plain[0, place] - empty)
    torch.testing.assert_close(weighted[0, place], expected, atol=1e-3, rtol=1e-3)


def test_what_is_read_without_a_weak_part_passes_the_conditioning_adapter_too(pipe) -> None:
    torch.manual_seed(0)
    adapter = ConditioningAdapter([32, 48], 24, 8)
    for weight in adapter.parameters():
        torch.nn.init.normal_(weight, std=2.0)
    pipe.register_modules(conditioning_adapter=adapter.eval())
    pipe.short_prompt_encoder, pipe.weighting = "long", "a1111"
    found = embeddings(pipe, "a (red:0) fox")
    tokens = pipe.tokenizer("a red fox", padding="max_length", max_length=77, return_tensors="pt").input_ids
    mask = torch.ones_like(tokens)
    mask[0, 2] = 0
    with torch.no_grad():
        states = pipe.text_encoder(tokens, attention_mask=mask, output_hidden_states=True).hidden_states[-2]
        (adapted, _), _ = adapter([states, None], None)
    assert difference(adapted[0, 3], found[0, 3, :32]) < 1e-4
    assert difference(adapted[0, 3], states[0, 3]) > 1e-2


def test_a_refiner_has_weights_for_its_one_encoder(components) -> None:
    parts = {**components, "text_encoder": None, "tokenizer": None}
    refiner = FineLIPSDXLImg2ImgPipeline(**parts, weighting="a1111")
    refiner.swap_text_encoders()
    changed = embeddings(refiner, "a (red:1.5) fox") != embeddings(refiner, "a red fox")
    assert changed.any(dim=-1).nonzero().tolist() == [[0, 2]]


@pytest.mark.parametrize(("syntax", "text"), [("a1111", "a (<concept>:1.5) fox"), ("compel", "a <concept>++++ fox")])
def test_all_tokens_of_a_textual_inversion_are_weighted(pipe, syntax, text) -> None:
    for name, tokenizer, width in (("text_encoder", pipe.tokenizer, 32), ("text_encoder_2", pipe.tokenizer_2, 48)):
        vectors = {"<concept>": torch.randn(2, width, generator=torch.Generator().manual_seed(7))}
        encoder = getattr(pipe, name)
        pipe.load_textual_inversion(vectors, token="<concept>", text_encoder=encoder, tokenizer=tokenizer)
    pipe.weighting = syntax
    for plan in pipe.describe_prompt(text).plans:
        weights = plan.windows[0].weights
        assert len(weights) == 4
        assert [weight > 1.4 for weight in weights] == [False, True, True, False]


def test_weights_draw_the_same_offloaded(pipe) -> None:
    def image(prompt: str) -> np.ndarray:
        generator = torch.Generator().manual_seed(0)
        return pipe(prompt, num_inference_steps=1, generator=generator, output_type="np").images

    pipe.weighting = "a1111"
    prompt = f"{LONG} (fox:1.5) (hare:0.5)"
    expected = image(prompt)
    assert not np.array_equal(image(f"{LONG} fox hare"), expected)
    pipe.enable_model_cpu_offload(device="cpu")
    np.testing.assert_allclose(image(prompt), expected, atol=1e-3)


# Breaks


def test_a_break_begins_a_window(pipe) -> None:
    pipe.weighting = "a1111"
    windows = pipe.describe_prompt("a fox BREAK a hare").plans[0].windows
    assert [window.text for window in windows] == ["a fox ", "a hare"]
    assert embeddings(pipe, "a fox BREAK a hare").shape[1] == 2 * 248


@pytest.mark.parametrize("text", ["BREAK a fox", "a fox BREAK", "BREAK BREAK a fox BREAK"])
def test_a_break_beside_nothing_begins_none(pipe, text) -> None:
    pipe.weighting = "a1111"
    assert torch.equal(embeddings(pipe, text), embeddings(pipe, "a fox"))


@pytest.mark.parametrize(("overflow", "windows"), [("window", 2), ("error", 2), ("truncate", 1)])
def test_only_truncation_knows_no_break(pipe, overflow, windows) -> None:
    pipe.weighting, pipe.overflow = "a1111", overflow
    assert pipe.describe_prompt("a fox BREAK a hare").windows == windows


def test_windows_end_at_breaks_and_at_what_fits(pipe) -> None:
    pipe.weighting = "a1111"
    windows = pipe.describe_prompt(f"a fox BREAK {ENDLESS}").plans[0].windows
    assert windows[0].text == "a fox "
    assert all(window.tokens <= 248 for window in windows)
    assert "".join(window.text for window in windows) == f"a fox {ENDLESS}"


# The option


def test_encoders_of_77_positions_are_refused(components) -> None:
    pipe = FineLIPSDXLPipeline(**components, weighting="a1111")
    for ask in (pipe.describe_prompt, pipe.encode_prompt):
        with pytest.raises(ValueError, match=r"needs text encoders of 248 positions: call swap_text_encoders\(\)"):
            ask(SHORT)


def test_it_is_saved_with_the_pipeline(pipe, tmp_path) -> None:
    pipe.weighting = "a1111"
    pipe.save_pretrained(tmp_path)
    assert FineLIPSDXLPipeline.from_pretrained(tmp_path).weighting == "a1111"


def test_an_unknown_syntax_is_named(pipe) -> None:
    with pytest.raises(ValueError, match="`weighting` must be one of None, 'compel', 'a1111', but is 'comfy'"):
        pipe.weighting = "comfy"


def test_the_command_line_says_which_tokens_are_weighted(capsys) -> None:
    assert main(["tokens", "a (red:1.3) star", "--weighting", "a1111"]) == 0
    assert 'window 1, 5 tokens, 1 of them weighted: "a red star"' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("prompt", "lines"),
    [
        ("a (red:1.4) star", ['weighting="a1111": (red:1.4)']),
        ("a (red:1.4) star, (two words : -.5)", ['weighting="a1111": (red:1.4) (two words : -.5)']),
        ("a (red)1.4 star, ((blue:0.8))", ['weighting="a1111": (blue:0.8)', 'weighting="compel": (red)1.4']),
        ("a star (seen at 3:2), (two) of them, C++ and 1.4", []),
        (r"a \(red:1.4\) star", []),
    ],
)
def test_the_report_names_weights_that_are_not_read(prompt, lines, capsys) -> None:
    assert main(["tokens", prompt]) == 0
    found = [line for line in capsys.readouterr().out.splitlines() if "plain text" in line]
    assert found == [f"  plain text, no weights without {line}" for line in lines]
    assert main(["tokens", prompt, "--weighting", "a1111", "--emphasis", "a1111"]) == 0
    assert "plain text" not in capsys.readouterr().out


def test_the_command_line_leaves_out_weights_that_are_saved(pipe, tmp_path, capsys) -> None:
    pipe.weighting = "a1111"
    pipe.save_pretrained(tmp_path)
    assert main(["tokens", "a (red:1.3) star", "--base", str(tmp_path)]) == 0
    assert "weighted" in capsys.readouterr().out
    assert main(["tokens", "a (red:1.3) star", "--base", str(tmp_path), "--weighting", "none"]) == 0
    assert "weighted" not in capsys.readouterr().out
