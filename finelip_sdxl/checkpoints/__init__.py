"""From weights of any layout to a `FineLIPModel`, and back."""

from finelip_sdxl.checkpoints.load import load_finelip, save_openai_layout

__all__ = ["load_finelip", "save_openai_layout"]
