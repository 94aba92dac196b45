"""Data sets of long captions as their authors publish them, each with its own layout on the disk."""

from __future__ import annotations

import csv
import io
import json
import reprlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from finelip_sdxl.texts import lines_of, read_text

from .caption_dataset import CaptionDataset, UnreadableImageError, caption_fault, half_character
from .images import read_image

SHAREGPT4V_TEST = 1_000  # leading entries that Long-CLIP and FineLIP hold out
CAPTIONS_PER_IMAGE = 5  # COCO has a few images with more, of which retrieval papers read the first five
MINIATURE_SCENES = {"train": 24_000, "test": 500}

Record = tuple[Path, list[str]]  # an image's file and its captions


def open_dataset(
    spec: str, split: str = "test", images: str | Path | None = None, skip_missing: bool = False
) -> CaptionDataset:
    """Opens a data set of images with captions.

    | spec | content |
    |---|---|
    | `miniature`, `miniature:COUNT` | scenes of the miniature world, drawn when asked for |
    | `sharegpt4v:FILE` | its JSON; the first 1,000 entries are the test split, the others train |
    | `docci:FOLDER` | `docci_descriptions.jsonlines`, `images/`; splits train, test, qual_dev, qual_test |
    | `urban1k:FOLDER` | `image/`, `caption/` (of each file the first line, as in Long-CLIP); all is the test split |
    | `coco:FOLDER` | `annotations/captions_val2017.json`, `val2017/`; `train2017` for train |
    | `flickr30k:FOLDER` | Karpathy's `dataset_flickr30k.json` (splits train, val, test); or else \
`results_20130124.token` or `captions.txt`, all of which is the test split, as in Long-CLIP; `flickr30k-images/`, \
`flickr30k_images/`, `images/` or `Images/` |
    | `csv:FILE`, `jsonl:FILE` | columns or keys `image` and `caption`, a row for each caption; the file is the split |
    | `txt:FILE` | a caption in each line that is not empty, and no images; the file is the split |

    Files of images are opened only when an image is asked for. Lines end at a line feed, a carriage return or both. A
    caption has at most 100,000 characters.

    Args:
        spec: `KIND:PATH`, see above.
        split: "train", "test", or another that the data set has.
        images: the folder that image paths are relative to, if it is not the published one; for `sharegpt4v`, `csv` and
            `jsonl`, the published one is the folder of the file.
        skip_missing: leave out images whose files are not there, such as those that ShareGPT4V names but that come from
            elsewhere. `left_out` of the result counts them. This looks for every file.

    Raises:
        FileNotFoundError: if a file or folder is missing, or with `skip_missing` all images are.
        ValueError: if the spec or the split is unknown, or the content is not as it should be (the message says where).

    Example:
        >>> scenes = open_dataset("miniature:10")
        >>> len(scenes), scenes.image(3).size
        (10, (96, 96))
    """
    kind, _, path = spec.partition(":")
    if kind == "miniature":
        if images is not None:
            raise ValueError(f"The scenes of {spec} are drawn: there is no folder of images to give.")
        return _miniature(path, split)
    if kind == "webdataset":
        raise ValueError(f"{spec} is a stream for training only: give a data set whose images can be counted.")
    if kind not in _READERS:
        raise ValueError(f"{spec} is no data set: give miniature, or one of {', '.join(_READERS)} as KIND:PATH.")
    if not path:
        raise ValueError(f"{spec} names no path: give {kind}:PATH.")
    records = _READERS[kind](Path(path), split, None if images is None else Path(images))
    return LineDataset(records, spec) if kind == "txt" else FileDataset(records, spec, skip_missing)


