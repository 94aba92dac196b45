"""`long_prompts`: prompts of any length for every pipeline class of Diffusers that encodes prompts as SDXL's do."""

from __future__ import annotations

from threading import Lock
from typing import Any

from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from finelip_sdxl.pipelines import stable_diffusion_xl
from finelip_sdxl.pipelines.long_prompt import LongPromptMixin
from finelip_sdxl.pipelines.stock_class import check_stock_class

# The classes of this package by Diffusers' own: those with a name of their own, and those made so far.
_classes: dict[type[DiffusionPipeline], type[LongPromptMixin]] = {
    ours._stock_class(): ours
    for ours in vars(stable_diffusion_xl).values()
    if isinstance(ours, type) and issubclass(ours, LongPromptMixin) and ours is not LongPromptMixin
}
_classes_lock = Lock()


def long_prompts(pipeline_class: type[DiffusionPipeline]) -> type[LongPromptMixin]:
    """The class that takes prompts of any length and otherwise does what a pipeline class of Diffusers does.

    It is `class Name(LongPromptMixin, pipeline_class)`, with all methods and options of `FineLIPSDXLPipeline`:
    `from_pretrained` swaps the text encoders, `from_pipe` shares the weights of a pipeline that is loaded, and a call
    takes `pipeline_class`'s arguments and the options.

    Args:
        pipeline_class: any class whose `encode_prompt` has the arguments of SDXL's: in Diffusers those of PAG,
            AnimateDiff-SDXL, InstructPix2Pix and others; your own, or one of a community pipeline.

    Returns:
        The same class for the same `pipeline_class` each time. For a class with a name in this package, such as
        `StableDiffusionXLPipeline`, it is the one of that name; a class of this package is returned as it is.

    Raises:
        TypeError: it is no class of a pipeline; or its `encode_prompt` has other arguments, as Kolors' has.

    Examples:
        >>> from diffusers.pipelines.pag.pipeline_pag_sd_xl import StableDiffusionXLPAGPipeline
        >>> from finelip_sdxl import FineLIPSDXLPipeline, long_prompts
        >>> pipe = FineLIPSDXLPipeline.from_pretrained("miniature")
        >>> guided = long_prompts(StableDiffusionXLPAGPipeline).from_pipe(pipe)
        >>> guided.set_progress_bar_config(disable=True)
        >>> guided("A red star is in the top left. " * 12, pag_scale=1.0, num_inference_steps=2).images[0].size
        (192, 192)
    """
    if isinstance(pipeline_class, DiffusionPipeline):
        raise TypeError(
            f"long_prompts takes a pipeline class, but got a loaded {type(pipeline_class).__name__}: call"
            " long_prompts(type(pipe)).from_pipe(pipe)."
        )
    if not isinstance(pipeline_class, type) or not issubclass(pipeline_class, DiffusionPipeline):
        found = pipeline_class.__name__ if isinstance(pipeline_class, type) else repr(pipeline_class)
        raise TypeError(
            "long_prompts takes a pipeline class of Diffusers, such as StableDiffusionXLPAGPipeline, but got"
            f" {found:.60}."
        )
    if issubclass(pipeline_class, LongPromptMixin):
        return pipeline_class
    check_stock_class(pipeline_class)
    with _classes_lock:
        if pipeline_class not in _classes:
            _classes[pipeline_class] = _made(pipeline_class)
        return _classes[pipeline_class]


def _made(pipeline_class: type[DiffusionPipeline]) -> type[LongPromptMixin]:
    stock_name = pipeline_class.__name__
    name = stock_name.replace("StableDiffusionXL", "FineLIPSDXL", 1)
    doc = f"""Diffusers' `{stock_name}` for prompts of any length.

    `from_pretrained` loads any SDXL and gives it text encoders of 248 positions; `from_pipe` shares the weights of a
    pipeline that is loaded. A call takes all arguments of `{stock_name}`, and the options below for itself.
    """
    attributes = {"__doc__": doc, "__module__": __name__}
    made: Any = type(name if name != stock_name else f"FineLIP{name}", (LongPromptMixin, pipeline_class), attributes)
    of_mixin: type[LongPromptMixin] = made
    return of_mixin
