"""Drawing in a thread beside the page: a line of those who wait, steps as they happen, a stop at the next step."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

MAX_VISITORS = 1000  # sessions that are remembered while nothing runs for them; anybody can invent sessions
POLL_SECONDS = 0.25  # between two looks at the line
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


@dataclass(frozen=True)
class Waiting:
    """A run that waits for its turn: its place in line, 1 for the next, and the seconds to expect; None before any run
    was timed."""

    place: int
    seconds: float | None


class Line:
    """The line of those who want to draw: there is one model, and the first in line has it.

    Args:
        longest: number of runs that may wait. Further ones are refused.
    """

    def __init__(self, longest: int) -> None:
        self.longest = longest
        self._lock = threading.Lock()
        self._places: list[Place] = []
        self._pace: float | None = None  # seconds for a unit of work, an average in which late runs count more

    @contextmanager
    def join(self, work: float) -> Iterator[Place]:
        """A place at the end of the line, which is given up after the context.

        Args:
            work: the size of the run in any unit; times are guessed from it.

        Raises:
            ValueError: too many wait.
        """
        place = Place(self, work)
        with self._lock:
            if len(self._places) > self.longest:
                raise ValueError(f"{self.longest} others wait for their turn already: try again in a few minutes.")
            self._places.append(place)
        try:
            yield place
        finally:
            with self._lock:
                self._places.remove(place)

    def _ahead(self, place: Place) -> Waiting:
        with self._lock:
            ahead = self._places[: self._places.index(place)]
            seconds = None if self._pace is None else self._pace * sum(other.work for other in ahead)
            return Waiting(len(ahead), seconds)

    def _note_pace(self, pace: float) -> None:
        with self._lock:
            self._pace = pace if self._pace is None else 0.8 * self._pace + 0.2 * pace


class Place:
    """A place in a line.

    Attributes:
        work: the work that is left.
    """

    def __init__(self, line: Line, work: float) -> None:
        self.work, self._line = work, line
        self._since = 0.0

    def wait(self, flag: threading.Event) -> Iterator[Waiting]:
        """Wait for the turn, and yield the place in line again and again until then.

        Raises:
            Stopped: the flag was set.
        """
        while (waiting := self._line._ahead(self)).place:
            yield waiting
            if flag.wait(POLL_SECONDS):
                raise Stopped
        self._since = time.perf_counter()

    def advance(self, work: float) -> None:
        """Note that a part of the work is done."""
        now = time.perf_counter()
        self._line._note_pace((now - self._since) / work)
        self.work, self._since = max(0.0, self.work - work), now


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

    def is_busy(self, session: str) -> bool:
        """Whether a run of this session goes on, or was asked for."""
        with self._lock:
            return session in self._asked or session in self._running

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

    Examples:
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
