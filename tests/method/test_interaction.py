"""Late interaction: parity with the published code and with a loop, in values, gradients, half precision and memory."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.clim import refined_similarity
from benchmarks.naive_clim import (
    compare_with_caption,
    late_interaction_loop,
    late_interaction_twice,
    refined_similarity_loop,
)
from finelip_sdxl import interaction, late_interaction
from tests.helpers.reference import reference_tensors
from tests.method.test_token_refinement import published_refinement, ragged_mask

TOLERANCE = {"atol": 1e-5, "rtol": 0}


def random_tokens(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def pair_by_pair(
    image_tokens: Tensor, text_tokens: Tensor, image_mask: Tensor | None = None, text_mask: Tensor | None = None
) -> Tensor:
    """The naive twin: a loop over images and captions, each without its padding."""
    images = [row if image_mask is None else row[image_mask[place]] for place, row in enumerate(image_tokens)]
    texts = [row if text_mask is None else row[text_mask[place]] for place, row in enumerate(text_tokens)]
    return torch.stack([torch.cat([compare_with_caption(image[None], text) for text in texts]) for image in images])


# (image lengths, text lengths); None for tokens without a mask.
CASES = [
    ([4], [5]),
    ([3, 1, 6], None),
    (None, [2, 9, 5, 1]),
    ([2, 6, 1], [7, 1, 3, 2]),
    (None, None),
]


def case_of(image_lengths: list[int] | None, text_lengths: list[int] | None, **options) -> tuple:
    """Tokens of 3 images and 4 texts, or as many as there are lengths, and their masks."""
    images = random_tokens(len(image_lengths or [0] * 3), max(image_lengths or [6]), 16, seed=1, **options)
    texts = random_tokens(len(text_lengths or [0] * 4), max(text_lengths or [9]), 16, seed=2, **options)
    masks = [None if lengths is None else ragged_mask(lengths) for lengths in (image_lengths, text_lengths)]
    return images, texts, *masks


@pytest.mark.parametrize("similarity", [refined_similarity, refined_similarity_loop])
def test_matches_the_published_implementation(similarity) -> None:
    case = reference_tensors("late_interaction")
    refinements = published_refinement("aggr_net"), published_refinement("cap_aggr_net")
    with torch.no_grad():
        fine = similarity(*refinements, case["image_tokens"], case["text_tokens"], case["lengths"])
    torch.testing.assert_close(fine, case["fine_similarity"], **TOLERANCE)


@pytest.mark.parametrize("block", [1, interaction._BLOCK])
@pytest.mark.parametrize(("image_lengths", "text_lengths"), CASES)
def test_equals_the_loop_in_values_and_gradients(image_lengths, text_lengths, block, monkeypatch) -> None:
    monkeypatch.setattr(interaction, "_BLOCK", block)  # 1: each image is a block of its own
    images, texts, *masks = case_of(image_lengths, text_lengths, dtype=torch.float64)
    learned = images.requires_grad_(), texts.requires_grad_()
    ours, naive = late_interaction(images, texts, *masks), pair_by_pair(images, texts, *masks)
    torch.testing.assert_close(ours, naive, atol=1e-10, rtol=0)
    direction = random_tokens(*ours.shape, seed=3, dtype=torch.float64)
    for one, other in zip(
        torch.autograd.grad(ours, learned, direction), torch.autograd.grad(naive, learned, direction), strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=0)


def test_the_benchmark_s_loop_is_the_same() -> None:
    images, texts, _, mask = case_of(None, [2, 9, 5, 1])
    loop = late_interaction_loop(images, texts, torch.tensor([2, 9, 5, 1]))
    torch.testing.assert_close(loop, late_interaction(images, texts, text_mask=mask))


@pytest.mark.parametrize(("image_lengths", "text_lengths"), CASES)
def test_gives_the_same_with_and_without_gradients(image_lengths, text_lengths) -> None:
    images, texts, *masks = case_of(image_lengths, text_lengths)
    assert torch.equal(
        late_interaction(images.requires_grad_(), texts, *masks), late_interaction(images, texts, *masks)
    )
    with torch.no_grad():
        assert not late_interaction(images, texts, *masks).requires_grad


def test_negative_cosines_count_a_tenth() -> None:
    image, text = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[-2.0, 0.0]]])
    torch.testing.assert_close(late_interaction(image, text), torch.tensor([[-0.2]]))
    torch.testing.assert_close(late_interaction(image, -text), torch.tensor([[2.0]]))


def test_padding_does_not_win_where_all_cosines_are_negative() -> None:
    image, text = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]]), torch.tensor([[[-1.0, 0.0], [1.0, 0.0]]])
    first = torch.tensor([[True, False]])
    torch.testing.assert_close(late_interaction(image, text, first, first), torch.tensor([[-0.2]]))


@pytest.mark.parametrize("content", [0.0, 1e30, float("nan")])
def test_padding_changes_nothing(content) -> None:
    images, texts, image_mask, text_mask = case_of([2, 6, 1], [7, 1, 3, 2])
    others = [
        torch.where(mask[..., None], tokens, content) for tokens, mask in ((images, image_mask), (texts, text_mask))
    ]
    expected = late_interaction(images, texts, image_mask, text_mask)
    torch.testing.assert_close(late_interaction(*others, image_mask, text_mask), expected)


def test_padding_learns_nothing() -> None:
    images, texts, image_mask, text_mask = case_of([2, 6, 1], [7, 1, 3, 2])
    images[~image_mask] = 0
    late_interaction(images.requires_grad_(), texts.requires_grad_(), image_mask, text_mask).sum().backward()
    assert not images.grad[~image_mask].any()
    assert not texts.grad[~text_mask].any()


def test_masks_may_be_numbers() -> None:
    images, texts, *masks = case_of([2, 6, 1], [7, 1, 3, 2])
    numbers = [mask.long() for mask in masks]
    assert torch.equal(late_interaction(images, texts, *numbers), late_interaction(images, texts, *masks))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("size", [1e4, 1e-4])
@pytest.mark.parametrize(("image_lengths", "text_lengths"), [CASES[3], CASES[4]])
def test_half_precision_neither_overflows_nor_vanishes(image_lengths, text_lengths, size, dtype, tolerance) -> None:
    images, texts, *masks = case_of(image_lengths, text_lengths)
    learned = [(size * tokens).to(dtype).requires_grad_() for tokens in (images, texts)]
    ours = late_interaction(*learned, *masks)
    assert ours.dtype == dtype
    exact = late_interaction(*(tokens.float() for tokens in learned), *masks)
    torch.testing.assert_close(ours.float(), exact, atol=tolerance, rtol=0)
    ours.sum().backward()
    assert all(tokens.grad.isfinite().all() for tokens in learned)


def test_zeros_as_padding_are_safe_in_half_precision() -> None:
    images, texts, image_mask, text_mask = case_of([2, 6, 1], [7, 1, 3, 2], dtype=torch.float16)
    images[~image_mask], texts[~text_mask] = 0, 0
    ours = late_interaction(images.requires_grad_(), texts.requires_grad_(), image_mask, text_mask)
    ours.sum().backward()
    assert all(tensor.isfinite().all() for tensor in (ours, images.grad, texts.grad))


def kept_bytes(function, *tensors: Tensor) -> int:
    """What the forward pass keeps for the backward pass, in distinct memory."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function(*tensors)
    assert result.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("block", [1, interaction._BLOCK])
