"""Data sets of images with captions: their layouts on the disk, preprocessing, and batches for training."""

import io
import json
import os
import pickle
import random
import re
import sys
import tarfile
from pathlib import Path
from typing import Any

import huggingface_hub.errors
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import CLIPImageProcessorPil

from finelip_sdxl.data import (
    CaptionAugmentation,
    CaptionDataset,
    ImageTextDataset,
    ResumableBatchSampler,
    TrainingShards,
    UnreadableImageError,
    collate,
    formats,
    load_image_processor,
    load_tokenizer,
    open_dataset,
    tokenize,
)
from finelip_sdxl.data.file_dataset import FileDataset
from finelip_sdxl.miniature.dataset import MiniatureScenes
from finelip_sdxl.miniature.drawing import draw_batch
from finelip_sdxl.names import DATA_FILES, DATA_FOLDERS
from finelip_sdxl.texts import lines_of

# Layouts, each built as its authors publish it; image k is a plain picture of gray level k.


def write_image(file: Path, level: int = 0) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (level, level, level)).save(file)


def write_json(file: Path, content: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))
    return file


def write_lines(file: Path, *lines: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(line + "\n" for line in lines))
    return file


def sharegpt4v(folder: Path) -> str:
    entries = [
        {
            "id": f"{k}",
            "image": f"coco/train2017/{k}.png",
            "conversations": [
                {"from": "human", "value": "What is this?\n<image>"},
                {"from": "gpt", "value": f"Caption {k}.\nIt is gray."},
                {"from": "gpt", "value": "Another turn."},
            ],
        }
        for k in range(1_003)
    ]
    write_image(folder / "coco/train2017/1.png", 1)
    write_image(folder / "coco/train2017/1001.png", 1)
    return f"sharegpt4v:{write_json(folder / 'captions.json', entries)}"


def docci(folder: Path) -> str:
    lines = [
        {"example_id": f"{split}_{k}", "split": split, "image_file": f"{split}_{k}.png", "description": f"{split} {k}."}
        for split in ("train", "test", "qual_dev")
        for k in range(2)
    ]
    for line in lines:
        write_image(folder / "images" / line["image_file"], int(line["image_file"][-5]))
    write_lines(folder / "docci_descriptions.jsonlines", *map(json.dumps, lines))
    return f"docci:{folder}"


def urban1k(folder: Path) -> str:
    for k in range(3):
        write_image(folder / "image" / f"{k}.png", k)
        write_lines(folder / "caption" / f"{k}.txt", f"Urban {k}.")
    write_lines(folder / "image" / ".hidden")
    return f"urban1k:{folder}"


def coco(folder: Path) -> str:
    for year in ("train2017", "val2017"):
        write_json(
            folder / "annotations" / f"captions_{year}.json",
            {
                "images": [{"id": 70 - k, "file_name": f"{k}.png"} for k in range(2)],
                "annotations": [{"image_id": 70 - n % 2, "caption": f"{year} {n}"} for n in range(12)],
            },
        )
        for k in range(2):
            write_image(folder / year / f"{k}.png", k)
    return f"coco:{folder}"


def flickr30k(folder: Path) -> str:
    pictures = [
        {"filename": f"{k}.png", "split": split, "sentences": [{"raw": f"{split} {k} {n}"} for n in range(5)]}
        for k, split in enumerate(["train", "train", "val", "test"])
    ]
    write_json(folder / "dataset_flickr30k.json", {"images": pictures, "dataset": "flickr30k"})
    for k in range(4):
        write_image(folder / "flickr30k-images" / f"{k}.png", k)
    return f"flickr30k:{folder}"


def flickr30k_token(folder: Path) -> str:
    write_lines(
        folder / "results_20130124.token", *(f"{k}.png#{n}\tPicture {k}, {n} ." for k in range(2) for n in range(5))
    )
    for k in range(2):
        write_image(folder / "flickr30k_images" / f"{k}.png", k)
    return f"flickr30k:{folder}"


def flickr30k_csv(folder: Path) -> str:
    rows = (f'{k}.png,{n},"Picture {k}, {n} ."' for k in range(2) for n in range(5))
    write_lines(folder / "captions.txt", "image_name,comment_number,comment", *rows)
    for k in range(2):
        write_image(folder / "Images" / f"{k}.png", k)
    return f"flickr30k:{folder}"


def csv_file(folder: Path, count: int = 2) -> str:
    rows = (f'"A quiet, gray {k}. It is number {k}.",images/{k}.png' for k in range(count))
    for k in range(count):
        write_image(folder / "images" / f"{k}.png", k)
    return f"csv:{write_lines(folder / 'pairs.csv', 'caption,image', *rows, 'Gray.,images/1.png')}"


def jsonl_file(folder: Path) -> str:
    lines = [{"image": "0.png", "caption": "Naught."}, {"image": "1.png", "caption": "One."}]
    for k in range(2):
        write_image(folder / f"{k}.png", k)
    return f"jsonl:{write_lines(folder / 'pairs.jsonl', *map(json.dumps, lines), '')}"


def picture_folder(folder: Path) -> str:
    for k, name in enumerate(("10_fox/a", "b.c", "d")):
        write_image(folder / f"{name}.{('png', 'JPG', 'webp')[k]}", k)
        write_lines(folder / f"{name}.txt", f"Own {k}, [of] (two", "lines).")
    for hidden in ("._a.png", ".cache/e.png"):
        write_image(folder / hidden)
    write_lines(folder / "sample_prompts.txt", "of another program")
    return f"folder:{folder}"


@pytest.mark.parametrize(
    ("build", "split", "size", "captions"),
    [
        (sharegpt4v, "test", 1_000, ("Caption 1. It is gray.",)),
        (sharegpt4v, "train", 3, ("Caption 1001. It is gray.",)),
        (docci, "test", 2, ("test 1.",)),
        (docci, "qual_dev", 2, ("qual_dev 1.",)),
        (urban1k, "test", 3, ("Urban 1.",)),
        (coco, "test", 2, tuple(f"val2017 {n}" for n in (1, 3, 5, 7, 9))),
        (coco, "train", 2, tuple(f"train2017 {n}" for n in (1, 3, 5, 7, 9))),
        (flickr30k, "train", 2, tuple(f"train 1 {n}" for n in range(5))),
        (flickr30k_token, "test", 2, tuple(f"Picture 1, {n} ." for n in range(5))),
        (flickr30k_csv, "test", 2, tuple(f"Picture 1, {n} ." for n in range(5))),
        (csv_file, "train", 2, ("A quiet, gray 1. It is number 1.", "Gray.")),
        (jsonl_file, "test", 2, ("One.",)),
        (picture_folder, "test", 3, ("Own 1, [of] (two lines).",)),
        (picture_folder, "train", 3, ("Own 1, [of] (two lines).",)),
    ],
)
def test_a_published_layout_is_read(build, split, size, captions, tmp_path) -> None:
    data = open_dataset(build(tmp_path), split)
    assert len(data) == size
    assert data.captions(1) == captions
    assert (data.image(1).mode, data.image(1).getpixel((0, 0))) == ("RGB", (1, 1, 1))


