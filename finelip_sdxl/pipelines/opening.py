"""An SDXL by its name: a hub id, a directory, a single file, or the name of one that ships with the package."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from finelip_sdxl.options import check_config

if TYPE_CHECKING:
    from finelip_sdxl.pipelines import FineLIPSDXLPipeline, LongPromptMixin

Pipe = TypeVar("Pipe", bound="LongPromptMixin")


def open_pipeline(pipeline_class: type[Pipe], base: str, config: str | None = None, **arguments: Any) -> Pipe:
    """Open a pipeline of this class, with text encoders of 248 positions.

    Args:
        pipeline_class: a pipeline class of this package.
        base: hub id, directory or single file of an SDXL, or `"miniature"`.
        config: see `from_single_file`; for a single file only.
        **arguments: further arguments of `from_pretrained` or `from_single_file`.

    Raises:
        ValueError: a config is passed with a base that is no single file; or as in these methods.
    """
    if Path(base).is_file():
        given = {name: value for name, value in arguments.items() if name != "variant"}
        return pipeline_class.from_single_file(base, config=config, **given)
    check_config(base, config)
    pipe = pipeline_class.from_pretrained(base, **arguments)
    pipe.swap_text_encoders()  # done already, unless a pipeline was saved with encoders of 77 positions
    return pipe


def open_text_to_image(base: str, **arguments: Any) -> FineLIPSDXLPipeline:
    """Open an SDXL that draws from a prompt alone; see `open_pipeline`.

    Raises:
        ValueError: the base is a refiner, which has one text encoder and continues pictures; its UNet takes more than
            noise, for example for inpainting; or as in `open_pipeline`.
    """
    from finelip_sdxl.pipelines import FineLIPSDXLPipeline

    pipe = open_pipeline(FineLIPSDXLPipeline, base, **arguments)
    if pipe.text_encoder is None or pipe.text_encoder_2 is None:
        raise ValueError(
            f"{base} lacks one of SDXL's two text encoders, as a refiner does: pass an SDXL that begins pictures."
        )
    taken, given, latents = pipe.unet.config.in_channels, pipe.unet.config.out_channels, pipe.vae.config.latent_channels
    if (taken, given) != (latents, latents):
        kinds = {
            2 * latents + 1: "It is one for inpainting: use it in Python, by FineLIPSDXLInpaintPipeline",
            2 * latents: "It is one that edits pictures, such as InstructPix2Pix: use it by Diffusers' own pipeline",
        }
        raise ValueError(
            f"{base} does not draw from a prompt alone: its UNet takes {taken} channels and returns {given}, and its"
            f" VAE has {latents}. {kinds.get(taken, 'They do not belong together')}, or pass another base."
        )
    return pipe
