"""Which pipeline classes of Diffusers encode prompts as SDXL's do, found by the arguments of `encode_prompt`."""

from __future__ import annotations

import inspect

from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from finelip_sdxl.options import ENCODERS
from finelip_sdxl.pipelines.prompt_encoding import PromptEncodingMixin

IMAGES, VIDEOS = "num_images_per_prompt", "num_videos_per_prompt"

# The arguments of SDXL's `encode_prompt`, in the order of all its pipelines.
_ARGUMENTS = [
    name
    for name, parameter in inspect.signature(PromptEncodingMixin.encode_prompt).parameters.items()
    if name != "self" and parameter.kind is not parameter.KEYWORD_ONLY
]

_MAY_LACK = "clip_skip"  # InstructPix2Pix has no such argument

_COMPONENTS = {*ENCODERS, *ENCODERS.values(), "unet", "scheduler"}


def encode_prompt_arguments(pipeline_class: type) -> list[str]:
    """The names of the arguments of a class's `encode_prompt`, in order; empty if it has none.

    A method that passes all arguments on, by `**kwargs`, has those of the next class with this method.
    """
    for base in pipeline_class.__mro__:
        if "encode_prompt" in vars(base):
            parameters = inspect.signature(vars(base)["encode_prompt"]).parameters
            if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
                return [name for name in parameters if name != "self"]
    return []


def check_stock_class(pipeline_class: type[DiffusionPipeline]) -> None:
    """Refuse a class that encodes prompts in another way than SDXL's pipelines.

    Raises:
        TypeError: its `encode_prompt` has other arguments, or the class has other components.

    Examples:
        >>> from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline
        >>> check_stock_class(DDPMPipeline)
        Traceback (most recent call last):
        TypeError: DDPMPipeline does not encode prompts as SDXL's pipelines do: it lacks `encode_prompt`. Use it as \
Diffusers has it.
    """
    found = encode_prompt_arguments(pipeline_class)
    expected = [VIDEOS if name == IMAGES and VIDEOS in found else name for name in _ARGUMENTS]
    expected = [name for name in expected if name != _MAY_LACK or name in found]
    components = inspect.signature(pipeline_class.__init__).parameters.keys()
    missing = sorted(_COMPONENTS - components)
    if found == expected and not missing:
        return
    if not found:
        reason = "it lacks `encode_prompt`"
    elif lacking := [f"`{name}`" for name in expected if name not in found]:
        reason = f"its `encode_prompt` does not take {', '.join(lacking[:3])}"
    elif more := [f"`{name}`" for name in found if name not in expected]:
        reason = f"its `encode_prompt` also takes {', '.join(more[:3])}"
    elif found != expected:
        reason = "its `encode_prompt` takes the arguments in another order"
    else:
        reason = f"it has no {' or '.join(missing)}"
    advice = "Use it as Diffusers has it."
    if not missing:
        advice = "It takes 248 tokens with the text encoders and tokenizers of a pipeline of this package."
    raise TypeError(f"{pipeline_class.__name__} does not encode prompts as SDXL's pipelines do: {reason}. {advice}")
