"""The reference cases in `tests/reference/` (its README says what they hold)."""

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

REFERENCE = Path(__file__).parents[1] / "reference"


def reference_tensors(name: str) -> dict[str, Tensor]:
    """The tensors of one file, e.g. `reference_tensors("stretch")`."""
    return load_file(REFERENCE / f"{name}.safetensors")
