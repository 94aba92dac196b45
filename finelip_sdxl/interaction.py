"""Cross-modal late interaction (CLIM): texts and images compared token by token (FineLIP, section 3)."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from finelip_sdxl.options import NEGATIVE_SLOPE, POOLING, Pooling

# Similarities between single tokens in memory at a time: 16 MiB in float32.
_BLOCK = 2**22


def late_interaction(
    image_tokens: Tensor,
    text_tokens: Tensor,
    image_mask: Tensor | None = None,
    text_mask: Tensor | None = None,
    *,
    slope: float = NEGATIVE_SLOPE,
    pooling: Pooling = "max",
) -> Tensor:
    """Returns the similarity of each image and each text, token by token.

    It is the sum of two means: over the text's tokens, of each token's similarity to its best image token, and over the
    image's tokens, of each token's similarity to its best text token. The similarity of two tokens is LeakyReLU₀.₁ of
    their cosine.

    Images are compared block by block. For the backward pass each token of a pair keeps the place of its best one, in
    one byte up to 128 tokens, or else in two; nothing is computed again there.

    Source: FineLIP (arXiv 2504.01916), section 3.

    Args:
        image_tokens: (images, image tokens, dim); normalized here.
        text_tokens: (texts, text tokens, dim); normalized here.
        image_mask: (images, image tokens), True where a token counts, at least once in each row. None if all count.
        text_mask: (texts, text tokens), likewise.
        slope: slope of the LeakyReLU below 0, from 0 to 1; 1 leaves the cosine as it is.
        pooling: `"max"` for each token's best partner, as published; `"mean"` for the mean over all partners, which the
            paper compares it with. The mean keeps all similarities of single tokens for the backward pass.

    Returns:
        (images, texts), each entry between -2 · slope and 2.

    Raises:
        ValueError: shapes do not match, a mask has a row without any token, or an option has another value.

    Examples:
        >>> image = torch.eye(3)[None]               # one image of three orthogonal tokens
        >>> texts = torch.eye(3)[:, None]            # three texts of one token each
        >>> late_interaction(image, texts)           # 1, the text token's best, plus the mean of (1, 0, 0)
        tensor([[1.3333, 1.3333, 1.3333]])
    """
    image_mask = _check("image", image_tokens, image_mask)
    text_mask = _check("text", text_tokens, text_mask)
    if image_tokens.shape[-1] != text_tokens.shape[-1]:
        raise ValueError(
            f"image_tokens are {image_tokens.shape[-1]} wide and text_tokens {text_tokens.shape[-1]}; expected one dim."
        )
    if pooling not in POOLING or not 0 <= slope <= 1:
        raise ValueError(f"slope is {slope} and pooling {pooling!r}; expected 0 to 1, and one of {', '.join(POOLING)}.")
    images, texts = _normalize(image_tokens), _normalize(text_tokens)
    if pooling == "mean":
        blocks = _blocks(images, texts)
        return torch.cat(
            [_mean_of_all(images[rows], texts, _rows(image_mask, rows), text_mask, slope) for rows in blocks]
        )
    if torch.is_grad_enabled() and (images.requires_grad or texts.requires_grad):
        scores: Tensor = _LateInteraction.apply(images, texts, image_mask, text_mask, slope)  # type: ignore[no-untyped-call]
        return scores
    blocks = _blocks(images, texts)
    return torch.cat([_compare(images[rows], texts, _rows(image_mask, rows), text_mask, slope) for rows in blocks])


class _LateInteraction(torch.autograd.Function):
    """`late_interaction` of normalized tokens, with gradients.

    A pair's score depends on one similarity for each of its tokens, the largest. So the gradient of a block's
    similarities is zero but at these places, and two matrix products take it to the tokens.
    """

    @staticmethod
    def forward(
        ctx: Any, images: Tensor, texts: Tensor, image_mask: Tensor | None, text_mask: Tensor | None, slope: float
    ) -> Tensor:
        scores, places = [], []
        for rows in _blocks(images, texts):
            block, *found = _compare_and_find(images[rows], texts, _rows(image_mask, rows), text_mask, slope)
            scores.append(block)
            places += found
        ctx.save_for_backward(images, texts, image_mask, text_mask, *places)
        ctx.slope = slope
        device = images.device.type
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else images.dtype
        return torch.cat(scores)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        images, texts, image_mask, text_mask, *places = ctx.saved_tensors
        needs_images, needs_texts = ctx.needs_input_grad[:2]
        of_images, of_texts = torch.empty_like(images), torch.zeros_like(texts)
        gradient, all_texts = gradient.to(ctx.dtype), texts.to(ctx.dtype).flatten(0, 1)
        text_shares = _shares(texts, text_mask, ctx.dtype)
        for rows, for_texts, for_images in zip(_blocks(images, texts), places[::2], places[1::2], strict=True):
            block = images[rows].to(ctx.dtype)
            image_shares = _shares(block, _rows(image_mask, rows), ctx.dtype)
            of_pairs = gradient[rows, None, :, None]
            similarity = gradient.new_zeros(*block.shape[:2], *texts.shape[:2])
            _add_at(similarity, 1, for_texts, of_pairs * text_shares, ctx.slope)
            _add_at(similarity, 3, for_images, of_pairs * image_shares[:, :, None, None], ctx.slope)
            similarity = similarity.flatten(2).flatten(0, 1)  # (images · image tokens, texts · text tokens)
            if needs_images:
                of_images[rows] = (similarity @ all_texts).view_as(block)
            if needs_texts:
                of_texts += (similarity.T @ block.flatten(0, 1)).view_as(texts)
        return of_images if needs_images else None, of_texts if needs_texts else None, None, None, None


def _blocks(images: Tensor, texts: Tensor) -> Iterator[slice]:
    """The rows of images that are compared at once."""
    rows = max(1, _BLOCK // (images.shape[1] * texts.shape[0] * texts.shape[1]))
    return (slice(start, start + rows) for start in range(0, len(images), rows))


def _rows(mask: Tensor | None, rows: slice) -> Tensor | None:
    return None if mask is None else mask[rows]


def _compare(
    images: Tensor, texts: Tensor, image_mask: Tensor | None, text_mask: Tensor | None, slope: float
) -> Tensor:
    """`late_interaction` of normalized tokens, in one block."""
    for_texts, for_images = _similarities(images, texts, image_mask, text_mask)
    return _score(for_texts.amax(dim=1), for_images.amax(dim=3), image_mask, text_mask, slope)


def _mean_of_all(
    images: Tensor, texts: Tensor, image_mask: Tensor | None, text_mask: Tensor | None, slope: float
) -> Tensor:
    """As `_compare`, with the mean over all partners; both directions are then the same."""
    similarity = F.leaky_relu(torch.einsum("ivc,jtc->ivjt", images, texts), slope)
    of_images = _mean(similarity, None if text_mask is None else text_mask[None, None], dim=3)
    return 2 * _mean(of_images, None if image_mask is None else image_mask[..., None], dim=1)


def _compare_and_find(
    images: Tensor, texts: Tensor, image_mask: Tensor | None, text_mask: Tensor | None, slope: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_compare`; and the places of the maxima, (images, texts, text tokens) and (images, image tokens, texts)."""
    for_texts, for_images = _similarities(images, texts, image_mask, text_mask)
    of_texts, of_images = for_texts.max(dim=1), for_images.max(dim=3)
    scores = _score(of_texts.values, of_images.values, image_mask, text_mask, slope)
    return scores, _packed(*of_texts, images.shape[1]), _packed(*of_images, texts.shape[1])


