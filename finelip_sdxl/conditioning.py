"""`Conditioning`: encoded prompts with their report, to keep in a file and to draw from without text encoders.

PyTorch is imported by the functions that need it: the header of a file is read without.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finelip_sdxl.files import check_file, written_whole
from finelip_sdxl.foreign_files import read_header, read_tensors

if TYPE_CHECKING:
    import os

    from torch import Tensor, nn

FINGERPRINT = "encoder_fingerprint"  # the argument of a pipeline's call
_EMBEDDINGS = {
    "prompt_embeds": ("batch", "positions", "dim"),
    "negative_prompt_embeds": ("batch", "positions", "dim"),
    "pooled_prompt_embeds": ("batch", "pooled dim"),
    "negative_pooled_prompt_embeds": ("batch", "pooled dim"),
}
_KIND, _HERE = "finelip_sdxl_conditioning", "1"  # in the header of a file, with the version of its layout
_SAMPLE = 4096  # weights of each tensor that count in a fingerprint


@dataclass(frozen=True, eq=False)
class Conditioning(Mapping[str, Any]):
    """Encoded prompts, as `encode` of a pipeline returns them.

    `pipe(**conditioning)` draws from it, also if the pipeline's text encoders are None. Where there are encoders, they
    must be those that encoded it.

    Attributes:
        prompt_embeds, negative_prompt_embeds: states of both encoders, (batch, positions, dim).
        pooled_prompt_embeds, negative_pooled_prompt_embeds: pooled vectors, (batch, pooled dim).
        prompts, negative_prompts: the texts; the latter is empty if there were none.
        report: the plan of the prompts, as people read it.
        encoder_fingerprint: fingerprint of the text encoders and the conditioning adapter, see `fingerprint`; empty if
            it is unknown.

    Examples:
        >>> from finelip_sdxl import FineLIPSDXLPipeline
        >>> pipe = FineLIPSDXLPipeline.from_pretrained("miniature")
        >>> pipe.set_progress_bar_config(disable=True)
        >>> conditioning = pipe.encode("a red star")
        >>> print(conditioning.report.splitlines()[1])
          window 1, 5 tokens: "a red star"
        >>> pipe.text_encoder = pipe.text_encoder_2 = None
        >>> pipe(**conditioning, num_inference_steps=2).images[0].size
        (192, 192)
    """

    prompt_embeds: Tensor
    negative_prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor
    negative_pooled_prompt_embeds: Tensor
    prompts: tuple[str, ...] = ()
    negative_prompts: tuple[str, ...] = ()
    report: str = ""
    encoder_fingerprint: str = ""

    # The arguments of a pipeline's call

    def __getitem__(self, name: str) -> Any:
        if name not in (*_EMBEDDINGS, FINGERPRINT):
            raise KeyError(name)
        return getattr(self, name)

    def __iter__(self) -> Iterator[str]:
        return iter((*_EMBEDDINGS, FINGERPRINT))

    def __len__(self) -> int:
        return len(_EMBEDDINGS) + 1

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write a `.safetensors` file, with texts, report and fingerprint in its metadata.

        Raises:
            ValueError: the name does not end in `.safetensors`.
            OSError: the file cannot be written.
        """
        from safetensors.torch import save_file

        place = check_name(file)
        about = {
            _KIND: _HERE,
            "prompts": json.dumps(self.prompts),
            "negative_prompts": json.dumps(self.negative_prompts),
            "report": self.report,
            FINGERPRINT: self.encoder_fingerprint,
            "finelip_sdxl": version("finelip-sdxl"),
        }
        tensors = {name: getattr(self, name).detach().cpu().contiguous().clone() for name in _EMBEDDINGS}
        with written_whole(place) as temporary:
            save_file(tensors, temporary, metadata=about)

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> Conditioning:
        """Read a file that `save` wrote.

        Raises:
            OSError: the file is not there, or is damaged.
            ValueError: it holds something else.
        """
        header = ConditioningHeader.read(file)
        tensors = read_tensors(Path(file))
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise ValueError(f"{file} has NaN or infinite values in `{name}`: encode the prompt again.")
        return cls(**tensors, **vars(header))


