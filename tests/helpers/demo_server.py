"""The demo, served from this process to whatever asks for it: a client of its API, or a browser."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo import app


@dataclass(frozen=True)
class Demo:
    """A page that is open.

    Attributes:
        blocks: Gradio's object.
        page: the project's own behind it, which answers its events.
        folder: where it writes.
    """

    blocks: Any
    page: Any
    folder: Path

    @property
    def url(self) -> str:
        return self.blocks.local_url

    @property
    def comparison(self) -> Any:
        return self.page.comparison


@contextmanager
def served(folder: Path) -> Iterator[Demo]:
    """The page of the miniature, as `python demo/app.py` opens it."""
    environment = dict(os.environ)
    try:
        blocks = app.serve(app.parse([]), folder, wait=False)
        page = next(event.fn.__self__ for event in blocks.fns.values() if event.name == "compare")
        yield Demo(blocks, page, folder)
        blocks.close()
    finally:
        os.environ.clear()
        os.environ.update(environment)
