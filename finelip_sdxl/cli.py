"""The command line: `finelip-sdxl generate`, `compare`, `convert`, `export`, `tokens` and `evaluate`.

Nothing heavy is imported before a command runs, so that `--help` answers at once.
"""

import argparse
import json
import os
import platform
import random
import shlex
import signal
import stat
import sys
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from finelip_sdxl.arguments import (
    DTYPES,
    LOADED,
    READING,
    add_adapter,
    add_base,
    add_config,
    add_loading,
    add_pipeline,
    add_refiner,
    count,
    device_and_dtype,
    loading_arguments,
    open_device,
    open_pipeline,
    open_text_to_image,
)
from finelip_sdxl.console import printing_stops_nothing, quiet_transformers
from finelip_sdxl.files import check_file, check_writable, stopped_by_signals, written_folder, written_whole
from finelip_sdxl.miniature import resolve_base
from finelip_sdxl.prompts import (
    HIDDEN_STATES,
    LENGTH_BUCKETS,
    LONG_PROMPT,
    MAX_CHARACTERS,
    SHORT_PROMPT,
    STOCK_POSITIONS,
    EncoderReading,
    PromptReader,
    check_choice,
    check_length_buckets,
    check_texts,
    read_prompts,
)
from finelip_sdxl.weighting import WEIGHTING

FORMATS = ("diffusers", "comfyui")
COLUMNS = ("stock", "compel", "finelip")  # the keys of finelip_sdxl.comparison.COLUMNS, whose import is heavy
MAX_PICTURES = 100
MAX_BATCH = 4096
NAMED = 5  # images that cannot be read and are named on the screen


