"""Pictures of a plan in a folder: whole files, each once, after kills, full disks and on several processes."""

import json
import os
import resource
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from finelip_sdxl.comparison import Settings
from finelip_sdxl.comparison.comparison import Comparison, Picture
from finelip_sdxl.data.prompt_sets import Prompt, PromptSet
from finelip_sdxl.images import read_parameters
from finelip_sdxl.picture_evaluation import generation
from finelip_sdxl.picture_evaluation.generation import generate, weights_digest
from finelip_sdxl.picture_evaluation.manifest import MANIFEST, read_manifest
from finelip_sdxl.picture_evaluation.plan import PicturePlan
from finelip_sdxl.picture_evaluation.processes import open_processes
from finelip_sdxl.training.processes import held
from tests.helpers.full_disk import files_of_at_most
from tests.helpers.recipes import on_two_processes, processes

PROMPTS = PromptSet("txt:foxes.txt", [Prompt("a red fox", "0"), Prompt("a blue square " * 30, "1")])
PLAN = PicturePlan(PROMPTS, ("stock", "finelip"), Settings("", steps=1, seed=7), images_per_prompt=2)


@pytest.fixture
def comparison(stock_folder) -> Comparison:
    return Comparison.load(stock_folder)


@pytest.fixture
def drawn(comparison, monkeypatch) -> list[tuple[str, str, int]]:
    """The column, prompt and seed of each drawing, done without a pipeline."""
    found: list[tuple[str, str, int]] = []

    def draw(column: str, settings: Settings) -> Picture:
        found.append((column, settings.prompt, settings.seed))
        return Picture(column, Image.new("RGB", (8, 8)), settings, 0.0)

    monkeypatch.setattr(comparison, "draw", draw)
    return found


def files(folder: Path) -> dict[str, bytes]:
    """The pictures of a run, and whatever else is among them."""
    found = (folder / "pictures").rglob("*")
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in sorted(found) if file.is_file()}


def pixels(folder: Path) -> dict[str, bytes]:
    return {name: Image.open(folder / name).tobytes() for name in files(folder)}


def test_every_picture_is_drawn_once_from_the_seed_of_its_prompt(comparison, drawn, tmp_path) -> None:
    generate(PLAN, comparison, tmp_path)
    texts = [prompt.text for prompt in PROMPTS.prompts]
    expected = [(c, texts[p], 7 + 2 * p + n) for p in (0, 1) for c in ("stock", "finelip") for n in (0, 1)]
    assert drawn == expected
    generate(PLAN, comparison, tmp_path)
    assert drawn == expected
    names = [f"pictures/{c}/0000{p}_0{n}.png" for c in ("finelip", "stock") for p in (0, 1) for n in (0, 1)]
    assert list(files(tmp_path)) == names
    assert sorted(file.name for file in tmp_path.iterdir()) == [MANIFEST, "pictures"]


def test_a_picture_is_that_of_the_comparison_and_holds_its_parameters(comparison, tmp_path) -> None:
    generate(PLAN, comparison, tmp_path, {"scheduler": "euler"})
    file = tmp_path / "pictures" / "finelip" / "00001_01.png"
    expected = comparison.draw("finelip", Settings(PROMPTS.prompts[1].text, steps=1, seed=10)).image
    assert Image.open(file).tobytes() == expected.tobytes()
    parameters = read_parameters(file)
    assert (parameters["seed"], parameters["column"], parameters["scheduler"]) == (10, "finelip", "euler")


def test_the_manifest_holds_every_setting_and_no_path(comparison, drawn, tmp_path) -> None:
    generate(PLAN, comparison, tmp_path / "run", {"vae": "other"})
    content = read_manifest(tmp_path / "run")
    assert content["columns"] == ["stock", "finelip"]
    assert [prompt["text"] for prompt in content["prompts"]] == [prompt.text for prompt in PROMPTS.prompts]
    settings = content["settings"]
    side = comparison.size[0]
    expected = {
        "data": "txt:foxes.txt", "prompts": 2, "texts": PROMPTS.digest, "images_per_prompt": 2, "seed": 7, "steps": 1,
        "guidance_scale": 5.0, "width": side, "height": side, "hidden_states": "penultimate", "overflow": "window",
        "weighting": None, "negative_prompt": "", "dtype": "float32", "device": "cpu", "sampler": "Euler",
        "vae": "other", "torch": torch.__version__.partition("+")[0],
    }  # fmt: skip
    found = {**settings, "torch": settings["torch"].partition("+")[0]}
    assert {name: found[name] for name in expected} == expected
    assert str(tmp_path) not in (tmp_path / "run" / MANIFEST).read_text()


