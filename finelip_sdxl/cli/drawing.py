"""Everyday flags of drawing: LoRAs, scheduler, VAE, skipped layers, a picture to begin with, and enlargement."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from finelip_sdxl.cli.options import loading_arguments
from finelip_sdxl.console import number
from finelip_sdxl.foreign_files import one_line
from finelip_sdxl.names import check_on_hub, resolve
from finelip_sdxl.picture_sizes import check_side, side_factor

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from finelip_sdxl.comparison.comparison import Comparison
    from finelip_sdxl.pipelines import FineLIPSDXLImg2ImgPipeline, FineLIPSDXLPipeline

MAX_UPSCALE = 16
MAX_UPSCALED_SIDE = 16_384

# Usual names of schedulers, with Diffusers' classes and settings. Every class is also known by its own name.
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpmpp_2m_sde_karras": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
    ),
    "dpmpp_2s": ("DPMSolverSinglestepScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "euler_karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
}


_LORA_SCALE = number(float, least=-10, most=10)


class Lora(NamedTuple):
    """A LoRA's file, directory or hub id, and its scale."""

    name: str
    scale: float


# Flags


def add_parts(command: argparse.ArgumentParser) -> None:
    """Add flags for a scheduler and a VAE in the place of the base's own."""
    text = f"scheduler: {', '.join(SCHEDULERS)}, or one of Diffusers' classes (default: the model's own)"
    command.add_argument("--scheduler", type=scheduler, metavar="NAME", help=text)
    text = "VAE in the place of the model's own: file, directory or hub id"
    command.add_argument("--vae", metavar="VAE", help=text)


def add_everyday(command: argparse.ArgumentParser) -> None:
    """Add flags for LoRAs, skipped layers, a picture to begin with, and enlargement, and those of `add_parts`."""
    text = "LoRA of SDXL: .safetensors file, directory or hub id, with a scale (default: 1); may be repeated"
    command.add_argument("--lora", type=lora, action="append", default=[], metavar="FILE[:SCALE]", help=text)
    add_parts(command)
    text = "number of the text encoders' layers to skip, besides the last, which SDXL skips always (default: 0)"
    command.add_argument("--clip-skip", type=number(int, least=0, most=100), metavar="N", help=text)
    text = "picture to begin with, scaled and cut to the size of the result (default: the picture's own size)"
    command.add_argument("--init-image", metavar="FILE", help=text)
    text = "share of the denoising with --init-image, above 0 to 1: 1 leaves little of the picture (default: 0.3)"
    command.add_argument("--strength", type=number(float, above=0, most=1), metavar="X", help=text)
    text = "factor to enlarge small pictures by, for looking at; it adds no detail (default: 1)"
    command.add_argument("--upscale", type=number(int, least=1, most=MAX_UPSCALE), default=1, metavar="N", help=text)


def scheduler(text: str) -> str:
    """The type of `--scheduler`: a name in `SCHEDULERS`, or of one of their classes."""
    if text not in SCHEDULERS and text not in {name for name, _ in SCHEDULERS.values()}:
        expected = f"{', '.join(SCHEDULERS)}, or Diffusers' class, such as EulerDiscreteScheduler"
        raise argparse.ArgumentTypeError(f"{text!r:.60} is no scheduler; expected {expected}")
    return text


def lora(text: str) -> Lora:
    """The type of `--lora`: a name, and a scale behind the last colon."""
    name, colon, scale = text.rpartition(":")
    if not colon or os.path.exists(text) or scale.startswith(("/", "\\")):
        return Lora(text, 1.0)
    try:
        return Lora(name, _LORA_SCALE(scale))
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r:.80} has a wrong scale behind its colon: {error}; write it as in style.safetensors:0.8"
        ) from error


