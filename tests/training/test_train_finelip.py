"""The training recipe: what it optimizes, on one process and two; what a kill costs; and what it refuses."""

import csv
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoTokenizer, CLIPConfig, CLIPModel

from finelip_sdxl import (
    FineLIPConfig,
    FineLIPModel,
    files,
    late_interaction,
    load_finelip,
    triplet_margin_loss,
)
from finelip_sdxl.data import load_image_processor, load_tokenizer
from finelip_sdxl.stretch import KEEP, stretch_positions
from finelip_sdxl.text_encoders import POSITION_TABLE
from finelip_sdxl.training import command_line
from finelip_sdxl.training.processes import held
from finelip_sdxl.training.task import LOSSES, FineLIPTask, FrozenTeacher
from tests.helpers.recipes import KillIn, Stop, die, forget_accelerator, nothing, on_two_processes, processes, refusal
from training import train_finelip

SCRIPT = Path(train_finelip.__file__)
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
ALL_LOSSES = (
    "--triplet-weight",
    "0.1",
    "--contrastive-weight",
    "1",
    "--fine-contrastive-weight",
    "0.1",
    "--region-weight",
    "1",
    "--distillation-weight",
    "1",
)
FINE_CONTRAST = ("--fine-contrastive-weight", "0")
TRIPLET_ONLY = (*FINE_CONTRAST, "--contrastive-weight", "0", "--region-weight", "0", "--distillation-weight", "0")


# Processes are forked from one that has no threads, and has imported what takes long.
@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A plain CLIP of 77 positions that knows the miniature's words, with tokenizer and image processor."""
    return save_clip(tmp_path_factory.mktemp("base") / "clip")


