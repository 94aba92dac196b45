"""Latents and text states of a data set, computed once and stored in files, to be loaded one item at a time."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from finelip_sdxl import FineLIPSDXLPipeline
from finelip_sdxl.data.caption_dataset import CaptionDataset, UnreadableImageError
from finelip_sdxl.data.images import middle
from finelip_sdxl.files import check_writable, written_whole
from finelip_sdxl.options import ENCODERS, MAX_CHARACTERS, STOCK_POSITIONS
from finelip_sdxl.picture_sizes import check_side, side_factor
from finelip_sdxl.pipelines.encoder_swap import ADAPTER, ORIGINAL_ENCODERS
from finelip_sdxl.training.alignment import captions_of, encode
from finelip_sdxl.training.processes import held

CHUNK = 50  # images in a file
BATCH = 8  # images or captions that are encoded at once
# Models that encode captions: the short ones go to the original encoders.
READERS = (*ENCODERS, *ORIGINAL_ENCODERS, ADAPTER)

Cut = Callable[..., tuple[Image.Image, list[int]]]


class Precomputed(Dataset[dict[str, Any]]):
    """The items in a folder from `precompute`.

    An item holds `latents`, (channels, height, width), `time_ids`, (6,), its captions by their kind, such as `long` and
    `short`, and, with states, for each kind `long_states`, (tokens, dim), and `long_pooled`, (dim,).
    """

    def __init__(self, folder: Path) -> None:
        self.files: list[tuple[Path, int]] = []
        self.captions: list[dict[str, str]] = []
        for file in sorted(folder.glob("chunk-*.safetensors")):
            with safe_open(file, "pt") as tensors:
                captions = json.loads(tensors.metadata()["captions"])
            self.captions += captions
            self.files += [(file, row) for row in range(len(captions))]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        file, row = self.files[index]
        with safe_open(file, "pt") as tensors:
            keys = [key for key in tensors.keys() if key.endswith(f".{row}")]  # noqa: SIM118 (no mapping)
            item = {key.rpartition(".")[0]: tensors.get_tensor(key) for key in keys}
        return {**item, **self.captions[index]}


@torch.no_grad()
def precompute(
    data: CaptionDataset,
    pipe: FineLIPSDXLPipeline,
    resolution: int,
    with_states: bool,
    folder: Path,
    captions: Captions | None = None,
    cut: Cut | None = None,
) -> Precomputed:
    """Encodes a data set to a folder. Files are made again if captions, images or weights have changed.

    Images that cannot be read are named and left out; a later call tries them again.

    Args:
        data: images and captions.
        pipe: the pipeline, whose VAE and text encoders encode.
        resolution: side of the pictures in pixels.
        with_states: also encode captions, for training without text encoders.
        folder: folder of one data set. Runs may share it; only one at a time writes to it.
        captions: which captions, and how they are encoded; by default `LONG_AND_SHORT`.
        cut: how an image becomes a picture of this resolution; by default `cut_square`.

    Raises:
        ValueError: the VAE takes no images of this resolution.
        UnreadableImageError: no image can be read.
        OSError: the folder cannot be written to.
    """
    captions, cut = captions or LONG_AND_SHORT, cut or cut_square
    check_side("resolution", resolution, side_factor(pipe))
    is_read_only = folder.exists() and not os.access(folder, os.W_OK)
    with nullcontext() if is_read_only else held(folder):
        if not is_read_only:
            check_writable(folder)  # this also removes unfinished files of a run that was killed
        encoded_by = digest_of(*digests_of_models(pipe, with_states), resolution)
        chunks = {
            folder / f"chunk-{first // CHUNK:06d}.safetensors": range(first, min(first + CHUNK, len(data)))
            for first in range(0, len(data), CHUNK)
        }
        made_of = {file: {"encoded_by": encoded_by, "data": digest_of_data(data, chunks[file])} for file in chunks}
        encode_file = partial(encode_chunk, data, pipe, partial(cut, resolution=resolution), captions, with_states)
        stale = {file: reason for file in chunks if (reason := why_stale(file, made_of[file], data)) is not None}
        for reason, count in Counter(reason for file, reason in stale.items() if file.exists()).items():
            tqdm.write(f"{folder}: {count} of {len(chunks)} files are encoded again, since {reason}.")
        for file in folder.glob("chunk-*.safetensors"):
            if file in stale or file not in chunks:
                file.unlink()

        dtype = pipe.vae.dtype
        pipe.vae.float()  # SDXL's VAE overflows in half precision
        with tqdm(total=sum(len(chunks[file]) for file in stale), desc="encoding images", unit="image") as bar:
            for file in stale:
                encode_file(file, chunks[file], made_of[file], bar.update)
        pipe.vae.to(dtype)
    items = Precomputed(folder)
    if not len(items):
        raise UnreadableImageError(f"None of the {len(data)} images can be read: see the messages above.")
    return items


def encode_chunk(
    data: CaptionDataset,
    pipe: FineLIPSDXLPipeline,
    cut: Callable[[Image.Image], tuple[Image.Image, list[int]]],
    captions: Captions,
    with_states: bool,
    file: Path,
    indices: Iterable[int],
    made_of: dict[str, str],
    done: Callable[[int], Any],
) -> None:
    """Writes a file of some images and their captions; no file if none of the images can be read.

    `done` is called with the number of images after each part of them.
    """
    images, texts, skipped = [], [], []
    for index in indices:
        try:
            images.append(data.image(index))
        except UnreadableImageError as error:
            tqdm.write(f"skipped: {error}")
            skipped.append(index)
            done(1)
            continue
        texts.append(captions.of(data, index, pipe))
    if not images:
        return
    pictures, time_ids = zip(*map(cut, images), strict=True)
    latents: list[Tensor] = []
    for part in batches_of_one_size(pictures):
        latents += to_latents(pipe, part)
        done(len(part))
    tensors = {"latents": latents, "time_ids": [torch.tensor(ids) for ids in time_ids]}
    if with_states:
        for kind in texts[0]:
            states, pooled = captions.encode(pipe, [text[kind] for text in texts], kind)
            tensors |= {f"{kind}_states": states, f"{kind}_pooled": pooled}
    rows = {
        # A copy: safetensors refuses parts of one tensor.
        f"{name}.{row}": tensor.cpu().clone(memory_format=torch.contiguous_format)
        for name, of_images in tensors.items()
        for row, tensor in enumerate(of_images)
    }
    metadata = {**made_of, "captions": json.dumps(texts), "skipped": json.dumps(skipped)}
    with written_whole(file) as temporary:
        save_file(rows, temporary, metadata=metadata)


def batches_of_one_size(pictures: Sequence[Image.Image]) -> Iterator[list[Image.Image]]:
    """Yields pictures in their order, at most `BATCH` of one size at once."""
    for _, alike in groupby(pictures, key=lambda picture: picture.size):
        of_one_size = list(alike)
        for first in range(0, len(of_one_size), BATCH):
            yield of_one_size[first : first + BATCH]


# Which captions


@dataclass(frozen=True)
class Captions:
    """Captions of an image that are stored with its latents.

    Attributes:
        of: returns an image's captions by their kind.
        encode: returns states, (tokens, dim) each, and pooled vectors, (dim,) each, of captions of a kind.
    """

    of: Callable[[CaptionDataset, int, FineLIPSDXLPipeline], dict[str, str]]
    encode: Callable[[FineLIPSDXLPipeline, list[str], str], tuple[list[Tensor], list[Tensor]]]


def whole_caption(data: CaptionDataset, index: int, pipe: FineLIPSDXLPipeline) -> dict[str, str]:
    """Returns the first caption of an image, which the pipeline reads whole.

    Raises:
        ValueError: it has more characters than a pipeline reads.
    """
    caption = data.captions(index)[0]
    if len(caption) > MAX_CHARACTERS:
        raise ValueError(
            f"The caption of {data.image_file(index) or f'image {index}'} has {len(caption):,} characters, where at"
            f" most {MAX_CHARACTERS:,} were expected: shorten it."
        )
    return {"caption": caption}


def encode_padded(pipe: FineLIPSDXLPipeline, captions: list[str], kind: str) -> tuple[list[Tensor], list[Tensor]]:
    """Returns states and pooled vectors. Long captions are padded to one length, and short ones to stock's."""
    pipe.length_buckets = () if kind == "long" else (STOCK_POSITIONS,)
    states, pooled = zip(
        *(encode(pipe, captions[first : first + BATCH]) for first in range(0, len(captions), BATCH)), strict=True
    )
    return list(torch.cat(states)), list(torch.cat(pooled))


