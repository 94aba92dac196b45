"""Figures of a run's pictures: each from its own judge, and only where it means something."""

from dataclasses import replace
from pathlib import Path

import pytest

from finelip_sdxl.comparison import Settings
from finelip_sdxl.comparison.comparison import Comparison
from finelip_sdxl.data import UnreadableImageError, open_prompts
from finelip_sdxl.data.prompt_sets import Prompt, PromptSet
from finelip_sdxl.evaluation.fidelity import Judge, open_judge
from finelip_sdxl.picture_evaluation.plan import PicturePlan
from finelip_sdxl.picture_evaluation.scores import Figure, Judges, Scores, score
from tests.data.test_data import urban1k
from tests.helpers.picture_runs import COLUMNS, miniature_run
from tests.helpers.prompt_sets import txt

OBJECTS = ["objects", "objects_before_77", "objects_after_77"]
SENTENCES = ["sentences", "sentences_before_77", "sentences_after_77"]


@pytest.fixture(scope="module")
def judges() -> Judges:
    own = {"judge": ("finelip",), "sentence_judge": ("stock",)}
    clip = open_judge("miniature-clip-1", "sentence_judge")
    return Judges(clip, open_judge("miniature-finelip-1", "judge"), clip, own, is_miniature=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[PicturePlan, Path]:
    folder = tmp_path_factory.mktemp("run")
    return miniature_run(folder, images_per_prompt=2), folder


@pytest.fixture(scope="module")
def scored(run, judges) -> Scores:
    return score(*run, judges)


def figures(scores: Scores) -> dict[str, Figure]:
    return {figure.key: figure for figure in scores.figures}


def test_every_figure_is_there_and_right_pictures_are_ahead(scored) -> None:
    found = figures(scored)
    assert list(found) == [*OBJECTS, *SENTENCES, "fidelity", "kid", "cmmd"]
    for figure in found.values():
        wrong, right = (figure.values[column].value for column in COLUMNS)
        assert (right > wrong) == figure.is_better_high, figure.key
        assert figure.values["finelip"].count == 5


def test_objects_are_counted_exactly(scored) -> None:
    found = figures(scored)
    for key in OBJECTS:
        assert found[key].by_prompt["finelip"] == [1.0] * 5
        assert (found[key].values["finelip"].low, found[key].values["finelip"].high) == (1.0, 1.0)
        assert found[key].values["stock"].value < 0.5


def test_a_figure_names_its_judge_and_the_columns_that_it_drew(scored) -> None:
    found = figures(scored)
    assert found["fidelity"].by == "miniature-finelip-1, 248 positions, whole prompts"
    assert found["fidelity"].self_judged == ("finelip",)
    assert found["sentences"].by == "miniature-clip-1, 77 positions, each sentence for itself"
    assert found["sentences_after_77"].self_judged == ("stock",)
    assert found["kid"].by.startswith("miniature-clip-1, ")
    assert found["kid"].by.endswith(" image features, 5 images")
    assert found["objects"].self_judged == ()


def test_fid_of_fewer_images_than_features_is_left_out_and_said(scored, judges) -> None:
    (note,) = scored.notes
    assert note.startswith("FID is left out: it needs more images than features, and there are 5 for ")


def test_fid_is_printed_where_there_are_more_images_than_features(run, judges, monkeypatch) -> None:
    monkeypatch.setattr(Judge, "dim", 4)
    found = score(*run, Judges(features=judges.features))
    assert list(figures(found)) == ["fid", "kid", "cmmd"]
    assert found.notes == []


def test_without_judges_there_are_no_figures(run) -> None:
    assert score(*run, Judges()) == Scores([], [])


def test_prompts_without_images_have_no_distances(judges, tmp_path) -> None:
    prompts = PromptSet("txt:x", [Prompt("A red star is in the center.", "0"), Prompt("A cat. " * 150, "1")])
    plan = miniature_run(tmp_path, scenes=2)
    plan = PicturePlan(prompts, plan.columns, Settings(""))
    scores = score(plan, tmp_path, judges)
    found = figures(scores)
    assert "kid" not in found
    assert "fid" not in found
    assert [value is None for value in found["fidelity"].by_prompt["finelip"]] == [False, True]
    assert found["objects"].by_prompt["finelip"][1] is None
    assert "objects_after_77" not in found
    assert scores.notes == [
        "Prompts that describe no object of the miniature, left out there: 1 of 2.",
        "Prompts of more than 248 tokens, left out of text fidelity since only their beginning would be judged: "
        "1 of 2.",
        "txt:x has no images, so there are no FID, KID and CMMD.",
    ]


def test_a_77_token_judge_never_scores_a_whole_long_prompt(judges, tmp_path) -> None:
    prompts = PromptSet("txt:x", [Prompt("red " * 90, "0"), Prompt("red " * 90, "1")])
    plan = PicturePlan(prompts, miniature_run(tmp_path, scenes=2).columns, Settings(""))
    scores = score(plan, tmp_path, Judges(sentence_judge=judges.sentence_judge))
    assert scores.figures == []
    assert scores.notes == ["Sentences of more than 77 tokens, left out since no judge of 77 takes them: 2."]


def test_images_that_cannot_be_read_are_left_out_with_their_pictures(judges, tmp_path) -> None:
    prompts = open_prompts(urban1k(tmp_path / "data"))
    plan = PicturePlan(prompts, miniature_run(tmp_path, scenes=3).columns, Settings(""))
    features = Judges(features=judges.features)
    whole = figures(score(plan, tmp_path, features))
    next(iter((tmp_path / "data" / "image").glob("1.*"))).write_bytes(b"no picture")
    prompts.check_images()
    scores = score(plan, tmp_path, features)
    assert scores.notes[0].startswith("Images that cannot be read, left out with their pictures: 1 of 3. ")
    assert figures(scores)["kid"].by.endswith("2 images")
    assert figures(scores)["kid"].values != whole["kid"].values
    for file in (tmp_path / "data" / "image").iterdir():
        file.write_bytes(b"no picture")
    scores = score(plan, tmp_path, features)
    assert scores.figures == []
    assert scores.notes[1].startswith("FID, KID and CMMD compare sets of pictures, and need at least two images")
    with pytest.raises(UnreadableImageError, match=r"None of the 3 images of urban1k:.* can be read: .*0\.png cannot"):
        prompts.check_images()


def test_a_damaged_picture_is_named_with_what_to_do(judges, tmp_path) -> None:
    plan = miniature_run(tmp_path, scenes=2)
    (tmp_path / "pictures" / "stock" / "00001_00.png").write_bytes(b"\x89PNG half")
    with pytest.raises(UnreadableImageError, match=r"00001_00\.png cannot be read .*: delete it, and run again"):
        score(plan, tmp_path, Judges(is_miniature=True))


def test_one_prompt_has_figures_without_intervals_and_no_distances(judges, tmp_path) -> None:
    scores = score(miniature_run(tmp_path, scenes=1), tmp_path, judges)
    assert all(figure.values["finelip"].low is None for figure in scores.figures)
    (note,) = scores.notes
    assert note == "FID, KID and CMMD compare sets of pictures, and need at least two images that can be read."


def test_the_first_prompts_alone_can_be_scored(run, judges) -> None:
    plan, folder = run
    few = score(replace(plan, prompts=plan.prompts.first(3)), folder, Judges(features=judges.features))
    assert figures(few)["cmmd"].by.endswith("3 images")


@pytest.mark.slow
def test_judges_know_which_columns_their_encoders_draw(judges) -> None:
    comparison = Comparison.load("miniature")
    seen = judges.seen_by(comparison, ("stock", "compel", "finelip"))
    assert seen.own == {"judge": ("finelip",), "sentence_judge": ("stock", "compel")}
    assert seen.is_miniature


def test_text_prompts_are_read_from_a_file(tmp_path) -> None:
    assert len(open_prompts(txt(tmp_path)).first(2).prompts) == 2
    assert len(open_prompts(txt(tmp_path)).first(None).prompts) == 3