def test_keeps_no_similarities_of_single_tokens(block, monkeypatch) -> None:
    monkeypatch.setattr(interaction, "_BLOCK", block)
    images, texts = random_tokens(20, 30, 8).requires_grad_(), random_tokens(24, 30, 8, seed=1).requires_grad_()
    of_single_tokens = 4 * 20 * 24 * 30 * 30
    inputs_and_result = images.nbytes + texts.nbytes + 4 * 20 * 24
    assert kept_bytes(late_interaction, images, texts) < 3 * inputs_and_result < of_single_tokens / 4
    assert kept_bytes(pair_by_pair, images, texts) > of_single_tokens  # so the count counts


class LargestTensor(TorchDispatchMode):
    """How many elements the largest tensor has that is made meanwhile."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None) -> Any:
        made = function(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(leaf.numel() for leaf in tree_leaves(made) if torch.is_tensor(leaf))])
        return made


def test_makes_nothing_larger_than_a_block_in_either_pass(monkeypatch) -> None:
    images, texts = random_tokens(20, 30, 8).requires_grad_(), random_tokens(24, 30, 8, seed=1).requires_grad_()
    block = 3 * 24 * 30 * 30
    monkeypatch.setattr(interaction, "_BLOCK", block)
    with LargestTensor() as largest:
        late_interaction(images, texts).sum().backward()
    assert images.grad is not None
    assert largest.elements == block


class Products(TorchDispatchMode):
    """How many multiplications matrix products make meanwhile."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None) -> Any:
        made = function(*args, **(kwargs or {}))
        if function in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
            self.count += made.numel() * args[0].shape[-1]
        return made