class FileDataset(CaptionDataset):
    """Images in files, whose paths and captions are in memory.

    Args:
        records: the path of each image and its captions.
        name: the data set's, for messages.
        skip_missing: leave out images whose files are not there; `left_out` then counts them.

    Raises:
        FileNotFoundError: if `skip_missing` leaves out all.
        ValueError: if there is no image, or one has no caption, or one that is no text or too long.

    Example:
        >>> FileDataset([(Path("fox.jpg"), ["A fox\\nsleeps.", "It is night."])]).captions(0)
        ('A fox sleeps.', 'It is night.')
    """

    def __init__(self, records: Iterable[Record], name: str = "The data set", skip_missing: bool = False) -> None:
        # One buffer instead of millions of strings: those, merely by being counted, would be copied into each worker.
        buffer, ends = bytearray(), [0]
        missing, first = 0, Path()
        for path, captions in records:
            if skip_missing and not path.is_file():
                missing, first = missing + 1, first if missing else path
                continue
            _check_captions(captions, path, name)
            captions = [" ".join(caption.split()) for caption in captions]
            buffer += json.dumps([str(path), *captions]).encode()
            ends.append(len(buffer))
        if missing:
            total = missing + len(ends) - 1
            self.left_out = f"{missing:,} of {total:,} images of {name} are not there and are left out; first {first}."
            if missing == total:
                raise FileNotFoundError(f"None of the {total:,} images of {name} is there; the first would be {first}.")
        if len(ends) == 1:
            raise ValueError(f"{name} has no images in this split.")
        self._buffer, self._ends = bytes(buffer), np.array(ends)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def image(self, index: int) -> Image.Image:
        path = self._record(index)[0]
        return read_image(Path(path), path)

    def image_file(self, index: int) -> Path | None:
        return Path(self._record(index)[0])

    def captions(self, index: int) -> tuple[str, ...]:
        return tuple(self._record(index)[1:])

    def _record(self, index: int) -> list[str]:
        if not 0 <= index < len(self):
            raise IndexError(f"Image {index} was asked for, but there are {len(self)}.")
        record: list[str] = json.loads(self._buffer[self._ends[index] : self._ends[index + 1]])
        return record


class LineDataset(FileDataset):
    """Captions without images, for training on texts alone; a record names a line in place of an image's file.

    Example:
        >>> LineDataset([(Path("captions.txt, line 3"), ["A fox sleeps."])]).captions(0)
        ('A fox sleeps.',)
    """

    def image(self, index: int) -> Image.Image:
        raise UnreadableImageError(f"{self._record(index)[0]}, has no image: the file holds texts only.")


def _miniature(count: str, split: str) -> CaptionDataset:
    from finelip_sdxl.miniature.dataset import MiniatureScenes  # which is built on this package

    if not count:
        count = str(MINIATURE_SCENES["train" if split == "train" else "test"])
    if not count.isdecimal() or int(count) < 1:
        raise ValueError(f"miniature:{count} gives no number of scenes: expected such as miniature:500.")
    return MiniatureScenes(split, int(count))


# One reader for each layout: (path, split, images) to records.


def _sharegpt4v(path: Path, split: str, images: Path | None) -> Iterator[Record]:
    _check_split("sharegpt4v", split, ("train", "test"))
    entries = _read_json(path, list)
    folder = _folder(images or path.parent)
    for number in range(len(entries))[SHAREGPT4V_TEST:] if split == "train" else range(len(entries))[:SHAREGPT4V_TEST]:
        with _parsing(f"Entry {number + 1} of {path}"):
            answers = [turn["value"] for turn in entries[number]["conversations"] if turn["from"] == "gpt"]
            yield _file(folder, entries[number]["image"]), answers[:1]


def _docci(path: Path, split: str, images: Path | None) -> Iterator[Record]:
    _check_split("docci", split, ("train", "test", "qual_dev", "qual_test"))
    folder = _folder(images or path / "images")
    for place, entry in _read_json_lines(path / "docci_descriptions.jsonlines"):
        with _parsing(place):
            if entry["split"] == split:
                yield _file(folder, entry["image_file"]), [entry["description"]]


def _urban1k(path: Path, split: str, images: Path | None) -> Iterator[Record]:
    _check_split("urban1k", split, ("test",))
    folder = _folder(images or path / "image")
    files = _by_stem(folder.glob("[!.]*"))
    captions = _by_stem(_folder(path / "caption").glob("[!.]*.txt"))
    if lonely := sorted(files.keys() ^ captions.keys()):
        raise FileNotFoundError(
            f"{lonely[0]} has no {'image' if lonely[0] in captions else 'caption'} in {path}: "
            "each needs image/STEM.jpg and caption/STEM.txt."
        )
    for stem in sorted(files):
        yield files[stem], [line for _, line in lines_of(read_text(captions[stem]))][:1]  # what Long-CLIP reads of it


