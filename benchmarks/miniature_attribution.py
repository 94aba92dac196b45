"""Whether heat maps can be believed: maps of sentences on unseen scenes of the miniature world, held against the truth.

    python benchmarks/miniature_attribution.py --json runs/attribution.json --report docs/results/attribution.md

Every long caption is drawn as each column encodes it, with `trace_attention`. A hit: the map of a sentence is highest
in the cell where its object belongs (chance: one of nine). Mass: the share of the map that lies in this cell. The
figures are apart for sentences that end within stock's 77 tokens and past them, with a 95 % interval (bootstrap over
scenes). A second table compares ways of making a map, and a third says how well a map's strength tells whether the
object will be right (area under the curve: 50 % is a coin's, 100 % never wrong).

With --json a stopped benchmark goes on. With --report, the tables, a plot and a sheet of one scene are written beside
one another.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from finelip_sdxl.attribution.overlays import heat_map_sheet
from finelip_sdxl.attribution.trace import AttentionTrace
from finelip_sdxl.comparison import Settings
from finelip_sdxl.comparison.comparison import Comparison, Picture
from finelip_sdxl.files import written_whole
from finelip_sdxl.miniature.scoring import score_picture
from finelip_sdxl.options import STOCK_POSITIONS
from finelip_sdxl.report import command_line, report_header

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that this runs as a script

from benchmarks.miniature_pictures import (
    ENCODERS,
    Sample,
    add_sampling_flags,
    cell,
    make_samples,
    with_interval,
    writable,
)

CELLS = 3  # in a row and in a column
BIN_TOKENS, LEAST_OBJECTS = 25, 10  # of the plot


@dataclass(frozen=True)
class Way:
    """A way to encode captions: the pair of encoders, None for the miniature's own, and the comparison's column."""

    encoders: str | None
    column: str

    def open(self) -> Comparison:
        if self.encoders is None:
            return Comparison.load("miniature", short_prompt_encoder="long")
        finelip, finelip_2 = ENCODERS[self.encoders]
        loading = {"finelip": finelip, "finelip_2": finelip_2, "conditioning_adapter": None}
        return Comparison.load("miniature", short_prompt_encoder="long", **loading)


ALIGNED = "FineLIP, aligned"
WAYS = {
    "stock, cut at 77": Way(None, "stock"),
    "compel, windows of 77": Way(None, "compel"),
    "stretched, not aligned": Way("stretched", "finelip"),
    "FineLIP, not aligned": Way("FineLIP", "finelip"),
    ALIGNED: Way(None, "finelip"),
}

# Ways to make a sentence's map, for the second table
MAPS = {
    "map": "last token, its share of the phrases' attention (as shipped)",
    "last": "last token alone",
    "mean": "mean of its tokens (as is customary for words)",
    "noun": "the object's noun instead of the sentence, as shipped",
}


def find_in_maps(trace: AttentionTrace, sample: Sample, picture: Picture) -> list[dict[str, Any]]:
    """What the maps of each described object's sentence say, and whether the picture has it right."""
    scores = score_picture(picture.image, sample.scene)
    found = []
    phrases = {(phrase.start, phrase.end): phrase for phrase in trace.phrases()}
    maps, places = trace._drawn()[0].numpy(), trace._text_places(0)[0]
    for mention, end in zip(sample.caption.described, sample.ends, strict=True):
        span, shape = (mention.start, mention.end), sample.scene.objects[mention.index].shape
        noun = sample.caption.text.index(shape, mention.start)
        last = places.last_position(*span)
        own = [
            position
            for (first, stop), position in zip(places.offsets, places.positions, strict=True)
            if first < mention.end and stop > mention.start
        ]
        nothing = np.zeros(maps.shape[1:])
        by_way = {
            "map": trace.heat_map(span),
            "last": nothing if last is None else maps[last],
            "mean": maps[own].mean(axis=0) if own else nothing,
            "noun": trace.heat_map((noun, noun + len(shape))),
        }
        shares = {name: _cells(heat) for name, heat in by_way.items()}
        phrase = phrases[span]
        found.append(
            {
                "position": end,
                "right": int(scores[mention.index].right),
                "encoded": int(phrase.is_encoded),
                "ignored": int(phrase.is_ignored),
                "strength": phrase.strength / phrase.equal,
                "hit": {name: int(share.any() and share.argmax() == mention.index) for name, share in shares.items()},
                "mass": {name: float(share[mention.index]) for name, share in shares.items()},
            }
        )
    return found


def _cells(heat: np.ndarray) -> np.ndarray:
    """The share of a map in each cell of the scene, (9,); all 0 for an empty map."""
    rows, columns = (np.array_split(np.arange(length), CELLS) for length in heat.shape)
    sums = np.array([heat[np.ix_(row, column)].sum() for row in rows for column in columns])
    return sums / max(sums.sum(), np.finfo(float).tiny)


