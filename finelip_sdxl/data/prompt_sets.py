"""Sets of prompts to draw: captions of data sets with images, and published benchmarks of prompts alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finelip_sdxl.names import data_place
from finelip_sdxl.texts import lines_of, read_text

from .caption_dataset import CaptionDataset, UnreadableImageError, caption_fault
from .formats import open_dataset
from .records import existing_folder, layout_errors, read_json, read_json_lines


@dataclass(frozen=True)
class Prompt:
    """A prompt, and its place in its benchmark.

    Attributes:
        text: the whole text, on one line.
        name: the benchmark's name of the prompt, or else its number.
        group: folders of the prompt's pictures in the benchmark; for TIIF-Bench `("action+2d", "long_description")`.
    """

    text: str
    name: str
    group: tuple[str, ...] = ()


@dataclass(frozen=True)
class PromptSet:
    """Prompts in a fixed order.

    Attributes:
        spec: the `KIND:PATH` that was opened.
        prompts: at least one.
        images: the data set whose image `n` belongs to prompt `n`; None without images.
    """

    spec: str
    prompts: Sequence[Prompt]
    images: CaptionDataset | None = None

    def first(self, count: int | None) -> PromptSet:
        """The first prompts, at most `count`; None for all."""
        return PromptSet(self.spec, self.prompts[:count], self.images)

    def check_images(self) -> None:
        """Checks that an image can be read, if there are any, before work is spent on what needs them.

        Raises:
            UnreadableImageError: none can be read; the message names the first.
        """
        first: UnreadableImageError | None = None
        for index in range(len(self.prompts) if self.images is not None else 0):
            assert self.images is not None
            try:
                self.images.image(index)
                return
            except UnreadableImageError as error:
                first = first or error
        if first is not None:
            raise UnreadableImageError(f"None of the {len(self.prompts):,} images of {self.spec} can be read: {first}")

    @property
    def digest(self) -> str:
        """A digest of all texts in their order, the same on every machine."""
        return hashlib.sha256(json.dumps([prompt.text for prompt in self.prompts]).encode()).hexdigest()[:16]


def open_prompts(spec: str, split: str = "test", images: str | Path | None = None) -> PromptSet:
    """Opens prompts to draw.

    Data sets with images are those of `open_dataset`. A prompt is an image's first caption, read whole: of Urban1k's
    files all lines, where published retrieval reads the first. Further kinds hold prompts alone:

    | spec | content |
    |---|---|
    | `dpg-bench:FOLDER` | DPG-Bench's prompts, a text file for each, in the folder or in its `prompts/` |
    | `tiif:FOLDER` | TIIF-Bench's JSONL files with `type`, `short_description` and `long_description`; both are drawn |
    | `longbench-t2i:FILE` | LongBench-T2I's JSONL with `instruction` |
    | `detailmaster:FILE` | DetailMaster's JSON with `polished_prompt`, `dataset_target` and `image_id`; its small \
benchmark has some prompts several times, and each is drawn once |
    | `txt:FILE` | a prompt in each line that is not empty |

    Args:
        spec: `KIND:PATH`, see above.
        split, images: as for `open_dataset`; prompts without images have neither.

    Raises:
        FileNotFoundError: a file or folder is missing.
        ValueError: the spec is unknown, there is no prompt, or an entry is faulty (the message names its place).

    Examples:
        >>> scenes = open_prompts("miniature:10")
        >>> len(scenes.prompts), scenes.prompts[3].name, len(scenes.images)
        (10, '00003', 10)
    """
    kind = spec.partition(":")[0]
    if kind in PROMPT_READERS and (images is not None or split != "test"):
        raise ValueError(f"{spec} holds prompts only: pass no split and no folder of images with it.")
    _, path = data_place(spec, images, prompts=True)
    if kind not in PROMPT_READERS:
        data = open_dataset(spec, split, images, whole_captions=True)
        captions = [data.captions(index)[0] for index in range(len(data))]
        return PromptSet(spec, _numbered(captions), data)
    prompts = list(PROMPT_READERS[kind](Path(path)))
    if not prompts:
        raise ValueError(f"{spec} holds no prompt: pass {_CONTENTS[kind]}.")
    return PromptSet(spec, prompts)


def _numbered(texts: Sequence[str]) -> list[Prompt]:
    return [Prompt(text, f"{number:05}") for number, text in enumerate(texts)]


# One function for each layout, from the path to prompts


def _dpg_bench(path: Path) -> Iterator[Prompt]:
    folder = existing_folder(path)
    folder = folder / "prompts" if (folder / "prompts").is_dir() else folder
    places: dict[str, Path] = {}
    for file in sorted(folder.glob("[!.]*.txt")):
        name = file.name.partition(".")[0]  # its scorer cuts the names of pictures there
        if (other := places.setdefault(name, file)) is not file:
            raise ValueError(f"{other} and {file} share the name {name} before the first dot: leave only one of them.")
        yield Prompt(_text(read_text(file), str(file)), name)


def _tiif(path: Path) -> Iterator[Prompt]:
    files: dict[str, Path] = {}
    for file in sorted(existing_folder(path).glob("[!.]*.jsonl")):
        entries = list(read_json_lines(file))
        for number, (place, entry) in enumerate(entries):
            with layout_errors(place):
                kind = entry["type"]
                if not isinstance(kind, str) or kind != entries[0][1]["type"]:
                    raise ValueError(f"{place} has the type {kind!r:.60}; expected that of the file's first line.")
                if (other := files.setdefault(kind, file)) is not file:
                    raise ValueError(f"{other} and {file} both hold the type {kind}: leave only one of them.")
                for length in ("short_description", "long_description"):
                    yield Prompt(_text(entry[length], place), str(number), (kind, length))


def _longbench_t2i(path: Path) -> Iterator[Prompt]:
    for number, (place, entry) in enumerate(read_json_lines(path)):
        with layout_errors(place):
            yield Prompt(_text(entry["instruction"], place), f"{number:05}")


def _detailmaster(path: Path) -> Iterator[Prompt]:
    texts: dict[str, str] = {}
    for number, entry in enumerate(read_json(path, list), 1):
        place = f"Entry {number} of {path}"
        with layout_errors(place):
            name, text = f"{entry['dataset_target']}_{entry['image_id']}", _text(entry["polished_prompt"], place)
            if texts.setdefault(name, text) != text:
                raise ValueError(f"{place} has the image {name} of an earlier entry, but another prompt.")
    for name, text in texts.items():
        yield Prompt(text, name)


def _txt(path: Path) -> Iterator[Prompt]:
    yield from _numbered([_text(line, f"Line {number} of {path}") for number, line in lines_of(read_text(path))])


def _text(text: Any, place: str) -> str:
    if fault := caption_fault(text):
        raise ValueError(f"The prompt of {place} {fault}: correct it, or leave it out.")
    return " ".join(text.split())


PROMPT_READERS: dict[str, Callable[[Path], Iterator[Prompt]]] = {
    "dpg-bench": _dpg_bench,
    "tiif": _tiif,
    "longbench-t2i": _longbench_t2i,
    "detailmaster": _detailmaster,
    "txt": _txt,
}
_CONTENTS = {
    "dpg-bench": "the folder of its text files",
    "tiif": "the folder of its JSONL files, such as data/testmini_prompts",
    "longbench-t2i": "its instruction.jsonl",
    "detailmaster": "its JSON",
    "txt": "a file with a prompt in each line",
}
