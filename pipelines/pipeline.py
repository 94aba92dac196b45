"""The pipeline class of this folder for Diffusers' `custom_pipeline=`. It uses the installed package.

A script in a clone of the repository opens an SDXL with it::

    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(
        "stabilityai/stable-diffusion-xl-base-1.0", custom_pipeline="pipelines", trust_remote_code=True
    )
"""

from typing import Any

try:
    from finelip_sdxl import pipelines
except ImportError as error:
    raise ImportError("This pipeline needs FineLIP-SDXL: run `pip install .` in a clone of its repository.") from error


# Diffusers wants exactly one visible pipeline class here, hence no import of the parent by name.
class FineLIPSDXLCustomPipeline(pipelines.FineLIPSDXLPipeline):
    """`FineLIPSDXLPipeline` that swaps its text encoders in `__init__`, the one method that Diffusers calls."""

    def __init__(self, *args: Any, finelip: Any = None, finelip_2: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.swap_text_encoders(finelip, finelip_2)