def test_a_text_file_holds_a_caption_a_line_and_no_images(tmp_path) -> None:
    file = write_lines(tmp_path / "captions.txt", "A fox  sleeps. It is night.", "", "  ", "A hare runs.")
    data = open_dataset(f"txt:{file}", "train")
    assert [data.captions(index) for index in range(len(data))] == [("A fox sleeps. It is night.",), ("A hare runs.",)]
    assert data.short_caption(0) == "A fox sleeps."
    with pytest.raises(UnreadableImageError, match=r"captions\.txt, line 4, has no image: the file holds texts only"):
        data.image(1)
    with pytest.raises(ValueError, match="holds texts only: pass no folder of images with it"):
        open_dataset(f"txt:{file}", images=tmp_path)


def test_images_may_be_elsewhere(tmp_path) -> None:
    spec = sharegpt4v(tmp_path / "captions")
    (tmp_path / "captions" / "coco").rename(tmp_path / "coco")
    assert open_dataset(spec, images=tmp_path).image(1).size == (8, 8)
    with pytest.raises(UnreadableImageError, match=r"coco/train2017/1\.png cannot be read \(No such file or directory"):
        open_dataset(spec).image(1)


def test_the_miniature_has_its_usual_sizes_or_any_other() -> None:
    sizes = [len(open_dataset(*spec)) for spec in (("miniature",), ("miniature", "train"), ("miniature:7", "train"))]
    assert sizes == [500, 24_000, 7]


def test_each_kind_of_data_has_a_reader() -> None:
    assert {*DATA_FILES, *DATA_FOLDERS} == formats._READERS.keys()


@pytest.mark.parametrize(
    ("spec", "split", "message"),
    [
        ("imagenet:X", "test", "imagenet:X is no data set: pass miniature, or one of sharegpt4v"),
        ("docci", "test", "docci names no path: pass docci:PATH"),
        ("miniature:none", "test", "miniature:none names no number of scenes"),
        ("miniature:0", "test", "miniature:0 names no number"),
        ("webdataset:X", "test", "webdataset:X is a stream for training only"),
        ("urban1k:{}", "train", "urban1k has no split train: pass test"),
        ("docci:{}", "dev", "docci has no split dev: pass train or test or qual_dev or qual_test"),
    ],
)
def test_a_spec_that_cannot_be_opened_is_refused(spec, split, message, tmp_path) -> None:
    with pytest.raises(ValueError, match=message):
        open_dataset(spec.format(tmp_path), split)


def test_a_split_that_the_annotations_do_not_have_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"captions\.txt of flickr30k has no split train: pass test"):
        open_dataset(flickr30k_csv(tmp_path), "train")


@pytest.mark.parametrize(
    ("build", "lost", "message"),
    [
        (docci, "images", "images does not exist, or is no folder"),
        (docci, "docci_descriptions.jsonlines", r"docci_descriptions\.jsonlines does not exist, or is no file"),
        (urban1k, "caption/1.txt", r"1 has no caption in .*: each needs image/STEM\.jpg and caption/STEM\.txt"),
        (urban1k, "image/1.png", "1 has no image in"),
        (coco, "val2017", "val2017 does not exist"),
        (flickr30k, "dataset_flickr30k.json", r"has none of dataset_flickr30k\.json, results_20130124\.token"),
        (flickr30k, "flickr30k-images", "has none of flickr30k-images, flickr30k_images, images, Images"),
        (csv_file, "pairs.csv", r"pairs\.csv does not exist"),
        (picture_folder, "b.c.txt", r"b\.c\.JPG has no caption: write .*b\.c\.txt, or leave the picture out"),
    ],
)
def test_what_is_missing_is_named(build, lost, message, tmp_path) -> None:
    spec = build(tmp_path)
    (tmp_path / lost).rename(tmp_path / "lost")
    with pytest.raises(FileNotFoundError, match=message):
        open_dataset(spec)


@pytest.mark.parametrize(
    ("spec", "content", "message"),
    [
        ("jsonl:x", '{"image": "a", "caption": "b"}\n\n{"image"', r"Line 3 of .*x is not JSON"),
        ("jsonl:x", '{"image": "a", "caption": "b"}\n{"image": "a"}', r"Line 2 of .*x lacks 'caption'"),
        ("jsonl:x", '["a", "b"]', r"Line 1 of .*x does not have the layout"),
        ("jsonl:x", '{"image": "a", "caption": " "}', r"jsonl:.* has no caption, or an empty one, for .*a: add it"),
        ("jsonl:x", '{"image": "a", "caption": 3}', r"The caption of .*a in jsonl:.*x is 3, where text was expected"),
        ("jsonl:x", "", "has no images in this split"),
        ("jsonl:x", b"\xff\xfe", "x is not UTF-8 text"),
        ("txt:x", "\n \n", "x holds no text: write a caption in each line"),
        ("txt:x", b"\xff\xfe", "x is not UTF-8 text"),
        ("csv:x", "file,caption\na,b\n", "x has the columns file, caption; expected image and caption"),
        ("csv:x", "", "x has no columns; expected image and caption"),
        ("csv:x", "image,caption\na,b\na,b, c\n", "Line 3 of .*x does not hold .*: put captions with commas in quotes"),
        ("csv:x", "image,caption\na\n", "Line 2 of .*x does not hold an image and a caption"),
        ("sharegpt4v:x", "[{}", "x is not JSON"),
        ("sharegpt4v:x", "{}", "x holds a dict, where a list was expected"),
        ("sharegpt4v:x", '[{"image": "a"}]', r"Entry 1 of .*x lacks 'conversations'"),
        ("sharegpt4v:x", '[{"image": "a", "conversations": []}]', "has no caption, or an empty one, for"),
    ],
)
def test_malformed_content_is_refused_with_its_place(spec, content, message, tmp_path) -> None:
    (tmp_path / "x").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        open_dataset(f"{spec[:-1]}{tmp_path / 'x'}")


