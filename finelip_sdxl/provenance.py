"""Where weights came from, by names that others may know."""

from __future__ import annotations

import os
import re
from typing import Any

from diffusers import ConfigMixin
from torch import nn
from transformers import PreTrainedModel

# Keys in the config of a pipeline (stock skips those with an underscore) and of its text encoders.
BASE, MADE_FROM, MERGED_WITH = "_finelip_sdxl_base", "made_from", "merged_with"


_SOURCES = ("_name_or_path", BASE, MADE_FROM, MERGED_WITH)  # the first is Diffusers' own


HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


_ADDRESS = re.compile(r"(https?://)(?:[^/?#]*@)?([^?#]*)", re.IGNORECASE)


def public_name(source: Any) -> str:
    """A source of weights as others may know it: a hub id as it is, an address without what signs in, and of a path
    its last part alone, whether it is one of this machine or of another.

    Example:
        >>> public_name("zer0int/LongCLIP-L-Diffusers")
        'zer0int/LongCLIP-L-Diffusers'
        >>> public_name(__file__)
        'model_card.py'
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


def without_paths(pipe: Any) -> None:
    """Make the configs of a pipeline and its parts, which are saved with them, say by public names alone what they were
    made from."""
    for part in (pipe, *pipe.components.values()):
        for module in part.modules() if isinstance(part, nn.Module) else (part,):
            if isinstance(module, ConfigMixin):
                config = module.config
                module.register_to_config(**{key: public_name(config[key]) for key in _SOURCES if config.get(key)})
            elif isinstance(module, PreTrainedModel):
                config = vars(module.config)
                config.update({key: public_name(config[key]) for key in _SOURCES if config.get(key)})
