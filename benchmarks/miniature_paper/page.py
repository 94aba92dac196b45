"""The page of the paper in miniature: tables and plots of all sections that are measured."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from benchmarks.miniature_pictures import RECOMMENDED, save_figure
from finelip_sdxl.evaluation.intervals import Interval, mean_interval
from finelip_sdxl.evaluation.retrieval import SWEEP
from finelip_sdxl.files import written_whole
from finelip_sdxl.model import GLOBAL_WEIGHT
from finelip_sdxl.picture_evaluation.report import interval_text
from finelip_sdxl.report import report_header

from .cells import Budget, Cells
from .measures import DIRECTIONS, FAMILY, PERTURBATIONS, PREFIXES, SIMILARITIES, Ranks
from .sections import (
    ALL,
    LONG_CLIP,
    SECTIONS,
    BeyondRow,
    Candidate,
    PictureRow,
    RetrievalRow,
    correlation_of_prompts,
    figure_of,
    known,
    orders,
    picture_verdict,
    spread_of,
    verdicts,
)

TITLES = {
    "learning-rates": "Learning rates",
    "retrieval": "1. Retrieval",
    "pictures": "2. Long-text-to-image generation",
    "ablations": "3. Ablations",
    "beyond": "4. Beyond the paper",
}
STAND_IN_TITLES = {
    "fid": "FID ↓",
    "kid": "KID ↓",
    "cmmd": "CMMD ↓",
    "sentences": "sentence fidelity ↑",
    "sentences after 77": "sentence fidelity after token 77 ↑",
}
_DIGITS = {"fid": 2, "kid": 4, "cmmd": 3, "sentences": 3, "sentences after 77": 3}
# A person's text stays when the page is written again: the first paragraph, and what is between these lines.
_NO_FINDING = "(What was found goes here, in two sentences.)"
_NOTES = "<!-- notes -->", "<!-- end of notes -->"
_NO_NOTES = "(Where the miniature contradicts the paper, the reasons that were found go here, between the two marks.)"


def write_page(page: Path, cells: Cells, command: str) -> list[Path]:
    """Writes the page, and its plots beside it.

    Args:
        page: the Markdown file; its first paragraph, and the text between its marks for notes, are kept.
        cells: the folder of all cells; none is made.
        command: the command line.

    Returns:
        The files.
    """
    reader = Cells(cells.folder, cells.budget, may_make=False)
    found = {section: known(section, reader) for section in SECTIONS}
    plots: dict[str, Figure] = {}
    parts = []
    for section, title in TITLES.items():
        result = found[section]
        if result is None:
            text = f"Not measured yet: `python benchmarks/paper.py --only {section}`."
        else:
            text = _WRITERS[section](result, plots)
        parts.append(f"## {title}\n\n{text}")
    days = sorted({cell["date"] for cell in reader.used})
    head = f"# The paper in miniature\n\n{_finding_of(page)}\n\n{_head(cells.budget, days, command)}"
    summary = _summary(found["ablations"], found["pictures"])
    notes = f"## Reasons\n\n{_NOTES[0]}\n{_notes_of(page)}\n{_NOTES[1]}"
    files = [page]
    page.parent.mkdir(parents=True, exist_ok=True)
    for name, figure in plots.items():
        files.append(page.with_name(f"{page.stem}-{name}.png"))
        save_figure(figure, files[-1])
        parts = [part.replace(f"(plot:{name})", f"({files[-1].name})") for part in parts]
    with written_whole(page) as temporary:
        temporary.write_text("\n\n".join([head, summary, notes, *parts]) + "\n", encoding="utf-8")
    return files


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown.

    Examples:
        >>> print(table(["a", "b"], [["1", "2"]]))
        | a | b |
        |---|---|
        | 1 | 2 |
    """
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"|{'|'.join(line)}|" if line[0] == "---" else f"| {' | '.join(line)} |" for line in lines)


def _head(budget: Budget, days: list[str], command: str) -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    measured = " to ".join(dict.fromkeys((days[0], days[-1]))) if days else None
    rates = ", ".join(f"{rate:g}" for rate in budget.learning_rates)
    return f"""FineLIP's claims (arXiv 2504.01916), tested in a world whose pictures are known exactly. Each model
begins with the miniature's first CLIP and is trained for {budget.steps:,} steps of {budget.batch_size} pairs, at the
best of the learning rates {rates} of its loss (the token refinement has four times as much).
{budget.scenes:,} scenes of their own choose it, by Recall@1 of the best similarity. *Global* is the cosine of the
embeddings, *fine* late interaction, and *fused* {GLOBAL_WEIGHT:g} global + {1 - GLOBAL_WEIGHT:g} fine, as published.

All figures are of {budget.scenes:,} other unseen scenes, in families of five that share the first four objects of their
captions. In brackets is the 95% interval of the bootstrap over families. Rows of retrieval have
{_count(budget.seeds, "seed")}, ablations {_count(budget.ablation_seeds, "seed")}; the first chooses the learning rates.
This is a small model and a short training: at full size, all of it may be different.

{LONG_CLIP} means the stretch and the contrastive loss of long captions, scored by global alone. Its matching
of short captions with the principal components of image features is not part of it: the training recipe does not have
it. "{ALL}" also learns from phrases and their regions, which other rows do not see.

(`{command}`, {report_header(measured, device)})"""


