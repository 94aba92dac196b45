"""The paper in miniature: every cell is made once, a stopped run goes on, and the page says what was measured."""

import dataclasses
import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import paper
from benchmarks.miniature_paper import cells as cells_module
from benchmarks.miniature_paper import measures, pictures, sections
from benchmarks.miniature_paper.cells import Budget, Cells, MissingError, Training
from benchmarks.miniature_paper.measures import ChangedCaptions, ShortCaptions
from benchmarks.miniature_paper.sections import PAPER, PictureRow
from benchmarks.miniature_pictures import Row, make_samples
from finelip_sdxl import load_finelip
from finelip_sdxl.evaluation.intervals import Interval
from finelip_sdxl.miniature.dataset import MiniatureScenes
from finelip_sdxl.miniature.drawing import IMAGE_SIZE, draw_scene
from training import train_finelip

BUDGET = Budget(
    steps=2,
    batch_size=5,
    learning_rates=(1e-3, 3e-3),
    seeds=2,
    ablation_seeds=1,
    scenes=10,
    pictures=2,
    drawing_steps=1,
)
FLAGS = "--steps 2 --batch-size 5 --learning-rates 1e-3 3e-3 --seeds 2 --scenes 10 --pictures 2 --drawing-steps 1"
DIVERGED = "train_finelip.py: error: The loss of step 1 is nan: training has diverged, and nothing of this is saved."


