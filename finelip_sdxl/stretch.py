"""Knowledge-preserved stretching of a positional table: 77 rows become 248."""

from numbers import Integral

import torch
from torch import Tensor

from finelip_sdxl.options import STRETCH_FACTOR, STRETCH_KEEP

KEEP, FACTOR = STRETCH_KEEP, STRETCH_FACTOR
_LARGEST_FACTOR = 1000  # 57,020 positions from 77: more than any prompt needs


def stretch_positions(table: Tensor, keep: int = KEEP, factor: int = FACTOR) -> Tensor:
    """Stretch a positional table: keep its first rows, interpolate the others.

    The first `keep` rows are well trained (most captions are shorter) and stay as they are. After them, each interval
    between two neighbors is cut into `factor` equal steps, and the last row is continued with the slope of the last
    interval. Row r of the input is, bit for bit, row `stretched_row_indices(...)[r]` of the result.

    Source: Long-CLIP (arXiv 2403.15378, section 3.2), used by FineLIP (arXiv 2504.01916, section 3).

    Args:
        table: (positions, dim), of a floating dtype. Half precision is computed in float32 and cast back.
        keep: leading rows that stay, from 0 to positions - 1.
        factor: rows made of each later row, from 1 to 1000.

    Returns:
        (keep + factor * (positions - keep), dim), in the dtype of `table`. 77 rows become 248.

    Raises:
        ValueError: the table is no floating (positions >= 2, dim) tensor, or `keep` or `factor` is out of range.

    Examples:
        >>> stretch_positions(torch.arange(4.0).reshape(4, 1), keep=2, factor=2).flatten().tolist()
        [0.0, 1.0, 2.0, 2.5, 3.0, 3.5]
        >>> stretch_positions(torch.zeros(77, 768)).shape
        torch.Size([248, 768])
    """
    if table.ndim != 2 or not table.is_floating_point():
        raise ValueError(
            f"The positional table is {table.dtype} of shape {tuple(table.shape)}; expected a floating (positions, dim)"
            " tensor."
        )
    check_stretch(table.shape[0], keep, factor)

    exact = table.float() if table.dtype in (torch.float16, torch.bfloat16) else table
    rows = exact[keep:]
    slopes = torch.cat([rows[1:] - rows[:-1], exact[-1:] - exact[-2:-1]])
    fractions = torch.arange(1, factor, dtype=exact.dtype, device=exact.device).view(-1, 1) / factor
    between = rows.unsqueeze(1) + fractions * slopes.unsqueeze(1)
    # The rows themselves are copied: computed with a zero fraction, they would not stay exact (-0.0 becomes 0.0).
    stretched = torch.cat([rows.unsqueeze(1), between], dim=1).flatten(0, 1)
    return torch.cat([exact[:keep], stretched]).to(table.dtype)


def stretched_row_indices(num_positions: int, keep: int = KEEP, factor: int = FACTOR) -> Tensor:
    """Places of a table's rows in the stretched table, where they stand unchanged.

    `stretch_positions(table)[stretched_row_indices(len(table))]` is `table`, bit for bit. With these indices as
    `position_ids`, a stretched encoder encodes exactly as before the stretch.

    Args:
        num_positions: rows of the table before the stretch.
        keep: as in `stretch_positions`.
        factor: as in `stretch_positions`.

    Returns:
        (num_positions,), int64: 0 … keep - 1, then keep, keep + factor, keep + 2 * factor, …

    Raises:
        ValueError: an argument is out of range.

    Examples:
        >>> stretched_row_indices(5, keep=2, factor=4).tolist()
        [0, 1, 2, 6, 10]
    """
    check_stretch(num_positions, keep, factor)
    return torch.cat([torch.arange(keep), keep + factor * torch.arange(num_positions - keep)])


def check_stretch(num_positions: int, keep: int, factor: int) -> None:
    """Check that a table of `num_positions` rows can be stretched with this `keep` and `factor`.

    Raises:
        ValueError: an argument is no whole number, or out of range.

    Examples:
        >>> check_stretch(77, keep=20, factor=0)
        Traceback (most recent call last):
        ValueError: factor is 0; expected a whole number from 1 to 1000.
    """
    if not _is_whole(num_positions) or num_positions < 2:
        raise ValueError(f"The positional table has {num_positions!r} rows; expected at least 2, to stretch it.")
    if not _is_whole(keep) or not 0 <= keep < num_positions:
        raise ValueError(
            f"keep is {keep!r}; expected a whole number from 0 to {num_positions - 1}, for {num_positions} positions."
        )
    if not _is_whole(factor) or not 1 <= factor <= _LARGEST_FACTOR:
        raise ValueError(f"factor is {factor!r}; expected a whole number from 1 to {_LARGEST_FACTOR}.")


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
