"""The folder of a training run: checkpoints to go on from after any stop, and the models that came out of it."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, load
from safetensors.torch import load_file

from finelip_sdxl.files import written_folder
from finelip_sdxl.training.manifest import MANIFEST, find_damage, write_manifest
from finelip_sdxl.training.processes import together, written_together

MODELS = ("best", "last", "after-text")  # the names of models that recipes save beside checkpoints/


class Stateful(Protocol):
    """An object that a checkpoint can hold, such as an average of the weights."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any: ...


class Saveable(Protocol):
    """A model, a tokenizer, or anything else that saves itself to a folder."""

    def save_pretrained(self, folder: Path, /) -> Any: ...


class RunFolder:
    """Keeps `checkpoints/` and the models of a run. Each is written whole, with a manifest that shows later damage.

    Args:
        folder: need not exist; held by `only_run`.
        accelerator: has prepared the models and optimizers that checkpoints hold.
        settings: must stay as they are when the run goes on.
        keep: the number of newest checkpoints that are not deleted.
        also: other objects that checkpoints hold, by the name of their file. Objects that are registered with the
            accelerator instead are loaded from a pickle, which may run code.
    """

    def __init__(
        self,
        folder: Path,
        accelerator: Accelerator,
        settings: dict[str, Any],
        keep: int,
        also: dict[str, Stateful] | None = None,
    ) -> None:
        self.folder, self.accelerator, self.settings, self.keep = folder, accelerator, settings, keep
        self.also = also or {}

    def resume(self) -> dict[str, Any] | None:
        """Loads the newest whole checkpoint and returns the progress that was saved with it; None if there is none.

        Newer checkpoints that are damaged are named.

        Raises:
            ValueError: if all are damaged, or if it is of other settings or of another model, or holds code beside
                tensors and numbers.
        """
        found = self._newest_whole() if self.accelerator.is_main_process else None
        newest, notes = gather_object([found])[0]  # all go on from the one that the main process sees
        if newest is None and notes:
            raise ValueError(
                f"{' '.join(notes)} No checkpoint is left to go on from: delete {self.folder / 'checkpoints'} to begin"
                " anew, or pass another folder."
            )
        for note in notes:
            self.accelerator.print(f"{note} The run goes on from {newest.name}.")
        if newest is None:
            return None
        progress: dict[str, Any] = json.loads((newest / "progress.json").read_text())
        if progress.pop("manifest", None) is None:
            self.accelerator.print(f"{newest} is of an earlier version: it can be read, and no more is known of it.")
        self._check_settings(progress.pop("settings", {}))
        self._load(newest)
        return progress

    def save(self, progress: dict[str, Any]) -> None:
        """Writes a checkpoint of `progress["step"]`; every process calls this.

        Raises:
            OSError: in every process, if one of them cannot write; the checkpoints before are as they were.
        """
        is_main = self.accelerator.is_main_process
        checkpoint = self.folder / "checkpoints" / f"step-{progress['step']:07d}"
        if is_main and checkpoint.is_file():
            checkpoint.unlink()  # damage: no checkpoint is a file
        with written_together(checkpoint, self.accelerator) as new:
            self.accelerator.save_state(str(new))
            if is_main:
                for name, item in self.also.items():
                    torch.save(item.state_dict(), new / f"{name}.pt")
                content = {**progress, "settings": self.settings, "manifest": MANIFEST}
                (new / "progress.json").write_text(json.dumps(content))
        with together(self.accelerator):
            if is_main:
                self._delete_others(checkpoint.name)

    def save_model(self, name: str, *parts: Saveable, **subfolders: Saveable) -> None:
        """Writes a model, its tokenizer and the like to one folder; the main process does it.

        Args:
            name: one of `MODELS`.
            parts: go into the folder itself.
            subfolders: go into one folder each, by their name.

        Raises:
            OSError: if it cannot be written; what was there is as it was.
        """
        if not self.accelerator.is_main_process:
            return
        with written_folder(self.folder / name, replaced=os.listdir) as new:
            for part in parts:
                part.save_pretrained(new)
            for subfolder, part in subfolders.items():
                part.save_pretrained(new / subfolder)
            write_manifest(new)

    def holds(self, name: str) -> bool:
        """Returns whether a model is there as it was saved, or, without a manifest (an earlier version), is there."""
        folder = self.folder / name
        return folder.is_dir() and not ((folder / MANIFEST).exists() and find_damage(folder))

    def _newest_whole(self) -> tuple[Path | None, list[str]]:
        """The newest checkpoint that is whole, and a sentence about each newer one."""
        notes: list[str] = []
        for checkpoint in reversed(self._checkpoints()):
            has_manifest = (checkpoint / MANIFEST).exists()
            damage = find_damage(checkpoint) if has_manifest else find_damage_by_reading(checkpoint, self.also)
            if damage is None:
                return checkpoint, notes
            notes.append(f"{checkpoint} is damaged: {damage}.")
        return None, notes

    def _check_settings(self, begun: dict[str, Any]) -> None:
        changed = [
            f"{name.replace('_', '-')} was {begun[name]} and is {now}"
            for name, now in self.settings.items()
            if begun.get(name, now) != now
        ]
        if changed:
            raise ValueError(
                f"{self.folder} holds a run of other settings ({', '.join(changed)}): pass another folder."
            )

    def _load(self, checkpoint: Path) -> None:
        try:
            self.accelerator.load_state(str(checkpoint))
            for name, item in self.also.items():
                state = torch.load(checkpoint / f"{name}.pt", map_location=self.accelerator.device, weights_only=True)
                item.load_state_dict(state)
        except (RuntimeError, ValueError, KeyError) as error:
            raise ValueError(f"{checkpoint} is a checkpoint of another model: pass another folder.") from error
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{checkpoint} holds more than tensors and numbers: no run wrote it, delete it."
            ) from error

    def _delete_others(self, newest: str) -> None:
        """Deletes checkpoints that are too old, and newer ones: they are damaged, or the run had gone on from them."""
        earlier = [checkpoint for checkpoint in self._checkpoints() if checkpoint.name <= newest]
        newer = [checkpoint for checkpoint in self._checkpoints() if checkpoint.name > newest]
        for checkpoint in (*earlier[: -self.keep], *newer):
            if checkpoint.is_dir() and not checkpoint.is_symlink():
                shutil.rmtree(checkpoint)
            else:
                checkpoint.unlink()

    def _checkpoints(self) -> list[Path]:
        return sorted((self.folder / "checkpoints").glob("step-" + 7 * "[0-9]"))


