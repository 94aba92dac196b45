"""ComfyUI's modules as a stand-in, and the nodes, imported with it."""

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.helpers.comfy_stand_in import StandIn


@pytest.fixture
def comfy(tmp_path: Path, monkeypatch) -> Iterator[StandIn]:
    """The stand-in; its models are in the folder `models` of the test."""
    stand_in = StandIn(tmp_path / "models")
    for name, module in stand_in.modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    before = set(sys.modules)
    yield stand_in
    for name in set(sys.modules) - before:
        if name.partition(".")[0] == "comfyui":  # they hold this test's stand-in
            del sys.modules[name]


@pytest.fixture
def nodes(comfy: StandIn) -> SimpleNamespace:
    """The node classes, by ComfyUI's names of them without `FineLIP`."""
    mappings = import_module("comfyui").NODE_CLASS_MAPPINGS
    return SimpleNamespace(**{name.removeprefix("FineLIP"): node for name, node in mappings.items()})
