"""The terminal: flags and their errors, and the answer of a command without messages of its libraries."""

import argparse
import difflib
import logging
import operator
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any, NoReturn

# Messages of these modules at import are about parts that no SDXL needs here.
_TALKATIVE = ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao")


def drop_torchvision_warnings() -> None:
    """Drop the warnings of Transformers that image processors do without torchvision.

    Diffusers imports three such processors with every pipeline. No SDXL uses them, and torchvision is not needed. All
    other messages stay, and so do levels and handlers. Call it before these imports.
    """
    logging.getLogger("transformers.utils.import_utils").addFilter(_is_not_about_torchvision)


def _is_not_about_torchvision(record: logging.LogRecord) -> bool:
    return "ImageProcessor` requires torchvision (not installed); falling back to" not in record.getMessage()


# An argument in a message of the library: `a_name`, "a_name is", a_name=, a_name="value" or a_name=True.
_ARGUMENT = re.compile(
    r"""`(\w+)`|(?<![\w/?&.-])(?:([a-z]+_\w+)(?=\ is\ )|(\w+)=(?:(["'])(.*?)\4|True\b|(?=([\w/~-]|\.{1,2}/)?)))"""
)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line. For an unknown flag it names the nearest one.

    Examples:
        >>> parser = Parser(prog="draw")
        >>> _ = parser.add_argument("--guidance-scale")
        >>> parser.parse_args(["--guidence-scale", "3"])
        Traceback (most recent call last):
        SystemExit: 2
    """

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # argparse calls it for commands, too
        options, unknown = super().parse_known_args(self._with_home(sys.argv[1:] if args is None else args), namespace)
        if unknown:
            self.error(self._about(unknown))
        return options, unknown

    def error(self, message: str) -> NoReturn:
        """Exit with one line, without the usage; of several processes of a launcher the first prints it."""
        line = f"{self.prog}: error: {' '.join(message.split())} (see --help)\n"
        self.exit(2, line if is_first_process() else None)

    @staticmethod
    def _with_home(arguments: Sequence[str]) -> list[str]:
        """The arguments with `--flag=~/file` expanded: shells expand a `~` at the beginning of a word alone."""
        found = [re.fullmatch(r"(--[\w-]+=)(~/.*)", text, re.DOTALL) for text in arguments]
        pairs = zip(found, arguments, strict=True)
        return [match[1] + os.path.expanduser(match[2]) if match else text for match, text in pairs]

    def _about(self, unknown: list[str]) -> str:
        flag = next((text.partition("=")[0] for text in unknown if text.startswith("-")), None)
        if flag is None:
            return f"unrecognized arguments: {' '.join(unknown)[:100]} (a text of several words needs quotes)"
        near = difflib.get_close_matches(flag, self._option_string_actions, n=1, cutoff=0.5)
        return f"{flag[:60]} is no flag here{f': did you mean {near[0]}?' if near else ''}"


MAX_NUMBER = 10**9  # for flags without a smaller bound


def number(
    kind: type[int] | type[float],
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = MAX_NUMBER,
    below: float | None = None,
) -> Callable[[str], Any]:
    """The type of a flag: a number within bounds.

    Args:
        kind: int or float.
        least: the lowest number that is allowed.
        above: in place of `least`, the highest number that is too low.
        most: the highest number that is allowed. Without any bound the number may also be infinite or none (NaN).
        below: in place of `most`, the lowest number that is too high.

    Examples:
        >>> number(int, above=0)("8")
        8
        >>> number(float, least=0, below=1)("1")
        Traceback (most recent call last):
        argparse.ArgumentTypeError: expected a number below 1 instead of 1
    """
    name = "a whole number" if kind is int else "a number"
    bounds: tuple[tuple[str, float | None, Callable[[Any, Any], bool]], ...] = (
        ("above", above, operator.gt),
        ("of at least", least, operator.ge),
        ("below", below, operator.lt),
        ("of at most", most, operator.le),
    )

    def parse(text: str) -> Any:
        given = f"instead of {text.strip()[:60] or 'nothing'}"
        try:
            value = None if "_" in text else kind(text)  # Python's 1_000 is nobody's
        except ValueError:
            value = None
        for words, bound, holds in bounds:
            if bound is not None and (value is None or not holds(value, bound)):
                raise argparse.ArgumentTypeError(f"expected {name} {words} {bound:,} {given}")
        if value is None:
            raise argparse.ArgumentTypeError(f"expected {name} {given}")
        return value

    return parse


COUNT = number(int, least=1)


def is_first_process() -> bool:
    """Whether this is the first process that a launcher has started, or the only one, before they know of each other.

    Examples:
        >>> is_first_process()
        True
    """
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def refused_once() -> Iterator[None]:
    """Around checks that end alike in every process of a launcher: the others than the first exit with 2 in silence."""
    try:
        yield
    except (ValueError, TypeError, OSError):
        if is_first_process():
            raise
        sys.exit(2)


def with_flags(message: str, flags: Mapping[str, str]) -> str:
    """A message of the library, with flags in the place of its arguments.

    Args:
        message: the message.
        flags: flags by the names of arguments; other names stay.

    Examples:
        >>> with_flags('`steps` is 0; set overflow="window", or pass dtype=.', {"steps": "--steps", "dtype": "--dtype"})
        '--steps is 0; set overflow="window", or pass --dtype.'
    """

    def with_flag(found: re.Match[str]) -> str:
        quoted, bare, name, _, value, following = found.groups()
        flag = flags.get(quoted or bare or name)
        return found[0] if flag is None else flag + (f" {value}" if value is not None else " " if following else "")

    return _ARGUMENT.sub(with_flag, message)


def announce(text: str) -> None:
    """Print a line in a terminal before seconds without a word. What only reads errors gets errors alone.

    Examples:
        >>> announce("Opening miniature…")
    """
    if sys.stderr is not None and sys.stderr.isatty():
        print(text, file=sys.stderr, flush=True)


def quiet_imports() -> None:
    """Let modules that Diffusers, Transformers and peft import log errors only, and drop a warning about each other.

    Call it before these imports.
    """
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    # peft asks Transformers by a name that is deprecated there.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)


def quiet_transformers() -> None:
    """As `quiet_imports`, and let Transformers log errors only and show no progress bars."""
    quiet_imports()
    from transformers import utils

    transformers_logging: Any = utils.logging  # has no types
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def quiet_diffusers() -> None:
    """As `quiet_transformers`, and let Diffusers print each of its messages once from now on."""
    quiet_transformers()
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.get_logger()  # this makes its handler
    for handler in logging.getLogger("diffusers").handlers:
        if type(handler) is not logging.StreamHandler:  # somebody else's
            continue
        for former in [added for added in handler.filters if isinstance(added, _Once)]:
            handler.removeFilter(former)
        handler.addFilter(_Once())


class _Once(logging.Filter):
    def __init__(self) -> None:
        super().__init__()
        self.said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        is_new = message not in self.said
        self.said.add(message)
        return is_new


@contextmanager
def messages_with_flags(flags: Mapping[str, str]) -> Iterator[None]:
    """Print the warnings of this package with flags in the place of its arguments, each once.

    Args:
        flags: see `with_flags`.

    Examples:
        >>> with messages_with_flags({"dtype": "--dtype"}):
        ...     pass
    """

    class Formatter(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            return with_flags(super().format(record), flags)

    handler, once = logging.lastResort, _Once()  # it prints the messages of loggers without a handler
    if handler is None:
        yield
        return
    before = handler.formatter
    handler.setFormatter(Formatter())
    handler.addFilter(once)
    try:
        yield
    finally:
        handler.setFormatter(before)
        handler.removeFilter(once)


@contextmanager
def printing_stops_nothing() -> Iterator[None]:
    """Keep work going if its report cannot be printed on standard output.

    Characters that the terminal does not know are printed by their numbers, and text after a closed pipe (`| head -1`)
    is dropped.

    Examples:
        >>> with printing_stops_nothing():
        ...     print("a fox")
        a fox
    """
    if sys.stdout is None:
        yield
        return
    lenient: Any = _Lenient(sys.stdout)
    with redirect_stdout(lenient):
        try:
            yield
        finally:
            lenient.flush()


class _Lenient:
    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        encoding = self._stream.encoding or "utf-8"
        with self._unread():
            self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        with self._unread():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextmanager
    def _unread(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            # Drop the rest, also what Python itself flushes at its end.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
