"""The sources of weights, recorded in the configs of pipelines and text encoders by their public names.

This module alone reads and writes these keys. In the config of a text encoder they are `stretched_from`,
`stretch_keep`, `stretch_factor`, `made_from` and `merged_with`; in the config of a pipeline, `_finelip_sdxl_base`.
Functions import PyTorch where they need it: the plan of a prompt reads these records without it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Protocol

from finelip_sdxl.options import STOCK_POSITIONS

if TYPE_CHECKING:
    from diffusers.configuration_utils import ConfigMixin
    from torch import Tensor

_BASE = "_finelip_sdxl_base"  # stock Diffusers skips keys that begin with an underscore
_SOURCES = ("_name_or_path", _BASE, "made_from", "merged_with")  # the first is Diffusers' own
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_ADDRESS = re.compile(r"(https?://)(?:[^/?#]*@)?([^?#]*)", re.IGNORECASE)


@dataclass(frozen=True)
class Provenance:
    """The source of a text encoder's weights, as its config records it.

    A config from elsewhere may hold anything under these keys: check such values by `check_rows` and `public_name`.

    Attributes:
        stretched_from: number of positions before a stretch. The weights are then exactly the original's. None if the
            table was not stretched, or was trained afterward.
        stretch_keep: number of leading positions that the stretch left unchanged.
        stretch_factor: number of positions that the stretch made from each later one.
        made_from: the source of the weights that replaced an SDXL's own.
        merged_with: the source of the weights in a delta merge.

    Examples:
        >>> from transformers import CLIPTextConfig
        >>> config = CLIPTextConfig(max_position_embeddings=248)
        >>> Provenance(stretched_from=77, stretch_keep=20, stretch_factor=4).write(config)
        >>> Provenance.of(config).is_stock(positions=248)
        True
        >>> Provenance.of(config).without_stretch().write(config)
        >>> Provenance.of(config).is_stock(positions=248), hasattr(config, "stretched_from")
        (False, False)
    """

    stretched_from: int | None = None
    stretch_keep: int | None = None
    stretch_factor: int | None = None
    made_from: str | None = None
    merged_with: str | None = None

    @classmethod
    def of(cls, config: Any) -> Provenance:
        """The record in the config of a text encoder."""
        return cls(**{field.name: getattr(config, field.name, None) for field in fields(cls)})

    def write(self, config: Any) -> None:
        """Write this record to the config of a text encoder, in place."""
        for name, value in asdict(self).items():
            if value is not None:
                setattr(config, name, value)
            elif hasattr(config, name):
                delattr(config, name)

    def with_stretch(self, stretched_from: int, keep: int, factor: int) -> Provenance:
        """The record after a stretch."""
        return replace(self, stretched_from=stretched_from, stretch_keep=keep, stretch_factor=factor)

    def without_stretch(self) -> Provenance:
        """The record without a stretch: after training, and for the weights of another SDXL."""
        return replace(self, stretched_from=None, stretch_keep=None, stretch_factor=None)

    def is_stock(self, positions: int) -> bool:
        """Whether an encoder of this number of positions has stock's weights, with or without a stretched table."""
        return positions <= STOCK_POSITIONS or self.stretched_from == STOCK_POSITIONS

    def original_row_indices(self) -> Tensor | None:
        """Indices of the original table's rows in a stretched table, (rows,); None if nothing was stretched."""
        from finelip_sdxl.stretch import stretched_row_indices

        if self.stretched_from is None:
            return None
        assert self.stretch_keep is not None
        assert self.stretch_factor is not None
        return stretched_row_indices(self.stretched_from, keep=self.stretch_keep, factor=self.stretch_factor)

    def check_rows(self, rows: int, name: str) -> None:
        """Check that the recorded stretch makes a table of this number of rows.

        Args:
            rows: number of rows of the positional table.
            name: name of the config's owner, for messages.

        Raises:
            ValueError: it makes another number.
        """
        from finelip_sdxl.stretch import check_stretch

        record: Any = (self.stretched_from, self.stretch_keep, self.stretch_factor)
        before, keep, factor = record
        if before is None:
            return
        try:
            check_stretch(before, keep, factor)
            fits = keep + factor * (before - keep) == rows
        except ValueError:
            fits = False
        if not fits:
            said = f"stretched_from {before!r}, stretch_keep {keep!r}, stretch_factor {factor!r}"
            raise ValueError(f"The config of {name} says {said}, which does not make its {rows} positions.")


def forget_stretch(config: Any) -> None:
    """Remove the record of a stretch from a text encoder's config, in place: training changes all rows.

    Examples:
        >>> from transformers import CLIPTextConfig
        >>> config = CLIPTextConfig(stretched_from=77, stretch_keep=20, stretch_factor=4, made_from="me/clip")
        >>> forget_stretch(config)
        >>> Provenance.of(config)
        Provenance(stretched_from=None, stretch_keep=None, stretch_factor=None, made_from='me/clip', merged_with=None)
    """
    Provenance.of(config).without_stretch().write(config)


def base_of(config: Mapping[str, Any]) -> Any:
    """The name of the SDXL that a pipeline was made from, by its config or `model_index.json`; None if it has none."""
    return config.get(_BASE)


def record_base(pipe: ConfigMixin, name: str) -> None:
    """Record the name of the SDXL that a pipeline was made from, in its config."""
    pipe.register_to_config(**{_BASE: name})


def public_name(source: Any) -> str:
    """The name of a source of weights without private parts.

    A hub id stays as it is. An address loses its user, password and query. A path, on this machine or another, keeps
    its last part only.

    Examples:
        >>> public_name("zer0int/LongCLIP-L-Diffusers")
        'zer0int/LongCLIP-L-Diffusers'
        >>> public_name(__file__)
        'provenance.py'
        >>> public_name("https://me:secret@example.com/a.safetensors?token=secret")
        'https://example.com/a.safetensors'
    """
    name = os.fspath(source) if isinstance(source, os.PathLike) else str(source)
    if os.path.exists(name):
        return os.path.basename(os.path.realpath(name))
    if found := _ADDRESS.match(name):
        return "".join(found.groups())
    if HUB_ID.fullmatch(name):
        return name
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1]


class _HasComponents(Protocol):
    """A pipeline, as far as `without_paths` needs it."""

    @property
    def components(self) -> Mapping[str, Any]: ...


def without_paths(pipe: _HasComponents) -> None:
    """Replace the sources in the configs of a pipeline and its parts by their public names, before they are saved."""
    from diffusers.configuration_utils import ConfigMixin
    from torch import nn
    from transformers import PreTrainedModel

    for part in (pipe, *pipe.components.values()):
        for module in part.modules() if isinstance(part, nn.Module) else (part,):
            if isinstance(module, ConfigMixin):
                own: Any = module
                names = {key: public_name(own.config[key]) for key in _SOURCES if own.config.get(key)}
                own.register_to_config(**names)
            elif isinstance(module, PreTrainedModel):
                config = vars(module.config)
                config.update({key: public_name(config[key]) for key in _SOURCES if config.get(key)})