def encode_each(pipe: FineLIPSDXLPipeline, captions: list[str], kind: str) -> tuple[list[Tensor], list[Tensor]]:
    """Returns states and pooled vectors of captions as in calls with one of them: of their own lengths."""
    states, pooled = zip(*(encode(pipe, [caption]) for caption in captions), strict=True)
    return [of_one[0] for of_one in states], [of_one[0] for of_one in pooled]


LONG_AND_SHORT = Captions(lambda data, index, pipe: captions_of(data, index, pipe.tokenizer), encode_padded)
WHOLE = Captions(whole_caption, encode_each)


def folder_of(parent: Path, made_of: Mapping[str, Any]) -> Path:
    """Returns the folder within `parent` for these settings: all that change what is stored.

    Examples:
        >>> folder_of(Path("precomputed"), {"resolution": 64}).name
        'b80dc11b798675af'
    """
    digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
    return parent / digest[:16]


# Which files are stale


def why_stale(file: Path, made_of: dict[str, str], data: CaptionDataset) -> str | None:
    """Returns the reason to make a file again; None if it can stay. Images that it lacks are tried again."""
    try:
        with safe_open(file, "pt") as tensors:
            found = tensors.metadata() or {}
    except FileNotFoundError:
        return "they are not there"
    except (SafetensorError, OSError):
        return "they are damaged"
    if "encoded_by" not in found:
        return "an earlier version made them, without a record of their source"
    if found["encoded_by"] != made_of["encoded_by"]:
        return "the weights of the VAE or the text encoders have changed"
    if found["data"] != made_of["data"]:
        return "captions or images have changed"
    for index in json.loads(found["skipped"]):
        try:
            data.image(index)
        except UnreadableImageError as error:
            tqdm.write(f"skipped: {error}")
        else:
            return "images that could not be read before now can"
    return None


