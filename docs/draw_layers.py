"""Draw the layers of the package, and what imports what, from the code itself.

    python docs/draw_layers.py

Writes `docs/layers.svg`. The layers are those of the contract in `pyproject.toml`, which `lint-imports` checks; the
arrows are the imports that grimp finds, less those that a chain of other arrows implies. An import that points upward
is red, and there is none while the contract holds. The drawing depends on the code alone, so a test compares the
committed file with a new one.
"""

from __future__ import annotations

import argparse
import tomllib
from html import escape
from pathlib import Path

import grimp

REPOSITORY = Path(__file__).parents[1]
PACKAGE = "finelip_sdxl"
# In pixels: a layer's height, a box's height and its width by letter, and the room around both.
LAYER, BOX, LETTER, GAP, LEFT = 74, 32, 8.6, 14, 130
# The three parts of the house, and the layer that each begins with.
PARTS = {"applications": "cli", "library": "pipelines", "method": "model"}


def read_layers() -> list[list[str]]:
    """The modules of each layer, the top layer first, as the contract names them."""
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    (contract,) = [each for each in settings["tool"]["importlinter"]["contracts"] if each["type"] == "layers"]
    return [[name.strip() for name in layer.replace("|", ":").split(":")] for layer in contract["layers"]]


def find_arrows(layers: list[list[str]]) -> set[tuple[str, str]]:
    """Pairs of boxes of which the first imports the second, directly."""
    graph = grimp.build_graph(PACKAGE)
    boxes = [box for layer in layers for box in layer]

    def box_of(module: str) -> str | None:
        return next((box for box in boxes if f"{module}.".startswith(f"{box}.")), None)

    arrows = set()
    for module in graph.modules:
        for imported in graph.find_modules_directly_imported_by(module):
            ends = box_of(module), box_of(imported)
            if ends[0] and ends[1] and ends[0] != ends[1]:
                arrows.add((ends[0], ends[1]))
    return arrows


def without_implied(arrows: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """The arrows that no chain of others leads along.

    Examples:
        >>> sorted(without_implied({("a", "b"), ("b", "c"), ("a", "c")}))
        [('a', 'b'), ('b', 'c')]
    """

    def reaches(start: str, end: str, left_out: tuple[str, str]) -> bool:
        seen, waiting = set(), [start]
        while waiting:
            here = waiting.pop()
            for arrow in arrows - {left_out}:
                if arrow[0] == here and arrow[1] not in seen:
                    seen.add(arrow[1])
                    waiting.append(arrow[1])
        return end in seen

    return {arrow for arrow in arrows if not reaches(*arrow, left_out=arrow)}


def draw(layers: list[list[str]], arrows: set[tuple[str, str]]) -> str:
    """The drawing as SVG.

    Examples:
        >>> layers = [["finelip_sdxl.cli"], ["finelip_sdxl.prompts"]]
        >>> picture = draw(layers, {("finelip_sdxl.cli", "finelip_sdxl.prompts")})
        >>> picture.count("<rect class='box'"), picture.count("<path class='down'")
        (2, 1)
    """
    titles = {box: box.removeprefix(f"{PACKAGE}.") for layer in layers for box in layer}
    widths = {box: round(len(title) * LETTER) + 2 * GAP for box, title in titles.items()}
    width = max(sum(widths[box] + GAP for box in layer) for layer in layers) + 2 * LEFT
    places: dict[str, tuple[float, float]] = {}  # the middle of each box
    for row, layer in enumerate(layers):
        x = LEFT + (width - 2 * LEFT - sum(widths[box] + GAP for box in layer) + GAP) / 2
        for box in layer:
            places[box] = (x + widths[box] / 2, row * LAYER + LAYER / 2)
            x += widths[box] + GAP
    rows = {box: row for row, layer in enumerate(layers) for box in layer}

    parts = []
    for part, first in PARTS.items():
        row = rows.get(f"{PACKAGE}.{first}", 0)
        parts.append(f"<text class='part' x='{GAP}' y='{row * LAYER + LAYER / 2 + 5:.0f}'>{part}</text>")
        if row:
            parts.append(f"<path class='border' d='M0,{row * LAYER} H{width:.0f}'/>")
    for start, end in sorted(arrows):
        (x0, y0), (x1, y1) = places[start], places[end]
        if rows[start] == rows[end]:
            continue
        kind = "down" if rows[end] > rows[start] else "up"
        side = BOX / 2 if kind == "down" else -BOX / 2
        bend = (y1 - y0) / 2
        parts.append(
            f"<path class='{kind}' d='M{x0:.0f},{y0 + side:.0f} C{x0:.0f},{y0 + bend:.0f} {x1:.0f},{y1 - bend:.0f}"
            f" {x1:.0f},{y1 - side:.0f}' marker-end='url(#tip)'/>"
        )
    for box, (x, y) in places.items():
        parts.append(
            f"<rect class='box' x='{x - widths[box] / 2:.0f}' y='{y - BOX / 2:.0f}' width='{widths[box]}'"
            f" height='{BOX}' rx='6'/><text x='{x:.0f}' y='{y + 5:.0f}'>{escape(titles[box])}</text>"
        )
    style = (
        "rect.box{fill:#f6f8fa;stroke:#57606a}text{font:14px monospace;text-anchor:middle;fill:#1f2328}"
        "text.part{font:bold 14px sans-serif;text-anchor:start;fill:#57606a}path.border{stroke:#d0d7de}"
        "path{fill:none;stroke-width:1.2}path.down{stroke:#0969da;opacity:.7}path.up{stroke:#cf222e;stroke-width:2}"
    )
    tip = (
        "<defs><marker id='tip' viewBox='0 0 8 8' refX='7' refY='4' markerWidth='7' markerHeight='7' orient='auto'>"
        "<path d='M0,0 L8,4 L0,8 z' style='fill:#57606a;opacity:1'/></marker></defs>"
    )
    height = len(layers) * LAYER
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width:.0f} {height}' width='{width:.0f}'"
        f" height='{height}'><style>{style}</style>{tip}<rect width='100%' height='100%' fill='white'/>\n"
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--out", type=Path, default=REPOSITORY / "docs" / "layers.svg", help="file to write")
    file = flags.parse_args().out
    layers = read_layers()
    temporary = file.with_name(f".{file.name}")
    temporary.write_text(draw(layers, without_implied(find_arrows(layers))), encoding="utf-8")
    temporary.replace(file)
    print(file)


if __name__ == "__main__":
    main()
