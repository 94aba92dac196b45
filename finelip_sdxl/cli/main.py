"""The command line: `finelip-sdxl generate`, `compare`, `convert`, `export`, `tokens` and `evaluate`.

Nothing heavy is imported before a command runs, so that `--help` answers at once.
"""

import argparse
import shlex
import signal
import sys
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from typing import Any, NoReturn

from finelip_sdxl.cli.compare import COLUMNS, compare
from finelip_sdxl.cli.convert import convert
from finelip_sdxl.cli.evaluate import add_retrieval, evaluate_retrieval
from finelip_sdxl.cli.export import FORMATS, export
from finelip_sdxl.cli.generate import generate
from finelip_sdxl.cli.options import (
    MAX_PICTURES,
    add_adapter,
    add_base,
    add_config,
    add_loading,
    add_pipeline,
    add_refiner,
    count,
)
from finelip_sdxl.cli.tokens import tokens
from finelip_sdxl.console import printing_stops_nothing
from finelip_sdxl.files import stopped_by_signals
from finelip_sdxl.options import HIDDEN_STATES, OVERFLOW, SHORT_PROMPT_ENCODER, WEIGHTING


@printing_stops_nothing()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; `arguments` are those of the shell by default.

    Returns:
        The exit code: 0, 2 after a mistake in the input, which one line on stderr explains, or 128 and the number of
        the signal that stopped it.

    Example:
        >>> from finelip_sdxl.cli.main import main
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
    _add_encoding(command)

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
    _add_encoding(command)

    command = _command(commands, "convert", convert, "save an SDXL with text encoders of 248 positions")
    command.add_argument("base", help="hub id, directory or single file of an SDXL, or miniature")
    add_config(command)
    command.add_argument("out", help="directory to write")
    command.add_argument("--overwrite", action="store_true", help="replace a pipeline that is there")
    add_loading(command, dtype="float32", dtype_help="%(default)s")
    add_adapter(command)
    _add_encoding(command)

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
    _add_encoding(command, hidden_states=False)

    group = commands.add_parser("evaluate", help="measure a model", description="Measure a model.")
    subjects = group.add_subparsers(dest="subject", required=True, metavar="retrieval")
    command = _command(
        subjects, "retrieval", evaluate_retrieval, "measure how well texts find their images, and images their texts"
    )
    add_retrieval(command)
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


def _add_encoding(command: argparse.ArgumentParser, hidden_states: bool = True) -> None:
    command.add_argument(
        "--short-prompt-encoder",
        choices=SHORT_PROMPT_ENCODER,
        help="up to 77 tokens are read as stock SDXL does, or stretched (default: as saved, or stock)",
    )
    command.add_argument("--overflow", choices=OVERFLOW, help="past 248 tokens (default: as saved, or window)")
    text = (
        "read weights in the prompt: compel's (word)1.3 and word++, or a1111's (word:1.3), ((word)), [word] and BREAK"
    )
    command.add_argument("--weighting", choices=("none", *WEIGHTING[1:]), help=f"{text} (default: as saved, or none)")
    if hidden_states:
        text = "of the text encoders for the UNet (default: as saved, or penultimate)"
        command.add_argument("--hidden-states", choices=HIDDEN_STATES, help=text)


if __name__ == "__main__":
    sys.exit(main())
