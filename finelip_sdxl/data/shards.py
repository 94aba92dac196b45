"""Training on webdataset shards: tar files of images and captions, for data too large for one disk."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info
from transformers import CLIPImageProcessorPil

from .augmentation import CaptionAugmentation
from .caption_dataset import CaptionDataset, UnreadableImageError, caption_fault
from .images import read_image
from .training import make_item

IMAGES = ("jpg", "jpeg", "png", "webp")  # the first one in a sample counts
CAPTIONS = ("txt", "json")
SHUFFLE_BUFFER = 1_000  # undecoded samples in each worker's memory, to draw the next one from


class TrainingShards(IterableDataset[list[dict[str, Any]]]):
    """Whole batches of `ImageTextDataset`'s items, from shards one after another.

    For a `DataLoader(shards, batch_size=None, collate_fn=collate(tokenizer))`. Each process and each of its workers
    reads shards of its own, in an order of the epoch, and starts over if they have too few samples. The order of
    samples depends on the seed, the epoch, and the numbers of processes and workers.

    A sample is `KEY.jpg`, `.jpeg`, `.png` or `.webp` with `KEY.txt`, or with `KEY.json` that has a `caption`. `KEY` may
    have dots; other files of a sample, such as `a.mask.png` beside `a.jpg`, are ignored. A sample that is incomplete or
    cannot be read is replaced by the next of its batch.

    Args:
        pattern: pattern of the shards' paths or addresses, such as `webdataset:/data/laion-{000000..000099}.tar`, also
            without `webdataset:`.
        image_processor: see `load_image_processor`.
        batch_size: number of pairs in a batch of one process.
        epoch_size: number of pairs in an epoch of all processes together; samples in the shards are not counted.
        augmentation: augmentation of the captions.
        seed: seed of the order and the augmentation.
        processes: number of processes that train.
        process: number of this process, from 0.

    Raises:
        FileNotFoundError: a shard is not there.
        ImportError: the `webdataset` library is not installed.
        ValueError: an epoch is smaller than a batch; during iteration, there are fewer shards than workers, or no
            samples in them.

    Examples:
        >>> from finelip_sdxl.data import load_image_processor
        >>> processor = load_image_processor("miniature-clip-1", 96)
        >>> TrainingShards("webdataset:/data/laion-{0..99}.tar", processor, batch_size=64, epoch_size=10**6)
        Traceback (most recent call last):
        FileNotFoundError: /data/laion-0.tar, the first of 100 shards, does not exist.
    """

    def __init__(
        self,
        pattern: str,
        image_processor: CLIPImageProcessorPil,
        batch_size: int,
        epoch_size: int,
        augmentation: CaptionAugmentation = CaptionAugmentation(),  # noqa: B008 (it is frozen)
        seed: int = 0,
        processes: int = 1,
        process: int = 0,
    ) -> None:
        self.urls = _webdataset().SimpleShardList(pattern.removeprefix("webdataset:")).urls
        for number, url in enumerate(self.urls, 1):
            if ":" not in url and not Path(url).is_file():
                which = "the first" if number == 1 else f"number {number}"
                raise FileNotFoundError(f"{url}, {which} of {len(self.urls)} shards, does not exist.")
        if epoch_size < batch_size * processes:
            raise ValueError(
                f"An epoch of {epoch_size} pairs does not fill one batch of {batch_size * processes}: make it longer."
            )
        self.image_processor, self.augmentation = image_processor, augmentation
        self.batch_size, self.epoch_size, self.seed = batch_size, epoch_size, seed
        self.processes, self.process = processes, process
        self.set_epoch(0)

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Chooses the epoch, and the batch to begin at: batches before it are skipped without decoding."""
        self.epoch, self.first_batch = epoch, first_batch

    def __len__(self) -> int:
        """The number of batches in a whole epoch."""
        return self.epoch_size // (self.batch_size * self.processes)

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        # The loader asks its workers in turn and begins with the first one, also in the middle of an epoch.
        turn = (number + self.first_batch) % workers
        reader, readers = self.process * workers + turn, self.processes * workers
        urls = list(self.urls)
        random.Random(f"{self.seed} {self.epoch}").shuffle(urls)
        if len(urls) < readers:
            raise ValueError(
                f"{len(urls)} shards are too few for {self.processes} processes of {workers} workers: "
                "use fewer workers, or smaller shards."
            )
        samples = _read(urls[reader::readers], random.Random(f"{self.seed} {self.epoch} {reader}"))
        passed = len(range(turn, self.first_batch, workers))
        samples = islice(samples, passed * self.batch_size, None)
        for batch in range(turn, len(self), workers)[passed:]:
            window = _Window(list(islice(samples, self.batch_size)))
            yield [self._item(window, index, batch) for index in range(self.batch_size)]

    def _item(self, window: _Window, index: int, batch: int) -> dict[str, Any]:
        rng = random.Random(f"{self.seed} {self.epoch} {self.process} {batch} {index}")
        item = make_item(window, index, self.image_processor, self.augmentation, rng)
        # The id comes from the name, since images of other processes have the same places.
        digest = hashlib.sha256(window.name(item["id"]).encode()).digest()
        return {**item, "id": int.from_bytes(digest[:8], "big") >> 1}


