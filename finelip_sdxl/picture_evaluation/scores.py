"""Figures of the pictures of a run: each only where it means something, with its interval and its judge's name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from finelip_sdxl.comparison.comparison import Comparison
from finelip_sdxl.data.caption_dataset import CaptionDataset, UnreadableImageError
from finelip_sdxl.evaluation.distances import distance_intervals
from finelip_sdxl.evaluation.fidelity import (
    Judge,
    count_tokens,
    image_embeddings,
    part_of,
    sentence_fidelity,
    sentences_of,
    text_fidelity,
)
from finelip_sdxl.evaluation.intervals import Interval, mean_interval
from finelip_sdxl.miniature.parsing import parse_description
from finelip_sdxl.miniature.scoring import score_objects
from finelip_sdxl.picture_evaluation.drawn import read_drawn
from finelip_sdxl.picture_evaluation.plan import PicturePlan
from finelip_sdxl.provenance import public_name

_NAMED = 3  # unreadable images that a note names
_PARTS = {"all": "", "before": " before token 77", "after": " after token 77"}


@dataclass(frozen=True)
class Figure:
    """A row of the report.

    Attributes:
        key: short name, for JSON.
        title: name for people.
        by: the model behind the figure, and what it looks at.
        values: the figure of each column; None where it has none.
        by_prompt: the figure of each prompt, by column; empty for distances of whole sets.
        is_better_high: whether more is better.
        self_judged: columns that the judge's own text encoder drew.
        digits: decimals to print.
    """

    key: str
    title: str
    by: str
    values: dict[str, Interval | None]
    by_prompt: dict[str, list[float | None]]
    is_better_high: bool = True
    self_judged: tuple[str, ...] = ()
    digits: int = 3


@dataclass(frozen=True)
class Scores:
    """All figures of a run, and notes about what was left out."""

    figures: list[Figure]
    notes: list[str]


@dataclass(frozen=True)
class Judges:
    """The models that score, on the CPU until then; None for figures that nobody asked for.

    Attributes:
        features: an image tower for FID, KID and CMMD.
        judge: a CLIP of 248 positions for whole prompts.
        sentence_judge: a stock CLIP of 77 for sentences.
        own: by a judge's role, the columns that its text encoder draws.
        is_miniature: whether the objects of a picture can be counted.
    """

    features: Judge | None = None
    judge: Judge | None = None
    sentence_judge: Judge | None = None
    own: Mapping[str, tuple[str, ...]] | None = None
    is_miniature: bool = False

    def seen_by(self, comparison: Comparison, columns: Sequence[str]) -> Judges:
        """These judges, with the columns that the text encoders of a comparison draw."""
        own = {
            role: tuple(
                column
                for column in columns
                if judge is not None and any(map(judge.is_encoder, comparison.text_encoders(column)))
            )
            for role, judge in (("judge", self.judge), ("sentence_judge", self.sentence_judge))
        }
        return Judges(self.features, self.judge, self.sentence_judge, own, comparison.is_miniature)


def score(
    plan: PicturePlan,
    folder: Path,
    judges: Judges,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 32,
    progress: bool = True,
) -> Scores:
    """Scores the pictures of a run.

    Args:
        plan: the pictures.
        folder: the folder of the run, with all of them.
        judges: the models.
        device: device that they run on.
        batch_size: number of pictures or texts encoded at a time.
        progress: whether to show progress bars.

    Raises:
        UnreadableImageError: a drawn picture is damaged.
    """
    figures: list[Figure] = []
    notes: list[str] = []
    pictures = _Pictures(plan, folder, batch_size, progress)
    if judges.is_miniature:
        figures += _count_objects(pictures, notes)
    own = judges.own or {}
    for role, judge in (("sentence_judge", judges.sentence_judge), ("judge", judges.judge)):
        if judge is None:
            continue
        judge.model.to(device)  # type: ignore[arg-type]  # transformers has wrong types for it
        judged = _judge_sentences if role == "sentence_judge" else _judge_texts
        figures += judged(pictures, judge, own.get(role, ()), notes)
        judge.model.to("cpu")  # type: ignore[arg-type]
    if judges.features is not None:
        if plan.prompts.images is None:
            notes.append(f"{plan.prompts.spec} has no images, so there are no FID, KID and CMMD.")
        else:
            judges.features.model.to(device)  # type: ignore[arg-type]
            figures += _measure_distances(pictures, plan.prompts.images, judges.features, notes)
    return Scores(figures, notes)


@dataclass(frozen=True)
class _Pictures:
    """The drawn pictures of a run."""

    plan: PicturePlan
    folder: Path
    batch_size: int
    progress: bool

    @property
    def texts(self) -> list[str]:
        return [prompt.text for prompt in self.plan.prompts.prompts]

    def read(self, column: str, prompt: int) -> Iterator[Image.Image]:
        for file in self.plan.files_of(self.folder, column, prompt):
            yield read_drawn(file)

    def embeddings(self, judge: Judge, column: str) -> Tensor:
        """(prompts, pictures of each, dim)"""
        prompts = self.bar(range(len(self.texts)), f"{public_name(judge.name)}: {column}")
        images = (image for prompt in prompts for image in self.read(column, prompt))
        found = image_embeddings(judge, images, self.batch_size)
        return found.reshape(len(self.texts), self.plan.images_per_prompt, -1)

    def bar(self, items: Any, name: str) -> Any:
        return tqdm(items, desc=name, delay=2, disable=not self.progress, leave=False)


def _figure(key: str, title: str, by: str, by_prompt: dict[str, list[float | None]], **options: Any) -> Figure:
    values = {column: mean_interval(own) for column, own in by_prompt.items()}
    return Figure(key, title, by, values, by_prompt, **options)


def _parted(
    key: str, title: str, by: str, found: dict[str, dict[str, list[float | None]]], **options: Any
) -> list[Figure]:
    """Figures of all parts; those of a part that no prompt has are left out."""
    figures = [
        _figure(
            key if part == "all" else f"{key}_{part}_77",
            f"{title}{words}",
            by,
            {column: own[part] for column, own in found.items()},
            **options,
        )
        for part, words in _PARTS.items()
    ]
    return [figure for figure in figures if any(figure.values.values())]


def _count_objects(pictures: _Pictures, notes: list[str]) -> list[Figure]:
    """The share of described objects that a picture of the miniature shows, with the right shape, color and place."""
    from finelip_sdxl.data import load_tokenizer

    tokenizer = load_tokenizer("miniature-clip-1", 77)
    described = [parse_description(text) for text in pictures.texts]
    parts = []
    for text, things in zip(pictures.texts, described, strict=True):
        starts = count_tokens(tokenizer, [text[: thing.start] for thing in things]) if things else []
        ends = count_tokens(tokenizer, [text[: thing.end] for thing in things]) if things else []
        parts.append([part_of(start, end) for start, end in zip(starts, ends, strict=True)])
    if silent := sum(not things for things in described):
        notes.append(
            f"Prompts that describe no object of the miniature, left out there: {silent:,} of {len(described):,}."
        )

    found: dict[str, dict[str, list[float | None]]] = {}
    for column in pictures.plan.columns:
        found[column] = {part: [] for part in _PARTS}
        for prompt, things in enumerate(pictures.bar(described, f"objects: {column}")):
            shown = [score_objects(image, things) for image in pictures.read(column, prompt)]
            for part in _PARTS:
                chosen = [at for at, own in enumerate(parts[prompt]) if part in ("all", own)]
                right = [scores[at].right for scores in shown for at in chosen]
                found[column][part].append(sum(right) / len(right) if right else None)
    return _parted("objects", "Objects right", "the miniature's exact scenes, no model", found)


def _judge_sentences(pictures: _Pictures, judge: Judge, own: tuple[str, ...], notes: list[str]) -> list[Figure]:
    assert judge.tokenizer is not None
    read = [sentences_of(judge.tokenizer, text) for text in pictures.texts]
    sentences = [found for found, _ in read]
    if too_long := sum(number for _, number in read):
        notes.append(f"Sentences of more than 77 tokens, left out since no judge of 77 takes them: {too_long:,}.")
    found = {
        column: sentence_fidelity(judge, sentences, pictures.embeddings(judge, column))
        for column in pictures.plan.columns
    }
    by = f"{public_name(judge.name)}, {judge.positions} positions, each sentence for itself"
    return _parted("sentences", "Sentence fidelity", by, found, self_judged=own)


def _judge_texts(pictures: _Pictures, judge: Judge, own: tuple[str, ...], notes: list[str]) -> list[Figure]:
    found = {
        column: text_fidelity(judge, pictures.texts, pictures.embeddings(judge, column))
        for column in pictures.plan.columns
    }
    if cut := sum(value is None for value in next(iter(found.values()))):
        notes.append(
            f"Prompts of more than {judge.positions} tokens, left out of text fidelity since only their beginning would"
            f" be judged: {cut:,} of {len(pictures.texts):,}."
        )
    if cut == len(pictures.texts):
        return []
    by = f"{public_name(judge.name)}, {judge.positions} positions, whole prompts"
    return [_figure("fidelity", "Text fidelity", by, found, self_judged=own)]


def _measure_distances(pictures: _Pictures, images: CaptionDataset, features: Judge, notes: list[str]) -> list[Figure]:
    unreadable: list[str] = []
    readable: list[int] = []

    def read() -> Iterator[Image.Image]:
        for index in pictures.bar(range(len(pictures.texts)), f"{public_name(features.name)}: data"):
            try:
                image = images.image(index)
            except UnreadableImageError as error:
                unreadable.append(str(error))
            else:
                readable.append(index)
                yield image

    real = image_embeddings(features, read(), pictures.batch_size)
    if unreadable:
        count = f"{len(unreadable):,} of {len(pictures.texts):,}"
        notes.append(
            f"Images that cannot be read, left out with their pictures: {count}. {' '.join(unreadable[:_NAMED])}"
        )
    if len(readable) < 2:
        notes.append("FID, KID and CMMD compare sets of pictures, and need at least two images that can be read.")
        return []
    found = {}
    for column in pictures.plan.columns:
        drawn = pictures.embeddings(features, column)[readable].flatten(0, 1)
        found[column] = distance_intervals(real, drawn, pictures.plan.images_per_prompt)

    by = f"{public_name(features.name)}, {features.dim} image features, {len(readable):,} images"
    names = {"fid": ("FID", 2), "kid": ("KID", 4), "cmmd": ("CMMD", 3)}
    if len(readable) <= features.dim:
        notes.append(
            f"FID is left out: it needs more images than features, and there are {len(readable):,} for {features.dim}"
            " features. KID and CMMD have no such bias."
        )
        del names["fid"]
    return [
        Figure(key, title, by, {column: own[key] for column, own in found.items()}, {}, False, digits=digits)
        for key, (title, digits) in names.items()
    ]
