"""The pictures of a plan, drawn to a folder: whole files, each once, with a manifest of all settings beside them."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from finelip_sdxl.comparison.comparison import Comparison
from finelip_sdxl.files import check_writable, written_whole
from finelip_sdxl.images import sampler_name, save_png
from finelip_sdxl.options import ENCODING
from finelip_sdxl.picture_evaluation.manifest import MANIFEST, check_folder, check_settings, read_manifest
from finelip_sdxl.picture_evaluation.plan import PICTURES, PicturePlan
from finelip_sdxl.training.processes import held

_PACKAGES = ("finelip-sdxl", "torch", "diffusers", "transformers", "compel")
_ENDS = 8  # numbers of a tensor's beginning and end in the digest of the weights


def generate(
    plan: PicturePlan,
    comparison: Comparison,
    folder: Path,
    recorded: Mapping[str, Any] | None = None,
    *,
    process: int = 0,
    processes: int = 1,
    wait: Callable[[], None] = lambda: None,
    progress: bool = True,
) -> None:
    """Draws the pictures that are not in the folder yet.

    A stopped run, even one that was killed, goes on: every file is whole, and none is drawn twice. Columns may be added
    later; other settings may not change. Several processes share the pictures, and each draws the same as one would.

    Args:
        plan: the pictures.
        comparison: the pipelines.
        folder: the folder of the run, new or with a run of the same settings.
        recorded: further settings that must not change, such as the scheduler's name, of JSON's types.
        process, processes: the number of this process, and of all.
        wait: waits for all processes.
        progress: whether to show a bar with the time left.

    Raises:
        ValueError: the folder holds a run of other settings, or compel cannot parse a prompt.
        OSError: the folder cannot be written, holds other files, or another run writes to it.
        MemoryError: the device's memory was not enough.
    """
    is_main = process == 0
    settings = {**_settings(plan, comparison), **(recorded or {})}
    _check_prompts(plan, comparison)
    with _held(folder, is_main):
        if is_main:
            _open(folder, settings, plan)
        wait()  # until the manifest is there
        missing = [place for place in plan.places() if not (folder / place.file).exists()]
        wait()  # until every process has seen the same files
        mine = missing[process::processes]
        shown = bool(progress and is_main and mine)
        for place in tqdm(mine, desc="pictures", unit="picture", disable=not shown, file=sys.stderr):
            picture = comparison.draw(place.column, plan.settings_of(place))
            save_png(picture.image, folder / place.file, {**picture.parameters, **dict(recorded or {})})
        wait()


def weights_digest(modules: Mapping[str, Any]) -> str:
    """A digest of weights by the ends of every tensor: other weights of the same name are found in a second."""
    digest = hashlib.sha256()
    for name, module in sorted(modules.items()):
        for key, tensor in module.state_dict().items() if isinstance(module, nn.Module) else ():
            flat = tensor.detach().flatten()
            ends = torch.cat([flat[:_ENDS], flat[-_ENDS:]]).float().cpu()
            digest.update(f"{name} {key} {tuple(tensor.shape)} {tensor.dtype}".encode() + ends.numpy().tobytes())
    return digest.hexdigest()[:16]


@contextmanager
def _held(folder: Path, is_main: bool) -> Iterator[None]:
    if not is_main:
        yield
        return
    with held(folder, f"Another run is writing to {folder}: wait for its end, or pass another folder."):
        yield


def _settings(plan: PicturePlan, comparison: Comparison) -> dict[str, Any]:
    """All settings that decide how a picture looks, of JSON's types."""
    filled = asdict(plan.settings.filled(comparison.recommended))
    del filled["prompt"]
    filled["width"], filled["height"] = size_of(plan, comparison)
    pipe = comparison.pipe
    kind, _, path = plan.prompts.spec.partition(":")
    return {
        "data": f"{kind}:{Path(path).name}" if path else kind,
        "prompts": len(plan.prompts.prompts),
        "texts": plan.prompts.digest,
        "images_per_prompt": plan.images_per_prompt,
        **{name: value for name, value in filled.items() if name not in ENCODING},
        **{name: filled.get(name) or getattr(pipe, name) for name in ENCODING},
        **comparison.sources,
        "sampler": sampler_name(pipe.scheduler),
        "scheduler_config": {name: value for name, value in sorted(pipe.scheduler.config.items()) if name[0] != "_"},
        "weights": weights_digest(pipe.components),
        "device": pipe._execution_device.type,
        **{package: version(package) for package in _PACKAGES},
    }


def size_of(plan: PicturePlan, comparison: Comparison) -> tuple[int, int]:
    """Width and height of the pictures, in pixels."""
    width, height = comparison.size
    return plan.settings.width or width, plan.settings.height or height


def _check_prompts(plan: PicturePlan, comparison: Comparison) -> None:
    """Refuses a prompt that compel cannot parse, before anything is drawn."""
    for index, prompt in enumerate(plan.prompts.prompts if "compel" in plan.columns else ()):
        try:
            comparison.plan(prompt.text, ["compel"])
        except ValueError as error:
            raise ValueError(f"Prompt {index + 1} of {plan.prompts.spec} cannot be drawn: {error}") from error


def _open(folder: Path, settings: dict[str, Any], plan: PicturePlan) -> None:
    """Writes the manifest, after a comparison with the one that is there."""
    check_folder(folder)
    settings = json.loads(json.dumps(settings, default=str))
    columns = list(plan.columns)
    if (folder / MANIFEST).exists():
        before = read_manifest(folder)
        absent = dict.fromkeys(before["settings"].keys() - settings.keys())
        check_settings(folder, {**settings, **absent})
        columns = [*before["columns"], *(column for column in columns if column not in before["columns"])]
        if columns == before["columns"]:
            return
    for column in columns:
        check_writable(folder / PICTURES / column)  # this removes unfinished files of a run that was killed
    prompts = [asdict(prompt) for prompt in plan.prompts.prompts]
    content = {"settings": settings, "columns": columns, "prompts": prompts}
    with written_whole(folder / MANIFEST) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
