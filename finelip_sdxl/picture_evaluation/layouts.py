"""Pictures in the folders that published scorers read; the names are `options.LAYOUTS`. Imports nothing heavy.

What a scorer expects was looked up in its code, which the functions name. Files are copied, since one scorer writes to
the pictures that it reads.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finelip_sdxl.comparison.settings import Settings
from finelip_sdxl.files import written_whole
from finelip_sdxl.picture_evaluation.plan import PicturePlan

if TYPE_CHECKING:
    from PIL import Image

MAX_NAME = 255  # bytes of a file's name
_JPEG_QUALITY = 95


@dataclass(frozen=True)
class _File:
    """A file of a layout: its path, and the drawn pictures that it shows."""

    path: Path
    pictures: list[Path]


def check_options(name: str, settings: Settings, images_per_prompt: int) -> None:
    """Checks that a layout holds pictures of this number and size.

    Raises:
        ValueError: it does not.
    """
    allowed, needs = _COUNTS.get(name, (None, ""))
    if allowed is not None and images_per_prompt not in allowed:
        raise ValueError(f"`images_per_prompt` is {images_per_prompt}; expected {needs} in the layout {name}.")
    if name == "dpg-bench" and images_per_prompt > 1 and settings.width != settings.height:
        raise ValueError(
            f"`width` is {settings.width} and `height` {settings.height}; expected squares in the layout dpg-bench."
        )


def check_layout(name: str, plan: PicturePlan) -> None:
    """Checks that pictures can be laid out, before they are drawn.

    Raises:
        ValueError: the layout holds another number or size of pictures, or a prompt has no place in it.
    """
    check_options(name, plan.settings, plan.images_per_prompt)
    taken: dict[Path, int] = {}
    for index in range(len(plan.prompts.prompts)):
        for file in _FILES[name](plan, Path(), plan.columns[0], index):
            if taken.setdefault(file.path, index) != index:
                raise ValueError(
                    f"Prompts {taken[file.path] + 1} and {index + 1} of {plan.prompts.spec} would share the file"
                    f" {file.path} in the layout {name}: pass other names, or another layout."
                )


def write_layout(name: str, plan: PicturePlan, folder: Path) -> Path:
    """Lays out the pictures of a run in a folder of the layout's name beside them. Files that are there stay.

    Returns:
        The folder; for `plain` that of the pictures.

    Raises:
        OSError: a file cannot be written, or a picture is missing or damaged.
    """
    for column in plan.columns:
        for index in range(len(plan.prompts.prompts)):
            for file in _FILES[name](plan, folder, column, index):
                if not file.path.exists():
                    _write(file)
        if name == "detailmaster":
            _write_detailmaster_entries(plan, folder, column)
    return folder / (name if name != "plain" else "pictures")


def _write(file: _File) -> None:
    from finelip_sdxl.picture_evaluation.drawn import read_drawn

    pictures = [read_drawn(picture) for picture in file.pictures]
    with written_whole(file.path) as temporary:
        if len(pictures) > 1:
            _grid(pictures).save(temporary, format="PNG")
        elif file.path.suffix == ".jpg":
            pictures[0].save(temporary, format="JPEG", quality=_JPEG_QUALITY, subsampling=0)
        else:
            shutil.copyfile(file.pictures[0], temporary)


def _grid(pictures: list[Image.Image]) -> Image.Image:
    """Four pictures as the quarters of one: above left, above right, below left, below right."""
    from PIL import Image

    width, height = pictures[0].size
    grid = Image.new("RGB", (2 * width, 2 * height))
    for number, picture in enumerate(pictures):
        grid.paste(picture, (number % 2 * width, number // 2 * height))
    return grid


# One function for each layout, from a plan, the folder of the run, a column and a prompt's index to files


def _plain(plan: PicturePlan, folder: Path, column: str, index: int) -> Iterator[_File]:
    """Nothing beside the pictures themselves."""
    yield from ()


def _dpg_bench(plan: PicturePlan, folder: Path, column: str, index: int) -> Iterator[_File]:
    """`dpg_bench/compute_dpg_bench.py` of ELLA: a folder of pictures and nothing else, each named as its prompt up to
    the first dot; four of a prompt as quarters of one picture."""
    name = _file_name(plan, index, plan.prompts.prompts[index].name.partition(".")[0], ".png")
    yield _File(folder / "dpg-bench" / column / name, plan.files_of(folder, column, index))


def _tiif(plan: PicturePlan, folder: Path, column: str, index: int) -> Iterator[_File]:
    """`eval/eval_with_vlm.py` of TIIF-Bench: TYPE/MODEL/short_description/LINE.png, lines from 0."""
    prompt = plan.prompts.prompts[index]
    if len(prompt.group) != 2:
        raise ValueError(f"The layout tiif needs the types and lines of TIIF-Bench, which {plan.prompts.spec} lacks.")
    kind, length = prompt.group
    place = folder / "tiif" / _file_name(plan, index, kind) / column / length / f"{prompt.name}.png"
    yield _File(place, plan.files_of(folder, column, index))


def _longbench_t2i(plan: PicturePlan, folder: Path, column: str, index: int) -> Iterator[_File]:
    """`evaluate.py` of LongBench-T2I: folders with numbers for names, whose order is that of the prompts; the last step
    in each, and in it the picture with the largest number."""
    place = folder / "longbench-t2i" / "outputs" / column / str(index) / "step0" / "generated_image_0.jpg"
    yield _File(place, plan.files_of(folder, column, index))


def _detailmaster(plan: PicturePlan, folder: Path, column: str, index: int) -> Iterator[_File]:
    """`evaluation_pipeline/eval_process.py` of DetailMaster: a folder of pictures, and a list of their names."""
    for number, picture in enumerate(plan.files_of(folder, column, index)):
        yield _File(folder / "detailmaster" / column / f"{index:05}_{number:02}.png", [picture])


def _write_detailmaster_entries(plan: PicturePlan, folder: Path, column: str) -> None:
    entries = [
        {"output_image_name": file.path.name, "image_id": prompt.name}
        for index, prompt in enumerate(plan.prompts.prompts)
        for file in _detailmaster(plan, folder, column, index)
    ]
    with written_whole(folder / "detailmaster" / f"{column}.json") as temporary:
        temporary.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")


def _t2i_compbench(plan: PicturePlan, folder: Path, column: str, index: int) -> Iterator[_File]:
    """T2I-CompBench's scorers: `samples/PROMPT_NUMBER.png`, with the prompt up to the first underscore and a number of
    six digits that no other picture has."""
    text = plan.prompts.prompts[index].text
    if "_" in text:
        raise ValueError(
            f"Prompt {index + 1} of {plan.prompts.spec} holds an underscore, where T2I-CompBench's scorers end a"
            " prompt: leave it out, or pass another layout."
        )
    for number, picture in enumerate(plan.files_of(folder, column, index)):
        ending = f"_{index * plan.images_per_prompt + number:06}.png"
        yield _File(folder / "t2i-compbench" / column / "samples" / _file_name(plan, index, text, ending), [picture])


_FILES: dict[str, Callable[[PicturePlan, Path, str, int], Iterator[_File]]] = {
    "plain": _plain,
    "dpg-bench": _dpg_bench,
    "tiif": _tiif,
    "longbench-t2i": _longbench_t2i,
    "detailmaster": _detailmaster,
    "t2i-compbench": _t2i_compbench,
}
_COUNTS = {
    "dpg-bench": ((1, 4), "1, or 4 as quarters of one picture,"),
    "tiif": ((1,), "1"),
    "longbench-t2i": ((1,), "1"),
}


def _file_name(plan: PicturePlan, index: int, name: str, ending: str = "") -> str:
    """A name from the data as the name of a file."""
    problem = None
    if not name or name.startswith(".") or set(name) & set("/\\\0"):
        problem = "is no name of a file"
    elif len(f"{name}{ending}".encode()) > MAX_NAME:
        problem = f"is too long for the name of a file, which has at most {MAX_NAME} bytes"
    if problem:
        raise ValueError(
            f"{name!r:.60} of prompt {index + 1} of {plan.prompts.spec} {problem}: pass another layout, or leave the"
            " prompt out."
        )
    return name + ending
