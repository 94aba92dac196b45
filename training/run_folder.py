"""The folder of a training run: checkpoints to go on from after any stop, and the models that came out of it."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator


class RunFolder:
    """Where a run keeps `checkpoints/` and its models. All that is read again was written whole, and then moved.

    Args:
        folder: need not exist.
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
        """Load the newest checkpoint and give the progress that was saved with it; None if there is none.

        Raises:
            ValueError: if it is of other settings or of another model, or holds code beside tensors and numbers.
        """
        found = self._checkpoints()
        if not found:
            return None
        progress = json.loads((found[-1] / "progress.json").read_text())
        begun = progress.pop("settings", {})
        changed = [
            f"{name.replace('_', '-')} was {begun[name]} and is {now}"
            for name, now in self.settings.items()
            if begun.get(name, now) != now
        ]
        if changed:
            raise ValueError(f"{self.folder} holds a run of other settings ({', '.join(changed)}): pass another --out.")
        try:
            self.accelerator.load_state(str(found[-1]))
            for name, item in self.also.items():
                state = torch.load(found[-1] / f"{name}.pt", map_location=self.accelerator.device, weights_only=True)
                item.load_state_dict(state)
        except (RuntimeError, ValueError, KeyError) as error:
            raise ValueError(f"{found[-1]} is a checkpoint of another model: pass another --out.") from error
        except pickle.UnpicklingError as error:
            raise ValueError(f"{found[-1]} holds more than tensors and numbers: no run wrote it, delete it.") from error
        return progress

    def save(self, progress: dict[str, Any]) -> None:
        """A checkpoint of `progress["step"]`; every process calls this."""
        target = self.folder / "checkpoints" / f"step-{progress['step']:07d}"
        temporary = target.with_suffix(".tmp")
        if self.accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(temporary))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            for name, item in self.also.items():
                torch.save(item.state_dict(), temporary / f"{name}.pt")
            (temporary / "progress.json").write_text(json.dumps({**progress, "settings": self.settings}))
            os.replace(temporary, target)
            for old in self._checkpoints()[: -self.keep]:
                shutil.rmtree(old)

    def save_model(self, name: str, *parts: Any, **subfolders: Any) -> None:
        """One folder of a model, its tokenizer and what else has `save_pretrained`; the main process writes it.

        Args:
            parts: go into the folder itself.
            subfolders: go into one each, of their name.
        """
        if not self.accelerator.is_main_process:
            return
        target = self.folder / name
        temporary, replaced = target.with_suffix(".tmp"), target.with_suffix(".old")
        shutil.rmtree(temporary, ignore_errors=True)
        for part in parts:
            part.save_pretrained(temporary)
        for subfolder, part in subfolders.items():
            part.save_pretrained(temporary / subfolder)
        shutil.rmtree(replaced, ignore_errors=True)
        if target.exists():
            os.replace(target, replaced)
        os.replace(temporary, target)
        shutil.rmtree(replaced, ignore_errors=True)

    def _checkpoints(self) -> list[Path]:
        return sorted((self.folder / "checkpoints").glob("step-???????"))
