"""The command line: `finelip-sdxl generate`, `compare`, `convert`, `export`, `tokens` and `evaluate`.

Nothing heavy is imported before a command runs, so that `--help` answers at once.
"""

import signal
import sys
from collections.abc import Sequence
from importlib.metadata import version

from finelip_sdxl.cli import compare, convert, evaluate, export, generate, tokens
from finelip_sdxl.cli.options import flags_of
from finelip_sdxl.console import Parser, messages_with_flags, printing_stops_nothing, with_flags
from finelip_sdxl.files import stopped_by_signals
from finelip_sdxl.report import command_line

COMMANDS = (generate, compare, convert, export, tokens, evaluate)  # in the order in which `--help` lists them


@printing_stops_nothing()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: a command with its arguments (default: the arguments of the shell).

    Returns:
        The exit code: 0; 2 after a mistake in the input, with one line on stderr; 128 plus a signal's number after a
        stop.

    A command that prints its report::

        main(["tokens", "a red square above a blue ring"])
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments)
    options.command_line = command_line("finelip-sdxl", arguments)
    flags = flags_of(options)
    try:
        with stopped_by_signals(), messages_with_flags(flags):
            options.run(options)
    except (ValueError, TypeError, OSError, MemoryError) as error:
        message = with_flags(" ".join(str(error).split()), flags)
        print(f"{options.prog}: error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        print(f"{options.prog}: stopped", file=sys.stderr)
        return 128 + getattr(stopped, "number", signal.SIGINT)
    return 0


def _parser() -> Parser:
    parser = Parser(prog="finelip-sdxl", description="SDXL for prompts of any length.")
    parser.add_argument("--version", action="version", version=version("finelip-sdxl"))
    names = " | ".join(command.__name__.rpartition(".")[2] for command in COMMANDS)
    commands = parser.add_subparsers(dest="command", required=True, metavar=names)
    for command in COMMANDS:
        command.add_parser(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
