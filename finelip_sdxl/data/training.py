"""Batches for training. Each depends on seed, epoch and position alone, so a run can be resumed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler
from transformers import CLIPImageProcessorPil, CLIPTokenizer

from finelip_sdxl.model import end_positions
from finelip_sdxl.options import STOCK_POSITIONS

from .augmentation import CaptionAugmentation
from .caption_dataset import CaptionDataset, UnreadableImageError
from .preprocessing import tokenize
from .regions import Region, follow_regions

MAX_UNREADABLE = 100  # unreadable images in a row; after more, probably all are


class ImageTextDataset(Dataset[dict[str, Any]]):
    """Images with one caption each, drawn anew in every epoch.

    An image that cannot be read is replaced by the next readable one, under the id of that one: losses that mask pairs
    of equal id then see no false negative.

    Args:
        data: images and captions.
        image_processor: see `load_image_processor`.
        augmentation: random changes of the captions.
        seed: seed of the captions that are drawn, and of their changes.

    Examples:
        >>> from finelip_sdxl.data import load_image_processor, open_dataset
        >>> pairs = ImageTextDataset(open_dataset("miniature:5"), load_image_processor("miniature-clip-1", 96))
        >>> pairs[2]["id"], pairs[2]["pixel_values"].shape, pairs[2]["skipped"]
        (2, torch.Size([3, 96, 96]), ())
    """

    def __init__(
        self,
        data: CaptionDataset,
        image_processor: CLIPImageProcessorPil,
        augmentation: CaptionAugmentation = CaptionAugmentation(),  # noqa: B008 (it is frozen)
        seed: int = 0,
    ) -> None:
        self.data, self.image_processor, self.augmentation, self.seed = data, image_processor, augmentation, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch. Call it before the loader is iterated; persistent workers would keep the old one."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """See `make_item`."""
        rng = random.Random(f"{self.seed} {self.epoch} {index}")
        return make_item(self.data, index, self.image_processor, self.augmentation, rng)


def make_item(
    data: CaptionDataset,
    index: int,
    image_processor: CLIPImageProcessorPil,
    augmentation: CaptionAugmentation,
    rng: random.Random,
) -> dict[str, Any]:
    """Returns the pair of an image, or of the next one that can be read, and one of its captions.

    Returns:
        `id`, the index of the image; `pixel_values`, (3, height, width); `caption`, augmented; `prefix`, the number of
        padding tokens before it; `regions` of the augmented caption; `short_caption`; `skipped`, a message for each
        image that cannot be read.

    Raises:
        UnreadableImageError: none of the next 100 images can be read.
    """
    skipped: list[str] = []
    for offset in range(min(len(data), MAX_UNREADABLE)):
        place = (index + offset) % len(data)
        try:
            image = data.image(place)
        except UnreadableImageError as error:
            skipped.append(str(error))
            continue
        captions = data.captions(place)
        number = rng.randrange(len(captions))
        caption = augmentation(captions[number], rng)
        return {
            "id": place,
            "pixel_values": image_processor(image, return_tensors="pt").pixel_values[0],
            "caption": caption,
            "regions": follow_regions(data.regions(place) if number == 0 else (), captions[number], caption),
            "prefix": augmentation.padding(rng),
            "short_caption": data.short_caption(place),
            "skipped": tuple(skipped),
        }
    raise UnreadableImageError(
        f"{len(skipped)} images in a row cannot be read, so probably no image can. The first: {skipped[0]} If images"
        " are missing on purpose, pass skip_missing=True."
    )


def collate(tokenizer: CLIPTokenizer) -> Callable[[Sequence[dict[str, Any]]], dict[str, Any]]:
    """Returns a function that makes a batch of items, for a `DataLoader`.

    The batch holds `pixel_values`, (batch, 3, height, width); `input_ids`, (batch, n); `short_input_ids`, (batch, m),
    cut at 77; `short_mask`, (batch, m), True up to the end token, included; `ids` of the images, (batch,); `skipped`,
    the messages of all items; and `regions`, of phrases that were not cut: `row`, `token` (the phrase's last), `label`
    (equal numbers for equal labels), `weight`, (regions,), and `box`, (regions, 4).

    Examples:
        >>> from finelip_sdxl.data import load_image_processor, load_tokenizer, open_dataset
        >>> pairs = ImageTextDataset(open_dataset("miniature:5"), load_image_processor("miniature-clip-1", 96))
        >>> batch = collate(load_tokenizer("miniature-clip-1"))([pairs[0], pairs[1]])
        >>> batch["ids"], batch["short_mask"].shape == batch["short_input_ids"].shape
        (tensor([0, 1]), True)
    """
    return partial(_collate, tokenizer)  # a partial can be sent to a worker process, unlike an inner function


def _collate(tokenizer: CLIPTokenizer, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    short = tokenize(tokenizer, [item["short_caption"] for item in items], max_length=STOCK_POSITIONS)
    ends = end_positions(short, tokenizer.eos_token_id)
    return {
        "pixel_values": torch.stack([item["pixel_values"] for item in items]),
        "input_ids": tokenize(tokenizer, [item["caption"] for item in items], [item["prefix"] for item in items]),
        "short_input_ids": short,
        "short_mask": torch.arange(short.shape[1]) <= ends[:, None],
        "ids": torch.tensor([item["id"] for item in items]),
        "skipped": tuple(message for item in items for message in item["skipped"]),
        "regions": _collate_regions(tokenizer, items),
    }


def _collate_regions(tokenizer: CLIPTokenizer, items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    longest = tokenizer.model_max_length
    found: list[tuple[int, int, Region]] = []
    for row, item in enumerate(items):
        if not item["regions"]:
            continue
        encoding = tokenizer(item["caption"], truncation=True, max_length=longest)
        prefix = min(item["prefix"], longest - len(encoding.input_ids))
        for region in item["regions"]:
            token = encoding.char_to_token(region.end - 1)
            if token is not None:
                found.append((row, token + prefix, region))
    labels: dict[str, int] = {}
    return {
        "row": torch.tensor([row for row, _, _ in found], dtype=torch.long),
        "token": torch.tensor([token for _, token, _ in found], dtype=torch.long),
        "label": torch.tensor([labels.setdefault(region.label, len(labels)) for *_, region in found]),
        "weight": torch.tensor([region.weight for *_, region in found]),
        "box": torch.tensor([region.box for *_, region in found]).reshape(-1, 4),
    }


class ResumableBatchSampler(Sampler[list[int]]):
    """Batches of indices for a `DataLoader(batch_sampler=...)`, shuffled by seed and epoch alone.

    Groups of consecutive indices stay together. The batches of all processes are cut from one order, so each process
    gets a part of its own. Images of an incomplete last batch or group are left out in that epoch.

    Args:
        size: number of images.
        group_size: number of consecutive indices that stay together, `CaptionDataset.group_size`.
        batch_size: number of indices in a batch of one process.
        seed: seed of the order.
        processes: number of processes that train.
        process: number of this process, from 0.

    Raises:
        ValueError: `batch_size` is no multiple of `group_size`, or the data does not fill one batch.

    Examples:
        >>> batches = ResumableBatchSampler(size=8, group_size=2, batch_size=4, seed=0)
        >>> batches.set_epoch(3, first_batch=1)
        >>> len(batches), len(list(batches)[0])
        (2, 4)
    """

    def __init__(
        self, size: int, group_size: int, batch_size: int, seed: int, processes: int = 1, process: int = 0
    ) -> None:
        if batch_size < 1 or batch_size % group_size:
            raise ValueError(
                f"The batch size is {batch_size}: expected a multiple of {group_size}, since the images of this data "
                f"set come in groups of {group_size}."
            )
        if size // group_size * group_size < batch_size * processes:
            raise ValueError(
                f"The data set has {size} images, which do not fill one batch of {batch_size * processes}: "
                "make the batch smaller."
            )
        self.size, self.group_size, self.batch_size, self.seed = size, group_size, batch_size, seed
        self.processes, self.process = processes, process
        self.set_epoch(0)

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Chooses the epoch, and the batch to begin at; the batches before it are not loaded."""
        self.epoch, self.first_batch = epoch, first_batch

    def __len__(self) -> int:
        """The number of batches in a whole epoch."""
        return self.size // self.group_size * self.group_size // (self.batch_size * self.processes)

    def __iter__(self) -> Iterator[list[int]]:
        groups = np.random.default_rng([self.seed, self.epoch]).permutation(self.size // self.group_size)
        order = (groups[:, None] * self.group_size + np.arange(self.group_size)).reshape(-1)
        for batch in range(self.first_batch, len(self)):
            start = (batch * self.processes + self.process) * self.batch_size
            yield order[start : start + self.batch_size].tolist()