@pytest.mark.parametrize("block", [2 * 24 * 30 * 30, interaction._BLOCK])
def test_the_backward_pass_compares_nothing_again(block, monkeypatch) -> None:
    monkeypatch.setattr(interaction, "_BLOCK", block)
    images, texts = random_tokens(20, 30, 8).requires_grad_(), random_tokens(24, 30, 8, seed=1).requires_grad_()
    all_pairs = 20 * 30 * 24 * 30 * 8
    with Products() as products:
        scores = late_interaction(images, texts)
        assert products.count == all_pairs
        scores.sum().backward()
        assert products.count == 3 * all_pairs  # one for the images' gradients, one for the texts'
        late_interaction(images.detach(), texts).sum().backward()
        assert products.count == 5 * all_pairs


@pytest.mark.parametrize("tokens", [127, 128, 129, 300])
def test_places_of_many_tokens_are_kept_whole(tokens) -> None:
    images = random_tokens(2, tokens, 4, dtype=torch.float64).requires_grad_()
    texts = random_tokens(3, tokens + 1, 4, seed=1, dtype=torch.float64).requires_grad_()
    found = torch.autograd.grad(late_interaction(images, texts).sum(), (images, texts))
    expected = torch.autograd.grad(pair_by_pair(images, texts).sum(), (images, texts))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=0)


def test_the_benchmark_s_way_of_before_is_the_same() -> None:
    images, texts, _, mask = case_of(None, [2, 9, 5, 1], dtype=torch.float64)
    learned = images.requires_grad_(), texts.requires_grad_()
    ours, before = (way(images, texts, text_mask=mask) for way in (late_interaction, late_interaction_twice))
    assert torch.equal(ours, before)
    for one, other in zip(
        torch.autograd.grad(ours.sum(), learned), torch.autograd.grad(before.sum(), learned), strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=0)


def test_one_side_alone_may_learn() -> None:
    images, texts, *masks = case_of([2, 6, 1], [7, 1, 3, 2], dtype=torch.float64)
    both = [tokens.clone().requires_grad_() for tokens in (images, texts)]
    expected = torch.autograd.grad(late_interaction(*both, *masks).sum(), both)
    for side in (0, 1):
        pair = [images, texts]
        pair[side] = pair[side].clone().requires_grad_()
        assert torch.equal(torch.autograd.grad(late_interaction(*pair, *masks).sum(), pair[side])[0], expected[side])


def test_learns_under_autocast() -> None:
    images, texts, *masks = case_of([2, 6, 1], [7, 1, 3, 2])
    learned = images.requires_grad_(), texts.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        ours = late_interaction(*learned, *masks)
    torch.testing.assert_close(ours.float(), pair_by_pair(images, texts, *masks), atol=3e-2, rtol=0)
    exact = torch.autograd.grad(pair_by_pair(images, texts, *masks).sum(), learned)
    for one, other in zip(torch.autograd.grad(ours.sum(), learned), exact, strict=True):
        assert torch.cosine_similarity(one.flatten(), other.flatten(), dim=0) > 0.99


