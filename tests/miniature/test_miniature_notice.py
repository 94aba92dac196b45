"""Sentences for people who draw with the miniature, and the texts that it knows."""

import pytest

from finelip_sdxl.cli.main import main
from finelip_sdxl.comparison.comparison import Comparison
from finelip_sdxl.miniature.captions import long_caption, short_caption
from finelip_sdxl.miniature.notice import DRAWS, REAL_SDXL, notice
from finelip_sdxl.miniature.parsing import is_of_world
from finelip_sdxl.miniature.world import make_scene
from finelip_sdxl.prompts.vocabulary import MINIATURE, SDXL

CAT = "a photo of a cat on a sofa"


@pytest.mark.parametrize("number", range(20))
def test_captions_are_of_the_world(number) -> None:
    scene = make_scene(f"unseen-{number}")
    for caption in (long_caption(scene, "a"), short_caption(scene, "a")):
        assert is_of_world(caption.text)
        assert is_of_world(caption.text.replace("circle", "dragon"))
        assert notice(caption.text, "--base x") == [DRAWS]


@pytest.mark.parametrize(
    "text",
    [CAT, "🦊", "1234", "赤い狐", "A king with a red heart in the center of a shield", "a moon cake"],
)
def test_other_texts_are_not(text) -> None:
    assert not is_of_world(text)


@pytest.mark.parametrize(
    "text", ["", " \n", "A RED STAR", "a (red star)1.5 in the center", "a red star in the centre", "small teal ring!"]
)
def test_words_of_the_world_are_known_in_any_spelling(text) -> None:
    assert is_of_world(text)


def test_a_foreign_prompt_is_told_what_is_unknown_and_the_way_to_a_real_sdxl() -> None:
    (draws, unknown) = notice(CAT, "--base some/sdxl")
    assert draws == DRAWS
    assert unknown == (
        'The miniature knows no object of this prompt ("photo", "cat", "sofa"), and spells it in 15 tokens where'
        " a real SDXL counts 10. To draw it with one: --base some/sdxl"
    )
    assert "knows not all of this prompt" in notice("a photo of a red star", "x")[1]
    assert "no object of this prompt, and" in notice("🦊", "x")[1]
    assert "no object" in notice("learning to start", "x")[1]


@pytest.mark.parametrize(("prompt", "lines"), [(CAT, 2), ("a red star in the top left", 1)])
def test_commands_say_that_the_miniature_draws(tmp_path, capsys, prompt, lines) -> None:
    for command in (["generate"], ["compare", "--columns", "stock"]):
        file = str(tmp_path / "a.png")
        assert main([command[0], prompt, *command[1:], "--steps", "1", "--device", "cpu", "--out", file]) == 0
        printed = capsys.readouterr().out.splitlines()
        first = printed.index(DRAWS)
        assert printed[first - 1] == f"Counted in {MINIATURE}."
        assert (REAL_SDXL in printed[first + 1]) == (lines == 2)


def test_commands_do_not_say_so_of_another_model(stock_folder, tmp_path, capsys) -> None:
    file = str(tmp_path / "a.png")
    assert main(["generate", CAT, "--base", stock_folder, "--steps", "1", "--device", "cpu", "--out", file]) == 0
    assert "miniature" not in capsys.readouterr().out


def test_a_reader_sees_a_foreign_prompt_as_a_real_sdxl_plans_it() -> None:
    comparison = Comparison.load("miniature")
    text = "Portrait of an elderly clockmaker, brass gears, photorealistic, shallow depth of field. " * 4
    shown, exact = comparison.plan_for_reader(text), comparison.plan(text)
    assert {plan.vocabulary for plan in shown.values()} == {SDXL}
    assert {plan.vocabulary for plan in exact.values()} == {MINIATURE}
    assert exact["stock"].cut_tokens > 0
    assert not shown["stock"].cut_tokens
    own = "a red star in the top left"
    assert comparison.plan_for_reader(own) == comparison.plan(own)