IMAGES_OF_COCO = '{"images": [{"id": 1, "file_name": "a"}, {"id": 2, "file_name": %s}], "annotations": %s}'
# How each layout gives an image and a caption as JSON, and what names the place.
ENTRIES = {
    "sharegpt4v": ('[{{"image": {}, "conversations": [{{"from": "gpt", "value": {}}}]}}]', "Entry 1 of"),
    "docci": ('{{"split": "test", "image_file": {}, "description": {}}}', "Line 1 of"),
    "coco": (
        '{{"images": [{{"id": 1, "file_name": {}}}], "annotations": [{{"image_id": 1, "caption": {}}}]}}',
        "Entry 1 of images in",
    ),
    "flickr30k": (
        '{{"images": [{{"split": "test", "filename": {}, "sentences": [{{"raw": {}}}]}}]}}',
        "Entry 1 of images in",
    ),
    "jsonl": ('{{"image": {}, "caption": {}}}', "Line 1 of"),
}


def with_entry(kind: str, folder: Path, image: str, caption: str) -> tuple[str, str]:
    """The spec of a data set of one entry, and a pattern that names its place."""
    files = {
        "sharegpt4v": "x.json",
        "docci": "docci_descriptions.jsonlines",
        "coco": "annotations/captions_val2017.json",
        "flickr30k": "dataset_flickr30k.json",
        "jsonl": "x.jsonl",
    }
    for name in ("images", "val2017"):
        (folder / name).mkdir()
    layout, place = ENTRIES[kind]
    file = write_lines(folder / files[kind], layout.format(image, caption))
    spec = file if kind in ("sharegpt4v", "jsonl") else folder
    return f"{kind}:{spec}", f"^{place} {file}"


@pytest.mark.parametrize("kind", ENTRIES)
@pytest.mark.parametrize(
    ("image", "fault"),
    [
        ("3", "its image is 3, where a path was expected"),
        ("null", "its image is None, where"),
        ("NaN", "its image is nan, where"),
        ('["a.jpg"]', r"its image is \['a\.jpg'\], where"),
        ('{"a": 1}', "its image is {'a': 1}, where"),
        ('""', "its image is '', where"),
        ("true", "its image is True, where"),
        (r'"\ud800.jpg"', r"its image holds \\ud800, which is half of a character"),
    ],
)
def test_an_image_that_is_no_path_is_refused_with_its_place(kind, image, fault, tmp_path) -> None:
    spec, place = with_entry(kind, tmp_path, image, '"A."')
    with pytest.raises(ValueError, match=rf"{place} does not have the layout of its data set \({fault}[^\n]*\)\.$"):
        open_dataset(spec)


@pytest.mark.parametrize("kind", ENTRIES)
@pytest.mark.parametrize(
    ("caption", "fault"),
    [
        ("3", r"The caption of .*a\.jpg in {} is 3, where text was expected"),
        ("null", r"The caption of .*a\.jpg in {} is None, where text"),
        ('["A.", "B."]', r"The caption of .*a\.jpg in {} is \['A\.', 'B\.'\], where text"),
        (r'"A \ud83d fox."', r"The caption of .*a\.jpg in {} holds \\ud83d, which is half of a character"),
        (
            '"' + "a " * 50_001 + '"',
            r"The caption of .*a\.jpg in {} has 100,002 characters, where at most 100,000 were",
        ),
        ('" \\n"', "{} has no caption, or an empty one, for .*a\\.jpg: add it"),
    ],
)
def test_a_caption_that_is_none_is_refused_by_name(kind, caption, fault, tmp_path) -> None:
    spec, _ = with_entry(kind, tmp_path, '"a.jpg"', caption)
    with pytest.raises(ValueError, match=f"^{fault.format(spec)}[^\n]*$"):
        open_dataset(spec)


@pytest.mark.parametrize("kind", ENTRIES)
@pytest.mark.parametrize(
    ("image", "fault"),
    [
        ("[" * 100_000, "recursion"),
        ("[" * 100_000 + "]" * 100_000, "recursion"),
        ("9" * 5_000, "digits"),
        ('"a.jpg", "extra": {"b": 1, "c": 2, "b": 3}', "an object has 'b' twice"),
        ('"a.jpg", "split": "train", "split": "test"', "an object has 'split' twice"),
        ('"a', "delimiter"),
    ],
)
def test_json_that_cannot_be_read_is_refused_with_its_file(kind, image, fault, tmp_path) -> None:
    spec, _ = with_entry(kind, tmp_path, image, '"A."')
    with pytest.raises(ValueError, match=rf"{tmp_path}[^\n]* is not JSON \([^\n]*({fault})[^\n]*\)\.$"):
        open_dataset(spec)


@pytest.mark.parametrize(
    ("image", "annotations", "message"),
    [
        (
            '"b"',
            '[{"image_id": 1, "caption": "A."}, {"image_id": 7, "caption": "B."}]',
            "is of image 7, which is not am",
        ),
        ('"b"', '[{"image_id": [], "caption": "A."}]', "Entry 1 of annotations in .* does not have the layout"),
        ('"b"', '[{"caption": "A."}]', "Entry 1 of annotations in .* lacks 'image_id'"),
        ('"b"', "[3]", "Entry 1 of annotations in .* does not have the layout"),
        ('"b"', "null", "annotations is None, where a list was expected"),
        ('"b"}, {"id": 1, "file_name": "c"', "[]", "Entry 3 of images in .* has the id of an earlier one, 1"),
    ],
)
def test_annotations_that_fit_no_image_are_refused_with_their_place(image, annotations, message, tmp_path) -> None:
    (tmp_path / "val2017").mkdir()
    write_lines(tmp_path / "annotations" / "captions_val2017.json", IMAGES_OF_COCO % (image, annotations))
    with pytest.raises(ValueError, match=message):
        open_dataset(f"coco:{tmp_path}")


def test_a_malformed_line_of_a_token_file_is_refused(tmp_path) -> None:
    spec = flickr30k_token(tmp_path)
    write_lines(tmp_path / "results_20130124.token", "0.png#0\tA cat.", "no tab")
    with pytest.raises(ValueError, match=r"Line 2 of .* is faulty; expected IMAGE#NUMBER, a tab and a caption"):
        open_dataset(spec)


# Text files

