"""Share of a prompt that each way of encoding brings into the picture, on unseen scenes of the miniature world.

    python benchmarks/miniature_story.py --json runs/story.json --plot docs/miniature-story-positions.png

Prints a table: the share of described objects that are right in shape, color and place, apart for short and long
captions, for plain and linked sentences, and for sentences that stock's 77 tokens keep whole or cut. Each has a 95 %
interval (bootstrap over scenes). All rows draw from the same noise; all but stock, compel and the default encode short
captions with the long encoders. Chance is the score of pictures against another scene.

Rows of aligned encoders are trained with training/align_adapter.py into --runs (a finished run is not trained again);
one run of both stages makes two rows. A LoRA of the UNet, as a third stage, is trained on them with
training/train_lora.py. With --json a stopped benchmark goes on, and rows can be drawn in several calls
(--only), also at the same time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from finelip_sdxl import FineLIPSDXLPipeline
from finelip_sdxl.options import STOCK_POSITIONS

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that this runs as a script

from benchmarks.miniature_pictures import (
    COLORS,
    COLUMNS,
    ENCODERS,
    Draw,
    Results,
    Row,
    Sample,
    add_drawing_flags,
    all_samples,
    cell,
    circumstances,
    counts_of,
    draw_missing,
    draw_with,
    load_aligned,
    open_aligned,
    open_stock,
    open_unaligned,
    open_windows,
    percent,
    save_figure,
    scale_shares,
    train,
    with_interval,
)

STOCK, DEFAULT = "stock, cut at 77", "FineLIP-SDXL's default"
# Runs of training by name: encoders, and the method of training/align_adapter.py.
RUNS = {
    "adapter": ("FineLIP", "adapter"),
    "lora": ("FineLIP", "lora"),
    "stretched-adapter": ("stretched", "adapter"),
    "stretched-lora": ("stretched", "lora"),
}
# The folders of a run, with the data of their training.
STAGES = {"after-text": "text", "last": "text and images"}
METHODS = {"adapter": "adapter", "lora": "LoRA"}
THIRD_STAGE = "FineLIP + adapter + LoRA of the UNet"

# The figure, of some rows: more lines cannot be told apart. A share of fewer objects says nothing.
DRAWN = (
    STOCK,
    "compel, windows of 77",
    "stretched, not aligned",
    "FineLIP, not aligned",
    "FineLIP + adapter, text and images",
    "FineLIP + LoRA, text and images",
)
BINS, BIN_TOKENS, LEAST_OBJECTS = 10, 25, 10
MARKERS = {"UNet": "D", "adapter": "o", "LoRA": "s", "compel": "x", "published": "v", "": "."}


def table_rows(runs: Path, train_flags: str = "") -> dict[str, Row]:
    """The table's rows by name."""
    rows = [
        Row(STOCK, open_stock),
        Row(DEFAULT, lambda: draw_with(FineLIPSDXLPipeline.from_pretrained("miniature")), kinds=("short",)),
        Row("compel, windows of 77", open_windows),
        Row("stretched, not aligned", partial(open_unaligned, "stretched")),
        *aligned("stretched", runs, train_flags),
        Row("FineLIP, published states", partial(open_unaligned, "FineLIP", hidden_states="last")),
        Row("FineLIP, not aligned", partial(open_unaligned, "FineLIP")),
        *aligned("FineLIP", runs, train_flags),
        Row(THIRD_STAGE, partial(open_with_unet_lora, runs, train_flags), runs / "unet-lora" / "last"),
    ]
    return {row.name: row for row in rows}


def aligned(of: str, runs: Path, train_flags: str) -> Iterator[Row]:
    for run, (encoders, method) in RUNS.items():
        for folder, stages in STAGES.items():
            weights = runs / run / folder
            opens = partial(open_aligned, encoders, method, train_flags, weights)
            if encoders == of:
                yield Row(f"{encoders} + {METHODS[method]}, {stages}", opens, weights)


def open_with_unet_lora(runs: Path, train_flags: str) -> Draw:
    """Drawing with FineLIP, its adapter after both stages, and a LoRA of the UNet's cross-attention that was trained
    on what they encode. What is missing is trained first."""
    adapter, run = runs / "adapter" / "last", runs / "unet-lora"
    pipe = load_aligned("FineLIP", "adapter", train_flags, adapter)
    if not (run / "last").exists():
        finelip, finelip_2 = ENCODERS["FineLIP"]
        flags = ["--finelip", finelip, "--finelip-2", finelip_2, "--conditioning-adapter", str(adapter)]
        train("train_lora.py", [*flags, "--layers", "cross-attention"], run)
    pipe.load_lora_weights(str(run / "last"))
    return draw_with(pipe)


