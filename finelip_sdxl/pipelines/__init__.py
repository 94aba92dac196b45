"""Diffusers pipelines of SDXL that take prompts of any length."""

import re
from typing import Any, NoReturn

from diffusers.pipelines.auto_pipeline import (
    AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
    AUTO_INPAINT_PIPELINES_MAPPING,
    AUTO_TEXT2IMAGE_PIPELINES_MAPPING,
)

from finelip_sdxl.pipelines.any_pipeline import long_prompts
from finelip_sdxl.pipelines.long_prompt import LongPromptMixin
from finelip_sdxl.pipelines.stable_diffusion_xl import (
    FineLIPSDXLAdapterPipeline,
    FineLIPSDXLControlNetImg2ImgPipeline,
    FineLIPSDXLControlNetInpaintPipeline,
    FineLIPSDXLControlNetPipeline,
    FineLIPSDXLControlNetUnionImg2ImgPipeline,
    FineLIPSDXLControlNetUnionInpaintPipeline,
    FineLIPSDXLControlNetUnionPipeline,
    FineLIPSDXLImg2ImgPipeline,
    FineLIPSDXLInpaintPipeline,
    FineLIPSDXLPipeline,
)

__all__ = [
    "FineLIPSDXLAdapterPipeline",
    "FineLIPSDXLControlNetImg2ImgPipeline",
    "FineLIPSDXLControlNetInpaintPipeline",
    "FineLIPSDXLControlNetPipeline",
    "FineLIPSDXLControlNetUnionImg2ImgPipeline",
    "FineLIPSDXLControlNetUnionInpaintPipeline",
    "FineLIPSDXLControlNetUnionPipeline",
    "FineLIPSDXLImg2ImgPipeline",
    "FineLIPSDXLInpaintPipeline",
    "FineLIPSDXLPipeline",
    "LongPromptMixin",
    "long_prompts",
]


class _NoPAG:
    """An entry for Diffusers' search for pipelines with perturbed-attention guidance, where Diffusers has none."""

    @classmethod
    def _get_signature_keys(cls, pipeline: Any) -> NoReturn:
        raise ValueError(
            f"Diffusers has no {cls.__name__.replace('FineLIPSDXL', 'StableDiffusionXL')}: leave out enable_pag, or use"
            " perturbed-attention guidance (PAG) without this ControlNet."
        )


# With these entries `AutoPipelineForImage2Image.from_pipe(pipe)` and its siblings return pipelines of this package.
mappings: tuple[dict[str, Any], ...] = (
    AUTO_TEXT2IMAGE_PIPELINES_MAPPING,
    AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
    AUTO_INPAINT_PIPELINES_MAPPING,
)
for mapping in mappings:
    for kind in ("", "-controlnet", "-controlnet-union"):
        ours = long_prompts(mapping[f"stable-diffusion-xl{kind}"])
        mapping[f"finelip-sdxl{kind}"] = ours
        if f"stable-diffusion-xl{kind}-pag" in mapping:
            mapping[f"finelip-sdxl{kind}-pag"] = long_prompts(mapping[f"stable-diffusion-xl{kind}-pag"])
        else:
            pag_name = re.sub(r"(Img2Img|Inpaint)?Pipeline$", r"PAG\1Pipeline", ours.__name__)
            no_pag: Any = type(pag_name, (_NoPAG,), {})
            mapping[f"finelip-sdxl{kind}-pag"] = no_pag