def _coco(path: Path, split: str, images: Path | None) -> Iterator[Record]:
    _check_split("coco", split, ("train", "test", "val"))
    year = "train2017" if split == "train" else "val2017"
    file = path / "annotations" / f"captions_{year}.json"
    content = _read_json(file, dict)
    folder = _folder(images or path / year)
    captions: dict[Any, list[Any]] = {}
    for place, image in _entries(content, "images", file):
        with _parsing(place):
            if image["id"] in captions:
                raise ValueError(f"{place} has the id of an earlier one, {image['id']}.")
            captions[image["id"]] = []
    for place, annotation in _entries(content, "annotations", file):
        with _parsing(place):
            if annotation["image_id"] not in captions:
                raise ValueError(f"{place} is of image {annotation['image_id']}, which is not among the images.")
            captions[annotation["image_id"]].append(annotation["caption"])
    for place, image in _entries(content, "images", file):
        with _parsing(place):
            yield _file(folder, image["file_name"]), captions[image["id"]][:CAPTIONS_PER_IMAGE]


def _flickr30k(path: Path, split: str, images: Path | None) -> Iterator[Record]:
    folder = images or _first(path, "flickr30k-images", "flickr30k_images", "images", "Images")
    file = _first(path, "dataset_flickr30k.json", "results_20130124.token", "captions.txt")
    if file.suffix == ".json":
        _check_split("flickr30k", split, ("train", "val", "test"))
        for place, image in _entries(_read_json(file, dict), "images", file):
            with _parsing(place):
                if image["split"] == split:
                    captions = [sentence["raw"] for sentence in image["sentences"]]
                    yield _file(_folder(folder), image["filename"]), captions
    else:
        _check_split(f"{file.name} of flickr30k", split, ("test",))
        rows = _read_token(file) if file.suffix == ".token" else _read_csv(file)
        yield from _gather(_folder(folder), rows)


def _csv(path: Path, split: str, images: Path | None) -> Iterator[Record]:
    return _gather(_folder(images or path.parent), _read_csv(path))


def _jsonl(path: Path, split: str, images: Path | None) -> Iterator[Record]:
    return _gather(_folder(images or path.parent), _read_jsonl(path))


def _txt(path: Path, split: str, images: Path | None) -> Iterator[Record]:
    if images is not None:
        raise ValueError(f"{path} holds texts only: there is no folder of images to give.")
    lines = lines_of(read_text(path))
    if not lines:
        raise ValueError(f"{path} holds no text: write a caption in each line.")
    for number, line in lines:
        yield Path(f"{path}, line {number}"), [line]


_READERS: dict[str, Callable[[Path, str, Path | None], Iterator[Record]]] = {
    "sharegpt4v": _sharegpt4v,
    "docci": _docci,
    "urban1k": _urban1k,
    "coco": _coco,
    "flickr30k": _flickr30k,
    "csv": _csv,
    "jsonl": _jsonl,
    "txt": _txt,
}


# What the readers share.

Row = tuple[str, Any, Any]  # a place, and there an image and a caption


def _gather(folder: Path, rows: Iterable[Row]) -> Iterator[Record]:
    """Groups rows by image, with all of its captions."""
    captions: dict[Path, list[Any]] = {}
    for place, image, caption in rows:
        with _parsing(place):
            captions.setdefault(_file(folder, image), []).append(caption)
    yield from captions.items()


