"""The demo, served from this process to whatever asks for it: a client of its API, or a browser."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import app


class Demo:
    """A page that is open.

    Attributes:
        url: its address.
        comparison: what it draws with.
        folder: where it writes.
    """

    def __init__(self, page: Any, comparison: Any, folder: Path) -> None:
        self.page, self.comparison, self.folder = page, comparison, folder
        self.url = page.local_url

    def files(self) -> list[Path]:
        return [file for file in self.folder.rglob("*") if file.is_file()]


@contextmanager
def served(comparison: Any, folder: Path) -> Iterator[Demo]:
    """The page of the miniature, opened as `python demo/app.py` does, around a comparison that is loaded."""
    from finelip_sdxl import comparison as module

    environment, load = dict(os.environ), module.Comparison.load
    module.Comparison.load = lambda *args, **kwargs: comparison
    try:
        page = app.serve(app.parse([]), folder, wait=False)
    finally:
        module.Comparison.load = load
    try:
        yield Demo(page, comparison, folder)
    finally:
        page.close()
        os.environ.clear()
        os.environ.update(environment)
