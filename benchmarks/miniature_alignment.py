"""Gains of FineLIP's training: aligned FineLIPs beside aligned stock encoders that were only stretched.

    python benchmarks/miniature_alignment.py --json runs/alignment-curves.json --plot docs/miniature-alignment.png

Both are aligned the same way with training/align_adapter.py, as LoRAs, with less and less: fewer steps on images, fewer
images, smaller ranks, texts alone. Each curve is a table, and a column of the figure: the share of described objects
that are right on unseen scenes, in the part of long captions that stock cuts (with the mean of plain and linked
sentences), and in short captions, through the same encoders. Aligned by 0 steps means not aligned.

A finished run in --runs is not trained again, and with --json no row is drawn twice.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that this runs as a script

from benchmarks.miniature_pictures import (
    COLORS,
    CUT_BY_STOCK,
    ENCODERS,
    SHORT,
    Results,
    Row,
    add_drawing_flags,
    all_samples,
    cell,
    circumstances,
    counts_of,
    draw_missing,
    open_aligned,
    open_unaligned,
    percent,
    save_figure,
    scale_shares,
    with_interval,
)


@dataclass(frozen=True)
class Alignment:
    """Settings of a LoRA's training; by default on images alone, so that stage 1 does not make up for few images."""

    text_steps: int = 0
    image_steps: int = 50
    images: int = 2000
    rank: int = 16

    def row(self, encoders: str, runs: Path, train_flags: str) -> Row:
        if self.text_steps == self.image_steps == 0:
            return Row(f"{encoders}, not aligned", partial(open_unaligned, encoders))
        flags = f"--text-steps {self.text_steps} --image-steps {self.image_steps}"
        flags += f" --captions miniature:{self.images} --rank {self.rank}"
        run = f"{encoders}-{self.text_steps}-{self.image_steps}-{self.images}-{self.rank}"
        weights = runs / run / "last"
        opens = partial(open_aligned, encoders, "lora", f"{flags} {train_flags}", weights)
        return Row(f"{encoders}, {flags}", opens, weights)


# The setting that each curve varies. All curves contain the default, which is trained and drawn once.
CURVES = {
    "steps on images": {n: Alignment(image_steps=n) for n in (0, 25, 50, 100)},
    "training images": {n: Alignment(images=n) for n in (50, 200, 2000)},
    "rank of the LoRA": {n: Alignment(rank=n) for n in (1, 4, 16)},
    "steps on texts, no images": {n: Alignment(text_steps=n, image_steps=0) for n in (0, 25, 50)},
}

# By curve, encoders and value: counts of `miniature_pictures`, (scenes, columns, 2).
Counts = dict[str, dict[str, dict[int, np.ndarray]]]


def mean_cut_by_stock(counts: np.ndarray) -> np.ndarray:
    return percent(counts)[..., CUT_BY_STOCK].mean(axis=-1, keepdims=True)


def print_tables(counts: Counts) -> None:
    columns = ("encoders", "cut by stock: mean", "plain", "linked", "short: plain", "linked")
    for curve, lines in counts.items():
        print(f"\n| {curve} |", " | ".join(columns), "|")
        print("|---" * (len(columns) + 1) + "|")
        for value in next(iter(lines.values())):
            for encoders, found in lines.items():
                shares = with_interval(found[value])
                figures = [*with_interval(found[value], mean_cut_by_stock), *shares[CUT_BY_STOCK], *shares[SHORT]]
                print(f"| {value} | {encoders} |", " | ".join(map(cell, figures)), "|")


def draw_figure(counts: Counts) -> Figure:
    figure = Figure(figsize=(3.2 * len(counts) + 0.8, 6.5), layout="constrained")
    panels = figure.subplots(2, len(counts), sharex="col", sharey=True, squeeze=False)
    for column, (curve, lines) in enumerate(counts.items()):
        for panel, part in zip(panels[:, column], (CUT_BY_STOCK, SHORT), strict=True):
            for encoders, found in lines.items():
                shares = np.stack([with_interval(of_value)[part] for of_value in found.values()], axis=1)
                for kind, line, (middle, low, high) in zip(
                    ("plain", "linked"), ("solid", "dashed"), np.moveaxis(shares, -1, 1), strict=True
                ):
                    # Values are evenly spaced: most are multiples of one another, but one is 0.
                    at, color = np.arange(len(found)), COLORS[encoders]
                    panel.plot(
                        at, middle, color=color, linestyle=line, marker="o", clip_on=False, label=f"{encoders}, {kind}"
                    )
                    panel.fill_between(at, low, high, color=color, alpha=0.12, linewidth=0)
            scale_shares(panel)
            panel.set(xticks=range(len(found)), xticklabels=[str(value) for value in found])
        panels[1, column].set_xlabel(curve)
    panels[0, 0].set_ylabel("long captions, cut by stock:\nobjects right, %")
    panels[1, 0].set_ylabel("short captions:\nobjects right, %")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_drawing_flags(flags, scenes=100, runs="runs/alignment-curves")
    text = f"names of curves (default: all): {'; '.join(CURVES)}"
    flags.add_argument("--only", nargs="*", default=list(CURVES), choices=list(CURVES), metavar="CURVE", help=text)
    arguments = flags.parse_args()

    results = Results(arguments.json, arguments)
    rows = {
        (curve, encoders, value): alignment.row(encoders, arguments.runs, arguments.train_flags)
        for curve in arguments.only
        for encoders in ENCODERS
        for value, alignment in CURVES[curve].items()
    }
    draw_missing(list(rows.values()), results, arguments)
    samples = all_samples(arguments.scenes)
    counts: Counts = {curve: {encoders: {} for encoders in ENCODERS} for curve in arguments.only}
    for (curve, encoders, value), row in rows.items():
        counts[curve][encoders][value] = counts_of(row, results, samples)
    print(circumstances(results, list(rows.values())))
    print_tables(counts)
    if arguments.plot:
        save_figure(draw_figure(counts), arguments.plot)


if __name__ == "__main__":
    main()