def check_everyday(options: argparse.Namespace) -> None:
    """Check the flags of `add_everyday` before anything is loaded.

    Raises:
        OSError: a LoRA or the picture is not there.
        ValueError: a LoRA's file is no safetensors file, or a flag needs another one.
    """
    for name, _ in options.lora:
        place = resolve(name, "a .safetensors file, a directory or a hub id")
        if place.path is None:
            check_on_hub(place)
        elif place.path.is_file() and place.path.suffix != ".safetensors":
            raise ValueError(f"--lora {name} is no .safetensors file: convert it, or pass another one.")
    side = options.upscale * max(options.width or 0, options.height or 0)
    if side > MAX_UPSCALED_SIDE:
        raise ValueError(
            f"--upscale {options.upscale} makes a picture of {side:,} pixels; expected at most {MAX_UPSCALED_SIDE:,}:"
            " pass a smaller factor."
        )
    if options.strength is not None and options.init_image is None:
        raise ValueError(f"--strength {options.strength:g} goes with --init-image: pass a picture, or leave it out.")
    if options.init_image is not None and not Path(options.init_image).is_file():
        raise FileNotFoundError(f"--init-image {options.init_image} does not exist, or is no file: pass a picture.")
    if options.init_image is not None and options.steps is not None and options.steps * _strength(options) < 1:
        raise ValueError(
            f"--steps {options.steps} with --strength {_strength(options):g} leave no step to draw: raise one of them."
        )
    if options.clip_skip and options.hidden_states == "last":
        raise ValueError(f"--clip-skip {options.clip_skip} counts from penultimate states: leave --hidden-states out.")


def everyday_parameters(options: argparse.Namespace) -> dict[str, Any]:
    """The flags of `add_everyday` that were given, for a picture's file; of a path only the last part."""
    found: dict[str, Any] = part_parameters(options)
    if options.lora:
        found["lora"] = [{"name": _public(name), "scale": scale} for name, scale in options.lora]
    if options.clip_skip:
        found["clip_skip"] = options.clip_skip
    if options.init_image is not None:
        found |= {"init_image": Path(options.init_image).name, "strength": _strength(options)}
    if options.upscale > 1:
        found["upscale"] = options.upscale
    return found


def part_parameters(options: argparse.Namespace) -> dict[str, Any]:
    """The flags of `add_parts` that were given, for a picture's file."""
    found = {"scheduler": options.scheduler, "vae": options.vae and _public(options.vae)}
    return {name: value for name, value in found.items() if value is not None}


# Steps of drawing


def set_scheduler(pipe: Any, name: str | None) -> None:
    """Give a pipeline the scheduler of this name, with the base's own noise schedule."""
    if name is None:
        return
    import diffusers

    class_name, settings = SCHEDULERS.get(name, (name, {}))
    messages = diffusers.utils.logging
    before = messages.get_verbosity()
    messages.set_verbosity_error()  # it would name all settings of the old scheduler that the new one lacks
    pipe.scheduler = getattr(diffusers, class_name).from_config(pipe.scheduler.config, **settings)
    messages.set_verbosity(before)


