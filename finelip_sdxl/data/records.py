"""Entries of a data set's CSV, JSON and text files, with their places for messages."""

from __future__ import annotations

import csv
import io
import json
import reprlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finelip_sdxl.texts import lines_of, read_text

from .caption_dataset import half_character
from .file_dataset import Record

Row = tuple[str, Any, Any]  # the place of an entry, its image and its caption


def group_by_image(folder: Path, rows: Iterable[Row]) -> Iterator[Record]:
    """Yields each image of the rows once, with all of its captions."""
    captions: dict[Path, list[Any]] = {}
    for place, image, caption in rows:
        with layout_errors(place):
            captions.setdefault(image_file(folder, image), []).append(caption)
    yield from captions.items()


def read_csv(path: Path) -> Iterator[Row]:
    """Yields the rows of a CSV file with columns for image and caption.

    Raises:
        ValueError: the header or a row is faulty.
    """
    rows = _csv_rows(path)
    _, columns = next(rows, (1, []))
    image = next((name for name in ("image", "image_name") if name in columns), None)
    caption = next((name for name in ("caption", "comment") if name in columns), None)
    if image is None or caption is None:
        raise ValueError(f"{path} has {_columns(columns)}; expected image and caption.")
    for name in (image, caption):
        if columns.count(name) > 1:
            raise ValueError(f"{path} has the column {name} {columns.count(name)} times; expected it once.")
    for line, fields in rows:
        row = dict(zip(columns, fields, strict=False))
        if len(fields) > len(columns) or not row.get(image) or not row.get(caption):
            raise ValueError(
                f"Line {line} of {path} does not hold an image and a caption, as its header says: put captions with "
                "commas in quotes."
            )
        yield f"Line {line} of {path}", row[image], row[caption]


def _columns(names: list[str]) -> str:
    return f"the columns {', '.join(names)}" if names else "no columns"


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yields the rows that are not empty, and the first line of each."""
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise ValueError(
                f"The row that begins in line {line} of {path} cannot be read ({error}): close each quote, and double "
                "the quotes in a quoted caption."
            ) from error
        if fields is None:
            return
        if fields:
            yield line, fields


def read_jsonl(path: Path) -> Iterator[Row]:
    """Yields the lines of a JSONL file with the keys `image` and `caption`."""
    for place, entry in read_json_lines(path):
        with layout_errors(place):
            yield place, entry["image"], entry["caption"]


def read_token(path: Path) -> Iterator[Row]:
    """Yields the lines of Flickr30k's `.token` file: IMAGE#NUMBER, a tab and a caption."""
    for number, line in lines_of(read_text(path)):
        image, _, caption = line.partition("\t")
        if not caption.strip() or "#" not in image:
            raise ValueError(f"Line {number} of {path} is faulty; expected IMAGE#NUMBER, a tab and a caption.")
        yield f"Line {number} of {path}", image.rpartition("#")[0], caption


def read_json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields the place and the content of each line, which is JSON."""
    for number, line in lines_of(read_text(path)):
        place = f"Line {number} of {path}"
        yield place, _parse_json(line, place)


def read_json(path: Path, kind: type) -> Any:
    """Returns the content of a JSON file, which must be a dict or list, as `kind` says."""
    content = _parse_json(read_text(path), str(path))
    if not isinstance(content, kind):
        raise ValueError(f"{path} holds a {type(content).__name__}, where a {kind.__name__} was expected.")
    return content


def _parse_json(text: str, place: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:  # also for deep nesting, and for numbers of thousands of digits
        raise ValueError(f"{place} is not JSON ({error}).") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        name = next(name for number, (name, _) in enumerate(pairs) if name in dict(pairs[:number]))
        raise ValueError(f"an object has {name!r} twice")
    return content


def entries_of(content: dict[str, Any], name: str, file: Path) -> Iterator[tuple[str, Any]]:
    """Yields the place and the content of each entry of a list in a JSON file."""
    with layout_errors(str(file)):
        entries = content[name]
        if not isinstance(entries, list):
            raise TypeError(f"{name} is {reprlib.repr(entries)}, where a list was expected")
    return ((f"Entry {number} of {name} in {file}", entry) for number, entry in enumerate(entries, 1))


def image_file(folder: Path, image: Any) -> Path:
    """Returns the path of an entry's image.

    Raises:
        TypeError: the image is no path.
    """
    if not isinstance(image, str) or not image.strip():
        raise TypeError(f"its image is {reprlib.repr(image)}, where a path was expected")
    if fault := half_character(image):
        raise TypeError(f"its image {fault}")
    return folder / image


def by_stem(files: Iterable[Path]) -> dict[str, Path]:
    """Returns files by their names without suffix.

    Raises:
        ValueError: two files differ in their suffix only.
    """
    named: dict[str, Path] = {}
    for file in files:
        if (other := named.setdefault(file.stem, file)) is not file:
            raise ValueError(f"{other} and {file} share one name, and so one caption: leave only one of them.")
    return named


def existing_folder(path: Path) -> Path:
    """Returns the path of a folder.

    Raises:
        FileNotFoundError: it is not there.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist, or is no folder: pass the folder of the data set.")
    return path


def first_of(path: Path, *names: str) -> Path:
    """Returns the first of these names that exists in a folder."""
    for name in names:
        if (existing_folder(path) / name).exists():
            return path / name
    raise FileNotFoundError(f"{path} has none of {', '.join(names)}; expected one of them.")


@contextmanager
def layout_errors(place: str) -> Iterator[None]:
    """Turns the errors of an entry of another layout into a sentence with its place."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{place} lacks {error}.") from error
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{place} does not have the layout of its data set ({error}).") from error