def test_blocks_are_as_large_as_promised(monkeypatch) -> None:
    sizes = []

    def compare(images: Tensor, texts: Tensor, *masks: Tensor | None) -> Tensor:
        sizes.append(images.shape[0] * images.shape[1] * texts.shape[0] * texts.shape[1])
        return images.new_zeros(len(images), len(texts))

    monkeypatch.setattr(interaction, "_compare", compare)
    monkeypatch.setattr(interaction, "_BLOCK", 1000)
    for images, texts in itertools.product((1, 7, 50), (1, 3)):
        sizes.clear()
        assert late_interaction(torch.ones(images, 10, 4), torch.ones(texts, 10, 4)).shape == (images, texts)
        assert max(sizes) <= 1000
        assert sum(sizes) == images * texts * 100


@pytest.mark.parametrize(
    ("images", "texts", "masks", "message"),
    [
        (torch.zeros(5, 4), torch.zeros(2, 5, 4), {}, r"image_tokens are \(5, 4\); expected \(images, tokens, dim\)"),
        (torch.zeros(2, 5, 4), torch.zeros(4), {}, r"text_tokens are \(4,\); expected \(texts, tokens, dim\)"),
        (torch.zeros(2, 5, 4), torch.zeros(2, 5, 3), {}, "image_tokens are 4 wide and text_tokens 3"),
        (
            torch.zeros(2, 5, 4),
            torch.zeros(3, 6, 4),
            {"image_mask": torch.ones(2, 6)},
            r"image_mask is \(2, 6\); expected \(2, 5\)",
        ),
        (
            torch.zeros(2, 5, 4),
            torch.zeros(3, 6, 4),
            {"text_mask": ragged_mask([6, 0, 1])},
            "text_mask has a row without any token",
        ),
    ],
)
def test_refuses_shapes_that_do_not_fit(images, texts, masks, message) -> None:
    with pytest.raises(ValueError, match=message):
        late_interaction(images, texts, **masks)


def one_pair(image: Tensor, text: Tensor, slope: float, pooling: str) -> Tensor:
    similarity = torch.nn.functional.cosine_similarity(image[:, None], text[None], dim=-1)
    similarity = torch.where(similarity > 0, similarity, slope * similarity)
    if pooling == "mean":
        return 2 * similarity.mean()
    return similarity.amax(dim=0).mean() + similarity.amax(dim=1).mean()


@pytest.mark.parametrize("block", [1, interaction._BLOCK])
@pytest.mark.parametrize(("slope", "pooling"), [(1.0, "max"), (0.0, "max"), (0.1, "mean"), (1.0, "mean")])
def test_what_the_ablations_compare_with_equals_the_loop(slope, pooling, block, monkeypatch) -> None:
    monkeypatch.setattr(interaction, "_BLOCK", block)
    images, texts, *masks = case_of([2, 6, 1], [7, 1, 3, 2], dtype=torch.float64)
    learned = [tokens.requires_grad_() for tokens in (images, texts)]
    ours = late_interaction(*learned, *masks, slope=slope, pooling=pooling)
    rows = [[tokens[mask] for tokens, mask in zip(*pair, strict=True)] for pair in zip(learned, masks, strict=True)]
    loop = torch.stack([torch.stack([one_pair(image, text, slope, pooling) for text in rows[1]]) for image in rows[0]])
    torch.testing.assert_close(ours, loop, atol=1e-10, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(late_interaction(*learned, *masks, slope=slope, pooling=pooling), ours)
    found, expected = (torch.autograd.grad(scores.square().sum(), learned) for scores in (ours, loop))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=0)


@pytest.mark.parametrize("options", [{"slope": -0.1}, {"slope": 1.5}, {"slope": float("nan")}, {"pooling": "median"}])
def test_refuses_other_slopes_and_poolings(options) -> None:
    with pytest.raises(ValueError, match=r"slope is .* and pooling .*; expected 0 to 1, and one of max, mean"):
        late_interaction(torch.ones(1, 2, 3), torch.ones(1, 2, 3), **options)