def _count(number: int, noun: str) -> str:
    return f"one {noun}" if number == 1 else f"{number} {noun}s"


def _summary(found: dict[str, dict[str, list[Ranks]]] | None, pictures: list[PictureRow] | None) -> str:
    lines = "## What the paper says, and the miniature\n\n"
    if found is None:
        return f"{lines}Not known before the ablations are measured."
    known_verdicts = verdicts(found) + ([] if pictures is None else [picture_verdict(pictures)])
    rows = [
        [verdict.claim, "–" if verdict.difference is None else interval_text(verdict.difference, 1), verdict.words]
        for verdict in known_verdicts
    ]
    lines += (
        "The difference is in points of Recall@1, as the mean of both directions, by the fused similarity (Long-CLIP's"
        " by global); of pictures, in points of right objects.\n\n"
    )
    return lines + table(["the paper", "difference here", "the miniature"], rows)


def _finding_of(page: Path) -> str:
    paragraphs = _text_of(page).split("\n\n")
    return paragraphs[1] if len(paragraphs) > 1 else _NO_FINDING


def _notes_of(page: Path) -> str:
    found = re.search(f"{re.escape(_NOTES[0])}\n(.*?)\n{re.escape(_NOTES[1])}", _text_of(page), re.DOTALL)
    return found[1] if found else _NO_NOTES


def _text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8") if page.is_file() else ""


# Sections


def _learning_rates(found: dict[str, list[Candidate]], plots: dict[str, Figure]) -> str:
    rates = [one.rate for one in next(iter(found.values()))]
    rows = []
    for loss, candidates in found.items():
        values = [None if one.recall is None else max(one.recall.values()) for one in candidates]
        chosen = max(
            ((value, rate) for value, rate in zip(values, rates, strict=True) if value is not None), default=None
        )
        cells = []
        for value, one in zip(values, candidates, strict=True):
            if value is None or one.recall is None:
                cells.append("diverged")
            else:
                name = max(one.recall, key=one.recall.__getitem__)
                text = f"{value:.1f} ({name})"
                cells.append(f"**{text}**" if (value, one.rate) == chosen else text)
        rows.append([loss, *cells])
    text = "Recall@1 in percent on the scenes that choose, by the best similarity, as the mean of both directions.\n\n"
    return text + table(["loss", *(f"{rate:g}" for rate in rates)], rows)


def _retrieval(rows: list[RetrievalRow], plots: dict[str, Figure]) -> str:
    parts = []
    for captions, family in (("long", FAMILY), ("short", 1)):
        head = ["", *(f"{name}, {way}" for name in SIMILARITIES for way in DIRECTIONS), "lowest to highest seed"]
        lines = []
        for row in rows:
            ranks = getattr(row, captions)
            cells = [
                _percent(figure_of(ranks, weight, way, family))
                for weight in SIMILARITIES.values()
                for way in DIRECTIONS
            ]
            spread = spread_of(ranks)
            lines.append([row.name, *cells, f"{spread[0]:.1f} to {spread[1]:.1f}" if spread else "–"])
        what = "Recall@1 in percent"
        words = {"long": f"{what}, long captions", "short": f"{what}, short captions, one scene of each family"}
        parts.append(f"{words[captions]}:\n\n{table(head, lines)}")

    plots["fusion"] = draw_fusion({row.name: row.long for row in rows})
    swept = [row for row in rows if figure_of(row.long, 0.0)]
    lines = [[row.name, *(_percent(figure_of(row.long, weight), False) for weight in SWEEP)] for row in swept]
    head = ["weight of global", *(f"{weight:.1f}" for weight in SWEEP)]
    parts.append(f"Fused similarity by its weight of global (0 is fine, 1 is global), long captions, the mean of both "
        f"directions:\n\n{table(head, lines)}\n\n{_plot('Recall@1 by the weight of global', 'fusion')}")  # fmt: skip
    return "\n\n".join(parts)


