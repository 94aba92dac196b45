"""Stock SDXL, compel and FineLIP-SDXL side by side."""

from finelip_sdxl.comparison.comparison import Comparison, Picture, label_pictures
from finelip_sdxl.comparison.settings import Settings, check_columns
from finelip_sdxl.options import COLUMNS

__all__ = ["COLUMNS", "Comparison", "Picture", "Settings", "check_columns", "label_pictures"]
