"""The output of a command: its answer without messages of its libraries, on any terminal."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

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


def quiet_imports() -> None:
    """Let modules that Diffusers, Transformers and peft import log errors only. Call it before these imports."""
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)


def quiet_transformers() -> None:
    """As `quiet_imports`, and let Transformers log errors only and show no progress bars."""
    quiet_imports()
    from transformers import utils

    transformers_logging: Any = utils.logging  # has no types
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


@contextmanager
def printing_stops_nothing() -> Iterator[None]:
    """Keep work going if its report cannot be printed on standard output.

    Characters that the terminal does not know are printed by their numbers, and text after a closed pipe (`| head -1`)
    is dropped.

    Example:
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
