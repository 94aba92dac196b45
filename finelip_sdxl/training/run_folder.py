"""The folder of a training run: checkpoints to go on from after any stop, and the models that came out of it."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import stat
import sys
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, load
from filelock import FileLock, Timeout
from safetensors.torch import load_file

from finelip_sdxl.files import writing_errors

MODELS = ("best", "last", "after-text")  # that recipes save beside checkpoints/


MANIFEST = "manifest.json"


# What a checkpoint holds of the random generators; Accelerate goes on without a word if they are not there.
RANDOM_STATES = {"random_state", "numpy_random_seed", "torch_manual_seed"}


class RunFolder:
    """Where a run keeps `checkpoints/` and its models. All that is read again was written whole, and then moved; what
    has changed since then is noticed.

    Args:
        folder: need not exist; held by `only_run`.
        accelerator: with the models and optimizers that checkpoints hold prepared.
        settings: what must stay as it is when the run goes on, by the name of its flag.
        keep: newest checkpoints that are not deleted.
        also: what else goes on, by the name of its file: anything that has `state_dict` and `load_state_dict`, such as
            an average of the weights. What is registered with the accelerator instead is read as a pickle that may run
            code.
    """

    def __init__(
        self,
        folder: Path,
        accelerator: Accelerator,
        settings: dict[str, Any],
        keep: int,
        also: dict[str, Any] | None = None,
    ) -> None:
        self.folder, self.accelerator, self.settings, self.keep = folder, accelerator, settings, keep
        self.also = also or {}

    def resume(self) -> dict[str, Any] | None:
        """Load the newest whole checkpoint and give the progress that was saved with it; None if there is none.

        Newer ones that are damaged are named.

        Raises:
            ValueError: if all are damaged, or if it is of other settings or of another model, or holds code beside
                tensors and numbers.
        """
        found = self._newest_whole() if self.accelerator.is_main_process else None
        newest, notes = gather_object([found])[0]  # all go on from the one that the main process sees
        if newest is None and notes:
            raise ValueError(
                f"{' '.join(notes)} No checkpoint is left to go on from: delete {self.folder / 'checkpoints'} to begin"
                " anew, or pass another --output-dir."
            )
        for note in notes:
            self.accelerator.print(f"{note} The run goes on from {newest.name}.")
        if newest is None:
            return None
        progress = json.loads((newest / "progress.json").read_text())
        if progress.pop("manifest", None) is None:
            self.accelerator.print(f"{newest} is of an earlier version: it can be read, and no more is known of it.")
        begun = progress.pop("settings", {})
        changed = [
            f"{name.replace('_', '-')} was {begun[name]} and is {now}"
            for name, now in self.settings.items()
            if begun.get(name, now) != now
        ]
        if changed:
            raise ValueError(
                f"{self.folder} holds a run of other settings ({', '.join(changed)}): pass another --output-dir."
            )
        try:
            self.accelerator.load_state(str(newest))
            for name, item in self.also.items():
                state = torch.load(newest / f"{name}.pt", map_location=self.accelerator.device, weights_only=True)
                item.load_state_dict(state)
        except (RuntimeError, ValueError, KeyError) as error:
            raise ValueError(f"{newest} is a checkpoint of another model: pass another --output-dir.") from error
        except pickle.UnpicklingError as error:
            raise ValueError(f"{newest} holds more than tensors and numbers: no run wrote it, delete it.") from error
        return progress

    def save(self, progress: dict[str, Any]) -> None:
        """A checkpoint of `progress["step"]`; every process calls this.

        Raises:
            OSError: in every process, if one of them cannot write; the checkpoints before are as they were.
        """
        target = self.folder / "checkpoints" / f"step-{progress['step']:07d}"
        temporary, is_main = target.with_suffix(".tmp"), self.accelerator.is_main_process
        with together(self.accelerator):
            if is_main:
                remove(temporary)
        with together(self.accelerator), folder_written(target, temporary):
            self.accelerator.save_state(str(temporary))
            if is_main:
                for name, item in self.also.items():
                    torch.save(item.state_dict(), temporary / f"{name}.pt")
                content = {**progress, "settings": self.settings, "manifest": MANIFEST}
                (temporary / "progress.json").write_text(json.dumps(content))
        with together(self.accelerator), folder_written(target, temporary):
            if is_main:
                seal(temporary)
                put(temporary, target)
                # Newer ones are damaged, or the run would have gone on from them.
                earlier = [path for path in self._checkpoints() if path.name <= target.name]
                newer = [path for path in self._checkpoints() if path.name > target.name]
                for path in (*earlier[: -self.keep], *newer):
                    remove(path)

    def save_model(self, name: str, *parts: Any, **subfolders: Any) -> None:
        """One folder of a model, its tokenizer and what else has `save_pretrained`; the main process writes it.

        Args:
            name: one of `MODELS`.
            parts: go into the folder itself.
            subfolders: go into one each, of their name.

        Raises:
            OSError: if it cannot be written; what was there is as it was.
        """
        if not self.accelerator.is_main_process:
            return
        target = self.folder / name
        temporary = target.with_suffix(".tmp")
        with folder_written(target, temporary):
            remove(temporary)
            for part in parts:
                part.save_pretrained(temporary)
            for subfolder, part in subfolders.items():
                part.save_pretrained(temporary / subfolder)
            seal(temporary)
            put(temporary, target)

    def holds(self, name: str) -> bool:
        """Whether a model is there as it was saved; of one of an earlier version, whether it is there."""
        folder = self.folder / name
        return folder.is_dir() and not ((folder / MANIFEST).exists() and damage(folder))

    def _checkpoints(self) -> list[Path]:
        return sorted((self.folder / "checkpoints").glob("step-" + 7 * "[0-9]"))

    def _newest_whole(self) -> tuple[Path | None, list[str]]:
        """The checkpoint, and a sentence about each that is newer and damaged."""
        notes = []
        for path in reversed(self._checkpoints()):
            has_manifest = (path / MANIFEST).exists()
            problem = damage(path) if has_manifest else damage_of_earlier_version(path, self.also)
            if problem is None:
                return path, notes
            notes.append(f"{path} is damaged: {problem}.")
        return None, notes


# Who writes to a folder


@contextmanager
def only_run(folder: Path, accelerator: Accelerator) -> Iterator[None]:
    """Hold the folder of a run, and clear it of what one that was killed left half.

    Raises:
        OSError: in every process, if another run holds it.
    """
    with ExitStack() as stack:
        with together(accelerator):
            if accelerator.is_main_process:
                refusal = f"Another run is writing to {folder}: wait for its end, or pass another --output-dir."
                stack.enter_context(held(folder, refusal))
                clear_of_the_dead(folder)
        yield


@contextmanager
def held(folder: Path, refusal: str | None = None) -> Iterator[None]:
    """A folder that no other process holds; the lock of one that was killed is free. Nothing is left of it.

    Args:
        folder: is made, and removed again if it stays empty.
        refusal: what to say where another holds it; None waits for its end.

    Raises:
        OSError: if another holds it.
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
        (folder / ".lock").unlink(missing_ok=True)  # before it is free: a file made after that is another's
        lock.release()
        if is_new and not any(folder.iterdir()):
            folder.rmdir()


