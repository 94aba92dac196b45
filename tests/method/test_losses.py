"""The triplet margin loss and the contrastive loss, against loops over pairs."""

import math

import pytest
import torch
from torch import Tensor

from finelip_sdxl import contrastive_loss, triplet_margin_loss
from tests.helpers.reference import reference_tensors

IDS = torch.tensor([3, 5, 3, 8, 5])  # two images come twice


def random_similarity(pairs: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(pairs, pairs, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)


def triplet_loop(similarity: Tensor, ids: Tensor, margin: float, hardest: bool) -> Tensor:
    total = similarity.new_zeros(())
    for pair in range(len(ids)):
        negatives = [other for other in range(len(ids)) if ids[other] != ids[pair]]
        for row in (similarity, similarity.T):
            costs = [(margin + row[pair, other] - row[pair, pair]).clamp(min=0) for other in negatives]
            total = total + ((max(costs) if hardest else sum(costs)) if costs else 0)
    return total


def contrastive_loop(similarity: Tensor, ids: Tensor, scale: float) -> Tensor:
    terms = []
    for pair in range(len(ids)):
        candidates = [other for other in range(len(ids)) if other == pair or ids[other] != ids[pair]]
        for row in (similarity, similarity.T):
            exponentials = [(scale * row[pair, other]).exp() for other in candidates]
            terms.append(-(exponentials[candidates.index(pair)] / sum(exponentials)).log())
    return sum(terms) / len(terms)


def assert_same_gradient(one: Tensor, other: Tensor, similarity: Tensor) -> None:
    gradients = [torch.autograd.grad(loss, similarity)[0] for loss in (one, other)]
    torch.testing.assert_close(*gradients, atol=1e-10, rtol=0)


@pytest.mark.parametrize(("hardest", "expected"), [(False, "loss_sum"), (True, "loss_max")])
def test_matches_the_published_loss(hardest, expected) -> None:
    case = reference_tensors("late_interaction")
    loss = triplet_margin_loss(case["fine_similarity"], case["image_ids"], margin=0.2, hardest=hardest)
    torch.testing.assert_close(loss, case[expected].squeeze(), atol=1e-5, rtol=0)
    assert torch.equal(loss, triplet_margin_loss(case["fine_similarity"], case["image_ids"], hardest=hardest))


@pytest.mark.parametrize("hardest", [False, True])
@pytest.mark.parametrize("margin", [0.0, 0.2, 1.5])
@pytest.mark.parametrize("ids", [IDS, torch.arange(5)])
def test_triplet_margin_loss_equals_the_loop(ids, margin, hardest) -> None:
    similarity = random_similarity().requires_grad_()
    ours = triplet_margin_loss(similarity, ids, margin, hardest)
    naive = triplet_loop(similarity, ids, margin, hardest)
    torch.testing.assert_close(ours, naive, atol=1e-12, rtol=0)
    assert_same_gradient(ours, naive, similarity)


@pytest.mark.parametrize("ids", [IDS, torch.arange(5)])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_contrastive_loss_equals_the_loop(ids, scale) -> None:
    similarity = random_similarity().requires_grad_()
    ours, naive = contrastive_loss(similarity, ids, scale), contrastive_loop(similarity, ids, scale)
    torch.testing.assert_close(ours, naive, atol=1e-10, rtol=0)
    assert_same_gradient(ours, naive, similarity)


def test_the_scale_of_the_contrastive_loss_learns() -> None:
    log_scale = torch.zeros((), requires_grad=True)
    contrastive_loss(random_similarity(dtype=torch.float32), IDS, log_scale.exp()).backward()
    assert log_scale.grad != 0


@pytest.mark.parametrize("ids", [torch.tensor([7]), torch.tensor([7, 7, 7])])
def test_pairs_without_negatives_cost_nothing(ids) -> None:
    similarity = random_similarity(len(ids)).requires_grad_()
    losses = [
        triplet_margin_loss(similarity, ids),
        triplet_margin_loss(similarity, ids, hardest=True),
        contrastive_loss(similarity, ids, 100.0),
    ]
    assert losses == [0, 0, 0]
    assert not torch.autograd.grad(sum(losses), similarity)[0].any()


def test_pairs_that_surpass_their_negatives_by_the_margin_cost_nothing() -> None:
    similarity = 0.21 * torch.eye(4)
    assert triplet_margin_loss(similarity, torch.arange(4)) == 0
    assert triplet_margin_loss(similarity, torch.arange(4), margin=0.22) == pytest.approx(24 * 0.01)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_batches_in_half_precision_do_not_overflow(dtype) -> None:
    similarity = torch.zeros(600, 600, dtype=dtype, requires_grad=True)
    ids = torch.arange(600)
    loss = triplet_margin_loss(similarity, ids)
    assert loss.item() == pytest.approx(0.2 * 2 * 600 * 599)  # more than float16 holds
    loss.backward()
    assert similarity.grad.isfinite().all()
    assert contrastive_loss(similarity, ids, 100.0).item() == pytest.approx(math.log(600), rel=1e-4)


@pytest.mark.parametrize("loss", [triplet_margin_loss, lambda *inputs: contrastive_loss(*inputs, 1.0)])
@pytest.mark.parametrize(
    ("shape", "ids", "message"),
    [
        ((3, 4), torch.arange(3), r"similarity is \(3, 4\); expected \(pairs, pairs\)"),
        ((3,), torch.arange(3), r"similarity is \(3,\)"),
        ((3, 3), torch.arange(4), r"ids are \(4,\); expected \(3,\)"),
        ((3, 3), torch.zeros(3, 1), r"ids are \(3, 1\)"),
    ],
)
def test_refuses_shapes_that_do_not_fit(loss, shape, ids, message) -> None:
    with pytest.raises(ValueError, match=message):
        loss(torch.zeros(shape), ids)
