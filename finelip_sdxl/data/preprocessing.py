"""Token ids of texts and pixel values of images, for a model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import LongTensor
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature, CLIPImageProcessorPil, CLIPTokenizer

from finelip_sdxl.names import bundled_model, resolve
from finelip_sdxl.text_encoders import check_tokenizer

from .images import middle

POSITIONS = 248
MAX_SIDE = 4_096  # pixels of a CLIP's image; public CLIPs have up to 560
_PREFIX_ID = 0  # not the tokenizer's padding: CLIP-L pads with its end token, and pooling would find it there
_FILES = ("tokenizer*", "vocab.json", "merges.txt", "special_tokens_map.json", "preprocessor_config.json")


def load_tokenizer(source: str | os.PathLike[str], positions: int = POSITIONS) -> CLIPTokenizer:
    """Returns the tokenizer of a CLIP.

    Args:
        source: "miniature-clip-1", "miniature-clip-2", "miniature-finelip-1" or "miniature-finelip-2"; a directory or
            hub id that holds a tokenizer.
        positions: number of positions of the text encoder; `tokenize` cuts texts there.

    Raises:
        FileNotFoundError: `source` does not exist, or holds no tokenizer.
        OSError: the hub cannot be reached, or refuses.
        ValueError: its files are broken, or lack the words.

    Examples:
        >>> load_tokenizer("miniature-finelip-1").model_max_length
        248
    """
    if (bundled := bundled_model(source)) is not None:
        source = bundled.tokenizer
    hint = "pass a tokenizer's directory or hub id, such as openai/clip-vit-large-patch14"
    if Path(source).is_file():
        raise FileNotFoundError(f"{source} is a checkpoint file, which holds no tokenizer: {hint}.")
    directory = resolve(source).folder(_FILES)
    # Without either file, `from_pretrained` silently makes a tokenizer of two tokens.
    if not any((directory / name).is_file() for name in ("vocab.json", "tokenizer.json")):
        raise FileNotFoundError(f"{source} holds no vocab.json or tokenizer.json: {hint}.")
    with _reading(f"The tokenizer of {source}"):
        tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(directory)
    check_tokenizer(tokenizer, str(source))
    tokenizer.model_max_length = positions
    return tokenizer


def load_image_processor(source: str | os.PathLike[str], image_size: int) -> CLIPImageProcessorPil:
    """Returns the image processor of a CLIP, from images to pixel values: resize, center crop, scale, normalize.

    Args:
        source: as for `load_tokenizer`, or a checkpoint file. Without a `preprocessor_config.json`, the processor is
            CLIP's: bicubic, with the published mean and standard deviation.
        image_size: image size of the model in pixels, for a source without that file.

    Raises:
        FileNotFoundError: `source` does not exist.
        OSError: the hub cannot be reached, or refuses.
        ValueError: its `preprocessor_config.json` is broken.

    Examples:
        >>> from PIL import Image
        >>> processor = load_image_processor("miniature-clip-1", image_size=96)
        >>> processor(Image.new("RGB", (96, 96)), return_tensors="pt").pixel_values.shape
        torch.Size([1, 3, 96, 96])
    """
    if bundled_model(source) is not None:
        processor = _clip_processor(image_size)
        processor.resample = Image.Resampling.BOX  # the towers were trained on drawings of half the size, made so
        processor.image_mean = processor.image_std = [0.5, 0.5, 0.5]
        return processor
    if not Path(source).is_file():
        directory = resolve(source).folder(_FILES)
        if (directory / "preprocessor_config.json").is_file():
            with _reading(f"{source}'s preprocessor_config.json"):
                processor = _ImageProcessor.from_pretrained(directory)
                _check_image_processor(processor)
            return processor
    return _clip_processor(image_size)


def tokenize(
    tokenizer: CLIPTokenizer, texts: Sequence[str], prefix: Sequence[int] | None = None, max_length: int | None = None
) -> LongTensor:
    """Returns token ids of texts: start token, prefix padding, text, end token, padding.

    Prefix padding shifts a text to later positions (DeBias-CLIP, arXiv 2602.22419). It never replaces text.

    Args:
        tokenizer: see `load_tokenizer`.
        texts: texts of any length; longer ones than `max_length` are cut, and keep their end token.
        prefix: number of padding tokens before each text; fewer, if the text leaves less room. None for none.
        max_length: highest number of tokens, start and end included; by default the tokenizer's `model_max_length`.

    Returns:
        (texts, n), with the length n of the longest text.

    Examples:
        >>> tokenize(load_tokenizer("miniature-clip-1"), ["a red star", "a"], prefix=[1, 0])
        tensor([[858,   0, 320, 730, 789, 859],
                [858, 320, 859, 859, 859, 859]])
    """
    longest = max_length or tokenizer.model_max_length
    rows = tokenizer(list(texts), truncation=True, max_length=longest).input_ids
    for row, count in zip(rows, prefix or [0] * len(rows), strict=True):
        row[1:1] = [_PREFIX_ID] * min(count, longest - len(row))
    return pad_sequence([torch.tensor(row) for row in rows], True, tokenizer.pad_token_id)  # type: ignore[return-value]


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Turns errors of transformers, which have any type and name no file, into one with the file's name."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ValueError(f"{name} cannot be read ({reason}): fetch it again.") from error


def _check_image_processor(processor: CLIPImageProcessorPil) -> None:
    """Checks that a processor makes square images of finite pixel values.

    Raises:
        Exception: it does not; the error has almost any type.
    """
    sides = [side for sizes in (processor.size, processor.crop_size) for side in dict(sizes or {}).values()]
    if wrong := [side for side in sides if side is not None and not 1 <= side <= MAX_SIDE]:
        raise ValueError(f"it makes images of {wrong[0]} pixels, where 1 to {MAX_SIDE:,} were expected")
    with np.errstate(all="ignore"):
        pixels = processor(Image.new("RGB", (3, 2)), return_tensors="np").pixel_values
    if pixels.shape[:2] != (1, 3) or pixels.shape[2] != pixels.shape[3] or not np.isfinite(pixels).all():
        raise ValueError("it does not make square images of three colors with finite values")


def _clip_processor(size: int) -> CLIPImageProcessorPil:
    return _ImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


class _ImageProcessor(CLIPImageProcessorPil):
    """CLIP's processor. Parts of an image far outside its center crop are cut off before it scales."""

    def _preprocess(self, images: list[np.ndarray], **kwargs: Any) -> BatchFeature:  # type: ignore[override]
        if kwargs["do_center_crop"] and kwargs["size"].shortest_edge:
            boxes = [middle(width, height) for _, height, width in (image.shape for image in images)]
            images = [
                image[:, top:bottom, left:right]
                for image, (left, top, right, bottom) in zip(images, boxes, strict=True)
            ]
        return super()._preprocess(images, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        return {
            **super().to_dict(),
            "image_processor_type": "CLIPImageProcessor",
        }  # a public name
