"""What a command prints: its answer alone, whatever its libraries say, and whatever the terminal can show."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

# What these say while they are imported is about parts of theirs that no SDXL needs here.
_TALKATIVE = ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao", "transformers.utils.import_utils")


def quiet_imports() -> None:
    """Errors only of what Diffusers, Transformers and peft import along with themselves, when a command is about to
    import them."""
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)


def quiet_transformers() -> None:
    """`quiet_imports`, errors only of Transformers itself, and no bar for weights that load in milliseconds."""
    quiet_imports()
    from transformers import utils

    transformers_logging: Any = utils.logging  # has no types
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


@contextmanager
def printing_stops_nothing() -> Iterator[None]:
    """A report on standard output that cannot be shown ends no work: characters that the terminal does not know are
    spelled by their numbers, and what nobody reads any more (`| head -1`) is dropped.

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
            # The rest goes nowhere, also what Python itself writes out when it ends.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
