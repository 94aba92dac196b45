"""Adaptive token refinement: parity with the published code, masks, half precision."""

import pytest
import torch
from torch import Tensor

from finelip_sdxl import TokenRefinement
from tests.helpers.reference import reference_tensors


def published_refinement(name: str) -> TokenRefinement:
    """One of the two aggregators of the reference case, `aggr_net` or `cap_aggr_net`."""
    prefix = f"weight.{name}."
    weights = {
        key.removeprefix(prefix): weight
        for key, weight in reference_tensors("late_interaction").items()
        if key.startswith(prefix)
    }
    refinement = TokenRefinement(weights["weight.0.weight"].shape[0], weights["weight.3.weight"].shape[0])
    refinement.load_state_dict(weights, strict=True)
    return refinement


def random_refinement(dim: int = 32, num_tokens: int = 4) -> TokenRefinement:
    torch.manual_seed(0)
    refinement = TokenRefinement(dim, num_tokens)
    with torch.no_grad():
        refinement.weight[3].weight *= 10  # else all tokens weigh about the same
        refinement.scale.fill_(1.5)
    return refinement


def refine_one(refinement: TokenRefinement, tokens: Tensor) -> Tensor:
    """The naive twin: one sequence, (tokens, dim), one refined token after the other."""
    norm, narrow, gelu, score = refinement.weight
    scores = torch.stack([score(gelu(narrow(norm(token)))) * refinement.scale.squeeze() for token in tokens])
    refined = []
    for column in scores.T:
        weights = column.exp() / column.exp().sum()
        refined.append(sum(weight * token for weight, token in zip(weights, tokens, strict=True)))
    return torch.stack(refined)


def random_tokens(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)


def ragged_mask(lengths: list[int]) -> Tensor:
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


@pytest.mark.parametrize("name", ["aggr_net", "cap_aggr_net"])
def test_loads_and_saves_the_published_keys(name) -> None:
    refinement = published_refinement(name)
    assert refinement.state_dict().keys() == {
        *(f"weight.{layer}.{part}" for layer in (0, 1, 3) for part in ("weight", "bias")),
        "scale",
    }


def test_has_the_published_sizes() -> None:
    refinement = TokenRefinement(dim=768, num_tokens=39)
    assert refinement.weight[1].weight.shape == (153, 768)  # a fifth of 768, rounded down
    assert refinement.weight[3].weight.shape == (39, 153)
    assert torch.equal(refinement.scale, torch.ones(1, 1, 1))


@pytest.mark.parametrize("lengths", [[1], [6], [7, 2, 1, 5]])
def test_equals_its_naive_twin_in_values_and_gradients(lengths) -> None:
    refinement = random_refinement().double()
    tokens = random_tokens(len(lengths), max(lengths), 32).requires_grad_()
    learned = [tokens, *refinement.parameters()]
    ours = refinement(tokens, mask=ragged_mask(lengths))
    naive = torch.stack([refine_one(refinement, row[:length]) for row, length in zip(tokens, lengths, strict=True)])
    torch.testing.assert_close(ours, naive, atol=1e-10, rtol=0)
    direction = random_tokens(*ours.shape)
    for one, other in zip(
        torch.autograd.grad(ours, learned, direction), torch.autograd.grad(naive, learned, direction), strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=0)


def test_no_mask_is_a_mask_of_all() -> None:
    tokens = random_tokens(2, 5, 32, dtype=torch.float32)
    refinement = random_refinement()
    torch.testing.assert_close(refinement(tokens), refinement(tokens, mask=torch.ones(2, 5)))


def test_padding_changes_nothing_and_learns_nothing() -> None:
    mask = ragged_mask([3, 6])
    tokens = random_tokens(2, 6, 32, dtype=torch.float32)
    other = torch.where(mask[..., None], tokens, 1e4).requires_grad_()
    refined = random_refinement()(other, mask=mask)
    assert torch.equal(refined, random_refinement()(tokens, mask=mask))
    refined.pow(2).sum().backward()
    assert not other.grad[~mask].any()
    assert other.grad[mask].any(dim=-1).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_half_precision_of_large_tokens_stays_finite(dtype, masked) -> None:
    mask = ragged_mask([2, 40]) if masked else None
    tokens = (1e4 * random_tokens(2, 40, 32)).to(dtype).requires_grad_()
    refinement = random_refinement().to(dtype)
    refined = refinement(tokens, mask=mask)
    assert refined.dtype == dtype
    exact = random_refinement()(tokens.float(), mask=mask)
    assert torch.cosine_similarity(refined.float(), exact, dim=-1).min() > 0.99
    (refined / 1e4).mean().backward()
    assert all(learned.grad.isfinite().all() for learned in (tokens, *refinement.parameters()))


@pytest.mark.parametrize(("dim", "num_tokens"), [(4, 3), (64, 0)])
def test_refuses_sizes_that_leave_nothing(dim, num_tokens) -> None:
    with pytest.raises(ValueError, match=rf"dim={dim} and num_tokens={num_tokens}.*at least 5"):
        TokenRefinement(dim, num_tokens)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, 4), r"mask is \(2, 4\); expected \(2, 5\)"),
        (torch.tensor([[True] * 5, [False] * 5]), "row without any token"),
    ],
)
def test_refuses_masks_that_do_not_fit(mask, message) -> None:
    with pytest.raises(ValueError, match=message):
        random_refinement()(torch.zeros(2, 5, 32), mask=mask)