def open_comparison(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Comparison:
    """The comparison that the flags ask for, with the scheduler of `--scheduler` where there is such a flag.

    Raises:
        OSError, ValueError: as in `Comparison.load`, `vae_arguments` and `set_scheduler`.
    """
    from finelip_sdxl.comparison.comparison import Comparison

    comparison = Comparison.load(
        options.base,
        refiner=options.refiner,
        device=device,
        offload=options.offload,
        dtype=dtype,
        **loading_arguments(options),
        **vae_arguments(options, dtype),
    )
    set_scheduler(comparison.pipe, getattr(options, "scheduler", None))
    return comparison


def vae_arguments(options: argparse.Namespace, dtype: torch.dtype) -> dict[str, Any]:
    """The argument of a pipeline's loader for the VAE of `--vae`; none without the flag.

    Raises:
        ValueError: it is no VAE of SDXL.
    """
    if getattr(options, "vae", None) is None:
        return {}
    from diffusers import AutoencoderKL

    place = resolve(options.vae)
    try:
        if place.path is not None and place.path.is_file():
            config = options.config if Path(options.base).is_file() else options.base
            where = {} if config is None else {"config": str(resolve(config).path or config), "subfolder": "vae"}
            vae = AutoencoderKL.from_single_file(str(place.path), dtype=dtype, **where)
        else:
            inside = place.find("config.json", "vae", is_optional=True)
            where = {} if inside is None else {"subfolder": "vae"}
            vae = AutoencoderKL.from_pretrained(str(place.path or options.vae), dtype=dtype, **where)
    except Exception as error:
        raise ValueError(
            f"--vae {options.vae} cannot be loaded as a VAE of SDXL ({one_line(error)}): pass another."
        ) from error
    return {"vae": vae}


def load_loras(pipe: FineLIPSDXLPipeline, loras: list[Lora]) -> None:
    """Load LoRAs, and set their scales.

    Raises:
        ValueError: one does not fit this SDXL, or holds no weights for it.
    """
    for index, (name, _) in enumerate(loras):
        path = resolve(name).path
        place = {"weight_name": path.name} if path is not None and path.is_file() else {}
        source = name if path is None else str(path.parent if place else path)
        try:
            pipe.load_lora_weights(source, adapter_name=f"lora_{index}", use_safetensors=True, **place)
        except Exception as error:
            raise ValueError(
                f"--lora {name} cannot be loaded into this SDXL ({one_line(error)}): pass a LoRA that was trained from"
                " an SDXL."
            ) from error
        if not any(f"lora_{index}" in adapters for adapters in pipe.get_list_adapters().values()):
            raise ValueError(
                f"--lora {name} holds no weights for this SDXL: pass a LoRA that was trained from an SDXL."
            )
    if loras:
        pipe.set_adapters([f"lora_{index}" for index in range(len(loras))], [scale for _, scale in loras])


def image_to_image(
    pipe: FineLIPSDXLPipeline, options: argparse.Namespace
) -> tuple[FineLIPSDXLPipeline | FineLIPSDXLImg2ImgPipeline, dict[str, Any]]:
    """The pipeline and the arguments that draw from `--init-image`; without it, `pipe` and the size.

    Raises:
        ValueError: the picture cannot be read, or its size cannot be drawn.
    """
    if options.init_image is None:
        return pipe, {"width": options.width, "height": options.height}
    from finelip_sdxl.pipelines import FineLIPSDXLImg2ImgPipeline

    return FineLIPSDXLImg2ImgPipeline.from_pipe(pipe), {
        "image": read_init_image(options, side_factor(pipe)),
        "strength": _strength(options),
    }


def read_init_image(options: argparse.Namespace, factor: int) -> Image.Image:
    """The picture of `--init-image`, scaled and cut to the size of the result, whose sides are multiples of a
    factor."""
    from PIL import ImageOps

    from finelip_sdxl.comparison.settings import MAX_SIDE, MIN_SIDE
    from finelip_sdxl.data.images import read_image

    image = read_image(Path(options.init_image), options.init_image)
    width, height = (
        given or own // factor * factor for given, own in zip((options.width, options.height), image.size, strict=True)
    )
    if not all(MIN_SIDE <= side <= MAX_SIDE for side in (width, height)):
        raise ValueError(
            f"--init-image {options.init_image} has {image.width} × {image.height} pixels; expected sides from"
            f" {MIN_SIDE} to {MAX_SIDE}: pass --width and --height to scale it."
        )
    for name, side in (("width", width), ("height", height)):
        check_side(name, side, factor)
    return ImageOps.fit(image, (width, height))


def upscaled(image: Image.Image, factor: int) -> Image.Image:
    from PIL import Image as Images

    size = image.width * factor, image.height * factor
    return image if factor == 1 else image.resize(size, Images.Resampling.LANCZOS)


def _strength(options: argparse.Namespace) -> float:
    return 0.3 if options.strength is None else float(options.strength)


def _public(name: str) -> str:
    from finelip_sdxl.provenance import public_name

    return str(public_name(name))
