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
    """Text to image with SDXL and prompts of any length.

    `from_pretrained` loads any SDXL and gives it text encoders of 248 positions. A prompt of up to 77 tokens is encoded
    as stock SDXL does, a longer one whole; past 248 tokens it is encoded in several windows. `describe_prompt` reports
    how. A call takes all arguments of Diffusers' `StableDiffusionXLPipeline`, and the options below for itself.

    Examples:
        >>> from finelip_sdxl import FineLIPSDXLPipeline
        >>> pipe = FineLIPSDXLPipeline.from_pretrained("miniature")
        >>> pipe.set_progress_bar_config(disable=True)
        >>> prompt = "A red star is in the top left. " * 12
        >>> pipe.describe_prompt(prompt).positions
        154
        >>> pipe(prompt, num_inference_steps=2).images[0].size
        (192, 192)
    """


class FineLIPSDXLImg2ImgPipeline(LongPromptMixin, StableDiffusionXLImg2ImgPipeline):
    """Image to image with SDXL or its refiner, and prompts of any length.

    `from_pretrained` loads any SDXL and gives it text encoders of 248 positions; `from_pipe` shares the weights of a
    pipeline that is loaded. A call takes all arguments of Diffusers' `StableDiffusionXLImg2ImgPipeline`, and the
    options below for itself.
    """


class FineLIPSDXLInpaintPipeline(LongPromptMixin, StableDiffusionXLInpaintPipeline):
    """Inpainting with SDXL and prompts of any length: a masked part of an image is drawn anew.

    `from_pretrained` loads any SDXL and gives it text encoders of 248 positions; `from_pipe` shares the weights of a
    pipeline that is loaded. A call takes all arguments of Diffusers' `StableDiffusionXLInpaintPipeline`, and the
    options below for itself.
    """


class FineLIPSDXLControlNetPipeline(LongPromptMixin, StableDiffusionXLControlNetPipeline):
    """Text to image with SDXL under a ControlNet, and prompts of any length.

    `from_pretrained` takes the ControlNet as `controlnet=`, loads any SDXL, and gives it text encoders of 248
    positions. The ControlNet gets the same embeddings as the UNet. A call takes all arguments of Diffusers'
    `StableDiffusionXLControlNetPipeline`, and the options below for itself.
    """


class FineLIPSDXLControlNetImg2ImgPipeline(LongPromptMixin, StableDiffusionXLControlNetImg2ImgPipeline):
    """Image to image with SDXL under a ControlNet, and prompts of any length.

    `from_pretrained` takes the ControlNet as `controlnet=`, loads any SDXL, and gives it text encoders of 248
    positions. A call takes all arguments of Diffusers' `StableDiffusionXLControlNetImg2ImgPipeline`, and the options
    below for itself.
    """


class FineLIPSDXLControlNetInpaintPipeline(LongPromptMixin, StableDiffusionXLControlNetInpaintPipeline):
    """Inpainting with SDXL under a ControlNet, and prompts of any length.

    `from_pretrained` takes the ControlNet as `controlnet=`, loads any SDXL, and gives it text encoders of 248
    positions. A call takes all arguments of Diffusers' `StableDiffusionXLControlNetInpaintPipeline`, and the options
    below for itself.
    """


class FineLIPSDXLControlNetUnionPipeline(LongPromptMixin, StableDiffusionXLControlNetUnionPipeline):
    """Text to image with SDXL under a ControlNet-Union, and prompts of any length.

    `from_pretrained` takes the ControlNet-Union as `controlnet=`, loads any SDXL, and gives it text encoders of 248
    positions. A call takes all arguments of Diffusers' `StableDiffusionXLControlNetUnionPipeline`, and the options
    below for itself.
    """


class FineLIPSDXLControlNetUnionImg2ImgPipeline(LongPromptMixin, StableDiffusionXLControlNetUnionImg2ImgPipeline):
    """Image to image with SDXL under a ControlNet-Union, and prompts of any length.

    `from_pretrained` takes the ControlNet-Union as `controlnet=`, loads any SDXL, and gives it text encoders of 248
    positions. A call takes all arguments of Diffusers' `StableDiffusionXLControlNetUnionImg2ImgPipeline`, and the
    options below for itself.
    """


class FineLIPSDXLControlNetUnionInpaintPipeline(LongPromptMixin, StableDiffusionXLControlNetUnionInpaintPipeline):
    """Inpainting with SDXL under a ControlNet-Union, and prompts of any length.

    `from_pretrained` takes the ControlNet-Union as `controlnet=`, loads any SDXL, and gives it text encoders of 248
    positions. A call takes all arguments of Diffusers' `StableDiffusionXLControlNetUnionInpaintPipeline`, and the
    options below for itself.
    """


class FineLIPSDXLAdapterPipeline(LongPromptMixin, StableDiffusionXLAdapterPipeline):
    """Text to image with SDXL under a T2I-Adapter, and prompts of any length.

    `from_pretrained` takes the T2I-Adapter as `adapter=` (`conditioning_adapter=` is this package's), loads any SDXL,
    and gives it text encoders of 248 positions. A call takes all arguments of Diffusers'
    `StableDiffusionXLAdapterPipeline`, and the options below for itself.
    """
