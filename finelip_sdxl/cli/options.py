"""Flags of several commands and of the demo, and their values.

Nothing heavy is imported before a function needs it, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import random
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from finelip_sdxl import names
from finelip_sdxl.comparison.settings import Settings
from finelip_sdxl.console import COUNT, number
from finelip_sdxl.names import sdxl_path
from finelip_sdxl.options import (
    EMPHASIS,
    ENCODING,
    FINELIP_MERGE,
    HIDDEN_STATES,
    LOADED,
    MAX_CHARACTERS,
    OVERFLOW,
    SHORT_PROMPT_ENCODER,
    WEIGHTING,
    check_config,
)
from finelip_sdxl.picture_sizes import SDXL_FACTOR, read_side_factor
from finelip_sdxl.recommended import Recommended

if TYPE_CHECKING:
    import torch

PICTURES = number(int, least=1, most=100)  # of one command
WHOLE, REAL = number(int, most=None), number(float, most=None)  # `Settings` knows the bounds of these flags
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # to which commands are added

# Arguments of the library whose flags have other names.
_OTHER_NAMES = {"num_images_per_prompt": "num_images", "num_inference_steps": "steps"}

# Flags that name an SDXL in a folder (a base may also be a single file), and all that name a model.
_SDXLS = ("base", "config", "finelip_base", "refiner")
_MODELS = (*_SDXLS, "finelip", "finelip_2", "conditioning_adapter", "vae", "model", "tokenizer")
_JUDGES = ("features", "judge", "sentence_judge")

DEVICES = ("cpu", "cuda", "mps", "xpu", "hpu", "mtia", "npu", "mlu", "musa", "privateuseone")
_A_DEVICE = "use one such as cpu, cuda, cuda:1 or mps"
DTYPES = ("float32", "float16", "bfloat16")


def add_command(
    commands: Commands, name: str, run: Callable[[argparse.Namespace], None], text: str
) -> argparse.ArgumentParser:
    """Add a command.

    Args:
        commands: the subparsers of the program.
        name: the word that a user types.
        run: the function of the command; it takes the parsed options.
        text: the line in the list of commands, without a capital and a period.
    """
    command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    command.set_defaults(run=run, prog=command.prog, flags=lambda: _flags(command))
    return command


def _flags(command: argparse.ArgumentParser) -> dict[str, str]:
    """The flags of a command by the names of the library's arguments."""
    flags = {action.dest: action.option_strings[-1] for action in command._actions if action.option_strings}
    return {**flags, **{name: flags[option] for name, option in _OTHER_NAMES.items() if option in flags}}


def flags_of(options: argparse.Namespace) -> dict[str, str]:
    """The flags of a parsed command by the names of the library's arguments; of a prompt, the one that passed it."""
    flags: dict[str, str] = options.flags()
    passed = next((name for name in ("prompt_file", "text") if getattr(options, name, None) is not None), None)
    return flags if passed is None else {**flags, "prompt": flags.get(passed, "PROMPT")}


def add_prompt(command: argparse.ArgumentParser) -> None:
    """Add flags for a prompt, as text or from a file, and for the negative prompt."""
    command.add_argument("text", nargs="?", metavar="PROMPT", help="prompt of any length")
    command.add_argument("--prompt", metavar="TEXT", help="prompt, in place of the argument")
    command.add_argument("--prompt-file", metavar="FILE", help="text file with the prompt")
    text = "things that the picture should not show (default: none)"
    command.add_argument("--negative-prompt", metavar="TEXT", help=text)


def add_drawing(command: argparse.ArgumentParser, seed: int | None = None) -> None:
    """Add flags for steps, guidance, seed (random by default, or `seed`) and size, and those of `add_pipeline`."""
    text = f"denoising steps (default: as the model recommends, or else {Recommended.steps})"
    command.add_argument("--steps", type=COUNT, metavar="N", help=text)
    text = "classifier-free guidance, off up to 1 (default: as the model recommends, or else "
    text += f"{Recommended.guidance_scale:g})"
    command.add_argument("--guidance-scale", type=REAL, metavar="X", help=text)
    text = f"seed of the noise, plus one for each further image (default: {'random' if seed is None else seed})"
    command.add_argument("--seed", type=WHOLE, default=seed, metavar="N", help=text)
    text = "of the picture, a multiple of 8, or of 16 with the miniature (default: the model's own)"
    command.add_argument("--width", type=COUNT, metavar="PIXELS", help=f"width {text}")
    command.add_argument("--height", type=COUNT, metavar="PIXELS", help=f"height {text}")
    add_pipeline(command)
    text = "share of the conditioning adapter that counts, from 0 to 1 (default: %(default)s)"
    command.add_argument("--conditioning-adapter-scale", type=REAL, default=1.0, metavar="X", help=text)


