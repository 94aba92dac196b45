"""Distances between two sets of pictures by their features: FID, KID and CMMD, with intervals.

torchmetrics has FID and KID, but none that takes weights, which their intervals need. The tests hold ours against it.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from finelip_sdxl.evaluation.intervals import Interval, bootstrap_counts, interval_of

CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0  # as in CMMD's paper
KID_DEGREE = 3
FID_RESAMPLES = 100  # each takes a decomposition of matrices
_NORMAL = 1.96  # standard deviations on each side of 95 %


def fid(real: Tensor, drawn: Tensor, real_weights: Tensor | None = None, drawn_weights: Tensor | None = None) -> float:
    """Returns the Fréchet distance between Gaussians of two sets' features.

    With fewer pictures than dimensions the covariances are singular, and the distance says little.

    Source: Heusel et al., arXiv 1706.08500.

    Args:
        real, drawn: features, (pictures, dim).
        real_weights, drawn_weights: how often each picture counts, (pictures,); once by default.

    Examples:
        >>> pictures = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
        >>> round(fid(pictures, pictures), 6), round(fid(pictures, pictures + 2), 6)
        (0.0, 16.0)
    """
    (mean, spread), (other_mean, other_spread) = _gaussian(real, real_weights), _gaussian(drawn, drawn_weights)
    # The trace of the root of Σ₁·Σ₂ is the sum of the singular values of R₁·R₂ᵀ, where Σ = Rᵀ·R.
    shared = torch.linalg.svdvals(spread @ other_spread.T).sum()
    return float((mean - other_mean).square().sum() + spread.square().sum() + other_spread.square().sum() - 2 * shared)


def kid(real: Tensor, drawn: Tensor) -> float:
    """Returns the squared maximum mean discrepancy by a cubic kernel, over all pairs and without bias.

    Source: Bińkowski et al., arXiv 1801.01401.

    Args:
        real, drawn: features, (pictures, dim), at least two of each.
    """
    return float(_discrepancy(*_kernels(real, drawn, "kid"), *_ones(real, drawn)))


def cmmd(real: Tensor, drawn: Tensor) -> float:
    """Returns 1,000 times the squared maximum mean discrepancy by a Gaussian kernel, over normalized features.

    It is the paper's estimate without bias; the published code takes the one with a bias of about 10 / pictures.

    Source: Jayasumana et al., arXiv 2401.09603.

    Args:
        real, drawn: features of a CLIP, (pictures, dim), at least two of each.
    """
    return float(_discrepancy(*_kernels(real, drawn, "cmmd"), *_ones(real, drawn)))


def distance_intervals(real: Tensor, drawn: Tensor, pictures_per_prompt: int = 1) -> dict[str, Interval]:
    """Returns `"fid"`, `"kid"` and `"cmmd"` with intervals.

    Both sets are drawn again, each for itself, and the pictures of a prompt stay together. FID of a resample is too
    large, since pictures are in it twice; so its interval is 1.96 of the resamples' standard deviations on each side.
    KID and CMMD leave out pairs of a picture with itself, and have the percentiles.

    Args:
        real: features of the data set's pictures, (prompts, dim).
        drawn: features of the drawn pictures, (prompts · pictures_per_prompt, dim), prompt by prompt.
        pictures_per_prompt: drawn pictures of each prompt.

    Raises:
        ValueError: there are fewer than two prompts.
    """
    prompts = len(real)
    if prompts < 2:
        raise ValueError(f"Distances compare sets of pictures, but there is {prompts}: pass at least two.")
    real, drawn = real.double().cpu(), drawn.double().cpu()
    weights = (
        torch.from_numpy(bootstrap_counts(prompts, seed=1)).double(),
        torch.from_numpy(bootstrap_counts(prompts, seed=2)).double().repeat_interleave(pictures_per_prompt, dim=1),
    )
    some = zip(*(rows[:FID_RESAMPLES] for rows in weights), strict=True)
    value, spread = fid(real, drawn), float(np.std([fid(real, drawn, *pair) for pair in some], ddof=1))
    found = {"fid": Interval(value, value - _NORMAL * spread, value + _NORMAL * spread, prompts)}
    for name in ("kid", "cmmd"):
        kernels = _kernels(real, drawn, name)
        resampled = _discrepancy(*kernels, *weights).numpy()
        found[name] = interval_of(float(_discrepancy(*kernels, *_ones(real, drawn))), resampled, prompts)
    return found


def _gaussian(features: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """The mean, (dim,), and a root R of the covariance, (≤ dim, dim), so that the covariance is Rᵀ·R."""
    features = features.double()
    weights = torch.ones(len(features), dtype=torch.float64) if weights is None else weights
    mean = weights @ features / weights.sum()
    centered = (features - mean) * (weights / (weights.sum() - 1)).sqrt()[:, None]
    return mean, torch.linalg.qr(centered, mode="r").R


def _ones(real: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ones(len(real), dtype=torch.float64), torch.ones(len(drawn), dtype=torch.float64)


def _kernels(real: Tensor, drawn: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Kernels among real pictures, among drawn ones, and between both."""
    kernel = _cubic if name == "kid" else _gauss
    real, drawn = real.double(), drawn.double()
    return kernel(real, real), kernel(drawn, drawn), kernel(real, drawn)


def _cubic(one: Tensor, other: Tensor) -> Tensor:
    return (one @ other.T / one.shape[1] + 1) ** KID_DEGREE


def _gauss(one: Tensor, other: Tensor) -> Tensor:
    distances = torch.cdist(F.normalize(one, dim=1), F.normalize(other, dim=1))
    return CMMD_SCALE * torch.exp(-distances.square() / (2 * CMMD_SIGMA**2))


def _discrepancy(
    among_real: Tensor, among_drawn: Tensor, between: Tensor, real_weights: Tensor, drawn_weights: Tensor
) -> Tensor:
    """The squared discrepancy of weighted pictures, (…, pictures), without pairs of a picture with itself: (…)."""
    pairs = real_weights.sum(-1) * drawn_weights.sum(-1)
    both = (real_weights @ between * drawn_weights).sum(-1) / pairs
    return _mean_of_pairs(among_real, real_weights) + _mean_of_pairs(among_drawn, drawn_weights) - 2 * both


def _mean_of_pairs(kernel: Tensor, weights: Tensor) -> Tensor:
    squares = weights.square()
    total = (weights @ kernel * weights).sum(-1) - squares @ kernel.diagonal()
    return total / (weights.sum(-1).square() - squares.sum(-1))