@printing_stops_nothing()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; `arguments` are those of the shell by default.

    Returns:
        The exit code: 0, 2 after a mistake in the input, which one line on stderr explains, or 128 and the number of
        the signal that stopped it.

    Example:
        >>> from finelip_sdxl.cli import main
        >>> main(["tokens", "a red square above a blue ring"])  # doctest: +SKIP
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments)
    options.command_line = shlex.join(["finelip-sdxl", *arguments])
    try:
        with stopped_by_signals():
            options.run(options)
    except (ValueError, TypeError, OSError, MemoryError) as error:
        print(f"{options.prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        print(f"{options.prog}: stopped", file=sys.stderr)
        return 128 + getattr(stopped, "number", signal.SIGINT)
    return 0


# Commands


def generate(options: argparse.Namespace) -> None:
    """A prompt to one or more PNG files."""
    prompt, files = _prompt(options), _image_files(options.out, options.num_images)
    quiet_transformers()
    import torch

    from finelip_sdxl import comparison
    from finelip_sdxl.pictures import save_png, to_image

    seeds = [settings.seed for settings in _settings(options, prompt, options.num_images)]
    device, dtype = device_and_dtype(options)
    pipe = open_text_to_image(options.base, **loading_arguments(options), dtype=dtype)
    print(pipe.describe_prompt(prompt, negative_prompt=options.negative_prompt), flush=True)
    if options.offload:
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.to(device)
    try:
        images = pipe(
            prompt,
            negative_prompt=options.negative_prompt,
            num_inference_steps=options.steps,
            guidance_scale=options.guidance_scale,
            width=options.width,
            height=options.height,
            num_images_per_prompt=options.num_images,
            conditioning_adapter_scale=options.conditioning_adapter_scale,
            # Noise is drawn on the CPU, so that a seed gives the same picture on every device.
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="pt",
        ).images
    except RuntimeError as error:
        if not comparison.is_out_of_memory(error):
            raise
        side = pipe.default_sample_size * pipe.vae_scale_factor
        comparison.raise_out_of_memory(options.width or side, options.height or side, options.num_images)

    parameters = _parameters(options, prompt, dtype, pipe)
    for seed, pixels, file in zip(seeds, images, files, strict=True):
        image = to_image(pixels)
        size = {"width": image.width, "height": image.height}
        save_png(image, file, {**parameters, **size, "seed": seed})
        print(f"{file} (seed {seed})", flush=True)


def compare(options: argparse.Namespace) -> None:
    """A prompt, read in several ways and drawn from one or more seeds, to one picture with labels."""
    prompt, (file,) = _prompt(options), _image_files(options.out, 1)
    columns = [column for column in COLUMNS if column in options.columns]

    quiet_transformers()
    from finelip_sdxl import comparison
    from finelip_sdxl.miniature.parsing import parse_description
    from finelip_sdxl.model_card import public_name
    from finelip_sdxl.pictures import save_png

    rows = _settings(options, prompt, options.seeds)
    device, dtype = device_and_dtype(options)
    opened = comparison.Comparison.load(
        options.base,
        refiner=options.refiner,
        device=device,
        offload=options.offload,
        dtype=dtype,
        **loading_arguments(options),
    )
    opened.read(options.negative_prompt or "", columns)  # what compel cannot parse is refused before anything is drawn
    for column, reading in opened.read(prompt, columns).items():
        print(f"{comparison.COLUMNS[column]} reads {_outline(reading)}")

    pictures = []
    for settings in rows:
        for column in columns:
            pictures.append(opened.draw(column, settings))
            seconds = f"{pictures[-1].seconds:.1f} s"
            print(f"{comparison.COLUMNS[column]} drew seed {settings.seed} in {seconds}", flush=True)
    described = parse_description(prompt) if opened.is_miniature else ()
    parameters = {
        **_parameters(options, prompt, dtype, opened.pipe),
        "refiner": options.refiner and public_name(options.refiner),
        "width": pictures[0].image.width,
        "height": pictures[0].image.height,
        "columns": columns,
        "seed": rows[0].seed,
        "seeds": [settings.seed for settings in rows],
    }
    save_png(comparison.label_pictures(pictures, described), file, parameters)
    print(file)


def convert(options: argparse.Namespace) -> None:
    """An SDXL, with or without a FineLIP, to a directory that this package and stock Diffusers open."""
    out = _free_folder(options)
    pipe = _open(options, options.dtype)
    with written_folder(out, _parts if options.overwrite else None) as folder:
        pipe.save_pretrained(folder)
    print(out)


def export(options: argparse.Namespace) -> None:
    """An SDXL, with or without a FineLIP, to files that hold nothing of this package and are opened without it."""
    if options.format == "comfyui":
        _export_comfyui(options)
    else:
        _export_diffusers(options)


def _export_diffusers(options: argparse.Namespace) -> None:
    out = _free_folder(options)
    pipe = _open(options, options.dtype or "float32", short_prompt="stretched")  # stock has no other way

    from finelip_sdxl.export import stock_pipeline

    stock = stock_pipeline(pipe)
    with written_folder(out, _parts if options.overwrite else None) as folder:
        stock.save_pretrained(folder)
    print(out)


def _export_comfyui(options: argparse.Namespace) -> None:
    quiet_transformers()
    from finelip_sdxl.export import COMFYUI_FILES, save_comfyui

    out = _folder(options)  # likely the folder where ComfyUI keeps text encoders, so others in it stay
    if os.path.lexists(out) and not os.path.isdir(out):
        raise ValueError(f"{out} is a file: pass the name of a directory.")
    check_writable(out)
    for file in COMFYUI_FILES.values():
        if os.path.lexists(out / file) and not options.overwrite:
            raise ValueError(f"{out / file} exists: pass --overwrite to replace it, or another directory.")
        check_file(out / file)
    pipe = _open(options, options.dtype or "float16", short_prompt="stretched", unet=None, vae=None)
    print(*save_comfyui(pipe, out), sep="\n")


def tokens(options: argparse.Namespace) -> None:
    """What each encoder reads of a prompt. Loads tokenizers and configs, no weights."""
    prompt = check_texts("prompt", _prompt(options))
    negative = None if options.negative_prompt is None else check_texts("negative_prompt", options.negative_prompt)
    described = _described(options)
    if described is None:
        raise ValueError(f"{options.base} holds weights alone: pass --config, an SDXL whose tokenizers go with it.")
    readers, saved = _readers(described)
    chosen = {**saved, **loading_arguments(options)}
    report = read_prompts(
        readers,
        [prompt] * len(readers),
        None if negative is None else [negative] * len(readers),
        short_prompt=check_choice("short_prompt", chosen.get("short_prompt", SHORT_PROMPT[0]), SHORT_PROMPT),
        long_prompt=check_choice("long_prompt", chosen.get("long_prompt", LONG_PROMPT[0]), LONG_PROMPT),
        length_buckets=check_length_buckets(chosen.get("length_buckets", LENGTH_BUCKETS)),
        weighting=check_choice("weighting", chosen.get("weighting"), WEIGHTING),
    )
    print(report)


def evaluate_retrieval(options: argparse.Namespace) -> None:
    """Recall of texts by images and of images by texts, as a table and a JSON file."""
    json_file = None if options.json is None else _output_file("--json", options.json)
    quiet_transformers()
    import torch

    from finelip_sdxl import evaluation
    from finelip_sdxl.checkpoints import load_finelip
    from finelip_sdxl.data import load_image_processor, load_tokenizer, open_images
    from finelip_sdxl.stretch import FACTOR

    device, factor = open_device(options.device), FACTOR if options.stretch else 1
    data = open_images(options.data, options.split, images=options.images)
    model = load_finelip(options.model, dtype=getattr(torch, options.dtype), factor=factor).to(device)
    vision = model.config.vision_config
    if vision is None:
        raise ValueError(f"{options.model} has no image tower: pass a whole CLIP or FineLIP, not a text encoder alone.")
    positions = model.config.text_config.max_position_embeddings
    result = evaluation.evaluate_retrieval(
        model,
        data,
        load_tokenizer(options.tokenizer or options.model, positions),
        load_image_processor(options.model, vision.image_size),
        fusion_sweep=options.fusion_sweep,
        batch_size=options.batch_size,
        max_tokens=options.max_tokens,
    )

    tokens = options.max_tokens or positions
    counted = f"{result.images:,} images, {result.texts:,} texts of up to {tokens} tokens"
    print(f"{options.model} on {options.data}: {counted}")
    print(result)
    if result.unreadable:
        print(f"left out, with their captions, {len(result.unreadable):,} images that cannot be read:")
        print("\n".join(result.unreadable[:NAMED]))
        if len(result.unreadable) > NAMED:
            print(f"and {len(result.unreadable) - NAMED:,} more, which --json lists")
    if json_file is not None:
        asked = ("model", "tokenizer", "data", "images", "split", "stretch", "dtype", "batch_size")
        figures = {
            "command": options.command_line,
            **_circumstances(device),
            "options": {name: getattr(options, name) for name in asked} | {"max_tokens": tokens},
            **result.to_dict(),
        }
        with written_whole(json_file) as temporary:
            temporary.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        print(json_file)


# Parts of commands


def _prompt(options: argparse.Namespace) -> str:
    given = [text for text in (options.text, options.prompt) if text is not None]
    if options.prompt_file is not None:
        given.append(_read_prompt(options.prompt_file))
    if len(given) != 1:
        raise ValueError(
            f"Pass one prompt, as an argument, with --prompt or with --prompt-file, instead of {len(given) or 'none'}."
        )
    return given[0]


def _described(options: argparse.Namespace) -> str | None:
    """Where configs and tokenizers of the base are; None for a single file that none were given for."""
    described = options.config if Path(options.base).is_file() else options.base
    return None if described is None else resolve_base(described)


def _read_prompt(name: str) -> str:
    file, most = Path(name), 4 * MAX_CHARACTERS + 3  # bytes in UTF-8, with a mark at the beginning
    # /dev/zero never ends, and a named pipe may never begin; what the shell puts in the place of <(…) does.
    is_stream = name.startswith(("/dev/fd/", "/dev/stdin"))
    try:
        if not is_stream and stat.S_IFMT(file.stat().st_mode) not in (stat.S_IFREG, stat.S_IFDIR):
            raise OSError(None, "it is no file but a device or a pipe")
        with file.open("rb") as opened:
            read = opened.read(most + 1)
    except (OSError, ValueError) as error:  # the latter for a name that can be none
        reason = getattr(error, "strerror", error)
        raise ValueError(f"--prompt-file {name} cannot be read ({reason}): pass a text file.") from error
    if len(read) > most:
        raise ValueError(
            f"--prompt-file {name} is too long: at most {MAX_CHARACTERS:,} characters are read, shorten it."
        )
    try:
        return read.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompt-file {name} is not text in UTF-8: {error}.") from error


def _settings(options: argparse.Namespace, prompt: str, pictures: int) -> list[Any]:
    """What pictures of consecutive seeds are drawn from, within the bounds of `comparison.Settings`."""
    from finelip_sdxl.comparison import Settings

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
    return first.over_seeds(pictures)


def _open(options: argparse.Namespace, dtype: str, **arguments: Any) -> Any:
    """A base as the pipeline of ours for its kind, with encoders of 248 positions."""
    quiet_transformers()
    import torch
    from diffusers import DiffusionPipeline

    from finelip_sdxl import pipelines

    described = _described(options)
    # A single file does not say what it is for; without configs it is the usual thing.
    index = (
        {"_class_name": "StableDiffusionXLPipeline"} if described is None else DiffusionPipeline.load_config(described)
    )
    stock_name = str(index["_class_name"])
    name = stock_name.replace("StableDiffusionXL", "FineLIPSDXL")
    if name not in pipelines.__all__:
        raise ValueError(f"{options.base} is a {stock_name}, but only SDXL pipelines can be converted or exported.")
    arguments = {**loading_arguments(options), **arguments}
    return open_pipeline(getattr(pipelines, name), options.base, dtype=getattr(torch, dtype), **arguments)


def _folder(options: argparse.Namespace) -> Path:
    if not options.out.strip():
        raise ValueError("The directory to write has an empty name: pass one, such as long-sdxl.")
    return Path(options.out)


def _free_folder(options: argparse.Namespace) -> Path:
    """The folder that a pipeline is to be written to, once it is sure that it may be."""
    out = _folder(options)
    place = Path(os.path.realpath(out))
    if os.path.ismount(place):
        raise ValueError(f"{out} is where a disk is mounted, which cannot be replaced: pass a directory in it.")
    check_writable(place.parent)  # first: it also puts back what a killed run has left aside
    if not os.path.lexists(place):
        check_writable(place)  # its name may be too long
    elif not options.overwrite:
        raise ValueError(f"{out} exists: pass --overwrite to replace it, or another directory.")
    else:
        _parts(place)
    return out


def _parts(saved: Path) -> set[str]:
    """The names in a saved pipeline's folder that are its own; all else there is somebody's.

    Raises:
        ValueError: no pipeline is saved there.
    """
    problem = "has no model_index.json"
    with suppress(OSError):
        try:
            index = json.loads((saved / "model_index.json").read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            index = None
        if isinstance(index, dict):
            return {"model_index.json", *index}
        problem = "has a damaged model_index.json"
    raise ValueError(f"{saved} is not a saved pipeline (it {problem}), so it is not overwritten.")


def _circumstances(device: Any) -> dict[str, Any]:
    """When and where figures were found, and by which versions."""
    import torch

    accelerator = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    packages = ("finelip-sdxl", "torch", "transformers")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "architecture": platform.machine(),
            "cpu_cores": os.cpu_count(),
            "device": str(device),
            "accelerator": accelerator,
        },
        "versions": {"python": platform.python_version(), **{package: version(package) for package in packages}},
    }


