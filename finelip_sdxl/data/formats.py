"""The data sets of long captions as their authors publish them, each read from its own layout on the disk."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .captioned_images import CaptionedImages, UnreadableImageError, read_image

SHAREGPT4V_TEST = 1_000  # leading entries that Long-CLIP and FineLIP hold out
CAPTIONS_PER_IMAGE = 5  # COCO has a few images with more, of which retrieval papers read the first five
MINIATURE_SCENES = {"train": 24_000, "test": 500}

Record = tuple[Path, list[str]]  # an image's file and its captions


def open_images(spec: str, split: str = "test", images: str | Path | None = None) -> CaptionedImages:
    """Open a data set of images with captions.

    | spec | what is read |
    |---|---|
    | `miniature`, `miniature:COUNT` | scenes of the miniature world, drawn when asked for |
    | `sharegpt4v:FILE` | its JSON; the first 1,000 entries are the test split, the others train |
    | `docci:FOLDER` | `docci_descriptions.jsonlines`, `images/`; splits train, test, qual_dev, qual_test |
    | `urban1k:FOLDER` | `image/`, `caption/`; all of it is the test split |
    | `coco:FOLDER` | `annotations/captions_val2017.json`, `val2017/`; `train2017` for train |
    | `flickr30k:FOLDER` | Karpathy's `dataset_flickr30k.json` (splits train, val, test); or else \
`results_20130124.token` or `captions.txt`, all of which is the test split, as in Long-CLIP; `flickr30k-images/`, \
`flickr30k_images/`, `images/` or `Images/` |
    | `csv:FILE`, `jsonl:FILE` | columns or keys `image` and `caption`, a row for each caption; the file is the split |
    | `txt:FILE` | a caption in each line that is not empty, and no images; the file is the split |

    Files are not read before their images are asked for.

    Args:
        spec: see above.
        split: "train", "test", or another that the data set has.
        images: folder that image paths are relative to, where it is not the published one; for `sharegpt4v`, `csv` and
            `jsonl`, that is the folder of the file.

    Raises:
        FileNotFoundError: if a file or folder is missing.
        ValueError: if the spec or the split is unknown, or the content is not as it should be (the message says where).

    Example:
        >>> scenes = open_images("miniature:10")
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
    layout = CaptionLines if kind == "txt" else CaptionedFiles
    return layout(_READERS[kind](Path(path), split, None if images is None else Path(images)), name=spec)


class CaptionedFiles(CaptionedImages):
    """Images in files, whose paths and captions are in memory.

    Args:
        records: the path of each image and its captions.
        name: of the data set, for messages.

    Raises:
        ValueError: if there is no image, or one has no caption.

    Example:
        >>> CaptionedFiles([(Path("fox.jpg"), ["A fox\\nsleeps.", "It is night."])]).captions(0)
        ('A fox sleeps.', 'It is night.')
    """

    def __init__(self, records: Iterable[Record], name: str = "The data set") -> None:
        # One buffer instead of millions of strings: those, merely by being counted, would be copied into each worker.
        buffer, ends = bytearray(), [0]
        for path, captions in records:
            if not captions or not all(isinstance(caption, str) and caption.strip() for caption in captions):
                raise ValueError(f"{name} has no caption, or an empty one, for {path}: add it or leave the image out.")
            captions = [" ".join(caption.split()) for caption in captions]
            buffer += json.dumps([str(path), *captions]).encode()
            ends.append(len(buffer))
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
        return json.loads(self._buffer[self._ends[index] : self._ends[index + 1]])


class CaptionLines(CaptionedFiles):
    """Captions without images, for what learns from texts alone; a record names a line in place of an image's file.

    Example:
        >>> CaptionLines([(Path("captions.txt, line 3"), ["A fox sleeps."])]).captions(0)
        ('A fox sleeps.',)
    """

    def image(self, index: int) -> Image.Image:
        raise UnreadableImageError(f"{self._record(index)[0]}, has no image: the file holds texts only.")


def _miniature(count: str, split: str) -> CaptionedImages:
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
            yield folder / entries[number]["image"], answers[:1]


def _docci(path: Path, split: str, images: Path | None) -> Iterator[Record]:
    _check_split("docci", split, ("train", "test", "qual_dev", "qual_test"))
    folder = _folder(images or path / "images")
    for place, entry in _read_json_lines(path / "docci_descriptions.jsonlines"):
        with _parsing(place):
            if entry["split"] == split:
                yield folder / entry["image_file"], [entry["description"]]


