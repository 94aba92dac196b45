"""The losses of FineLIP: the triplet margin loss of the paper, and CLIP's contrastive loss."""

import torch
import torch.nn.functional as F
from torch import Tensor

from finelip_sdxl.options import MARGIN


def triplet_margin_loss(similarity: Tensor, ids: Tensor, margin: float = MARGIN, hardest: bool = False) -> Tensor:
    """Returns the bidirectional triplet margin loss over a batch of pairs, summed.

    For each pair, max(0, margin + s(negative) - s(pair)) is summed over the texts that do not belong to its image, and
    over the images that do not belong to its text. With `hardest`, only the largest in each direction counts.

    Source: FineLIP (arXiv 2504.01916), section 3; hardest negatives as in VSE++ (arXiv 1707.05612).

    Args:
        similarity: (pairs, pairs), of image i and text j; the pairs are on the diagonal.
        ids: (pairs,), ids of the images: pairs of equal id are no negatives of each other.
        margin: the least difference between a pair's similarity and its negatives'.
        hardest: whether to count the hardest negative only.

    Returns:
        A scalar, of float32 at least, since a sum over a large batch exceeds float16; 0 for a single pair.

    Raises:
        ValueError: `similarity` is not square, or there is not one id for each pair.

    Examples:
        >>> similarity = torch.tensor([[0.9, 0.5], [0.8, 0.7]])
        >>> triplet_margin_loss(similarity, torch.tensor([0, 1]))  # 0.3 for the second image, 0.1 for the first text
        tensor(0.4000)
    """
    similarity = _check(similarity, ids)
    pairs = similarity.diagonal()
    same = ids[:, None] == ids[None]
    of_images = (margin + similarity - pairs[:, None]).clamp(min=0).masked_fill(same, 0)
    of_texts = (margin + similarity - pairs[None]).clamp(min=0).masked_fill(same, 0)
    if hardest:
        return of_images.amax(dim=1).sum() + of_texts.amax(dim=0).sum()
    return of_images.sum() + of_texts.sum()


def contrastive_loss(similarity: Tensor, ids: Tensor, scale: Tensor | float) -> Tensor:
    """Returns CLIP's loss over a batch: cross-entropy of each image among the texts and of each text among the images.

    Source: CLIP (arXiv 2103.00020), section 2.3.

    Args:
        similarity: (pairs, pairs), of image i and text j; the pairs are on the diagonal.
        ids: (pairs,), ids of the images: pairs of equal id are no negatives of each other.
        scale: factor of the similarities, the inverse of the softmax's temperature.

    Returns:
        A scalar of float32 at least, the mean over the pairs and both directions; 0 for a single pair.

    Raises:
        ValueError: `similarity` is not square, or there is not one id for each pair.

    Examples:
        >>> contrastive_loss(torch.eye(2), torch.tensor([0, 1]), scale=100.0)
        tensor(0.)
    """
    similarity = _check(similarity, ids)
    same = (ids[:, None] == ids[None]).fill_diagonal_(False)
    logits = (scale * similarity).masked_fill(same, float("-inf"))
    labels = torch.arange(len(ids), device=similarity.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def _check(similarity: Tensor, ids: Tensor) -> Tensor:
    if similarity.dim() != 2 or similarity.shape[0] != similarity.shape[1]:
        raise ValueError(f"similarity is {tuple(similarity.shape)}; expected (pairs, pairs).")
    if ids.shape != similarity.shape[:1]:
        raise ValueError(f"ids are {tuple(ids.shape)}; expected ({len(similarity)},), one for each pair.")
    return similarity.to(torch.promote_types(similarity.dtype, torch.float32))
