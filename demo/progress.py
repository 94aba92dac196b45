"""Drawing in a thread beside the page: steps as they happen, and a stop at the next step."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

MAX_VISITORS = 1000  # sessions that are remembered while nothing runs for them; anybody can invent sessions
Value = TypeVar("Value")


class Stopped(Exception):
    """Somebody pressed stop, or closed the page."""

    def __init__(self) -> None:
        super().__init__("Stopped before it was done: ask for it again.")


@dataclass(frozen=True)
class Progress:
    """A step of a drawing: its number, the number of all steps, and the seconds since the start."""

    step: int
    steps: int
    seconds: float


class Visitors:
    """The runs of each session, so that they can be stopped, and the text that it typed last. Runs that are over are
    forgotten, and at most `MAX_VISITORS` runs that never began are kept."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asked: dict[str, threading.Event] = {}
        self._running: dict[str, set[threading.Event]] = {}
        self._typed: dict[str, str] = {}

    def ask(self, session: str) -> None:
        """Note a new run. It may wait for others, and can be stopped before it begins."""
        with self._lock:
            _remember(self._asked, session, threading.Event())

    @contextmanager
    def running(self, session: str) -> Iterator[threading.Event]:
        """Within this context a run goes on; the value is the flag that stops it."""
        with self._lock:
            flag = self._asked.pop(session, None) or threading.Event()
            self._running.setdefault(session, set()).add(flag)
        try:
            yield flag
        finally:
            with self._lock:
                self._running[session].discard(flag)
                if not self._running[session]:
                    del self._running[session]

    def stop(self, session: str) -> None:
        with self._lock:
            waiting = [self._asked[session]] if session in self._asked else []
            for flag in (*waiting, *self._running.get(session, ())):
                flag.set()

    def leave(self, session: str) -> None:
        """Stop and forget the runs of a session whose page was closed."""
        self.stop(session)
        with self._lock:
            self._asked.pop(session, None)
            self._typed.pop(session, None)

    def types(self, session: str, text: str) -> None:
        with self._lock:
            _remember(self._typed, session, text)

    def typed_since(self, session: str, text: str) -> bool:
        """Whether a session has typed another text after this one."""
        return self._typed.get(session, text) != text


def _remember(values: dict[str, Value], session: str, value: Value) -> None:
    values.pop(session, None)
    values[session] = value
    if len(values) > MAX_VISITORS:
        del values[next(iter(values))]  # the oldest


def follow(draw: Callable[[Callable[[int, int], None]], Any], flag: threading.Event) -> Iterator[Progress | Any]:
    """Draw in a thread, and yield its steps as they happen, and its result last.

    Args:
        draw: a function of `on_step`, which it calls after each step with its number and the number of all steps.
        flag: ends the drawing at the next step.

    Yields:
        `Progress` for each step, then the result of `draw`.

    Raises:
        Stopped: the flag was set.
        Exception: the error of `draw`.

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
        except BaseException as error:  # any error must reach the follower
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
    finally:  # also when the follower is gone: the models must be free before others use them
        if thread.is_alive():
            flag.set()
        thread.join()
