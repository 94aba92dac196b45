"""Data sets of long captions as their authors publish them, each with its own layout on the disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from finelip_sdxl.names import data_place
from finelip_sdxl.texts import lines_of, read_text

from .caption_dataset import CaptionDataset
from .file_dataset import FileDataset, LineDataset, Record
from .records import (
    by_stem,
    entries_of,
    existing_folder,
    first_of,
    group_by_image,
    image_file,
    layout_errors,
    read_csv,
    read_json,
    read_json_lines,
    read_jsonl,
    read_token,
)

SHAREGPT4V_TEST = 1_000  # leading entries that Long-CLIP and FineLIP hold out
CAPTIONS_PER_IMAGE = 5  # a few images of COCO have more captions; retrieval papers use the first five
MINIATURE_SCENES = {"train": 24_000, "test": 500}
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff")  # ends of names, in a folder


def open_dataset(
    spec: str,
    split: str = "test",
    images: str | Path | None = None,
    skip_missing: bool = False,
    whole_captions: bool = False,
) -> CaptionDataset:
    """Opens a data set of images with captions.

    | spec | content |
    |---|---|
    | `miniature`, `miniature:COUNT` | scenes of the miniature world, drawn on demand |
    | `sharegpt4v:FILE` | its JSON; the first 1,000 entries are the test split, the others train |
    | `docci:FOLDER` | `docci_descriptions.jsonlines`, `images/`; splits train, test, qual_dev, qual_test |
    | `urban1k:FOLDER` | `image/`, `caption/` (the first line of each file, as in Long-CLIP); all is the test split |
    | `coco:FOLDER` | `annotations/captions_val2017.json`, `val2017/`; `train2017` for train |
    | `flickr30k:FOLDER` | Karpathy's `dataset_flickr30k.json` (splits train, val, test); or else \
`results_20130124.token` or `captions.txt`, all of which is the test split, as in Long-CLIP; `flickr30k-images/`, \
`flickr30k_images/`, `images/` or `Images/` |
    | `folder:FOLDER` | pictures, in the folder or in folders within, and beside each a `.txt` file of its name, which \