# The table


def print_table(rows: list[Row], results: Results, samples: dict[str, list[Sample]]) -> None:
    print(circumstances(results, rows), end="\n\n")
    print("| encoded by |", " | ".join((*COLUMNS, "clean, of the right ones")), "|")
    print("|---" * (len(COLUMNS) + 2) + "|")
    for row in rows:
        counts = counts_of(row, results, samples)
        clean = counts_of(row, results, samples, "right_and_clean")
        print_row(row.name, counts, clean)
    if STOCK in (row.name for row in rows):
        by_chance = counts_of(next(row for row in rows if row.name == STOCK), results, samples, "right_by_chance")
        print_row("chance", by_chance, np.zeros_like(by_chance))
    pictures = [results.find(row, "short")["pictures"] for row in rows if row.name in (STOCK, DEFAULT)]
    if len(pictures) == 2:
        equal = sum(a == b for a, b in zip(*pictures, strict=True))
        print(f"\nShort captions: {equal} of {len(pictures[0])} default pictures equal stock's bit for bit.")


def print_row(name: str, counts: np.ndarray, clean: np.ndarray) -> None:
    """A row of the table, from its counts and from those of clean objects; both (scenes, columns, 2)."""
    of_right = np.stack([clean[..., 0].sum(axis=1), counts[..., 0].sum(axis=1)], axis=-1)[:, None]
    if not clean.any():
        of_right[:] = 0  # no share
    print(f"| {name} |", " | ".join(map(cell, with_interval(np.concatenate([counts, of_right], axis=1)))), "|")


# The figure


def counts_by_position(samples: list[Sample], judged: list[str]) -> np.ndarray:
    """Right and described objects, plain and linked, by the position of the sentence's end; (2, bins, 2)."""
    counts = np.zeros((2, BINS, 2))
    for sample, digits in zip(samples, judged, strict=True):
        for mention, end, digit in zip(sample.caption.described, sample.ends, digits, strict=True):
            # After the start token, three bins hold exactly stock's tokens.
            counts[int(mention.kind == "linked"), (end - 1) // BIN_TOKENS] += int(digit), 1
    return counts


def style(name: str) -> dict[str, str]:
    """Color by encoders, marker by method, line by stages."""
    encoders = next((known for known in COLORS if name.startswith(known)), "stock")
    marker = next(marker for word, marker in MARKERS.items() if word in name)
    stages = name.rpartition(", ")[2]
    line = {"text": "dotted", "text and images": "solid"}.get(stages, "dashed")
    face = "white" if stages == "text" else COLORS[encoders]
    return {"color": COLORS[encoders], "marker": marker, "linestyle": line, "markerfacecolor": face}


def draw_figure(counts: dict[str, np.ndarray]) -> Figure:
    """A figure of `counts_by_position` for each row."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    middles = (np.arange(BINS) + 0.5) * BIN_TOKENS + 0.5
    for kind, (panel, title) in enumerate(zip(panels, ("plain sentences", "linked sentences"), strict=True)):
        for name, found in counts.items():
            shares = np.where(found[kind, :, 1] < LEAST_OBJECTS, np.nan, percent(found[kind]))
            panel.plot(middles, shares, label=name, markersize=6, linewidth=1.5, clip_on=False, **style(name))
        panel.axvline(STOCK_POSITIONS, color="black", linewidth=0.8)
        panel.set(title=title, xlabel="position of the sentence's last token")
        panel.set(xlim=(0, 248), xticks=(0, STOCK_POSITIONS, 150, 200, 248))
        scale_shares(panel)
    panels[0].set_ylabel("objects right in shape, color and place, %")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_drawing_flags(flags, scenes=500, runs="runs/alignment")
    names = list(table_rows(Path()))
    text = f"names of rows (default: all): {'; '.join(names)}"
    flags.add_argument("--only", nargs="*", default=names, choices=names, metavar="ROW", help=text)
    arguments = flags.parse_args()

    results = Results(arguments.json, arguments)
    rows = [row for name, row in table_rows(arguments.runs, arguments.train_flags).items() if name in arguments.only]
    draw_missing(rows, results, arguments)
    samples = all_samples(arguments.scenes)
    print_table(rows, results, samples)
    long_rows = [row for row in rows if "long" in row.kinds]
    if arguments.plot:
        judged = {row.name: results.find(row, "long")["right"] for row in long_rows if row.name in DRAWN}
        figure = draw_figure({name: counts_by_position(samples["long"], right) for name, right in judged.items()})
        save_figure(figure, arguments.plot)


if __name__ == "__main__":
    main()