def add_encoding(command: argparse.ArgumentParser, hidden_states: bool = True) -> None:
    """Add flags for the pipeline's options of encoding."""
    text = "text encoder for prompts of up to 77 tokens: the original one, as in stock SDXL, or the long one"
    command.add_argument(
        "--short-prompt-encoder", choices=SHORT_PROMPT_ENCODER, help=f"{text} (default: as saved, or original)"
    )
    text = "treatment of prompts past 248 tokens (default: as saved, or window)"
    command.add_argument("--overflow", choices=OVERFLOW, help=text)
    text = (
        "syntax of weights in the prompt: compel's (word)1.3 and word++, or a1111's (word:1.3), ((word)), [word] and"
        " BREAK (default: as saved, or none)"
    )
    command.add_argument("--weighting", choices=("none", *WEIGHTING[1:]), help=text)
    text = (
        "effect of a weight as one of these tools computes it: compel; A1111's states times the weight, with or without"
        " their mean restored; ComfyUI's interpolation from the empty prompt (default: as saved, or compel)"
    )
    command.add_argument("--emphasis", choices=EMPHASIS, help=text)
    if hidden_states:
        text = "the text encoders' hidden states for the UNet (default: as saved, or penultimate)"
        command.add_argument("--hidden-states", choices=HIDDEN_STATES, help=text)


def add_pipeline(command: argparse.ArgumentParser) -> None:
    """Add flags for a pipeline that draws, and for its device."""
    add_base(command)
    add_loading(command, dtype=None, dtype_help="float16, or float32 on the CPU")
    add_adapter(command)
    add_device(command)
    command.add_argument("--offload", action="store_true", help="keep on the device only the model that is running")


def add_device(command: argparse.ArgumentParser) -> None:
    text = "device to run on, such as cpu, cuda:1 or mps (default: an accelerator, or else the CPU)"
    command.add_argument("--device", type=device, metavar="NAME", help=text)


def add_base(command: argparse.ArgumentParser) -> None:
    text = "hub id, directory or single file of an SDXL (default: %(default)s, the small one that comes with the"
    command.add_argument("--base", default="miniature", metavar="SDXL", help=f"{text} package)")
    add_config(command)


def add_base_and_folder(command: argparse.ArgumentParser) -> None:
    """Add a base to read and a folder to write, in this order."""
    command.add_argument("base", metavar="BASE", help="hub id, directory or single file of an SDXL, or miniature")
    command.add_argument("out", metavar="FOLDER", help="directory to write")
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
    text = "use of a FineLIP: replace the encoder, or add its learned change to a fine-tune's encoder"
    command.add_argument("--finelip-merge", choices=FINELIP_MERGE, help=f"{text} (default: replace)")
    text = "hub id or directory of the SDXL that the FineLIPs were trained from, for delta (the miniature's need none)"
    command.add_argument("--finelip-base", metavar="SDXL", help=text)
    command.add_argument("--dtype", choices=DTYPES, default=dtype, help=f"type of all weights (default: {dtype_help})")
    command.add_argument(
        "--variant", metavar="NAME", help="variant of the weight files, such as fp16 (default: the plain files)"
    )


def add_adapter(command: argparse.ArgumentParser) -> None:
    text = "directory or hub id of an adapter from training/align_adapter.py, or none (default: the base's own, unless "
    text += "a FineLIP is given)"
    command.add_argument("--conditioning-adapter", metavar="ADAPTER", help=text)


def add_refiner(command: argparse.ArgumentParser) -> None:
    text = "hub id or directory of SDXL's refiner, which draws the last steps (default: none)"
    command.add_argument("--refiner", metavar="SDXL", help=text)


