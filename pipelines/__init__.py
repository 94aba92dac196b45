"""Diffusers pipelines of SDXL that read prompts of any length."""

from diffusers.pipelines.auto_pipeline import (
    AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
    AUTO_INPAINT_PIPELINES_MAPPING,
    AUTO_TEXT2IMAGE_PIPELINES_MAPPING,
)

from finelip_sdxl.pipelines.mixin import LongPromptMixin
from finelip_sdxl.pipelines.stable_diffusion_xl import (
    FineLIPSDXLControlNetPipeline,
    FineLIPSDXLImg2ImgPipeline,
    FineLIPSDXLInpaintPipeline,
    FineLIPSDXLPipeline,
)

__all__ = [
    "FineLIPSDXLControlNetPipeline",
    "FineLIPSDXLImg2ImgPipeline",
    "FineLIPSDXLInpaintPipeline",
    "FineLIPSDXLPipeline",
    "LongPromptMixin",
]

# So that `AutoPipelineForImage2Image.from_pipe(pipe)` and its siblings turn one of ours into another of ours.
AUTO_TEXT2IMAGE_PIPELINES_MAPPING["finelip-sdxl"] = FineLIPSDXLPipeline
AUTO_TEXT2IMAGE_PIPELINES_MAPPING["finelip-sdxl-controlnet"] = FineLIPSDXLControlNetPipeline
AUTO_IMAGE2IMAGE_PIPELINES_MAPPING["finelip-sdxl"] = FineLIPSDXLImg2ImgPipeline
AUTO_INPAINT_PIPELINES_MAPPING["finelip-sdxl"] = FineLIPSDXLInpaintPipeline
