"""The LoRA recipe: what the UNet gets of captions of every length, what comes out, what a stop costs, and what it
refuses."""

import copy
import json
import os
import shutil
import signal
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from finelip_sdxl import FineLIPSDXLPipeline
from finelip_sdxl.data import open_dataset
from finelip_sdxl.options import LORA_LAYERS
from finelip_sdxl.pipelines.opening import open_text_to_image
from finelip_sdxl.training import lora as lora_module
from finelip_sdxl.training.command_line import read_preset
from finelip_sdxl.training.lora import DIFFUSERS_FILE, KOHYA_FILE, UNET_LAYERS, Lora, LoraTask
from finelip_sdxl.training.precompute import WHOLE, bucket_of, cut_bucket, precompute
from tests.helpers.full_disk import files_of_at_most
from tests.helpers.recipes import KillIn, Stop, forget_accelerator, nothing, on_two_processes, processes, refusal
from training import train_lora

SENTENCE = "A red star is in the middle. "
CAPTIONS = {"short": SENTENCE.strip(), "long": SENTENCE * 20, "windowed": SENTENCE * 60}  # 10, 162 and 482 tokens


@pytest.fixture(autouse=True)
def one_thread_and_no_state() -> Any:
    """Sums are the same bit for bit, and no accelerator hears of the one before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    forget_accelerator()
    torch.set_num_threads(threads)


def write_folder(folder: Path, captions: list[str], sizes: list[tuple[int, int]] | None = None) -> str:
    """Pictures of noise with captions in .txt files beside them."""
    folder.mkdir(parents=True)
    for k, caption in enumerate(captions):
        width, height = sizes[k % len(sizes)] if sizes else (16, 16)
        pixels = np.random.default_rng(k).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{k}.png")
        (folder / f"{k}.txt").write_text(caption)
    return f"folder:{folder}"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> str:
    """Six pictures of several sizes, with captions of every length."""
    folder = tmp_path_factory.mktemp("pictures") / "own"
    return write_folder(folder, [*CAPTIONS.values()] * 2, sizes=[(16, 16), (32, 16), (16, 48)])


def parse(base: Path | str, out: Path, captions: str, *flags: str) -> Namespace:
    """Three steps; flags change it."""
    common = f"--base {base} --output-dir {out} --cpu --captions {captions} --batch-size 3 --resolution 16"
    steps = "--steps 3 --checkpointing-steps 2 --learning-rate 1e-2 --rank 2"
    return train_lora.parse([*common.split(), *steps.split(), *flags])


def train(base: Path | str, out: Path, captions: str, *flags: str) -> dict[str, Any]:
    forget_accelerator()
    return train_lora.train(parse(base, out, captions, *flags))


def weights(out: Path) -> dict[str, Tensor]:
    return load_file(out / "last" / DIFFUSERS_FILE)


def assert_same_weights(one: Path, other: Path) -> None:
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys() != set()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


def record_figures(monkeypatch: pytest.MonkeyPatch) -> dict[int, dict[str, float]]:
    """What is logged, by step."""
    figures: dict[int, dict[str, float]] = {}
    monkeypatch.setattr(Accelerator, "log", lambda self, values, step: figures.update({step: dict(values)}))
    return figures


def open_base(base: Path) -> FineLIPSDXLPipeline:
    return open_text_to_image(str(base), overflow="window", weighting=None)


@pytest.fixture
def trained(monkeypatch) -> dict[str, Any]:
    """The pipeline of a run, `pipe`, and the weights that it began with, `before`."""
    opened, found = train_lora.open_base, {}

    def observed(arguments: Namespace) -> FineLIPSDXLPipeline:
        pipe = opened(arguments)
        models = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
        found.update(pipe=pipe, before={name: copy.deepcopy(model.state_dict()) for name, model in models.items()})
        return pipe

    monkeypatch.setattr(train_lora, "open_base", observed)
    return found


def predict(pipe: StableDiffusionXLPipeline, prompt: str) -> Tensor:
    """What the UNet predicts for a prompt, at one timestep and from fixed noise."""
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        states, _, pooled, _ = pipe.encode_prompt(prompt, do_classifier_free_guidance=False)
        added = {"text_embeds": pooled, "time_ids": torch.tensor([[16, 16, 0, 0, 16, 16]])}
        return pipe.unet(torch.randn(1, 4, 8, 8, generator=random), 500, states, added_cond_kwargs=added).sample


def test_the_choices_of_layers_are_those_of_the_flag() -> None:
    assert UNET_LAYERS.keys() == {*LORA_LAYERS}


# What the UNet gets


@pytest.mark.parametrize(("kind", "length"), [("short", 77), ("long", 248), ("windowed", 496)])
def test_a_caption_is_encoded_whole_as_in_a_call(base, tmp_path, kind, length) -> None:
    pipe = open_base(base)
    assert not pipe.describe_prompt(CAPTIONS[kind]).cut
    data = open_dataset(write_folder(tmp_path / "data", [CAPTIONS[kind], CAPTIONS["short"]]), "train")
    item = precompute(data, pipe, 16, True, tmp_path / "out", captions=WHOLE)[0]
    with torch.no_grad():
        states, _, pooled, _ = pipe.encode_prompt(CAPTIONS[kind].strip(), do_classifier_free_guidance=False)
    assert item["caption_states"].shape == (length, 80)
    assert torch.equal(item["caption_states"], states[0])
    assert torch.equal(item["caption_pooled"], pooled[0])


def test_the_end_of_a_long_caption_changes_what_is_trained(base, tmp_path) -> None:
    """The same pictures with another word behind token 77 give another LoRA; cut by hand at 77 they give the same."""
    ends = {"red": "A red ring is here.", "blue": "A blue ring is here."}
    for color, end in ends.items():
        captions = write_folder(tmp_path / color, [SENTENCE * 12 + end] * 3)
        train(base, tmp_path / f"{color}-run", captions, "--steps", "1")
        captions = write_folder(tmp_path / f"{color}-cut", [(SENTENCE * 12 + end)[: 9 * len(SENTENCE)]] * 3)
        train(base, tmp_path / f"{color}-cut-run", captions, "--steps", "1")
    assert_same_weights(tmp_path / "red-cut-run", tmp_path / "blue-cut-run")
    red, blue = (weights(tmp_path / f"{color}-run") for color in ends)
    assert any(not torch.equal(red[key], blue[key]) for key in red)


def test_brackets_and_loras_of_a_caption_are_plain_text(base, tmp_path) -> None:
    pipe = open_base(base)
    pipe.save_pretrained(tmp_path / "weighting")
    index = tmp_path / "weighting" / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "weighting": "a1111", "overflow": "truncate"}))
    opened = train_lora.open_base(parse(tmp_path / "weighting", tmp_path / "run", "miniature:5"))
    assert (opened.weighting, opened.overflow) == (None, "window")


def items_of(base: Path, tmp_path: Path, **changes: Any) -> tuple[LoraTask, list[dict[str, Any]]]:
    """A task with an untrained LoRA, and the items of a batch with captions of every length."""
    pipe = open_base(base)
    pipe.register_to_config(**changes)
    data = open_dataset(write_folder(tmp_path / "data", [*CAPTIONS.values()], sizes=[(16, 16), (32, 16)]), "train")
    cut = partial(cut_bucket, factor=8)
    stored = precompute(data, pipe, 16, True, tmp_path / "out", captions=WHOLE, cut=cut)
    torch.manual_seed(0)
    task = LoraTask(pipe, Lora(pipe, 2, "attention", with_encoders=False), None)
    random = torch.Generator().manual_seed(0)
    items = []
    for index in range(len(stored)):
        item = {**stored[index], "timesteps": torch.tensor(100 + 300 * index), "dropped": False}
        items.append({**item, "noise": torch.randn(item["latents"].shape, generator=random)})
    return task, items


def test_pictures_of_all_sizes_and_lengths_count_the_same(base, tmp_path) -> None:
    task, items = items_of(base, tmp_path)
    assert len({item["latents"].shape for item in items}) == 2
    with torch.no_grad():
        alone = [task([item])["loss"].item() for item in items]
        assert task(items)["loss"].item() == pytest.approx(np.mean(alone), rel=1e-5)
        assert task([items[0]] * 3)["loss"].item() == pytest.approx(alone[0], rel=1e-5)


def test_a_cached_caption_trains_as_one_that_is_encoded_at_each_step(base, tmp_path) -> None:
    task, items = items_of(base, tmp_path)
    live = [{name: value for name, value in item.items() if name[:8] != "caption_"} for item in items]
    with torch.no_grad():
        assert task(live)["loss"].item() == pytest.approx(task(items)["loss"].item(), rel=1e-5)


@pytest.mark.parametrize("zeros", [True, False])
def test_a_dropped_caption_is_what_guidance_pushes_away_from(base, tmp_path, zeros) -> None:
    task, items = items_of(base, tmp_path, force_zeros_for_empty_prompt=zeros)
    with torch.no_grad():
        _, states, _, pooled = task.pipe.encode_prompt(CAPTIONS["short"], do_classifier_free_guidance=True)
        assert bool(states.any()) is not zeros
        expected = task([{**items[0], "caption_states": states[0], "caption_pooled": pooled[0]}])["loss"].item()
        live = {name: value for name, value in items[0].items() if name[:8] != "caption_"}
        for item in (items[0], live):
            assert task([{**item, "dropped": True}])["loss"].item() == pytest.approx(expected, rel=1e-5)
        assert task([items[0]])["loss"].item() != pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("share", "least", "most"), [("0", 0, 0), ("1", 300, 300), ("0.3", 60, 120)])
def test_captions_are_dropped_as_often_as_asked_for(base, tmp_path, pictures, share, least, most) -> None:
    stored = precompute(open_dataset(pictures, "train"), open_base(base), 16, True, tmp_path, captions=WHOLE)
    arguments = parse(base, tmp_path / "run", pictures, "--caption-dropout", share)
    source = train_lora.batches(stored, 1000, arguments, Accelerator(cpu=True), first=0)
    items = [item for _ in range(100) for item in next(source)]
    assert least <= sum(item["dropped"] for item in items) <= most
    timesteps = [item["timesteps"].item() for item in items]
    assert min(timesteps) < 50 < 950 < max(timesteps) < 1000


# Sizes


def test_buckets_have_the_pixels_of_the_square_and_steps_of_the_factor() -> None:
    for resolution, factor in ((1024, 8), (768, 8), (832, 8), (192, 16), (16, 8)):
        sizes = {
            bucket_of(width, height, resolution, factor)
            for width in range(1, 2000, 97)
            for height in range(1, 2000, 97)
        }
        assert (resolution, resolution) in sizes
        assert len(sizes) > 3
        for width, height in sizes:
            assert width * height <= resolution**2
            assert width % factor == height % factor == 0
            assert resolution / 2 <= min(width, height) <= max(width, height) <= 2 * resolution
            assert (height, width) in sizes


def test_a_picture_is_cut_to_its_bucket_and_time_ids_say_so(base) -> None:
    cut, time_ids = cut_bucket(Image.new("RGB", (1500, 1000)), 1024, 8)
    assert cut.size == (1216, 832)
    assert time_ids == [1000, 1500, 0, 16, 832, 1216]  # scaled to 1,248 by 832
    cut, time_ids = cut_bucket(Image.new("RGB", (100, 900)), 1024, 8)
    assert cut.size == (512, 2048)
    assert time_ids == [900, 100, 1280, 0, 2048, 512]


def test_squares_are_cut_if_that_is_asked_for(base, tmp_path, pictures, monkeypatch) -> None:
    shapes: dict[str, set[Any]] = {}
    for name, flags in {"square": ("--square",), "buckets": ()}.items():
        shapes[name] = set()
        monkeypatch.setattr(
            train_lora,
            "take_step",
            lambda arguments, accelerator, task, optimizer, lora, source, name=name: (
                shapes[name].update(tuple(item["latents"].shape) for item in next(source)) or {"loss": 0.0, "broken": 0}
            ),
        )
        train(base, tmp_path / name, pictures, *flags)
    assert len(shapes["square"]) == 1
    assert len(shapes["buckets"]) == 3


# What comes out


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--layers", "cross-attention"),
        ("--layers", "transformer"),
        ("--train-text-encoders",),
        ("--train-text-encoders", "--layers", "transformer"),
    ],
    ids=" ".join,
)
def test_both_files_load_and_do_what_was_trained(base, tmp_path, capsys, pictures, trained, flags) -> None:
    assert train(base, tmp_path / "run", pictures, *flags) == {"step": 3}
    last = tmp_path / "run" / "last"
    printed = capsys.readouterr().out
    assert f"result: {last / DIFFUSERS_FILE}" in printed
    assert f'"A LONG PROMPT" --base {base} --lora {last / DIFFUSERS_FILE}' in printed
    assert sorted(path.name for path in last.iterdir()) == [KOHYA_FILE, "manifest.json", DIFFUSERS_FILE]

    for name, state in trained["before"].items():  # nothing of SDXL has changed
        after = trained["pipe"].components[name].state_dict()
        for key, value in state.items():
            own = next(found for found in (key, key.replace(".weight", ".base_layer.weight"),
                       key.replace(".bias", ".base_layer.bias")) if found in after)  # fmt: skip
            assert torch.equal(after[own], value), key

    untouched = open_base(base)
    for file in (DIFFUSERS_FILE, KOHYA_FILE):
        loaded = open_base(base)
        loaded.load_lora_weights(str(last), weight_name=file)
        for prompt in CAPTIONS.values():
            found = predict(loaded, prompt)
            torch.testing.assert_close(found, predict(trained["pipe"], prompt), atol=1e-5, rtol=1e-4)
            assert not torch.allclose(found, predict(untouched, prompt), atol=1e-4)


@pytest.mark.parametrize("flags", [(), ("--train-text-encoders",)], ids=" ".join)
def test_stock_diffusers_loads_both_files_alike(base, tmp_path, pictures, flags) -> None:
    train(base, tmp_path / "run", pictures, *flags)
    pictures_of = {}
    for file in (None, DIFFUSERS_FILE, KOHYA_FILE):
        stock = StableDiffusionXLPipeline.from_pretrained(base)
        before = predict(stock, CAPTIONS["short"])
        stock.load_lora_weights(str(tmp_path / "run" / "last"), **({} if file is None else {"weight_name": file}))
        assert {*stock.get_list_adapters()} == ({"unet", "text_encoder", "text_encoder_2"} if flags else {"unet"})
        pictures_of[file] = predict(stock, CAPTIONS["short"])
        assert not torch.allclose(pictures_of[file], before, atol=1e-4)
    assert torch.equal(pictures_of[None], pictures_of[DIFFUSERS_FILE])
    torch.testing.assert_close(pictures_of[KOHYA_FILE], pictures_of[DIFFUSERS_FILE])


def test_kohyas_layout_has_its_names_and_says_what_it_is_for(base, tmp_path, pictures) -> None:
    train(base, tmp_path / "run", pictures, "--train-text-encoders", "--layers", "transformer")
    with safe_open(tmp_path / "run" / "last" / KOHYA_FILE, "pt") as file:
        names, metadata = {*file.keys()}, file.metadata()
        alphas = {file.get_tensor(name).item() for name in names if name.endswith(".alpha")}
    for layer in (
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k",
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0",
        "lora_unet_up_blocks_0_attentions_1_transformer_blocks_0_ff_net_0_proj",
        "lora_unet_up_blocks_0_attentions_1_proj_in",
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
        "lora_te2_text_model_encoder_layers_2_mlp_fc1",
    ):
        assert {f"{layer}.{end}" for end in ("lora_down.weight", "lora_up.weight", "alpha")} <= names
    assert alphas == {2}
    assert not [name for name in names if "te1_text_model_encoder_layers_2" in name]  # the UNet gets nothing of it
    assert metadata["ss_base_model_version"] == "sdxl_base_v1-0"
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("2", "2")


def test_gradients_reach_all_that_is_trained_even_if_all_captions_are_dropped(base, tmp_path) -> None:
    """Several processes would wait for a parameter without a gradient."""
    pipe = open_base(base)
    lora = Lora(pipe, 2, "transformer", with_encoders=True)
    with torch.no_grad():
        for parameter in lora.parameters:
            parameter += 0.1
    _, items = items_of(base, tmp_path)
    for dropped in (False, True):
        live = [{name: value for name, value in item.items() if name[:8] != "caption_"} for item in items]
        LoraTask(pipe, lora, None)([{**item, "dropped": dropped} for item in live])["loss"].backward()
        assert all(parameter.grad is not None for parameter in lora.parameters)
        assert dropped or all(parameter.grad.any() for parameter in lora.parameters)
        for parameter in lora.parameters:
            parameter.grad = None


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--train-text-encoders",)], ids=" ".join)
def test_the_loss_falls(base, tmp_path, monkeypatch, flags) -> None:
    history = record_figures(monkeypatch)
    captions = write_folder(tmp_path / "data", [CAPTIONS["long"]] * 3)
    train(base, tmp_path / "run", captions, *flags, *["--steps", "60", "--layers", "transformer", "--rank", "8"])
    first, last = ([history[step]["loss"] for step in steps] for steps in (range(1, 11), range(51, 61)))
    assert np.mean(last) < 0.98 * np.mean(first)


def test_bfloat16_trains_as_well(base, tmp_path, monkeypatch, pictures) -> None:
    history = record_figures(monkeypatch)
    train(base, tmp_path, pictures, "--mixed-precision", "bf16", "--train-text-encoders", "--steps", "2")
    assert all(np.isfinite(figure) for figures in history.values() for figure in figures.values())
    assert {value.dtype for value in weights(tmp_path).values()} == {torch.float32}


@pytest.mark.slow
def test_gradient_checkpointing_changes_nothing(base, tmp_path, pictures) -> None:
    for name, flags in {"plain": (), "saving": ("--gradient-checkpointing",)}.items():
        train(base, tmp_path / name, pictures, "--train-text-encoders", *flags)
    plain, saving = weights(tmp_path / "plain"), weights(tmp_path / "saving")
    for key in plain:
        torch.testing.assert_close(plain[key], saving[key], atol=1e-5, rtol=1e-4)


def test_a_picture_that_cannot_be_read_is_named_and_left_out(base, tmp_path, capsys) -> None:
    captions = write_folder(tmp_path / "data", [CAPTIONS["long"]] * 4)
    (tmp_path / "data" / "2.png").write_bytes(b"no image")
    train(base, tmp_path / "run", captions)
    assert f"skipped: {tmp_path / 'data' / '2.png'} cannot be read" in capsys.readouterr().out


def test_a_changed_caption_is_encoded_again(base, tmp_path, capsys) -> None:
    captions = write_folder(tmp_path / "data", [CAPTIONS["long"]] * 3)
    shared = ("--precomputed", str(tmp_path / "shared"))
    train(base, tmp_path / "one", captions, *shared)
    (tmp_path / "data" / "1.txt").write_text(CAPTIONS["windowed"])
    capsys.readouterr()
    train(base, tmp_path / "two", captions, *shared)
    assert "1 of 1 files are encoded again, since captions or images have changed" in capsys.readouterr().out


def test_without_arguments_the_miniature_is_trained() -> None:
    arguments = train_lora.parse([])
    for name, value in read_preset(train_lora.MINIATURE).items():
        assert getattr(arguments, name) == value
    arguments = train_lora.parse(["--base", "other", "--captions", "folder:pictures"])
    for name, value in read_preset(train_lora.SDXL).items():
        assert getattr(arguments, name) == value


# What a stop costs


def stop_before_step(step: int, monkeypatch: pytest.MonkeyPatch, *inputs: Any) -> None:
    schedule, left = train_lora.learning_rate_factor, iter(range(step))

    def interrupted(*numbers: int) -> float:
        if next(left, None) is None:
            raise Stop
        return schedule(*numbers)

    with monkeypatch.context() as patch:
        patch.setattr(train_lora, "learning_rate_factor", interrupted)
        with pytest.raises(Stop):
            train(*inputs)


@pytest.mark.parametrize(
    "flags", [(), ("--train-text-encoders",), ("--gradient-accumulation-steps", "3")], ids=" ".join
)
def test_a_run_goes_on_as_if_nothing_had_happened(base, tmp_path, monkeypatch, pictures, flags) -> None:
    flags = ("--steps", "5", *flags)
    train(base, tmp_path / "whole", pictures, *flags)
    stop_before_step(3, monkeypatch, base, tmp_path / "stopped", pictures, *flags)
    assert (tmp_path / "stopped" / "last").is_dir()  # as of the checkpoint
    history = record_figures(monkeypatch)
    train(base, tmp_path / "stopped", pictures, *flags)
    assert list(history) == [3, 4, 5]
    assert_same_weights(tmp_path / "whole", tmp_path / "stopped")


class KillAtStep:
    """Before a step of this number, counted from where the run begins."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self) -> None:
        schedule, left = train_lora.learning_rate_factor, iter(range(self.step))

        def deadly(*numbers: int) -> float:
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return schedule(*numbers)

        train_lora.learning_rate_factor = deadly


