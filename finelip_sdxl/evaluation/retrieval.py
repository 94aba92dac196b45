"""Retrieval of texts by images and of images by texts: Recall@1, 5 and 10 by FineLIP's similarities."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTokenizer

from finelip_sdxl.data import CaptionDataset, UnreadableImageError, tokenize
from finelip_sdxl.interaction import late_interaction
from finelip_sdxl.model import GLOBAL_WEIGHT, FineLIPImageOutput, FineLIPModel, FineLIPTextOutput, fine_tokens

RECALL_AT = (1, 5, 10)
SWEEP = tuple(step / 10 for step in range(11))
# Similarities that differ by less are ties: the last bits of a text's embedding depend on its batch.
TIE = 1e-6
BAR_AFTER_SECONDS = 2


@dataclass
class EncodedPairs:
    """Encoded images and texts, on the CPU.

    Attributes:
        image_embeds: (images, C), normalized, float32.
        text_embeds: (texts, C), likewise.
        image_of_text: (texts,), the row of each text's image.
        image_tokens: (images, 1 + K, C), refined, normalized, in the model's dtype; on a side without a refinement all
            tokens; None without a token refinement on either side.
        text_tokens: (texts, K + 1, C), likewise.
        text_mask: (texts, tokens), False at the padding of texts that are not refined; None otherwise.
        compare: `FineLIPModel.compare`, or another late interaction.
        unreadable: messages, one for each image that was left out with its captions.
    """

    image_embeds: Tensor
    text_embeds: Tensor
    image_of_text: Tensor
    image_tokens: Tensor | None = None
    text_tokens: Tensor | None = None
    text_mask: Tensor | None = None
    compare: Callable[..., Tensor] = late_interaction
    unreadable: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recall:
    """Recall@k by k: the share, 0 to 1, of queries with a match among their first k results."""

    image_to_text: dict[int, float]
    text_to_image: dict[int, float]


@dataclass(frozen=True)
class RetrievalResult:
    """The result of `evaluate_retrieval`; printed, a table in percent.

    Attributes:
        recall: recall by similarity: `"global"` (cosine of embeddings), and with a token refinement also `"fine"` (late
            interaction) and `"fused"` (0.8 · global + 0.2 · fine).
        fusion_sweep: recall by the weight of global in the fused similarity; empty unless it was asked for.
        images, texts: numbers of images and texts that were compared.
        unreadable: messages, one for each image that was left out with its captions.
    """

    recall: dict[str, Recall]
    fusion_sweep: dict[float, Recall]
    images: int
    texts: int
    unreadable: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Returns a dict for JSON: `["recall"]["fused"]["image_to_text"]["R@1"]`, shares from 0 to 1."""

        def plain(recalls: dict[Any, Recall]) -> dict[str, Any]:
            return {
                str(name): {
                    direction: {f"R@{k}": share for k, share in getattr(recall, direction).items()}
                    for direction in ("image_to_text", "text_to_image")
                }
                for name, recall in recalls.items()
            }

        return {
            "images": self.images,
            "texts": self.texts,
            "unreadable": list(self.unreadable),
            "recall": plain(self.recall),
            "fusion_sweep": plain(self.fusion_sweep),
        }

    def __str__(self) -> str:
        columns = "".join(f"{f'R@{k}':>7}" for k in RECALL_AT)
        width = len(columns)
        lines = [f"{'':8}{'image to text':>{width}}  {'text to image':>{width}}", f"{'':8}{columns}  {columns}"]
        lines += [_row(name, recall) for name, recall in self.recall.items()]
        if self.fusion_sweep:
            lines += ["weight of global:"]
            lines += [_row(f"{weight:.1f}", recall) for weight, recall in self.fusion_sweep.items()]
        return "\n".join(lines)


