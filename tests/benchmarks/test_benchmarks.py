"""The benchmarks run, compare, and print tables that Markdown reads; what was drawn or trained once is not again."""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image

from benchmarks import (
    clim,
    miniature_alignment,
    miniature_clean,
    miniature_pictures,
    miniature_retrieval,
    miniature_sheet,
    miniature_story,
)
from benchmarks.clim import Measured
from benchmarks.miniature_alignment import Alignment
from benchmarks.miniature_pictures import Results, Row
from finelip_sdxl import ConditioningAdapter, FineLIPSDXLPipeline
from finelip_sdxl.miniature.drawing import IMAGE_SIZE, draw_scene
from finelip_sdxl.miniature.marking import RIGHT, WRONG
from finelip_sdxl.miniature.tokenizer import build_tokenizer

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "clim.py"
COLUMNS = ["batch", "loop, s", "twice, s", "ours, s", "loop / ours", "twice / ours"]
COLUMNS += ["loop, MiB", "twice, MiB", "ours, MiB", "loop / ours, MiB"]


def tables(text: str) -> list[list[list[str]]]:
    """The cells of each line of each table, without the line below the head."""
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert all(set(block[1]) <= set("|- ") for block in blocks)
    return [[[cell.strip() for cell in line[1:-1].split("|")] for line in [block[0], *block[2:]]] for block in blocks]


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--tokens", "all", "--dtype", "bfloat16"]])
def test_measures_the_loop_and_ours_and_finds_them_equal(more) -> None:
    flags = ["--batch-sizes", "2", "--ours-only", "3", "--repeats", "1", "--threads", "1", *more]
    done = subprocess.run([sys.executable, SCRIPT, *flags], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.match(r"\d{4}-\d\d-\d\d, .* cores, 1 threads, torch \S+: `python benchmarks/clim.py --batch", done.stdout)
    (head, values), ours = tables(done.stdout)
    assert head == COLUMNS
    assert all(float(value) >= 0 for value in values + ours[1])


def run_with(monkeypatch, results: dict[tuple[str, int], Measured | None], *flags: str) -> None:
    """Run the script with these measurements in place of its own."""
    monkeypatch.setattr(clim, "measure_apart", lambda way, batch, flags: results[way, batch])
    monkeypatch.setattr(sys, "argv", ["clim.py", *flags])
    clim.main()


def test_prints_ratios_and_what_does_not_fit(monkeypatch, capsys) -> None:
    results = {
        ("loop", 16): Measured(3, 600, loss=7, gradient=2),
        ("twice", 16): Measured(0.5, 130, loss=7.0001, gradient=2),
        ("ours", 16): Measured(0.25, 120, loss=7.0001, gradient=2),
        ("loop", 32): None,
        ("twice", 32): Measured(1, 250, loss=9, gradient=3),
        ("ours", 32): Measured(0.5, 240, loss=9, gradient=3),
        ("ours", 64): None,
    }
    run_with(monkeypatch, results, "--batch-sizes", "16", "32", "--ours-only", "32", "64")
    assert tables(capsys.readouterr().out) == [
        [
            COLUMNS,
            ["16", "3", "0.5", "0.25", "12.0", "2.0", "600", "130", "120", "5.0"],
            ["32", "does not fit", "1", "0.5", "–", "2.0", "–", "250", "240", "–"],
        ],
        [
            ["batch", "ours, s", "ours, MiB", "KiB a pair"],
            ["32", "0.5", "240", "7680"],
            ["64", "does not fit", "–", "–"],
        ],
    ]


@pytest.mark.parametrize(
    ("ours", "message"),
    [
        (Measured(1, 1, loss=7.1, gradient=3), r"The loss of the loop is 7 and ours 7\.1: they should be equal"),
        (Measured(1, 1, loss=7, gradient=3.1), r"The gradient of the loop is 3 and ours 3\.1"),
        (Measured(1, 1, loss=float("nan"), gradient=3), "ours nan"),
    ],
)
def test_a_difference_from_the_loop_is_an_error(ours, message, monkeypatch) -> None:
    equal = Measured(9, 9, loss=7, gradient=3)
    results = {("loop", 16): equal, ("twice", 16): equal, ("ours", 16): ours}
    with pytest.raises(SystemExit, match=message):  # a text as exit status is printed, and the status 1
        run_with(monkeypatch, results, "--batch-sizes", "16")


def test_a_difference_from_the_way_of_before_is_an_error(monkeypatch) -> None:
    one, other = Measured(9, 9, loss=7, gradient=3), Measured(9, 9, loss=8, gradient=3)
    results = {("loop", 16): one, ("twice", 16): other, ("ours", 16): one}
    with pytest.raises(SystemExit, match="The loss of the way of before is 8 and ours 7"):
        run_with(monkeypatch, results, "--batch-sizes", "16")


@pytest.mark.parametrize("flags", [("--batch-sizes", "1"), ("--ours-only", "0"), ("--repeats", "0")])
def test_refuses_sizes_that_measure_nothing(flags, monkeypatch, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        run_with(monkeypatch, {}, *flags)
    assert "batch sizes begin at 2, repeats and threads at 1" in capsys.readouterr().err


@pytest.mark.slow
def test_retrieval_trains_its_rows_once_and_prints_them_beside_stock(monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setattr(miniature_retrieval, "TRAINED", {"tried": "--region-weight 0 --distillation-weight 0"})
    flags = ["--runs", str(tmp_path), "--seeds", "1", "--scenes", "10"]
    flags += ["--train-flags", "--data miniature:10 --batch-size 10 --max-steps 1"]
    monkeypatch.setattr(sys, "argv", ["miniature_retrieval.py", *flags])
    miniature_retrieval.main()
    (table,) = tables(capsys.readouterr().out)
    names = [line[0] for line in table[1:]]
    assert names == [
        "stock, cut at 77",
        "stretched, not trained",
        "tried",
        "FineLIP that ships, 1",
        "FineLIP that ships, 2",
    ]
    assert table[1][-2:] == ["–", "–"]  # stock has no states past token 77
    monkeypatch.setattr(miniature_retrieval, "train", None)  # what is there is not trained again
    miniature_retrieval.main()
    (again,) = tables(capsys.readouterr().out)
    # All but the probe: of so few sentences, the last bit of a state may decide one.
    assert [line[:-2] for line in again] == [line[:-2] for line in table]


# The threshold of a clean object


@pytest.mark.parametrize(("trips", "smeared", "threshold"), [(0.3, 0.55, 0.3), (0.9, 0.559, 0.55), (0.301, 0.55, 0.31)])
def test_a_clean_object_is_as_any_round_trip_and_never_smeared(trips, smeared, threshold) -> None:
    errors = {miniature_clean.TRIPS: np.full(100, trips), miniature_clean.SMEARED: np.full(100, smeared)}
    assert miniature_clean.choose_threshold(errors) == threshold


def test_a_smeared_and_a_mixed_object_are_further_from_a_drawing_than_a_drawn_one(monkeypatch) -> None:
    monkeypatch.setattr(miniature_clean, "round_trips", lambda pipe, scenes: [draw_scene(scene) for scene in scenes])
    errors = miniature_clean.find_errors(None, [sample.scene for sample in SAMPLES["short"]])
    medians = {name: float(np.median(found)) for name, found in errors.items()}
    assert medians["drawn"] == medians[miniature_clean.TRIPS] < 0.01
    assert list(medians.values())[2:6] == sorted(list(medians.values())[2:6])
    assert list(medians.values())[6:] == sorted(list(medians.values())[6:])
    assert min(medians[miniature_clean.SMEARED], medians["mixed, 25% of another"]) > 0.28


# Pictures of the miniature. Most tests draw them without a model: scenes are known by their captions.

SCENES = 4
GUIDANCE = miniature_pictures.RECOMMENDED.guidance_scale
SAMPLES = miniature_pictures.all_samples(SCENES)
SCENE_OF = {sample.caption.text: sample.scene for samples in SAMPLES.values() for sample in samples}


def draw_truth(texts, **arguments) -> list[Image.Image]:
    return [draw_scene(SCENE_OF[text]) for text in texts]


def draw_nothing(texts, **arguments) -> list[Image.Image]:
    return [Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), "white") for _ in texts]


def open_never() -> None:
    raise AssertionError("This row is drawn already.")


def run_story(monkeypatch, *flags: str | Path, **rows: Row) -> None:
    """The story of these rows alone."""
    monkeypatch.setattr(miniature_story, "table_rows", lambda runs, flags="": {row.name: row for row in rows.values()})
    monkeypatch.setattr(sys, "argv", ["miniature_story.py", "--scenes", str(SCENES), *map(str, flags)])
    miniature_story.main()


def settings(scenes: int = SCENES, steps: int = 20) -> argparse.Namespace:
    return argparse.Namespace(scenes=scenes, steps=steps, guidance_scale=GUIDANCE)


def test_an_object_counts_as_cut_where_stock_does_not_read_its_sentence_whole() -> None:
    tokenizer = build_tokenizer()
    for sample in SAMPLES["short"] + SAMPLES["long"]:
        cut = tokenizer(sample.caption.text, truncation=True, max_length=77)
        for mention, column in zip(sample.caption.described, sample.columns, strict=True):
            name = miniature_pictures.COLUMNS[column]
            assert ("linked" in name) == (mention.kind == "linked")
            assert ("cut by stock" in name) == (cut.char_to_token(mention.end - 1) is None)
            assert ("short" in name) == (sample.kind == "short")


def test_what_is_drawn_right_counts_in_every_column_and_nothing_else_does(monkeypatch, capsys) -> None:
    run_story(
        monkeypatch,
        truth=Row("truth", lambda: draw_truth),
        nothing=Row("nothing", lambda: draw_nothing, kinds=("short",)),
    )
    out = capsys.readouterr().out
    assert re.match(
        rf"\d{{4}}-\d\d-\d\d, .* cores, torch \S+; {SCENES} scenes, 20 steps, guidance {GUIDANCE}; drawn in \d+ s", out
    )
    ((head, truth, nothing),) = tables(out)
    assert head == ["encoded by", *miniature_pictures.COLUMNS, "clean, of the right ones"]
    assert truth[0] == "truth"
    assert {value.split()[0] for value in truth[1:]} == {"100.0"}
    assert [value.split()[0] for value in nothing[1:]] == ["0.0", "0.0", "–", "–", "–", "–", "–"]


def test_chance_is_what_stocks_pictures_score_against_other_scenes(monkeypatch, capsys) -> None:
    run_story(monkeypatch, stock=Row(miniature_story.STOCK, lambda: draw_truth))
    ((_, stock, chance),) = tables(capsys.readouterr().out)
    assert stock[5].startswith("100.0")
    assert chance[0] == "chance"
    assert float(chance[5].split()[0]) < 20


@pytest.mark.parametrize(("draw", "equal"), [(draw_truth, SCENES), (draw_nothing, 0)])
def test_says_how_many_pictures_of_the_default_equal_stocks(draw, equal, monkeypatch, capsys) -> None:
    run_story(
        monkeypatch,
        stock=Row(miniature_story.STOCK, lambda: draw_truth),
        default=Row(miniature_story.DEFAULT, lambda: draw, kinds=("short",)),
    )
    assert f"{equal} of {SCENES} default pictures equal stock's bit for bit." in capsys.readouterr().out


def test_every_picture_is_drawn_from_its_own_seed_in_any_batch(monkeypatch) -> None:
    noise = []

    def draw(texts, generator, num_inference_steps, guidance_scale) -> list[Image.Image]:
        assert (num_inference_steps, guidance_scale) == (7, 2.0)
        noise.extend(torch.randn(1, generator=seed).item() for seed in generator)
        return draw_nothing(texts)

    for batch in (1, 3, 25):
        monkeypatch.setattr(miniature_pictures, "BATCH_SIZE", batch)
        assert len(miniature_pictures.draw_samples(draw, SAMPLES["long"], 7, 2.0, "a row")) == SCENES
    assert noise[:SCENES] == noise[SCENES : 2 * SCENES] == noise[2 * SCENES :]
    assert len(set(noise)) == SCENES


def test_rows_of_several_calls_make_one_table_and_figure(monkeypatch, capsys, tmp_path) -> None:
    file, plot = tmp_path / "story.json", tmp_path / "plot.png"
    truth, nothing = (Row("truth", lambda: draw_truth), Row("nothing", lambda: draw_nothing))
    run_story(monkeypatch, "--json", file, "--only", "truth", a=truth, b=Row("nothing", open_never))
    run_story(monkeypatch, "--json", file, "--only", "nothing", a=Row("truth", open_never), b=nothing)
    capsys.readouterr()
    drawn = Row("truth", open_never), Row("nothing", open_never)
    run_story(monkeypatch, "--json", file, "--plot", plot, a=drawn[0], b=drawn[1])
    ((_, *rows),) = tables(capsys.readouterr().out)
    assert [[row[0], row[5].split()[0]] for row in rows] == [["truth", "100.0"], ["nothing", "0.0"]]
    assert Image.open(plot).format == "PNG"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plot.png", "story.json"]


def test_results_of_other_scenes_and_of_other_processes_stay(tmp_path) -> None:
    file, row = tmp_path / "results.json", Row("truth", lambda: draw_truth)
    first, second, more = Results(file, settings()), Results(file, settings()), Results(file, settings(steps=40))
    images = draw_truth([sample.caption.text for sample in SAMPLES["long"]])
    for results, name in ((first, "one"), (second, "two"), (more, "one")):
        results.add(Row(name, open_never), "long", SAMPLES["long"], images, time.time())
    again = Results(file, settings())
    assert again.find(Row("one", open_never), "long")
    assert again.find(Row("two", open_never), "long")
    assert again.find(Row("one", open_never), "short") is None
    assert Results(file, settings(steps=40)).find(Row("two", open_never), "long") is None
    assert Results(file, settings(scenes=5)).find(row, "long") is None


def test_a_row_is_drawn_again_when_its_weights_are_newer_or_others(tmp_path) -> None:
    file, weights = tmp_path / "results.json", tmp_path / "run" / "last"
    row, started = Row("a row", open_never, weights), time.time()
    results = Results(file, settings())
    results.add(row, "short", SAMPLES["short"], draw_nothing(SAMPLES["short"]), started)
    assert results.find(row, "short")  # weights that are gone are not trained for what is known
    assert results.find(Row("a row", open_never, tmp_path / "other" / "last"), "short") is None
    assert results.find(Row("a row", open_never), "short") is None
    weights.mkdir(parents=True)
    os.utime(weights, (started - 60, started - 60))
    assert results.find(row, "short")
    os.utime(weights, (started + 60, started + 60))
    assert results.find(row, "short") is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--only", "trained"), "invalid choice: 'trained' (choose from 'truth')"),
        (("--scenes", "0"), "expected a whole number of at least 1 instead of 0"),
        (("--plot", "no/such/plot.png"), "no/such/plot.png is not the name of a file in a folder that exists"),
        (("--json", "."), ". is not the name of a file"),
    ],
)
def test_refuses_bad_flags_before_drawing(flags, message, monkeypatch, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        run_story(monkeypatch, *flags, truth=Row("truth", open_never))
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{", "not JSON", "[1, 2]", f'{{"4 scenes, 20 steps, guidance {GUIDANCE}": [1]}}'])
def test_a_file_that_holds_no_results_is_left_alone(text, monkeypatch, tmp_path) -> None:
    file = tmp_path / "results.json"
    file.write_text(text)
    with pytest.raises(SystemExit, match=r"results\.json holds no results of this benchmark.*pass another --json"):
        run_story(monkeypatch, "--json", file, truth=Row("truth", open_never))
    assert file.read_text() == text


def test_the_figure_parts_objects_where_stock_cuts() -> None:
    samples = SAMPLES["long"]
    judged = ["1" * len(sample.caption.described) for sample in samples]
    by_position = miniature_story.counts_by_position(samples, judged)
    by_column = miniature_pictures.count_right(samples, judged).sum(axis=0)
    assert (by_position[..., 0] == by_position[..., 1]).all()
    for kind in (0, 1):
        assert by_position[kind, :3, 1].sum() == by_column[2 + kind, 1]
        assert by_position[kind, 3:, 1].sum() == by_column[4 + kind, 1]


def test_each_line_of_the_figure_looks_different() -> None:
    names = [row.name for row in miniature_story.table_rows(Path()).values() if "long" in row.kinds]
    assert len(names) == 14
    assert len({tuple(miniature_story.style(name).items()) for name in names}) == 14
    counts = {name: np.full((2, miniature_story.BINS, 2), 30.0) for name in names}
    lines = miniature_story.draw_figure(counts).axes[0].lines
    assert [line.get_label() for line in lines[:14]] == names
    assert all((line.get_ydata() == 100).all() for line in lines[:14])


def test_the_figure_leaves_out_what_few_objects_say() -> None:
    counts = np.full((2, miniature_story.BINS, 2), 30.0)
    counts[1, 4] = miniature_story.LEAST_OBJECTS - 1
    plain, linked = miniature_story.draw_figure({miniature_story.STOCK: counts}).axes
    assert not np.isnan(plain.lines[0].get_ydata()).any()
    assert np.isnan(linked.lines[0].get_ydata()).nonzero()[0].tolist() == [4]


def test_intervals_hold_the_share_and_are_left_out_where_too_few_are_counted() -> None:
    counts = np.zeros((50, 3, 2))
    counts[:, 0, 1] = 8
    counts[:25, 0, 0] = 8
    counts[0, 1] = 1
    many, one, none = miniature_pictures.with_interval(counts)
    assert many[0] == 50
    assert 30 < many[1] < 50 < many[2] < 70
    assert [miniature_pictures.cell(figure) for figure in (one, none)] == ["100.0", "–"]
    assert re.fullmatch(r"50\.0 \(3\d\.\d–6\d\.\d\)", miniature_pictures.cell(many))


# The picture on top of README


def test_the_sheet_quotes_what_stock_cuts_and_marks_what_each_picture_has_right() -> None:
    sample = SAMPLES["long"][0]
    prompt = sample.caption.text
    cut = [mention for mention, column in zip(sample.caption.described, sample.columns, strict=True) if column >= 4]
    past = miniature_sheet.objects_past_stock(prompt)
    assert [thing.place for thing in past] == [sample.scene.objects[mention.index].place for mention in cut]
    quotes = [miniature_sheet.quoted(prompt, thing).strip(" ….") for thing in past]
    assert all(quote in prompt and thing.shape in quote for quote, thing in zip(quotes, past, strict=True))

    truth, nothing = draw_truth([prompt])[0], draw_nothing([prompt])[0]
    right, wrong = (
        miniature_sheet.draw_sheet(prompt, 217, dict.fromkeys(("stock", "compel", "finelip"), picture))
        for picture in (truth, nothing)
    )
    assert right.size == wrong.size
    for sheet, color, other in ((right, RIGHT, WRONG), (wrong, WRONG, RIGHT)):
        colors = {shown for _, shown in sheet.getcolors(2**24)}
        assert color in colors
        assert other not in colors


# Aligned rows


def align_nothing(method: str, encoders: str, run: Path, stages: tuple[str, ...] = ("after-text", "last")) -> None:
    """What training leaves behind: for a LoRA the encoders as they were, or a random adapter."""
    finelip, finelip_2 = miniature_pictures.ENCODERS[encoders]
    pipe = FineLIPSDXLPipeline.from_pretrained("miniature", finelip=finelip, finelip_2=finelip_2)
    for stage in stages:
        if method == "lora":
            pipe.text_encoder.save_pretrained(run / stage / "text_encoder")
            pipe.text_encoder_2.save_pretrained(run / stage / "text_encoder_2")
        else:
            encoder, encoder_2 = pipe.text_encoder.config, pipe.text_encoder_2.config
            adapter = ConditioningAdapter((encoder.hidden_size, encoder_2.hidden_size), encoder_2.projection_dim, 4)
            torch.nn.init.normal_(adapter.states[0][-1].weight)
            adapter.save_pretrained(run / stage)


@pytest.mark.parametrize(("encoders", "method"), [("FineLIP", "adapter"), ("stretched", "lora")])
def test_one_training_serves_both_stages_and_what_it_gives_is_drawn_with(
    encoders, method, monkeypatch, tmp_path
) -> None:
    trained = []

    def train(recipe: str, flags: list[str], run: Path) -> None:
        trained.append((recipe, run, flags))
        align_nothing(method, encoders, run)

    monkeypatch.setattr(miniature_pictures, "train", train)
    texts, arguments = [SAMPLES["short"][0].caption.text], {"num_inference_steps": 1, "guidance_scale": 1.0}

    def picture(draw) -> np.ndarray:
        (image,) = draw(texts, generator=[torch.Generator().manual_seed(0)], **arguments)
        return np.asarray(image, dtype=float)

    word = miniature_story.METHODS[method]
    rows = {row.name: row for row in miniature_story.aligned(encoders, tmp_path, "--seed 3")}
    pictures = [picture(rows[f"{encoders} + {word}, {stages}"].open()) for stages in ("text", "text and images")]
    pair = miniature_pictures.ENCODERS[encoders]
    ((recipe, run, flags),) = trained
    assert recipe == "align_adapter.py"
    assert flags[:8] == ["--base", "miniature", "--method", method, "--finelip", pair[0], "--finelip-2", pair[1]]
    assert flags[-2:] == ["--seed", "3"]
    assert flags[flags.index("--precomputed") + 1] == str(run.parent / "precomputed")
    unaligned = picture(miniature_pictures.open_unaligned(encoders))
    # Not bit for bit: where weights lie in memory decides the last bits of a sum.
    assert [abs(picture - unaligned).max() <= 1 for picture in pictures] == [method == "lora"] * 2


def test_the_third_stage_is_a_lora_of_the_unet_on_what_the_aligned_encoders_say(monkeypatch, tmp_path) -> None:
    trained = []

    def train(recipe: str, flags: list[str], run: Path) -> None:
        trained.append((recipe, run.name))
        if recipe == "align_adapter.py":
            align_nothing("adapter", "FineLIP", run)
            return
        assert flags[flags.index("--conditioning-adapter") + 1] == str(tmp_path / "adapter" / "last")
        unet = FineLIPSDXLPipeline.from_pretrained("miniature").unet
        unet.add_adapter(LoraConfig(r=2, target_modules=["attn2.to_k"], init_lora_weights=False))
        layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
        FineLIPSDXLPipeline.save_lora_weights(run / "last", unet_lora_layers=layers)

    monkeypatch.setattr(miniature_pictures, "train", train)
    monkeypatch.setattr(miniature_story, "train", train)
    texts, arguments = [SAMPLES["short"][0].caption.text], {"num_inference_steps": 1, "guidance_scale": 1.0}
    rows = miniature_story.table_rows(tmp_path)
    pictures = []
    for name in (miniature_story.THIRD_STAGE, "FineLIP + adapter, text and images"):
        (image,) = rows[name].open()(texts, generator=[torch.Generator().manual_seed(0)], **arguments)
        pictures.append(np.asarray(image, dtype=float))
    assert trained == [("align_adapter.py", "adapter"), ("train_lora.py", "unet-lora")]
    assert abs(pictures[0] - pictures[1]).max() > 1


def test_a_run_that_lacks_a_stage_is_named(monkeypatch, tmp_path) -> None:
    (tmp_path / "run" / "last").mkdir(parents=True)
    with pytest.raises(SystemExit, match=r"run has no after-text: train it with both stages, or pass another --runs"):
        miniature_pictures.open_aligned("FineLIP", "adapter", "", tmp_path / "run" / "after-text")


def test_a_training_that_fails_ends_the_benchmark_with_its_command(monkeypatch, tmp_path) -> None:
    commands = []

    def run(command) -> subprocess.CompletedProcess:
        commands.append(command)
        return subprocess.CompletedProcess(command, returncode=1)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(SystemExit, match=r"This training failed .* --base miniature --method lora .* --rank 0$"):
        miniature_pictures.open_aligned("FineLIP", "lora", "--rank 0", tmp_path / "run" / "last")
    assert commands[0][:2] == [sys.executable, str(SCRIPT.parent.parent / "training" / "align_adapter.py")]


def test_curves_share_what_they_have_in_common_and_start_unaligned(monkeypatch, capsys, tmp_path) -> None:
    opened = []

    def open_aligned(encoders, method, flags, weights) -> miniature_pictures.Draw:
        opened.append((encoders, flags.split(), weights))
        return draw_truth

    def open_unaligned(encoders) -> miniature_pictures.Draw:
        opened.append((encoders, None, None))
        return draw_nothing

    monkeypatch.setattr(miniature_alignment, "open_aligned", open_aligned)
    monkeypatch.setattr(miniature_alignment, "open_unaligned", open_unaligned)
    curves = {
        "steps on images": {n: Alignment(image_steps=n) for n in (0, 50)},
        "rank of the LoRA": {n: Alignment(rank=n) for n in (4, 16)},
        "steps on texts, no images": {n: Alignment(text_steps=n, image_steps=0) for n in (0, 9)},
    }
    monkeypatch.setattr(miniature_alignment, "CURVES", curves)
    flags = ["--scenes", str(SCENES), "--runs", str(tmp_path / "runs"), "--train-flags", "--seed 1"]
    flags += ["--json", str(tmp_path / "curves.json"), "--plot", str(tmp_path / "curves.png")]
    monkeypatch.setattr(sys, "argv", ["miniature_alignment.py", *flags])
    miniature_alignment.main()

    out = capsys.readouterr().out
    found = tables(out)
    assert [table[0][0] for table in found] == list(curves)
    assert [row[:3] for row in found[0][1:]] == [
        ["0", "FineLIP", "0.0 (0.0–0.0)"],
        ["0", "stretched", "0.0 (0.0–0.0)"],
        ["50", "FineLIP", "100.0 (100.0–100.0)"],
        ["50", "stretched", "100.0 (100.0–100.0)"],
    ]
    ours = [(flags, weights) for encoders, flags, weights in opened if encoders == "FineLIP"]
    assert len(ours) == len(opened) // 2 == 4  # not aligned, the default of two curves, rank 4, texts alone
    seen = [" ".join(flags) for flags, _ in ours if flags]
    assert "--text-steps 0 --image-steps 50 --captions miniature:2000 --rank 4 --seed 1" in seen
    assert "--text-steps 9 --image-steps 0 --captions miniature:2000 --rank 16 --seed 1" in seen
    assert len({weights for _, _, weights in opened if weights}) == 6
    assert Image.open(tmp_path / "curves.png").format == "PNG"

    monkeypatch.setattr(miniature_alignment, "open_aligned", open_never)
    monkeypatch.setattr(miniature_alignment, "open_unaligned", open_never)
    miniature_alignment.main()
    assert tables(capsys.readouterr().out) == found
    assert len(json.loads((tmp_path / "curves.json").read_text())) == 1


def test_the_mean_is_that_of_plain_and_linked() -> None:
    counts = np.zeros((6, 2))
    counts[4], counts[5] = (9, 10), (1, 2)
    assert miniature_alignment.mean_cut_by_stock(counts) == [70]


@pytest.mark.slow
def test_the_story_and_the_curves_are_told_from_the_training_script_on(monkeypatch, capsys, tmp_path) -> None:
    flags = ["--scenes", "2", "--steps", "2", "--runs", str(tmp_path)]
    few = "--captions miniature:40 --text-steps 1 --image-steps 1"
    names = ["stock, cut at 77", "compel, windows of 77", "FineLIP-SDXL's default", "FineLIP, published states"]
    names += ["FineLIP + adapter, text", "stretched + LoRA, text and images"]
    monkeypatch.setattr(sys, "argv", ["miniature_story.py", *flags, "--train-flags", few, "--only", *names])
    miniature_story.main()
    out = capsys.readouterr().out
    (table,) = tables(out)
    assert {row[0] for row in table[1:]} == {*names, "chance"}
    assert "2 of 2 default pictures equal stock's" in out

    curve = {"steps on texts": {1: Alignment(text_steps=1, image_steps=0, images=40)}}
    monkeypatch.setattr(miniature_alignment, "CURVES", curve)
    monkeypatch.setattr(sys, "argv", ["miniature_alignment.py", *flags])
    miniature_alignment.main()
    (table,) = tables(capsys.readouterr().out)
    assert [row[1] for row in table[1:]] == ["FineLIP", "stretched"]