def train_until_killed(arguments: Namespace, kill: Callable[[], None]) -> None:
    """Of a process: `kill` prepares its end."""
    torch.set_num_threads(1)
    kill()
    train_lora.train(arguments)


@pytest.mark.slow
def test_a_kill_costs_nothing_of_the_result(base, tmp_path, pictures) -> None:
    def run(out: Path, kill: Callable[[], None]) -> int | None:
        process = processes.Process(target=train_until_killed, args=(parse(base, out, pictures), kill))
        process.start()
        process.join(timeout=120)
        return process.exitcode

    assert run(tmp_path / "whole", nothing) == 0
    kills = [
        KillAtStep(1),
        KillIn(os, "rename", "step-0000002"),
        KillIn(lora_module, "save_file", KOHYA_FILE, half=b"half of it"),
        KillAtStep(0),
        KillIn(os, "rename", "last"),
    ]
    assert [run(tmp_path / "killed", kill) for kill in kills] == [-signal.SIGKILL] * len(kills)
    assert run(tmp_path / "killed", nothing) == 0
    assert_same_weights(tmp_path / "whole", tmp_path / "killed")


def test_a_stop_between_the_last_checkpoint_and_the_result_loses_none(base, tmp_path, monkeypatch, pictures) -> None:
    train(base, tmp_path / "whole", pictures)
    save = train_lora.save_lora

    def stop(*inputs: Any) -> None:
        if (tmp_path / "stopped" / "checkpoints" / "step-0000003").exists():
            raise Stop
        save(*inputs)

    with monkeypatch.context() as patch:
        patch.setattr(train_lora, "save_lora", stop)
        with pytest.raises(Stop):
            train(base, tmp_path / "stopped", pictures)
    with pytest.raises(AssertionError):
        assert_same_weights(tmp_path / "whole", tmp_path / "stopped")
    train(base, tmp_path / "stopped", pictures)
    assert_same_weights(tmp_path / "whole", tmp_path / "stopped")


