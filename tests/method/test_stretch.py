"""The knowledge-preserved stretch of a positional table."""

import itertools

import pytest
import torch

from finelip_sdxl import stretch_positions
from finelip_sdxl.stretch import stretched_row_indices
from tests.helpers.reference import reference_tensors


def random_table(rows: int, dim: int = 8, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(0)).to(dtype)


def test_matches_the_published_stretch() -> None:
    case = reference_tensors("stretch")
    torch.testing.assert_close(stretch_positions(case["positional_77"]), case["positional_248"], atol=1e-6, rtol=0)


@pytest.mark.parametrize(("rows", "keep"), [(2, 0), (2, 1), *itertools.product((21, 77, 120), (0, 1, 20))])
@pytest.mark.parametrize("factor", [1, 2, 4, 7])
def test_length_and_original_rows_for_any_shape(rows, keep, factor) -> None:
    table = random_table(rows)
    stretched = stretch_positions(table, keep=keep, factor=factor)
    assert stretched.shape == (keep + factor * (rows - keep), 8)
    assert torch.equal(stretched[stretched_row_indices(rows, keep, factor)], table)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_original_rows_are_exact_in_every_dtype(dtype) -> None:
    table = random_table(77, dtype=dtype)
    table[40] = -0.0
    recovered = stretch_positions(table)[stretched_row_indices(77)]
    assert recovered.dtype == dtype
    as_bytes = [part.contiguous().view(torch.uint8) for part in (recovered, table)]
    assert torch.equal(*as_bytes)


def test_interpolates_between_rows_and_continues_the_last_interval() -> None:
    table = torch.tensor([[0.0], [10.0], [14.0], [22.0]])
    stretched = stretch_positions(table, keep=1, factor=4).flatten().tolist()
    assert stretched == [0, 10, 11, 12, 13, 14, 16, 18, 20, 22, 24, 26, 28]


def test_the_last_row_alone_takes_its_slope_from_the_kept_rows() -> None:
    table = torch.tensor([[0.0], [1.0], [3.0]])
    assert stretch_positions(table, keep=2, factor=2).flatten().tolist() == [0, 1, 3, 4]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype) -> None:
    table = random_table(77, dtype=dtype)
    assert torch.equal(stretch_positions(table), stretch_positions(table.float()).to(dtype))


def test_leaves_its_argument_alone_and_shares_no_memory_with_it() -> None:
    table = random_table(77)
    before = table.clone()
    stretch_positions(table).zero_()
    assert torch.equal(table, before)


def test_indices_of_77_rows() -> None:
    indices = stretched_row_indices(77)
    assert indices.dtype == torch.int64
    assert indices[:22].tolist() == [*range(20), 20, 24]
    assert indices[-1] == 244


@pytest.mark.parametrize(
    ("table", "options", "message"),
    [
        (torch.zeros(77), {}, r"\(77,\).*\(positions, dim\)"),
        (torch.zeros(77, 4, dtype=torch.int64), {}, "int64.*floating"),
        (torch.zeros(1, 4), {"keep": 0}, "has 1 rows; expected at least 2"),
        (torch.zeros(77, 4), {"keep": 77}, "keep is 77;.*0 to 76"),
        (torch.zeros(77, 4), {"keep": -1}, "keep is -1"),
        (torch.zeros(77, 4), {"keep": 20.0}, "keep is 20.0; .* whole number from 0 to 76"),
        (torch.zeros(77, 4), {"keep": True}, "keep is True"),
        (torch.zeros(77, 4), {"factor": 0}, "factor is 0"),
        (torch.zeros(77, 4), {"factor": 1001}, "factor is 1001; .* whole number from 1 to 1000"),
        (torch.zeros(77, 4), {"factor": None}, "factor is None"),
    ],
)
def test_refuses_what_cannot_be_stretched(table, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        stretch_positions(table, **options)