def clear_of_the_dead(folder: Path) -> None:
    """Of a run that was killed, remove what it had not written whole, and give back what it was about to replace."""
    checkpoints = folder / "checkpoints"
    for replaced in (*(place_of_replaced(folder / name) for name in MODELS), *checkpoints.glob(".step-*.old")):
        target = replaced.with_name(replaced.stem.removeprefix("."))
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        remove(replaced)
        remove(target.with_suffix(".tmp"))
    for path in (*checkpoints.glob("step-*.tmp"), *(folder / "validation").glob(".step-*.png*")):
        remove(path)


@contextmanager
def together(accelerator: Accelerator) -> Iterator[None]:
    """What hinders one process in this block ends all of them, since others would wait for it; all pass here.

    Raises:
        OSError: in every process, if one raised it.
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


# Folders that are whole


@contextmanager
def folder_written(target: Path, temporary: Path) -> Iterator[None]:
    """Where a folder is written under a temporary name, which goes if that fails.

    Raises:
        OSError: in one sentence, whichever library cannot write.
    """
    try:
        with writing_errors(target):
            yield
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def seal(folder: Path) -> None:
    """Write down what a folder holds, and see that the disk has it before anything is moved.

    Files get the mode that others have here; safetensors gives them to their owner alone.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    entries = {}
    for path in files:
        to_disk(path)
        entries[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": digest(path)}
    (folder / MANIFEST).write_text(json.dumps(entries, indent=1))
    mode = stat.S_IMODE((folder / MANIFEST).stat().st_mode)
    for path in files:
        path.chmod(mode)
    for path in (folder / MANIFEST, *(path for path in folder.rglob("*") if path.is_dir()), folder):
        to_disk(path)


def damage(folder: Path) -> str | None:
    """What is not as `seal` wrote it down, or None."""
    try:
        entries = json.loads((folder / MANIFEST).read_text())
        if not entries:
            return f"{MANIFEST} lists nothing"
        for name, entry in entries.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["bytes"]:
                return f"{name} has {path.stat().st_size:,} bytes instead of {entry['bytes']:,}"
            if digest(path) != entry["sha256"]:
                return f"{name} is not what was written"
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        return f"{MANIFEST} cannot be read ({error or type(error).__name__})"
    return None


def damage_of_earlier_version(checkpoint: Path, also: Collection[str]) -> str | None:
    """What is wrong with a checkpoint that has no manifest, as far as reading it shows, or None."""
    name = "progress.json"
    try:
        progress = json.loads((checkpoint / name).read_text())
        if not (isinstance(progress["step"], int) and isinstance(progress.get("settings", {}), dict)):
            return f"{name} is not what a run writes"
        if "manifest" in progress:
            return f"{MANIFEST} is missing"
        processes = progress.get("settings", {}).get("processes", 1)
        names = ["model.safetensors", "optimizer.bin", *(f"random_states_{number}.pkl" for number in range(processes))]
        for name in (*names, *(f"{name}.pt" for name in also)):
            content = (load_file if name == "model.safetensors" else load)(checkpoint / name)
            if name == "model.safetensors" and not all(tensor.isfinite().all() for tensor in content.values()):
                return f"{name} holds numbers that are not finite"
            if name.startswith("random_states") and not content.keys() >= RANDOM_STATES:
                return f"{name} is not what a run writes"
    except Exception as error:  # broken files make readers raise almost anything
        is_missing = isinstance(error, FileNotFoundError) or not (checkpoint / name).exists()
        return f"{name} is missing" if is_missing else f"{name} cannot be read ({type(error).__name__})"
    return None


def put(temporary: Path, target: Path) -> None:
    """Move a folder to its place, from which another goes first, and only then for good."""
    replaced = place_of_replaced(target)
    remove(replaced)
    if os.path.lexists(target):
        os.replace(target, replaced)
    os.replace(temporary, target)
    to_disk(target.parent)
    remove(replaced)


def place_of_replaced(target: Path) -> Path:
    """Where what another takes the place of waits for that."""
    return target.with_name(f".{target.name}.old")


def remove(path: Path) -> None:
    """A folder or a file, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def digest(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            found.update(piece)
    return found.hexdigest()


def to_disk(path: Path) -> None:
    """See that a file or folder outlives a loss of power."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