def _output_file(option: str, name: str) -> Path:
    file = Path(name)
    if os.path.isdir(file):
        raise ValueError(f"{option} {name} is a directory: pass the name of a file.")
    check_file(file)
    return file


def _image_files(out: str, count: int) -> list[Path]:
    file = Path(out)
    if file.suffix.lower() != ".png" or os.path.isdir(file):
        raise ValueError(f"--out {out} must be the name of a PNG file, such as picture.png.")
    files = [file] if count == 1 else [file.with_stem(f"{file.stem}-{number}") for number in range(1, count + 1)]
    for file in files:
        check_file(file)
    return files


def _parameters(options: argparse.Namespace, prompt: str, dtype: Any, pipe: Any) -> dict[str, Any]:
    """What a drawn picture says of how it was made, whatever the command, and nothing of where it was."""
    from finelip_sdxl.model_card import public_name

    sources = {name: getattr(options, name) for name in ("base", *LOADED)}
    return {
        "prompt": prompt,
        "negative_prompt": options.negative_prompt,
        "steps": options.steps,
        "guidance_scale": options.guidance_scale,
        **{name: source and public_name(source) for name, source in sources.items()},
        "conditioning_adapter_scale": options.conditioning_adapter_scale,
        **{name: getattr(pipe, name) for name in READING},
        "dtype": str(dtype).removeprefix("torch."),
        "finelip_sdxl": version("finelip-sdxl"),
    }


