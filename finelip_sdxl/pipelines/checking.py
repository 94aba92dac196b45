"""Checks of an SDXL's folder or file before anything is built of it, and clear errors where loading fails."""

import json
import os
import re
import shutil
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_utils import SingleFileComponentError
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from safetensors import SafetensorError
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from finelip_sdxl.foreign_files import (
    Shapes,
    check_numbers,
    config_errors,
    one_line,
    read_json,
    read_shapes,
    shard_names,
)
from finelip_sdxl.names import resolve
from finelip_sdxl.options import STOCK_POSITIONS
from finelip_sdxl.text_encoders import check_shapes, check_text_config

# Weights of transformers' and of Diffusers' models, of every variant, and in one file or several.
_WEIGHTS = re.compile(r"(model|pytorch_model|diffusion_pytorch_model)[.-].*(safetensors|bin)|.*\.index(\..*)?\.json")

_TEXT_ENCODERS = {model.__name__: model for model in (CLIPTextModel, CLIPTextModelWithProjection)}

# Positional tables of text encoders in the original project's layout: SDXL's two, and the refiner's.
_TABLES = {
    "text_encoder": ("conditioner.embedders.0.transformer.text_model.embeddings.position_embedding.weight",),
    "text_encoder_2": (
        "conditioner.embedders.1.model.positional_embedding",
        "conditioner.embedders.0.model.positional_embedding",
    ),
}

_MOST_WEIGHTS = 10_000  # assumed for a file that is not on this machine; an SDXL has about 2,500

# Files other than weights, by the patterns with which Diffusers fetches configs.
_CONFIG_FILES = ["**/*.json", "*.json", "**/*.txt", "*.txt", "**/*.model"]


def check_folder(folder: str | os.PathLike[str], leave_out: Mapping[str, Any] | None = None) -> None:
    """Check that an SDXL's configs can be read, and describe no larger models than the weights beside them fill.

    Args:
        folder: a folder with a `model_index.json`.
        leave_out: components, by name, that are not loaded from there.

    Raises:
        OSError, ValueError: a file is missing or faulty; the message names the file and the fault.
    """
    folder = Path(folder)
    index = read_json(folder / "model_index.json")
    for name, entry in index.items():
        if name.startswith("_") or name in (leave_out or {}) or not (folder / name).is_dir():
            continue
        if not isinstance(entry, list | str):  # the entry of a conditioning adapter is a string
            raise ValueError(f"{folder / 'model_index.json'} says {name} {entry!r}; expected its library and class.")
        check_component(folder / name, entry)


def check_component(folder: Path, entry: Any = None) -> None:
    """As `check_folder`, for one component; `entry` is its library and class."""
    for file in folder.glob("*config.json"):
        _check_config(file, entry)


def _check_config(file: Path, entry: Any) -> None:
    shapes = _weight_shapes(file.parent)
    config = _read_config(file, len(shapes))
    if file.name != "config.json":
        return
    class_name = entry[-1] if isinstance(entry, list) and entry else None
    model_class = _TEXT_ENCODERS.get(class_name) if isinstance(class_name, str) else None
    if model_class is None or not shapes or "quantization_config" in config:
        return
    with config_errors(file):
        text_config: Any = CLIPTextConfig.from_dict(config.get("text_config", config))
    # Recent files leave the prefix out, and some hold other weights besides.
    flat = ("embeddings.", "encoder.", "final_layer_norm.")
    prefixed = {f"text_model.{key}" if key.startswith(flat) else key: shape for key, shape in shapes.items()}
    own = ("text_model.", "text_projection.") if model_class is CLIPTextModelWithProjection else "text_model."
    known = {key: shape for key, shape in prefixed.items() if key.startswith(own) and not key.endswith("position_ids")}
    check_text_config(text_config, known, str(file.parent))
    check_shapes(model_class, text_config, known, str(file.parent))


def _read_config(file: Path, weights: int) -> dict[str, Any]:
    """A component's config, after a check that its numbers need no more than this number of weights."""
    config = read_json(file)
    if file.name == "config.json":
        check_numbers(config, weights, file)
    elif file.name == "scheduler_config.json":  # schedulers have no weights, but tables as long as their steps
        check_numbers(config, weights, file, largest=1_000_000)
    return config


def _weight_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of all weights in a component's folder; if it has safetensors files, of these alone."""
    found = [file for file in folder.iterdir() if _WEIGHTS.fullmatch(file.name)]
    for file in found:
        if file.suffix == ".json":
            shard_names(file)
    by_kind = [[file for file in found if file.suffix == suffix] for suffix in (".safetensors", ".bin")]
    return {key: shape for file in by_kind[0] or by_kind[1] for key, shape in read_shapes(file).items()}