def evaluate_retrieval(
    model: FineLIPModel,
    data: CaptionDataset,
    tokenizer: CLIPTokenizer,
    image_processor: Callable[..., Any],
    *,
    fusion_sweep: bool = False,
    batch_size: int = 64,
    max_tokens: int | None = None,
    autocast: torch.dtype | None = None,
    all_tokens: bool = False,
    progress: bool = True,
) -> RetrievalResult:
    """Returns Recall@1, 5 and 10 of a model on images with captions, in both directions and by each similarity.

    An image counts by its best-ranked caption among all captions, and a caption by its image among all images. Ties
    count against the model.

    Source: FineLIP (arXiv 2504.01916), section 4.

    Args:
        model: the model, used on its device; without a token refinement only its global similarity is evaluated.
        data: images with one or several captions each.
        tokenizer: tokenizer of the model, see `finelip_sdxl.data.load_tokenizer`.
        image_processor: image processor of the model, see `finelip_sdxl.data.load_image_processor`.
        fusion_sweep: whether to evaluate the fused similarity with weights of 0.0, 0.1, … 1.0 for global as well.
        batch_size: number of images or texts that are encoded at a time.
        max_tokens: length to cut texts to, start and end token included; by default the model's positions.
        autocast: dtype of mixed precision; None for the model's own dtype.
        all_tokens: whether a model without a token refinement has a fine similarity too, of all its tokens.
        progress: whether to show a progress bar after two seconds.

    Raises:
        ValueError: `max_tokens` is not from 3 to the model's positions, the tokenizer has tokens that the model does
            not know, the model has no image tower, or no image can be read.

    Examples:
        >>> from finelip_sdxl import load_finelip
        >>> from finelip_sdxl.data import load_image_processor, load_tokenizer, open_dataset
        >>> name = "miniature-clip-1"
        >>> result = evaluate_retrieval(
        ...     load_finelip(name), open_dataset("miniature:5"), load_tokenizer(name), load_image_processor(name, 96)
        ... )
        >>> result.images, result.recall["global"].image_to_text[5]
        (5, 1.0)
    """
    encoded = encode_pairs(
        model,
        data,
        tokenizer,
        image_processor,
        batch_size=batch_size,
        max_tokens=max_tokens,
        autocast=autocast,
        all_tokens=all_tokens,
        progress=progress,
    )
    named = {"global": 1.0}
    sweep: Sequence[float] = ()
    if encoded.image_tokens is not None and encoded.text_tokens is not None:
        named |= {"fine": 0.0, "fused": GLOBAL_WEIGHT}
        sweep = SWEEP if fusion_sweep else ()
    weights = sorted({*named.values(), *sweep})
    ranks = retrieval_ranks(encoded, weights, device=model.device, progress=progress)
    recalls = {weight: Recall(*map(_recall, both)) for weight, *both in zip(weights, *ranks, strict=True)}
    return RetrievalResult(
        recall={name: recalls[weight] for name, weight in named.items()},
        fusion_sweep={weight: recalls[weight] for weight in sweep},
        images=len(encoded.image_embeds),
        texts=len(encoded.text_embeds),
        unreadable=encoded.unreadable,
    )


def encode_pairs(
    model: FineLIPModel,
    data: CaptionDataset,
    tokenizer: CLIPTokenizer,
    image_processor: Callable[..., Any],
    *,
    batch_size: int = 64,
    max_tokens: int | None = None,
    autocast: torch.dtype | None = None,
    all_tokens: bool = False,
    progress: bool = True,
) -> EncodedPairs:
    """Encodes all images and all their captions once, in evaluation mode and without gradients.

    Arguments and errors are as in `evaluate_retrieval`. An image that cannot be read is left out with its captions.
    """
    positions = model.text_model.embeddings.position_embedding.weight.shape[0]
    if max_tokens is not None and not 3 <= max_tokens <= positions:
        raise ValueError(f"max_tokens is {max_tokens}; expected from 3 to {positions}, the positions of this model.")
    if len(tokenizer) > (vocab_size := model.config.text_config.vocab_size):
        raise ValueError(
            f"The tokenizer has {len(tokenizer):,} tokens, but this model knows {vocab_size:,}: pass the model's own."
        )

    captions: list[tuple[str, ...]] = []  # captions of the readable images
    unreadable: list[str] = []

    def encode_images() -> Iterator[FineLIPImageOutput]:
        for start in _bar(range(0, len(data), batch_size), "images", progress):
            images = []
            for index in range(start, min(start + batch_size, len(data))):
                try:
                    images.append(data.image(index))
                except UnreadableImageError as error:
                    unreadable.append(str(error))
                else:
                    captions.append(data.captions(index))
            if images:
                pixel_values = image_processor(images, return_tensors="pt")["pixel_values"]
                yield model.encode_image(pixel_values.to(model.device, model.dtype))

    def encode_texts(texts: list[str]) -> Iterator[FineLIPTextOutput]:
        for start in _bar(range(0, len(texts), batch_size), "texts", progress):
            input_ids = tokenize(tokenizer, texts[start : start + batch_size], max_length=max_tokens or positions)
            yield model.encode_text(input_ids.to(model.device))

    is_fine = all_tokens or model.has_token_refinement
    with _evaluation_mode(model), torch.autocast(model.device.type, autocast, enabled=autocast is not None):
        image_embeds, image_tokens, _ = _gather(encode_images(), is_fine)
        if image_embeds is None:
            first = f"; the first: {unreadable[0]}" if unreadable else "."
            raise ValueError(f"None of {len(data)} images can be read, so there is nothing to evaluate{first}")
        texts = [text for texts in captions for text in texts]
        text_embeds, text_tokens, text_mask = _gather(encode_texts(texts), is_fine)
    if text_embeds is None:
        raise ValueError("The images have no captions, so there is nothing to evaluate.")
    return EncodedPairs(
        image_embeds=image_embeds,
        text_embeds=text_embeds,
        image_of_text=torch.arange(len(captions)).repeat_interleave(torch.tensor([len(texts) for texts in captions])),
        image_tokens=image_tokens,
        text_tokens=text_tokens,
        text_mask=text_mask,
        compare=model.compare,
        unreadable=tuple(unreadable),
    )


