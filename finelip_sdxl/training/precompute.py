"""Latents and text states of a data set, computed once and stored in files, to be loaded one item at a time."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
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
from finelip_sdxl.options import STOCK_POSITIONS
from finelip_sdxl.picture_sizes import check_side, side_factor
from finelip_sdxl.training.alignment import captions_of, encode
from finelip_sdxl.training.processes import held

CHUNK = 50  # images in a file
BATCH = 8  # images or captions that are encoded at once


class Precomputed(Dataset[dict[str, Any]]):
    """The items in a folder from `precompute`.

    An item holds `latents`, (channels, height, width), `time_ids`, (6,), the captions `long` and `short`, and, with
    states, `long_states`, (tokens, dim), `long_pooled`, (dim,), `short_states` and `short_pooled`.
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
            item = {name: tensors.get_slice(name)[row] for name in tensors.keys()}  # noqa: SIM118 (no mapping)
        return {**item, **self.captions[index]}


@torch.no_grad()
def precompute(
    data: CaptionDataset, pipe: FineLIPSDXLPipeline, resolution: int, with_states: bool, folder: Path
) -> Precomputed:
    """Encodes a data set to a folder. Files are made again if captions, images or weights have changed.

    Images that cannot be read are named and left out; a later call tries them again.

    Args:
        data: images and captions; the first of several captions is the long one.
        pipe: the pipeline; its VAE and text encoders encode, without the adapter.
        resolution: side of the square that is cut from the middle of each image, in pixels.
        with_states: also encode captions, all of a kind padded to one length; for training without text encoders.
        folder: folder of one data set. Runs may share it; only one at a time writes to it.

    Raises:
        ValueError: the VAE takes no images of this resolution.
        UnreadableImageError: no image can be read.
        OSError: the folder cannot be written to.
    """
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
        made_of = {file: {"models": encoded_by, "data": digest_of_data(data, chunks[file])} for file in chunks}
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
                encode_chunk(data, pipe, resolution, with_states, file, chunks[file], made_of[file], bar.update)
        pipe.vae.to(dtype)
    items = Precomputed(folder)
    if not len(items):
        raise UnreadableImageError(f"None of the {len(data)} images can be read: see the messages above.")
    return items


def encode_chunk(
    data: CaptionDataset,
    pipe: FineLIPSDXLPipeline,
    resolution: int,
    with_states: bool,
    file: Path,
    indices: Iterable[int],
    made_of: dict[str, str],
    done: Callable[[int], Any],
) -> None:
    """Writes a file of some images and their captions; no file if none of the images can be read.

    `done` is called with the number of images after each part of them.
    """
    images, captions, skipped = [], [], []
    for index in indices:
        try:
            images.append(data.image(index))
        except UnreadableImageError as error:
            tqdm.write(f"skipped: {error}")
            skipped.append(index)
            done(1)
            continue
        captions.append(captions_of(data, index, pipe.tokenizer))
    if not images:
        return
    pixels, time_ids = zip(*(cut_square(image, resolution) for image in images), strict=True)
    latents = []
    for first in range(0, len(pixels), BATCH):
        part = list(pixels[first : first + BATCH])
        latents.append(to_latents(pipe, part))
        done(len(part))
    tensors = {"latents": torch.cat(latents), "time_ids": torch.tensor(time_ids)}
    if with_states:
        for kind in ("long", "short"):
            states, pooled = encode_all(pipe, [caption[kind] for caption in captions], kind)
            tensors |= {f"{kind}_states": states, f"{kind}_pooled": pooled}
    contiguous = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {**made_of, "captions": json.dumps(captions), "skipped": json.dumps(skipped)}
    with written_whole(file) as temporary:
        save_file(contiguous, temporary, metadata=metadata)


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
    if "models" not in found:
        return "an earlier version made them, without a record of their source"
    if found["models"] != made_of["models"]:
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
        models |= {"text_encoder": pipe.text_encoder, "text_encoder_2": pipe.text_encoder_2}
    for name, model in models.items():
        config = model.config if name == "vae" else model.config.to_dict()
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
    """Returns the largest square in the middle, scaled, and its time ids (SDXL, arXiv 2307.01952, section 2.2).

    Time ids are height and width of the original image, top and left of the square in the scaled image, and height and
    width of the result.

    Examples:
        >>> image, time_ids = cut_square(Image.new("RGB", (400, 200)), 100)
        >>> image.size, time_ids
        ((100, 100), [200, 400, 0, 50, 100, 100])
    """
    scale = resolution / min(image.size)

    def place(size: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """The scaled size, and left and top of the cut in it."""
        width, height = (max(resolution, round(side * scale)) for side in size)
        return (width, height), ((width - resolution) // 2, (height - resolution) // 2)

    near = image.crop(middle(*image.size))
    size, (left, top) = place(near.size)
    scaled = near.resize(size, Image.Resampling.LANCZOS)
    cut = scaled.crop((left, top, left + resolution, top + resolution))
    _, (left, top) = place(image.size)
    return cut, [image.height, image.width, top, left, resolution, resolution]


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


def encode_all(pipe: FineLIPSDXLPipeline, captions: list[str], kind: str) -> tuple[Tensor, Tensor]:
    """Returns states and pooled vectors. Long captions are padded to one length, and short ones to stock's."""
    pipe.length_buckets = () if kind == "long" else (STOCK_POSITIONS,)
    states, pooled = zip(
        *(encode(pipe, captions[first : first + BATCH]) for first in range(0, len(captions), BATCH)), strict=True
    )
    return torch.cat(states), torch.cat(pooled)