is its caption, all lines of it; the folder is the split |
    | `csv:FILE`, `jsonl:FILE` | columns or keys `image` and `caption`, a row for each caption; the file is the split |
    | `txt:FILE` | a caption in each line that is not empty, and no images; the file is the split |

    Image files are opened on demand. Lines end at a line feed, a carriage return or both. A caption has at most 100,000
    characters.

    Args:
        spec: `KIND:PATH`, see above.
        split: "train", "test", or another split of the data set.
        images: the folder of the image paths, if it is not the published one; for `sharegpt4v`, `csv` and `jsonl` that
            is the folder of the file.
        skip_missing: leave out images with missing files, for example ShareGPT4V's images that other sites publish.
            Every file is looked for. `left_out` of the result counts the missing ones.
        whole_captions: take all lines of Urban1k's files for a caption, as FineLIP's pictures were drawn.

    Raises:
        FileNotFoundError: a file or folder is missing, or with `skip_missing` all images are.
        ValueError: the spec or the split is unknown, or an entry is faulty (the message names its place).

    Examples:
        >>> scenes = open_dataset("miniature:10")
        >>> len(scenes), scenes.image(3).size
        (10, (192, 192))
    """
    kind, path = data_place(spec, images)
    if kind == "miniature":
        return _miniature(path, split)
    reader = (_WHOLE_CAPTION_READERS if whole_captions else {}).get(kind, _READERS[kind])
    records = reader(Path(path), split, None if images is None else Path(images))
    return LineDataset(records, spec) if kind == "txt" else FileDataset(records, spec, skip_missing)


def _miniature(count: str, split: str) -> CaptionDataset:
    from finelip_sdxl.miniature.dataset import MiniatureScenes  # here, since that module imports this package

    return MiniatureScenes(split, int(count or MINIATURE_SCENES["train" if split == "train" else "test"]))


# One function for each layout, from path, split and folder of images to records


def _sharegpt4v(path: Path, split: str, images: Path | None) -> Iterator[Record]:
    _check_split("sharegpt4v", split, ("train", "test"))
    entries = read_json(path, list)
    folder = existing_folder(images or path.parent)
    for number in range(len(entries))[SHAREGPT4V_TEST:] if split == "train" else range(len(entries))[:SHAREGPT4V_TEST]:
        with layout_errors(f"Entry {number + 1} of {path}"):
            answers = [turn["value"] for turn in entries[number]["conversations"] if turn["from"] == "gpt"]
            yield image_file(folder, entries[number]["image"]), answers[:1]


def _docci(path: Path, split: str, images: Path | None) -> Iterator[Record]:
    _check_split("docci", split, ("train", "test", "qual_dev", "qual_test"))
    folder = existing_folder(images or path / "images")
    for place, entry in read_json_lines(path / "docci_descriptions.jsonlines"):
        with layout_errors(place):
            if entry["split"] == split:
                yield image_file(folder, entry["image_file"]), [entry["description"]]


def _urban1k(path: Path, split: str, images: Path | None, lines: int | None = 1) -> Iterator[Record]:
    _check_split("urban1k", split, ("test",))
    folder = existing_folder(images or path / "image")
    files = by_stem(folder.glob("[!.]*"))
    captions = by_stem(existing_folder(path / "caption").glob("[!.]*.txt"))
    if lonely := sorted(files.keys() ^ captions.keys()):
        raise FileNotFoundError(
            f"{lonely[0]} has no {'image' if lonely[0] in captions else 'caption'} in {path}: "
            "each needs image/STEM.jpg and caption/STEM.txt."
        )
    for stem in sorted(files):
        text = [line for _, line in lines_of(read_text(captions[stem]))][:lines]  # the first alone, as in Long-CLIP
        yield files[stem], ["\n".join(text)]


def _coco(path: Path, split: str, images: Path | None) -> Iterator[Record]:
    _check_split("coco", split, ("train", "test", "val"))
    year = "train2017" if split == "train" else "val2017"
    file = path / "annotations" / f"captions_{year}.json"
    content = read_json(file, dict)
    folder = existing_folder(images or path / year)
    captions: dict[Any, list[Any]] = {}
    for place, image in entries_of(content, "images", file):
        with layout_errors(place):
            if image["id"] in captions:
                raise ValueError(f"{place} has the id of an earlier one, {image['id']}.")
            captions[image["id"]] = []
    for place, annotation in entries_of(content, "annotations", file):
        with layout_errors(place):
            if annotation["image_id"] not in captions:
                raise ValueError(f"{place} is of image {annotation['image_id']}, which is not among the images.")
            captions[annotation["image_id"]].append(annotation["caption"])
    for place, image in entries_of(content, "images", file):
        with layout_errors(place):
            yield image_file(folder, image["file_name"]), captions[image["id"]][:CAPTIONS_PER_IMAGE]


def _flickr30k(path: Path, split: str, images: Path | None) -> Iterator[Record]:
    folder = images or first_of(path, "flickr30k-images", "flickr30k_images", "images", "Images")
    file = first_of(path, "dataset_flickr30k.json", "results_20130124.token", "captions.txt")
    if file.suffix == ".json":
        _check_split("flickr30k", split, ("train", "val", "test"))
        for place, image in entries_of(read_json(file, dict), "images", file):
            with layout_errors(place):
                if image["split"] == split:
                    captions = [sentence["raw"] for sentence in image["sentences"]]
                    yield image_file(existing_folder(folder), image["filename"]), captions
    else:
        _check_split(f"{file.name} of flickr30k", split, ("test",))
        rows = read_token(file) if file.suffix == ".token" else read_csv(file)
        yield from group_by_image(existing_folder(folder), rows)


def _csv(path: Path, split: str, images: Path | None) -> Iterator[Record]:
    return group_by_image(existing_folder(images or path.parent), read_csv(path))


def _jsonl(path: Path, split: str, images: Path | None) -> Iterator[Record]:
    return group_by_image(existing_folder(images or path.parent), read_jsonl(path))


def _folder(path: Path, split: str, images: Path | None) -> Iterator[Record]:
    pictures: dict[Path, Path] = {}  # by their captions
    for file in sorted(path.rglob("*")):
        is_hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        if file.suffix.lower() in PICTURES and not is_hidden:
            other = pictures.setdefault(file.with_suffix(".txt"), file)
            if other is not file:
                raise ValueError(f"{other} and {file} share one name, and so one caption: leave only one of them.")
    if not pictures:
        raise FileNotFoundError(f"{path} has no pictures ({', '.join(PICTURES)}): pass a folder that has.")
    for caption, picture in pictures.items():
        if not caption.is_file():
            raise FileNotFoundError(f"{picture} has no caption: write {caption}, or leave the picture out.")
        yield picture, [read_text(caption)]


def _txt(path: Path, split: str, images: Path | None) -> Iterator[Record]:
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
    "folder": _folder,
    "txt": _txt,
}
_WHOLE_CAPTION_READERS = {"urban1k": partial(_urban1k, lines=None)}


def _check_split(kind: str, split: str, known: Sequence[str]) -> None:
    if split not in known:
        raise ValueError(f"{kind} has no split {split}: pass {' or '.join(known)}.")