def _outline(reading: EncoderReading) -> str:
    """What a reading holds of its text in one line; start and end token are counted once, however many windows."""
    read = sum(len(window.token_ids) for window in reading.windows) + 2
    windows = "1 window" if len(reading.windows) == 1 else f"{len(reading.windows)} windows"
    cut = f"{reading.cut_tokens} are CUT" if reading.cut_tokens else "nothing is cut"
    return f"{read} of {read + reading.cut_tokens} tokens, in {windows} of {reading.positions} positions; {cut}"


def _readers(base: str) -> tuple[list[PromptReader], dict[str, Any]]:
    """The encoders of a base as `from_pretrained` makes them, and the options that are saved with it."""
    quiet_transformers()
    from diffusers import DiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTokenizer

    from finelip_sdxl.stretch import FACTOR, KEEP

    index = DiffusionPipeline.load_config(base)
    readers = []
    for encoder, tokenizer in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
        if not (index.get(encoder) or [None])[0]:
            continue
        config: Any = CLIPTextConfig.from_pretrained(base, subfolder=encoder)
        positions = config.max_position_embeddings
        is_stock = positions <= STOCK_POSITIONS or getattr(config, "stretched_from", None) == STOCK_POSITIONS
        readers.append(
            PromptReader(
                encoder,
                CLIPTokenizer.from_pretrained(base, subfolder=tokenizer),
                positions=KEEP + FACTOR * (positions - KEEP) if positions <= STOCK_POSITIONS else positions,
                has_stock=is_stock or f"stock_{encoder}" in index,
            )
        )
    if not readers or "text_encoder_2" not in index:
        raise ValueError(f"{base} has not the CLIP text encoders of an SDXL: pass another base.")
    return readers, index


