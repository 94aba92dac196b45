"""Fidelity of pictures to long texts, as a CLIP judges it: of whole texts, and sentence by sentence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTokenizer

from finelip_sdxl.checkpoints.load import load_finelip
from finelip_sdxl.data.caption_dataset import split_sentences
from finelip_sdxl.data.preprocessing import load_image_processor, load_tokenizer, tokenize
from finelip_sdxl.model import FineLIPModel
from finelip_sdxl.options import STOCK_POSITIONS

CONTENT = STOCK_POSITIONS - 2  # tokens that stock reads of a prompt, beside start and end token
_Item = TypeVar("_Item")
PARTS = ("all", "before", "after")  # sentences or objects: all; read whole by stock's 77 positions; past them


@dataclass(frozen=True)
class Judge:
    """A CLIP with its tokenizer and image processor, on its device, in float32.

    Attributes:
        name: the name that it was loaded by.
    """

    name: str
    model: FineLIPModel
    image_processor: Callable[..., Any]
    tokenizer: CLIPTokenizer | None = None

    @property
    def positions(self) -> int:
        """Number of tokens that its text encoder takes at most, start and end token included."""
        return int(self.model.text_model.embeddings.position_embedding.weight.shape[0])

    @property
    def dim(self) -> int:
        """Width of its embeddings."""
        assert self.model.visual_projection is not None
        return int(self.model.visual_projection.weight.shape[0])

    def is_encoder(self, encoder: nn.Module) -> bool:
        """Whether a text encoder has the weights of this judge's, positions apart, which a stretch changes."""
        own = self.model.text_model.state_dict()
        other = getattr(encoder, "text_model", encoder).state_dict()
        if own.keys() != other.keys():
            return False
        names = [name for name in own if "position" not in name]
        return all(
            own[name].shape == other[name].shape
            and torch.equal(own[name].cpu().to(other[name].dtype), other[name].detach().cpu())
            for name in names
        )


def open_judge(name: str, role: str, tokenizer: str | None = None) -> Judge:
    """Loads a CLIP on the CPU for a role.

    Args:
        name: as for `load_finelip`. Its positions are not stretched.
        role: `"features"`, for an image tower; `"judge"`, for one of whole texts, which needs 248 positions;
            `"sentence_judge"`, for one of sentences, which is a stock CLIP of 77 positions.
        tokenizer: as for `load_tokenizer`; by default the one of `name`.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no CLIP, or not of this role's kind.
    """
    model = load_finelip(name, factor=1, dtype=torch.float32)
    if model.vision_model is None or model.visual_projection is None:
        raise ValueError(f"`{role}` {name} has no image tower: pass a whole CLIP, not a text encoder alone.")
    judge = Judge(name, model, load_image_processor(name, model.vision_model.config.image_size))
    image_embeddings(
        judge, [Image.new("RGB", (64, 64))]
    )  # an image processor of another size fails now, not at the end
    if role == "features":
        return judge
    if role == "judge" and judge.positions <= STOCK_POSITIONS:
        raise ValueError(
            f"`{role}` {name} takes {judge.positions} tokens, and would judge a long prompt by its beginning: pass a"
            " FineLIP or Long-CLIP of 248, or pass it for single sentences."
        )
    if role == "sentence_judge" and judge.positions != STOCK_POSITIONS:
        raise ValueError(
            f"`{role}` {name} takes {judge.positions} tokens; expected a stock CLIP of {STOCK_POSITIONS}, so that the"
            " judge is nobody's own."
        )
    words = load_tokenizer(tokenizer or name, judge.positions)
    if len(words) > (known := model.config.text_config.vocab_size):
        raise ValueError(
            f"The tokenizer of `{role}` {name} has {len(words):,} tokens, but the model knows {known:,}: pass its own."
        )
    return Judge(name, model, judge.image_processor, words)


