"""Configs and weights from other people: loaded completely, or refused in one sentence with the file's name.

No code in a file is run, and no more memory is used than about a file's own size. A config is checked against the
shapes of the weights beside it before a model is built.

PyTorch is imported by the functions that read weights: who needs a config alone, such as the plan of a prompt, does
not wait for it.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:
    from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]

_LARGEST_JSON = 1 << 26  # bytes; the largest real files, of tokenizers, have a few million
_DEEPEST_JSON = 32
_LARGEST_NUMBER = 1 << 31  # in a model's config; real sizes, counts and token ids are far below
_AGAIN = "copy or download it again"


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no JSON, no object, larger or deeper than any config, or holds text that is no Unicode.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     _ = Path(folder, "config.json").write_text('{"hidden_size": 64}')
        ...     read_json(Path(folder, "config.json"))
        {'hidden_size': 64}
    """
    if (size := file.stat().st_size) > _LARGEST_JSON:
        raise ValueError(f"{file} has {size / 1e6:.0f} MB, more than any config: {_AGAIN}.")
    try:
        content = json.loads(file.read_bytes())
        json.dumps(content, ensure_ascii=False).encode()
        too_deep = _depth(content) > _DEEPEST_JSON
    except RecursionError:
        too_deep = True
    except UnicodeEncodeError as error:
        raise ValueError(f"{file} holds half of a surrogate pair, which is no text: {_AGAIN}.") from error
    except ValueError as error:
        raise ValueError(f"{file} is no JSON ({one_line(error)}): {_AGAIN}.") from error
    if too_deep:
        raise ValueError(f"{file} is nested deeper than any config: {_AGAIN}.")
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}; expected an object with fields: {_AGAIN}.")
    return content


def read_tensors(file: Path) -> Any:
    """The content of a `.safetensors` or PyTorch file, on the CPU: a state dict, or a dict around it.

    Raises:
        OSError: the file cannot be read, or is not whole.
        ValueError: it holds code or objects other than tensors, or unpacks to more than its size.
    """
    _check_kind(file)
    if file.suffix != ".safetensors":
        return _read_pickle(file, "cpu")
    from safetensors.torch import load_file

    with _safetensors_errors(file):
        return load_file(file)


def read_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in a file of weights; the weights themselves are not loaded.

    Raises:
        OSError, ValueError: as in `read_tensors`.
    """
    _check_kind(file)
    if file.suffix != ".safetensors":
        content = _read_pickle(file, "meta")
        return {key: tuple(value.shape) for key, value in content.items() if _is_tensor(value)}
    with _safetensors_errors(file), safe_open(file, "pt") as opened:
        return {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118


def read_header(file: Path) -> tuple[dict[str, tuple[tuple[int, ...], str]], dict[str, str]]:
    """Shape and type of each tensor in a `.safetensors` file, and its metadata, without PyTorch.

    Raises:
        OSError: the file cannot be read, or is not whole.
    """
    _check_kind(file)
    with _safetensors_errors(file), safe_open(file, "np") as opened:
        slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118
        shapes = {key: (tuple(part.get_shape()), str(part.get_dtype())) for key, part in slices.items()}
        return shapes, dict(opened.metadata() or {})


def shard_names(index: Path) -> list[str]:
    """The names of files in an index of sharded weights.

    Raises:
        OSError: the index cannot be read.
        ValueError: it is no index, or names a file outside its folder.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map, the table of weights and their files: {_AGAIN}.")
    for name in weight_map.values():
        if not isinstance(name, str) or name in ("", "..") or name != PurePosixPath(name).name or "\\" in name:
            raise ValueError(f"{index} names {name!r}, which is no file beside it: get these weights elsewhere.")
    return sorted(set(weight_map.values()))


def check_finite(tensors: Mapping[str, Tensor], name: str) -> None:
    """Check that no weight is NaN or infinite. Tensors without data, on the meta device, pass.

    Raises:
        ValueError: a weight is; the message names it.

    Examples:
        >>> import torch
        >>> check_finite({"a": torch.tensor([1.0, torch.nan])}, "x.pt")
        Traceback (most recent call last):
        ValueError: x.pt holds NaN or infinite values in 1 of 1 weights, such as 'a': its training has diverged, ...
    """
    broken = [key for key, tensor in tensors.items() if not tensor.is_meta and not _is_finite(tensor)]
    if broken:
        raise ValueError(
            f"{name} holds NaN or infinite values in {len(broken)} of {len(tensors)} weights, such as {broken[0]!r}:"
            " its training has diverged, or the file is damaged; use an earlier checkpoint, or fetch it again."
        )


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    # NaN spreads to both. `isfinite` of all weights takes thirty times as long, more than the rest of loading.
    return all(end.isfinite() for end in tensor.aminmax())


