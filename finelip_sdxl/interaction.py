"""Cross-modal late interaction (CLIM): texts and images compared token by token (FineLIP, section 3)."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

NEGATIVE_SLOPE = 0.1
# Similarities between single tokens in memory at a time: 16 MiB in float32.
_BLOCK = 2**22


def late_interaction(
    image_tokens: Tensor, text_tokens: Tensor, image_mask: Tensor | None = None, text_mask: Tensor | None = None
) -> Tensor:
    """Returns the similarity of each image and each text, token by token.

    It is the sum of two means: over the text's tokens, of each token's similarity to its best image token, and over the
    image's tokens, of each token's similarity to its best text token. The similarity of two tokens is LeakyReLU₀.₁ of
    their cosine.

    Images are compared block by block, and each block is computed again in the backward pass, so memory grows no faster
    than inputs and result.

    Source: FineLIP (arXiv 2504.01916), section 3.

    Args:
        image_tokens: (images, image tokens, dim); normalized here.
        text_tokens: (texts, text tokens, dim); normalized here.
        image_mask: (images, image tokens), True where a token counts, at least once in each row. None if all count.
        text_mask: (texts, text tokens), likewise.

    Returns:
        (images, texts), each entry between -0.2 and 2.

    Raises:
        ValueError: shapes do not match, or a mask has a row without any token.

    Example:
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
    images, texts = _normalize(image_tokens), _normalize(text_tokens)
    rows = max(1, _BLOCK // (images.shape[1] * texts.shape[0] * texts.shape[1]))
    blocks = []
    for start in range(0, len(images), rows):
        block = slice(start, start + rows)
        mask = None if image_mask is None else image_mask[block]
        if torch.is_grad_enabled() and (images.requires_grad or texts.requires_grad):
            blocks.append(
                checkpoint(
                    _compare, images[block], texts, mask, text_mask, use_reentrant=False, preserve_rng_state=False
                )
            )
        else:
            blocks.append(_compare(images[block], texts, mask, text_mask))
    return torch.cat(blocks)


def _compare(images: Tensor, texts: Tensor, image_mask: Tensor | None, text_mask: Tensor | None) -> Tensor:
    """`late_interaction` of normalized tokens, in one block."""
    similarity = torch.einsum("ivc,jtc->ivjt", images, texts)
    for_texts, for_images = similarity, similarity
    # -2 is below every cosine, and far from an overflow in half precision.
    if image_mask is not None:
        for_texts = similarity.masked_fill(~image_mask[:, :, None, None], -2)
    if text_mask is not None:
        for_images = similarity.masked_fill(~text_mask[None, None], -2)
    # LeakyReLU is increasing, so it commutes with the maximum, and has fewer numbers to transform after it.
    of_texts = F.leaky_relu(for_texts.amax(dim=1), NEGATIVE_SLOPE)  # (images, texts, text tokens)
    of_images = F.leaky_relu(for_images.amax(dim=3), NEGATIVE_SLOPE)  # (images, image tokens, texts)
    return _mean(of_texts, None if text_mask is None else text_mask[None], dim=2) + _mean(
        of_images, None if image_mask is None else image_mask[..., None], dim=1
    )


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