@dataclass(frozen=True)
class ConditioningHeader:
    """What the file of a `Conditioning` says of it; see there."""

    prompts: tuple[str, ...]
    negative_prompts: tuple[str, ...]
    report: str
    encoder_fingerprint: str

    @classmethod
    def read(cls, file: str | os.PathLike[str]) -> ConditioningHeader:
        """Read and check the header of a file, without its tensors and without PyTorch.

        Raises:
            OSError, ValueError: as in `Conditioning.load`.
        """
        shapes, about = read_header(check_name(file))
        other = f"{file} holds no conditioning of FineLIP-SDXL"
        if _KIND not in about:
            raise ValueError(f"{other}: pass a file that `Conditioning.save` has written.")
        if about[_KIND] != _HERE:
            raise ValueError(
                f"{file} was written by FineLIP-SDXL {about.get('finelip_sdxl', '?')}, whose files this version does"
                " not know: update the package, or encode the prompt again."
            )
        try:
            prompts, negatives = (json.loads(about[name]) for name in ("prompts", "negative_prompts"))
            header = cls(tuple(prompts), tuple(negatives), about["report"], about[FINGERPRINT])
            known = all(isinstance(text, str) for text in (*header.prompts, *header.negative_prompts))
        except (KeyError, TypeError, ValueError, RecursionError):
            known = False
        if not known or shapes.keys() != _EMBEDDINGS.keys():
            raise ValueError(f"{file} lacks a part of a conditioning, or has too many: encode the prompt again.")
        for name, (shape, dtype) in shapes.items():
            expected = _EMBEDDINGS[name]
            if len(shape) != len(expected) or 0 in shape or not dtype.startswith(("F", "BF")):
                raise ValueError(
                    f"{file} has `{name}` of shape {tuple(shape)} and type {dtype}; expected floats,"
                    f" ({', '.join(expected)}): encode the prompt again."
                )
        if (
            len({shape[0] for shape, _ in shapes.values()}) > 1
            or shapes["prompt_embeds"] != (shapes["negative_prompt_embeds"])
        ):
            raise ValueError(f"{file} has embeddings of shapes that do not go together: encode the prompt again.")
        return header


def check_name(file: str | os.PathLike[str], to_write: bool = False) -> Path:
    """The path of a conditioning's file.

    Raises:
        ValueError: its name does not end in `.safetensors`.
        OSError: with `to_write`, it cannot be written.
    """
    place = Path(file)
    if place.suffix != ".safetensors":
        raise ValueError(f"{file} is no name for a conditioning: expected one that ends in .safetensors.")
    if to_write:
        check_file(place)
    return place


def fingerprint(models: Iterable[nn.Module | None]) -> str:
    """A fingerprint of models, the same in every precision: of the shapes of weights, the signs of some, and LoRAs.

    Rounding keeps a weight's sign, also where it makes it zero. Training turns the signs of weights near zero.

    Returns:
        16 hexadecimal digits; empty if there are no models, or their weights are quantized or held elsewhere
        (sequential offloading).

    Examples:
        >>> import torch
        >>> layer = torch.nn.Linear(8, 8)
        >>> fingerprint([layer]) == fingerprint([layer.half()])
        True
        >>> fingerprint([layer]) == fingerprint([torch.nn.Linear(8, 8)])
        False
    """
    import torch

    modules = [module for model in models if model is not None for module in model.modules()]
    weights = [weight.detach() for module in modules for weight in module.parameters(recurse=False)]
    if not weights or any(weight.is_meta or not weight.is_floating_point() for weight in weights):
        return ""
    loras = [_lora_state(module) for module in modules if isinstance(getattr(module, "scaling", None), dict)]
    digest = hashlib.sha256(repr([loras, [tuple(weight.shape) for weight in weights]]).encode())
    signs = torch.cat([weight.reshape(-1)[:_SAMPLE].float().signbit().cpu() for weight in weights])
    digest.update(signs.numpy().tobytes())
    return digest.hexdigest()[:16]


def _lora_state(layer: Any) -> tuple[Any, ...]:
    """Whether a layer's LoRAs act, and their scales, which may have an error of rounding."""
    scales = {name: round(scale, 4) for name, scale in layer.scaling.items()}
    return list(layer.active_adapters), layer.disable_adapters, scales