class Trainer:
    """A recipe without steps: it saves the model that a training would begin with."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []
        self.diverges = ""  # words of the command

    def __call__(self, command: list[str]) -> tuple[int, str]:
        self.commands.append(command)
        if self.diverges and self.diverges in " ".join(command):
            return 1, DIVERGED
        arguments = train_finelip.parse(command[2:])
        train_finelip.check(arguments)
        torch.manual_seed(arguments.seed)
        train_finelip.load_base(arguments).save_pretrained(arguments.output_dir / "last")
        (arguments.output_dir / "checkpoints").mkdir()
        return 0, "done"


def draw_blank(texts: list[str], **arguments: Any) -> list[Image.Image]:
    assert len(arguments["generator"]) == len(texts)
    return [Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), "white") for _ in texts]


SCENE_OF = {sample.caption.text: sample.scene for sample in make_samples(4, "long")}


def draw_truth(texts: list[str], **arguments: Any) -> list[Image.Image]:
    return [draw_scene(SCENE_OF[text]) for text in texts]


def open_never() -> None:
    raise AssertionError("This row is drawn already.")


@pytest.fixture
def trainer(monkeypatch) -> Trainer:
    trainer = Trainer()
    monkeypatch.setattr(cells_module, "run_and_show", trainer)
    return trainer


@pytest.fixture
def few(monkeypatch) -> None:
    """One loss more than the main ones, two ablations, two rows of pictures, and only those claims."""
    monkeypatch.setattr(sections, "MAIN", (sections.LONG_CLIP, PAPER))
    losses = (PAPER, sections.LONG_CLIP, "contrastive loss of late interaction")
    monkeypatch.setattr(sections, "LOSSES", {name: sections.LOSSES[name] for name in losses})
    kept = ("token refinement",)
    monkeypatch.setattr(sections, "ABLATIONS", {name: sections.ABLATIONS[name] for name in kept})
    claims = [claim for claim in sections.CLAIMS if claim[1][0] in ("loss", *kept)]
    monkeypatch.setattr(sections, "CLAIMS", claims)
    rows = [Row(pictures.STOCK, lambda: draw_blank), Row(pictures.ALIGNED, lambda: draw_truth)]
    monkeypatch.setattr(sections, "picture_rows", lambda trained: rows)
    monkeypatch.setattr(sections, "PERTURBATIONS", {"sentences shuffled": measures.shuffle_sentences})
    monkeypatch.setattr(measures, "PREFIXES", (2,))
    monkeypatch.setattr("benchmarks.miniature_paper.page.PREFIXES", (2,))
    monkeypatch.setattr("benchmarks.miniature_paper.page.PERTURBATIONS", {"sentences shuffled": None})


def run(tmp_path: Path, *flags: str) -> str:
    """The page after a run."""
    page = tmp_path / "page" / "paper.md"
    paper.main([*FLAGS.split(), "--output-dir", str(tmp_path / "cells"), "--page", str(page), *flags])
    return page.read_text(encoding="utf-8")


def section_of(page: str, title: str) -> str:
    return page.split(f"## {title}\n")[1].split("\n## ")[0]


# The whole


@pytest.mark.slow
def test_all_sections_make_one_page_and_nothing_is_made_twice(trainer, few, tmp_path, capsys, monkeypatch) -> None:
    page = run(tmp_path)
    assert "Not measured yet" not in page
    assert page.startswith("# The paper in miniature\n")
    assert f"\n(`python benchmarks/paper.py {FLAGS}" in page
    files = sorted(file.name for file in (tmp_path / "page").iterdir())
    assert files == ["paper-ablations.png", "paper-fusion.png", "paper-pictures.png", "paper.md"]
    links = re.findall(r"!\[[^]]+\]\(([^)]+)\)", page)
    assert sorted(links) == files[:3]
    # Three losses of two rates; two seeds of two of them; three refinements beside the published one.
    assert len(trainer.commands) == 3 * 2 + 2 + 3
    assert len({tuple(command[2:-1]) for command in trainer.commands}) == len(trainer.commands)
    assert not list(tmp_path.rglob("checkpoints"))

    rows = section_of(page, "2. Long-text-to-image generation").splitlines()
    aligned = next(line for line in rows if line.startswith(f"| {pictures.ALIGNED}"))
    assert aligned.split(" | ")[1] == "100.0 (100.0 to 100.0)"
    assert "– | " in aligned  # FID of two pictures
    assert sum("\\*" in line for line in rows if line.startswith(f"| {pictures.STOCK}")) == 1
    summary = section_of(page, "What the paper says, and the miniature")
    (unknown,) = (line for line in summary.splitlines() if " – |" in line)
    assert unknown.startswith("| In SDXL, FineLIP is better")  # neither is among these rows
    assert "Refinement of both sides is better than of images alone." in summary

    # Nothing is made again, the page stays the same, and so does what a person wrote.
    finding, notes = "Slots decide.", "The slots collapse.\n\nAnd they stay so."
    file = tmp_path / "page" / "paper.md"
    written = re.sub(r"(?s)(<!-- notes -->\n).*?(\n<!-- end)", rf"\1{notes}\2", page)
    written = written.replace(written.split("\n\n")[1], finding)
    file.write_text(written, encoding="utf-8")
    made = len(trainer.commands)
    with monkeypatch.context() as patch:
        patch.setattr(sections, "_rank", open_never)
        patch.setattr(sections, "_slots", open_never)
        patch.setattr(sections, "growth", open_never)
        patch.setattr(pictures, "draw_missing", open_never)
        again = run(tmp_path)
    assert again == written
    assert len(trainer.commands) == made
    assert "0 trainings left" in capsys.readouterr().err


def test_a_section_alone_leaves_the_others_open(trainer, few, tmp_path) -> None:
    page = run(tmp_path, "--only", "learning-rates")
    assert page.count("Not measured yet: `python benchmarks/paper.py --only ") == 4
    head, _, *lines = section_of(page, "Learning rates").strip().split("\n\n")[1].splitlines()
    assert head == "| loss | 0.001 | 0.003 |"
    assert [line.split(" | ")[0] for line in lines] == [f"| {loss}" for loss in sections.LOSSES]
    assert all(line.count("**") == 2 for line in lines)  # one rate is chosen
    (of_long_clip,) = (line for line in lines if sections.LONG_CLIP in line)
    assert re.findall(r"\((\w+)\)", of_long_clip) == ["global", "global"]  # its refinement learned nothing


def test_the_estimate_makes_nothing_and_counts_what_sections_share_once(trainer, few, tmp_path, capsys) -> None:
    paper.main(
        [*FLAGS.split(), "--output-dir", str(tmp_path / "cells"), "--page", str(tmp_path / "p.md"), "--estimate"]
    )
    found = re.findall(r"([a-z-]+): (\d+) trainings left", capsys.readouterr().err)
    assert found == [
        ("learning-rates", "6"),
        ("retrieval", "2"),
        ("pictures", "0"),
        ("ablations", "3"),
        ("beyond", "0"),
    ]
    assert not trainer.commands
    assert not (tmp_path / "p.md").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--only everything", "invalid choice: 'everything'"),
        ("--scenes 12", "--scenes is 12; expected a multiple of 5"),
        ("--batch-size 7", "--batch-size is 7; expected a multiple of 5"),
        ("--steps 0", "expected a whole number of at least 1 instead of 0"),
        ("--pictures 1", "expected a whole number of at least 2 instead of 1"),
        ("--learning-rates 0", "expected a number above 0 instead of 0"),
        ("--learning-rates 1e-3 0.001", "names one twice"),
        ("--output-dir /proc/none", "/proc"),
        ("--page .", "."),
    ],
)
def test_wrong_flags_are_one_line_before_anything_is_made(flags, message, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        paper.main(flags.split())
    printed = capsys.readouterr().err
    assert message in printed
    assert len(printed.splitlines()) == 1


# Cells


def test_a_result_is_made_once_and_again_if_it_is_damaged_or_of_other_settings(tmp_path, capsys) -> None:
    cells, made = Cells(tmp_path, BUDGET), []

    def make() -> list[int]:
        made.append(len(made))
        return made.copy()

    assert [cells.result("kind", {"a": 1}, make), cells.result("kind", {"a": 1}, make)] == [[0], [0]]
    assert cells.result("kind", {"a": 2}, make) == [0, 1]
    for damage in (
        "",
        "{",
        "[]",
        '{"settings": {"a": 1}}',
        '{"settings": {"a": 3}, "date": 1, "seconds": 1, "result": 1}',
    ):
        (file,) = [file for file in (tmp_path / "kind").iterdir() if json.loads(file.read_text())["settings"]["a"] == 1]
        file.write_text(damage)
        count = len(made)
        assert len(cells.result("kind", {"a": 1}, make)) == count + 1
        assert "is damaged, and is made again" in capsys.readouterr().err
    assert len(cells.used) == 3 + 5
    with pytest.raises(MissingError):
        Cells(tmp_path, BUDGET, may_make=False).result("kind", {"a": 9}, make)


def test_a_training_goes_on_where_it_was_stopped(trainer, tmp_path) -> None:
    cells, training = Cells(tmp_path, BUDGET), Training(sections.LOSSES[PAPER], 1e-3, 0)
    assert not cells.is_trained(training)
    folder = cells.trained(training)
    assert folder is not None
    assert cells.is_trained(training)
    # Killed between the end of the training and its result.
    next((tmp_path / "trained").iterdir()).unlink()
    assert not cells.is_trained(training)
    assert cells.trained(training) == folder
    assert len(trainer.commands) == 1
    # The model is gone, its result is not.
    folder.rename(tmp_path / "elsewhere")
    assert not cells.is_trained(training)
    assert cells.trained(training) == folder
    assert len(trainer.commands) == 2
    # Another budget is another training.
    assert not Cells(tmp_path, dataclasses.replace(BUDGET, steps=3)).is_trained(training)


def test_a_learning_rate_that_diverges_is_left_out_and_not_tried_again(trainer, few, tmp_path) -> None:
    trainer.diverges = "--learning-rate 0.003"
    page = run(tmp_path, "--only", "learning-rates")
    lines = section_of(page, "Learning rates").strip().split("\n\n")[1].splitlines()[2:]
    assert all(line.endswith("| diverged |") for line in lines)
    cells = Cells(tmp_path / "cells", BUDGET)
    assert sections.best_rate(PAPER, cells) == 1e-3
    assert len(trainer.commands) == 6


def test_a_loss_that_diverges_everywhere_has_no_row(trainer, few, tmp_path) -> None:
    trainer.diverges = "--triplet-weight 1"
    cells = Cells(tmp_path, BUDGET)
    assert sections.best_rate(PAPER, cells) is None
    assert sections.ranks_of(sections.at_best_rate(PAPER, 0, cells), "long", cells) is None
    verdict = sections.verdicts({"loss": {PAPER: [], sections.LONG_CLIP: []}} | _all_empty())[-1]
    assert verdict.words == "not known: a training diverged"


def _all_empty() -> dict[str, dict[str, list]]:
    found: dict[str, dict[str, list]] = {"loss": {loss: [] for loss in sections.LOSSES}}
    return found | {name: {value: [] for value in values} for name, values in sections.ABLATIONS.items()}


def test_a_training_that_fails_otherwise_ends_the_benchmark_with_its_command(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(cells_module, "run_and_show", lambda command: (1, "error: No space left on device"))
    with pytest.raises(
        SystemExit, match=r"This training failed .*train_finelip\.py --base miniature-clip-1 .*--seed 4"
    ):
        Cells(tmp_path, BUDGET).trained(Training("", 1e-3, 4))
    assert not list(tmp_path.rglob("*.json"))


def test_messages_of_a_recipe_are_shown_and_their_end_is_kept(capsys, monkeypatch) -> None:
    monkeypatch.setattr(cells_module, "_TAIL", 20)
    script = "import sys; print('x' * 50 + ' the  end', file=sys.stderr); sys.exit(3)"
    status, messages = cells_module.run_and_show(["python", "-c", script])
    assert status == 3
    assert re.fullmatch(r"x+ the end", messages)
    assert "x" * 50 in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags", [*sections.LOSSES.values(), *(f for v in sections.ABLATIONS.values() for f in v.values())]
)
def test_the_recipe_takes_the_flags_of_every_row(flags) -> None:
    arguments = train_finelip.parse(Training(flags, 1e-3, 2).command(BUDGET))
    train_finelip.check(arguments)
    assert (arguments.learning_rate, arguments.refinement_learning_rate) == (1e-3, 4e-3)
    assert (arguments.data, arguments.epochs, arguments.seed) == ("miniature:10", 1, 2)


def test_every_claim_names_rows_of_an_ablation() -> None:
    for _, *pair in sections.CLAIMS:
        for name, value in pair:
            assert value in (sections.LOSSES if name == "loss" else sections.ABLATIONS[name])


# Figures


def test_hits_are_shares_of_families() -> None:
    ranks = {"0.8": {"image to text": [0] * 5 + [1] * 5, "text to image": [0, 2, 0, 2, 0] + [0] * 5}}
    assert measures.hits(ranks, 0.8).tolist() == pytest.approx([0.8, 0.5])
    assert measures.hits(ranks, 0.8, "image to text").tolist() == [1, 0]
    assert measures.hits(ranks, 0.8, "image to text", family=1).tolist() == [1] * 5 + [0] * 5
    assert measures.hits(ranks, 0.0) is None
    assert sections.recall_of(ranks) == {"fused": pytest.approx(65)}


def test_differences_are_of_the_same_families() -> None:
    one = [{"0.8": {way: [0] * 5 * 40 for way in measures.DIRECTIONS}}]
    other = [{"0.8": {way: [0, 0, 0, 0, 1] * 40 for way in measures.DIRECTIONS}}]
    found = sections._difference(one, other)
    assert (found.value, found.low, found.high) == pytest.approx((20, 20, 20))
    # A model without late interaction is compared by its global similarity.
    of_global = [{"1.0": other[0]["0.8"]}]
    assert sections._difference(one, of_global).value == pytest.approx(20)
    words = [
        sections.Verdict("", sections._difference(*pair)).words for pair in ((one, other), (other, one), (one, one))
    ]
    assert words == ["as in the paper", "the other way round", "no difference that these scenes show"]


def test_the_verdict_on_pictures_is_of_the_same_prompts() -> None:
    objects = np.linspace(0.2, 0.8, 20)
    worse = PictureRow(pictures.in_sdxl(sections.LONG_CLIP), {"objects": objects.tolist()})
    better = PictureRow(pictures.in_sdxl(PAPER), {"objects": (objects + 0.05).tolist()})
    verdict = sections.picture_verdict([worse, better])
    assert verdict.words == "as in the paper"
    assert (verdict.difference.low, verdict.difference.high) == pytest.approx((5.0, 5.0))
    assert sections.picture_verdict([worse]).words == "not known: a training diverged"


def test_a_figure_agrees_where_it_orders_rows_as_their_objects() -> None:
    def row(name: str, share: float, fid: float) -> PictureRow:
        shares = [share, share + 0.05] * 20
        distance = {"fid": Interval(fid, None, None, 40).to_dict()}
        scores = {"objects": shares, "objects after 77": shares, "sentences": shares, "sentences after 77": shares}
        return PictureRow(name, {**scores, **distance, "kid": distance["fid"], "cmmd": distance["fid"]})

    rows = [row("poor", 0.1, 9.0), row("good", 0.5, 11.0), row("best", 0.9, 3.0), row("as good", 0.9, 2.0)]
    found = sections.orders(rows)
    assert (found["sentences"].agree, found["sentences"].pairs) == (5, 5)  # two rows are equally good
    assert (found["fid"].agree, found["fid"].pairs) == (4, 5)
    assert sections.correlation_of_prompts(rows[0], "sentences", "objects") == pytest.approx(1)


def test_pictures_are_drawn_once_in_whole_batches(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(pictures, "BATCH_SIZE", 2)
    samples, drawn = make_samples(4, "long"), []

    def draw(texts: list[str], **arguments: Any) -> list[Image.Image]:
        drawn.append([generator.initial_seed() for generator in arguments["generator"]])
        return draw_truth(texts)

    pictures.draw_missing(Row("row", lambda: draw), samples, tmp_path, steps=1)
    pictures.place(tmp_path, 1).unlink()  # killed between two pictures
    pictures.draw_missing(Row("row", lambda: draw), samples, tmp_path, steps=1)
    pictures.draw_missing(Row("row", open_never), samples, tmp_path, steps=1)
    assert drawn == [[0, 1], [2, 3], [0, 1]]
    found = pictures.score(samples, [Image.open(pictures.place(tmp_path, at)) for at in range(4)])
    assert found["objects"] == found["objects after 77"] == [1] * 4
    assert found["fid"] is None
    assert found["cmmd"]["value"] < 0  # as estimates without bias may be, of equal sets


def test_other_weights_of_the_miniature_are_other_pictures(tmp_path, monkeypatch) -> None:
    digests = []
    for weights in (b"one", b"other"):
        (tmp_path / "stock").mkdir(exist_ok=True)
        (tmp_path / "stock" / "unet.safetensors").write_bytes(weights)
        monkeypatch.setattr(pictures, "miniature_path", lambda: tmp_path / "stock")
        digests.append(pictures.miniature_digest())
    assert digests[0] != digests[1]


def test_equal_tokens_have_a_cosine_of_1_and_orthogonal_ones_of_0() -> None:
    assert measures._alike(torch.ones(4, 3)) == pytest.approx(1)
    assert measures._alike(torch.eye(4)) == pytest.approx(0)


def test_slots_of_a_new_refinement_are_nearly_equal_and_those_that_ship_are_not() -> None:
    model = load_finelip("miniature-clip-1")
    model.add_token_refinement()
    new, ships = (measures.slot_cosines(one, 3) for one in (model, load_finelip("miniature-finelip-1")))
    assert new["images, refined"] > 0.99 > ships["images, refined"]
    assert new["texts, refined"] > 0.99
    assert measures.slot_cosines(load_finelip("miniature-clip-1"), 3)["images, refined"] is None


def test_growth_is_a_correlation_with_the_number_of_sentences() -> None:
    assert measures._correlation(np.array([1.0, 2.0, 3.0])) == pytest.approx(1)
    assert measures._correlation(np.array([3.0, 2.0, 1.0])) == pytest.approx(-1)
    assert measures._correlation(np.array([2.0, 2.0])) == 0
    caption = MiniatureScenes("test", 1).captions(0)[0]
    parts = measures.prefixes(caption, 4)
    assert parts[-1] == caption
    assert all(longer.startswith(shorter) and longer != shorter for shorter, longer in itertools.pairwise(parts))


@pytest.mark.parametrize("all_tokens", [False, True])
def test_similarities_of_pairs_are_those_of_retrieval(all_tokens) -> None:
    model = load_finelip("miniature-clip-1" if all_tokens else "miniature-finelip-1")
    data = ChangedCaptions(MiniatureScenes("test", 3), lambda text, _: measures.prefixes(text, 2))
    encoded = measures.encode(model, data, all_tokens)
    found = measures.similarities_of_pairs(encoded, 0.8)
    cosine = encoded.image_embeds @ encoded.text_embeds.T
    fine = encoded.compare(encoded.image_tokens, encoded.text_tokens, text_mask=encoded.text_mask)
    expected = (0.8 * cosine + 0.2 * fine)[encoded.image_of_text, torch.arange(6)]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", measures.PERTURBATIONS)
def test_changed_captions_are_the_same_every_time_and_hold_only_words_of_the_caption(name) -> None:
    data = MiniatureScenes("test", 5)
    changed = ChangedCaptions(data, measures.PERTURBATIONS[name])
    for index in range(5):
        caption, (text,) = data.captions(index)[0], changed.captions(index)
        assert text != caption
        assert set(text.split()) <= set(caption.split())
        assert changed.captions(index) == (text,)
    assert changed.image(2).tobytes() == data.image(2).tobytes()


def test_short_captions_are_of_one_scene_of_each_family() -> None:
    data = ShortCaptions("test", 3)
    scenes = MiniatureScenes("test", 15)
    assert len(data) == 3
    assert data.captions(2) == (scenes.short_caption(10),)
    assert data.image(2).tobytes() == scenes.image(10).tobytes()


# The recipe


@pytest.mark.slow
def test_the_real_recipe_trains_a_cell_and_its_start_is_the_training_s(tmp_path) -> None:
    budget = dataclasses.replace(BUDGET, steps=1)
    cells = Cells(tmp_path, budget)
    training = Training(f"{sections.LOSSES[PAPER]} --refinement images", 0.0001, 3)
    folder = cells.trained(training)
    assert folder is not None
    assert not (folder.parent / "checkpoints").exists()
    start, end = sections.load_start(training, cells).state_dict(), load_finelip(folder).state_dict()
    assert start.keys() == end.keys()
    for name, tensor in start.items():  # one step of Adam moves a weight by the learning rate at most
        assert (tensor - end[name]).abs().max() <= 1.1 * 0.0004, name