def check_numbers(config: Mapping[str, Any], weights: int, file: Path | str, largest: int = _LARGEST_NUMBER) -> None:
    """Check that a config describes no larger model than the weights beside it can fill.

    This comes before a model is built, since even an empty model takes time and memory for each layer.

    Args:
        config: content of the file.
        weights: number of tensors.
        file: name of the file, for messages.
        largest: largest number that is allowed; negative ones are not.

    Raises:
        ValueError: a number or list is too large; the message names its field.

    Examples:
        >>> check_numbers({"layers_per_block": 10**6}, weights=400, file="unet/config.json")
        Traceback (most recent call last):
        ValueError: unet/config.json says layers_per_block 1000000, but there are only 400 weights beside it: ...
    """
    for field, value in _fields(config):
        if isinstance(value, list) and len(value) > max(weights, 1000):
            raise ValueError(f"{file} has {len(value)} entries in {field}, but {_only(weights)}.")
        if isinstance(value, float) and value != value:
            raise ValueError(f"{file} says {field} NaN, which is no number: {_AGAIN}.")
        if isinstance(value, bool) or not isinstance(value, int):
            continue
        if not 0 <= value <= largest:
            raise ValueError(f"{file} says {field} {value!s:.20}; expected a number from 0 to {largest}.")
        if "layers" in field and value > weights:
            raise ValueError(f"{file} says {field} {value}, but {_only(weights)}.")


@contextmanager
def config_errors(file: Path | str) -> Iterator[None]:
    """Turn all errors of a library that builds a config or an empty model into a sentence with the file's name.

    The file's content is the only unknown there, so any exception is about it.
    """
    try:
        yield
    except (OSError, MemoryError):
        raise
    except Exception as error:
        raise ValueError(f"{file} does not describe a model ({one_line(error)}): {_AGAIN}.") from error


def one_line(error: BaseException) -> str:
    """The message of an exception, in one line of at most 200 characters."""
    said = " ".join(str(error).split()).rstrip(".")
    if isinstance(error, KeyError) or not said:
        said = f"{type(error).__name__}: {said}"
    return said if len(said) <= 200 else f"{said[:199]}…"


def _only(weights: int) -> str:
    return f"there are only {weights} weights beside it: {_AGAIN}"


def _check_kind(file: Path) -> None:
    if not file.is_file():
        raise OSError(f"{file} is no file: {_AGAIN}.")
    with file.open("rb") as opened:
        start = opened.read(16)
    if not start:
        raise OSError(f"{file} is empty: {_AGAIN}.")
    if start.startswith(b"version https://"):
        raise OSError(f"{file} is a Git LFS pointer in place of weights: fetch them with `git lfs pull`.")
    if file.suffix != ".safetensors" and start[:2] != b"PK" and start[:1] != b"\x80":
        raise OSError(f"{file} is neither a PyTorch file nor named .safetensors: it begins with {start[:8]!r}.")


def _read_pickle(file: Path, device: str) -> Any:
    import torch

    size = file.stat().st_size
    if zipfile.is_zipfile(file):
        with _pytorch_errors(file), zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
        if any(entry.filename.endswith("/constants.pkl") for entry in entries):
            raise ValueError(
                f"{file} is a TorchScript archive, which holds code as well: save its weights alone, "
                "torch.save(torch.jit.load(path, map_location='cpu').state_dict(), 'weights.pt'), and load that file."
            )
        # PyTorch stores tensors uncompressed, so the parts of its files never add up to more than the file.
        _check_unpacked(file, sum(entry.file_size for entry in entries), size)
    with _pytorch_errors(file):
        content = torch.load(file, map_location=device, weights_only=True)
    tensors = list(_tensors(content))
    if any(t.device.type != device or t.layout != torch.strided or t.is_quantized for t in tensors):
        raise ValueError(f"{file} holds tensors that are sparse, quantized or without data: save plain ones.")
    # Views may have a large shape and little memory. Up to four times is normal: some checkpoints hold weights twice.
    _check_unpacked(file, sum(tensor.nbytes for tensor in tensors), 4 * size)
    return content


def _check_unpacked(file: Path, unpacked: int, bound: int) -> None:
    if unpacked > bound:
        raise ValueError(
            f"{file} unpacks to {unpacked / 1e6:.0f} MB from {file.stat().st_size / 1e6:.1f} MB, and files of weights"
            " do not: get it elsewhere."
        )


def _is_tensor(value: Any) -> bool:
    from torch import Tensor

    return isinstance(value, Tensor)


def _tensors(content: Any) -> Iterator[Tensor]:
    if _is_tensor(content):
        yield content
    elif isinstance(content, Mapping):
        for value in content.values():
            yield from _tensors(value)


@contextmanager
def _safetensors_errors(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # the library's own error, or one about types that PyTorch lacks
        kind = "" if isinstance(error, SafetensorError) else f"{type(error).__name__}: "
        raise OSError(f"{file} is not a whole safetensors file ({kind}{one_line(error)}): {_AGAIN}.") from error


@contextmanager
def _pytorch_errors(file: Path) -> Iterator[None]:
    try:
        yield
    except UnpicklingError as error:
        raise ValueError(
            f"{file} holds Python objects besides tensors, and loading them could run code: "
            "save its state dict alone, torch.save(model.state_dict(), 'weights.pt'), and load that file."
        ) from error
    except Exception as error:  # damaged pickles raise errors of all types
        raise OSError(f"{file} is not a whole PyTorch file: {_AGAIN}.") from error


def _fields(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """All values in a config with the names of their fields; values in a list have the name of the list."""
    yield name, value
    inner: Iterable[tuple[str, Any]] = ()
    if isinstance(value, Mapping):
        inner = ((f"{name}.{key}" if name else str(key), item) for key, item in value.items())
    elif isinstance(value, list):
        inner = ((name, item) for item in value)
    for key, item in inner:
        yield from _fields(item, key)


def _depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, inner), default=0)