def _urban1k(path: Path, split: str, images: Path | None) -> Iterator[Record]:
    _check_split("urban1k", split, ("test",))
    folder = _folder(images or path / "image")
    files = {file.stem: file for file in folder.glob("[!.]*")}
    captions = {file.stem: file for file in _folder(path / "caption").glob("[!.]*.txt")}
    if lonely := sorted(files.keys() ^ captions.keys()):
        raise FileNotFoundError(
            f"{lonely[0]} has no {'image' if lonely[0] in captions else 'caption'} in {path}: "
            "each needs image/STEM.jpg and caption/STEM.txt."
        )
    for stem in sorted(files):
        yield files[stem], _read_text(captions[stem]).strip().splitlines()[:1]  # what Long-CLIP reads of it


def _coco(path: Path, split: str, images: Path | None) -> Iterator[Record]:
    _check_split("coco", split, ("train", "test", "val"))
    year = "train2017" if split == "train" else "val2017"
    file = path / "annotations" / f"captions_{year}.json"
    content = _read_json(file, dict)
    folder = _folder(images or path / year)
    with _parsing(str(file)):
        captions: dict[int, list[str]] = {image["id"]: [] for image in content["images"]}
        for annotation in content["annotations"]:
            captions[annotation["image_id"]].append(annotation["caption"])
        for image in content["images"]:
            yield folder / image["file_name"], captions[image["id"]][:CAPTIONS_PER_IMAGE]


def _flickr30k(path: Path, split: str, images: Path | None) -> Iterator[Record]:
    folder = images or _first(path, "flickr30k-images", "flickr30k_images", "images", "Images")
    file = _first(path, "dataset_flickr30k.json", "results_20130124.token", "captions.txt")
    if file.suffix == ".json":
        _check_split("flickr30k", split, ("train", "val", "test"))
        with _parsing(str(file)):
            for image in _read_json(file, dict)["images"]:
                if image["split"] == split:
                    yield _folder(folder) / image["filename"], [sentence["raw"] for sentence in image["sentences"]]
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
    lines = [(number, line) for number, line in enumerate(_read_text(path).splitlines(), 1) if line.strip()]
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


def _gather(folder: Path, rows: Iterable[tuple[str, str]]) -> Iterator[Record]:
    """Rows of an image and a caption to images with all of their captions."""
    captions: dict[str, list[str]] = {}
    for image, caption in rows:
        captions.setdefault(image, []).append(caption)
    for image, its in captions.items():
        yield folder / image, its


def _read_csv(path: Path) -> Iterator[tuple[str, str]]:
    reader = csv.DictReader(io.StringIO(_read_text(path), newline=""))
    columns = reader.fieldnames or []
    image = next((name for name in ("image", "image_name") if name in columns), None)
    caption = next((name for name in ("caption", "comment") if name in columns), None)
    if image is None or caption is None:
        raise ValueError(f"{path} has the columns {', '.join(columns) or 'of none'}: it needs image and caption.")
    for row in reader:
        if None in row or not row[image] or not row[caption]:
            raise ValueError(
                f"Line {reader.line_num} of {path} does not hold an image and a caption as its header says: "
                "quote captions that have commas."
            )
        yield row[image], row[caption]


def _read_jsonl(path: Path) -> Iterator[tuple[str, str]]:
    for place, entry in _read_json_lines(path):
        with _parsing(place):
            yield entry["image"], entry["caption"]


def _read_token(path: Path) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(_read_text(path).splitlines(), 1):
        image, _, caption = line.partition("\t")
        if not caption.strip() or "#" not in image:
            raise ValueError(f"Line {number} of {path} is not IMAGE#NUMBER, a tab and a caption.")
        yield image.rpartition("#")[0], caption


def _read_json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """The place and the content of each line."""
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if line.strip():
            try:
                yield f"Line {number} of {path}", json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"Line {number} of {path} is not JSON ({error}).") from error


def _read_json(path: Path, kind: type) -> Any:
    try:
        content = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}).") from error
    if not isinstance(content, kind):
        raise ValueError(f"{path} holds a {type(content).__name__}, where a {kind.__name__} was expected.")
    return content


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist, or is no file.")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}).") from error


def _folder(path: Path) -> Path:
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist, or is no folder.")
    return path


def _first(path: Path, *names: str) -> Path:
    """The first of some names that a folder has."""
    for name in names:
        if (_folder(path) / name).exists():
            return path / name
    raise FileNotFoundError(f"{path} has none of {', '.join(names)}.")


def _check_split(kind: str, split: str, known: Sequence[str]) -> None:
    if split not in known:
        raise ValueError(f"{kind} has no split {split}: give {' or '.join(known)}.")


@contextmanager
def _parsing(place: str) -> Iterator[None]:
    """Says where an entry is that lacks something."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{place} lacks {error}.") from error
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{place} has not the layout of its data set ({error}).") from error
