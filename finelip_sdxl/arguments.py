"""What the command line and the demo share: the flags that say what is loaded and where it runs, and what they mean.

Nothing heavy is imported before a function needs it, so that `--help` answers at once.
"""

import argparse
from pathlib import Path
from typing import Any

from finelip_sdxl.prompts import FINELIP_MERGE

MAX_COUNT = 10**9  # what is larger is refused by its flag; most have a smaller limit
DTYPES = ("float32", "float16", "bfloat16")
# Arguments of a pipeline's loading: of what it is made, and how it reads.
LOADED = ("config", "variant", "finelip", "finelip_2", "finelip_merge", "finelip_base", "conditioning_adapter")
READING = ("short_prompt", "long_prompt", "hidden_states", "weighting")


def add_pipeline(command: argparse.ArgumentParser) -> None:
    """A pipeline that draws, and its device."""
    add_base(command)
    add_loading(command, dtype=None, dtype_help="float16, or float32 on the CPU")
    add_adapter(command)
    command.add_argument(
        "--device", metavar="NAME", help="such as cpu, cuda:1, mps (default: an accelerator or else the CPU)"
    )
    command.add_argument("--offload", action="store_true", help="keep on the device only the model that is running")


def add_base(command: argparse.ArgumentParser) -> None:
    text = "hub id, directory or single file of an SDXL (default: %(default)s, the small one that comes with the"
    command.add_argument("--base", default="miniature", metavar="SDXL", help=f"{text} package)")
    add_config(command)


def add_config(command: argparse.ArgumentParser) -> None:
    text = "hub id or directory of configs and tokenizers for a single file (default: Diffusers' choice on the hub)"
    command.add_argument("--config", metavar="SDXL", help=text)


def add_loading(command: argparse.ArgumentParser, dtype: str | None, dtype_help: str) -> None:
    text = (
        "FineLIP or Long-CLIP for the %s encoder: checkpoint, directory or hub id (default: stock, stretched; for the "
    )
    text += "miniature, the one that comes with it)"
    command.add_argument("--finelip", metavar="CLIP", help=text % "first")
    command.add_argument("--finelip-2", metavar="CLIP", help=text % "second")
    text = "what FineLIPs do: replace an encoder, or add what they have learned to what a fine-tune's has"
    command.add_argument("--finelip-merge", choices=FINELIP_MERGE, help=f"{text} (default: replace)")
    text = "for delta: hub id or directory of the SDXL that they were trained from (the miniature's need none)"
    command.add_argument("--finelip-base", metavar="SDXL", help=text)
    command.add_argument("--dtype", choices=DTYPES, default=dtype, help=f"of all weights (default: {dtype_help})")
    command.add_argument(
        "--variant", metavar="NAME", help="of the files of weights, such as fp16 (default: the plain ones)"
    )


def add_adapter(command: argparse.ArgumentParser) -> None:
    text = "directory or hub id of what training/align_adapter.py wrote, or none (default: the one that the base comes"
    text += " with, unless a FineLIP is given)"
    command.add_argument("--conditioning-adapter", metavar="ADAPTER", help=text)


def add_refiner(command: argparse.ArgumentParser) -> None:
    text = "hub id or directory of SDXL's refiner, which draws the last steps (default: none)"
    command.add_argument("--refiner", metavar="SDXL", help=text)


def count(text: str, most: int = MAX_COUNT) -> int:
    if not (text.isdecimal() and len(text) <= 10 and 1 <= int(text) <= most):
        raise argparse.ArgumentTypeError(f"{text!r:.60} is not a whole number of at least 1 and at most {most:,}")
    return int(text)


def loading_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `open_pipeline` that were given; what was not is up to a saved folder, or the default.

    Raises:
        ValueError: a config for what is no single file.
    """
    _check_config(options.base, getattr(options, "config", None))
    given = {name: value for name, value in vars(options).items() if name in LOADED + READING and value is not None}
    return {name: None if value == "none" else value for name, value in given.items()}


def open_pipeline(pipeline_class: Any, base: str, config: str | None = None, **arguments: Any) -> Any:
    """A pipeline of this class, with encoders of 248 positions.

    Args:
        pipeline_class: one of this package's.
        base: hub id, directory or single file of an SDXL, or `"miniature"`.
        config: for a single file, see `from_single_file`.
        **arguments: of `from_pretrained` or `from_single_file`.

    Raises:
        ValueError: a config for what is no single file; and what these raise.
    """
    if Path(base).is_file():
        given = {name: value for name, value in arguments.items() if name != "variant"}
        return pipeline_class.from_single_file(base, **given, **({} if config is None else {"config": config}))
    _check_config(base, config)
    pipe = pipeline_class.from_pretrained(base, **arguments)
    pipe.swap_text_encoders()  # done already, unless a pipeline was saved with encoders of 77 positions
    return pipe


def _check_config(base: str, config: str | None) -> None:
    if config is not None and not Path(base).is_file():
        raise ValueError(f"--config {config} goes with a single file, but {base} is none: leave it out.")


def open_text_to_image(base: str, **arguments: Any) -> Any:
    """`open_pipeline` for an SDXL that draws from a prompt alone.

    Raises:
        ValueError: a refiner, which has one text encoder and draws on; a UNet that wants more than noise, as those for
            inpainting do; and what `open_pipeline` raises.
    """
    from finelip_sdxl.pipelines import FineLIPSDXLPipeline

    pipe = open_pipeline(FineLIPSDXLPipeline, base, **arguments)
    if pipe.text_encoder is None or pipe.text_encoder_2 is None:
        raise ValueError(
            f"{base} has not SDXL's two text encoders, as a refiner has not: pass an SDXL that begins pictures."
        )
    taken, given, latents = pipe.unet.config.in_channels, pipe.unet.config.out_channels, pipe.vae.config.latent_channels
    if (taken, given) != (latents, latents):
        kinds = {
            2 * latents + 1: "It is one for inpainting: use it in Python, by FineLIPSDXLInpaintPipeline",
            2 * latents: "It is one that edits pictures, such as InstructPix2Pix: use it by Diffusers' own pipeline",
        }
        raise ValueError(
            f"{base} does not draw from a prompt alone: its UNet takes {taken} channels and gives {given}, and its VAE"
            f" has {latents}. {kinds.get(taken, 'They do not belong together')}, or pass another base."
        )
    return pipe


def device_and_dtype(options: argparse.Namespace) -> tuple[Any, Any]:
    import torch

    device = open_device(options.device)
    if options.offload and device.type == "cpu":
        raise ValueError("--offload moves models between the CPU and an accelerator, but the device is the CPU.")
    return device, getattr(torch, options.dtype or ("float32" if device.type == "cpu" else "float16"))


def open_device(name: str | None) -> Any:
    """The device of a name; without one, an accelerator or else the CPU."""
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name is None:
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, ValueError, TypeError):
        device = None
    if device is None or str(device) != name:  # torch takes cuda:256 for cuda:0
        raise ValueError(f"--device {name!r:.60} is no device: use one such as cpu, cuda, cuda:1 or mps.")
    there = [torch.device("cpu"), torch.device("cpu:0")]
    if accelerator is not None:
        numbers = range(torch.accelerator.device_count())
        there += [accelerator, *(torch.device(accelerator.type, number) for number in numbers)]
    if device not in there:
        raise ValueError(f"--device {device} is not on this machine: use one of {', '.join(map(str, there))}.")
    return device