# Breaks for `str.splitlines`, but no line ends.
NO_LINE_ENDS = ["\u2028", "\u2029", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_captions_are_split_at_line_ends_alone(end, mark, tmp_path) -> None:
    caption = "A fox." + "".join(f"{character}It sleeps." for character in NO_LINE_ENDS)
    expected = ("A fox." + " It sleeps." * len(NO_LINE_ENDS),)

    def write(name: str, *lines: str) -> Path:
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes((mark + end.join([*lines, "", ""])).encode())
        return file

    for name in ("image/a.png", "Images/a.png"):
        write_image(tmp_path / name)
    write("caption/a.txt", caption, "Not read, as in Long-CLIP.")
    entry = json.dumps({"image": "a.png", "caption": caption}, ensure_ascii=False)
    texts = open_dataset(f"txt:{write('x.txt', caption, '', 'A hare.')}")
    read = [
        *(texts.captions(index) for index in range(len(texts))),
        open_dataset(f"urban1k:{tmp_path}").captions(0),
        open_dataset(f"jsonl:{write('x.jsonl', entry)}").captions(0),
        open_dataset(f"csv:{write('x.csv', 'image,caption', f'a.png,{caption}')}").captions(0),
    ]
    for name, lines in {
        "results_20130124.token": [f"a.png#0\t{caption}"],
        "captions.txt": ["image,caption", f'a.png,"{caption}"'],
    }.items():
        file = write(name, *lines)
        read.append(open_dataset(f"flickr30k:{tmp_path}").captions(0))
        file.unlink()
    read.remove(("A hare.",))
    assert read == [expected] * 6


def test_prompts_are_split_at_line_ends_alone() -> None:
    prompts = "".join(f"Prompt{character}{number}.\n\n" for number, character in enumerate(NO_LINE_ENDS))
    assert [text for _, text in lines_of(prompts)] == [f"Prompt{c}{n}." for n, c in enumerate(NO_LINE_ENDS)]
    assert [number for number, _ in lines_of(prompts)] == [2 * n + 1 for n in range(len(NO_LINE_ENDS))]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "txt", "sharegpt4v"])
@pytest.mark.parametrize(
    ("content", "place"),
    [
        ("A fox.\nA hare.\nCaf\xe9.".encode("latin-1"), "in line 3, "),
        ("A fox.\r\nCaf\xe9".encode("utf-16"), "in line 1, invalid start byte"),
        ("A fox.\rA hare.".encode("utf-16-le"), "line 1 holds a NUL, as in UTF-16"),
        ("A fox.\nA hare.".encode("utf-16-be"), "line 1 holds a NUL, as in UTF-16"),
        (b"A fox.\rA hare.\r\0", "line 3 holds a NUL"),
    ],
)
def test_text_that_is_not_utf_8_is_refused_with_its_line(kind, content, place, tmp_path) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{tmp_path}/x is not UTF-8 text \({place}[^\n]*\): save it as UTF-8\.$"):
        open_dataset(f"{kind}:{tmp_path / 'x'}")


def test_text_that_is_in_no_regular_file_is_refused_at_once(tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for file in (tmp_path / "pipe", tmp_path, "/dev/zero"):
        for kind in ("csv", "jsonl", "txt", "sharegpt4v"):
            with pytest.raises(FileNotFoundError, match="does not exist, or is no file"):
                open_dataset(f"{kind}:{file}")


def test_two_images_of_one_name_are_not_made_one(tmp_path) -> None:
    spec = urban1k(tmp_path)
    write_image(tmp_path / "image" / "1.bmp")
    with pytest.raises(ValueError, match=r"1\.(png|bmp) and .*1\.(png|bmp) share one name"):
        open_dataset(spec)


def csv_rows(folder: Path, rows: str) -> str:
    (folder / "x.csv").write_text(rows, newline="")
    return f"csv:{folder / 'x.csv'}"


def test_a_csv_may_quote_captions_of_several_lines(tmp_path) -> None:
    rows = 'image,caption\r\na.png,"A ""red"" fox,\r\nasleep."\r\n\r\nb.png,A 5" hare.\r\n'
    data = open_dataset(csv_rows(tmp_path, rows))
    assert [data.captions(index) for index in range(len(data))] == [('A "red" fox, asleep.',), ('A 5" hare.',)]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            'a,"A fox.\nb,A hare.\nc,A deer.\n',
            "The row that begins in line 3 of .* cannot be read .*: close each quote",
        ),
        ('a,"A fox.\nb,"A hare."\nc,A deer.\n', "begins in line 3 of .*close each quote"),
        ('a,"A fox." he said\n', "begins in line 3 of .*close each quote"),
        ('a,"A fox.\n' + "b,A hare.\n" * 20_000, "begins in line 3 of .*field larger than field limit"),
        (f"a,{'x' * 131_073}\n", "begins in line 3 of .*field larger than field limit"),
        (f"a,{'x' * 100_001}\n", "The caption of .*a in csv:.* has 100,001 characters, where at most 100,000 were"),
        ("b\n", "Line 3 of .* does not hold an image and a caption"),
        ("b,\n", "Line 3 of .* does not hold an image and a caption"),
        (",b\n", "Line 3 of .* does not hold an image and a caption"),
        ("b,A,fox.\n", "Line 3 of .* does not hold an image and a caption"),
        ('"b\n\nc",A fox.,asleep\n', "Line 3 of .* does not hold an image and a caption"),
        ("  ,A fox.\n", "Line 3 of .*its image is '  ', where a path was expected"),
        ("b,  \n", "has no caption, or an empty one, for .*b: add it"),
    ],
)
def test_a_row_of_a_csv_that_cannot_be_read_is_refused_with_its_line(rows, message, tmp_path) -> None:
    with pytest.raises(ValueError, match=f"^[^\n]*{message}[^\n]*$"):
        open_dataset(csv_rows(tmp_path, f"image,caption\nz,A zebra.\n{rows}"))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("image,caption,caption", "has the column caption 2 times; expected it once"),
        ("image;caption", "has the columns image;caption; expected image and caption"),
        ('image,"caption', "The row that begins in line 1 of .* cannot be read"),
        ("caption", "has the columns caption; expected image and caption"),
    ],
)
def test_a_header_of_a_csv_that_does_not_do_is_refused(header, message, tmp_path) -> None:
    with pytest.raises(ValueError, match=message):
        open_dataset(csv_rows(tmp_path, f"{header}\na,A fox.,B.\n"))


# Missing images