@pytest.fixture(autouse=True)
def one_thread_and_no_state() -> Any:
    """Sums are the same bit for bit, and no accelerator hears of the one before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    forget_accelerator()
    torch.set_num_threads(threads)


@pytest.fixture
def history(monkeypatch) -> dict[int, dict[str, float]]:
    """What is logged, by step."""
    return record_figures(monkeypatch.setattr)


def record_figures(setattr_: Callable) -> dict[int, dict[str, float]]:
    figures: dict[int, dict[str, float]] = {}
    setattr_(Accelerator, "log", lambda self, values, step: figures.update({step: dict(values)}))
    return figures


def save_clip(folder: Path, width: int = 16, dropout: float = 0.0) -> Path:
    tokenizer = load_tokenizer("miniature-clip-1", 77)
    small = {**SMALL, "hidden_size": width, "attention_dropout": dropout, "initializer_factor": 3.0}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text, vision = {"vocab_size": len(tokenizer), **ids}, {"image_size": 96, "patch_size": 32}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config={**small, **text}, vision_config={**small, **vision}, projection_dim=16))
    for part in (model, tokenizer, load_image_processor("miniature-clip-1", 96)):
        part.save_pretrained(folder)
    return folder


def parse(base: Path, out: Path, *flags: str) -> Any:
    """Six steps of all losses on 20 scenes, four batches an epoch; flags change it."""
    common = f"--base {base} --output-dir {out} --cpu --data miniature:20 --batch-size 5 --max-steps 6"
    common += " --checkpointing-steps 2"
    return train_finelip.parse([*common.split(), *ALL_LOSSES, "--learning-rate", "1e-3", "--warmup-steps", "2", *flags])


def train(base: Path, out: Path, *flags: str) -> dict[str, Any]:
    forget_accelerator()
    return train_finelip.train(parse(base, out, *flags))


def weights(out: Path) -> dict[str, Tensor]:
    return load_file(out / "last" / "model.safetensors")


def checkpoints(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def assert_same_weights(one: Path, other: Path) -> None:
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


def write_csv(folder: Path, size: int = 10, broken: tuple[int, ...] = ()) -> Path:
    """Noise of 8 × 8 pixels with captions of three sentences."""
    folder.mkdir()
    rows = []
    for k in range(size):
        pixels = np.random.default_rng(k).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{k}.png")
        if k in broken:
            (folder / f"{k}.png").write_bytes(b"no image")
        rows.append([f"{k}.png", f"Number {k}. A red star is here. A blue ring of size {k % 3} is there."])
    with (folder / "captions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["image", "caption"], *rows])
    return folder / "captions.csv"


# What is optimized


def test_loss_falls_on_scenes_that_are_seen_again_and_again(base, tmp_path, history) -> None:
    train(
        base,
        tmp_path,
        "--data",
        "miniature:5",
        "--max-steps",
        "40",
        "--learning-rate",
        "1e-2",
        "--loss-warmup-epochs",
        "0",
    )
    first, last = history[1], history[40]
    for name in ("loss", *LOSSES):
        assert last[name] < 0.9 * first[name], name
    assert last["loss"] == pytest.approx(
        0.1 * (last["triplet"] + last["fine_contrastive"])
        + last["contrastive"]
        + last["region"]
        + last["distillation"],
        rel=1e-5,
    )


def test_figures_are_plain_numbers(base, tmp_path, history) -> None:
    train(base, tmp_path, "--max-steps", "1", "--eval-data", "miniature:5")
    assert all(type(figure) is float for figure in history[1].values())
    assert 0 <= history[1]["recall"] <= 1
    json.dumps(history)


def test_warm_up_then_half_a_cosine() -> None:
    rates = [train_finelip.learning_rate_factor(step, warmup=4, steps=10) for step in range(10)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[7] == pytest.approx(0.5)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 0 < rates[9] < 0.1
    assert train_finelip.learning_rate_factor(0, warmup=0, steps=1) == 1


def test_learning_rates_follow_the_schedule(base, tmp_path, history) -> None:
    train(base, tmp_path, "--max-steps", "5")
    expected = [1e-3 * train_finelip.learning_rate_factor(step, warmup=2, steps=5) for step in range(5)]
    assert [history[step]["learning_rate"] for step in range(1, 6)] == pytest.approx(expected)


def test_gradients_ramp_up_over_epochs_and_the_losses_shown_do_not(base, tmp_path, history, monkeypatch) -> None:
    backward, ramped = Accelerator.backward, []
    monkeypatch.setattr(
        Accelerator, "backward", lambda self, loss: (ramped.append(loss.item()), backward(self, loss))[1]
    )
    train(base, tmp_path, "--max-steps", "6", "--loss-warmup-epochs", "1")  # an epoch has four batches
    shares = [loss / history[step]["loss"] for step, loss in enumerate(ramped, 1)]
    assert shares == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])


def test_an_epoch_is_all_batches_of_the_data(base, tmp_path) -> None:
    arguments = parse(base, tmp_path, "--epochs", "1.5")
    arguments.max_steps = None
    assert train_finelip.train(arguments)["step"] == 6


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_of_weight_0_is_off(base, tmp_path, history, name) -> None:
    others = [flag for other in LOSSES if other != name for flag in (f"--{other.replace('_', '-')}-weight", "0")]
    train(base, tmp_path, "--max-steps", "1", *others)
    assert set(LOSSES) & history[1].keys() == {name}


def test_the_papers_losses_need_no_regions(base, tmp_path, history) -> None:
    data = f"csv:{write_csv(tmp_path / 'data')}"
    arguments = train_finelip.parse(["--base", str(base), "--data", data, "--batch-size", "5", "--cpu"])
    assert (arguments.triplet_weight, arguments.region_weight, arguments.eval_data) == (1, 0, "none")
    arguments.max_steps, arguments.output_dir = 1, tmp_path / "run"
    train_finelip.train(arguments)
    assert history[1]["loss"] == history[1]["triplet"] > 0


def test_phrases_are_compared_with_the_patches_of_their_boxes() -> None:
    model = make_model()
    objective = FineLIPTask(model, {}, margin=0.2, hardest=False)
    generator = torch.Generator().manual_seed(0)
    texts = torch.randn(2, 4, 10, generator=generator, dtype=torch.float64)
    images = torch.randn(2, 10, 10, generator=generator, dtype=torch.float64)  # the class token and 3 × 3 patches
    regions = {
        "row": torch.tensor([0, 1, 1]),
        "token": torch.tensor([2, 1, 3]),
        "label": torch.tensor([0, 1, 0]),  # the third looks like the first, which is no negative of it
        "weight": torch.tensor([1.0, 1.0, 4.0]),
        "box": torch.tensor([[0, 0, 1 / 3, 1 / 3], [1 / 3, 0, 1, 1 / 3], [0, 1 / 3, 1, 1]]),
    }
    target = [images[0, 1], images[1, 2] + images[1, 3], images[1, 4:].sum(dim=0)]
    student = [texts[0, 2], texts[1, 1], texts[1, 3]]
    scale = model.logit_scale.exp().item()
    logits = scale * torch.stack([torch.cosine_similarity(a, torch.stack(target), dim=-1) for a in student])
    costs = [
        -logits[0, [0, 1]].log_softmax(0)[0],
        -logits[1].log_softmax(0)[1],
        -logits[2, [1, 2]].log_softmax(0)[1],
    ]
    expected = (costs[0] + costs[1] + 4 * costs[2]) / 6
    torch.testing.assert_close(objective._region_loss(texts, images, regions), expected, atol=1e-6, rtol=0)
    nothing = {name: value[:0] for name, value in regions.items()}
    assert objective._region_loss(texts, images, nothing) == 0


def test_the_pull_is_towards_what_stock_reads(base, tmp_path) -> None:
    stock = CLIPModel.from_pretrained(base)
    model = train_finelip.load_base(parse(base, tmp_path))
    input_ids = torch.randint(0, 800, (2, 77), generator=torch.Generator().manual_seed(0))
    input_ids[:, 40] = load_tokenizer(base).eos_token_id
    states, embeds = FrozenTeacher(model).encode(input_ids)
    with torch.no_grad():
        expected = stock.text_model(input_ids=input_ids, output_hidden_states=True)
        assert torch.equal(states, expected.hidden_states[-2])
        assert torch.equal(embeds, stock.text_projection(expected.pooler_output))


def test_accumulated_losses_are_means_over_batches(base, tmp_path, history) -> None:
    still = ("--learning-rate", "0", "--refinement-learning-rate", "0", "--loss-warmup-epochs", "0")
    train(base, tmp_path / "two", *still, "--max-steps", "2")
    two = [history[step] for step in (1, 2)]
    train(base, tmp_path / "accumulated", *still, "--max-steps", "1", "--gradient-accumulation-steps", "2")
    for name in ("loss", *LOSSES):
        assert history[1][name] == pytest.approx((two[0][name] + two[1][name]) / 2, rel=1e-6), name


def test_two_accumulated_batches_are_one_of_twice_the_size_for_a_loss_of_single_pairs(base, tmp_path, history) -> None:
    pull = ("--triplet-weight", "0", "--contrastive-weight", "0", "--region-weight", "0", "--max-steps", "3")
    pull = (*pull, *FINE_CONTRAST)
    train(base, tmp_path / "large", *pull, "--batch-size", "10", "--loss-warmup-epochs", "0")
    large = [history[step]["distillation"] for step in (1, 2, 3)]
    train(base, tmp_path / "accumulated", *pull, "--gradient-accumulation-steps", "2", "--loss-warmup-epochs", "0")
    assert [history[step]["distillation"] for step in (1, 2, 3)] == pytest.approx(large, rel=1e-4)
    assert large[2] < large[0]


def test_an_accumulated_gradient_is_clipped_once(base, tmp_path, monkeypatch) -> None:
    clip, norms = Accelerator.clip_grad_norm_, []
    monkeypatch.setattr(
        Accelerator, "clip_grad_norm_", lambda self, *inputs: norms.append(clip(self, *inputs)) or norms[-1]
    )
    train(base, tmp_path, "--gradient-accumulation-steps", "2", "--max-steps", "2", "--max-grad-norm", "0.5")
    assert len(norms) == 2
    assert all(norm > 0 for norm in norms)


def test_gradient_checkpointing_changes_nothing(base, tmp_path) -> None:
    train(base, tmp_path / "plain", "--max-steps", "2")
    train(base, tmp_path / "checkpointing", "--max-steps", "2", "--gradient-checkpointing")
    plain, checkpointing = weights(tmp_path / "plain"), weights(tmp_path / "checkpointing")
    for key in plain:
        torch.testing.assert_close(plain[key], checkpointing[key], atol=1e-6, rtol=1e-5)


def test_bfloat16_trains_float32_weights(base, tmp_path, history) -> None:
    train(base, tmp_path, "--max-steps", "2", "--mixed-precision", "bf16")
    assert {tensor.dtype for tensor in weights(tmp_path).values()} == {torch.float32}
    assert all(np.isfinite(history[2][name]) for name in ("loss", *LOSSES))


# What comes out


def test_the_first_positions_stay_bit_for_bit(base, tmp_path) -> None:
    train(base, tmp_path, "--weight-decay", "0.5", "--learning-rate", "1e-2")
    trained = weights(tmp_path)[POSITION_TABLE]
    stretched = stretch_positions(load_file(base / "model.safetensors")[POSITION_TABLE])
    assert torch.equal(trained[:KEEP], stretched[:KEEP])
    assert (trained[KEEP:180] != stretched[KEEP:180]).any(dim=1).all()  # no caption is shorter


def test_models_load_with_their_tokenizer_and_are_bases_again(base, tmp_path, capsys) -> None:
    flags = ("--eval-data", "miniature:10", "--eval-every", "2", "--max-steps", "4")
    progress = train(base, tmp_path, *flags)
    printed = capsys.readouterr().out
    assert f"result: {tmp_path / 'best'}" in printed
    assert f"finelip-sdxl evaluate retrieval --model {tmp_path / 'best'}" in printed.splitlines()[-2]
    assert printed.index("disk: about") < printed.index("done: 4 steps")
    assert progress["best"] is not None
    for name in ("best", "last"):
        folder = tmp_path / name
        config = json.loads((folder / "config.json").read_text())["text_config"]
        assert not {"stretched_from", "stretch_keep", "stretch_factor"} & config.keys()
        model = load_finelip(folder)
        assert model.config.text_config.max_position_embeddings == 248
        assert model.image_refinement is not None
        assert AutoTokenizer.from_pretrained(folder).model_max_length == 248
        assert load_tokenizer(folder)("a red star").input_ids == load_tokenizer(base)("a red star").input_ids
        assert load_image_processor(folder, 96).image_mean == load_image_processor(base, 96).image_mean
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "checkpoints", "last"]

    # A rate of 0 shows that the refinement goes on too, instead of being made anew.
    again = tmp_path / "again"
    train(tmp_path / "last", again, "--learning-rate", "0", "--refinement-learning-rate", "0", "--max-steps", "1")
    assert_same_weights(tmp_path, again)


def test_best_is_the_model_of_the_best_score_also_after_a_stop(base, tmp_path, monkeypatch) -> None:
    scores = iter([0.3, 0.5, 0.4, 0.45, 0.2, 0.1])
    score = lambda result: {"recall": next(scores)}  # noqa: E731
    monkeypatch.setattr(train_finelip, "retrieval_figures", score)
    flags = ("--eval-data", "miniature:5", "--eval-every", "1")
    stop_before_step(4, base, tmp_path, monkeypatch, *flags)
    best = load_file(tmp_path / "best" / "model.safetensors")
    assert train(base, tmp_path, *flags)["best"] == 0.5
    assert all(torch.equal(best[key], tensor) for key, tensor in load_file(tmp_path / "best/model.safetensors").items())
    assert not torch.equal(best["text_projection.weight"], weights(tmp_path)["text_projection.weight"])


def test_an_image_that_cannot_be_read_is_named_and_counted_and_the_run_goes_on(base, tmp_path, capsys) -> None:
    data = write_csv(tmp_path / "data", broken=(3,))
    progress = train(base, tmp_path / "run", "--data", f"csv:{data}", *TRIPLET_ONLY, "--max-steps", "4")
    printed = capsys.readouterr().out
    assert printed.count(f"skipped: {data.parent / '3.png'} cannot be read") == 2  # once in each of two epochs
    assert progress["skipped"] == 2
    saved = json.loads((tmp_path / "run" / "checkpoints" / "step-0000004" / "progress.json").read_text())
    assert saved["skipped"] == 2


def test_missing_images_are_left_out_and_counted_if_that_is_asked_for(base, tmp_path, capsys) -> None:
    data = write_csv(tmp_path / "data")
    for number in (3, 4):
        (tmp_path / "data" / f"{number}.png").unlink()
    flags = ("--data", f"csv:{data}", *TRIPLET_ONLY, "--max-steps", "2")
    assert train(base, tmp_path / "run", *flags, "--skip-missing-images")["skipped"] == 0
    printed = capsys.readouterr().out
    first = tmp_path / "data" / "3.png"
    assert f"2 of 10 images of csv:{data} are not there and are left out; first {first}.\n" in printed
    assert "skipped:" not in printed


def test_tensorboard_shows_every_step(base, tmp_path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(base, tmp_path, "--report-to", "tensorboard", "--max-steps", "3", "--eval-data", "miniature:5")
    events = EventAccumulator(str(tmp_path / "train_finelip")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]
    assert [event.step for event in events.Scalars("fused_image_to_text")] == [3]


# What a stop costs


def stop_before_step(step: int, base: Path, out: Path, monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    """Train up to the step of this number, from 0, whose learning rate is the last that is asked for."""
    schedule = train_finelip.learning_rate_factor

    def interrupted(now: int, *rest: int) -> float:
        if now == step:
            raise Stop
        return schedule(now, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(train_finelip, "learning_rate_factor", interrupted)
        with pytest.raises(Stop):
            train(base, out, *flags)


@pytest.mark.parametrize(
    ("flags", "stop"),
    [
        ((), 3),  # in the middle of the first epoch, a step after a checkpoint
        ((), 4),  # at the epoch's end
        (("--gradient-accumulation-steps", "3"), 3),  # in the second of an epoch's one and a third steps
        (("--dataloader-num-workers", "2", "--prefix-padding", "5", "--sample-sentences", "0.5"), 5),
        (("--loss-warmup-epochs", "1.5", "--warmup-steps", "5"), 3),
    ],
    ids=["middle", "end", "gradient_accumulation_steps", "dataloader_num_workers", "ramp"],
)
def test_a_run_goes_on_as_if_nothing_had_happened(base, tmp_path, monkeypatch, history, flags, stop) -> None:
    train(base, tmp_path / "whole", *flags)
    whole = dict(history)
    stop_before_step(stop, base, tmp_path / "stopped", monkeypatch, *flags)
    assert checkpoints(tmp_path / "stopped")[-1] == f"step-{stop // 2 * 2:07d}"
    history.clear()
    train(base, tmp_path / "stopped", *flags)
    assert list(history) == list(range(stop // 2 * 2 + 1, 7))
    for step, figures in history.items():
        figures.pop("pairs_per_second"), whole[step].pop("pairs_per_second")
        assert figures == whole[step]
    assert_same_weights(tmp_path / "whole", tmp_path / "stopped")
    assert checkpoints(tmp_path / "stopped") == ["step-0000004", "step-0000006"]


def test_dropout_goes_on_as_well(tmp_path, monkeypatch) -> None:
    base = save_clip(tmp_path / "clip", dropout=0.3)
    train(base, tmp_path / "whole")
    stop_before_step(3, base, tmp_path / "stopped", monkeypatch)
    train(base, tmp_path / "stopped")
    assert_same_weights(tmp_path / "whole", tmp_path / "stopped")


def test_shards_go_on_as_well(base, tmp_path, monkeypatch) -> None:
    pytest.importorskip("webdataset")
    folder = write_csv(tmp_path / "data", size=12).parent
    for number in range(2):
        with tarfile.open(folder / f"{number}.tar", "w") as shard:
            for k in range(number, 12, 2):
                (folder / f"{k}.txt").write_text(f"Number {k}. A red star is here.")
                for suffix in ("png", "txt"):
                    shard.add(folder / f"{k}.{suffix}", f"{k}.{suffix}")
    flags = ("--data", f"webdataset:{folder}/{{0..1}}.tar", "--epoch-size", "20", *TRIPLET_ONLY)
    train(base, tmp_path / "whole", *flags)
    stop_before_step(3, base, tmp_path / "stopped", monkeypatch, *flags)
    train(base, tmp_path / "stopped", *flags)
    assert_same_weights(tmp_path / "whole", tmp_path / "stopped")


def test_a_complete_run_trains_no_further_and_says_so(base, tmp_path, capsys, history) -> None:
    progress = train(base, tmp_path, "--max-steps", "2")
    before = weights(tmp_path)
    history.clear()
    capsys.readouterr()
    assert train(base, tmp_path, "--max-steps", "2") == progress
    assert f"{tmp_path} is complete, with 2 steps" in capsys.readouterr().out
    assert not history
    assert all(torch.equal(before[key], tensor) for key, tensor in weights(tmp_path).items())


def train_until_killed(arguments: Any, log: Path, kill: Callable[[], None]) -> None:
    """Of a process: train, and write down which images each step sees; `kill` prepares its end."""
    torch.set_num_threads(1)
    schedule, to_device = train_finelip.learning_rate_factor, train_finelip.send_to_device
    steps: list[int] = []

    def logged_schedule(step: int, *rest: int) -> float:
        steps.append(step)
        return schedule(step, *rest)

    def logged_to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
        if "ids" in batch:
            with log.open("a") as file:
                file.write(json.dumps([steps[-1], batch["ids"].tolist()]) + "\n")
        return to_device(batch, device)

    train_finelip.learning_rate_factor, train_finelip.send_to_device = logged_schedule, logged_to_device
    kill()
    train_finelip.train(arguments)


class KillAfter:
    """Some time after a step began; both are drawn by the seed."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(seed)
        self.steps, self.seconds = rng.randint(1, 3), rng.uniform(0, 0.05)

    def __call__(self) -> None:
        schedule, steps = train_finelip.learning_rate_factor, itertools.count(1)

        def started(*inputs: int) -> float:
            if next(steps) == self.steps:
                threading.Timer(self.seconds, die).start()
            return schedule(*inputs)

        train_finelip.learning_rate_factor = started


