"""Stock SDXL, compel and FineLIP-SDXL side by side."""

from typing import TYPE_CHECKING, Any

from finelip_sdxl.comparison.settings import Settings, check_columns
from finelip_sdxl.options import COLUMNS

if TYPE_CHECKING:
    from finelip_sdxl.comparison.comparison import Comparison, Picture, label_pictures

__all__ = ["COLUMNS", "Comparison", "Picture", "Settings", "check_columns", "label_pictures"]


def __getattr__(name: str) -> Any:
    """The names that need torch, imported on first use: settings are checked without it."""
    if name in ("Comparison", "Picture", "label_pictures"):
        from finelip_sdxl.comparison import comparison

        return getattr(comparison, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