# Arguments


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, without the usage."""
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="finelip-sdxl", description="SDXL that reads prompts of any length.")
    parser.add_argument("--version", action="version", version=version("finelip-sdxl"))
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="generate | compare | convert | export | tokens | evaluate"
    )

    up_to_pictures = partial(count, most=MAX_PICTURES)
    command = _command(commands, "generate", generate, "draw a prompt")
    _add_prompt(command)
    command.add_argument(
        "--out", default="finelip-sdxl.png", metavar="PNG", help="file to write (default: %(default)s)"
    )
    command.add_argument(
        "--num-images", type=up_to_pictures, default=1, metavar="N", help="images to draw (default: %(default)s)"
    )
    _add_drawing(command)
    _add_reading(command)

    text = "draw a prompt as stock SDXL, compel and FineLIP-SDXL read it, side by side"
    command = _command(commands, "compare", compare, text)
    _add_prompt(command)
    command.add_argument("--out", default="comparison.png", metavar="PNG", help="file to write (default: %(default)s)")
    text = "what to draw, side by side (default: all)"
    command.add_argument("--columns", nargs="+", choices=COLUMNS, default=COLUMNS, help=text)
    text = "how many seeds to draw, a row each (default: %(default)s)"
    command.add_argument("--seeds", type=up_to_pictures, default=1, metavar="N", help=text)
    _add_drawing(command)
    add_refiner(command)
    _add_reading(command)

    command = _command(commands, "convert", convert, "save an SDXL with text encoders of 248 positions")
    command.add_argument("base", help="hub id, directory or single file of an SDXL, or miniature")
    add_config(command)
    command.add_argument("out", help="directory to write")
    command.add_argument("--overwrite", action="store_true", help="replace a pipeline that is there")
    add_loading(command, dtype="float32", dtype_help="%(default)s")
    add_adapter(command)
    _add_reading(command)

    text = "save an SDXL with text encoders of 248 positions for programs that do not know this package"
    command = _command(commands, "export", export, text)
    command.add_argument("out", help="directory to write")
    add_base(command)
    text = "a repository for stock Diffusers, or clip_l.safetensors and clip_g.safetensors (default: %(default)s)"
    command.add_argument("--format", choices=FORMATS, default=FORMATS[0], help=text)
    command.add_argument("--overwrite", action="store_true", help="replace what is there under the same names")
    add_loading(command, dtype=None, dtype_help="float32, or float16 for comfyui")

    command = _command(commands, "tokens", tokens, "show what each text encoder reads of a prompt")
    _add_prompt(command)
    add_base(command)
    _add_reading(command, hidden_states=False)

    group = commands.add_parser("evaluate", help="measure a model", description="Measure a model.")
    subjects = group.add_subparsers(dest="subject", required=True, metavar="retrieval")
    command = _command(
        subjects, "retrieval", evaluate_retrieval, "measure how well texts find their images, and images their texts"
    )
    _add_retrieval(command)
    return parser


def _command(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    command.set_defaults(run=run, prog=command.prog)
    return command


def _add_prompt(command: argparse.ArgumentParser) -> None:
    command.add_argument("text", nargs="?", metavar="PROMPT", help="the prompt, of any length")
    command.add_argument("--prompt", metavar="TEXT", help="the prompt, in place of the argument")
    command.add_argument("--prompt-file", metavar="FILE", help="a text file that holds the prompt")
    command.add_argument(
        "--negative-prompt", metavar="TEXT", help="what the picture should not show (default: nothing)"
    )


def _add_drawing(command: argparse.ArgumentParser) -> None:
    """How pictures are drawn, and what with."""
    command.add_argument("--steps", type=count, default=30, metavar="N", help="denoising steps (default: %(default)s)")
    command.add_argument(
        "--guidance-scale",
        type=float,
        default=5.0,
        metavar="X",
        help="classifier-free guidance, off up to 1 (default: %(default)s)",
    )
    command.add_argument(
        "--seed", type=int, metavar="N", help="of the noise, plus one for each further image (default: random)"
    )
    command.add_argument("--width", type=count, metavar="PIXELS", help="a multiple of 8 (default: the model's own)")
    command.add_argument("--height", type=count, metavar="PIXELS", help="a multiple of 8 (default: the model's own)")
    add_pipeline(command)
    text = "how much of the conditioning adapter counts, from 0 to 1 (default: %(default)s)"
    command.add_argument("--conditioning-adapter-scale", type=float, default=1.0, metavar="X", help=text)


def _add_reading(command: argparse.ArgumentParser, hidden_states: bool = True) -> None:
    command.add_argument(
        "--short-prompt",
        choices=SHORT_PROMPT,
        help="up to 77 tokens are read as stock SDXL does, or stretched (default: as saved, or stock)",
    )
    command.add_argument("--long-prompt", choices=LONG_PROMPT, help="past 248 tokens (default: as saved, or window)")
    text = (
        "read weights in the prompt: compel's (word)1.3 and word++, or a1111's (word:1.3), ((word)), [word] and BREAK"
    )
    command.add_argument("--weighting", choices=("none", *WEIGHTING[1:]), help=f"{text} (default: as saved, or none)")
    if hidden_states:
        text = "of the text encoders for the UNet (default: as saved, or penultimate)"
        command.add_argument("--hidden-states", choices=HIDDEN_STATES, help=text)


def _add_retrieval(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--data",
        default="miniature",
        metavar="KIND:PATH",
        help="images with captions: urban1k, docci, coco, flickr30k, sharegpt4v, csv or jsonl with a path, or "
        "miniature with a number of scenes, such as miniature:500 (default: %(default)s)",
    )
    text = "where the images are, unless beside their captions (default: as the data set is laid out)"
    command.add_argument("--images", metavar="DIR", help=text)
    command.add_argument("--split", default="test", metavar="NAME", help="part of the data (default: %(default)s)")
    command.add_argument(
        "--model",
        default="miniature-finelip-1",
        metavar="CLIP",
        help="checkpoint, directory or hub id of a FineLIP, Long-CLIP or CLIP, or miniature-clip-1 "
        "(default: %(default)s, the small one that comes with the package)",
    )
    command.add_argument("--tokenizer", metavar="NAME", help="directory or hub id (default: the model's)")
    command.add_argument(
        "--no-stretch",
        dest="stretch",
        action="store_false",
        help="read a CLIP of 77 positions as it is, and texts up to there (default: stretch it to 248)",
    )
    text = "cut texts, start and end token included (default: at the model's positions)"
    command.add_argument("--max-tokens", type=count, metavar="N", help=text)
    text = "fuse also by weights of 0.0, 0.1, … 1.0 for the global similarity (default: by 0.8 alone)"
    command.add_argument("--fusion-sweep", action="store_true", help=text)
    text = "images or texts to encode at a time (default: %(default)s)"
    command.add_argument("--batch-size", type=partial(count, most=MAX_BATCH), default=64, metavar="N", help=text)
    text = "such as cpu, cuda:1, mps (default: an accelerator or else the CPU)"
    command.add_argument("--device", metavar="NAME", help=text)
    command.add_argument("--dtype", choices=DTYPES, default="float32", help="of all weights (default: %(default)s)")
    command.add_argument("--json", metavar="FILE", help="also write the figures, shares from 0 to 1, to a file")


if __name__ == "__main__":
    sys.exit(main())
