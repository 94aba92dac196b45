"""The command `evaluate images`: stand-ins for a real SDXL draw every kind of prompts in every layout."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from finelip_sdxl.cli.main import main
from finelip_sdxl.data import open_prompts
from finelip_sdxl.names import DATA_FILES, DATA_FOLDERS, PROMPT_FILES, PROMPT_FOLDERS
from finelip_sdxl.options import LAYOUTS
from finelip_sdxl.prompts.vocabulary import clip_tokenizer
from tests.data import test_data
from tests.helpers import prompt_sets

# Every kind of prompts with a layout, so that each layout is there; `test_layouts.py` has the other pairs.
RUNS = {
    "dpg-bench": (prompt_sets.dpg_bench, "dpg-bench"),
    "tiif": (prompt_sets.tiif, "tiif"),
    "longbench-t2i": (prompt_sets.longbench_t2i, "longbench-t2i"),
    "detailmaster": (prompt_sets.detailmaster, "detailmaster"),
    "txt": (prompt_sets.txt, "t2i-compbench"),
    "docci": (test_data.docci, "plain"),
    "urban1k": (test_data.urban1k, "dpg-bench"),
    "sharegpt4v": (test_data.sharegpt4v, "longbench-t2i"),
    "coco": (test_data.coco, "detailmaster"),
    "flickr30k": (test_data.flickr30k_csv, "t2i-compbench"),
    "csv": (test_data.csv_file, "plain"),
    "jsonl": (test_data.jsonl_file, "dpg-bench"),
    "folder": (test_data.picture_folder, "plain"),
    "miniature": (lambda folder: "miniature:2", "longbench-t2i"),
}
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
VOCABULARY = {"vocab_size": 49_408, "bos_token_id": 49_406, "eos_token_id": 49_407, "pad_token_id": 49_407}


@pytest.fixture(scope="module")
def sdxl(session_components, tmp_path_factory) -> str:
    """An SDXL with random weights and CLIP's own tokenizers."""
    folder = str(tmp_path_factory.mktemp("sdxl"))
    torch.manual_seed(0)
    second = {**SMALL, "hidden_size": 48, "projection_dim": 24}
    parts = {
        "text_encoder": CLIPTextModel(CLIPTextConfig(**SMALL, **VOCABULARY, projection_dim=32)),
        "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**second, **VOCABULARY)),
        "tokenizer": clip_tokenizer(),
        "tokenizer_2": clip_tokenizer(pad_token="!"),
    }
    StableDiffusionXLPipeline(**{**session_components, **parts}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> dict[int, str]:
    """CLIPs with random weights, of 77 and 248 positions."""
    found = {}
    for positions in (77, 248):
        torch.manual_seed(positions)
        vision = {**SMALL, "image_size": 16, "patch_size": 8}
        text = {**SMALL, **VOCABULARY, "max_position_embeddings": positions}
        folder = tmp_path_factory.mktemp(f"clip{positions}")
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
        clip_tokenizer(max_length=positions).save_pretrained(folder)
        found[positions] = str(folder)
    return found


def evaluate(sdxl: str, clips: dict[int, str], folder: Path, *flags: str) -> int:
    judges = ("--features", clips[77], "--judge", clips[248], "--sentence-judge", clips[77])
    drawing = ("--steps", "1", "--device", "cpu", "--base", sdxl, "--output-dir", str(folder))
    return main(["evaluate", "images", *drawing, *judges, *flags])


@pytest.mark.slow
@pytest.mark.parametrize("kind", RUNS)
def test_every_kind_of_prompts_is_drawn_laid_out_scored_and_reported(sdxl, clips, tmp_path, capsys, kind) -> None:
    build, layout = RUNS[kind]
    spec, run = build(tmp_path / "data"), tmp_path / "run"
    columns = ("stock", "compel", "finelip") if layout == "plain" else ("stock", "finelip")
    code = evaluate(sdxl, clips, run, "--data", spec, "--max-prompts", "2", "--layout", layout, "--columns", *columns)
    printed = capsys.readouterr()
    assert code == 0, printed.err
    content = json.loads((run / "report.json").read_text())
    prompts = open_prompts(spec).first(2)
    assert [prompt["text"] for prompt in content["prompts"]] == [prompt.text for prompt in prompts.prompts]
    assert len(list((run / "pictures").rglob("*.png"))) == 2 * len(columns)
    keys = {figure["key"] for figure in content["figures"]}
    assert {"sentences", "fidelity"} <= keys
    # The second of ShareGPT4V's images is not there.
    assert ("cmmd" in keys) == (prompts.images is not None and kind != "sharegpt4v")
    assert "objects" not in keys  # this SDXL is not the miniature
    if layout != "plain":
        laid_out = [file for file in (run / layout).rglob("*") if file.suffix in (".png", ".jpg")]
        assert len(laid_out) == 2 * len(columns)
    for file in ("report.md", "report.html", str(run / "report.json")):
        assert Path(run, file).is_file()
        assert Path(file).name in printed.out


def test_every_kind_and_every_layout_has_a_run() -> None:
    assert set(RUNS) == {"miniature", *DATA_FILES, *DATA_FOLDERS, *PROMPT_FILES, *PROMPT_FOLDERS}
    assert {layout for _, layout in RUNS.values()} == set(LAYOUTS)


@pytest.mark.slow
def test_a_run_goes_on_with_the_same_command_and_refuses_another_setting_at_once(sdxl, clips, tmp_path, capsys) -> None:
    spec, run = prompt_sets.dpg_bench(tmp_path / "data"), tmp_path / "run"
    flags = ("--data", spec, "--layout", "dpg-bench", "--images-per-prompt", "4", "--columns", "finelip")
    assert evaluate(sdxl, clips, run, *flags) == 0
    pictures = {file: file.stat().st_mtime_ns for file in run.rglob("*.png")}
    assert len(pictures) == 3 * 4 + 3
    gone = run / "pictures" / "finelip" / "00001_02.png"
    before = gone.read_bytes()
    gone.unlink()
    assert evaluate(sdxl, clips, run, *flags) == 0
    assert gone.read_bytes() == before
    again = {file: file.stat().st_mtime_ns for file in run.rglob("*.png")}
    assert {file for file in again if again[file] != pictures[file]} == {gone}
    capsys.readouterr()
    assert evaluate(sdxl, clips, run, *flags, "--seed", "5") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"finelip-sdxl evaluate images: error: The pictures in {run} were drawn with seed 0, and now"
    )
    assert evaluate(sdxl, clips, run, *flags, "--scheduler", "ddim") == 2
    assert "were drawn with" in capsys.readouterr().err


