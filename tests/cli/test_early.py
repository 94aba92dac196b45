"""Mistakes that the command line and the recipes refuse before the imports that take seconds."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch

from finelip_sdxl import Conditioning
from finelip_sdxl.cli.main import main
from finelip_sdxl.cli.options import check_models
from finelip_sdxl.console import Parser, announce, quiet_diffusers, with_flags

# Runs commands one after the other, and prints the code, the errors and the heavy modules of each.
CHILD = """
import contextlib, io, json, sys
from finelip_sdxl.cli.main import main
for command in json.load(sys.stdin):
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        try:
            code = main(command)
        except SystemExit as stopped:
            code = stopped.code
    heavy = sorted({"torch", "diffusers", "transformers"} & sys.modules.keys())
    print(json.dumps([code, errors.getvalue(), heavy]))
"""

MISTAKES = {
    ("generate", "a fox", "--base", "no/such/folder/at/all"): "no/such/folder/at/all does not exist: pass a directory",
    ("generate", "a fox", "--base", "gone.safetensors"): "gone.safetensors does not exist",
    ("generate", "a fox", "--base", "{empty}"): "has no model_index.json: pass the directory of an SDXL",
    ("generate", "a fox", "--base", ""): "does not exist",
    ("generate", "a fox", "--finelip", "gone.pt"): "gone.pt does not exist",
    ("generate", "a fox", "--finelip-2", "./gone"): "./gone does not exist",
    ("generate", "a fox", "--finelip-base", "{file}"): "--finelip-base {file} is a file; expected the directory",
    ("generate", "a fox", "--conditioning-adapter", "../gone"): "../gone does not exist",
    ("generate", "a fox", "--config", "miniature"): "The config miniature goes with a single file",
    ("generate", "a fox", "--width", "200"): "--width is 200; expected a multiple of 16, such as 192.",
    ("compare", "a fox", "--height", "100"): "--height is 100; expected a multiple of 16, such as 96.",
    (
        "generate",
        "a fox",
        "--base",
        "some/sdxl",
        "--width",
        "100",
    ): "--width is 100; expected a multiple of 8, such as 96.",
    ("generate", "a fox", "--steps", "900"): "--steps is 900; expected a whole number from 1 to 200",
    ("generate", "a fox", "--guidance-scale", "nan"): "--guidance-scale is nan; expected a number from 0 to 50.",
    ("generate", "a fox", "--guidance-scale", "inf"): "--guidance-scale is inf; expected a number from 0 to 50.",
    ("generate", "--prompt-file", "gone.txt"): "--prompt-file gone.txt cannot be read",
    ("generate", "a fox", "--out", "fox.jpg"): "--out fox.jpg must be the name of a PNG file",
    ("generate", "a fox", "--out", "/proc/none/fox.png"): "cannot be written to",
    (
        "generate",
        "a fox",
        "--negativ-promt",
        "cats",
    ): "--negativ-promt is no flag here: did you mean --negative-prompt?",
    ("generate", "a fox", "--zzz=1"): "--zzz is no flag here (see --help)",
    ("generate", "--conditioning", "gone.safetensors"): "gone.safetensors is no file",
    ("generate", "--conditioning", "gone.png"): "gone.png is no name for a conditioning",
    ("generate", "--conditioning", "{conditioning}", "--clip-skip", "1"): "leave --clip-skip out.",
    ("generate", "--conditioning", "{conditioning}", "a fox"): "holds an encoded prompt: leave PROMPT out.",
    ("generate", "--conditioning", "{conditioning}", "--steps", "900"): "--steps is 900",
    (
        "generate",
        "--conditioning",
        "{conditioning}",
        "--heat-maps",
        "a.png",
    ): "leave --heat-maps out, or pass the prompt",
    ("generate", "a fox", "--heat-maps", "maps.jpg"): "--heat-maps maps.jpg must be the name of a PNG file",
    ("generate", "a fox", "--heat-maps", "/proc/none/maps.png"): "cannot be written to",
    ("generate", "a fox", "--out", "a.png", "--heat-maps", "./a.png"): "is the picture's own file: pass another name",
    ("generate", "a fox", "--save-conditioning", "fox.png"): "fox.png is no name for a conditioning",
    ("generate", "a fox", "--save-conditioning", "/proc/none/a.safetensors"): "cannot be written to",
    ("generate", "a", "fox"): "unrecognized arguments: fox (a text of several words needs quotes)",
    ("compare", "a fox", "--refiner", "{file}"): "--refiner {file} is a file; expected the directory",
    ("compare", "a fox", "--columns", "stock", "stock"): "--columns names 'stock' 2 times",
    ("compare", "a fox", "--seed", "-1"): "--seed is -1; expected",
    ("convert", "./gone", "{empty}/new"): "./gone does not exist",
    ("convert", "miniature", "{empty}"): "exists: pass --overwrite",
    ("convert", "miniature", "{empty}/new", "--finelip", "gone.pt"): "gone.pt does not exist",
    ("export", "./gone", "{empty}/new"): "./gone does not exist",
    ("export", "miniature", "{empty}/new", "--formt", "comfyui"): "did you mean --format?",
    ("tokens", "a fox", "--base", "./gone"): "./gone does not exist",
    ("evaluate", "retrieval", "--model", "gone.pt"): "gone.pt does not exist",
    ("generate", "a fox", "--base", "Miniature"): "Miniature is no path here, nor a model that ships: did you mean min",
    ("generate", "a fox", "--base", "miniature-clip-1"): "miniature-clip-1 is a CLIP that ships with the package: pass",
    ("evaluate", "retrieval", "--model", "miniature-finlip-1"): "did you mean miniature-finelip-1?",
    ("generate", "a fox", "--base", "miniature "): "'miniature ' does not exist",
    ("generate", "a fox", "--base=~/gone/here"): "{home}/gone/here does not exist",
    ("evaluate", "retrieval", "--data", "csv:~/gone.csv"): "{home}/gone.csv does not exist",
    ("evaluate", "retrieval", "--data", "pictures:here"): "pictures:here is no data set: pass miniature, or one of",
    ("evaluate", "retrieval", "--data", "captions.json"): "captions.json is no data set",
    ("evaluate", "retrieval", "--data", "docci:gone"): "gone does not exist, or is no folder",
    ("evaluate", "retrieval", "--data", "csv:{empty}"): "does not exist, or is no file: pass the file of the data set",
    ("evaluate", "retrieval", "--data", "csv:"): "csv: names no path: pass csv:PATH",
    ("evaluate", "retrieval", "--data", "csv:{file}", "--images", "gone"): "gone does not exist, or is no folder",
    ("evaluate", "retrieval", "--data", "miniature:many"): "miniature:many names no number of scenes",
    ("evaluate", "retrieval", "--data", "webdataset:a.tar"): "is a stream for training only",
    ("evaluate", "retrieval", "--device", "gpu"): "--device: 'gpu' is no device: use one such as cpu, cuda",
    ("generate", "a fox", "--device", "cuda:"): "'cuda:' is no device",
    ("compare", "a fox", "--device", "cuda0"): "'cuda0' is no device",
    ("generate", "a fox", "--seed", "one"): "--seed: expected a whole number instead of one",
    ("generate", "a fox", "--guidance-scale", "much"): "--guidance-scale: expected a number instead of much",
    ("evaluate", "retrieval", "--split-name", "x"): "--split-name is no flag here: did you mean --split?",
    ("evaluate", "images", "--data", "docci:gone"): "gone does not exist, or is no folder",
    ("evaluate", "images", "--judge", "gone.pt"): "gone.pt does not exist",
    ("evaluate", "images", "--features", "./gone"): "./gone does not exist",
    ("evaluate", "images", "--sentence-judge", "gone.safetensors"): "gone.safetensors does not exist",
    ("evaluate", "images", "--layout", "tiif", "--images-per-prompt", "4"): "--images-per-prompt is 4; expected 1 in",
    ("evaluate", "images", "--layout", "dpg-bench", "--images-per-prompt", "4", "--width", "64"): "expected squares",
    ("evaluate", "images", "--columns", "stock", "stock"): "--columns names 'stock' 2 times",
    ("evaluate", "images", "--steps", "0"): "--steps",
    ("evaluate", "images", "--output-dir", "{full}"): "holds notes.txt, but no generation.json of a run",
    ("evaluate", "images", "--output-dir", "/proc/none"): "cannot be written to",
    ("evaluate", "images", "--output-dir", "{run}", "--seed", "4"): "drawn with seed 3, and now it is 4: set it back",
}


def test_mistakes_are_refused_before_torch_is_imported(tmp_path) -> None:
    file = tmp_path / "file.safetensors"
    file.touch()
    for name, inside in (("empty", None), ("full", "notes.txt"), ("run", "generation.json")):
        (tmp_path / name).mkdir()
        if inside:
            (tmp_path / name / inside).write_text('{"settings": {"negative_prompt": "", "seed": 3}, "columns": []}')
    conditioning = tmp_path / "conditioning.safetensors"
    width = torch.ones(1, 77, 8), torch.ones(1, 4)
    Conditioning(width[0], width[0], width[1], width[1], prompts=("a fox",)).save(conditioning)
    names = {"file": file, "conditioning": conditioning, "home": Path("~").expanduser()}
    names |= {name: tmp_path / name for name in ("empty", "full", "run")}
    commands = [[word.format(**names) for word in command] for command in MISTAKES]
    done = subprocess.run(
        [sys.executable, "-c", CHILD], input=json.dumps(commands), capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(commands)
    for command, expected, (code, errors, heavy) in zip(commands, MISTAKES.values(), found, strict=True):
        assert (code, heavy, len(errors.splitlines())) == (2, [], 1), (command, errors)
        assert errors.startswith(f"finelip-sdxl {command[0]}")
        assert expected.format(**names) in errors, command


# The hub


@pytest.fixture
def no_hub(monkeypatch, tmp_path) -> list[str]:
    """A hub that does not answer, and an empty cache. Returns the addresses that were asked."""
    asked: list[str] = []

    def request(self, method, url, **options) -> None:
        asked.append(str(url))
        raise huggingface_hub.utils.httpx.ConnectError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.utils.httpx.Client, "request", request)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("waits"))
    return asked


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "a fox", "--base", "some/sdxl"],
        ["generate", "a fox", "--finelip", "some/sdxl"],
        ["compare", "a fox", "--refiner", "some/sdxl"],
        ["generate", "a fox", "--lora", "some/sdxl"],
        ["generate", "a fox", "--lora", "some/sdxl:0.5"],
        ["generate", "a fox", "--vae", "some/sdxl"],
        ["generate", "a fox", "--vae", "none"],
        ["convert", "some/sdxl", "new"],
        ["export", "some/sdxl", "new"],
        ["export", "some/sdxl", "new", "--format", "comfyui"],
        ["tokens", "a fox", "--base", "some/sdxl"],
        ["evaluate", "retrieval", "--model", "some/sdxl"],
    ],
)
def test_an_unreachable_hub_is_asked_once_and_said_in_one_sentence(
    no_hub, tmp_path, monkeypatch, capsys, command
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    name = "none" if "none" in command else "some/sdxl"
    assert f"{name} is no path here, and the hub cannot be reached to look for it: pass a path, or connect." in line
    assert sum(address.endswith(f"/{name}") for address in no_hub) == 1


def test_models_in_the_cache_are_used_when_the_hub_cannot_be_reached(no_hub, tmp_path, caplog) -> None:
    repository = tmp_path / "models--some--sdxl"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots" / ("0" * 40)).mkdir(parents=True)
    options = Parser()
    options.add_argument("--base")
    check_models(options.parse_args(["--base", "some/sdxl"]))
    assert "The hub cannot be reached: models are taken from its cache" in caplog.text
    assert huggingface_hub.constants.HF_HUB_OFFLINE


# Messages


def test_a_terminal_is_told_before_seconds_without_a_word(monkeypatch, capsys) -> None:
    announce("Opening miniature…")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    announce("Opening miniature…")
    assert capsys.readouterr().err == "Opening miniature…\n"


@pytest.mark.slow
def test_warnings_name_flags_too_and_are_printed_once(stock_folder, tmp_path) -> None:
    out = str(tmp_path / "new")
    done = subprocess.run(
        [sys.executable, "-m", "finelip_sdxl.cli.main", "convert", stock_folder, out], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "pass a FineLIP or Long-CLIP as --finelip (--finelip-2 for the second one)." in done.stderr


def test_diffusers_says_each_message_once() -> None:
    quiet_diffusers()
    logger = logging.getLogger("diffusers")
    (handler,) = [handler for handler in logger.handlers if type(handler) is logging.StreamHandler]
    same, another = (logging.makeLogRecord({"msg": text}) for text in ("the same message", "another"))
    said = [bool(handler.filter(record)) for record in (same, same, another, same, another)]
    assert said == [True, False, True, False, False]
    quiet_diffusers()  # the next command
    assert handler.filter(same)


def test_handlers_of_others_hear_every_message_of_diffusers() -> None:
    logger, theirs = logging.getLogger("diffusers"), logging.NullHandler()
    logger.addHandler(theirs)
    quiet_diffusers()
    logger.removeHandler(theirs)
    assert not theirs.filters


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("`steps` is 0; expected more.", "--steps is 0; expected more."),
        ('set overflow="window" (to encode all) or overflow="truncate".',
         "set --overflow window (to encode all) or --overflow truncate."),
        ("finelip_merge='delta' adds: pass finelip=, or both.", "--finelip-merge delta adds: pass --finelip, or both."),
        ("or its config as config=.", "or its config as --config."),
        ("config=/a/b has no index", "--config /a/b has no index"),
        ("(`dtype`: float16)", "(--dtype: float16)"),
        ("`clip_skip` is 9", "`clip_skip` is 9"),
        ("/a/overflow=1/b and https://x.org/?config=1 stay", "/a/overflow=1/b and https://x.org/?config=1 stay"),
    ],
)  # fmt: skip
def test_arguments_in_messages_become_flags(message, expected) -> None:
    names = ("steps", "overflow", "finelip_merge", "finelip", "config", "dtype")
    assert with_flags(message, {name: f"--{name.replace('_', '-')}" for name in names}) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tokens", "a fox " * 300, "--overflow", "error"], "or set --overflow window (to encode all of it)"),
        (["convert", "{stock}", "{new}", "--finelip-merge", "delta"], "--finelip-merge delta adds a FineLIP's training:"
         " pass --finelip, --finelip-2 or both."),
        (["generate", "fox", "--base", "{stock}", "--variant", "fp8", "--out", "{new}.png"], "no weights of variant"),
        (["convert", "miniature", "{new}", "--finelip-base", "miniature"], "--finelip-base miniature goes with"),
        (["evaluate", "retrieval", "--data", "miniature:2", "--max-tokens", "999"], "--max-tokens is 999; expected"),
    ],
)  # fmt: skip
def test_errors_of_the_library_name_flags(stock_folder, tmp_path, capsys, arguments, message) -> None:
    assert main([argument.format(new=tmp_path / "new", stock=stock_folder) for argument in arguments]) == 2
    assert message in capsys.readouterr().err
    assert not Path(tmp_path / "new").exists()


# The recipes

RECIPE = """
import json, os, runpy, sys
for command in json.load(sys.stdin):
    sys.argv, sys.path[0] = command, os.path.dirname(command[0])
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as stopped:
        said = stopped.code
    print(json.dumps([str(said), sorted({"torch", "diffusers", "transformers"} & sys.modules.keys())]))
