"""Manifests: lists of the files in a folder, to find damage later."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

MANIFEST = "manifest.json"


def write_manifest(folder: Path) -> None:
    """Writes a list of the files in a folder, with sizes and digests, beside them.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     _ = Path(folder, "a.txt").write_text("whole")
        ...     write_manifest(Path(folder))
        ...     _ = Path(folder, "a.txt").write_text("half")
        ...     find_damage(Path(folder))
        'a.txt has 4 bytes instead of 5'
    """
    entries = {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": _digest(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    (folder / MANIFEST).write_text(json.dumps(entries, indent=1))


def find_damage(folder: Path) -> str | None:
    """Returns the first difference between a folder and its manifest, in words; None if there is none."""
    try:
        entries = json.loads((folder / MANIFEST).read_text())
        if not entries:
            return f"{MANIFEST} lists nothing"
        for name, entry in entries.items():
            file = folder / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != entry["bytes"]:
                return f"{name} has {file.stat().st_size:,} bytes instead of {entry['bytes']:,}"
            if _digest(file) != entry["sha256"]:
                return f"{name} is not as it was written"
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        return f"{MANIFEST} cannot be read ({error or type(error).__name__})"
    return None


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