def test_a_complete_run_trains_no_further_and_says_so(base, tmp_path, capsys, monkeypatch, pictures) -> None:
    progress = train(base, tmp_path, pictures)
    before, history = weights(tmp_path), record_figures(monkeypatch)
    capsys.readouterr()
    assert train(base, tmp_path, pictures) == progress
    assert f"{tmp_path} is complete, with 3 steps: nothing is left to train." in capsys.readouterr().out
    assert not history
    assert all(torch.equal(value, before[key]) for key, value in weights(tmp_path).items())


# Two processes


def work_on_a_run(process: int, arguments: Namespace) -> None:
    assert Accelerator(cpu=True).num_processes == 2
    forget_accelerator()
    train_lora.train(arguments)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--train-text-encoders", "--caption-dropout", "0.7")], ids=" ".join)
def test_two_processes_train_what_one_does_with_two_batches_a_step(base, tmp_path, pictures, flags) -> None:
    train(base, tmp_path / "one", pictures, *flags, "--gradient-accumulation-steps", "2")
    on_two_processes(work_on_a_run, parse(base, tmp_path / "two", pictures, *flags))
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == two.keys()
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, atol=1e-4, rtol=1e-3)
    with pytest.raises(ValueError, match="processes was 2 and is 1"):
        train(base, tmp_path / "two", pictures, *flags)