@contextmanager
def loading_errors(source: str | os.PathLike[str], variant: str | None = None) -> Iterator[None]:
    """Turn the errors of Diffusers on a directory or hub repository into one sentence with the remedy."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        place, said = _place(source, error), one_line(error)
        if "no such modeling files" in said:
            raise ValueError(
                f"{said}: {source} has no weights of variant {variant}; leave the variant out, or pass the one in its"
                " files' names, such as fp16 for model.fp16.safetensors."
            ) from error
        if "no file named" in said:
            raise FileNotFoundError(
                f"{place} lacks weights ({said}): fetch them, or pass variant= if their names hold one, such as fp16"
                " for model.fp16.safetensors."
            ) from error
        if isinstance(error, SafetensorError) or "Unable to load weights" in said:
            raise ValueError(
                f"{place} holds weights that cannot be read ({said}): fetch the damaged or incomplete file again."
            ) from error
        if isinstance(error, OSError | ValueError) and str(source) in said:
            raise
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"{place} cannot be loaded ({said}): check its files, or fetch them again.") from error


@contextmanager
def single_file_errors(file: Any, config: Any) -> Iterator[None]:
    """Turn the errors of Diffusers on a single file into one sentence with the remedy."""
    name = os.fspath(file)
    if not os.path.isfile(name) and not name.startswith(("http://", "https://", "hf.co/")):
        raise FileNotFoundError(f"{name} does not exist, or is no file: pass a .safetensors or .ckpt file.")
    if config is not None and os.path.isdir(config) and not os.path.isfile(os.path.join(config, "model_index.json")):
        raise FileNotFoundError(
            f"config={config} has no model_index.json: pass the directory of an SDXL in Diffusers' layout."
        )
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except SingleFileComponentError as error:
        what = str(error.message).strip().splitlines()[0].rstrip(".")
        raise ValueError(f"{name} is no whole SDXL ({what}): pass another file, or its config as config=.") from error
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, ConnectionError) as error:
        raise OSError(
            f"{name} holds weights alone, and their configs and tokenizers could not be fetched from the hub: pass"
            " config=, the directory of an SDXL in Diffusers' layout."
        ) from error
    except Exception as error:
        shapes = re.search(r"\S+ expected shape .*? but got .*?\)|checkpoint does not seem to contain .*", str(error))
        if shapes is not None:
            raise ValueError(
                f"{name} is no SDXL of the sizes in its config ({shapes[0]}): pass another file, or its config as"
                " config=."
            ) from error
        if "Unable to load weights" in str(error):
            raise ValueError(
                f"{name} cannot be read as a checkpoint, since it is damaged, incomplete, or no .safetensors or .ckpt"
                " file: fetch it again, or pass another file."
            ) from error
        if isinstance(error, OSError | ValueError) and (name in str(error) or str(config) in str(error)):
            raise
        part = _component(error)
        of_part = "" if part is None else f" with the {part} of config={config}"
        raise ValueError(
            f"{name} cannot be loaded{of_part} ({one_line(error)}): pass another file, or its config as config=."
        ) from error


def write_configs(
    file: str | os.PathLike[str], config: str | os.PathLike[str], folder: Path, **hub_arguments: Any
) -> dict[str, Any]:
    """Copy the configs of an SDXL, to load a single file with them.

    The configs of a pipeline of this package differ from stock's: they describe text encoders of 248 positions, and
    parts that no single file has.

    Args:
        file: a file in the original project's layout. Its number of positions is read from a file on this machine, and
            taken to be 77 for a file on the hub.
        config: a directory or hub id of an SDXL.
        folder: the folder of the copy; it must not exist yet.
        **hub_arguments: see `finelip_sdxl.names.resolve`.

    Returns:
        The content of the copied `model_index.json`.

    Raises:
        OSError, ValueError: a file cannot be read.
    """
    name = os.fspath(file)
    shapes: Shapes = {}
    if os.path.isfile(name):
        try:
            shapes = read_shapes(Path(name))
        except (OSError, ValueError) as error:
            raise ValueError(f"{name} cannot be read as a checkpoint ({one_line(error)}): fetch it again.") from error
    folder.mkdir()
    source = resolve(config, "the directory or hub id of an SDXL", **hub_arguments).folder(_CONFIG_FILES)
    index = read_json(source / "model_index.json")
    for part, entry in index.items():
        if isinstance(entry, list) and not part.startswith("stock_"):
            for found in (source / part).glob("*config.json"):
                _read_config(found, len(shapes) or _MOST_WEIGHTS)
            for pattern in ("*.json", "*.txt", "*.model"):
                for found in (source / part).glob(pattern):
                    (folder / part).mkdir(exist_ok=True)
                    shutil.copyfile(found, folder / part / found.name)
    index = {key: value for key, value in index.items() if not key.startswith(("stock_", "conditioning_adapter"))}
    (folder / "model_index.json").write_text(json.dumps(index))

    known = {field.name for field in fields(CLIPTextConfig)}  # no provenance: it speaks of other weights
    for part, tables in _TABLES.items():
        if (given := source / part / "config.json").is_file():
            rows = next((shapes[table][0] for table in tables if shapes.get(table)), STOCK_POSITIONS)
            kept = {key: value for key, value in read_json(given).items() if key in known}
            (folder / part / "config.json").write_text(json.dumps({**kept, "max_position_embeddings": rows}))
    return index


def _place(source: str | os.PathLike[str], error: BaseException) -> str:
    part = _component(error)
    return str(source) if part is None else os.path.join(source, part)


def _component(error: BaseException) -> str | None:
    """The component that Diffusers was loading, by a local variable of its code: its exceptions do not name it."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_name in ("load_sub_model", "load_single_file_sub_model"):
            return frame.f_locals.get("name")
    return None
