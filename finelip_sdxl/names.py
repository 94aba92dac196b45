"""Names of models and their files: a file, a folder, a hub id, or the name of weights that ship with the package.

All names of models go through `resolve`, so all errors about them have the same words. Names of data sets are
`KIND:PATH`, and go through `data_place`.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

# Bundled weights: they ship with the package and have names of their own.


@dataclass(frozen=True)
class BundledModel:
    """A CLIP or FineLIP that ships with the package.

    Attributes:
        config: its `config.json`.
        weights: its files, which share no key. They are in half precision, for use in float32.
        tokenizer: the folder of its tokenizer.
        base: the name of the bundled SDXL with the text encoder that it has, or was trained from.
    """

    config: Path
    weights: tuple[Path, ...]
    tokenizer: Path
    base: str


@dataclass(frozen=True)
class BundledSDXL:
    """An SDXL that ships with the package.

    Attributes:
        folder: its folder, in Diffusers' layout.
        finelips: the name of the bundled FineLIP that was trained from each text encoder.
        conditioning_adapter: the folder of the adapter that was trained with both FineLIPs.
        license: license of all its weights.
    """

    folder: Path
    finelips: Mapping[str, str]
    conditioning_adapter: Path
    license: str


_MINIATURE = Path(__file__).parent / "miniature"
_STOCK = _MINIATURE / "stock"
_SDXLS = {
    "miniature": BundledSDXL(
        _STOCK,
        {"text_encoder": "miniature-finelip-1", "text_encoder_2": "miniature-finelip-2"},
        _MINIATURE / "conditioning_adapter",
        "apache-2.0",
    )
}
_MODELS = {
    f"miniature-{kind}-{pair}": BundledModel(config, weights, _STOCK / f"tokenizer{suffix}", "miniature")
    for pair, suffix in ((1, ""), (2, "_2"))
    for kind, config, weights in (
        (
            "clip",
            _MINIATURE / "clips" / f"clip_{pair}.json",
            (
                _STOCK / f"text_encoder{suffix}" / "model.safetensors",
                _MINIATURE / "clips" / f"clip_{pair}.safetensors",
            ),
        ),
        (
            "finelip",
            _MINIATURE / f"finelip_{pair}" / "config.json",
            (_MINIATURE / f"finelip_{pair}" / "model.safetensors",),
        ),
    )
}


def bundled_model(name: Any) -> BundledModel | None:
    """The CLIP or FineLIP that ships under this name; None for all other names.

    Examples:
        >>> bundled_model("miniature-finelip-2").config.parent.name
        'finelip_2'
        >>> bundled_model("openai/clip-vit-large-patch14") is None
        True
    """
    return _MODELS.get(name) if isinstance(name, str) else None


def bundled_sdxl(name: Any) -> BundledSDXL | None:
    """The SDXL that ships under this name; None for all other names.

    Examples:
        >>> bundled_sdxl("miniature").folder.name
        'stock'
    """
    return _SDXLS.get(name) if isinstance(name, str) else None


def sdxl_path(name: str | os.PathLike[str]) -> str:
    """The name of an SDXL for Diffusers: the folder of one that ships with the package, any other name unchanged.

    Examples:
        >>> sdxl_path("stabilityai/stable-diffusion-xl-base-1.0")
        'stabilityai/stable-diffusion-xl-base-1.0'
    """
    if not isinstance(name, str | os.PathLike):
        raise TypeError(f"{name!r:.60} is no name of a model: pass a path, a hub id or the name of one that ships.")
    bundled = bundled_sdxl(name)
    return os.fspath(name if bundled is None else bundled.folder)


# Names of files, folders and hub repositories


@dataclass(frozen=True)
class Location:
    """The place of a model's files.

    Attributes:
        name: the name that was passed.
        path: a file or folder on this machine; None for a hub repository.
        hub_arguments: `revision`, `token`, `cache_dir`, `local_files_only`, for a hub repository.
    """

    name: str
    path: Path | None
    hub_arguments: Mapping[str, Any] = field(default_factory=dict)

    def find(self, filename: str, subfolder: str = "", is_optional: bool = False) -> Path | None:
        """A file of a folder or hub repository on this machine; None if there is none of that name.

        Args:
            filename: name of the file.
            subfolder: folder of the file in the folder or repository.
            is_optional: whether another file of the repository was found before. If the hub cannot be reached, a file
                that is not in the cache is then taken for absent.

        Raises:
            OSError: the hub cannot be reached, or refuses.
        """
        if self.path is not None:
            file = self.path / subfolder / filename
            return file if file.is_file() else None
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, OfflineModeIsEnabled

        with self._hub_errors():
            try:
                return Path(hf_hub_download(self.name, filename, subfolder=subfolder or None, **self.hub_arguments))
            except (LocalEntryNotFoundError, OfflineModeIsEnabled):
                if is_optional:
                    return None
                raise
            except EntryNotFoundError:
                return None

    def check(self) -> bool:
        """Check that a hub repository is there, in seconds: the hub is asked once.

        Returns:
            Whether the hub answered. If not, a part of the repository is in the cache.

        Raises:
            OSError: the hub refuses, or cannot be reached and nothing of the repository is in the cache.
        """
        if self.path is not None:
            return True
        from huggingface_hub import repo_info, snapshot_download
        from huggingface_hub.errors import OfflineModeIsEnabled
        from huggingface_hub.utils import httpx

        with self._hub_errors():
            try:
                repo_info(self.name, timeout=10)
            except (httpx.TransportError, OfflineModeIsEnabled):
                snapshot_download(self.name, local_files_only=True, allow_patterns=[])
                return False
        return True

    def names(self, subfolder: str = "") -> list[str]:
        """The names of all files in one of its folders; an empty list if the hub cannot be reached."""
        if self.path is not None:
            return [file.name for file in (self.path / subfolder).iterdir()]
        from huggingface_hub import list_repo_files
        from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

        asked = {name: self.hub_arguments[name] for name in ("revision", "token") if name in self.hub_arguments}
        try:
            files = map(Path, list_repo_files(self.name, **asked))
            return [file.name for file in files if file.parent == Path(subfolder)]
        except (HfHubHTTPError, OfflineModeIsEnabled, OSError):
            return []

    def folder(self, patterns: Collection[str]) -> Path:
        """The folder on this machine with all of its files that match a pattern.

        Raises:
            OSError: the hub cannot be reached, or refuses.
        """
        if self.path is not None:
            return self.path
        from huggingface_hub import snapshot_download

        with self._hub_errors():
            return Path(snapshot_download(self.name, allow_patterns=list(patterns), **self.hub_arguments))

    @contextmanager
    def _hub_errors(self) -> Iterator[None]:
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
            OfflineModeIsEnabled,
        )

        try:
            yield
        except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
            raise OSError(
                f"{self.name} is no path here, and the hub cannot be reached to look for it: pass a path, or connect."
            ) from error
        except (HfHubHTTPError, HFValidationError) as error:
            reason = str(error).strip().splitlines()[0].rstrip(".")
            raise OSError(f"{self.name} is no path here, and the hub refuses it ({reason}).") from error


def resolve(name: str | os.PathLike[str], expected: str = "a directory or a hub id", **hub_arguments: Any) -> Location:
    """The place of a model's files. Nothing is fetched before a file is asked for.

    Args:
        name: a file, a folder, a hub id, or the name of an SDXL that ships with the package.
        expected: the kinds of names to pass, for the message.
        **hub_arguments: `revision`, `token`, `cache_dir`, `local_files_only`.

    Raises:
        FileNotFoundError: the name is no path here, and cannot be a hub id.

    Examples:
        >>> resolve("miniature").find("model_index.json").name
        'model_index.json'
        >>> resolve("/nowhere")
        Traceback (most recent call last):
        FileNotFoundError: /nowhere does not exist: pass a directory or a hub id.
    """
    path = Path(sdxl_path(name))
    if os.fspath(name).strip() and path.exists():  # to pathlib, an empty name is the current folder
        return Location(os.fspath(name), path)
    is_file_name = path.suffix in (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
    if not isinstance(name, str) or is_file_name or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        shown = os.fspath(name) if os.fspath(name).strip() == os.fspath(name) != "" else repr(os.fspath(name))
        raise FileNotFoundError(f"{shown} does not exist: pass {expected}.")
    if name in _MODELS:
        raise FileNotFoundError(f"{name} is a CLIP that ships with the package: pass {expected}.")
    if near := difflib.get_close_matches(name.lower(), [*_SDXLS, *_MODELS], n=1, cutoff=0.85):
        raise FileNotFoundError(f"{name} is no path here, nor a model that ships: did you mean {near[0]}?")
    return Location(name, None, hub_arguments)


def check_models(models: Mapping[str, str | None], sdxls: Collection[str] = (), folders: Collection[str] = ()) -> None:
    """Check that models are there, before the imports that take seconds.

    The hub is asked once for each model. If it does not answer, everything is read from its cache from now on, so that
    no library waits for it.

    Args:
        models: the names of models by those of the arguments that they were passed as; None is none.
        sdxls: the arguments that name an SDXL.
        folders: of these, the ones that take no single file.

    Raises:
        OSError: a model is not there.
        ValueError: a file was passed for a folder.

    Examples:
        >>> check_models({"base": "miniature", "finelip": "gone.pt"}, sdxls=["base"])
        Traceback (most recent call last):
        FileNotFoundError: gone.pt does not exist: pass a directory, a file or a hub id.
    """
    for argument, name in models.items():
        if name is None or (argument not in sdxls and bundled_model(name) is not None):
            continue
        kinds = "a directory or a hub id" if argument in folders else "a directory, a file or a hub id"
        place = resolve(name, kinds)
        if place.path is None:
            check_on_hub(place)
        elif argument in folders and place.path.is_file():
            raise ValueError(f"`{argument}` {name} is a file; expected the directory or hub id of an SDXL.")
        elif argument in sdxls and place.path.is_dir() and not (place.path / "model_index.json").is_file():
            kinds = "the directory of an SDXL" + (", or a single file" if argument not in folders else "")
            raise FileNotFoundError(f"{name} has no model_index.json: pass {kinds}.")


def check_on_hub(place: Location) -> None:
    """Check that a hub repository is there. If the hub does not answer, everything is read from its cache from now on.

    Raises:
        OSError: see `Location.check`.
    """
    from huggingface_hub import constants

    if not place.check() and not constants.HF_HUB_OFFLINE:
        constants.HF_HUB_OFFLINE = True
        logger.warning("The hub cannot be reached: models are taken from its cache on this machine.")


# Names of data sets

DATA_FILES = ("sharegpt4v", "csv", "jsonl", "txt")
DATA_FOLDERS = ("folder", "docci", "urban1k", "coco", "flickr30k")
PROMPT_FILES = ("longbench-t2i", "detailmaster")  # of prompts without images
PROMPT_FOLDERS = ("dpg-bench", "tiif")


def data_place(name: str, images: str | os.PathLike[str] | None = None, prompts: bool = False) -> tuple[str, str]:
    """The kind of a data set and its place: a path, or for the miniature's scenes their number, which may be empty.

    Nothing is read: this is for checks before the imports that take seconds, too.

    Args:
        name: `KIND:PATH`, see `finelip_sdxl.data.open_dataset`. The shell leaves a `~` behind the colon as it is, so it
            is expanded here.
        images: a folder of images that goes with it.
        prompts: take sets of prompts without images, too, see `finelip_sdxl.data.open_prompts`.

    Raises:
        FileNotFoundError: a file or folder is not there.
        ValueError: the kind is unknown, a path or a number is missing, or the data takes no folder of images.

    Examples:
        >>> data_place("miniature:500")
        ('miniature', '500')
        >>> data_place("csv:gone.csv")
        Traceback (most recent call last):
        FileNotFoundError: gone.csv does not exist, or is no file: pass the file of the data set.
    """
    kind, _, place = name.partition(":")
    if kind == "miniature":
        if images is not None:
            raise ValueError(f"The scenes of {name} are drawn: pass no folder of images with it.")
        if place and (not place.isdecimal() or int(place) < 1):
            raise ValueError(f"{name:.60} names no number of scenes: pass one, such as miniature:500.")
        return kind, place
    if kind == "webdataset":
        raise ValueError(f"{name} is a stream for training only: pass a data set whose images can be counted.")
    files: tuple[str, ...] = DATA_FILES
    folders: tuple[str, ...] = DATA_FOLDERS
    what = "data set"
    if prompts:
        files, folders, what = PROMPT_FILES + files, PROMPT_FOLDERS + folders, "set of prompts"
    if kind not in folders + files:
        kinds = ", ".join((*files, *folders))
        raise ValueError(f"{name:.100} is no {what}: pass miniature, or one of {kinds} as KIND:PATH.")
    if not place.strip():
        raise ValueError(f"{name} names no path: pass {kind}:PATH.")
    path = Path(place).expanduser()
    if kind in files and not path.is_file():
        raise FileNotFoundError(f"{path} does not exist, or is no file: pass the file of the {what}.")
    if kind in folders and not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist, or is no folder: pass the folder of the {what}.")
    if images is not None and kind == "folder":
        raise ValueError(f"The pictures of {name} are beside their captions: pass no folder of images with it.")
    if images is not None and kind in ("txt", *PROMPT_FILES, *PROMPT_FOLDERS):
        raise ValueError(f"{path} holds texts only: pass no folder of images with it.")
    if images is not None and not Path(images).is_dir():
        raise FileNotFoundError(f"{images} does not exist, or is no folder: pass the folder of the images.")
    return kind, str(path)