# What is refused


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--base no/such/folder", "no/such/folder"),
        ("--rank 0", "--rank: expected a whole number above 0 instead of 0"),
        ("--steps 0", "--steps: expected a whole number above 0 instead of 0"),
        ("--caption-dropout 1.5", "--caption-dropout: expected a number of at most 1 instead of 1.5"),
        ("--layers all", "--layers: invalid choice: 'all'"),
        ("--resolution 60", "--resolution is 60; expected a multiple of 8, such as 56"),
        ("--captions txt:captions.txt", "txt:captions.txt has no images: pass captions with images"),
        ("--captions folder:gone", "gone does not exist, or is no folder: pass the folder of the data set"),
        ("--captions folder:", "folder: names no path: pass folder:PATH"),
        ("--batch-size 25", "The data set has 6 images, which do not fill one batch of 25"),
        ("--images there", "are beside their captions: pass no folder of images with it"),
        ("--finelip no/such/file.pt", "no/such/file.pt does not exist"),
        ("--conditioning-adapter no/such/folder", "no/such/folder"),
        ("--mixed-precision fp16", "--mixed-precision fp16 needs a GPU: on the CPU pass bf16, or no"),
        ("--base-config there", "goes with a single file, but"),
        ("--snr-gamma 0", "--snr-gamma: expected a number above 0 instead of 0"),
    ],
)
def test_refuses_in_one_sentence(base, tmp_path, capsys, pictures, flags, expected) -> None:
    common = f"--base {base} --captions {pictures} --batch-size 3 --resolution 16 --cpu --output-dir {tmp_path / 'run'}"
    assert expected in refusal(train_lora, capsys, *common.split(), *flags.split())
    assert not (tmp_path / "run" / "checkpoints").exists()