def _read_csv(path: Path) -> Iterator[Row]:
    rows = _csv_rows(path)
    _, columns = next(rows, (1, []))
    image = next((name for name in ("image", "image_name") if name in columns), None)
    caption = next((name for name in ("caption", "comment") if name in columns), None)
    if image is None or caption is None:
        raise ValueError(f"{path} has the columns {', '.join(columns) or 'of none'}: it needs image and caption.")
    for name in (image, caption):
        if columns.count(name) > 1:
            raise ValueError(f"{path} has the column {name} {columns.count(name)} times: it needs it once.")
    for line, fields in rows:
        row = dict(zip(columns, fields, strict=False))
        if len(fields) > len(columns) or not row.get(image) or not row.get(caption):
            raise ValueError(
                f"Line {line} of {path} does not hold an image and a caption as its header says: "
                "quote captions that have commas."
            )
        yield f"Line {line} of {path}", row[image], row[caption]


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yields the rows that are not empty, and the line where each begins."""
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise ValueError(
                f"The row that begins in line {line} of {path} cannot be read ({error}): close each quote, and write "
                "one within a quoted caption twice."
            ) from error
        if fields is None:
            return
        if fields:
            yield line, fields


def _read_jsonl(path: Path) -> Iterator[Row]:
    for place, entry in _read_json_lines(path):
        with _parsing(place):
            yield place, entry["image"], entry["caption"]


def _read_token(path: Path) -> Iterator[Row]:
    for number, line in lines_of(read_text(path)):
        image, _, caption = line.partition("\t")
        if not caption.strip() or "#" not in image:
            raise ValueError(f"Line {number} of {path} is not IMAGE#NUMBER, a tab and a caption.")
        yield f"Line {number} of {path}", image.rpartition("#")[0], caption


def _read_json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields the place and the content of each line."""
    for number, line in lines_of(read_text(path)):
        place = f"Line {number} of {path}"
        yield place, _parse_json(line, place)


def _read_json(path: Path, kind: type) -> Any:
    content = _parse_json(read_text(path), str(path))
    if not isinstance(content, kind):
        raise ValueError(f"{path} holds a {type(content).__name__}, where a {kind.__name__} was expected.")
    return content


def _parse_json(text: str, place: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:  # what nests too deep, and numbers of thousands of digits
        raise ValueError(f"{place} is not JSON ({error}).") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        name = next(name for number, (name, _) in enumerate(pairs) if name in dict(pairs[:number]))
        raise ValueError(f"an object has {name!r} twice")
    return content


def _entries(content: dict[str, Any], name: str, file: Path) -> Iterator[tuple[str, Any]]:
    """Yields the place and the content of each entry of a list in a JSON file."""
    with _parsing(str(file)):
        entries = content[name]
        if not isinstance(entries, list):
            raise TypeError(f"{name} is {reprlib.repr(entries)}, where a list was expected")
    return ((f"Entry {number} of {name} in {file}", entry) for number, entry in enumerate(entries, 1))


def _file(folder: Path, image: Any) -> Path:
    """Returns the path of an entry's image."""
    if not isinstance(image, str) or not image.strip():
        raise TypeError(f"its image is {reprlib.repr(image)}, where a path was expected")
    if fault := half_character(image):
        raise TypeError(f"its image {fault}")
    return folder / image


def _by_stem(files: Iterable[Path]) -> dict[str, Path]:
    named: dict[str, Path] = {}
    for file in files:
        if (other := named.setdefault(file.stem, file)) is not file:
            raise ValueError(f"{other} and {file} have one name, so that their caption is of both: leave one.")
    return named


def _check_captions(captions: Sequence[Any], path: Path, name: str) -> None:
    faults = [fault for caption in captions or () if (fault := caption_fault(caption))]
    if not captions or "is empty" in faults:
        raise ValueError(f"{name} has no caption, or an empty one, for {path}: add it or leave the image out.")
    if faults:
        raise ValueError(f"The caption of {path} in {name} {faults[0]}: mend it or leave the image out.")


def _folder(path: Path) -> Path:
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist, or is no folder.")
    return path


def _first(path: Path, *names: str) -> Path:
    """Returns the first of some names that a folder has."""
    for name in names:
        if (_folder(path) / name).exists():
            return path / name
    raise FileNotFoundError(f"{path} has none of {', '.join(names)}.")


def _check_split(kind: str, split: str, known: Sequence[str]) -> None:
    if split not in known:
        raise ValueError(f"{kind} has no split {split}: give {' or '.join(known)}.")


@contextmanager
def _parsing(place: str) -> Iterator[None]:
    """Names the place of an entry that lacks something."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{place} lacks {error}.") from error
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{place} has not the layout of its data set ({error}).") from error
