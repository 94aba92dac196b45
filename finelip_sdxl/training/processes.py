"""Processes that share a folder: one run at a time, and all processes of a run in step."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object
from filelock import FileLock, Timeout

from finelip_sdxl.files import check_writable, writing_errors, written_folder
from finelip_sdxl.training.manifest import write_manifest


@contextmanager
def only_run(folder: Path, accelerator: Accelerator) -> Iterator[None]:
    """Locks the folder of a run, and removes unfinished files of a run that was killed.

    Raises:
        OSError: another run has locked it; in every process.
    """
    with ExitStack() as stack:
        with together(accelerator):
            if accelerator.is_main_process:
                refusal = f"Another run is writing to {folder}: wait for its end, or pass another folder."
                stack.enter_context(held(folder, refusal))
                for place in (folder, folder / "checkpoints", folder / "validation"):
                    if place.is_dir():
                        check_writable(place)  # this removes the unfinished files
        yield


@contextmanager
def held(folder: Path, refusal: str | None = None) -> Iterator[None]:
    """Locks a folder against other processes. The lock of a process that was killed is free.

    Args:
        folder: the folder; it is made, and removed again if it stays empty.
        refusal: the message if another process has locked it; None waits for that process.

    Raises:
        OSError: another process has locked it, and `refusal` is not None.
    """
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if refusal is not None:
            raise OSError(refusal) from None
        print(f"waiting for another run that writes to {folder}", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        (folder / ".lock").unlink(missing_ok=True)  # before the release: a file made later belongs to another process
        lock.release()
        if is_new and not any(folder.iterdir()):
            folder.rmdir()


@contextmanager
def together(accelerator: Accelerator) -> Iterator[None]:
    """Ends all processes if one of them fails in this block, which all must enter. (The others would wait for it.)

    Raises:
        OSError: one process raised it; in every process.
    """
    problem = None
    try:
        yield
    except OSError as error:
        problem = error
    problems = [text for text in gather_object([None if problem is None else str(problem)]) if text]
    if problem is not None:
        raise problem
    if problems:
        raise OSError(problems[0])


@contextmanager
def written_together(folder: Path, accelerator: Accelerator) -> Iterator[Path]:
    """An empty folder for all processes. At the end it gets a manifest and takes the place of `folder`.

    Raises:
        OSError: one process cannot write; in every process. The old folder has not changed.
    """
    is_main = accelerator.is_main_process
    with together(accelerator), ExitStack() as stack:  # the folder is moved at the end of the stack
        with together(accelerator):
            mine = stack.enter_context(written_folder(folder, replaced=os.listdir)) if is_main else None
        new: Path = gather_object([mine])[0]
        with together(accelerator), writing_errors(folder):
            yield new
        if is_main:
            write_manifest(new)