def trace_scenes(way: Way, samples: Sequence[Sample], arguments: argparse.Namespace, name: str) -> list[Any]:
    comparison = way.open()
    found = []
    for seed, sample in enumerate(tqdm(samples, desc=name)):
        picture = comparison.draw(way.column, _settings(sample, seed, arguments), traced=True)
        assert picture.trace is not None
        found.append(find_in_maps(picture.trace, sample, picture))
    return found


def _settings(sample: Sample, seed: int, arguments: argparse.Namespace) -> Settings:
    return Settings(sample.caption.text, seed=seed, steps=arguments.steps, guidance_scale=arguments.guidance_scale)


# The tables

Results = dict[str, list[list[dict[str, Any]]]]  # by way, scene and object


def is_past(thing: dict[str, Any]) -> bool:
    return bool(thing["position"] >= STOCK_POSITIONS - 1)  # stock's last token is the end token


def counts(scenes: list[list[dict[str, Any]]], values: Sequence[Callable[[dict[str, Any]], float]]) -> np.ndarray:
    """Sums of values and numbers of objects, up to token 77 and past it: (scenes, values · 2, 2)."""
    found = np.zeros((len(scenes), 2 * len(values), 2))
    for row, things in enumerate(scenes):
        for thing in things:
            for column, value in enumerate(values):
                found[row, 2 * column + is_past(thing)] += value(thing), 1
    return found


def accuracy_table(results: Results) -> list[str]:
    values = [
        lambda thing: thing["hit"]["map"],
        lambda thing: thing["mass"]["map"],
        lambda thing: thing["right"],
        lambda thing: thing["ignored"],
    ]
    heads = ("hit", "mass in the cell", "object right", "called ignored")
    lines = _head("encoded by", [f"{head}, {part}" for head in heads for part in ("within 77", "past 77")])
    for name, scenes in results.items():
        lines.append(_line(name, map(cell, with_interval(counts(scenes, values)))))
    return lines


def maps_table(scenes: list[list[dict[str, Any]]]) -> list[str]:
    lines = _head("map", [f"{head}, {part}" for head in ("hit", "mass") for part in ("within 77", "past 77")])
    for way, words in MAPS.items():
        values = [lambda thing, way=way: thing["hit"][way], lambda thing, way=way: thing["mass"][way]]
        lines.append(_line(words, map(cell, with_interval(counts(scenes, values)))))
    return lines


def strength_table(results: Results) -> list[str]:
    lines = _head("encoded by", ["objects", "right", "area under the curve", "strength if right", "if not"])
    named = {**results, "all of them": [scene for scenes in results.values() for scene in scenes]}
    for name, scenes in named.items():
        things = [thing for scene in scenes for thing in scene]
        right = [thing["strength"] for thing in things if thing["right"]]
        wrong = [thing["strength"] for thing in things if not thing["right"]]
        medians = [f"{np.median(values):.2f}" if values else "–" for values in (right, wrong)]
        area = cell([100 * value for value in area_with_interval(scenes)])
        lines.append(_line(name, [str(len(things)), str(len(right)), area, *medians]))
    return lines


def area_with_interval(scenes: list[list[dict[str, Any]]], resamples: int = 300) -> tuple[float, float, float]:
    """Area under the curve of strength against right or not, and its interval from resampled scenes."""
    pairs = [[(thing["strength"], thing["right"]) for thing in scene] for scene in scenes]
    random = np.random.default_rng(0)
    again = [
        area_under_curve([pair for row in random.integers(len(pairs), size=len(pairs)) for pair in pairs[row]])
        for _ in range(resamples)
    ]
    known = [value for value in again if not np.isnan(value)]
    low, high = np.percentile(known, (2.5, 97.5)) if known else (np.nan, np.nan)
    return area_under_curve([pair for scene in pairs for pair in scene]), float(low), float(high)


def area_under_curve(pairs: Sequence[tuple[float, int]]) -> float:
    """Probability that a right object has a higher strength than a wrong one; equal ones count half.

    Examples:
        >>> area_under_curve([(0.9, 1), (0.4, 1), (0.4, 0), (0.1, 0)])
        0.875
    """
    right, wrong = (np.sort([value for value, is_right in pairs if is_right == which]) for which in (1, 0))
    if not len(right) or not len(wrong):
        return float("nan")
    below, upto = (np.searchsorted(wrong, right, side=side).sum() for side in ("left", "right"))
    return float((below + upto) / 2 / len(right) / len(wrong))


def _head(first: str, columns: Sequence[str]) -> list[str]:
    return [_line(first, columns), "|---" * (len(columns) + 1) + "|"]


def _line(name: str, cells: Any) -> str:
    return f"| {name} | {' | '.join(cells)} |"


# The report


