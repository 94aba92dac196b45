"""FineLIPs added to the text encoders of a fine-tune: own + FineLIP - base, weight by weight."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from finelip_sdxl import FineLIPSDXLPipeline, load_finelip, miniature_path
from finelip_sdxl.checkpoints.merging import add_difference
from finelip_sdxl.cli.main import main
from finelip_sdxl.text_encoders import TextEncoder, num_positions, stretch_text_encoder, text_encoder_tensors
from tests.helpers.drawing import embeddings
from tests.helpers.prompts import ENDLESS, LONG, SHORT
from tests.helpers.single_file import save_single_file
from tests.helpers.tiny_sdxl import make_text_encoder

SCRIPTS = Path(__file__).parents[2]
ENCODERS = ("text_encoder", "text_encoder_2")


def moved(encoder: TextEncoder, seed: int) -> TextEncoder:
    """The encoder after some training: every weight a little elsewhere."""
    encoder, random = copy.deepcopy(encoder), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=random)
    return encoder


def trained_long(encoder: TextEncoder, seed: int) -> TextEncoder:
    """The same, stretched before."""
    encoder = moved(stretch_text_encoder(encoder), seed)
    del encoder.config.stretched_from
    return encoder


@pytest.fixture(scope="module")
def fine_tune(stock_folder, tmp_path_factory) -> str:
    """An SDXL that was fine-tuned from `stock_folder`, its text encoders too."""
    pipe = StableDiffusionXLPipeline.from_pretrained(stock_folder)
    for seed, name in enumerate(ENCODERS):
        setattr(pipe, name, moved(getattr(pipe, name), seed))
    folder = str(tmp_path_factory.mktemp("fine_tune"))
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def finelips(stock_folder, tmp_path_factory) -> dict[str, str]:
    """FineLIPs that were trained from the encoders of `stock_folder`."""
    base = StableDiffusionXLPipeline.from_pretrained(stock_folder)
    folders = {}
    for seed, (argument, name) in enumerate(zip(("finelip", "finelip_2"), ENCODERS, strict=True)):
        folders[argument] = str(tmp_path_factory.mktemp(argument))
        trained_long(getattr(base, name), 10 + seed).save_pretrained(folders[argument])
    return folders


def assert_added(pipe, fine_tune: str, finelips: dict[str, str], base: str, names=ENCODERS) -> None:
    for name in names:
        own, before = (text_encoder_tensors(load_part(folder, name)) for folder in (fine_tune, base))
        finelip = text_encoder_tensors(load_part(finelips["finelip" + name[12:]], name, ""))
        found = text_encoder_tensors(getattr(pipe, name))
        assert found.keys() == own.keys()
        for key, weight in found.items():
            torch.testing.assert_close(weight, own[key] + finelip[key] - before[key], atol=1e-5, rtol=1e-5)


def load_part(folder: str, name: str, subfolder: str | None = None) -> TextEncoder:
    """An encoder of 248 positions, by the loader that other tests hold against the published layouts."""
    model = load_finelip(folder, subfolder=name if subfolder is None else subfolder)
    return model.to_text_encoder(projection=name == "text_encoder_2")


# The arithmetic


def test_every_weight_is_the_sum() -> None:
    base = stretch_text_encoder(make_text_encoder(32))
    own, finelip = moved(base, 1), moved(base, 2)
    before = copy.deepcopy(own.state_dict())
    merged = text_encoder_tensors(add_difference(own, finelip, base))
    parts = [text_encoder_tensors(encoder) for encoder in (own, finelip, base)]
    for key, weight in merged.items():
        torch.testing.assert_close(weight, parts[0][key] + parts[1][key] - parts[2][key])
    for key, weight in own.state_dict().items():
        assert torch.equal(weight, before[key])


def test_what_was_not_fine_tuned_becomes_the_finelip_and_what_finelip_left_alone_the_fine_tune() -> None:
    base = stretch_text_encoder(make_text_encoder(48, projection_dim=24))
    other = moved(base, 1)
    for merged in (add_difference(base, other, base), add_difference(other, base, base)):
        for key, weight in text_encoder_tensors(merged).items():
            torch.testing.assert_close(weight, text_encoder_tensors(other)[key])


def test_half_precision_keeps_small_changes_until_the_end() -> None:
    base = stretch_text_encoder(make_text_encoder(32))
    finelip = copy.deepcopy(base)
    with torch.no_grad():
        finelip.get_input_embeddings().weight.mul_(1 + 2**-9)  # which bfloat16 would round away
    own = copy.deepcopy(base).bfloat16()
    with torch.no_grad():
        own.get_input_embeddings().weight.zero_()
    merged = add_difference(own, finelip, base)
    assert merged.dtype == torch.bfloat16
    expected = base.get_input_embeddings().weight.detach() * 2**-9
    torch.testing.assert_close(merged.get_input_embeddings().weight.detach().float(), expected, rtol=1e-2, atol=1e-4)


def test_the_result_no_longer_promises_stock_s_weights() -> None:
    own = stretch_text_encoder(make_text_encoder(32))
    assert own.config.stretched_from == 77
    merged = add_difference(own, moved(own, 1), own)
    assert not hasattr(merged.config, "stretched_from")
    assert own.config.stretched_from == 77


def test_encoders_that_differ_are_refused_with_what_differs() -> None:
    own = stretch_text_encoder(make_text_encoder(32))
    with pytest.raises(ValueError, match=r"the FineLIP differ in 1 weights, .*position_embedding.* \(248, 32\)"):
        add_difference(own, make_text_encoder(32), own)
    with pytest.raises(ValueError, match=r"and the base that it was trained from differ in \d+ weights"):
        add_difference(own, own, stretch_text_encoder(make_text_encoder(48)))


# In the pipelines


def test_a_fine_tune_keeps_its_weights_and_gets_what_the_finelips_learned(fine_tune, finelips, stock_folder) -> None:
    pipe = FineLIPSDXLPipeline.from_pretrained(fine_tune, **finelips, finelip_merge="delta", finelip_base=stock_folder)
    assert [num_positions(getattr(pipe, name)) for name in ENCODERS] == [248, 248]
    assert_added(pipe, fine_tune, finelips, stock_folder)


def test_prompts_of_every_length_are_read(fine_tune, finelips, stock_folder) -> None:
    stock = StableDiffusionXLPipeline.from_pretrained(fine_tune)
    arguments = {**finelips, "finelip_base": stock_folder}
    pipe = FineLIPSDXLPipeline.from_pretrained(fine_tune, **arguments, finelip_merge="delta")
    replaced = FineLIPSDXLPipeline.from_pretrained(fine_tune, **finelips)
    torch.testing.assert_close(embeddings(pipe, SHORT), embeddings(stock, SHORT), atol=1e-5, rtol=1e-4)
    assert [embeddings(pipe, prompt).shape[1] for prompt in (SHORT, LONG, ENDLESS)] == [77, 154, 2 * 248]
    for prompt in (LONG, ENDLESS):
        assert (embeddings(pipe, prompt) - embeddings(replaced, prompt)).abs().max() > 1e-2
    pipe.short_prompt_encoder = "long"
    assert (embeddings(pipe, SHORT) - embeddings(stock, SHORT)).abs().max() > 1e-2


def test_one_finelip_is_added_and_the_other_encoder_stretched(fine_tune, finelips, stock_folder) -> None:
    pipe = FineLIPSDXLPipeline.from_pretrained(
        fine_tune, finelip=finelips["finelip"], finelip_merge="delta", finelip_base=stock_folder, dtype=torch.bfloat16
    )
    assert {getattr(pipe, name).dtype for name in ENCODERS} == {torch.bfloat16}
    assert pipe.text_encoder_2.config.stretched_from == 77
    assert not hasattr(pipe.text_encoder.config, "stretched_from")


def test_swapping_adds_to_stretched_encoders_too(fine_tune, finelips, stock_folder) -> None:
    pipe = FineLIPSDXLPipeline.from_pretrained(fine_tune)
    pipe.swap_text_encoders(**finelips, finelip_merge="delta", finelip_base=stock_folder)
    assert_added(pipe, fine_tune, finelips, stock_folder)


def test_swapping_adds_to_the_encoders_that_were_replaced_before(fine_tune, finelips, stock_folder) -> None:
    pipe = FineLIPSDXLPipeline.from_pretrained(fine_tune, **finelips)
    pipe.swap_text_encoders(**finelips, finelip_merge="delta", finelip_base=stock_folder)
    assert_added(pipe, fine_tune, finelips, stock_folder)


def test_the_miniature_s_finelips_know_their_base() -> None:
    finelips = {"finelip": "miniature-finelip-1", "finelip_2": "miniature-finelip-2"}
    pipe = FineLIPSDXLPipeline.from_pretrained(miniature_path(), **finelips, finelip_merge="delta")
    for pair, name in enumerate(ENCODERS, start=1):
        expected = load_part(f"miniature-finelip-{pair}", name, "").state_dict()  # nothing was fine-tuned
        for key, weight in getattr(pipe, name).state_dict().items():
            torch.testing.assert_close(weight, expected[key], atol=1e-6, rtol=1e-5)


def test_the_command_line_converts_a_single_file(fine_tune, finelips, stock_folder, tmp_path, capsys) -> None:
    file, out = tmp_path / "fine_tune.safetensors", tmp_path / "out"
    save_single_file(StableDiffusionXLPipeline.from_pretrained(fine_tune), file)
    merging = ["--finelip-merge", "delta", "--finelip-base", stock_folder]
    flags = ["--config", stock_folder, "--finelip", finelips["finelip"], "--finelip-2", finelips["finelip_2"], *merging]
    assert main(["convert", str(file), str(out), *flags]) == 0
    pipe = FineLIPSDXLPipeline.from_pretrained(str(out))
    assert_added(pipe, fine_tune, finelips, stock_folder)
    assert num_positions(pipe.stock_text_encoder) == 77


# What goes wrong


def refusal(fine_tune: str, **arguments) -> str:
    with pytest.raises((ValueError, OSError)) as caught:
        FineLIPSDXLPipeline.from_pretrained(fine_tune, **arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_arguments_that_do_not_go_together_are_named_before_loading(fine_tune, finelips, monkeypatch) -> None:
    monkeypatch.setattr(StableDiffusionXLPipeline, "from_pretrained", lambda *args, **kwargs: pytest.fail("loaded"))
    assert "`finelip_merge` must be one of 'replace', 'delta', but is 'sum'" in refusal(fine_tune, finelip_merge="sum")
    assert "pass finelip=, finelip_2= or both" in refusal(fine_tune, finelip_merge="delta")
    assert "needs finelip_base=" in refusal(fine_tune, finelip_merge="delta", **finelips)
    assert "finelip_base=x goes with finelip_merge='delta'" in refusal(fine_tune, finelip_base="x", **finelips)


def test_a_base_that_is_not_there_is_named(fine_tune, finelips, tmp_path) -> None:
    message = refusal(fine_tune, finelip_merge="delta", finelip_base=tmp_path, **finelips)
    assert str(tmp_path / "text_encoder") in message


def test_a_base_of_other_sizes_is_refused(fine_tune, finelips) -> None:
    message = refusal(fine_tune, finelip_merge="delta", finelip_base="miniature", **finelips)
    assert "This text encoder and the base that it was trained from differ in" in message


def test_encoders_that_were_trained_at_248_are_no_fine_tune_to_add_to(fine_tune, finelips, stock_folder) -> None:
    pipe = FineLIPSDXLPipeline.from_pretrained(fine_tune, **finelips, short_prompt_encoder="long")  # holds no stock
    with pytest.raises(ValueError, match="`text_encoder` was trained or replaced at 248 positions"):
        pipe.swap_text_encoders(**finelips, finelip_merge="delta", finelip_base=stock_folder)


# The measurement


@pytest.mark.slow
def test_the_benchmark_trains_a_fine_tune_once_and_prints_its_table(tmp_path) -> None:
    command = [sys.executable, SCRIPTS / "benchmarks" / "miniature_merging.py", "--runs", tmp_path, "--scenes", "2"]
    command += ["--steps", "1", "--train-flags", "--steps 1 --batch-size 2"]
    printed = []
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        printed.append([line for line in done.stdout.splitlines() if line.startswith("|")])
    head, _, *rows = printed[0]
    assert head.split(" | ")[1:3] == ["short: new word", "short: other colors"]
    assert [row.split(" | ")[0] for row in rows][3] == "| fine-tune, FineLIP added"
    assert printed[0] == printed[1]
    assert "fine_tune:" not in done.stderr  # the bar of a training
