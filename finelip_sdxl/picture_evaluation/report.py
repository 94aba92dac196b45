"""The report of a run: figures and settings in Markdown, JSON and HTML, with the pictures side by side in HTML."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from finelip_sdxl.data.caption_dataset import UnreadableImageError
from finelip_sdxl.evaluation.intervals import Interval
from finelip_sdxl.files import written_whole
from finelip_sdxl.options import COLUMNS
from finelip_sdxl.picture_evaluation.manifest import read_manifest
from finelip_sdxl.picture_evaluation.plan import PicturePlan
from finelip_sdxl.picture_evaluation.scores import Figure, Scores
from finelip_sdxl.report import report_entries

_DATA_SIZE = 512  # longest side of a data set's image in the HTML, in pixels
_TEMPLATES = Environment(
    loader=PackageLoader("finelip_sdxl.picture_evaluation"),
    autoescape=select_autoescape(["html"]),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


def write_report(
    plan: PicturePlan, folder: Path, scores: Scores, command: str, device: torch.device | str = "cpu"
) -> list[Path]:
    """Writes `report.md`, `report.json` and `report.html` to the folder of a run.

    The JSON holds all figures, also those of every prompt. The HTML shows the pictures, sorted by any figure, and
    needs the folder beside it but no network.

    Args:
        plan: the pictures.
        folder: the folder of the run.
        scores: its figures.
        command: the command line.
        device: the device of the figures.

    Returns:
        The files.

    Raises:
        OSError: a file cannot be written.
    """
    save_data_images(plan, folder)
    content = report_content(plan, folder, scores, command, device)
    texts = {
        "report.md": _TEMPLATES.get_template("report.md").render(content, table=figure_table(scores, plan.columns)),
        "report.json": json.dumps(content, indent=1, ensure_ascii=False) + "\n",
        "report.html": _TEMPLATES.get_template("report.html").render(content),
    }
    for name, text in texts.items():
        with written_whole(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return [folder / name for name in texts]


def save_data_images(plan: PicturePlan, folder: Path) -> None:
    """Saves the data set's own images to the folder of a run, small, for its HTML; those that cannot be read are left
    out."""
    for index in range(len(plan.prompts.prompts) if plan.prompts.images is not None else 0):
        assert plan.prompts.images is not None
        file = folder / _data_image(index)
        if not file.exists():
            with suppress(UnreadableImageError):
                image = plan.prompts.images.image(index).copy()
                image.thumbnail((_DATA_SIZE, _DATA_SIZE))
                file.parent.mkdir(exist_ok=True)
                with written_whole(file) as temporary:
                    image.save(temporary, format="PNG")


def _data_image(index: int) -> str:
    return f"data/{index:05}.png"


def report_content(
    plan: PicturePlan, folder: Path, scores: Scores, command: str, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """Returns everything in a report, of JSON's types."""
    return {
        **report_entries(command, torch.device(device)),
        "settings": read_manifest(folder)["settings"],
        "columns": {column: COLUMNS[column] for column in plan.columns},
        "figures": [_entry(figure) for figure in scores.figures],
        "notes": scores.notes,
        "prompts": [
            {
                "number": index + 1,
                "name": "/".join([*prompt.group, prompt.name]),
                "text": prompt.text,
                "data_image": _data_image(index) if (folder / _data_image(index)).exists() else None,
                "pictures": {
                    column: [file.as_posix() for file in plan.files_of(Path(), column, index)]
                    for column in plan.columns
                },
                "scores": {
                    figure.key: {column: own[index] for column, own in figure.by_prompt.items()}
                    for figure in scores.figures
                    if figure.by_prompt
                },
            }
            for index, prompt in enumerate(plan.prompts.prompts)
        ],
    }


def figure_table(scores: Scores, columns: Sequence[str]) -> list[str]:
    """Returns the lines of a Markdown table: a row for each figure, a column for each way of encoding."""
    rows = [["", *(COLUMNS[column] for column in columns), "judged by"]]
    for figure in scores.figures:
        arrow = "↑" if figure.is_better_high else "↓"
        cells = [
            interval_text(figure.values[column], figure.digits) + (" *" if column in figure.self_judged else "")
            for column in columns
        ]
        rows.append([f"{figure.title} {arrow}", *cells, figure.by])
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    lines = [f"| {' | '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))} |" for row in rows]
    lines.insert(1, f"|{'|'.join('-' * (width + 2) for width in widths)}|")
    if any(figure.self_judged for figure in scores.figures):
        lines += ["", "\\* Self-judged: this judge's own text encoder drew the column."]
    return lines


def interval_text(interval: Interval | None, digits: int) -> str:
    """Returns a figure with its interval.

    Examples:
        >>> interval_text(Interval(0.25, 0.2, 0.3, 10), digits=2), interval_text(None, digits=2)
        ('0.25 (0.20 to 0.30)', '–')
    """
    if interval is None:
        return "–"
    text = f"{interval.value:.{digits}f}"
    return text if interval.low is None else f"{text} ({interval.low:.{digits}f} to {interval.high:.{digits}f})"


def _entry(figure: Figure) -> dict[str, Any]:
    return {
        "key": figure.key,
        "title": figure.title,
        "judged_by": figure.by,
        "better": "high" if figure.is_better_high else "low",
        "digits": figure.digits,
        "self_judged": list(figure.self_judged),
        "values": {column: own and own.to_dict() for column, own in figure.values.items()},
    }
