"""The manifest of a run, and checks against it. Imports nothing heavy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finelip_sdxl.files import check_writable

MANIFEST = "generation.json"
_SHOWN = 60  # characters of a setting in a message


def check_folder(folder: Path) -> None:
    """Checks that a run can write to a folder: it is new or empty, or a run is in it.

    Raises:
        OSError: nothing can be written there, or it holds something else.
    """
    check_writable(folder)
    if folder.is_dir() and not (folder / MANIFEST).exists():
        other = sorted(file.name for file in folder.iterdir() if not file.name.startswith("."))
        if other:
            raise FileExistsError(
                f"{folder} holds {other[0]}, but no {MANIFEST} of a run: pass a new folder, or that of a run."
            )


def check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Checks that a run goes on with the settings of its manifest; without one, every setting will do.

    Args:
        folder: the folder of the run.
        settings: some settings, or all, of JSON's types.

    Raises:
        ValueError: one of them has changed, or the manifest is damaged.
    """
    if not (folder / MANIFEST).exists():
        return
    before = read_manifest(folder)["settings"]
    for name, new in settings.items():
        if before.get(name) != new:
            old = _short(before.get(name))
            raise ValueError(
                f"The pictures in {folder} were drawn with {name} {old}, and now it is {_short(new)}: set it back, or"
                " pass another folder."
            )


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a run: `settings`, `columns` and `prompts`.

    Raises:
        ValueError: it is damaged.
    """
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if isinstance(content["settings"], dict) and isinstance(content["columns"], list):
            return dict(content)
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise ValueError(f"{folder / MANIFEST} is damaged: pass another folder, or remove this one.")


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