def test_columns_may_be_added_later(comparison, drawn, tmp_path) -> None:
    generate(replace(PLAN, columns=("stock",)), comparison, tmp_path)
    before = files(tmp_path)
    generate(replace(PLAN, columns=("finelip",)), comparison, tmp_path)
    assert read_manifest(tmp_path)["columns"] == ["stock", "finelip"]
    assert before.items() < files(tmp_path).items()
    assert len(drawn) == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": replace(PLAN.settings, steps=2)}, "drawn with steps 1, and now it is 2: set it back, or pass"),
        ({"settings": replace(PLAN.settings, seed=8)}, "drawn with seed 7, and now it is 8"),
        (
            {"settings": replace(PLAN.settings, negative_prompt="fog")},
            'with negative_prompt "", and now it is "f',
        ),
        ({"images_per_prompt": 1}, "drawn with images_per_prompt 2, and now it is 1"),
        ({"prompts": PromptSet("txt:foxes.txt", [Prompt("a hare", "0"), *PROMPTS.prompts[1:]])}, "drawn with texts"),
    ],
)
def test_a_changed_setting_is_refused_and_changes_nothing(comparison, drawn, tmp_path, change, message) -> None:
    generate(PLAN, comparison, tmp_path)
    before = files(tmp_path), (tmp_path / MANIFEST).read_text()
    with pytest.raises(ValueError, match=message):
        generate(replace(PLAN, **change), comparison, tmp_path)
    assert (files(tmp_path), (tmp_path / MANIFEST).read_text()) == before


def test_other_weights_of_the_same_name_are_a_changed_setting(comparison, drawn, tmp_path) -> None:
    generate(PLAN, comparison, tmp_path)
    with torch.no_grad():
        comparison.pipe.unet.conv_out.bias += 0.5
    with pytest.raises(ValueError, match="drawn with weights"):
        generate(PLAN, comparison, tmp_path)


def test_every_part_of_a_pipeline_counts_in_the_digest_of_its_weights(comparison) -> None:
    digests = {weights_digest(comparison.pipe.components)}
    for name, part in comparison.pipe.components.items():
        if isinstance(part, torch.nn.Module):
            with torch.no_grad():
                list(part.parameters())[-1].flatten()[-1] += 1
            digests.add(weights_digest(comparison.pipe.components))
            assert digests, name
    modules = sum(isinstance(part, torch.nn.Module) for part in comparison.pipe.components.values())
    assert len(digests) == modules + 1 >= 5


def test_a_folder_with_other_files_is_left_alone(comparison, drawn, tmp_path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds notes\.txt, but no generation\.json of a run: pass a new folder"):
        generate(PLAN, comparison, tmp_path)
    assert not drawn


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"settings": 1, "columns": []}', "[" * 100_000])
def test_a_damaged_manifest_is_refused(comparison, drawn, tmp_path, content) -> None:
    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(ValueError, match=r"generation\.json is damaged: pass another folder, or remove this one"):
        generate(PLAN, comparison, tmp_path)


def test_a_folder_has_one_run_at_a_time(comparison, drawn, tmp_path) -> None:
    with held(tmp_path), pytest.raises(OSError, match="Another run is writing to"):
        generate(PLAN, comparison, tmp_path)


@pytest.mark.parametrize(
    ("text", "columns", "message"),
    [
        ("a fox " * 4000, ("stock",), r"Prompt 2 of txt:x cannot be drawn: `prompt` has 24,000 characters"),
        ("(" * 70 + "fox" + ")" * 70, ("compel",), "Prompt 2 of txt:x cannot be drawn"),
    ],
)
def test_a_prompt_that_cannot_be_drawn_is_named_before_anything_is(
    comparison, drawn, tmp_path, text, columns, message
) -> None:
    prompts = PromptSet("txt:x", [Prompt("a fox", "0"), Prompt(text, "1")])
    with pytest.raises(ValueError, match=message):
        generate(PicturePlan(prompts, columns, PLAN.settings), comparison, tmp_path)
    assert not drawn


