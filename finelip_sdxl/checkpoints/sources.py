"""Weights by name: the tensors of a file, a directory or a hub repository, and the config beside them."""

import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPModel, CLIPTextModel, CLIPTextModelWithProjection

from finelip_sdxl.checkpoints.config import check_model_type
from finelip_sdxl.foreign_files import check_numbers, read_json, read_tensors, shard_names
from finelip_sdxl.model import FineLIPModel
from finelip_sdxl.names import BundledModel, Location, bundled_model, resolve
from finelip_sdxl.text_encoders import TextEncoder, text_encoder_tensors

logger = logging.getLogger(__name__)

Source = str | Path | Mapping[str, Tensor] | FineLIPModel | CLIPModel | TextEncoder

Weights = tuple[dict[str, Tensor], dict[str, Any] | None]


def read_source(source: Source, subfolder: str, variant: str | None, hub_kwargs: dict[str, Any]) -> Weights:
    """Read the tensors of a source under its own keys, and its config as a dict, None if it has none.

    Arguments and errors are as in `load_finelip`.
    """
    if isinstance(source, CLIPTextModel | CLIPTextModelWithProjection):
        return text_encoder_tensors(source), source.config.to_dict()
    if isinstance(source, FineLIPModel | CLIPModel):
        return {key: tensor.detach() for key, tensor in source.state_dict().items()}, source.config.to_dict()
    if isinstance(source, Mapping):
        return dict(source), None
    if not isinstance(source, str | Path):
        raise ValueError(
            f"The source of a FineLIP is of type {type(source).__name__}; expected a path, a hub id, a state dict or a"
            " CLIP model."
        )
    if (bundled := bundled_model(source)) is not None:
        return read_bundled(bundled)
    location = resolve(source, "a checkpoint file, a model directory or a hub id", **hub_kwargs)
    if location.path is not None and location.path.is_file():
        return _unnest(read_tensors(location.path)), None
    return _read_repository(location, subfolder, variant)


def read_bundled(model: BundledModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the weights of a model that ships with the package, in float32, and its config.

    The files are in half precision. Training needs float32, and a CPU runs it faster.
    """
    tensors = {key: tensor.float() for file in model.weights for key, tensor in load_file(file).items()}
    return tensors, read_json(model.config)


def _unnest(content: Any) -> dict[str, Tensor]:
    """The state dict in the file of a training script."""
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        content = {}
    return {str(key): value for key, value in content.items() if isinstance(value, Tensor)}


def _read_repository(
    location: Location, subfolder: str, variant: str | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    def find(filename: str) -> Path | None:
        return location.find(filename, subfolder, is_optional=True)

    place = f"{location.name}/{subfolder}" if subfolder else location.name
    config_file = location.find("config.json", subfolder)
    if config_file is None:
        if find("model_index.json") is not None:
            raise ValueError(
                f"{place} is a whole pipeline: pass an encoder in it, such as {place}/text_encoder (for a hub"
                " repository, subfolder='text_encoder')."
            )
        # Output folders of the recipes: a model is in `last`, or a text encoder in each folder of `last`.
        inner = [Path(place, *parts) for parts in (("last",), ("last", "text_encoder"), ("text_encoder",))]
        found = next((folder for folder in inner if (folder / "config.json").is_file()), None)
        hint = "pass a directory or repository of a CLIP model" if found is None else f"pass {found}, which holds one"
        raise FileNotFoundError(f"{place} holds no config.json: {hint}.")
    config = read_json(config_file)
    check_model_type(config, place)  # before gigabytes are fetched

    files = _weight_files(find, variant)
    if not files and not variant and (only := _only_variant(location.names(subfolder), place)):
        logger.warning("%s holds only weights of variant %s, so these are loaded.", place, only)
        files = _weight_files(find, only)
    if not files:
        infix = f".{variant}" if variant else ""
        raise FileNotFoundError(f"{place} holds no model{infix}.safetensors or pytorch_model{infix}.bin: fetch one.")
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors.update(_unnest(read_tensors(file)))
    check_numbers(config, len(tensors), config_file)
    return tensors, config


def _weight_files(find: Callable[[str], Path | None], variant: str | None) -> list[Path]:
    """The files of a model's weights, in a variant if one is passed; an empty list if there are none."""
    infix = f".{variant}" if variant else ""
    for filename in (f"model{infix}.safetensors", f"pytorch_model{infix}.bin"):
        if (file := find(filename)) is not None:
            return [file]
    for filename in (f"model.safetensors.index{infix}.json", f"pytorch_model.bin.index{infix}.json"):
        if (index := find(filename)) is not None:
            shards = {name: find(name) for name in shard_names(index)}
            if lacking := [name for name, shard in shards.items() if shard is None]:
                raise FileNotFoundError(f"{index} names {lacking[0]}, which is not beside it: fetch it as well.")
            return [shard for shard in shards.values() if shard is not None]
    return []


_VARIANT = r"(?:pytorch_)?model(?:\.safetensors\.index|\.bin\.index)?\.([^.-]+)\.(?:safetensors|bin|json)"


def _only_variant(filenames: list[str], place: str) -> str | None:
    """The variant of the weights among these files, None if there are none.

    Raises:
        ValueError: there are several.
    """
    matches = [re.fullmatch(_VARIANT, name) for name in filenames]
    variants = sorted({match[1] for match in matches if match})
    if len(variants) > 1:
        raise ValueError(f"{place} holds weights of variants {', '.join(variants)}: pass one of these as variant=.")
    return variants[0] if variants else None
