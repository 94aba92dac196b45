"""Diffusers pipelines of SDXL that read prompts of any length."""

from diffusers.pipelines.auto_pipeline import (
    AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
    AUTO_INPAINT_PIPELINES_MAPPING,
    AUTO_TEXT2IMAGE_PIPELINES_MAPPING,
)

from finelip_sdxl.pipelines.mixin import LongPromptMixin
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

# So that `AutoPipelineForImage2Image.from_pipe(pipe)` and its siblings turn one of ours into another of ours.
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