def test_missing_images_are_left_out_and_counted_if_that_is_asked_for(tmp_path) -> None:
    spec = sharegpt4v(tmp_path)
    data = open_dataset(spec, "train", skip_missing=True)
    assert [data.captions(index) for index in range(len(data))] == [("Caption 1001. It is gray.",)]
    first = tmp_path / "coco" / "train2017" / "1000.png"
    assert data.left_out == f"2 of 3 images of {spec} are not there and are left out; first {first}."
    assert ImageTextDataset(data, PROCESSOR)[0]["skipped"] == ()
    assert (len(open_dataset(spec, "train")), open_dataset(spec, "train").left_out) == (3, "")
    assert len(open_dataset(spec, "test", skip_missing=True)) == 1, "the same 1,000 entries are held out"


def test_where_all_images_are_missing_that_is_said(tmp_path) -> None:
    spec = sharegpt4v(tmp_path)
    (tmp_path / "no").mkdir()
    with pytest.raises(FileNotFoundError, match=r"None of the 3 images of .* is there; the first would be .*/no/coco/"):
        open_dataset(spec, "train", images=tmp_path / "no", skip_missing=True)


def test_of_data_without_files_nothing_is_missing(tmp_path) -> None:
    file = write_lines(tmp_path / "x.txt", "A fox.")
    for spec in (f"txt:{file}", "miniature:1"):
        data = open_dataset(spec, skip_missing=True)
        assert (len(data), data.left_out) == (1, "")


def test_a_photograph_is_turned_upright(tmp_path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.new("L", (8, 4)).save(tmp_path / "a.jpg", exif=exif)
    image = FileDataset([(tmp_path / "a.jpg", ["A."])]).image(0)
    assert (image.size, image.mode) == ((4, 8), "RGB")


@pytest.mark.parametrize("captions", [None, [], [""], ["A.", " "]])
def test_records_without_a_caption_are_refused(captions) -> None:
    with pytest.raises(ValueError, match=r"^The data set has no caption, or an empty one, for a\.jpg: add it"):
        FileDataset([(Path("a.jpg"), captions)])


def test_captions_are_packed_so_that_workers_need_no_copy() -> None:
    data = FileDataset((Path(f"{k}.jpg"), [f"Naïve {k}."]) for k in range(100))
    assert data.captions(99) == ("Naïve 99.",)
    assert len(pickle.dumps(data)) < 6_000
    with pytest.raises(IndexError, match="Image 100 was asked for, but there are 100"):
        data.captions(100)


# Preprocessing


@pytest.mark.parametrize(("source", "padding"), [("miniature-clip-1", "<|endoftext|>"), ("miniature-finelip-2", "!")])
def test_the_miniature_has_tokenizers_of_248_positions(source, padding) -> None:
    tokenizer = load_tokenizer(source)
    assert (tokenizer.pad_token, tokenizer.model_max_length) == (padding, 248)


def test_a_tokenizer_in_a_directory_takes_the_positions_of_the_model(tmp_path) -> None:
    load_tokenizer("miniature-clip-2", positions=77).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.pad_token, tokenizer.model_max_length) == ("!", 248)
    assert tokenize(tokenizer, ["a red star " * 200]).shape == (1, 248)