def test_a_seed_past_the_last_is_refused() -> None:
    with pytest.raises(ValueError, match="`seed` is 4294967293; the last picture's would be 4294967296"):
        replace(PLAN, settings=replace(PLAN.settings, seed=2**32 - 3))


# Kills and full disks


def generate_and_die(stock_folder: str, folder: Path, pictures: int, half: bool) -> None:
    """Draws some pictures, and is killed before the next one's file is written, or in the middle of it."""
    torch.set_num_threads(1)
    save, count = Image.Image.save, 0

    def deadly(image: Image.Image, file: Any, **options: Any) -> None:
        nonlocal count
        if count == pictures:
            if half:
                Path(file).write_bytes(b"\x89PNG half")
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        save(image, file, **options)

    Image.Image.save = deadly  # type: ignore[method-assign]
    generate(PLAN, Comparison.load(stock_folder), folder, progress=False)


@pytest.mark.slow
@pytest.mark.parametrize(("pictures", "half"), [(0, True), (3, False), (3, True)])
def test_a_killed_run_goes_on_without_a_half_picture(comparison, stock_folder, tmp_path, pictures, half) -> None:
    whole = tmp_path / "whole"
    generate(PLAN, comparison, whole)
    run = tmp_path / "run"
    child = processes.Process(target=generate_and_die, args=(stock_folder, run, pictures, half))
    child.start()
    child.join(timeout=120)
    assert child.exitcode == -signal.SIGKILL
    found = {name for name in files(run) if "/." not in name}
    assert len(found) == pictures
    before = {name: (run / name).stat().st_mtime_ns for name in found}
    generate(PLAN, comparison, run)
    assert {name: (run / name).stat().st_mtime_ns for name in found} == before
    assert pixels(run) == pixels(whole)
    assert json.loads((run / MANIFEST).read_text()) == json.loads((whole / MANIFEST).read_text())


def test_a_full_disk_is_one_sentence_and_leaves_whole_files_alone(comparison, tmp_path) -> None:
    generate(replace(PLAN, columns=("stock",)), comparison, tmp_path)
    before = files(tmp_path)
    message = r"pictures/finelip/00000_00\.png cannot be written to \(.*\): make room, or pass another place"
    save_manifest = generation._open

    def open_then_fill(*arguments: Any) -> None:
        save_manifest(*arguments)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))

    with files_of_at_most(resource.RLIM_INFINITY), pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "_open", open_then_fill)
        with pytest.raises(OSError, match=message):
            generate(PLAN, comparison, tmp_path, progress=False)  # pytest's file of stderr may not grow either
    assert files(tmp_path) == before
    generate(PLAN, comparison, tmp_path)
    assert len(files(tmp_path)) == 8


# Several processes


def test_without_a_launcher_one_process_draws_all(monkeypatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    alone = open_processes(None)
    assert (alone.process, alone.processes, alone.device, alone.is_main) == (0, 1, None, True)
    alone.wait()


def generate_a_share(process: int, stock_folder: str, folder: Path) -> None:
    shared = open_processes("cpu")
    assert (shared.process, shared.processes) == (process, 2)
    comparison = Comparison.load(stock_folder)
    draw, count = comparison.draw, 0

    def counted(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        return draw(*arguments)

    comparison.draw = counted  # type: ignore[method-assign]
    generate(PLAN, comparison, folder, process=shared.process, processes=2, wait=shared.wait, progress=False)
    (folder / f"count-{process}").write_text(str(count))


@pytest.mark.slow
def test_two_processes_draw_the_pictures_of_one_and_none_twice(comparison, stock_folder, tmp_path) -> None:
    generate(PLAN, comparison, tmp_path / "one")
    on_two_processes(generate_a_share, stock_folder, tmp_path / "two")
    assert pixels(tmp_path / "two") == pixels(tmp_path / "one")
    assert [(tmp_path / "two" / f"count-{process}").read_text() for process in (0, 1)] == ["4", "4"]