def _similarities(
    images: Tensor, texts: Tensor, image_mask: Tensor | None, text_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Similarities of single tokens, (images, image tokens, texts, text tokens): among which the best image token is
    looked for, and the best text token."""
    similarity = torch.einsum("ivc,jtc->ivjt", images, texts)
    # -2 is below every cosine, and far from an overflow in half precision.
    return (
        similarity if image_mask is None else similarity.masked_fill(~image_mask[:, :, None, None], -2),
        similarity if text_mask is None else similarity.masked_fill(~text_mask[None, None], -2),
    )


def _score(
    of_texts: Tensor, of_images: Tensor, image_mask: Tensor | None, text_mask: Tensor | None, slope: float
) -> Tensor:
    """The score of the maxima, (images, texts, text tokens) and (images, image tokens, texts)."""
    # LeakyReLU is increasing, so it commutes with the maximum, and has fewer numbers to transform after it.
    return _mean(F.leaky_relu(of_texts, slope), None if text_mask is None else text_mask[None], dim=2) + _mean(
        F.leaky_relu(of_images, slope), None if image_mask is None else image_mask[..., None], dim=1
    )


def _packed(maxima: Tensor, places: Tensor, tokens: int) -> Tensor:
    """Places of maxima in the smallest type; those of maxima up to 0, which count less, are below 0."""
    kind = next(kind for kind in (torch.int8, torch.int16, torch.int32) if tokens - 1 <= torch.iinfo(kind).max)
    return torch.where(maxima > 0, places, ~places).to(kind)


def _add_at(similarity: Tensor, dim: int, packed: Tensor, gradient: Tensor, slope: float) -> None:
    """Add gradients of maxima over a dimension to those of the similarities at their places."""
    packed = packed.unsqueeze(dim)
    is_positive = packed >= 0
    slopes = torch.where(is_positive, gradient, gradient * slope)
    similarity.scatter_add_(dim, torch.where(is_positive, packed, ~packed).long(), slopes)


def _shares(tokens: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The share of each token in the mean of its row, (rows, tokens)."""
    counted = torch.ones(tokens.shape[:2], dtype=dtype, device=tokens.device) if mask is None else mask.to(dtype)
    return counted / counted.sum(dim=1, keepdim=True)


def _mean(values: Tensor, mask: Tensor | None, dim: int) -> Tensor:
    return values.mean(dim) if mask is None else values.masked_fill(~mask, 0).sum(dim) / mask.sum(dim)


def _normalize(tokens: Tensor) -> Tensor:
    # In float32 at least: in float16 the squares of large tokens overflow, and the guard against a zero norm vanishes.
    exact = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    return F.normalize(exact, dim=-1).to(tokens.dtype)


def _check(name: str, tokens: Tensor, mask: Tensor | None) -> Tensor | None:
    if tokens.dim() != 3:
        raise ValueError(f"{name}_tokens are {tuple(tokens.shape)}; expected ({name}s, tokens, dim).")
    if mask is None:
        return None
    if mask.shape != tokens.shape[:2]:
        raise ValueError(f"{name}_mask is {tuple(mask.shape)}; expected {tuple(tokens.shape[:2])}, as the tokens.")
    if not mask.any(dim=1).all():
        raise ValueError(f"{name}_mask has a row without any token; expected at least one in each.")
    return mask.bool()
