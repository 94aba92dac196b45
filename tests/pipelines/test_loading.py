"""Loading an SDXL with FineLIPs: how often each weight is read from its file."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import transformers.modeling_utils
from safetensors import safe_open

from finelip_sdxl import FineLIPSDXLPipeline, foreign_files, load_finelip
from finelip_sdxl.options import ENCODERS


class Reads:
    """Counts how often each tensor of a file is read, in place of `safe_open`. Shapes may be asked for as often as
    one likes: they stand in the header."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()

    def __call__(self, filename: Any, *args: Any, **kwargs: Any) -> Any:
        return _Opened(self.counts, str(filename), safe_open(filename, *args, **kwargs))


class _Opened:
    """An open file, or a part of it."""

    def __init__(self, counts: Counter[tuple[str, str]], name: str, inner: Any, key: str = "") -> None:
        self.counts, self.name, self.inner, self.key = counts, name, inner, key

    def __enter__(self) -> "_Opened":
        self.inner.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.inner.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def get_tensor(self, key: str) -> Any:
        self.counts[self.name, key] += 1
        return self.inner.get_tensor(key)

    def get_tensors(self) -> Any:
        self.counts.update((self.name, key) for key in self.inner.keys())  # noqa: SIM118 (no mapping)
        return self.inner.get_tensors()

    def get_slice(self, key: str) -> "_Opened":
        return _Opened(self.counts, self.name, self.inner.get_slice(key), key)

    def __getitem__(self, place: Any) -> Any:
        self.counts[self.name, self.key] += 1
        return self.inner[place]


@pytest.fixture
def reads(monkeypatch) -> Reads:
    counter = Reads()
    for module in (safetensors.torch, transformers.modeling_utils, foreign_files):
        monkeypatch.setattr(module, "safe_open", counter)
    return counter


def test_each_weight_is_read_once(reads, stock_folder, tmp_path) -> None:
    finelips = [tmp_path / name for name in ENCODERS]
    for place in finelips:
        load_finelip(stock_folder, subfolder=place.name).save_pretrained(place)
    reads.counts.clear()
    FineLIPSDXLPipeline.from_pretrained(stock_folder, *finelips)
    weights = [file for place in (Path(stock_folder), tmp_path) for file in place.rglob("*.safetensors")]
    expected = {}
    for file in weights:
        with safe_open(file, "pt") as opened:
            expected |= {(str(file), key): 1 for key in opened.keys()}  # noqa: SIM118 (no mapping)
    assert reads.counts == expected