def loading_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `open_pipeline` that were given. A saved folder, or the default, decides the others."""
    given = {name: value for name, value in vars(options).items() if name in LOADED + ENCODING and value is not None}
    return {name: None if value == "none" else value for name, value in given.items()}


def device(text: str) -> str:
    """The type of `--device`: a word that may be a device of torch, which is not imported for it."""
    if not re.fullmatch(rf"({'|'.join(DEVICES)})(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r:.60} is no device: {_A_DEVICE}")
    return text


def device_and_dtype(options: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    import torch

    device = open_device(options.device)
    if options.offload and device.type == "cpu":
        raise ValueError("--offload moves models between the CPU and an accelerator, but the device is the CPU.")
    dtype: torch.dtype = getattr(torch, options.dtype or ("float32" if device.type == "cpu" else "float16"))
    return device, dtype


def open_device(name: str | None) -> torch.device:
    """The device of a name; without a name, an accelerator or else the CPU."""
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name is None:
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, ValueError, TypeError):
        device = None
    if device is None or str(device) != name:  # torch takes cuda:256 for cuda:0
        raise ValueError(f"--device {name!r:.60} is no device: {_A_DEVICE}.")
    there = [torch.device("cpu"), torch.device("cpu:0")]
    if accelerator is not None:
        numbers = range(torch.accelerator.device_count())
        there += [accelerator, *(torch.device(accelerator.type, number) for number in numbers)]
    if device not in there:
        raise ValueError(f"--device {device} is not on this machine: use one of {', '.join(map(str, there))}.")
    return device


# Parts of commands


def chosen_prompt(options: argparse.Namespace) -> str:
    """The one prompt, given as an argument, with `--prompt` or with `--prompt-file`."""
    given: list[str] = [text for text in (options.text, options.prompt) if text is not None]
    if options.prompt_file is not None:
        given.append(_read_prompt(options.prompt_file))
    if len(given) != 1:
        raise ValueError(
            f"Pass one prompt, as an argument, with --prompt or with --prompt-file, instead of {len(given) or 'none'}."
        )
    return given[0]


def config_source(options: argparse.Namespace) -> str | None:
    """The folder of the base's configs and tokenizers; None for a single file without `--config`.

    Raises:
        OSError, ValueError: as by `check_models`.
    """
    check_models(options)
    described = options.config if Path(options.base).is_file() else options.base
    return None if described is None else sdxl_path(described)


def check_models(options: argparse.Namespace) -> None:
    """Check that the models of all flags are there; see `names.check_models`.

    Raises:
        OSError: a model is not there.
        ValueError: a config is given for a base that is no single file, or a file for a folder.
    """
    if getattr(options, "base", None) is not None:
        check_config(options.base, getattr(options, "config", None))
    models = {name: getattr(options, name, None) for name in (*_MODELS, *_JUDGES)}
    for name in ("conditioning_adapter", *_JUDGES):  # "none" is a word of these flags alone
        if models[name] == "none":
            del models[name]
    names.check_models(models, sdxls=_SDXLS, folders=_SDXLS[1:])


def _read_prompt(name: str) -> str:
    file, most = Path(name), 4 * MAX_CHARACTERS + 3  # bytes in UTF-8, with a mark at the beginning
    # /dev/zero never ends, and a named pipe may never begin. The stream that a shell makes of <(…) does both.
    is_stream = name.startswith(("/dev/fd/", "/dev/stdin"))
    try:
        if not is_stream and stat.S_IFMT(file.stat().st_mode) not in (stat.S_IFREG, stat.S_IFDIR):
            raise OSError(None, "it is no file but a device or a pipe")
        with file.open("rb") as opened:
            read = opened.read(most + 1)
    except (OSError, ValueError) as error:  # the latter for an impossible name
        reason = getattr(error, "strerror", error)
        raise ValueError(f"--prompt-file {name} cannot be read ({reason}): pass a text file.") from error
    if len(read) > most:
        raise ValueError(
            f"--prompt-file {name} is too long: at most {MAX_CHARACTERS:,} characters are allowed, so shorten it."
        )
    try:
        return read.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompt-file {name} is not text in UTF-8: {error}.") from error


def settings_by_seed(options: argparse.Namespace, prompt: str, pictures: int) -> list[Settings]:
    """Settings of pictures with consecutive seeds, within the bounds of `comparison.Settings`.

    The size fits the base, if that is on this machine; another one, and another VAE, are asked when they are loaded.
    """
    first = Settings(
        prompt,
        options.negative_prompt or "",
        steps=options.steps,
        guidance_scale=options.guidance_scale,
        seed=random.randrange(2**31) if options.seed is None else options.seed,
        width=options.width,
        height=options.height,
        conditioning_adapter_scale=options.conditioning_adapter_scale,
    )
    first.check_size(SDXL_FACTOR if options.vae else read_side_factor(options.base))
    return first.over_seeds(pictures)