@pytest.mark.slow
def test_a_judge_that_drew_is_labeled(sdxl, clips, tmp_path, capsys) -> None:
    finelip = ("--finelip", clips[248], "--columns", "stock", "finelip")
    spec = prompt_sets.txt(tmp_path / "data")
    assert evaluate(sdxl, clips, tmp_path / "run", "--data", spec, *finelip) == 0
    content = json.loads((tmp_path / "run" / "report.json").read_text())
    labels = {figure["key"]: figure["self_judged"] for figure in content["figures"]}
    assert labels == {"sentences": [], "sentences_before_77": [], "fidelity": ["finelip"]}
    assert "Self-judged" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--judge", "miniature-clip-1"], "--judge miniature-clip-1 takes 77 tokens, and would judge a long prompt"),
        (
            ["--sentence-judge", "miniature-finelip-1"],
            "--sentence-judge miniature-finelip-1 takes 248 tokens; expected",
        ),
        (["--features", "{sdxl}/text_encoder"], "has no image tower: pass a whole CLIP"),
        (["--data", "txt:{empty}"], "holds no prompt: pass a file with a prompt in each line"),
        (["--data", "miniature:2", "--layout", "tiif"], "The layout tiif needs the types and lines"),
        (["--data", "miniature:2", "--split", "gone", "--images", "{empty}"], "The scenes of miniature:2 are drawn"),
    ],
)
def test_what_cannot_be_judged_or_drawn_is_refused_before_anything_is(
    stock_folder, tmp_path, capsys, flags: list[str], message
) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    names = {"sdxl": stock_folder, "empty": tmp_path / "empty.txt"}
    command: list[Any] = ["evaluate", "images", "--output-dir", str(tmp_path / "run"), "--device", "cpu"]
    assert main([*command, *(flag.format(**names) for flag in flags)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert line.startswith("finelip-sdxl evaluate images: error: ")
    assert message in line
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_without_flags_the_miniature_s_own_judges_score_it(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["evaluate", "images", "--data", "miniature:2", "--steps", "2", "--device", "cpu"]
    assert main([*command, "--columns", "stock", "finelip"]) == 0
    content = json.loads((tmp_path / "runs" / "images" / "report.json").read_text())
    labels = {figure["key"]: figure["self_judged"] for figure in content["figures"]}
    assert labels["objects_after_77"] == []
    assert labels["sentences_after_77"] == ["stock"]
    assert labels["fidelity"] == ["finelip"]
    assert {"kid", "cmmd"} < labels.keys()
    assert "| Objects right ↑" in capsys.readouterr().out
    monkeypatch.setattr("finelip_sdxl.comparison.comparison.Comparison.draw", None)  # all is drawn
    none = [flag for role in ("--features", "--judge", "--sentence-judge") for flag in (role, "none")]
    assert main([*command, "--columns", "stock", "finelip", *none]) == 0
    content = json.loads((tmp_path / "runs" / "images" / "report.json").read_text())
    assert [figure["key"] for figure in content["figures"]] == ["objects", "objects_before_77", "objects_after_77"]