def digest_of_data(data: CaptionDataset, indices: Iterable[int]) -> str:
    """Returns a digest of captions, and of images by path, size and time: reading a million of them takes too long."""
    return digest_of(
        *([data.captions(index), data.short_caption(index), fingerprint(data, index)] for index in indices)
    )


def fingerprint(data: CaptionDataset, index: int) -> tuple[Any, ...]:
    """Returns path, size and time of an image's file."""
    file = data.image_file(index)
    try:
        state = None if file is None else file.stat()
    except OSError:
        state = None
    return (None if file is None else str(file), state and state.st_size, state and state.st_mtime_ns)


def digests_of_models(pipe: FineLIPSDXLPipeline, with_states: bool) -> Iterator[Any]:
    """Yields configs and digests of all models that encode, without their places and versions."""
    models = {"vae": pipe.vae}
    if with_states:
        models |= {name: model for name in READERS if (model := getattr(pipe, name)) is not None}
    for name, model in models.items():
        config = model.config.to_dict() if name.endswith(("text_encoder", "text_encoder_2")) else model.config
        yield name, {key: repr(value) for key, value in config.items() if key[0] != "_" and "version" not in key}
        for key, tensor in sorted(model.state_dict().items()):
            content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            yield key, str(tensor.dtype), list(tensor.shape), hashlib.sha256(content).hexdigest()
    for tokenizer in (pipe.tokenizer, pipe.tokenizer_2):
        yield tokenizer.model_max_length, sorted(tokenizer.get_vocab().items())


