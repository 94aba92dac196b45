"""Figures of a trained model: ranks of retrieval, refined tokens that are alike, similarity as sentences are added."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from finelip_sdxl import FineLIPModel, load_finelip
from finelip_sdxl.data import load_image_processor, load_tokenizer, tokenize
from finelip_sdxl.data.augmentation import CaptionAugmentation
from finelip_sdxl.data.caption_dataset import CaptionDataset, split_sentences
from finelip_sdxl.evaluation import EncodedPairs, encode_pairs, retrieval_ranks
from finelip_sdxl.evaluation.intervals import Interval, mean_interval
from finelip_sdxl.evaluation.retrieval import SWEEP
from finelip_sdxl.miniature.dataset import MiniatureScenes
from finelip_sdxl.model import GLOBAL_WEIGHT
from finelip_sdxl.text_encoders import num_positions

from .cells import BASE

FAMILY = MiniatureScenes.group_size
# Similarities by their weight of global; the published score is fused.
SIMILARITIES = {"global": 1.0, "fine": 0.0, "fused": GLOBAL_WEIGHT}
DIRECTIONS = ("image to text", "text to image")
PREFIXES = (2, 4, 8)
_PAIRS = 16  # images and texts that are compared at once for the similarities of pairs alone

# Ranks by weight of global and direction.
Ranks = dict[str, dict[str, list[int]]]


class ShortCaptions(CaptionDataset):
    """One scene of each family, with its short caption: a few objects do not tell the scenes of a family apart."""

    def __init__(self, split: str, size: int) -> None:
        self.scenes, self.size = MiniatureScenes(split, size * FAMILY), size

    def __len__(self) -> int:
        return self.size

    def image(self, index: int) -> Any:
        return self.scenes.image(index * FAMILY)

    def captions(self, index: int) -> tuple[str, ...]:
        return (self.scenes.short_caption(index * FAMILY),)


class ChangedCaptions(CaptionDataset):
    """Scenes with captions that a function makes of each caption, with random numbers of the scene's own."""

    def __init__(self, data: MiniatureScenes, change: Callable[[str, random.Random], Sequence[str] | str]) -> None:
        self.data, self.change = data, change

    def __len__(self) -> int:
        return len(self.data)

    def image(self, index: int) -> Any:
        return self.data.image(index)

    def captions(self, index: int) -> tuple[str, ...]:
        changed = self.change(self.data.captions(index)[0], random.Random(f"change {index}"))
        return (changed,) if isinstance(changed, str) else tuple(changed)