def _pictures(rows: list[PictureRow], plots: dict[str, Figure]) -> str:
    count = len(rows[0].scores["objects"])
    head = ["encoded by", "objects right, %", "after token 77, %", *STAND_IN_TITLES.values()]
    lines = []
    for row in rows:
        objects = [_share(mean_interval(row.scores[name])) for name in ("objects", "objects after 77")]
        others = [_score_text(row, name) for name in STAND_IN_TITLES]
        lines.append([row.name, *objects, *others])
    text = (
        f"{count} long captions of unseen scenes, guidance {RECOMMENDED.guidance_scale:g}, equal noise in all rows. The"
        " objects are counted exactly, without a model. FID, KID and CMMD compare the image features of the miniature's"
        " first CLIP with those of the true pictures; its text encoder judges each sentence for itself. Trained rows"
        " replace SDXL's first text encoder, and the second is stretched only, as in the paper.\n\n"
    )
    text += table(head, lines)
    text += "\n\n\\* Self-judged: the judge's own text encoder drew the row."
    if rows[0].scores["fid"] is None:
        text += " FID is left out: it needs more pictures than features."

    found = orders(rows)
    lines = [[STAND_IN_TITLES[name], f"{order.agree} of {order.pairs}"] for name, order in found.items()]
    text += (
        "\n\nDoes a figure order the rows as the objects do? Of the pairs of rows whose objects differ for sure (the"
        f" interval of the difference leaves out 0), it orders alike:\n\n{table(['figure', 'pairs'], lines)}"
    )
    lines = [
        [
            row.name,
            *(
                _correlation(row, *pair)
                for pair in (("sentences", "objects"), ("sentences after 77", "objects after 77"))
            ),
        ]
        for row in rows
    ]
    text += (
        "\n\nWithin a row, the correlation over prompts of sentence fidelity and the share of right objects:\n\n"
        + table(["encoded by", "all sentences", "after token 77"], lines)
    )
    plots["pictures"] = draw_stand_ins(rows, list(found))
    return f"{text}\n\n{_plot('Each figure against the share of right objects', 'pictures')}"


def _ablations(found: dict[str, dict[str, list[Ranks]]], plots: dict[str, Figure]) -> str:
    parts = [
        "All but the losses change one thing of the row with the paper's loss, at its learning rate. Recall@1 in"
        " percent on long captions, the mean of both directions."
    ]
    for name, values in found.items():
        lines = [
            [value, *(_percent(figure_of(ranks, weight)) for weight in SIMILARITIES.values()), _best_weight(ranks)]
            for value, ranks in values.items()
        ]
        parts.append(table([name, *SIMILARITIES, "best weight of global"], lines))
    plots["ablations"] = draw_ablations(found)
    parts.append(_plot("Recall@1 of all ablations", "ablations"))
    return "\n\n".join(parts)


def _beyond(rows: list[BeyondRow], plots: dict[str, Figure]) -> str:
    kinds = list(rows[0].end)
    lines = []
    for row in rows:
        for when, found in (("start", row.start), ("end", row.end)):
            if found is not None:
                lines.append([row.name, when, *(_number(found[kind], 4) for kind in kinds)])
    text = (
        "Are the refined tokens different? The mean cosine of two tokens of one image or text; 1 means that all are the"
        f" same.\n\n{table(['', 'of training', *kinds], lines)}"
    )

    head = ["", *(f"{name}@{count}" for name in ("global", "fused") for count in PREFIXES)]
    lines = [[row.name, *(_growth_text(row, name) for name in head[1:])] for row in rows]
    text += (
        "\n\nDoes similarity rise as sentences are added? HiMo@K (arXiv 2511.06653): the mean correlation of step and"
        " similarity over K beginnings of a caption; in brackets, the share of captions where every step raises it, in"
        f" percent.\n\n{table(head, lines)}"
    )

    head = ["", "as written", *PERTURBATIONS]
    lines = []
    for row in rows:
        ranks = [row.changed.get(name) for name in ("long", *PERTURBATIONS)]
        for name, weight in SIMILARITIES.items():
            cells = [_percent(figure_of([one], weight)) if one else "–" for one in ranks]
            if set(cells) != {"–"}:
                lines.append([f"{row.name}, {name}", *cells])
    text += (
        "\n\nRetrieval with changed captions (HyFL-CLIP's perturbations): Recall@1 in percent, the mean of both"
        f" directions.\n\n{table(head, lines)}"
    )
    return text


_WRITERS: dict[str, Callable[[Any, dict[str, Figure]], str]] = {
    "learning-rates": _learning_rates,
    "retrieval": _retrieval,
    "pictures": _pictures,
    "ablations": _ablations,
    "beyond": _beyond,
}


def _plot(text: str, name: str) -> str:
    """A plot with a link to itself alone, where it can be enlarged; `write_page` puts in the file."""
    return f"[![{text}](plot:{name})](plot:{name})"


