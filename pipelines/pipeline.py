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
    from finelip_sdxl.pipelines.calls import argument_names, refuse_unknown
    from finelip_sdxl.pipelines.encoder_swap import LOADING_ARGUMENTS
except ImportError as error:
    raise ImportError("This pipeline needs FineLIP-SDXL: run `pip install .` in a clone of its repository.") from error


# Diffusers wants exactly one visible pipeline class here, hence no import of the parent by name.
class FineLIPSDXLCustomPipeline(pipelines.FineLIPSDXLPipeline):
    """`FineLIPSDXLPipeline` that swaps its text encoders in `__init__`: Diffusers' own `from_pretrained` calls that."""

    def __init__(self, *args: Any, finelip: Any = None, finelip_2: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.swap_text_encoders(finelip, finelip_2)

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict[str, Any], ...]:
        """As the parent, which gets the arguments that Diffusers does not know. It would log unknown names alone.

        Raises:
            TypeError: an argument has an unknown name.
        """
        known = argument_names(cls, "__init__") | {*LOADING_ARGUMENTS}
        refuse_unknown(f"{cls.__name__}.from_pretrained", kwargs, known)
        return super().extract_init_dict(config_dict, **kwargs)
