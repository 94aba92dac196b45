"""Other ways to compute late interaction: naively, in the manner of the published code, and block by block twice.

They are opponents of the package's own way in `clim.py`. The naive one, one caption after the other, is its oracle in
the tests.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from finelip_sdxl import TokenRefinement
from finelip_sdxl.interaction import _blocks, _compare, _normalize
from finelip_sdxl.options import NEGATIVE_SLOPE


def compare_with_caption(images: Tensor, caption: Tensor) -> Tensor:
    """Late interaction of (images, image tokens, dim) with one caption, (text tokens, dim): (images,)."""
    images = F.normalize(images, dim=-1)
    captions = F.normalize(caption, dim=-1).repeat(len(images), 1, 1)
    similarity = F.leaky_relu(captions @ images.mT, 0.1)  # (images, text tokens, image tokens)
    return similarity.max(dim=2).values.mean(dim=1) + similarity.max(dim=1).values.mean(dim=1)


def late_interaction_loop(image_tokens: Tensor, text_tokens: Tensor, lengths: Tensor) -> Tensor:
    """Late interaction of images with the first `lengths` tokens of each text: (images, texts)."""
    texts = zip(text_tokens, lengths.tolist(), strict=True)
    return torch.stack([compare_with_caption(image_tokens, text[:length]) for text, length in texts], dim=1)


def refined_similarity_loop(
    image_refinement: TokenRefinement,
    text_refinement: TokenRefinement,
    image_tokens: Tensor,
    text_tokens: Tensor,
    lengths: Tensor,
) -> Tensor:
    """Token refinement and late interaction: (images, texts). Lengths count the start and the end token."""
    few_of_images = image_refinement(image_tokens[:, 1:])
    columns = []
    for text, length in zip(text_tokens, lengths.tolist(), strict=True):
        few = text_refinement(text[None, : length - 1])[0]
        caption = torch.cat([few, text[length - 1 : length]])
        images = torch.cat([image_tokens[:, :1], few_of_images], dim=1)
        columns.append(compare_with_caption(images, caption))
    return torch.stack(columns, dim=1)


def late_interaction_twice(image_tokens: Tensor, text_tokens: Tensor, text_mask: Tensor | None = None) -> Tensor:
    """As the package's own, but every block is computed again in the backward pass, which keeps no places of maxima."""
    images, texts = _normalize(image_tokens), _normalize(text_tokens)
    compare = partial(_compare, slope=NEGATIVE_SLOPE)
    return torch.cat(
        [
            checkpoint(compare, images[rows], texts, None, text_mask, use_reentrant=False, preserve_rng_state=False)
            for rows in _blocks(images, texts)
        ]
    )