# The random generators' part of a checkpoint; Accelerate goes on without a word if it is not there.
_RANDOM_STATES = {"random_state", "numpy_random_seed", "torch_manual_seed"}


def find_damage_by_reading(checkpoint: Path, also: Collection[str]) -> str | None:
    """Names the damage of a checkpoint without a manifest (an earlier version), as far as reading it shows it."""
    name = "progress.json"
    try:
        progress = json.loads((checkpoint / name).read_text())
        if not (isinstance(progress["step"], int) and isinstance(progress.get("settings", {}), dict)):
            return f"{name} is not from a run"
        if "manifest" in progress:
            return f"{MANIFEST} is missing"
        processes = progress.get("settings", {}).get("processes", 1)
        names = ["model.safetensors", "optimizer.bin", *(f"random_states_{number}.pkl" for number in range(processes))]
        for name in (*names, *(f"{name}.pt" for name in also)):
            content = (load_file if name == "model.safetensors" else load)(checkpoint / name)
            if name == "model.safetensors" and not all(tensor.isfinite().all() for tensor in content.values()):
                return f"{name} holds numbers that are not finite"
            if name.startswith("random_states") and not content.keys() >= _RANDOM_STATES:
                return f"{name} is not from a run"
    except Exception as error:  # broken files make readers raise almost anything
        is_missing = isinstance(error, FileNotFoundError) or not (checkpoint / name).exists()
        return f"{name} is missing" if is_missing else f"{name} cannot be read ({type(error).__name__})"
    return None
