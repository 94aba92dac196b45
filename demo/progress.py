"""Drawing beside the page: steps as they happen, and a stop that is heard at the next one."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any


class Stopped(Exception):
    """Somebody pressed stop, or closed the page."""


@dataclass(frozen=True)
class Progress:
    """A step of a drawing: its number, how many there are, and the seconds since the first."""

    step: int
    steps: int
    seconds: float


class Visitors:
    """What each visitor last asked for, so that it can be stopped: a flag by session."""

    def __init__(self) -> None:
        self._flags: dict[str, threading.Event] = {}

    def ask(self, session: str) -> None:
        """A new run is asked for. It may have to wait for others, and can be stopped before it begins."""
        self._flags[session] = threading.Event()

    def flag(self, session: str) -> threading.Event:
        return self._flags.setdefault(session, threading.Event())

    def stop(self, session: str) -> None:
        self.flag(session).set()

    def leave(self, session: str) -> None:
        """The page was closed: what it asked for is stopped, and forgotten."""
        self._flags.pop(session, threading.Event()).set()


def follow(draw: Callable[[Callable[[int, int], None]], Any], flag: threading.Event) -> Iterator[Progress | Any]:
    """Draw in a thread, and hand out its steps as they happen, and last what it drew.

    Args:
        draw: gets what it must call after each step, with the step's number and how many there are.
        flag: ends the drawing at the next step.

    Yields:
        `Progress` for each step, then the result of `draw`.

    Raises:
        Stopped: the flag was set.
        Exception: what `draw` raised.

    Example:
        >>> list(follow(lambda on_step: on_step(1, 1) or "a picture", threading.Event()))[-1]
        'a picture'
    """
    events: queue.Queue[tuple[str, Any]] = queue.Queue()
    started = time.perf_counter()

    def on_step(step: int, steps: int) -> None:
        if flag.is_set():
            raise Stopped
        events.put(("step", Progress(step, steps, time.perf_counter() - started)))

    def work() -> None:
        try:
            if flag.is_set():
                raise Stopped
            events.put(("result", draw(on_step)))
        except BaseException as error:  # whatever it is, whoever follows must hear of it
            events.put(("error", error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            kind, value = events.get()
            if kind == "error":
                raise value
            yield value
            if kind == "result":
                return
    finally:  # also when nobody follows any more: the models must be free before others use them
        if thread.is_alive():
            flag.set()
        thread.join()