def image_embeddings(judge: Judge, images: Iterable[Image.Image], batch_size: int = 32) -> Tensor:
    """Returns the projected embeddings of images, not normalized, on the CPU: (images, dim)."""
    found = []
    for batch in _batches(images, batch_size):
        pixels = judge.image_processor(batch, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            embeds = judge.model.encode_image(pixels.to(judge.model.device)).embeds
        assert embeds is not None
        found.append(embeds.float().cpu())
    return torch.cat(found) if found else torch.zeros(0, judge.dim)


def text_embeddings(judge: Judge, texts: Sequence[str], batch_size: int = 32) -> Tensor:
    """Returns the projected embeddings of texts, not normalized, on the CPU: (texts, dim)."""
    assert judge.tokenizer is not None
    found = []
    for batch in _batches(texts, batch_size):
        ids = tokenize(judge.tokenizer, batch)
        with torch.no_grad():
            embeds = judge.model.encode_text(ids.to(judge.model.device)).embeds
        assert embeds is not None
        found.append(embeds)
    return torch.cat(found).float().cpu()


def count_tokens(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> list[int]:
    """Returns the number of tokens of each text, without start and end token."""
    return [len(ids) for ids in tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids]


def text_fidelity(judge: Judge, texts: Sequence[str], images: Tensor) -> list[float | None]:
    """Returns the cosine of each text and its pictures, averaged over the pictures.

    Args:
        judge: a judge of whole texts.
        texts: texts; one that the judge would cut has None.
        images: (texts, pictures, dim), see `image_embeddings`.
    """
    assert judge.tokenizer is not None
    fits = [count + 2 <= judge.positions for count in count_tokens(judge.tokenizer, texts)]
    found: list[float | None] = [None] * len(texts)
    chosen = [index for index, fit in enumerate(fits) if fit]
    if chosen:
        cosines = _cosines(text_embeddings(judge, [texts[index] for index in chosen]), images[chosen])
        for index, cosine in zip(chosen, cosines.tolist(), strict=True):
            found[index] = cosine
    return found


@dataclass(frozen=True)
class Sentence:
    """A sentence of a prompt: its text, and its part in `PARTS`; None across token 77."""

    text: str
    part: str | None


def sentences_of(tokenizer: CLIPTokenizer, text: str) -> tuple[list[Sentence], int]:
    """Returns the sentences of a text that stock's 77 positions take, and the number of longer ones.

    Examples:
        >>> from finelip_sdxl.data import load_tokenizer
        >>> found, too_long = sentences_of(load_tokenizer("miniature-clip-1", 77), "A red star. " * 30)
        >>> [found[index].part for index in (0, 29)], too_long
        (['before', 'after'], 0)
    """
    texts = split_sentences(text)
    counts = count_tokens(tokenizer, texts)
    ends = list(accumulate(counts))
    sentences = [
        Sentence(sentence, part_of(end - count, end))
        for sentence, count, end in zip(texts, counts, ends, strict=True)
        if 0 < count <= CONTENT
    ]
    return sentences, sum(count > CONTENT for count in counts)


def part_of(start: int, end: int) -> str | None:
    """Returns whether stock's 77 positions read the tokens from `start` up to `end`, counted without the start token.

    Returns:
        `"before"` for all of them, `"after"` for none, None for some.
    """
    return "before" if end <= CONTENT else "after" if start >= CONTENT else None


def sentence_fidelity(
    judge: Judge, sentences: Sequence[Sequence[Sentence]], images: Tensor
) -> dict[str, list[float | None]]:
    """Returns for each of `PARTS` the cosines of each text's sentences and its pictures, averaged over both.

    Source: Denscore, LongAlign (arXiv 2410.11817), which averages embeddings; this averages cosines.

    Args:
        judge: a judge of sentences.
        sentences: sentences of each text; a text without any has None.
        images: (texts, pictures, dim), see `image_embeddings`.
    """
    owners = [index for index, own in enumerate(sentences) for _ in own]
    flat = [sentence for own in sentences for sentence in own]
    cosines = _cosines(text_embeddings(judge, [one.text for one in flat]), images[owners]).tolist() if flat else []
    found: dict[str, list[float | None]] = {}
    for part in PARTS:
        values: list[list[float]] = [[] for _ in sentences]
        for owner, sentence, cosine in zip(owners, flat, cosines, strict=True):
            if part in ("all", sentence.part):
                values[owner].append(cosine)
        found[part] = [sum(own) / len(own) if own else None for own in values]
    return found


def _cosines(texts: Tensor, images: Tensor) -> Tensor:
    """(texts,), averaged over the pictures of each."""
    products: Tensor = F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1)[:, :, None]
    return products[..., 0].mean(dim=1)


def _batches(items: Iterable[_Item], size: int) -> Iterator[list[_Item]]:
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch
