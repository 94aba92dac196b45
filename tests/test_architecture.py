"""The drawing of the layers says what the code imports."""

from pathlib import Path

from docs import draw_layers

LAYERS = [["finelip_sdxl.cli"], ["finelip_sdxl.prompts"], ["finelip_sdxl.options"]]


def test_the_drawing_is_that_of_the_code() -> None:
    layers = draw_layers.read_layers()
    arrows = draw_layers.without_implied(draw_layers.find_arrows(layers))
    committed = Path(draw_layers.__file__).with_name("layers.svg").read_text(encoding="utf-8")
    assert committed == draw_layers.draw(layers, arrows), "run: python docs/draw_layers.py"


def test_every_module_of_the_contract_is_there() -> None:
    repository = Path(draw_layers.__file__).parents[1]
    for module in (module for layer in draw_layers.read_layers() for module in layer):
        place = repository / module.replace(".", "/")
        assert place.is_dir() or place.with_suffix(".py").is_file(), module


def test_an_import_that_points_upwards_is_drawn_as_such() -> None:
    arrows = {("finelip_sdxl.cli", "finelip_sdxl.prompts"), ("finelip_sdxl.options", "finelip_sdxl.cli")}
    drawing = draw_layers.draw(LAYERS, arrows)
    assert (drawing.count("class='down'"), drawing.count("class='up'")) == (1, 1)


def test_an_arrow_that_a_chain_implies_is_left_out() -> None:
    chain = {("a", "b"), ("b", "c"), ("c", "d")}
    assert draw_layers.without_implied(chain | {("a", "c"), ("a", "d")}) == chain
