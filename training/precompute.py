"""Latents and text states of a data set, computed once and kept in files that are read piece by piece."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from alignment import captions_of, read
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from finelip_sdxl import FineLIPSDXLPipeline
from finelip_sdxl.data.captioned_images import CaptionedImages, UnreadableImageError
from finelip_sdxl.data.images import middle
from finelip_sdxl.files import written_whole
from finelip_sdxl.prompts import STOCK_POSITIONS

CHUNK = 50  # images in a file


class Precomputed(Dataset):
    """Items that `precompute` wrote: `latents`, (channels, height, width), `time_ids`, (6,), `long` and `short`, the
    captions, and, if they were wanted, their `long_states`, (tokens, dim), `long_pooled`, (dim,), and the same of
    `short`."""

    def __init__(self, folder: Path) -> None:
        self.files, self.captions = [], []
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
    data: CaptionedImages, pipe: FineLIPSDXLPipeline, resolution: int, with_states: bool, folder: Path
) -> Precomputed:
    """Encode what is not in the folder yet; images that cannot be read are named and left out.

    Args:
        data: images and captions; of several, the first is the long one.
        pipe: whose VAE and text encoders, not adapted, encode.
        resolution: of the square that is cut from the middle of each image, in pixels.
        with_states: also encode captions, each kind padded alike: for what trains nothing before these states.
        folder: of the files; one data set, one folder.

    Raises:
        UnreadableImageError: if no image can be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    dtype = pipe.vae.dtype
    pipe.vae.float()  # SDXL's overflows in half precision
    chunks = range(0, len(data), CHUNK)
    for first in tqdm(chunks, desc="encoding images", unit_scale=CHUNK, unit="image", disable=None):
        file = folder / f"chunk-{first // CHUNK:06d}.safetensors"
        if file.exists():
            continue
        images, captions = [], []
        for index in range(first, min(first + CHUNK, len(data))):
            try:
                images.append(data.image(index))
            except UnreadableImageError as error:
                tqdm.write(f"skipped: {error}")
                continue
            captions.append(captions_of(data, index, pipe.tokenizer))
        if not images:
            continue
        pixels, time_ids = zip(*(cut_square(image, resolution) for image in images), strict=True)
        tensors = {"latents": to_latents(pipe, list(pixels)), "time_ids": torch.tensor(time_ids)}
        if with_states:
            for kind in ("long", "short"):
                states, pooled = read_all(pipe, [caption[kind] for caption in captions], kind)
                tensors |= {f"{kind}_states": states, f"{kind}_pooled": pooled}
        with written_whole(file) as temporary:
            contiguous = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
            save_file(contiguous, temporary, metadata={"captions": json.dumps(captions)})
    pipe.vae.to(dtype)
    items = Precomputed(folder)
    if not len(items):
        raise UnreadableImageError(f"None of the {len(data)} images can be read: look at the messages above.")
    return items


def cut_square(image: Image.Image, resolution: int) -> tuple[Image.Image, list[int]]:
    """The largest square in the middle, scaled, and SDXL's time ids for it: height and width of the original, top and
    left of the cut in the scaled image, height and width of the result (SDXL, arXiv 2307.01952, section 2.2).

    Example:
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
    """(images, channels, height, width), scaled as the UNet knows them."""
    pixels = pipe.image_processor.preprocess(images).to(pipe.vae.device, pipe.vae.dtype)
    latents = torch.cat([pipe.vae.encode(batch).latent_dist.mode() for batch in pixels.split(8)]).float()
    config = pipe.vae.config
    if getattr(config, "latents_mean", None) is not None and getattr(config, "latents_std", None) is not None:
        mean, std = (
            torch.tensor(values, device=latents.device)[:, None, None]
            for values in (config.latents_mean, config.latents_std)
        )
        return (latents - mean) * config.scaling_factor / std
    return latents * config.scaling_factor


def read_all(pipe: FineLIPSDXLPipeline, captions: list[str], kind: str) -> tuple[Tensor, Tensor]:
    """States and pooled vectors: all long captions are padded to one length, and all short ones to stock's."""
    pipe.length_buckets = () if kind == "long" else (STOCK_POSITIONS,)
    states, pooled = zip(
        *(read(pipe, captions[first : first + 8]) for first in range(0, len(captions), 8)), strict=True
    )
    return torch.cat(states), torch.cat(pooled)