# Cells of tables


def _percent(found: Interval | None, with_interval: bool = True) -> str:
    if found is None:
        return "–"
    return interval_text(found, 1) if with_interval else f"{found.value:.1f}"


def _share(found: Interval | None) -> str:
    if found is None:
        return "–"
    ends = [None if end is None else 100 * end for end in (found.low, found.high)]
    return interval_text(Interval(100 * found.value, *ends, found.count), 1)


def _score_text(row: PictureRow, name: str) -> str:
    score = row.scores[name]
    if score is None:
        return "–"
    found = Interval(**score) if isinstance(score, dict) else mean_interval(score)
    mark = " \\*" if row.is_self_judged and name.startswith("sentences") else ""
    return interval_text(found, _DIGITS[name]) + mark


def _correlation(row: PictureRow, figure: str, objects: str) -> str:
    return _number(correlation_of_prompts(row, figure, objects), 2)


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _growth_text(row: BeyondRow, name: str) -> str:
    found = row.growth.get(name)
    if found is None:
        return "–"
    return f"{np.mean(found['correlation']):.2f} ({100 * np.mean(found['always']):.0f})"


def _best_weight(ranks: list[Ranks]) -> str:
    values = {weight: figure_of(ranks, weight) for weight in SWEEP}
    known_values = {weight: found.value for weight, found in values.items() if found is not None}
    if not known_values:
        return "–"
    best = max(known_values, key=known_values.__getitem__)
    return f"{best:.1f} ({known_values[best]:.1f})"


# Plots


def draw_fusion(rows: dict[str, list[Ranks]]) -> Figure:
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    panel = figure.subplots()
    for name, ranks in rows.items():
        values = [figure_of(ranks, weight) for weight in SWEEP]
        if values[0] is None:  # no fine similarity
            continue
        panel.plot(SWEEP, [found.value if found else np.nan for found in values], marker="o", markersize=4, label=name)
    panel.axvline(SIMILARITIES["fused"], color="0.6", linewidth=0.8, linestyle="dashed")
    panel.set(xlabel="weight of global (dashed: published)", ylabel="Recall@1, %", xlim=(0, 1), ylim=(0, None))
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    return figure


def draw_ablations(found: dict[str, dict[str, list[Ranks]]]) -> Figure:
    rows = [len(values) for values in found.values()]
    figure = Figure(figsize=(8, 0.32 * sum(rows) + 0.6 * len(rows)), layout="constrained")
    panels = figure.subplots(len(found), 1, sharex=True, height_ratios=[count + 0.8 for count in rows], squeeze=False)
    for panel, (name, values) in zip(panels[:, 0], found.items(), strict=True):
        for number, (similarity, color) in enumerate(
            (("fused", "tab:blue"), ("fine", "tab:orange"), ("global", "0.5"))
        ):
            for at, ranks in enumerate(values.values()):
                share = figure_of(ranks, SIMILARITIES[similarity])
                if share is None:
                    continue
                height = at + 0.2 * (number - 1)
                panel.plot(share.value, height, "o", color=color, markersize=4, label=similarity if at == 0 else None)
                if share.low is not None and share.high is not None:
                    panel.plot((share.low, share.high), (height, height), color=color, linewidth=1)
        panel.set(yticks=range(len(values)), yticklabels=list(values), ylim=(len(values) - 0.5, -0.5))
        panel.set_title(name, fontsize=9, loc="left")
        panel.tick_params(labelsize=8)
        panel.grid(alpha=0.3, axis="x")
    panels[-1, 0].set_xlabel("Recall@1, %, with the 95% interval")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=3, fontsize=8)
    return figure


def draw_stand_ins(rows: list[PictureRow], names: list[str]) -> Figure:
    columns = 3
    height = len(names) // columns + 1  # in panels, with one for the legend
    figure = Figure(figsize=(9, 3.2 * height), layout="constrained")
    panels = figure.subplots(height, columns, squeeze=False).ravel()
    for panel, name in zip(panels, names, strict=False):
        for row in rows:
            objects = mean_interval(row.scores["objects"])
            score = row.scores[name]
            found = Interval(**score) if isinstance(score, dict) else mean_interval(score)
            if objects is not None and found is not None:
                panel.plot(100 * objects.value, found.value, "o", label=row.name)
        panel.set(xlabel="objects right, %", title=STAND_IN_TITLES[name])
        panel.title.set_fontsize(9)
        panel.grid(alpha=0.3)
    for panel in panels[len(names) :]:
        panel.axis("off")
    if names:
        panels[len(names)].legend(*panels[0].get_legend_handles_labels(), loc="upper left", fontsize=8)
    return figure
