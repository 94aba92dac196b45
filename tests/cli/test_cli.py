"""The command line, run in this process on the tiny SDXL."""

import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
from PIL import Image

from finelip_sdxl import ConditioningAdapter, FineLIPSDXLPipeline, miniature_path
from finelip_sdxl.cli import compare, convert, export
from finelip_sdxl.cli.main import main
from finelip_sdxl.cli.options import open_device
from finelip_sdxl.comparison import comparison
from finelip_sdxl.console import printing_stops_nothing
from finelip_sdxl.data import formats
from finelip_sdxl.images import read_parameters
from finelip_sdxl.miniature.drawing import IMAGE_SIZE, draw_scene
from finelip_sdxl.miniature.notice import DRAWS
from finelip_sdxl.miniature.world import make_scene
from finelip_sdxl.prompts.plan import EncoderPlan, Window
from tests.helpers.single_file import save_single_file
from tests.helpers.tiny_sdxl import make_text_encoder

LONG = "The red fox is above the small blue square, 狐. " * 14


@pytest.fixture
def picture(tmp_path) -> str:
    return str(tmp_path / "new" / "picture.png")


def parameters(file: str) -> dict:
    return json.loads(Image.open(file).text["finelip_sdxl"])


def test_generate_writes_a_picture_that_says_how_it_was_made(stock_folder, picture, capsys) -> None:
    arguments = ["--base", stock_folder, "--steps", "2", "--seed", "3", "--device", "cpu", "--out", picture]
    assert main(["generate", LONG, "--negative-prompt", "large", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "text_encoder and text_encoder_2 encode prompt" in printed
    assert LONG in printed
    assert f"{picture} (seed 3)" in printed

    image = Image.open(picture)
    assert image.size == (16, 16)
    assert image.text["prompt"] == LONG
    found = parameters(picture)
    assert (found["prompt"], found["seed"], found["steps"], found["dtype"]) == (LONG, 3, 2, "float32")
    pipe = FineLIPSDXLPipeline.from_pretrained(stock_folder)
    generator = torch.Generator().manual_seed(3)
    expected = pipe(LONG, negative_prompt="large", num_inference_steps=2, generator=generator).images[0]
    assert image.tobytes() == expected.tobytes()


def test_generate_takes_options_and_a_prompt_from_a_file(stock_folder, picture, tmp_path, capsys) -> None:
    (tmp_path / "prompt.txt").write_text(LONG * 3, encoding="utf-8")
    arguments = ["--base", stock_folder, "--steps", "1", "--out", picture, "--num-images", "2", "--device", "cpu"]
    more = ["--dtype", "bfloat16", "--overflow", "truncate", "--width", "72", "--hidden-states", "last"]
    assert main(["generate", "--prompt-file", str(tmp_path / "prompt.txt"), *arguments, *more]) == 0
    assert "are CUT" in capsys.readouterr().out
    first, second = (parameters(picture.replace(".png", f"-{number}.png")) for number in (1, 2))
    assert second["seed"] == first["seed"] + 1
    assert (first["width"], first["height"], first["dtype"]) == (72, 16, "bfloat16")
    assert (first["overflow"], first["hidden_states"]) == ("truncate", "last")


def test_generate_takes_an_adapter_and_its_scale(stock_folder, picture, tmp_path, capsys) -> None:
    adapter = ConditioningAdapter((32, 48), pooled_dim=24, hidden_dim=4)
    torch.nn.init.normal_(adapter.states[0][-1].weight)
    adapter.save_pretrained(tmp_path / "adapter")
    arguments = ["generate", LONG, "--base", stock_folder, "--steps", "1", "--seed", "0", "--device", "cpu"]
    arguments += ["--out", picture]
    pictures = []
    for more in ([], ["--conditioning-adapter-scale", "0.0"], ["--conditioning-adapter", "none"]):
        assert main([*arguments, "--conditioning-adapter", str(tmp_path / "adapter"), *more]) == 0
        pictures.append(Image.open(picture).tobytes())
    assert pictures[0] != pictures[1] == pictures[2]
    assert parameters(picture)["conditioning_adapter"] == "none"
    assert parameters(picture)["conditioning_adapter_scale"] == 1
    capsys.readouterr()
    assert main([*arguments, "--conditioning-adapter-scale", "2"]) == 2
    assert "--conditioning-adapter-scale is 2.0" in capsys.readouterr().err


def test_generate_draws_again_from_an_encoded_prompt(stock_folder, picture, tmp_path, capsys) -> None:
    file = str(tmp_path / "fox.safetensors")
    arguments = ["--base", stock_folder, "--steps", "1", "--seed", "0", "--device", "cpu", "--out", picture]
    assert main(["generate", LONG, "--negative-prompt", "small", "--clip-skip", "1", *arguments]) == 0
    expected, printed = Image.open(picture).tobytes(), capsys.readouterr().out
    more = ["--save-conditioning", file]
    assert main(["generate", LONG, "--negative-prompt", "small", "--clip-skip", "1", *arguments, *more]) == 0
    assert Image.open(picture).tobytes() == expected
    assert f"\n{file}\n" in capsys.readouterr().out
    assert main(["generate", "--conditioning", file, *arguments]) == 0
    assert Image.open(picture).tobytes() == expected
    assert capsys.readouterr().out == printed
    found = parameters(picture)
    assert (found["prompt"], found["negative_prompt"]) == (LONG, "small")
    assert found["conditioning"] == "fox.safetensors"
    assert not {"clip_skip", "overflow", "hidden_states", "conditioning_adapter_scale"} & found.keys()


def test_generate_refuses_the_encoded_prompt_of_another_model(stock_folder, picture, tmp_path, capsys) -> None:
    arguments = ["--base", stock_folder, "--steps", "1", "--device", "cpu", "--out", picture]
    pipe = FineLIPSDXLPipeline.from_pretrained(stock_folder)
    several, other, wide = (str(tmp_path / f"{name}.safetensors") for name in ("several", "other", "wide"))
    pipe.encode(["a fox", "a hare"]).save(several)
    encoded = pipe.encode("a fox")
    replace(encoded, encoder_fingerprint="0123456789abcdef").save(other)
    widths = {name: encoded[name].repeat_interleave(2, dim=-1) for name in ("prompt_embeds", "negative_prompt_embeds")}
    replace(encoded, **widths).save(wide)
    for file, message in (
        (several, "holds 2 prompts; expected one"),
        (other, "fingerprint 0123456789abcdef, but this pipeline's have"),
        (wide, "are 160 wide, but this SDXL takes 80"),
    ):
        assert main(["generate", "--conditioning", file, *arguments]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    assert not Path(picture).exists()


def test_a_null_byte_does_not_end_the_prompt_in_the_picture(stock_folder, picture) -> None:
    arguments = ["--base", stock_folder, "--steps", "1", "--device", "cpu", "--out", picture]
    assert main(["generate", "a\0fox", *arguments]) == 0
    assert Image.open(picture).text["prompt"] == "a\N{REPLACEMENT CHARACTER}fox"
    assert parameters(picture)["prompt"] == "a\0fox"


class FakeComparison:
    """Stands in for the real one: notes what it is told, and draws red."""

    is_miniature = False
    pipe = SimpleNamespace(
        scheduler=EulerDiscreteScheduler(),
        short_prompt_encoder="original",
        overflow="window",
        hidden_states="last",
        weighting="a1111",
        emphasis="comfyui",
    )
    loaded: dict
    drawn: list

    @classmethod
    def load(cls, base, **loading) -> "FakeComparison":
        opened = cls()
        cls.loaded, cls.drawn = {"base": base, **loading}, []
        return opened

    def plan(self, prompt: str, columns: list[str]) -> dict[str, EncoderPlan]:
        parts = {"stock": [75], "compel": [75, 75, 25], "finelip": [175]}
        return {
            column: EncoderPlan(
                "text_encoder",
                "prompt",
                0,
                tuple(Window("", tuple(range(count))) for count in counts),
                positions=248 if column == "finelip" else 77,
                cut_tokens=175 - sum(counts),
            )
            for column, counts in parts.items()
            if column in columns
        }

    def draw(self, column, settings, traced=False) -> comparison.Picture:
        self.drawn.append((column, settings))
        return comparison.Picture(
            column, Image.new("RGB", (settings.width or 64, settings.height or 64), "red"), settings, seconds=1.5
        )


@pytest.fixture
def fake(monkeypatch) -> type[FakeComparison]:
    monkeypatch.setattr(comparison, "Comparison", FakeComparison)
    monkeypatch.setattr(compare, "check_models", lambda options: None)  # the models' names are invented
    return FakeComparison


def test_compare_draws_columns_and_seeds_into_one_picture(fake, picture, capsys) -> None:
    arguments = ["--columns", "finelip", "stock", "--seeds", "2", "--seed", "7", "--device", "cpu"]
    more = ["--steps", "4", "--guidance-scale", "3", "--negative-prompt", "large", "--width", "64", "--height", "72"]
    loading = ["--base", "some/sdxl", "--finelip", "some/clip", "--refiner", "some/refiner", "--dtype", "bfloat16"]
    scale = ["--conditioning-adapter-scale", "0.5", "--hidden-states", "last"]
    assert main(["compare", LONG, "--out", picture, *arguments, *more, *loading, *scale]) == 0

    order = [("stock", 7), ("finelip", 7), ("stock", 8), ("finelip", 8)]
    assert [(column, drawn.seed) for column, drawn in fake.drawn] == order
    assert fake.drawn[0][1] == comparison.Settings(LONG, "large", 4, 3.0, 7, 64, 72, 0.5)
    told = ("base", "finelip", "refiner", "dtype", "offload")
    assert [fake.loaded[name] for name in told] == ["some/sdxl", "some/clip", "some/refiner", torch.bfloat16, False]
    assert capsys.readouterr().out.splitlines() == [
        "Stock SDXL encodes 77 of 177 tokens, in 1 window of 77 positions; 100 are CUT",
        "FineLIP-SDXL encodes 177 of 177 tokens, in 1 window of 248 positions; nothing is cut",
        "Stock SDXL drew seed 7 in 1.5 s",
        "FineLIP-SDXL drew seed 7 in 1.5 s",
        "Stock SDXL drew seed 8 in 1.5 s",
        "FineLIP-SDXL drew seed 8 in 1.5 s",
        picture,
    ]
    grid = Image.open(picture)
    assert (np.asarray(grid) == (255, 0, 0)).all(axis=-1).sum() == 4 * (4 * 64) * (4 * 72)
    found = read_parameters(picture)
    assert (found["prompt"], found["columns"], found["seeds"]) == (LONG, ["stock", "finelip"], [7, 8])
    assert (found["width"], found["refiner"], found["negative_prompt"]) == (64, "some/refiner", "large")
    assert (found["short_prompt_encoder"], found["overflow"], found["weighting"]) == ("original", "window", "a1111")
    assert comparison.Settings.from_parameters(found) == replace(
        fake.drawn[0][1], hidden_states="last", weighting="a1111", emphasis="comfyui"
    )


def test_compare_draws_all_columns_of_one_random_seed_by_default(fake, picture, capsys) -> None:
    assert main(["compare", LONG, "--out", picture, "--device", "cpu"]) == 0
    assert [column for column, _ in fake.drawn] == ["stock", "compel", "finelip"]
    assert len({drawn.seed for _, drawn in fake.drawn}) == 1
    assert "compel encodes 177 of 177 tokens, in 3 windows of 77 positions; nothing is cut" in capsys.readouterr().out
    seeds = read_parameters(picture)["seeds"]
    assert main(["compare", LONG, "--out", picture, "--device", "cpu"]) == 0
    assert read_parameters(picture)["seeds"] != seeds


def test_compare_says_in_one_line_that_the_memory_did_not_suffice(fake, picture, monkeypatch, capsys) -> None:
    def draw(self, column, settings, traced=False) -> None:
        raise MemoryError("The memory did not suffice.")

    monkeypatch.setattr(fake, "draw", draw)
    assert main(["compare", LONG, "--out", picture, "--device", "cpu"]) == 2
    assert capsys.readouterr().err == "finelip-sdxl compare: error: The memory did not suffice.\n"


@pytest.mark.parametrize(
    ("is_miniature", "prompt", "expected"),
    [
        (True, "The top left holds a blue leaf. In the top center there is a red moon.", "1 of 2 objects right"),
        (True, "Somewhere there is a fox.", None),
        (False, "The top left holds a blue leaf.", None),
    ],
)
def test_compare_counts_on_the_miniature_what_is_right(
    fake, picture, monkeypatch, is_miniature, prompt, expected
) -> None:
    captions = []

    def label_grid(*arguments, **named) -> Image.Image:
        captions.append(named["captions"])
        return Image.new("RGB", (8, 8))

    def draw(self, column, settings, traced=False) -> comparison.Picture:
        return comparison.Picture(column, draw_scene(make_scene("unseen-0")), settings, seconds=0.0)

    monkeypatch.setattr(comparison, "label_grid", label_grid)
    monkeypatch.setattr(fake, "is_miniature", is_miniature)
    monkeypatch.setattr(fake, "draw", draw)
    assert main(["compare", prompt, "--out", picture, "--device", "cpu", "--columns", "stock", "--seeds", "2"]) == 0
    assert captions == [expected and [[expected], [expected]]]


def test_compare_draws_with_the_miniature(picture, capsys) -> None:
    prompt = "The top left holds a blue leaf. In the top center there is a red moon. " * 8
    arguments = ["--steps", "2", "--seed", "0", "--device", "cpu", "--dtype", "float32", "--out", picture]
    assert main(["compare", prompt, *arguments]) == 0
    printed = capsys.readouterr().out
    assert "Stock SDXL encodes 77 of 146 tokens, in 1 window of 77 positions; 69 are CUT" in printed
    assert "compel encodes 146 of 146 tokens, in 2 windows of 77 positions; nothing is cut" in printed
    assert "FineLIP-SDXL encodes 146 of 146 tokens, in 1 window of 154 positions; nothing is cut" in printed
    assert Image.open(picture).width > 3 * IMAGE_SIZE
    found = read_parameters(picture)
    assert (found["columns"], found["seeds"], found["width"]) == (["stock", "compel", "finelip"], [0], IMAGE_SIZE)


@pytest.mark.parametrize("columns", [["stock", "stock"], ["finelip", "compel", "finelip"]])
def test_compare_refuses_a_column_that_is_there_twice(fake, picture, capsys, columns) -> None:
    assert main(["compare", "a fox", "--out", picture, "--columns", *columns]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"--columns names '{columns[0]}' 2 times: pass each column once.")
    assert not Path(picture).exists()


def test_compare_offers_the_columns_that_there_are(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    assert f"--columns {{{','.join(comparison.COLUMNS)}}}" in capsys.readouterr().out


def test_convert_writes_what_stock_and_ours_open(stock_folder, tmp_path, capsys) -> None:
    finelip, out = tmp_path / "finelip", tmp_path / "deep" / "converted"
    make_text_encoder(32, positions=248, seed=7).save_pretrained(finelip)
    options = ["--finelip", str(finelip), "--overflow", "error", "--dtype", "float16"]
    assert main(["convert", stock_folder, str(out), *options]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert [path.name for path in out.parent.iterdir()] == ["converted"], "no temporary directory is left"
    pipe = FineLIPSDXLPipeline.from_pretrained(out, dtype=torch.float16)
    assert pipe.overflow == "error"
    assert StableDiffusionXLPipeline.from_pretrained(out).tokenizer.model_max_length == 248

    before = (out / "model_index.json").read_text()
    assert main(["convert", stock_folder, str(out)]) == 2
    assert "exists: pass --overwrite" in capsys.readouterr().err
    assert (out / "model_index.json").read_text() == before
    assert main(["convert", stock_folder, str(out), "--overwrite"]) == 0
    assert "overflow" not in (out / "model_index.json").read_text()
    assert [path.name for path in out.parent.iterdir()] == ["converted"]


def test_convert_keeps_the_kind_of_pipeline(components, tmp_path) -> None:
    components |= {"text_encoder": None, "tokenizer": None, "requires_aesthetics_score": True}
    StableDiffusionXLImg2ImgPipeline(**components).save_pretrained(tmp_path / "refiner")
    assert main(["convert", str(tmp_path / "refiner"), str(tmp_path / "out")]) == 0
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionXLImg2ImgPipeline"
    assert index["requires_aesthetics_score"] is True


def test_convert_keeps_what_lies_beside_the_pipeline_that_it_overwrites(stock_folder, tmp_path) -> None:
    out = tmp_path / "long"
    assert main(["convert", stock_folder, str(out)]) == 0
    (out / "notes.txt").write_text("mine")
    (out / "loras").mkdir()
    (out / "loras" / "a.txt").write_text("mine too")
    (out / "vae" / "stale.bin").write_text("the pipeline's")
    assert main(["convert", stock_folder, str(out), "--overwrite"]) == 0
    assert (out / "notes.txt").read_text() == "mine"
    assert (out / "loras" / "a.txt").read_text() == "mine too"
    assert not (out / "vae" / "stale.bin").exists()


def test_a_mark_at_the_beginning_of_a_file_is_no_part_of_the_prompt(tmp_path, capsys) -> None:
    outputs = []
    for encoding in ("utf-8", "utf-8-sig"):  # the latter as some editors save
        (tmp_path / "prompt.txt").write_text("a red star", encoding=encoding)
        assert main(["tokens", "--prompt-file", str(tmp_path / "prompt.txt")]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]


def test_convert_overwrites_nothing_but_pipelines(stock_folder, tmp_path, capsys) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "letter.txt").write_text("dear")
    assert main(["convert", stock_folder, str(tmp_path / "letters"), "--overwrite"]) == 2
    assert "not a saved pipeline" in capsys.readouterr().err
    assert (tmp_path / "letters" / "letter.txt").read_text() == "dear"


def test_a_failed_convert_leaves_nothing(stock_folder, tmp_path, capsys) -> None:
    torch.save({"unet.weight": torch.zeros(1)}, tmp_path / "other.pt")
    assert main(["convert", stock_folder, str(tmp_path / "out"), "--finelip", str(tmp_path / "other.pt")]) == 2
    assert not (tmp_path / "out").exists()


@pytest.fixture
def saved(stock_folder, tmp_path) -> Path:
    """A pipeline in a folder in which somebody keeps a note."""
    folder = tmp_path / "saved"
    shutil.copytree(stock_folder, folder)
    (folder / "notes").mkdir()
    (folder / "notes" / "a.txt").write_text("mine")
    return folder


def reads_long_prompts(folder: Path) -> bool:
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    return config["max_position_embeddings"] == 248


@pytest.mark.parametrize(
    ("here", "base", "out"),
    [
        ("saved", "{stock}", "."),
        ("saved/notes", "{stock}", ".."),
        ("saved", ".", "../saved"),
        (".", "{stock}", "saved/notes/.."),
        (".", "saved", "saved/"),
        (".", "saved", "link"),
    ],
)
def test_convert_writes_where_a_name_leads(stock_folder, saved, tmp_path, monkeypatch, here, base, out) -> None:
    (tmp_path / "link").symlink_to("saved")
    monkeypatch.chdir(tmp_path / here)
    assert main(["convert", base.format(stock=stock_folder), out, "--overwrite"]) == 0
    assert reads_long_prompts(saved)
    assert (saved / "notes" / "a.txt").read_text() == "mine"
    assert (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "saved"]


def test_convert_writes_into_its_base_and_keeps_a_base_in_what_it_writes(saved, tmp_path) -> None:
    long = saved / "notes" / "long"
    assert main(["convert", str(saved), str(long)]) == 0
    assert reads_long_prompts(long)
    assert not reads_long_prompts(saved)
    assert main(["convert", str(long), str(saved), "--overwrite"]) == 0
    assert reads_long_prompts(saved)
    assert reads_long_prompts(long)


def make_place(kind: str, path: Path) -> str:
    """What is no place for a folder: its name."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "file":
        path.write_text("mine")
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "link to a file":
        make_place("file", path.with_name("file"))
        path.symlink_to("file")
    elif kind == "damaged":
        path.mkdir()
        (path / "model_index.json").write_text('{"unet": ')
    elif kind == "list":
        path.mkdir()
        (path / "model_index.json").write_text("[1]")
    else:
        return kind
    return str(path)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("pipe", "is not a saved pipeline"),
        ("file", "is not a saved pipeline"),
        ("loop", "is not a saved pipeline"),
        ("link to a file", "is not a saved pipeline"),
        ("damaged", "has a damaged model_index.json"),
        ("list", "has a damaged model_index.json"),
        ("/dev/null", "is not a saved pipeline"),
        ("/proc", "is where a disk is mounted"),
        ("/", "is where a disk is mounted"),
        ("", "has an empty name"),
        (" ", "has an empty name"),
        ("a" * 256, "cannot be written to (File name too long)"),
    ],
)
@pytest.mark.parametrize("command", [["convert", "miniature"], ["export", "miniature"]])
def test_what_is_no_place_for_a_pipeline_is_refused_before_anything_is_loaded(
    tmp_path, monkeypatch, capsys, command, kind, message
) -> None:
    for module in (convert, export):
        monkeypatch.setattr(module, "open_base", lambda *arguments, **options: pytest.fail("loaded"))
    out = make_place(kind, tmp_path / "out")
    before = sorted(tmp_path.iterdir())
    assert main([*command, out, "--overwrite"]) == 2
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("command", [["convert", "{stock}", "{out}"], ["export", "{stock}", "{out}"]])
def test_a_full_disk_is_one_line_and_leaves_what_was_there(stock_folder, saved, tmp_path, capsys, command) -> None:
    arguments = [argument.format(stock=stock_folder, out=saved) for argument in command]
    before = (saved / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # writers meet it as they meet a full disk
    try:
        assert main([*arguments, "--overwrite"]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "error" in line)
    assert f"{saved} cannot be written to (File too large): make room, or pass another place." in line
    assert (saved / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == before
    assert not reads_long_prompts(saved)
    assert os.listdir(tmp_path) == ["saved"]


@pytest.mark.usefixtures("heard_signals")
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", 130)])
def test_a_signal_leaves_what_was_there(stock_folder, saved, tmp_path, monkeypatch, capsys, name, code) -> None:
    def save(pipe, folder: Path) -> None:
        (folder / "unet").mkdir()
        signal.raise_signal(getattr(signal, name))

    monkeypatch.setattr(FineLIPSDXLPipeline, "save_pretrained", save)
    assert main(["convert", stock_folder, str(saved), "--overwrite"]) == code
    assert capsys.readouterr().err.splitlines()[-1] == "finelip-sdxl convert: stopped"
    assert (saved / "unet" / "config.json").is_file()
    assert os.listdir(tmp_path) == ["saved"]


def test_weights_are_as_readable_as_other_files(stock_folder, tmp_path) -> None:
    assert main(["convert", stock_folder, str(tmp_path / "long")]) == 0
    assert main(["export", stock_folder, str(tmp_path / "files"), "--format", "comfyui"]) == 0
    (tmp_path / "other").touch()
    modes = {file.stat().st_mode for file in tmp_path.rglob("*") if file.is_file()}
    assert modes == {(tmp_path / "other").stat().st_mode}


def test_the_miniature_is_a_config_for_a_single_file(tmp_path, capsys) -> None:
    file = tmp_path / "fine_tune.safetensors"
    save_single_file(StableDiffusionXLPipeline.from_pretrained(miniature_path()), file)
    assert main(["convert", str(file), str(tmp_path / "long"), "--config", "miniature"]) == 0
    assert reads_long_prompts(tmp_path / "long")
    capsys.readouterr()
    assert main(["tokens", "a red star", "--base", str(file), "--config", "miniature"]) == 0
    read = capsys.readouterr().out
    assert main(["tokens", "a red star", "--base", str(miniature_path())]) == 0
    assert capsys.readouterr().out == read


def test_a_picture_goes_where_a_link_leads(fake, tmp_path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "a.png").symlink_to("far/b.png")
    (tmp_path / "null.png").symlink_to("/dev/null")
    for name in ("a.png", "null.png"):
        assert main(["compare", "a fox", "--out", str(tmp_path / name), "--device", "cpu"]) == 0
        assert (tmp_path / name).is_symlink()
    assert read_parameters(tmp_path / "far" / "b.png")["prompt"] == "a fox"
    assert Path("/dev/null").is_char_device()


def test_a_picture_does_not_say_where_it_was_made(fake, stock_folder, tmp_path, monkeypatch) -> None:
    home = tmp_path / "home" / "me"
    (home / "loras").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    (home / "a.txt").write_text("a fox")
    (home / "fine.safetensors").touch()
    arguments = ["--base", f"{home}/fine.safetensors", "--finelip", f"{home}/loras", "--finelip-2", "C:\\Users\\me\\b"]
    arguments += ["--config", "~/sdxl", "--conditioning-adapter", f"{home}/gone/adapter", "--refiner", "../me/refiner"]
    arguments += ["--finelip-base", "stabilityai/stable-diffusion-xl-base-1.0", "--finelip-merge", "delta"]
    file = str(tmp_path / "a.png")
    assert main(["compare", "--prompt-file", str(home / "a.txt"), "--out", file, "--device", "cpu", *arguments]) == 0
    found = read_parameters(file)
    names = ("base", "finelip", "finelip_2", "config", "conditioning_adapter", "refiner", "finelip_base")
    assert [found[name] for name in names] == [
        "fine.safetensors",
        "loras",
        "b",
        "sdxl",
        "adapter",
        "refiner",
        "stabilityai/stable-diffusion-xl-base-1.0",
    ]
    for said in (str(tmp_path), "Users", "me/", "~"):
        assert said not in json.dumps(found)
    file = str(tmp_path / "b.png")
    assert main(["generate", "a fox", "--base", stock_folder, "--steps", "1", "--device", "cpu", "--out", file]) == 0
    assert read_parameters(file)["base"] == Path(stock_folder).name


@pytest.mark.parametrize("prompt", [LONG, LONG * 4, "a fox", ""])
@pytest.mark.parametrize("saved", [False, True])
def test_tokens_prints_what_the_pipeline_reports(stock_folder, tmp_path, capsys, prompt, saved) -> None:
    pipe = FineLIPSDXLPipeline.from_pretrained(stock_folder, short_prompt_encoder="long", length_buckets=())
    if saved:
        pipe.save_pretrained(tmp_path)
    else:
        pipe = FineLIPSDXLPipeline.from_pretrained(stock_folder)
    base = str(tmp_path) if saved else stock_folder
    assert main(["tokens", prompt, "--base", base, "--negative-prompt", "large"]) == 0
    assert capsys.readouterr().out.strip() == str(pipe.describe_prompt(prompt, negative_prompt="large"))


def test_tokens_needs_no_weights(stock_folder, tmp_path, capsys) -> None:
    pipe = FineLIPSDXLPipeline.from_pretrained(stock_folder)
    pipe.save_pretrained(tmp_path)
    for file in tmp_path.rglob("*.safetensors"):
        file.unlink()
    assert main(["tokens", "a fox", "--base", str(tmp_path), "--overflow", "error"]) == 0
    assert "as stock SDXL encodes it" in capsys.readouterr().out


def test_evaluate_retrieval_prints_a_table_and_writes_its_figures(tmp_path, capsys) -> None:
    file = tmp_path / "new" / "figures.json"
    arguments = ["evaluate", "retrieval", "--data", "miniature:10", "--model", "miniature-clip-1", "--device", "cpu"]
    assert main([*arguments, "--json", str(file)]) == 0
    first, _, _, row, last = capsys.readouterr().out.splitlines()
    assert first == "miniature-clip-1 on miniature:10: 10 images, 10 texts of up to 248 tokens"
    assert last == str(file)
    found = json.loads(file.read_text())
    recall = found["recall"]["global"]
    shares = [recall[way][f"R@{k}"] for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)]
    assert row.split() == ["global", *(f"{100 * share:.1f}" for share in shares)]
    assert found["command"].startswith("finelip-sdxl evaluate retrieval --data miniature:10 --model")
    assert found["options"]["max_tokens"] == 248
    assert found["versions"]["torch"] == torch.__version__
    assert {"date", "machine"} <= found.keys()
    assert [path.name for path in file.parent.iterdir()] == ["figures.json"], "no temporary file is left"

    assert main([*arguments, "--no-stretch", "--dtype", "bfloat16", "--batch-size", "3"]) == 0
    assert "texts of up to 77 tokens" in capsys.readouterr().out
    assert main([*arguments, "--max-tokens", "50"]) == 0
    assert "texts of up to 50 tokens" in capsys.readouterr().out


def test_evaluate_retrieval_names_the_images_that_it_leaves_out(tmp_path, capsys) -> None:
    Image.new("RGB", (50, 40), "red").save(tmp_path / "fox.png")
    rows = ["image,caption", "fox.png,a red star"] + [f"broken-{number}.png,a blue ring" for number in range(7)]
    (tmp_path / "data.csv").write_text("\n".join(rows))
    arguments = ["--data", f"csv:{tmp_path / 'data.csv'}", "--model", "miniature-clip-1", "--device", "cpu"]
    assert main(["evaluate", "retrieval", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "1 images, 1 texts" in printed
    assert "left out, with their captions, 7 images that cannot be read:" in printed
    assert "broken-4.png" in printed
    assert "broken-5.png" not in printed
    assert "and 2 more" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "pictures:here"], "pictures:here is no data set"),
        (["--data", "urban1k:{empty}/none"], "does not exist"),
        (["--model", "none.pt"], "none.pt does not exist"),
        (["--model", "{text_encoder}"], "has no image tower"),
        (["--model", "miniature-clip-1", "--tokenizer", "{empty}"], "pass a tokenizer's directory"),
        (["--model", "miniature-clip-1", "--max-tokens", "249"], "--max-tokens is 249; expected from 3 to 248"),
        (["--json", "{empty}"], "is a directory"),
        (["--json", "a" * 256], "cannot be written to (File name too long)"),
        (["--json", ""], "is a directory"),
    ],
)
def test_mistakes_in_an_evaluation_are_one_line_on_stderr(tmp_path, capsys, arguments, message) -> None:
    names = {"empty": tmp_path, "text_encoder": miniature_path() / "text_encoder"}
    options = ["--device", "cpu", "--data", "miniature:2", *(argument.format(**names) for argument in arguments)]
    assert main(["evaluate", "retrieval", *options]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("finelip-sdxl evaluate retrieval: error: ")
    assert message in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate"], "Pass one prompt"),
        (["generate", "a", "--prompt", "b"], "Pass one prompt"),
        (["tokens", "a", "--base", "no/such/folder"], "no/such/folder"),
        (["tokens", "--prompt-file", "missing.txt"], "missing.txt"),
        (["tokens", "--prompt-file", "{binary}"], "is not text in UTF-8"),
        (["tokens", "{endless}", "--base", "{stock}"], "at most 20,000"),
        (["tokens", "{long}", "--base", "{stock}", "--overflow", "error"], "expected at most 248"),
        (["tokens", "{breaks}", "--base", "{stock}", "--weighting", "a1111"], "needs 2,500 windows"),
        (["tokens", "fox{signs}", "--base", "{stock}", "--weighting", "compel"], "has weight 2.24539e+41"),
        (["tokens", "a", "--config", "miniature"], "config miniature goes with a single file"),
        (["generate", "a", "--out", "picture.jpg"], "must be the name of a PNG file"),
        (["generate", "a", "--base", "{stock}", "--device", "cpu", "--offload"], "the device is the CPU"),
        (
            ["generate", "a", "--base", "{stock}", "--device", "cpu", "--width", "100", "--out", "{png}"],
            "--width is 100; expected a multiple of 8",
        ),
        (["generate", "a", "--base", "{stock}", "--device", "cpu", "--finelip", "x.pt", "--out", "{png}"], "x.pt"),
        (["generate", "a", "--base", "{empty}", "--device", "cpu", "--out", "{png}"], "model_index.json"),
        (["generate", "a", "--device", "cpu", "--seed", "-1", "--out", "{png}"], "--seed is -1; expected"),
        (["generate", "a", "--device", "cpu", "--base", "./nowhere", "--out", "{png}"], "does not exist"),
        *[([command, "a", "--out", "/proc/1/a.png"], "cannot be written to") for command in ("generate", "compare")],
        (["convert", "{stock}", "/proc/none/long"], "cannot be written to"),
        *[
            ([command, "a", "--out", f"{'a' * 252}.png"], "cannot be written to (File name too long)")
            for command in ("generate", "compare")
        ],
        (["generate", "a", "--out", "{png}/a.png"], "cannot be written to (Not a directory)"),
        (["export", "miniature", "{png}", "--format", "comfyui"], "is a file: pass the name of a directory"),
        (["export", "miniature", "", "--format", "comfyui"], "has an empty name"),
        (["compare"], "Pass one prompt"),
        (["compare", "a", "--out", "grid.jpg"], "must be the name of a PNG file"),
        (["compare", "a", "--out", "{png}", "--seed", "-1"], "--seed is -1"),
        (["compare", "a", "--out", "{png}", "--steps", "500"], "--steps is 500"),
        (["compare", "a", "--out", "{png}", "--device", "cpu", "--offload"], "the device is the CPU"),
        (["compare", "a", "--out", "{png}", "--device", "cpu", "--base", "{empty}"], "model_index.json"),
        (["convert", "{empty}", "{empty}/out"], "model_index.json"),
        (["generate", "{endless}", "--base", "no/such/folder", "--device", "cpu", "--out", "{png}"], "at most 20,000"),
        (["tokens", "a", "--base", "{sd}"], "lacks the CLIP text encoders of an SDXL"),
        *[
            ([command, "a", "--out", "{png}", "--device", "cpu", *more], message)
            for command in ("generate", "compare")
            for more, message in (
                (["--base", "{sd}"], "is a StableDiffusionPipeline; expected an SDXL"),
                (["--base", "{one}"], "lacks one of SDXL's two text encoders"),
                (["--base", "{cut}"], "is not a whole safetensors file ("),
                (["--base", "{stock}", "--variant", "fp8"], "has no weights of variant fp8"),
                (["--base", "{stock}", "--finelip", "{stock}"], "pass an encoder in it, such as {stock}/text_encoder"),
                (["--base", "{stock}", "--finelip-2", "{stock}/text_encoder"], "has no text projection"),
            )
        ],
        (["compare", "a", "--out", "{png}", "--device", "cpu", "--base", "{stock}", "--refiner", "{png}"], "is a file"),
        (
            ["compare", "a", "--out", "{png}", "--device", "cpu", "--base", "{stock}", "--negative-prompt", "(" * 10],
            "compel would take minutes",
        ),
    ],
)
def test_mistakes_are_one_line_on_stderr(stock_folder, tmp_path, capsys, arguments, message) -> None:
    binary, empty = tmp_path / "binary.txt", tmp_path / "empty"
    binary.write_bytes(b"\xff\xfe\x00")
    empty.mkdir()
    names = {"stock": stock_folder, "binary": binary, "empty": empty, "png": tmp_path / "a.png"}
    names["png"].touch()
    for name in ("sd", "one", "cut"):
        if f"{{{name}}}" in arguments:
            names[name] = make_odd(name, stock_folder, tmp_path)
    names |= {"endless": "a" * 100_000, "long": LONG * 4, "breaks": "a BREAK " * 2500, "signs": "+" * 7448}
    assert main([argument.format(**names) for argument in arguments]) == 2
    captured = capsys.readouterr()
    line = captured.err.strip().splitlines()[-1]
    assert line.startswith(f"finelip-sdxl {arguments[0]}: error: ")
    assert message.format(**names) in line
    assert "Traceback" not in captured.err


@pytest.mark.parametrize("command", ["generate", "compare"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--width", "9"], "--width is 9; expected a whole number from 64 to 2048"),
        (["--width", "100000000"], "--width is 100000000; expected"),
        (["--width", "80000", "--height", "80000"], "--width is 80000; expected"),
        (["--height", "100"], "--height is 100; expected a multiple of 8, such as 96"),
        (["--steps", "201"], "--steps is 201; expected a whole number from 1 to 200"),
        *[([f"--guidance-scale={value}"], f"--guidance-scale is {value}") for value in ("nan", "inf", "-1.0", "51.0")],
        *[
            ([f"--conditioning-adapter-scale={value}"], f"--conditioning-adapter-scale is {value}")
            for value in ("nan", "-inf", "1.1")
        ],
        (["--seed", str(2**32)], "--seed is 4294967296; expected a whole number from 0 to 4294967295"),
        (["--seed", "-1"], "--seed is -1"),
        (["--negative-prompt", "a" * 20_001], "--negative-prompt has 20,001 characters"),
        (["--negative-prompt", "\udcff"], "--negative-prompt holds half of a surrogate pair"),
    ],
)
def test_settings_are_checked_before_anything_is_loaded(command, arguments, message, tmp_path, capsys) -> None:
    options = ["--base", "no/such/folder", "--device", "cpu", "--out", str(tmp_path / "a.png")]
    assert main([command, "a fox", *options, *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize("command", ["tokens", "generate", "compare"])
def test_a_prompt_is_named_as_it_was_passed(command, tmp_path, capsys) -> None:
    long = "a" * 20_001
    (tmp_path / "long.txt").write_text(long)
    for passed, named in {
        ("--prompt-file", str(tmp_path / "long.txt")): "--prompt-file",
        ("--prompt", long): "--prompt",
        (long,): "PROMPT",
    }.items():
        assert main([command, *passed]) == 2
        assert f"error: {named} has 20,001 characters" in capsys.readouterr().err


def test_the_last_of_several_seeds_is_in_range_too(tmp_path, capsys) -> None:
    options = ["--device", "cpu", "--out", str(tmp_path / "a.png"), "--seed", str(2**32 - 2)]
    assert main(["generate", "a fox", *options, "--num-images", "3"]) == 2
    assert "--seed is 4294967296" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name",
    ["", " ", "cpu:1", "cpu:256", "CPU", "None", "meta", "xla", "fpga", "hpu", "privateuseone", "cuda:99", "cuda:-1",
     "cuda:256", "cuda:99999999999", "mps:7", "\0", "\udcff", "狐", "a" * 1000],
)  # fmt: skip
def test_no_string_but_a_device_is_one(name) -> None:
    with pytest.raises(ValueError, match=r"--device .* (is no device|is not on this machine): use one"):
        open_device(name)


def test_devices_of_this_machine_are_taken() -> None:
    assert open_device("cpu") == torch.device("cpu")
    assert open_device("cpu:0") == torch.device("cpu", 0)
    assert open_device(None).type == open_device(str(open_device(None))).type


@pytest.mark.parametrize(
    ("channels", "message"),
    [
        ({"in_channels": 9}, "takes 9 channels and returns 4, and its VAE has 4. .*by FineLIPSDXLInpaintPipeline"),
        ({"in_channels": 8}, "takes 8 channels and returns 4.*InstructPix2Pix"),
        ({"in_channels": 5}, "takes 5 channels.*They do not belong together"),
        ({"out_channels": 8}, "takes 4 channels and returns 8"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "compare"])
def test_a_unet_that_draws_from_more_than_a_prompt_is_refused(
    command, channels, message, components, tmp_path, capsys
) -> None:
    unet = components["unet"]
    components["unet"] = type(unet).from_config({**unet.config, **channels})
    StableDiffusionXLPipeline(**components).save_pretrained(tmp_path / "base")
    options = ["--base", str(tmp_path / "base"), "--device", "cpu", "--out", str(tmp_path / "a.png")]
    assert main([command, "a fox", *options]) == 2
    assert re.search(message, capsys.readouterr().err.splitlines()[-1])
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to"),
    ],
)
def test_generate_says_in_one_line_that_the_memory_did_not_suffice(
    error, stock_folder, picture, monkeypatch, capsys
) -> None:
    def draw(self, *args, **kwargs) -> None:
        raise error

    monkeypatch.setattr(FineLIPSDXLPipeline, "__call__", draw)
    options = ["--base", stock_folder, "--device", "cpu", "--out", picture]
    assert main(["generate", "a fox", *options, "--width", "64", "--num-images", "2"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "The memory did not suffice for 2 pictures of 64 × 16 pixels: try fewer at a time" in line
    assert not Path(picture).exists()


def test_a_prompt_file_is_read_up_to_the_limit(tmp_path, capsys) -> None:
    file = tmp_path / "prompt.txt"
    with file.open("wb") as opened:  # sparse: takes no room
        opened.truncate(10 * 2**30)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "long.txt").write_text("狐" * 20_001, encoding="utf-8")
    (tmp_path / "cut.txt").write_bytes("狐".encode()[:2])
    for name, message in (
        (str(file), "is too long: at most 20,000 characters"),
        (str(tmp_path / "long.txt"), "20,001 characters; expected at most 20,000"),
        (str(tmp_path / "cut.txt"), "is not text in UTF-8"),
        ("/dev/zero", "cannot be read (it is no file but a device or a pipe)"),
        (str(tmp_path / "pipe"), "cannot be read (it is no file but a device or a pipe)"),
        (str(tmp_path), "cannot be read (Is a directory)"),
        (str(tmp_path / "none.txt"), "cannot be read (No such file or directory)"),
        ("", "cannot be read"),
        ("a" * 300, "cannot be read (File name too long)"),
        ("a\0b", "cannot be read (embedded null byte)"),
    ):
        assert main(["tokens", "--prompt-file", name]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line


def test_a_prompt_file_may_be_what_the_shell_puts_there(capsys) -> None:
    read, write = os.pipe()
    os.write(write, b"a red star\n")
    os.close(write)
    assert main(["tokens", "--prompt-file", f"/dev/fd/{read}"]) == 0
    os.close(read)
    assert '"a red star"' in capsys.readouterr().out


# The terminal

COMMAND = [sys.executable, "-m", "finelip_sdxl.cli.main"]


def said(done: subprocess.CompletedProcess) -> list[str]:
    """What stands on stderr beside bars."""
    return [line for line in re.split(r"[\r\n]+", done.stderr) if line and not re.search(r"%\|", line)]


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


@pytest.mark.slow
def test_the_answer_stands_alone() -> None:
    """Whatever is installed beside it: the test extra's torchao, for one, has much to say."""
    done = run([*COMMAND, "tokens", "a red star"])
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "text_encoder and text_encoder_2 encode prompt: 5 tokens in 1 window of 77 positions,"
        " as the stock miniature encodes it; nothing is cut",
        '  window 1, 5 tokens: "a red star"',
        "Counted in the miniature's tokens.",
    ]


@pytest.mark.slow
def test_the_pictures_and_figures_of_commands_stand_alone(tmp_path) -> None:
    picture, grid = str(tmp_path / "a.png"), str(tmp_path / "grid.png")
    drawing = ["--steps", "1", "--device", "cpu", "--seed", "0"]
    done = run([*COMMAND, "generate", "a red star", *drawing, "--out", picture])
    assert done.stdout.splitlines()[3:] == [DRAWS, f"{picture} (seed 0)"]
    assert said(done) == []
    done = run([*COMMAND, "compare", "a red star", *drawing, "--out", grid])
    assert (len(done.stdout.splitlines()), said(done)) == (9, [])
    done = run([*COMMAND, "evaluate", "retrieval", "--data", "miniature:2", "--device", "cpu"])
    assert (done.returncode, said(done)) == (0, [])
    done = run([*COMMAND, "convert", "miniature", str(tmp_path / "long"), "--conditioning-adapter", "none"])
    assert (done.stdout, said(done)) == (f"{tmp_path / 'long'}\n", [])


@pytest.mark.slow
@pytest.mark.parametrize(
    "script",
    [
        "training/train_finelip.py",
        "training/align_adapter.py",
        "training/train_lora.py",
        "training/measure_memory.py",
        "demo/app.py",
    ],
)
def test_scripts_say_nothing_of_what_they_import(script) -> None:
    done = run([sys.executable, script, "--help"])
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: ")


@pytest.mark.parametrize(
    ("encoding", "printed"),
    [("ascii", r"\u72d0 caf\xe9 \udcff"), ("latin-1", r"\u72d0 café \udcff"), ("utf-8", r"狐 café \udcff")],
)
def test_characters_that_a_terminal_lacks_are_spelled(encoding, printed, monkeypatch) -> None:
    terminal = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", terminal)
    with printing_stops_nothing():
        print("狐 café \udcff")
    assert terminal.buffer.getvalue().decode(encoding) == f"{printed}\n"
    assert sys.stdout is terminal


@pytest.mark.slow
def test_a_terminal_that_lacks_characters_stops_no_drawing(stock_folder, tmp_path) -> None:
    file = tmp_path / "\udcff" / "狐.png"  # the folder's name is no UTF-8
    options = ["--base", stock_folder, "--steps", "1", "--device", "cpu", "--seed", "0", "--out", str(file)]
    done = run([*COMMAND, "generate", "狐 🦊", *options], PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert file.exists()
    assert r'"\u72d0 \U0001f98a"' in done.stdout
    assert r"\udcff" in done.stdout


def test_an_argument_that_is_no_text_is_refused_in_a_sentence() -> None:
    done = subprocess.run([*COMMAND, "tokens", b"a \xff fox"], capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "half of a surrogate pair" in line


@pytest.mark.slow
def test_output_that_nobody_reads_stops_no_work(stock_folder, picture) -> None:
    read, write = os.pipe()
    os.close(read)
    options = ["--base", stock_folder, "--steps", "1", "--device", "cpu", "--out", picture]
    done = subprocess.run([*COMMAND, "generate", "a fox", *options], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == 0
    assert Path(picture).exists()
    assert "BrokenPipe" not in done.stderr
    assert "Traceback" not in done.stderr


def make_odd(name: str, stock_folder: str, tmp_path) -> str:
    """A Stable Diffusion 1 by its index, an SDXL without its first text encoder, or one whose file is cut short."""
    folder = shutil.copytree(stock_folder, tmp_path / name)
    index = json.loads((folder / "model_index.json").read_text())
    if name == "sd":
        index["_class_name"] = "StableDiffusionPipeline"
        del index["text_encoder_2"], index["tokenizer_2"]
    elif name == "one":
        index["text_encoder"] = index["tokenizer"] = [None, None]
    else:
        file = folder / "text_encoder" / "model.safetensors"
        file.write_bytes(file.read_bytes()[:1000])
    (folder / "model_index.json").write_text(json.dumps(index))
    return str(folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required"),
        (["paint"], "invalid choice"),
        (["generate", "a", "--steps", "0"], "whole number of at least 1"),
        (["evaluate"], "required"),
        (["evaluate", "taste"], "invalid choice"),
        (["evaluate", "retrieval", "--batch-size", "0"], "whole number of at least 1"),
        (["generate", "a", "--short-prompt-encoder", "stretched"], "invalid choice"),
        (["compare", "a", "--columns", "midjourney"], "invalid choice: 'midjourney'"),
        (["generate", "a", "--num-images", "100000000000"], "of at most 100"),
        (["generate", "a", "--num-images", "101"], "of at most 100"),
        (["compare", "a", "--seeds", "1000000000"], "of at most 100"),
        (["generate", "a", "--width", "9" * 5000], "expected a whole number of at least 1 instead of 9"),
        (["generate", "a", "--steps", "-1"], "whole number of at least 1"),
        (["generate", "a", "--steps", ""], "whole number of at least 1"),
        (["evaluate", "retrieval", "--batch-size", "1000000"], "of at most 4,096"),
        (["evaluate", "retrieval", "--max-tokens", "1e3"], "whole number of at least 1"),
        (["compare", "a", "--seeds", "0"], "whole number of at least 1"),
        (["generate", "a", "--device", "nowhere"], "'nowhere' is no device"),
        (["evaluate", "retrieval", "--device", ""], "'' is no device"),
    ],
)
def test_unknown_arguments_are_one_line_on_stderr(capsys, arguments, message) -> None:
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert raised.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_help_names_every_kind_of_data(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["evaluate", "retrieval", "--help"])
    words = re.findall(r"[\w:]+", capsys.readouterr().out)
    assert not {*formats._READERS, "miniature:SCENES"} - {"txt"} - {*words}  # txt holds no images


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (
            ["generate"],
            ("--negative-prompt", "--guidance-scale", "--finelip-2", "--overflow", "PIXELS", "else 50"),
        ),
        (["compare"], ("--columns", "--seeds", "--refiner", "--offload", "else 50")),
        (
            ["evaluate", "images"],
            ("--data", "--layout", "--sentence-judge", "dpg-bench:FOLDER", "else 50", "default: 0"),
        ),
        (["evaluate", "retrieval"], ("--data", "--fusion-sweep", "--no-stretch", "--max-tokens", "--json", "urban1k")),
    ],
)
def test_help_imports_nothing_heavy(command, expected) -> None:
    code = (
        "import sys; from finelip_sdxl.cli.main import main\n"
        f"try: main([*{command}, '--help'])\n"
        "finally: assert not {'torch', 'diffusers', 'transformers', 'PIL'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for option in expected:
        assert option in done.stdout
