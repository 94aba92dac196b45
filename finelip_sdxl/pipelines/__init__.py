"""Diffusers pipelines of SDXL that take prompts of any length."""

import re
from typing import Any, NoReturn

from diffusers.pipelines.auto_pipeline import (
    AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
    AUTO_INPAINT_PIPELINES_MAPPING,
    AUTO_TEXT2IMAGE_PIPELINES_MAPPING,
)

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
]


class _NoPAG:
    """An entry for Diffusers' search for pipelines with perturbed-attention guidance: an error, as none is here."""

    @classmethod
    def _get_signature_keys(cls, pipeline: Any) -> NoReturn:
        raise ValueError(
            "FineLIP-SDXL has no pipelines with perturbed-attention guidance (PAG): leave out enable_pag; or pass the"
            " embeddings from encode_prompt of this pipeline to Diffusers' own StableDiffusionXLPAGPipeline."
        )


# With these entries `AutoPipelineForImage2Image.from_pipe(pipe)` and its siblings return pipelines of this package.
for mapping, name, pipeline in (
    (AUTO_TEXT2IMAGE_PIPELINES_MAPPING, "finelip-sdxl", FineLIPSDXLPipeline),
    (AUTO_TEXT2IMAGE_PIPELINES_MAPPING, "finelip-sdxl-controlnet", FineLIPSDXLControlNetPipeline),
    (AUTO_TEXT2IMAGE_PIPELINES_MAPPING, "finelip-sdxl-controlnet-union", FineLIPSDXLControlNetUnionPipeline),
    (AUTO_IMAGE2IMAGE_PIPELINES_MAPPING, "finelip-sdxl", FineLIPSDXLImg2ImgPipeline),
    (AUTO_IMAGE2IMAGE_PIPELINES_MAPPING, "finelip-sdxl-controlnet", FineLIPSDXLControlNetImg2ImgPipeline),
    (AUTO_IMAGE2IMAGE_PIPELINES_MAPPING, "finelip-sdxl-controlnet-union", FineLIPSDXLControlNetUnionImg2ImgPipeline),
    (AUTO_INPAINT_PIPELINES_MAPPING, "finelip-sdxl", FineLIPSDXLInpaintPipeline),
    (AUTO_INPAINT_PIPELINES_MAPPING, "finelip-sdxl-controlnet", FineLIPSDXLControlNetInpaintPipeline),
    (AUTO_INPAINT_PIPELINES_MAPPING, "finelip-sdxl-controlnet-union", FineLIPSDXLControlNetUnionInpaintPipeline),
):
    mapping[name] = pipeline
    pag_name = re.sub(r"(Img2Img|Inpaint)?Pipeline$", r"PAG\1Pipeline", pipeline.__name__)
    no_pag: Any = type(pag_name, (_NoPAG,), {})
    mapping[f"{name}-pag"] = no_pag