def test_without_a_tokenizer_one_is_asked_for(tmp_path) -> None:
    file = write_lines(tmp_path / "finelip.pt")
    with pytest.raises(
        FileNotFoundError, match=r"finelip\.pt is a checkpoint file, which holds no tokenizer: pass a tok"
    ):
        load_tokenizer(file)
    with pytest.raises(FileNotFoundError, match=r"holds no vocab\.json or tokenizer\.json: pass a tokenizer's"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("load", [load_tokenizer, lambda source: load_image_processor(source, 224)])
def test_a_source_that_is_nowhere_is_one_sentence(load, monkeypatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"^/nowhere/at/all does not exist: pass a directory or a hub id\.$"):
        load("/nowhere/at/all")

    def unreachable(*args: Any, **kwargs: Any) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("many\nlines")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(OSError, match=r"^nobody/nothing is no path here, and the hub cannot be reached[^\n]*\.$"):
        load("nobody/nothing")


def test_texts_are_padded_to_the_longest_and_cut_with_their_end() -> None:
    tokenizer = load_tokenizer("miniature-clip-2", positions=6)
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    red = tokenizer("red").input_ids[1]
    ids = tokenize(tokenizer, ["red", "red red", "red " * 9]).tolist()
    assert ids == [[start, red, end, 0, 0, 0], [start, red, red, end, 0, 0], [start, red, red, red, red, end]]
    assert tokenize(tokenizer, ["red " * 9], max_length=4).tolist() == [[start, red, red, end]]


def test_prefix_padding_shifts_a_text_and_never_cuts_it() -> None:
    tokenizer = load_tokenizer("miniature-clip-1", positions=6)
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    red = tokenizer("red").input_ids[1]
    ids = tokenize(tokenizer, ["red", "red red", "red " * 9], prefix=[2, 9, 9]).tolist()
    assert ids == [[start, 0, 0, red, end, end], [start, 0, 0, red, red, end], [start, red, red, red, red, end]]


def test_the_miniature_s_pixel_values_are_those_it_was_trained_on() -> None:
    scenes = MiniatureScenes("test", size=2)
    processor = load_image_processor("miniature-finelip-1", image_size=96)
    values = processor([scenes.image(k) for k in range(2)], return_tensors="pt").pixel_values
    halves = torch.nn.functional.avg_pool2d(draw_batch([scenes.scene(k) for k in range(2)]), 2)
    # Rounded to whole levels, 2 / 255 apart, three times: as drawn, and after each direction of the resizing.
    torch.testing.assert_close(values, halves, rtol=0, atol=3 / 255)


def test_an_image_processor_is_the_source_s_own_or_clip_s(tmp_path) -> None:
    image = Image.new("RGB", (40, 30))
    own = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    default = load_image_processor(tmp_path, image_size=32)
    assert default(image, return_tensors="pt").pixel_values.shape == (1, 3, 32, 32)
    assert default.image_mean == pytest.approx([0.48145466, 0.4578275, 0.40821073])
    own.save_pretrained(tmp_path)
    assert load_image_processor(tmp_path, image_size=32)(image, return_tensors="pt").pixel_values.shape[-1] == 16


def edit_json(file: Path, *keys: str, **values: Any) -> None:
    """Change values in a JSON file, of the object that the keys lead to."""
    content = json.loads(file.read_text())
    place = content
    for key in keys:
        place = place[key]
    place.update(values)
    write_json(file, content)


def in_two_files(folder: Path, merges: str | None = None) -> None:
    """A tokenizer as older programs save it; with these merges instead of its own."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    write_json(folder / "vocab.json", model["vocab"])
    own = "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in model["merges"])
    (folder / "merges.txt").write_text(own if merges is None else merges)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda folder: in_two_files(folder, "#version: 0.2\n"), id="no merges"),
        pytest.param(lambda folder: in_two_files(folder, ""), id="empty merges.txt"),
        pytest.param(lambda folder: in_two_files(folder, "#version: 0.2\ni n\n"), id="cut merges.txt"),
        pytest.param(lambda folder: edit_json(folder / "tokenizer.json", "model", merges=[]), id="none in the JSON"),
        pytest.param(lambda folder: edit_json(folder / "tokenizer.json", "model", vocab={}, merges=[]), id="no words"),
    ],
)
def test_a_tokenizer_that_would_spell_letters_is_refused(damage, tmp_path) -> None:
    load_tokenizer("miniature-clip-1").save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=rf"^{tmp_path} knows no words, since its tokenizer\.json, or its vocab\.json"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_of_two_files_is_read(tmp_path) -> None:
    own = load_tokenizer("miniature-clip-1")
    own.save_pretrained(tmp_path)
    in_two_files(tmp_path)
    assert load_tokenizer(tmp_path)("a red star").input_ids == own("a red star").input_ids


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", "null"])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_broken_tokenizer_is_refused_by_name(name, content, tmp_path) -> None:
    load_tokenizer("miniature-clip-1").save_pretrained(tmp_path)
    (tmp_path / name).write_text(content)
    if (name, content) == ("tokenizer_config.json", "{}"):
        assert len(load_tokenizer(tmp_path)) == 860, "nothing in it is needed"
        return
    with pytest.raises(ValueError, match=rf"^The tokenizer of {tmp_path} cannot be read \([^\n]+\): fetch it again\.$"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", "null", "3", "[" * 100_000),
        *({"size": size} for size in (0, -5, 10**9, "a", [1], {"shortest_edge": -1}, {"a": 1})),
        *({"crop_size": size} for size in (10**6, {"height": -1, "width": 3}, {"height": 8, "width": 16})),
        *({"image_mean": mean} for mean in ("x", [1], [0.5] * 4, [float("nan")] * 3)),
        *({"image_std": std} for std in (None, [0, 0, 0])),
        *({"resample": 99}, {"rescale_factor": None}, {"do_center_crop": False}, {"preprocess": 3}),
    ],
    ids=lambda content: str(content)[:30],
)
def test_a_broken_image_processor_is_refused_by_name(content, tmp_path) -> None:
    load_image_processor(tmp_path, 32).save_pretrained(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(content) if isinstance(content, str) else edit_json(file, **content)
    with pytest.raises(ValueError, match=rf"^{tmp_path}'s preprocessor_config\.json cannot be read \([^\n]+\): fetch"):
        load_image_processor(tmp_path, 32)


# Augmentation

CAPTION = "A summary. One star. Two moons. Three rings."


def test_augmentation_is_off_by_default() -> None:
    augmentation = CaptionAugmentation()
    assert {augmentation(CAPTION, random.Random(k)) for k in range(20)} == {CAPTION}
    assert {augmentation.padding(random.Random(k)) for k in range(20)} == {0}


def test_dropping_the_first_sentence_leaves_the_others() -> None:
    augmentation = CaptionAugmentation(drop_first=0.5)
    left = {augmentation(CAPTION, random.Random(k)) for k in range(20)}
    assert left == {CAPTION, "One star. Two moons. Three rings."}
    assert {augmentation("All there is.", random.Random(k)) for k in range(20)} == {"All there is."}


def test_sampled_sentences_keep_their_order_and_are_never_none() -> None:
    augmentation = CaptionAugmentation(sample_sentences=1.0)
    left = {augmentation("A. B. C.", random.Random(k)) for k in range(100)}
    assert left == {"A.", "B.", "C.", "A. B.", "A. C.", "B. C.", "A. B. C."}


def test_prefix_padding_is_drawn_up_to_its_limit() -> None:
    assert {CaptionAugmentation(prefix_padding=3).padding(random.Random(k)) for k in range(50)} == {0, 1, 2, 3}


@pytest.mark.parametrize("values", [{"drop_first": 1.5}, {"sample_sentences": -0.1}, {"prefix_padding": -1}])
def test_augmentation_out_of_range_is_refused(values) -> None:
    ((name, value),) = values.items()
    with pytest.raises(ValueError, match=f"{name} is {value}: expected"):
        CaptionAugmentation(**values)


# Training

PROCESSOR = load_image_processor("miniature-clip-1", image_size=96)
AUGMENTATION = CaptionAugmentation(drop_first=0.5, sample_sentences=0.5, prefix_padding=20)


def equal(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether two batches are, bit for bit."""
    first, second = ({**batch, **batch["regions"], "regions": None} for batch in (first, second))
    same = (torch.equal(a, b) if isinstance(a := first[key], torch.Tensor) else a == b for key, b in second.items())
    return first.keys() == second.keys() and all(same)


def load(data: CaptionDataset, epoch: int = 0, first_batch: int = 0, workers: int = 0) -> list[dict[str, Any]]:
    pairs = ImageTextDataset(data, PROCESSOR, AUGMENTATION, seed=1)
    batches = ResumableBatchSampler(len(data), data.group_size, batch_size=5, seed=1)
    pairs.set_epoch(epoch)
    batches.set_epoch(epoch, first_batch)
    collate_fn = collate(load_tokenizer("miniature-clip-1"))
    return list(DataLoader(pairs, batch_sampler=batches, collate_fn=collate_fn, num_workers=workers))


def test_a_batch_holds_images_texts_and_short_texts() -> None:
    scenes = MiniatureScenes("test", size=5)
    batch = load(scenes)[0]
    assert batch["pixel_values"].shape == (5, 3, 96, 96)
    assert sorted(batch["ids"].tolist()) == list(range(5))
    tokenizer = load_tokenizer("miniature-clip-1")
    for row, mask, index in zip(batch["short_input_ids"], batch["short_mask"], batch["ids"], strict=True):
        assert row[mask].tolist() == tokenizer(scenes.short_caption(int(index))).input_ids
    assert batch["skipped"] == ()


def test_regions_follow_their_phrases_through_augmentation() -> None:
    scenes = MiniatureScenes("test", size=5)
    tokenizer = load_tokenizer("miniature-clip-1")
    batch = load(scenes)[0]
    regions = batch["regions"]
    assert len(regions["row"]) > 5
    assert batch["input_ids"][:, 1].eq(0).any()  # prefix padding
    for row, token, box in zip(regions["row"], regions["token"], regions["box"], strict=True):
        index = int(batch["ids"][row])
        there = [region for region in scenes.regions(index) if region.box == pytest.approx(box.tolist())]
        word = tokenizer.decode(batch["input_ids"][row, token])
        assert any(scenes.captions(index)[0][: region.end].lower().endswith(word) for region in there)


def test_short_texts_are_cut_at_77(tmp_path) -> None:
    write_image(tmp_path / "a.png")
    data = FileDataset([(tmp_path / "a.png", ["a red star " * 90])])
    batch = collate(load_tokenizer("miniature-clip-1"))([ImageTextDataset(data, PROCESSOR)[0]])
    assert batch["short_input_ids"].shape == batch["short_mask"].shape == (1, 77)
    assert batch["input_ids"].shape == (1, 248)
    assert batch["short_mask"].all()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_epoch_sees_what_a_whole_one_sees(workers) -> None:
    scenes = MiniatureScenes("test", size=20)
    whole = load(scenes, epoch=3)
    resumed = load(scenes, epoch=3, first_batch=2, workers=workers)
    assert (len(whole), len(resumed)) == (4, 2)
    assert all(equal(a, b) for a, b in zip(whole[2:], resumed, strict=True))


def test_each_epoch_has_its_own_order_and_augmentation() -> None:
    scenes = MiniatureScenes("test", size=20)
    pairs = ImageTextDataset(scenes, PROCESSOR, AUGMENTATION)
    first = [(pairs[k]["caption"], pairs[k]["prefix"]) for k in range(10)]
    pairs.set_epoch(1)
    assert first != [(pairs[k]["caption"], pairs[k]["prefix"]) for k in range(10)]
    batches = ResumableBatchSampler(20, 1, batch_size=5, seed=0)
    order = list(batches)
    batches.set_epoch(1)
    assert order != list(batches)


def test_one_of_several_captions_is_chosen(tmp_path) -> None:
    pairs = ImageTextDataset(open_dataset(coco(tmp_path)), PROCESSOR)
    seen = set()
    for epoch in range(30):
        pairs.set_epoch(epoch)
        seen.add(pairs[1]["caption"])
    assert seen == set(pairs.data.captions(1))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_replaced_by_the_next_counted_and_named(workers, tmp_path) -> None:
    data = open_dataset(csv_file(tmp_path, count=10))
    content = (tmp_path / "images" / "4.png").read_bytes()
    (tmp_path / "images" / "4.png").write_bytes(content[: len(content) // 2])
    (tmp_path / "images" / "9.png").unlink()
    batches = load(data, workers=workers)
    ids = torch.cat([batch["ids"] for batch in batches]).tolist()
    assert sorted(ids) == [0, 0, 1, 2, 3, 5, 5, 6, 7, 8]
    skipped = sorted(message for batch in batches for message in batch["skipped"])
    assert [Path(message.split()[0]).name for message in skipped] == ["4.png", "9.png"]


def test_when_nothing_can_be_read_training_stops(tmp_path) -> None:
    data = FileDataset((tmp_path / f"{k}.jpg", ["A."]) for k in range(150))
    with pytest.raises(UnreadableImageError, match=r"100 images in a row cannot be read.* The first: .*/7\.jpg cannot"):
        ImageTextDataset(data, PROCESSOR)[7]


def test_batches_of_all_processes_part_one_order_of_whole_groups() -> None:
    parts = [ResumableBatchSampler(47, 5, batch_size=10, seed=0, processes=2, process=k) for k in range(2)]
    both = [list(part) for part in parts]
    assert [len(part) for part in parts] == [len(batches) for batches in both] == [2, 2]
    alone = [index for batch in ResumableBatchSampler(47, 5, batch_size=20, seed=0) for index in batch]
    assert alone == [index for pair in zip(*both, strict=True) for batch in pair for index in batch]
    assert len(set(alone)) == 40
    groups = [alone[start : start + 5] for start in range(0, 40, 5)]
    assert all(group == list(range(group[0], group[0] + 5)) and group[0] % 5 == 0 for group in groups)
    assert max(alone) < 45


@pytest.mark.parametrize(
    ("size", "batch_size", "message"),
    [
        (50, 12, "The batch size is 12: expected a multiple of 5"),
        (14, 15, "has 14 images, which do not fill one batch"),
    ],
)
def test_batches_that_cannot_be_are_refused(size, batch_size, message) -> None:
    with pytest.raises(ValueError, match=message):
        ResumableBatchSampler(size, 5, batch_size, seed=0)


# Shards


def encode(level: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (level, level, level)).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture
def shards(tmp_path) -> str:
    """Four shards of ten samples; sample 13 is broken, 14 has no caption."""
    for shard in range(4):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for k in range(10 * shard, 10 * shard + 10):
                caption = {"txt": f"Gray {k}.".encode()} if k % 2 else {"json": json.dumps({"caption": f"Gray {k}."})}
                content = {"jpg": encode(k), **caption} | ({"jpg": encode(k)[:90]} if k == 13 else {})
                if k == 14:
                    content["json"] = "{}"
                for suffix, data in content.items():
                    data = data.encode() if isinstance(data, str) else data
                    entry = tarfile.TarInfo(f"{k:03}.{suffix}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
    return f"webdataset:{tmp_path}/{{0..3}}.tar"


def load_shards(
    pattern: str, epoch: int = 0, first_batch: int = 0, workers: int = 0, **kwargs: Any
) -> list[dict[str, Any]]:
    data = TrainingShards(pattern, PROCESSOR, 5, 40, AUGMENTATION, seed=1, **kwargs)
    data.set_epoch(epoch, first_batch)
    tokenizer = load_tokenizer("miniature-clip-1")
    loader = DataLoader(data, batch_size=None, collate_fn=collate(tokenizer), num_workers=workers)
    assert len(loader) == len(data)
    return list(loader)


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_give_whole_epochs_and_name_what_they_skip(shards, workers) -> None:
    batches = load_shards(shards, workers=workers)
    assert len(batches) == 8
    assert all(batch["pixel_values"].shape == (5, 3, 96, 96) for batch in batches)
    assert len({index for batch in batches for index in batch["ids"].tolist()}) == 38
    skipped = sorted({message for batch in batches for message in batch["skipped"]})
    assert [message.split()[0] for message in skipped] == ["013", "014"]


def write_shard(folder: Path, files: dict[str, bytes | str]) -> str:
    with tarfile.open(folder / "x.tar", "w") as tar:
        for name, content in files.items():
            content = content.encode() if isinstance(content, str) else content
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return f"webdataset:{folder}/x.tar"


def read_shard(folder: Path, files: dict[str, bytes | str]) -> tuple[set[str], set[str]]:
    """Captions of an epoch of a shard, and messages of what it skips."""
    shards = TrainingShards(write_shard(folder, files), PROCESSOR, batch_size=20, epoch_size=20)
    items = [item for batch in shards for item in batch]
    return {item["caption"] for item in items}, {message for item in items for message in item["skipped"]}


@pytest.mark.parametrize("names", [["2020.01.a", "2020.01.b"], ["a", "a.v2"], ["1.5x", "1.5y"], ["d.e/a.b", "d.e/a.c"]])
def test_samples_may_have_dots_in_their_names(names, tmp_path) -> None:
    files: dict[str, bytes | str] = {}
    for name in names:
        files |= {f"{name}.JPG": encode(1), f"{name}.mask.png": encode(2), f"{name}.txt": f"It is {name}."}
    assert read_shard(tmp_path, files) == ({f"It is {name}." for name in names}, set())


def test_of_samples_with_dots_what_lacks_something_is_named_by_its_name(tmp_path) -> None:
    files = {"a.1.jpg": encode(1), "a.1.txt": "One.", "a.2.jpg": encode(2), "a.3.txt": "Three.", "b.cls": "7"}
    captions, skipped = read_shard(tmp_path, files)
    assert captions == {"One."}
    place = f"in {tmp_path}/x.tar"
    assert skipped == {
        f"a.2 {place} has no caption (it lacks a txt or json).",
        f"a.3 {place} has no jpg, png or webp.",
        f"b {place} has no jpg, png or webp.",
    }


def test_a_name_in_a_shard_may_be_no_text(tmp_path) -> None:
    files = {"caf\udce9.jpg": encode(1), "caf\udce9.txt": "A cup.", "t\udce9.jpg": encode(1), "t\udce9.txt": ""}
    captions, (message,) = read_shard(tmp_path, files)
    assert captions == {"A cup."}
    assert message == rf"The caption of t\udce9 in {tmp_path}/x.tar is empty."


@pytest.mark.parametrize(
    ("suffix", "content", "fault"),
    [
        ("txt", b"Caf\xe9.", r"a in .* has no caption \(its txt is not UTF-8 text: invalid continuation byte\)\."),
        ("json", b'{"caption": "Caf\xe9."}', r"a in .* has no caption \(its json is not UTF-8 text: invalid con.*\)\."),
        ("json", '{"caption": ["A.", "B."]}', r"The caption of a in .* is \['A\.', 'B\.'\], where text was expected\."),
        ("json", '{"caption": null}', r"The caption of a in .* is None, where text was expected\."),
        ("json", '{"caption": 3}', r"The caption of a in .* is 3, where text was expected\."),
        ("json", r'{"caption": "\ud800"}', r"The caption of a in .* holds \\ud800, which is half of a character\."),
        ("json", '{"text": "A."}', r"a in .* has no caption \(its json lacks a caption\)\."),
        ("json", '["A."]', r"a in .* has no caption \(its json lacks a caption\)\."),
        ("json", '{"caption"', r"a in .* has no caption \(its json is not JSON: .*\)\."),
        ("json", "[" * 100_000, r"a in .* has no caption \(.*recursion.*\)\."),
        ("json", "9" * 5_000, r"a in .* has no caption \(its json is not JSON: .*digits.*\)\."),
        ("txt", " \n", r"The caption of a in .* is empty\."),
        (
            "txt",
            "a " * 50_001,
            r"The caption of a in .* has 100,002 characters, where at most 100,000 were expected\.",
        ),
    ],
)
def test_what_is_wrong_with_a_caption_of_a_shard_is_said(suffix, content, fault, tmp_path) -> None:
    files = {"a.jpg": encode(1), f"a.{suffix}": content, "b.jpg": encode(2), "b.txt": b"\xef\xbb\xbfA fox."}
    captions, skipped = read_shard(tmp_path, files)
    assert captions == {"A fox."}, "without the byte order mark"
    (message,) = skipped
    assert re.fullmatch(fault, message)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker")
@pytest.mark.parametrize("workers", [0, 2, 3])
def test_shards_resume_where_they_were(shards, workers) -> None:
    whole, resumed = load_shards(shards, 2, workers=workers), load_shards(shards, 2, first_batch=3, workers=workers)
    assert len(resumed) == 5
    assert all(equal(a, b) for a, b in zip(whole[3:], resumed, strict=True))
    assert not equal(whole[0], load_shards(shards, 1)[0])


def test_processes_read_shards_of_their_own(shards) -> None:
    parts = [load_shards(shards, workers=2, processes=2, process=k) for k in range(2)]
    ids = [{index for batch in part for index in batch["ids"].tolist()} for part in parts]
    assert [len(part) for part in parts] == [4, 4]
    assert not ids[0] & ids[1]


def test_a_shard_that_breaks_off_is_left_with_a_warning(shards, tmp_path) -> None:
    content = (tmp_path / "2.tar").read_bytes()
    (tmp_path / "2.tar").write_bytes(content[:5000])
    with pytest.warns(UserWarning, match=r"2\.tar"):
        assert len(load_shards(shards)) == 8


def test_shards_that_cannot_be_read_are_refused(shards, tmp_path, monkeypatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"4\.tar, number 5 of 6 shards, does not exist"):
        load_shards(f"{tmp_path}/{{0..5}}.tar")
    with pytest.raises(ValueError, match="4 shards are too few for 5 processes of 1 workers"):
        load_shards(shards, processes=5)
    with pytest.raises(ValueError, match="An epoch of 40 pairs does not fill one batch of 45"):
        load_shards(shards, processes=9)
    with tarfile.open(tmp_path / "9.tar", "w"):
        pass
    with pytest.raises(ValueError, match=r"There are no samples in .*9\.tar"):
        load_shards(f"{tmp_path}/9.tar")
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(ImportError, match="pip install webdataset"):
        load_shards(shards)
