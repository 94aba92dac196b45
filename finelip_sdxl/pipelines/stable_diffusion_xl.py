"""The pipelines: Diffusers' own, for prompts of any length."""

# From their modules: under their short names, type checkers and editors see classes without methods.
from diffusers.pipelines.controlnet.pipeline_controlnet_inpaint_sd_xl import StableDiffusionXLControlNetInpaintPipeline
from diffusers.pipelines.controlnet.pipeline_controlnet_sd_xl import StableDiffusionXLControlNetPipeline
from diffusers.pipelines.controlnet.pipeline_controlnet_sd_xl_img2img import StableDiffusionXLControlNetImg2ImgPipeline
from diffusers.pipelines.controlnet.pipeline_controlnet_union_inpaint_sd_xl import (
    StableDiffusionXLControlNetUnionInpaintPipeline,
)
from diffusers.pipelines.controlnet.pipeline_controlnet_union_sd_xl import StableDiffusionXLControlNetUnionPipeline
from diffusers.pipelines.controlnet.pipeline_controlnet_union_sd_xl_img2img import (
    StableDiffusionXLControlNetUnionImg2ImgPipeline,
)
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl_img2img import (
    StableDiffusionXLImg2ImgPipeline,
)
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl_inpaint import (
    StableDiffusionXLInpaintPipeline,
)
from diffusers.pipelines.t2i_adapter.pipeline_stable_diffusion_xl_adapter import StableDiffusionXLAdapterPipeline

from finelip_sdxl.pipelines.long_prompt import LongPromptMixin


class FineLIPSDXLPipeline(LongPromptMixin, StableDiffusionXLPipeline):
    """Text to image with SDXL and prompts of any length; see `LongPromptMixin` for its options.

    Example:
        >>> from finelip_sdxl import FineLIPSDXLPipeline
        >>> pipe = FineLIPSDXLPipeline.from_pretrained("miniature")  # doctest: +SKIP
        >>> print(pipe.describe_prompt(prompt))  # doctest: +SKIP
        >>> pipe(prompt, num_inference_steps=20).images[0].save("scene.png")  # doctest: +SKIP
    """


class FineLIPSDXLImg2ImgPipeline(LongPromptMixin, StableDiffusionXLImg2ImgPipeline):
    """Image to image, the refiner included, with prompts of any length; see `LongPromptMixin` for its options."""


class FineLIPSDXLInpaintPipeline(LongPromptMixin, StableDiffusionXLInpaintPipeline):
    """Inpainting with prompts of any length; see `LongPromptMixin` for its options."""


class FineLIPSDXLControlNetPipeline(LongPromptMixin, StableDiffusionXLControlNetPipeline):
    """Text to image under a ControlNet with prompts of any length; see `LongPromptMixin` for its options."""


class FineLIPSDXLControlNetImg2ImgPipeline(LongPromptMixin, StableDiffusionXLControlNetImg2ImgPipeline):
    """Image to image under a ControlNet with prompts of any length; see `LongPromptMixin` for its options."""


class FineLIPSDXLControlNetInpaintPipeline(LongPromptMixin, StableDiffusionXLControlNetInpaintPipeline):
    """Inpainting under a ControlNet with prompts of any length; see `LongPromptMixin` for its options."""


class FineLIPSDXLControlNetUnionPipeline(LongPromptMixin, StableDiffusionXLControlNetUnionPipeline):
    """Text to image under a ControlNet-Union with prompts of any length; see `LongPromptMixin` for its options."""


class FineLIPSDXLControlNetUnionImg2ImgPipeline(LongPromptMixin, StableDiffusionXLControlNetUnionImg2ImgPipeline):
    """Image to image under a ControlNet-Union with prompts of any length; see `LongPromptMixin` for its options."""


class FineLIPSDXLControlNetUnionInpaintPipeline(LongPromptMixin, StableDiffusionXLControlNetUnionInpaintPipeline):
    """Inpainting under a ControlNet-Union with prompts of any length; see `LongPromptMixin` for its options."""


class FineLIPSDXLAdapterPipeline(LongPromptMixin, StableDiffusionXLAdapterPipeline):
    """Text to image under a T2I-Adapter with prompts of any length; see `LongPromptMixin` for its options.

    `adapter` is the T2I-Adapter, `conditioning_adapter` this package's.
    """
