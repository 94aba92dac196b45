"""FID, KID and CMMD: against torchmetrics, against loops, and what their intervals hold."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from finelip_sdxl.evaluation.distances import CMMD_SCALE, CMMD_SIGMA, cmmd, distance_intervals, fid, kid
from finelip_sdxl.evaluation.intervals import bootstrap_counts, interval_of, mean_interval


def features(count: int, dim: int = 6, seed: int = 0, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    return torch.randn(count, dim, generator=generator, dtype=torch.float64) @ mixing + shift


class Identity(nn.Identity):
    num_features = 6


@pytest.mark.parametrize("counts", [(50, 50), (40, 90)])
def test_fid_is_that_of_torchmetrics(counts) -> None:
    real, drawn = features(counts[0]), features(counts[1], seed=1, shift=0.3)
    metric = FrechetInceptionDistance(Identity()).set_dtype(torch.float64)
    metric.update(real, real=True)
    metric.update(drawn, real=False)
    assert fid(real, drawn) == pytest.approx(float(metric.compute()), rel=1e-5)


def test_kid_is_that_of_torchmetrics() -> None:
    real, drawn = features(60), features(60, seed=1, shift=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it keeps all features
        metric = KernelInceptionDistance(Identity(), subsets=1, subset_size=60)
    metric.update(real, real=True)
    metric.update(drawn, real=False)
    assert kid(real, drawn) == pytest.approx(float(metric.compute()[0]), rel=1e-5)


def test_cmmd_is_that_of_loops_over_pairs() -> None:
    real, drawn = features(9), features(12, seed=1, shift=0.5)

    def kernel(one: torch.Tensor, other: torch.Tensor) -> float:
        distance = (one / one.norm() - other / other.norm()).norm()
        return float(torch.exp(-(distance**2) / (2 * CMMD_SIGMA**2)))

    def mean(one: torch.Tensor, other: torch.Tensor, same: bool) -> float:
        pairs = [(i, j) for i in range(len(one)) for j in range(len(other)) if not (same and i == j)]
        return float(np.mean([kernel(one[i], other[j]) for i, j in pairs]))

    expected = CMMD_SCALE * (mean(real, real, True) + mean(drawn, drawn, True) - 2 * mean(real, drawn, False))
    assert cmmd(real, drawn) == pytest.approx(expected, rel=1e-6)


def test_weights_count_a_picture_that_often() -> None:
    real, drawn = features(20), features(20, seed=1, shift=0.3)
    weights = torch.from_numpy(bootstrap_counts(20)[0]).double()
    repeated = drawn.repeat_interleave(weights.long(), dim=0)
    assert fid(real, drawn, drawn_weights=weights) == pytest.approx(fid(real, repeated), rel=1e-9)


def test_fid_of_fewer_pictures_than_dimensions_is_a_number() -> None:
    assert np.isfinite(fid(features(4), features(5, seed=1)))


def test_intervals_hold_the_figures_and_sets_that_differ_lie_apart() -> None:
    real = features(80)
    near = distance_intervals(real, features(160, seed=1), pictures_per_prompt=2)
    far = distance_intervals(real, features(160, seed=2, shift=2.0), pictures_per_prompt=2)
    assert list(near) == ["fid", "kid", "cmmd"]
    for name, figure in near.items():
        assert figure.low <= figure.value <= figure.high, name
        assert figure.high < far[name].low, name
        assert figure.count == 80
    for name in ("kid", "cmmd"):  # without bias, equal distributions are at zero
        assert near[name].low < 0 < near[name].high


def test_intervals_are_the_same_every_time() -> None:
    assert distance_intervals(features(10), features(10, seed=1)) == distance_intervals(
        features(10), features(10, seed=1)
    )


@pytest.mark.parametrize("prompts", [2, 3])
def test_few_pictures_have_distances_without_an_interval(prompts: int) -> None:
    found = distance_intervals(features(prompts), features(prompts, seed=1))
    for name in ("kid", "cmmd"):  # most resamples have no pair of different pictures
        assert np.isfinite(found[name].value)
        assert (found[name].low, found[name].high) == (None, None)


def test_one_picture_is_no_set() -> None:
    with pytest.raises(ValueError, match="there is 1: pass at least two"):
        distance_intervals(features(1), features(1))


def test_the_interval_of_a_mean_is_that_of_its_standard_error() -> None:
    values = np.random.default_rng(0).normal(size=400)
    found = mean_interval(list(values))
    error = values.std(ddof=1) / 20
    # 1,000 resamples place the ends of an interval to within a tenth of its width.
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.3 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.3 * error)


def test_figures_of_no_prompt_or_one_have_no_interval() -> None:
    assert mean_interval([None, None]) is None
    found = mean_interval([None, 0.5])
    assert (found.value, found.low, found.high, found.count) == (0.5, None, None, 1)
    assert interval_of(1.0, [float("nan")], 5).low is None