@pytest.mark.slow
@pytest.mark.parametrize(
    "kills",
    [
        [KillAfter(seed) for seed in range(4)],
        [
            KillIn(torch, "save", "optimizer.bin", half=b"half of it"),  # of step 3
            KillIn(files, "_exchange", "best"),  # where the best model of before makes room
            KillIn(os, "rename", "step-0000003"),
            KillIn(shutil, "rmtree", "step-0000003"),  # which is the oldest of three
        ],
    ],
    ids=["at random moments", "while saving"],
)
def test_a_kill_costs_at_most_an_interval_and_nothing_of_the_result(base, tmp_path, kills) -> None:
    interval, steps = 3, 10
    flags = ("--max-steps", str(steps), "--checkpointing-steps", str(interval), "--eval-data", "miniature:5")
    flags = (*flags, "--eval-every", "2", "--sample-sentences", "0.5")

    def run(out: Path, kill: Callable[[], None]) -> tuple[int | None, dict[int, list[int]]]:
        log = tmp_path / "log"
        log.unlink(missing_ok=True)
        process = processes.Process(target=train_until_killed, args=(parse(base, out, *flags), log, kill))
        process.start()
        process.join(timeout=120)
        lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        return process.exitcode, dict(lines)

    code, whole = run(tmp_path / "whole", nothing)
    assert code == 0
    assert list(whole) == list(range(steps))

    reached, codes = 0, []
    for kill in [*kills, nothing]:
        code, seen = run(tmp_path / "killed", kill)
        codes.append(code)
        assert all(ids == whole[step] for step, ids in seen.items())
        if seen:
            assert min(seen) >= reached - interval
            reached = max(seen) + 1
    *codes, last = codes
    assert last == 0
    assert set(codes) <= {-signal.SIGKILL, 0}
    # At random moments, a run may be done before its time has come.
    assert codes.count(-signal.SIGKILL) >= (2 if isinstance(kills[0], KillAfter) else 4)
    assert_same_weights(tmp_path / "whole", tmp_path / "killed")
    one, other = (load_file(tmp_path / name / "best" / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert checkpoints(tmp_path / "killed") == ["step-0000009", "step-0000010"]


def test_what_is_not_whole_is_never_gone_on_from(base, tmp_path, monkeypatch, history) -> None:
    stop_before_step(3, base, tmp_path, monkeypatch)
    half = tmp_path / "checkpoints" / ".finelip-sdxl-0123456789abcdef" / "new"
    half.mkdir(parents=True)
    (half / "progress.json").write_text(json.dumps({"step": 4, "best": None, "skipped": 0}))
    history.clear()
    train(base, tmp_path)
    assert min(history) == 3
    assert checkpoints(tmp_path) == ["step-0000004", "step-0000006"]


# What a run that goes wrong costs


def test_a_run_that_diverges_stops_at_its_step_and_keeps_what_was_saved(base, tmp_path, capsys, monkeypatch) -> None:
    train(base, tmp_path / "run", "--max-steps", "2")
    forward = FineLIPTask.forward

    def diverge(self: FineLIPTask, batch: dict[str, Any]) -> dict[str, Tensor]:
        losses = forward(self, batch)
        return {**losses, "loss": losses["loss"] * float("nan")}

    monkeypatch.setattr(FineLIPTask, "forward", diverge)
    flags = [
        f"--{name.replace('_', '-')}={value}"
        for name, value in vars(parse(base, tmp_path / "run")).items()
        if (value is not None and not isinstance(value, bool))
    ]
    before = weights(tmp_path / "run")
    message = refusal(train_finelip, capsys, "--cpu", *flags)
    # The weights are of no use before the loss shows it.
    assert message.startswith(
        "Step 3, of loss nan, made weights that are not finite: training has diverged, and nothing of this is"
    )
    assert checkpoints(tmp_path / "run") == ["step-0000002"]
    assert all(torch.equal(before[key], tensor) for key, tensor in weights(tmp_path / "run").items())


def test_steps_that_are_too_large_stop_the_run(base, tmp_path, capsys) -> None:
    flags = f"--base {base} --data miniature:20 --batch-size 5 --cpu --output-dir {tmp_path / 'run'} --max-steps 40"
    message = refusal(train_finelip, capsys, *flags.split(), *["--learning-rate", "1e9", "--max-grad-norm", "0"])
    assert "training has diverged, and nothing of this is saved" in message
    assert not (tmp_path / "run").exists()


def test_a_damaged_best_model_is_named_and_made_anew(base, tmp_path, capsys) -> None:
    flags = ("--eval-data", "miniature:5", "--eval-every", "1")
    train(base, tmp_path, *flags, "--max-steps", "2")
    os.truncate(tmp_path / "best" / "model.safetensors", 100)
    capsys.readouterr()
    assert train(base, tmp_path, *flags, "--max-steps", "3")["best"] is not None
    assert "best is damaged: the next evaluation writes it anew" in capsys.readouterr().out
    load_finelip(tmp_path / "best")


def test_two_runs_do_not_write_to_one_folder(base, tmp_path, capsys) -> None:
    flags = f"--base {base} --data miniature:20 --batch-size 5 --cpu --output-dir {tmp_path}"
    with held(tmp_path, "taken"):
        message = refusal(train_finelip, capsys, *flags.split())
    assert message == f"Another run is writing to {tmp_path}: wait for its end, or pass another folder."


def test_a_signal_saves_nothing_half_and_the_run_goes_on(base, tmp_path, capsys, monkeypatch) -> None:
    train(base, tmp_path / "whole")
    save = torch.save

    def interrupted(content: Any, file: Any) -> None:
        if (tmp_path / "stopped" / "checkpoints" / "step-0000002").exists():
            os.kill(os.getpid(), signal.SIGTERM)
        save(content, file)

    flags = f"--base {base} --output-dir {tmp_path / 'stopped'} --cpu --data miniature:20 --batch-size 5 --max-steps 6"
    flags = [*f"{flags} --checkpointing-steps 2 --learning-rate 1e-3 --warmup-steps 2".split(), *ALL_LOSSES]
    forget_accelerator()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", interrupted)
        with pytest.raises(SystemExit, match="stopped; the same command goes on from the last checkpoint"):
            train_finelip.main(flags)
    assert checkpoints(tmp_path / "stopped") == ["step-0000002"]
    assert sorted(path.name for path in (tmp_path / "stopped").iterdir()) == ["checkpoints"]
    forget_accelerator()
    train_finelip.main(flags)
    assert_same_weights(tmp_path / "whole", tmp_path / "stopped")


# What the paper's ablations vary


@pytest.mark.parametrize(
    ("refined", "sides"), [("both", "image text"), ("images", "image"), ("texts", "text"), ("none", "")]
)
def test_the_tokens_of_one_side_or_of_none_may_be_refined(base, tmp_path, history, refined, sides) -> None:
    flags = ("--refinement", refined, "--refined-share", "0.4", "--max-steps", "1", "--eval-data", "miniature:5")
    train(base, tmp_path, *flags)
    model = load_finelip(tmp_path / "last")
    for side in ("image", "text"):
        expected = 3 if side in sides.split() else None  # of nine patches
        assert getattr(model.config, f"refined_{side}_tokens") == expected
        assert (getattr(model, f"{side}_refinement") is None) == (expected is None)
    assert history[1].keys() >= {"fine_image_to_text", "triplet", "fine_contrastive"}
    assert np.isfinite(history[1]["loss"])


def test_all_tokens_of_texts_are_compared_without_their_padding() -> None:
    model, batch = make_model(), make_batch()
    model.text_refinement, model.config.refined_text_tokens = None, None
    task = FineLIPTask(model, {**dict.fromkeys(LOSSES, 0.0), "triplet": 1.0}, 0.2, False)
    with torch.no_grad():
        tokens = model.encode_text(batch["input_ids"]).tokens
        images = model.encode_image(batch["pixel_values"]).refined_tokens
        ends = (batch["input_ids"] == 49).int().argmax(dim=1).tolist()
        columns = [late_interaction(images, row[None, : end + 1]) for row, end in zip(tokens, ends, strict=True)]
        expected = triplet_margin_loss(torch.cat(columns, dim=1), batch["ids"])
        torch.testing.assert_close(task(batch)["triplet"], expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("keep", [0, 5, 20])
def test_the_rows_that_the_stretch_keeps_are_kept_in_training_too(base, tmp_path, keep) -> None:
    train(base, tmp_path, "--stretch-keep", str(keep), "--max-steps", "2")
    stock = CLIPModel.from_pretrained(base).text_model.embeddings.position_embedding.weight
    table = weights(tmp_path)["text_model.embeddings.position_embedding.weight"]
    assert len(table) == keep + 4 * (77 - keep)
    assert torch.equal(table[:keep], stock[:keep])
    assert not torch.equal(table[keep], stock[keep])
    # Texts of five scenes are longer than this.
    assert not torch.equal(table[keep + 4], stock[keep + 1])


def test_positions_are_learned_anew_while_the_teacher_keeps_stock_s(base, tmp_path, history) -> None:
    train(base, tmp_path / "new", "--new-positions", "--max-steps", "1", "--learning-rate", "0")
    table = weights(tmp_path / "new")["text_model.embeddings.position_embedding.weight"]
    stretched = load_finelip(base).text_model.embeddings.position_embedding.weight
    assert table.shape == stretched.shape
    assert 0.018 < table.std() < 0.022
    assert torch.corrcoef(torch.stack([table.flatten(), stretched.flatten()]))[0, 1].abs() < 0.1
    assert history[1]["distillation"] > 0.01  # from stock's states
    train(base, tmp_path / "learned", "--new-positions", "--max-steps", "1")
    learned = weights(tmp_path / "learned")["text_model.embeddings.position_embedding.weight"]
    assert (learned[:20] != table[:20]).any(dim=1).all()


def test_a_model_remembers_how_its_tokens_are_compared(base, tmp_path, history) -> None:
    flags = ("--interaction-slope", "1", "--interaction-pooling", "mean", "--max-steps", "1", *TRIPLET_ONLY)
    train(base, tmp_path / "mean", *flags)
    model = load_finelip(tmp_path / "mean" / "last")
    assert (model.config.interaction_slope, model.config.interaction_pooling) == (1.0, "mean")
    images, texts = (torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert torch.equal(model.compare(images, texts), late_interaction(images, texts, slope=1.0, pooling="mean"))
    loss = history[1]["triplet"]
    train(base, tmp_path / "max", "--max-steps", "1", *TRIPLET_ONLY)
    assert history[1]["triplet"] != loss


def test_a_finelip_keeps_its_refinement(base, tmp_path, capsys) -> None:
    message = refusal(train_finelip, capsys, "--base", "miniature-finelip-1", "--refined-share", "0.5", "--cpu",
        "--output-dir", str(tmp_path))  # fmt: skip
    assert message == ("--base miniature-finelip-1 has a token refinement: leave out --refined-share and --refinement.")


# Two processes


def make_model() -> FineLIPModel:
    torch.manual_seed(0)
    config = FineLIPConfig(
        text_config={**SMALL, "vocab_size": 50, "eos_token_id": 49, "max_position_embeddings": 30},
        vision_config={**SMALL, "image_size": 48, "patch_size": 16},
        projection_dim=10,
        refined_image_tokens=3,
        refined_text_tokens=3,
    )
    return FineLIPModel(config).double()


def make_batch() -> dict[str, Any]:
    """Six pairs of three images, which come twice or more, in both halves."""
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    ids = torch.tensor([3, 5, 3, 5, 8, 3])
    input_ids = torch.randint(0, 48, (2, 6, 12), generator=generator)
    input_ids[:, range(6), [11, 5, 7, 11, 9, 3]] = 49
    return {
        "ids": ids,
        "pixel_values": noise(9, 3, 48, 48)[ids],
        "input_ids": input_ids[0],
        "short_input_ids": input_ids[1],
        "short_mask": torch.arange(12) <= torch.tensor([11, 5, 7, 11, 9, 3])[:, None],
        "teacher_states": noise(6, 12, 16),
        "teacher_embeds": noise(6, 10),
    }


def losses_and_gradients(
    batch: dict[str, Any], weights: dict[str, float], hardest: bool, prepare: Callable[[nn.Module], nn.Module]
) -> dict[str, dict[str, Tensor]]:
    objective = FineLIPTask(make_model(), {**dict.fromkeys(LOSSES, 0.0), **weights}, 0.2, hardest)
    prepared = prepare(objective)
    losses = prepared(batch)
    losses["loss"].backward()
    gradients = {name: value.grad for name, value in objective.named_parameters() if value.grad is not None}
    return {"losses": {name: loss.detach() for name, loss in losses.items()}, "gradients": gradients}


CASES = [
    ({"triplet": 1.0}, False),  # the paper's: the logit scale has no gradient
    ({"triplet": 1.0}, True),
    ({"contrastive": 1.0}, False),  # nor has the refinement
    ({"fine_contrastive": 1.0}, False),
    ({"triplet": 0.1, "contrastive": 1.0, "distillation": 2.0}, False),
]


def work_on_half(process: int, folder: Path) -> None:
    accelerator = Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
    assert accelerator.num_processes == 2
    half = {name: value[3 * process : 3 * process + 3] for name, value in make_batch().items()}
    ways = {
        "DDP": lambda objective: DistributedDataParallel(objective, find_unused_parameters=True),
        "Accelerate": accelerator.prepare,
    }
    for (number, (weights, hardest)), (way, prepare) in itertools.product(enumerate(CASES), ways.items()):
        result = losses_and_gradients(half, weights, hardest, prepare)
        torch.save(result, folder / f"{way}-{number}-{process}.pt")


@pytest.mark.slow
def test_two_processes_have_the_losses_and_gradients_of_one_with_the_whole_batch(tmp_path) -> None:
    on_two_processes(work_on_half, tmp_path)
    for number, (loss_weights, hardest) in enumerate(CASES):
        whole = losses_and_gradients(make_batch(), loss_weights, hardest, prepare=lambda objective: objective)
        assert all(gradient.any() for gradient in whole["gradients"].values())
        for way in ("DDP", "Accelerate"):
            halves = [torch.load(tmp_path / f"{way}-{number}-{process}.pt") for process in (0, 1)]
            for name, loss in whole["losses"].items():
                mine = [half["losses"][name] for half in halves]
                if name not in ("distillation", "loss"):
                    assert mine[0] == mine[1]
                torch.testing.assert_close((mine[0] + mine[1]) / 2, loss, atol=1e-12, rtol=1e-12)
            for half in halves:
                assert half["gradients"].keys() >= whole["gradients"].keys()
                for name, gradient in half["gradients"].items():
                    expected = whole["gradients"].get(name, torch.zeros_like(gradient))
                    torch.testing.assert_close(gradient, expected, atol=1e-12, rtol=1e-9)


def work_on_a_run(process: int, arguments: Any, figures: Path, stop: int | None) -> None:
    logged = record_figures(setattr)
    schedule = train_finelip.learning_rate_factor

    def interrupted(step: int, *rest: int) -> float:
        if step == stop:
            raise Stop
        return schedule(step, *rest)

    train_finelip.learning_rate_factor = interrupted
    if stop is None:
        train_finelip.train(arguments)
    else:
        with pytest.raises(Stop):
            train_finelip.train(arguments)
    if process == 0:
        figures.write_text(json.dumps(logged))


@pytest.mark.slow
def test_a_run_on_two_processes_goes_on_and_equals_one_on_one_process(base, tmp_path, history) -> None:
    data = f"csv:{write_csv(tmp_path / 'data', size=20, broken=(2, 11))}"
    flags = (
        "--data",
        data,
        *TRIPLET_ONLY,
        "--contrastive-weight",
        "1",
        "--max-steps",
        "4",
        "--loss-warmup-epochs",
        "0",
    )
    flags = (*flags, "--eval-data", data, "--eval-every", "2")
    progress = train(base, tmp_path / "one", *flags, "--batch-size", "10")
    assert progress["skipped"] == 4

    arguments = parse(base, tmp_path / "two", *flags)
    seen: dict[int, Any] = {}
    for stop in (3, None):
        on_two_processes(work_on_a_run, arguments, tmp_path / "figures", stop)
        seen |= {int(step): figures for step, figures in json.loads((tmp_path / "figures").read_text()).items()}
    assert list(seen) == [1, 2, 3, 4]
    for step, figures in seen.items():
        assert figures.keys() == history[step].keys()
        for name in ("loss", "triplet", "contrastive"):
            assert figures[name] == pytest.approx(history[step][name], rel=1e-4), (step, name)
    saved = json.loads((tmp_path / "two" / "checkpoints" / "step-0000004" / "progress.json").read_text())
    assert (saved["skipped"], saved["settings"]["processes"]) == (4, 2)
    with pytest.raises(ValueError, match="processes was 2 and is 1"):
        train(base, tmp_path / "two", *flags)


# What is refused


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--base no/such/folder --data miniature:20", "no/such/folder does not exist"),
        ("--base other", "--base other needs --data, such as sharegpt4v:captions.json"),
        ("--data pictures:x", "pictures:x is no data set: pass miniature, or one of"),
        ("--data csv:nowhere.csv", "nowhere.csv does not exist"),
        ("--batch-size 7", "The batch size is 7: expected a multiple of 5"),
        ("--batch-size 25", "The data set has 20 images, which do not fill one batch of 25"),
        ("--data webdataset:{0..1}.tar", "Shards do not tell their number of pairs: pass --epoch-size"),
        ("--data webdataset:nowhere.tar --epoch-size 100 --region-weight 0", "nowhere.tar, the first of 1 shards"),
        (
            "--data webdataset:nowhere.tar --epoch-size 100",
            "--region-weight is 1, but webdataset:nowhere.tar has no regions",
        ),
        ("--eval-data webdataset:nowhere.tar", "is a stream for training only"),
        (
            "--dataloader-num-workers -1",
            "--dataloader-num-workers: expected a whole number of at least 0 instead of -1",
        ),
        ("--max-steps 0", "--max-steps: expected a whole number above 0 instead of 0"),
        ("--max-steps -3", "--max-steps: expected a whole number above 0 instead of -3"),
        ("--batch-size 2.5", "--batch-size: expected a whole number above 0 instead of 2.5"),
        ("--epochs 0", "--epochs: expected a number above 0 instead of 0"),
        ("--learning-rate nan", "--learning-rate: expected a number of at least 0 instead of nan"),
        ("--triplet-weight -1", "--triplet-weight: expected a number of at least 0 instead of -1"),
        ("--checkpoints-total-limit 0", "--checkpoints-total-limit: expected a whole number above 0"),
        ("--drop-first 2", "--drop-first: expected a number of at most 1 instead of 2"),
        (
            "--triplet-weight 0 --contrastive-weight 0 --region-weight 0 --distillation-weight 0",
            "All losses have weight 0",
        ),
        ("--new-positions --stretch-keep 0", "--stretch-keep 0 goes with a stretch: leave out --new-positions"),
        ("--refined-share 0", "--refined-share: expected a number above 0 instead of 0"),
        ("--refinement all", "invalid choice: 'all'"),
        ("--interaction-slope 2", "--interaction-slope: expected a number of at most 1 instead of 2"),
        ("--stretch-keep 77", "--stretch-keep: expected a whole number of at most 76 instead of 77"),
        ("--sample-sentences nan", "--sample-sentences: expected a number of at least 0 instead of nan"),
        (
            "--dataloader-num-workers 1000",
            "--dataloader-num-workers: expected a whole number of at most 128 instead of 1000",
        ),
        ("--prefix-padding 100000", "--prefix-padding: expected a whole number of at most 1,000 instead of 100000"),
        ("--seed -1", "--seed: expected a whole number of at least 0 instead of -1"),
        ("--seed 4294967296", "--seed: expected a whole number of at most 4,294,967,295 instead of 4294967296"),
        ("--max-steps 99999999", "--max-steps: expected a whole number of at most 9,999,999 instead of 99999999"),
        ("--epochs 1e9", "--epochs 1e+09 are 4,000,000,000 steps of this data: pass --max-steps"),
        ("--margin 11", "--margin: expected a number of at most 10 instead of 11"),
        ("--weight-decay inf", "--weight-decay: expected a number of at most 1,000,000,000 instead of inf"),
        (
            "--checkpoints-total-limit 1000000",
            "--checkpoints-total-limit: expected a whole number of at most 10,000 instead of 1000000",
        ),
        ("--output-dir=", "--output-dir: expected a path instead of nothing"),
        ("--images=", "--images: expected a path instead of nothing"),
        ("--output-dir /", "--output-dir / is the root of all folders"),
        ("--epoch-size 5", "--epoch-size goes with webdataset shards, but --data is miniature:20: leave it out"),
        ("--eval-data none --eval-images x", "--eval-images x goes with --eval-data, which is none: leave it out"),
        ("--data webdataset:x.tar --images y", "--images y goes with files, but shards hold their images: leave it"),
        ("--mixed-precision fp16", "--mixed-precision fp16 needs a GPU: on the CPU pass bf16, or no"),
    ],
)
def test_refuses_in_one_sentence(base, tmp_path, capsys, flags, expected) -> None:
    common = f"--base {base} --data miniature:20 --batch-size 5 --region-weight 1 --cpu --output-dir {tmp_path / 'run'}"
    if flags == "--base other":
        common = ""
    assert expected in refusal(train_finelip, capsys, *common.split(), *flags.split())
    assert not (tmp_path / "run").exists()


def test_refuses_data_without_regions(base, tmp_path, capsys) -> None:
    data = f"csv:{write_csv(tmp_path / 'data')}"
    flags = f"--base {base} --data {data} --batch-size 5 --region-weight 0.5 --cpu --output-dir {tmp_path / 'run'}"
    assert (
        refusal(train_finelip, capsys, *flags.split()) == f"--region-weight is 0.5, but {data} has no regions: pass 0."
    )


def test_refuses_a_text_encoder_alone(base, tmp_path, capsys) -> None:
    encoder = load_finelip(base).to_text_encoder(projection=True)
    encoder.save_pretrained(tmp_path / "encoder")
    message = refusal(train_finelip, capsys, "--base", str(tmp_path / "encoder"), "--data", "miniature:20", "--cpu")
    assert "is a text encoder alone: training needs a CLIP with an image tower" in message


def test_refuses_the_tokenizer_of_a_larger_model(base, tmp_path, capsys) -> None:
    tokenizer = load_tokenizer(base)
    tokenizer.add_tokens(["extraordinary"])
    tokenizer.save_pretrained(tmp_path)
    message = refusal(train_finelip, capsys, *f"--base {base} --tokenizer {tmp_path} --data miniature:20 --cpu".split())
    assert f"The tokenizer of {tmp_path} has tokens that {base} does not know" in message


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_refuses_a_tracker_that_is_not_installed(monkeypatch, capsys, tracker) -> None:
    monkeypatch.setattr(command_line, "find_spec", lambda name: None)
    message = refusal(train_finelip, capsys, "--report-to", tracker)
    assert message == f"--report-to {tracker} needs a package that is not installed: pip install {tracker}."


def test_refuses_a_file_as_folder(tmp_path, capsys) -> None:
    (tmp_path / "run").write_text("mine")
    assert "run is a file: pass the name of a folder" in refusal(
        train_finelip, capsys, "--output-dir", str(tmp_path / "run")
    )


@pytest.mark.slow
def test_refuses_to_go_on_with_other_settings_or_another_model(base, tmp_path, capsys) -> None:
    flags = f"--data miniature:20 --batch-size 5 --cpu --output-dir {tmp_path / 'run'} --max-steps 1".split()
    train_finelip.main(["--base", str(base), *flags])
    capsys.readouterr()
    message = refusal(train_finelip, capsys, "--base", str(base), *flags, "--seed", "1", "--margin", "0.3")
    assert message.endswith(
        "run with other settings (margin was 0.2 and is 0.3, seed was 0 and is 1): pass another folder."
    )
    wider = save_clip(tmp_path / "clip", width=32)
    message = refusal(train_finelip, capsys, "--base", str(wider), *flags)
    assert message.endswith("step-0000001 is a checkpoint of another model: pass another folder.")
    train_finelip.main(
        ["--base", str(base), *flags, "--max-steps", "2", "--checkpointing-steps", "7", "--dataloader-num-workers", "1"]
    )


def test_refuses_images_none_of_which_can_be_read_also_from_workers(base, tmp_path, capsys) -> None:
    data = write_csv(tmp_path / "data", broken=tuple(range(10)))
    flags = f"--base {base} --data csv:{data} --batch-size 5 --dataloader-num-workers 1 --cpu"
    flags += f" --output-dir {tmp_path / 'run'}"
    message = refusal(train_finelip, capsys, *flags.split())
    assert message.startswith("10 images in a row cannot be read")
    assert message.endswith("If images are missing on purpose, pass --skip-missing-images.")


@pytest.mark.slow
def test_the_script_exits_with_an_error(tmp_path) -> None:
    command = [sys.executable, SCRIPT, "--base", tmp_path / "nothing", "--data", "miniature:5"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    # Before it may stand what libraries say on import, such as Diffusers of torchao.
    *_, line = done.stderr.splitlines()
    assert line.startswith(f"train_finelip.py: error: {tmp_path / 'nothing'} ")
    assert "Traceback" not in done.stderr