def digest_of(*parts: Any) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(json.dumps(part).encode() + b"\n")
    return found.hexdigest()


# Encoding


def cut_square(image: Image.Image, resolution: int) -> tuple[Image.Image, list[int]]:
    """Returns the largest square in the middle, scaled, and its time ids; see `cut_to`.

    Examples:
        >>> image, time_ids = cut_square(Image.new("RGB", (400, 200)), 100)
        >>> image.size, time_ids
        ((100, 100), [200, 400, 0, 50, 100, 100])
    """
    return cut_to(image, resolution, resolution)


def cut_bucket(image: Image.Image, resolution: int, factor: int) -> tuple[Image.Image, list[int]]:
    """Returns an image in the size of its bucket, and its time ids; see `bucket_of` and `cut_to`."""
    return cut_to(image, *bucket_of(*image.size, resolution, factor))


def bucket_of(width: int, height: int, resolution: int, factor: int) -> tuple[int, int]:
    """Returns width and height of the bucket whose aspect ratio is nearest to an image's.

    Buckets have at most the pixels of a square of the resolution, sides of half to twice the resolution, and steps of
    about a sixteenth of it: at 1,024 the steps of 64 pixels of SDXL's own buckets (arXiv 2307.01952, appendix I).

    Args:
        width, height: size of the image.
        resolution: side of the square bucket.
        factor: the number that all sides are multiples of, see `picture_sizes.side_factor`.

    Examples:
        >>> [bucket_of(*size, resolution=1024, factor=8) for size in ((3000, 2000), (800, 800), (100, 900))]
        [(1216, 832), (1024, 1024), (512, 2048)]
    """
    step = factor * max(1, resolution // (16 * factor))
    buckets = [(resolution, resolution)]
    for across in range(step, 2 * resolution + 1, step):
        down = resolution**2 // across // step * step
        if 2 * min(across, down) >= resolution and down <= 2 * resolution:
            buckets += [(across, down), (down, across)]
    return min(buckets, key=lambda size: abs(math.log(size[0] / size[1] * height / width)))


def cut_to(image: Image.Image, width: int, height: int) -> tuple[Image.Image, list[int]]:
    """Returns the largest part in the middle of this aspect ratio, scaled, and its time ids.

    Time ids are height and width of the original image, top and left of the part in the scaled image, and height and
    width of the result (SDXL, arXiv 2307.01952, section 2.2).
    """
    target = width, height
    scale = max(new / old for new, old in zip(target, image.size, strict=True))

    def place(size: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """The scaled size, and left and top of the cut in it."""
        across, down = (max(new, round(old * scale)) for new, old in zip(target, size, strict=True))
        return (across, down), ((across - width) // 2, (down - height) // 2)

    near = image.crop(middle(*image.size))
    size, (left, top) = place(near.size)
    scaled = near.resize(size, Image.Resampling.LANCZOS)
    cut = scaled.crop((left, top, left + width, top + height))
    _, (left, top) = place(image.size)
    return cut, [image.height, image.width, top, left, height, width]


def to_latents(pipe: FineLIPSDXLPipeline, images: list[Image.Image]) -> Tensor:
    """Returns latents, (images, channels, height, width), scaled for the UNet."""
    pixels = pipe.image_processor.preprocess(images).to(pipe.vae.device, pipe.vae.dtype)
    latents = torch.cat([pipe.vae.encode(batch).latent_dist.mode() for batch in pixels.split(BATCH)]).float()
    config = pipe.vae.config
    scaling_factor: float = config.scaling_factor
    if getattr(config, "latents_mean", None) is not None and getattr(config, "latents_std", None) is not None:
        mean, std = (
            torch.tensor(values, device=latents.device)[:, None, None]
            for values in (config.latents_mean, config.latents_std)
        )
        return (latents - mean) * scaling_factor / std
    return latents * scaling_factor