def without_caption(folder: Path) -> None:
    (folder / "1.txt").unlink()


def without_pictures(folder: Path) -> None:
    for file in folder.glob("*.png"):
        file.unlink()


def with_an_empty_caption(folder: Path) -> None:
    (folder / "1.txt").write_text(" \n")


def with_a_caption_of_two(folder: Path) -> None:
    Image.new("RGB", (16, 16)).save(folder / "1.jpg")


def with_a_caption_that_is_too_long(folder: Path) -> None:
    (folder / "1.txt").write_text("word " * 5000)


def with_broken_pictures_alone(folder: Path) -> None:
    for file in folder.glob("*.png"):
        file.write_bytes(b"no image")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (without_caption, "1.png has no caption: write {}/1.txt, or leave the picture out"),
        (without_pictures, "{} has no pictures (.png, .jpg,"),
        (with_an_empty_caption, "has no caption, or an empty one, for {}/1.png: add it or leave the image out"),
        (with_a_caption_of_two, "{}/1.jpg and {}/1.png share one name, and so one caption: leave only one of them"),
        (with_a_caption_that_is_too_long, "The caption of {}/1.png has 24,999 characters, where at most 20,000"),
        (with_broken_pictures_alone, "None of the 3 images can be read: see the messages above"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_fault_of_the_folder_is_named(base, tmp_path, capsys, change, expected) -> None:
    folder = tmp_path / "data"
    captions = write_folder(folder, [CAPTIONS["short"]] * 3)
    change(folder)
    flags = f"--base {base} --captions {captions} --batch-size 1 --resolution 16 --cpu --output-dir {tmp_path / 'run'}"
    assert expected.replace("{}", str(folder)) in refusal(train_lora, capsys, *flags.split())


def test_a_full_disk_ends_the_run_in_a_sentence_and_spoils_nothing(base, tmp_path, capsys, pictures) -> None:
    train(base, tmp_path, pictures, "--steps", "2")
    before = weights(tmp_path)
    flags = f"--base {base} --captions {pictures} --batch-size 3 --resolution 16 --cpu --rank 512 --steps 1"
    with files_of_at_most(1_500_000):
        message = refusal(train_lora, capsys, *flags.split(), "--output-dir", str(tmp_path / "full"))
    assert "cannot be written to" in message
    assert not list((tmp_path / "full").glob("last*"))
    assert all(torch.equal(value, before[key]) for key, value in weights(tmp_path).items())


def test_refuses_to_go_on_with_other_settings(base, tmp_path, capsys, pictures) -> None:
    train(base, tmp_path, pictures)
    flags = f"--base {base} --output-dir {tmp_path} --cpu --captions {pictures} --batch-size 3 --resolution 16"
    flags += " --steps 3 --learning-rate 1e-2 --rank 2"
    shutil.rmtree(tmp_path / "precomputed")
    for change, expected in {
        "--seed 1": "seed was 0 and is 1",
        "--rank 4": "rank was 2 and is 4",
        "--layers transformer": "layers was attention and is transformer",
        "--train-text-encoders": "train-text-encoders was False and is True",
    }.items():
        message = refusal(train_lora, capsys, *flags.split(), *change.split())
        assert message.endswith(f"holds a run with other settings ({expected}): pass another folder.")
        assert not (tmp_path / "precomputed").exists()  # refused before images are encoded
    train_lora.main([*flags.split(), "--checkpointing-steps", "7"])


def test_a_run_that_diverges_stops_at_its_step(base, tmp_path, pictures) -> None:
    with pytest.raises(ValueError, match="training has diverged, and nothing of this is saved"):
        train(base, tmp_path, pictures, *["--learning-rate", "1e9", "--max-grad-norm", "0", "--steps", "60"])
    assert not (tmp_path / "last").exists() or np.isfinite(sum(value.sum() for value in weights(tmp_path).values()))


def test_refuses_another_base_without_captions(capsys) -> None:
    message = refusal(train_lora, capsys, "--base", "other")
    assert message == "--base other needs --captions, such as folder:pictures (see --help)"


# The miniature


@pytest.mark.slow
def test_the_miniature_is_trained_with_its_finelips_and_adapter(tmp_path, trained) -> None:
    flags = f"--captions miniature:4 --steps 1 --batch-size 2 --cpu --output-dir {tmp_path}"
    train_lora.train(train_lora.parse(flags.split()))
    assert trained["pipe"].conditioning_adapter is not None
    pipe = FineLIPSDXLPipeline.from_pretrained("miniature")
    pipe.load_lora_weights(str(tmp_path / "last"))