class _Window(CaptionDataset):
    """Consecutive samples of a shard."""

    def __init__(self, samples: Sequence[dict[str, Any]]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, index: int) -> str:
        name = f"{self.samples[index]['__key__']} in {self.samples[index]['__url__']}"
        return name.encode(errors="backslashreplace").decode()  # names in a tar file can be any bytes

    def image(self, index: int) -> Image.Image:
        sample = self.samples[index]
        content = next((sample[suffix] for suffix in IMAGES if suffix in sample), None)
        if content is None:
            raise UnreadableImageError(f"{self.name(index)} has no jpg, png or webp.")
        self.captions(index)
        return read_image(content, self.name(index))

    def captions(self, index: int) -> tuple[str, ...]:
        """Returns the caption of one image, which may be missing here.

        Raises:
            UnreadableImageError: the caption is missing or faulty.
        """
        try:
            text = _caption(self.samples[index])
        except (ValueError, RecursionError) as error:
            raise UnreadableImageError(f"{self.name(index)} has no caption ({error}).") from error
        if fault := caption_fault(text):
            raise UnreadableImageError(f"The caption of {self.name(index)} {fault}.")
        return (" ".join(text.split()),)


def _caption(sample: dict[str, Any]) -> Any:
    """Returns the content of a sample's caption, of any type.

    Raises:
        ValueError: there is none.
        RecursionError: its JSON is nested too deep.
    """
    suffix = next((suffix for suffix in CAPTIONS if suffix in sample), None)
    if suffix is None:
        raise ValueError("it lacks a txt or json")
    try:
        text = sample[suffix].decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"its {suffix} is not UTF-8 text: {error.reason}") from error
    if suffix == "txt":
        return text
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"its json is not JSON: {error}") from error
    if not isinstance(content, dict) or "caption" not in content:
        raise ValueError("its json lacks a caption")
    return content["caption"]


def _read(urls: list[str], rng: random.Random) -> Iterator[dict[str, Any]]:
    """Yields the samples of shards, without end."""
    webdataset = _webdataset()
    while True:
        sample = None
        for sample in webdataset.DataPipeline(
            webdataset.SimpleShardList(urls),
            webdataset.tarfile_to_samples(handler=webdataset.warn_and_continue),
            _part_dotted,
            webdataset.shuffle(SHUFFLE_BUFFER, rng=rng),
        ):
            yield sample
        if sample is None:
            raise ValueError(f"There are no samples in {', '.join(urls)}.")


def _part_dotted(samples: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Separates samples that webdataset joins, since it cuts names at their first dot."""
    for sample in samples:
        parts: dict[str, dict[str, Any]] = {}  # by the part of the name between its first dot and its last
        for name, content in sample.items():
            stem, _, suffix = name.rpartition(".")
            if suffix in IMAGES + CAPTIONS:
                parts.setdefault(stem, {})[suffix] = content
        whole = [stem for stem, part in parts.items() if part.keys() & set(IMAGES) and part.keys() & set(CAPTIONS)]
        for stem, part in (parts or {"": {}}).items():
            beside = any(stem.startswith(f"{other}." if other else "") for other in whole)
            if stem in whole or not beside:
                key = f"{sample['__key__']}.{stem}" if stem else sample["__key__"]
                yield {"__key__": key, "__url__": sample["__url__"], **part}


def _webdataset() -> Any:
    try:
        import webdataset
    except ImportError as error:
        raise ImportError("Shards need the webdataset library: pip install webdataset.") from error
    return webdataset