@torch.no_grad()
def retrieval_ranks(
    encoded: EncodedPairs,
    weights: Sequence[float] = (GLOBAL_WEIGHT,),
    *,
    block_size: int = 256,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> tuple[Tensor, Tensor]:
    """Returns the rank, from 0, of each image's best text, and of each text's image.

    Images and texts are compared block by block, so memory does not grow with their product. A rank is the number of
    wrong candidates that are at least as similar as the right one.

    Args:
        encoded: images and texts.
        weights: weights of global in the similarity, weight · global + (1 - weight) · fine; no effect without tokens.
        block_size: number of images, and of texts, on the device at a time; it does not change the ranks.
        device: device of the comparison.
        progress: whether to show a progress bar after two seconds.

    Returns:
        (weights, images) and (weights, texts), whole numbers, on the CPU.

    Examples:
        >>> pairs = EncodedPairs(torch.eye(3), torch.eye(3)[[0, 1, 1]], image_of_text=torch.arange(3))
        >>> of_images, of_texts = retrieval_ranks(pairs)  # the last image looks like no text, and its text like another
        >>> of_images.tolist(), of_texts.tolist()
        ([[0, 1, 2]], [[0, 0, 2]])
    """

    def similarity(images: Tensor, texts: Tensor) -> Tensor:
        """(weights, images, texts)"""
        cosine = encoded.image_embeds[images].to(device) @ encoded.text_embeds[texts].to(device).T
        if encoded.image_tokens is None or encoded.text_tokens is None:
            return cosine.expand(len(weights), -1, -1)
        # Compared in float32: in half precision too many similarities would be equal.
        image_tokens = encoded.image_tokens[images].to(device).float()
        text_tokens = encoded.text_tokens[texts].to(device).float()
        mask = None if encoded.text_mask is None else encoded.text_mask[texts].to(device)
        fine = encoded.compare(image_tokens, text_tokens, text_mask=mask)
        return torch.lerp(fine, cosine, torch.tensor(weights, device=device)[:, None, None])

    image_of_text = encoded.image_of_text
    images = torch.arange(len(encoded.image_embeds))
    texts = torch.arange(len(encoded.text_embeds))

    # The right candidates: each text's similarity to its image, and the best of an image's own texts.
    own = torch.cat(
        [
            similarity(image_of_text[some], some).diagonal(dim1=1, dim2=2)
            for some in torch.split(texts, 16)  # small blocks, since only the diagonal is used
        ],
        dim=1,
    ).cpu()
    best = own.new_full((len(weights), len(images)), float("-inf"))
    best = best.scatter_reduce(1, image_of_text.expand_as(own), own, "amax")

    of_images = torch.zeros_like(best, dtype=torch.long)
    of_texts = torch.zeros_like(own, dtype=torch.long)
    blocks = [(i, j) for j in torch.split(texts, block_size) for i in torch.split(images, block_size)]
    for i, j in _bar(blocks, "comparing", progress):
        block = similarity(i, j)
        others = (image_of_text[j] != i[:, None]).to(device)
        # Negated, instead of `>=`, so NaN counts against the model too.
        of_images[:, i] += (others & ~(block < best[:, i, None].to(device) - TIE)).sum(dim=2).cpu()
        of_texts[:, j] += (others & ~(block < own[:, None, j].to(device) - TIE)).sum(dim=1).cpu()
    return of_images, of_texts


def _recall(ranks: Tensor) -> dict[int, float]:
    return {k: (ranks < k).double().mean().item() for k in RECALL_AT}


def _row(name: str, recall: Recall) -> str:
    image_to_text, text_to_image = (
        "".join(f"{100 * shares[k]:7.1f}" for k in RECALL_AT) for shares in (recall.image_to_text, recall.text_to_image)
    )
    return f"{name:8}{image_to_text}  {text_to_image}"


def _gather(
    outputs: Iterator[FineLIPImageOutput] | Iterator[FineLIPTextOutput], is_fine: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Returns the embeddings of all batches, their tokens for late interaction, and the mask of these; embeddings and
    tokens normalized, all on the CPU, and None where there are none."""
    embeds: list[Tensor] = []
    tokens: list[Tensor] = []
    masks: list[Tensor] = []
    for output in outputs:
        if output.embeds is not None:
            embeds.append(F.normalize(output.embeds.float(), dim=-1).cpu())
        if is_fine:
            own, mask = fine_tokens(output)
            tokens.append(F.normalize(own.float(), dim=-1).to(own.dtype).cpu())
            masks += [] if mask is None else [mask.cpu()]
    longest = max((own.shape[1] for own in tokens), default=0)
    tokens = [F.pad(own, (0, 0, 0, longest - own.shape[1])) for own in tokens]
    masks = [F.pad(mask, (0, longest - mask.shape[1])) for mask in masks]
    return tuple(torch.cat(parts) if parts else None for parts in (embeds, tokens, masks))  # type: ignore[return-value]


@contextlib.contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Turns off gradients and dropout; afterward each module has its former mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _bar(steps: Sequence[Any], name: str, progress: bool) -> tqdm:
    return tqdm(steps, desc=name, delay=BAR_AFTER_SECONDS, disable=not progress, leave=False)