def drop_half_the_words(caption: str, rng: random.Random) -> str:
    """A random half of the words, in their order.

    Examples:
        >>> drop_half_the_words("one two three four", random.Random(0))
        'two four'
    """
    words = caption.split()
    return " ".join(words[k] for k in sorted(rng.sample(range(len(words)), max(1, len(words) // 2))))


def shuffle_sentences(caption: str, rng: random.Random) -> str:
    """All sentences, in random order.

    Examples:
        >>> shuffle_sentences("One. Two. Three.", random.Random(1))
        'One. Three. Two.'
    """
    sentences = split_sentences(caption)
    return " ".join(rng.sample(sentences, len(sentences)))


def keep_two_sentences(caption: str, rng: random.Random) -> str:
    """Two random sentences, in their order.

    Examples:
        >>> keep_two_sentences("One. Two. Three.", random.Random(0))
        'Two. Three.'
    """
    sentences = split_sentences(caption)
    return " ".join(sentences[k] for k in sorted(rng.sample(range(len(sentences)), min(2, len(sentences)))))


# HyFL-CLIP's perturbations.
PERTURBATIONS: dict[str, Callable[[str, random.Random], str]] = {
    "half of the words dropped": drop_half_the_words,
    "first sentence dropped": CaptionAugmentation(drop_first=1.0),
    "sentences shuffled": shuffle_sentences,
    "two sentences kept": keep_two_sentences,
}


def prefixes(caption: str, count: int) -> tuple[str, ...]:
    """The beginnings of a caption, of about 1/count, 2/count, … of its sentences.

    Examples:
        >>> prefixes("One. Two. Three. Four.", 2)
        ('One. Two.', 'One. Two. Three. Four.')
    """
    sentences = split_sentences(caption)
    return tuple(" ".join(sentences[: max(1, round(len(sentences) * k / count))]) for k in range(1, count + 1))


def load_model(name: str | Path, **options: Any) -> FineLIPModel:
    """A model, on the accelerator if there is one."""
    model = load_finelip(name, **options)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return model.to(device) if device else model  # type: ignore[arg-type]  # transformers has wrong types for it


def encode(model: FineLIPModel, data: CaptionDataset, all_tokens: bool = False) -> EncodedPairs:
    """Images and texts of the miniature world, encoded."""
    processor = load_image_processor(BASE, model.config.vision_config.image_size)
    tokenizer = load_tokenizer(BASE, positions=num_positions(model))
    return encode_pairs(model, data, tokenizer, processor, all_tokens=all_tokens, progress=False)


def rank(model: FineLIPModel, data: CaptionDataset, all_tokens: bool = False) -> Ranks:
    """The ranks of every image's text and of every text's image, by weight of global; by 1.0 alone without tokens."""
    encoded = encode(model, data, all_tokens)
    weights = (1.0,) if encoded.image_tokens is None else SWEEP
    of_images, of_texts = retrieval_ranks(encoded, weights, device=model.device)
    return {
        f"{weight:.1f}": dict(zip(DIRECTIONS, (rows.tolist(), columns.tolist()), strict=True))
        for weight, rows, columns in zip(weights, of_images, of_texts, strict=True)
    }


def hits(ranks: Ranks, weight: float, direction: str | None = None, family: int = FAMILY) -> np.ndarray | None:
    """The share of right first results in each family of scenes, by one direction or as the mean of both; (families,).

    None if the model has no such similarity.
    """
    found = ranks.get(f"{weight:.1f}")
    if found is None:
        return None
    chosen = DIRECTIONS if direction is None else (direction,)
    firsts = np.mean([np.asarray(found[name]) == 0 for name in chosen], axis=0)
    return np.asarray([firsts[at : at + family].mean() for at in range(0, len(firsts), family)])


def published_hits(ranks: Ranks) -> np.ndarray:
    """As `hits`, by the published score: fused, or global for a model without late interaction."""
    fused = hits(ranks, SIMILARITIES["fused"])
    found = hits(ranks, SIMILARITIES["global"]) if fused is None else fused
    assert found is not None
    return found


def mean_of(families: Sequence[np.ndarray]) -> Interval:
    """The mean in percent over families of several seeds, with the interval of the bootstrap over families."""
    found = mean_interval((100 * np.mean(families, axis=0)).tolist())
    assert found is not None
    return found


# Part 4


@torch.no_grad()
def slot_cosines(model: FineLIPModel, size: int) -> dict[str, float | None]:
    """The mean cosine of two different tokens of one image and of one text, refined and before.

    1 means that all refined tokens are the same. Class token and end token do not count.
    """
    data = MiniatureScenes("test", size)
    processor = load_image_processor(BASE, model.config.vision_config.image_size)
    pixels = processor([data.image(k) for k in range(size)], return_tensors="pt")["pixel_values"]
    image: Any = model.encode_image(pixels.to(model.device))
    tokenizer = load_tokenizer(BASE, positions=num_positions(model))
    text: Any = model.encode_text(tokenize(tokenizer, [data.captions(k)[0] for k in range(size)]).to(model.device))
    ends = text.mask.sum(dim=1) - 1
    found: dict[str, list[Tensor] | None] = {
        "images, all tokens": list(image.tokens[:, 1:]),
        "texts, all tokens": [row[:end] for row, end in zip(text.tokens, ends.tolist(), strict=True)],
        "images, refined": None if image.refined_tokens is None else list(image.refined_tokens[:, 1:]),
        "texts, refined": None if text.refined_tokens is None else list(text.refined_tokens[:, :-1]),
    }
    return {
        name: None if rows is None else float(np.mean([_alike(row) for row in rows])) for name, rows in found.items()
    }


def _alike(tokens: Tensor) -> float:
    """The mean cosine of two different tokens, (tokens, dim)."""
    unit = F.normalize(tokens.double(), dim=-1)
    count = len(unit)
    return float(((unit @ unit.T).sum() - count) / (count * (count - 1))) if count > 1 else float("nan")


def similarities_of_pairs(encoded: EncodedPairs, weight: float) -> Tensor:
    """The similarity of every text to its own image, (texts,)."""
    owners = encoded.image_of_text
    cosines = (encoded.image_embeds[owners] * encoded.text_embeds).sum(dim=-1)
    if weight == 1.0 or encoded.image_tokens is None or encoded.text_tokens is None:
        return cosines
    fine = []
    for some in torch.arange(len(owners)).split(_PAIRS):
        mask = None if encoded.text_mask is None else encoded.text_mask[some]
        tokens = encoded.image_tokens[owners[some]].float(), encoded.text_tokens[some].float()
        fine.append(encoded.compare(*tokens, text_mask=mask).diagonal())
    return torch.lerp(torch.cat(fine), cosines, weight)


def growth(model: FineLIPModel, size: int, all_tokens: bool = False) -> dict[str, dict[str, list[float]]]:
    """How similarity grows as a caption's sentences are added, by similarity and by number of steps: for each scene the
    correlation of step and similarity (HiMo@K, arXiv 2511.06653), and 1 where every step raises it.

    Keys are such as `"fused@4"`.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for count in PREFIXES:
        data = ChangedCaptions(MiniatureScenes("test", size), lambda caption, _, count=count: prefixes(caption, count))
        encoded = encode(model, data, all_tokens)
        for name, weight in SIMILARITIES.items():
            if name != "global" and encoded.image_tokens is None:
                continue
            rows = similarities_of_pairs(encoded, weight).reshape(size, count).double().numpy()
            found[f"{name}@{count}"] = {
                "correlation": [_correlation(row) for row in rows],
                "always": [float((np.diff(row) > 0).all()) for row in rows],
            }
    return found


def _correlation(values: np.ndarray) -> float:
    """Pearson's correlation of values and their places; 0 for values that are all equal."""
    steps = np.arange(len(values)) - (len(values) - 1) / 2
    centered = values - values.mean()
    length = np.sqrt(np.square(steps).sum() * np.square(centered).sum())
    return float(steps @ centered / length) if length > 0 else 0.0
