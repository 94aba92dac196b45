"""The folder of a training run: checkpoints to go on from, and the trained models."""

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


class Stateful(Protocol):
    """An object that a checkpoint can hold, such as an average of the weights."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any: ...


class Saveable(Protocol):
    """An object that saves itself to a folder, such as a model or a tokenizer."""

    def save_pretrained(self, folder: Path, /) -> Any: ...


class RunFolder:
    """Keeps `checkpoints/` and the models of a run. Each is written completely, with a manifest to find later damage.

    Args:
        folder: the folder, which need not exist, locked by `only_run`.
        accelerator: the accelerator that has prepared the models and optimizers of the checkpoints.
        settings: settings that must not change when the run goes on.
        keep: number of newest checkpoints that are not deleted.
        also: other objects in the checkpoints, by the names of their files. (Objects that are registered with the
            accelerator instead are loaded from a pickle, which may run code.)
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

    def check_settings(self) -> None:
        """Refuses a run that was begun with other settings; for recipes that compute for long before `resume`.

        Raises:
            ValueError: the newest checkpoint that says its settings has others.
        """
        for checkpoint in reversed(self._checkpoints()):
            try:
                begun = json.loads((checkpoint / "progress.json").read_text())["settings"]
            except (OSError, ValueError, LookupError, TypeError):
                continue  # damaged: `resume` says so
            if isinstance(begun, dict):
                self._compare_settings(begun)
                return

    def resume(self) -> dict[str, Any] | None:
        """Loads the newest whole checkpoint and returns the progress saved with it; None if there is no checkpoint.

        Damaged checkpoints that are newer are named.

        Raises:
            ValueError: all checkpoints are damaged; or this one has other settings, belongs to another model, or holds
                code beside tensors and numbers.
        """
        found = self._newest_whole() if self.accelerator.is_main_process else None
        newest, notes = gather_object([found])[0]  # the main process chooses for all
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
            self.accelerator.print(f"{newest} is of an earlier version: its files can be read, and no more is checked.")
        self._compare_settings(progress.pop("settings", {}))
        self._load(newest)
        return progress

    def save(self, progress: dict[str, Any]) -> None:
        """Writes a checkpoint of `progress["step"]`; every process calls this.

        Raises:
            OSError: one process cannot write; in every process. Earlier checkpoints have not changed.
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
        """Writes the parts of a model, such as its tokenizer, to one folder, in the main process only.

        Args:
            name: one of `command_line.MODELS`.
            parts: parts for the folder itself.
            subfolders: parts for a subfolder each, by its name.

        Raises:
            OSError: the folder cannot be written; the old one has not changed.
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
        """Returns whether a model is there, and undamaged if it has a manifest (earlier versions wrote none)."""
        folder = self.folder / name
        return folder.is_dir() and not ((folder / MANIFEST).exists() and find_damage(folder))

    def _newest_whole(self) -> tuple[Path | None, list[str]]:
        """The newest whole checkpoint, and a sentence about each newer, damaged one."""
        notes: list[str] = []
        for checkpoint in reversed(self._checkpoints()):
            has_manifest = (checkpoint / MANIFEST).exists()
            damage = find_damage(checkpoint) if has_manifest else find_damage_by_reading(checkpoint, self.also)
            if damage is None:
                return checkpoint, notes
            notes.append(f"{checkpoint} is damaged: {damage}.")
        return None, notes

    def _compare_settings(self, begun: dict[str, Any]) -> None:
        changed = [
            f"{name.replace('_', '-')} was {begun[name]} and is {now}"
            for name, now in self.settings.items()
            if begun.get(name, now) != now
        ]
        if changed:
            raise ValueError(
                f"{self.folder} holds a run with other settings ({', '.join(changed)}): pass another folder."
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
                f"{checkpoint} holds more than tensors and numbers, so no run wrote it: delete it."
            ) from error

    def _delete_others(self, newest: str) -> None:
        """Deletes checkpoints that are too old, and newer ones: they are damaged, or of a discarded part of the run."""
        earlier = [checkpoint for checkpoint in self._checkpoints() if checkpoint.name <= newest]
        newer = [checkpoint for checkpoint in self._checkpoints() if checkpoint.name > newest]
        for checkpoint in (*earlier[: -self.keep], *newer):
            if checkpoint.is_dir() and not checkpoint.is_symlink():
                shutil.rmtree(checkpoint)
            else:
                checkpoint.unlink()

    def _checkpoints(self) -> list[Path]:
        return sorted((self.folder / "checkpoints").glob("step-" + 7 * "[0-9]"))


# States of random generators in a checkpoint; if one is missing, Accelerate goes on silently.
_RANDOM_STATES = {"random_state", "numpy_random_seed", "torch_manual_seed"}


def find_damage_by_reading(checkpoint: Path, also: Collection[str]) -> str | None:
    """Returns the damage of a checkpoint without a manifest (from an earlier version), found by reading its files."""
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
    except Exception as error:  # broken files cause errors of almost any type
        is_missing = isinstance(error, FileNotFoundError) or not (checkpoint / name).exists()
        return f"{name} is missing" if is_missing else f"{name} cannot be read ({type(error).__name__})"
    return None