"""

RECIPE_MISTAKES = {
    ("align_adapter.py", "--text-step", "0", "--lerning-rate", "1"): "did you mean --learning-rate?",
    ("align_adapter.py", "--resolution", "200"): "--resolution is 200; expected a multiple of 16, such as 192",
    ("align_adapter.py", "--base", "./gone", "--captions", "txt:a"): "",
    ("align_adapter.py", "--base", "./gone", "--captions", "csv:a.csv"): "./gone does not exist",
    ("align_adapter.py", "--finelip", "gone.pt"): "gone.pt does not exist",
    ("align_adapter.py", "--guidance-scale", "nan"): "--guidance-scale: expected a number",
    ("train_finelip.py", "--base", "gone.pt", "--data", "csv:a.csv"): "gone.pt does not exist",
    ("train_finelip.py", "--batchsize", "8"): "--batchsize is no flag here: did you mean --batch-size?",
    ("train_finelip.py", "--epochs", "many"): "--epochs: expected a number above 0 instead of many",
    ("train_finelip.py", "--output-dir", "/proc/none"): "cannot be written to",
    ("train_finelip.py", "--data", "cvs:a.csv"): "cvs:a.csv is no data set",
    ("train_finelip.py", "--data", "coco:gone"): "gone does not exist, or is no folder",
    ("train_finelip.py", "--data", "webdataset:a.tar"): "pass --epoch-size",
    ("train_finelip.py", "--eval-data", "jsonl:gone.jsonl"): "gone.jsonl does not exist, or is no file",
    ("train_finelip.py", "--images", "gone"): "are drawn: pass no folder of images",
    ("align_adapter.py", "--captions", "miniature:0"): "miniature:0 names no number of scenes",
    ("align_adapter.py", "--captions", "sharegpt4v:gone.json"): "gone.json does not exist, or is no file",
    ("align_adapter.py", "--validation-prompts", "gone.txt"): "--validation-prompts gone.txt does not exist",
    ("train_lora.py", "--captions", "folder:gone"): "gone does not exist, or is no folder",
    ("train_lora.py", "--rnk", "4"): "did you mean --rank?",
    ("train_lora.py", "--base", "./gone", "--captions", "folder:."): "./gone does not exist",
}


def run_scripts(commands: list[list[str]], folder: Path) -> tuple[list[list], list[str]]:
    """Run scripts one after the other: the end and the heavy modules of each, and the lines of all errors."""
    done = subprocess.run(
        [sys.executable, "-c", RECIPE], input=json.dumps(commands), capture_output=True, text=True, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr.splitlines()


def test_recipes_refuse_mistakes_before_torch_is_imported(tmp_path) -> None:
    training = Path(__file__).parents[2] / "training"
    found, lines = run_scripts([[str(training / recipe), *flags] for recipe, *flags in RECIPE_MISTAKES], tmp_path)
    errors = iter(lines)
    for mistake, (said, heavy) in zip(RECIPE_MISTAKES, found, strict=True):
        line = next(errors) if said == "2" else said  # argparse writes it itself
        assert line.startswith(f"{mistake[0]}: error: "), mistake
        assert RECIPE_MISTAKES[mistake] in line
        assert heavy == [], mistake


SCRIPT_MISTAKES = {
    ("training/measure_memory.py", "--batch-sizes", "0"): "--batch-sizes: expected a whole number of at least 1",
    ("training/measure_memory.py", "--resolutoin", "512"): "did you mean --resolution?",
    ("training/measure_memory.py", "--device", "gpu"): "invalid choice: 'gpu'",
    ("benchmarks/memory.py", "--resolution", "big"): "--resolution: expected a whole number of at least 64",
    ("benchmarks/memory.py", "--onyl", "swaps"): "did you mean --only?",
    ("training/miniature/assemble.py", "--runs", "gone"): "--runs gone has no clip_1: train it first",
    ("training/miniature/assemble_adapter.py", "--output", "new"): "--runs runs/miniature has no adapter/last",
    ("training/miniature/assemble_finelip.py", "--rums", "new"): "did you mean --runs?",
}


def test_scripts_refuse_mistakes_before_torch_is_imported(tmp_path) -> None:
    repository = Path(__file__).parents[2]
    found, errors = run_scripts([[str(repository / script), *flags] for script, *flags in SCRIPT_MISTAKES], tmp_path)
    for mistake, line, (said, heavy) in zip(SCRIPT_MISTAKES, errors, found, strict=True):
        assert (said, heavy) == ("2", []), mistake
        assert SCRIPT_MISTAKES[mistake] in line


@pytest.mark.parametrize(
    "flags", [["--data", "txt:gone.txt"], ["--steps", "0"], ["--data", "miniature:3", "--layout", "tiif"], ["--colums"]]
)
def test_of_several_processes_only_the_first_tells_of_a_mistake(flags, tmp_path, monkeypatch, capsys) -> None:
    printed = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as stopped:
            sys.exit(main(["evaluate", "images", "--output-dir", str(tmp_path / "run"), *flags]))
        assert stopped.value.code == 2
        printed.append(capsys.readouterr().err.splitlines())
    assert len(printed[0]) >= 1
    assert "error: " in printed[0][-1]
    assert not [line for line in printed[1] if "error" in line]
