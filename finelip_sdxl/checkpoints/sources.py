"""From a name to tensors: a file, a directory or a hub repository, and the config beside it."""

import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, list_repo_files
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)
from torch import Tensor
from transformers import CLIPModel, CLIPTextModel, CLIPTextModelWithProjection

from finelip_sdxl.checkpoints.config import check_model_type
from finelip_sdxl.foreign_files import check_numbers, read_json, read_tensors, shard_names
from finelip_sdxl.miniature import resolve_finelip
from finelip_sdxl.model import FineLIPModel
from finelip_sdxl.text_encoders import TextEncoder, text_encoder_tensors

logger = logging.getLogger(__name__)


Source = str | Path | Mapping[str, Tensor] | FineLIPModel | CLIPModel | TextEncoder


# Reading: from a source to tensors under its own keys, and its config as a dict if it has one.


def read_source(
    source: Source, subfolder: str, variant: str | None, hub_kwargs: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    source = resolve_finelip(source)
    if isinstance(source, CLIPTextModel | CLIPTextModelWithProjection):
        return text_encoder_tensors(source), source.config.to_dict()
    if isinstance(source, FineLIPModel | CLIPModel):
        return {key: tensor.detach() for key, tensor in source.state_dict().items()}, source.config.to_dict()
    if isinstance(source, Mapping):
        return dict(source), None
    if not isinstance(source, str | Path):
        raise ValueError(
            f"A FineLIP comes from a path, a hub id, a state dict or a CLIP model, not from {type(source).__name__}."
        )
    path = Path(source)
    if path.is_file():
        return _unnest(read_tensors(path)), None
    if not path.is_dir() and not _may_be_hub_id(source):
        raise FileNotFoundError(f"{source} does not exist: give a checkpoint file, a model directory or a hub id.")
    return _read_repository(str(source), subfolder, variant, hub_kwargs)


def _may_be_hub_id(source: str | Path) -> bool:
    is_file_name = Path(source).suffix in (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
    return isinstance(source, str) and not is_file_name and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source) is not None


def _unnest(content: Any) -> dict[str, Tensor]:
    """The state dict in what a training script saved."""
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        content = {}
    return {str(key): value for key, value in content.items() if isinstance(value, Tensor)}


def _read_repository(
    source: str, subfolder: str, variant: str | None, hub_kwargs: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    def find(filename: str) -> Path | None:
        return _find_file(source, subfolder, filename, hub_kwargs)

    place = f"{source}/{subfolder}" if subfolder else source
    config_file = find("config.json")
    if config_file is None:
        if find("model_index.json") is not None:
            raise ValueError(
                f"{place} is a whole pipeline: pass an encoder in it, such as {place}/text_encoder (of a hub"
                " repository, subfolder='text_encoder')."
            )
        # What the recipes write: a model in `last`, or a text encoder in each folder of that.
        inner = [Path(place, *parts) for parts in (("last",), ("last", "text_encoder"), ("text_encoder",))]
        found = next((folder for folder in inner if (folder / "config.json").is_file()), None)
        hint = "give a directory or repository of a CLIP model" if found is None else f"give {found}, which does"
        raise FileNotFoundError(f"{place} holds no config.json: {hint}.")
    config = read_json(config_file)
    check_model_type(config, place)  # before gigabytes are fetched

    files = _weight_files(find, variant)
    if not files and not variant and (only := _only_variant(source, subfolder, hub_kwargs, place)):
        logger.warning("%s holds weights of variant %s alone, so these are loaded.", place, only)
        files = _weight_files(find, only)
    if not files:
        infix = f".{variant}" if variant else ""
        raise FileNotFoundError(f"{place} holds no model{infix}.safetensors or pytorch_model{infix}.bin.")
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors.update(_unnest(read_tensors(file)))
    check_numbers(config, len(tensors), config_file)
    return tensors, config


def _weight_files(find: Callable[[str], Path | None], variant: str | None) -> list[Path]:
    """The files of a model's weights, of a variant if one is given; none if they are not there."""
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


def _only_variant(source: str, subfolder: str, hub_kwargs: dict[str, Any], place: str) -> str | None:
    """The variant of the weights in a directory or hub repository, None if there are none.

    Raises:
        ValueError: there are several.
    """
    folder = Path(source, subfolder)
    if folder.is_dir():
        names = [file.name for file in folder.iterdir()]
    else:
        try:
            asked = {name: hub_kwargs[name] for name in ("revision", "token") if name in hub_kwargs}
            paths = list_repo_files(source, **asked)
        except (HfHubHTTPError, OfflineModeIsEnabled, OSError):
            return None
        names = [Path(path).name for path in paths if Path(path).parent == Path(subfolder)]
    matches = [re.fullmatch(_VARIANT, name) for name in names]
    variants = sorted({match[1] for match in matches if match})
    if len(variants) > 1:
        raise ValueError(f"{place} holds weights of variants {', '.join(variants)}: pass one of these as variant=.")
    return variants[0] if variants else None


def _find_file(source: str, subfolder: str, filename: str, hub_kwargs: dict[str, Any]) -> Path | None:
    """A file of a directory or hub repository, None if there is none of that name."""
    if Path(source).is_dir():
        file = Path(source, subfolder, filename)
        return file if file.is_file() else None
    try:
        return Path(hf_hub_download(source, filename, subfolder=subfolder or None, **hub_kwargs))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        if filename != "config.json":  # the repository is in the cache, for its config was found: this file is not
            return None
        raise OSError(f"{source} is no path here, and the hub cannot be reached to look for it there.") from error
    except EntryNotFoundError:
        return None
    except (HfHubHTTPError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise OSError(f"{source} is no path here, and the hub does not give it ({reason}).") from error