def draw_plot(results: Results) -> Figure:
    """Hits and mass by the position of the sentence's last token."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for panel, value, title in zip(panels, ("hit", "mass"), ("place found, %", "mass in the cell, %"), strict=True):
        for name, scenes in results.items():
            bins: dict[int, list[float]] = {}
            for thing in (thing for scene in scenes for thing in scene):
                bins.setdefault(thing["position"] // BIN_TOKENS, []).append(100 * thing[value]["map"])
            known = sorted((number, found) for number, found in bins.items() if len(found) >= LEAST_OBJECTS)
            middles = [(number + 0.5) * BIN_TOKENS for number, _ in known]
            panel.plot(middles, [np.mean(found) for _, found in known], marker="o", markersize=4, label=name)
        panel.axvline(STOCK_POSITIONS, color="black", linewidth=0.8)
        panel.set(title=title, xlabel="position of the sentence's last token", xlim=(0, 248), ylim=(0, 102))
        panel.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center")
    return figure


def report(results: Results, header: str, plot: str | None = None, sheet: str | None = None) -> str:
    """The page, in Markdown."""
    parts = [
        "# Where every part of the prompt went",
        "`trace_attention` shows where in a picture each phrase acted. The miniature's scenes say where it should have:"
        " each sentence of a caption describes one object in one of nine cells.",
        header,
        "A hit: the sentence's map is highest in its object's cell (chance 11 %). Mass: the share of the map in this"
        " cell. All in percent, with a 95 % interval. A sentence that stock cuts has no map, and counts as a miss.",
        "\n".join(accuracy_table(results)),
    ]
    if ALIGNED in results:
        parts += [f"Ways to make a map, for “{ALIGNED}”:", "\n".join(maps_table(results[ALIGNED]))]
    parts += [
        "Whether a map's strength tells that its object will be right in shape, color and place: the area under the"
        " curve, where 50 % is a coin's. Strength is in multiples of an equal share of the phrases' attention, as"
        " medians.",
        "\n".join(strength_table(results)),
    ]
    if plot is not None:
        parts.append(f"![Hits and mass by position]({plot})")
    if sheet is not None:
        parts.append(f"![A picture, and where each of its sentences acted]({sheet})")
    return "\n\n".join(parts) + "\n"


def write_report(file: Path, results: Results, header: str, samples: Sequence[Sample], arguments: Any) -> None:
    plot, sheet = file.with_name(f"{file.stem}-plot.png"), file.with_name(f"{file.stem}-sheet.png")
    with written_whole(plot) as temporary:
        draw_plot(results).savefig(temporary, format="png", dpi=110)
    picture = WAYS[ALIGNED].open().draw("finelip", _settings(samples[0], 0, arguments), traced=True)
    assert picture.trace is not None
    with written_whole(sheet) as temporary:
        heat_map_sheet(picture.image, picture.trace).save(temporary, format="PNG")
    with written_whole(file) as temporary:
        temporary.write_text(report(results, header, plot.name, sheet.name), encoding="utf-8")


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sampling_flags(flags, scenes=200)
    text = f"names of ways to encode (default: all): {'; '.join(WAYS)}"
    flags.add_argument("--only", nargs="*", default=list(WAYS), choices=WAYS, metavar="WAY", help=text)
    text = "file of results, written after each way; they are not drawn again (delete it after a change of weights)"
    flags.add_argument("--json", type=writable, metavar="FILE", help=text)
    flags.add_argument("--report", type=writable, metavar="MD", help="page to write, with a plot and a sheet beside it")
    arguments = flags.parse_args()

    settings = f"{arguments.scenes} scenes, {arguments.steps} steps, guidance {arguments.guidance_scale:g}"
    saved = json.loads(arguments.json.read_text()) if arguments.json and arguments.json.exists() else {}
    found: dict[str, Any] = saved.setdefault(settings, {})
    samples = make_samples(arguments.scenes, "long")
    for name in (name for name in WAYS if name in arguments.only and name not in found):
        started = time.time()
        scenes = trace_scenes(WAYS[name], samples, arguments, name)
        found[name] = {"day": time.strftime("%Y-%m-%d"), "seconds": round(time.time() - started), "scenes": scenes}
        if arguments.json:
            with written_whole(arguments.json) as temporary:
                temporary.write_text(json.dumps(saved))
    results: Results = {name: found[name]["scenes"] for name in WAYS if name in arguments.only}
    days = sorted({found[name]["day"] for name in results})
    command = command_line("python benchmarks/miniature_attribution.py", sys.argv[1:])
    header = f"{report_header(' to '.join(dict.fromkeys((days[0], days[-1]))))}; {settings}: `{command}`"
    print(report(results, header))
    if arguments.report:
        write_report(arguments.report, results, header, samples, arguments)


if __name__ == "__main__":
    main()
