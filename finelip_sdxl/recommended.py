"""The steps and the guidance scale that a model recommends, in its `model_index.json`.

This module alone reads and writes that entry. Stock Diffusers skips it, as all keys that begin with an underscore.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

_KEY = "_finelip_sdxl_recommended"


@dataclass(frozen=True)
class Recommended:
    """Settings of a drawing that suit a model; the defaults are those for a model that recommends nothing.

    They are Diffusers' own: a call in Python without settings draws what stock draws, and the command line and the page
    draw the same.

    Attributes:
        steps: denoising steps.
        guidance_scale: classifier-free guidance.
    """

    steps: int = 50
    guidance_scale: float = 5.0


def recommended_of(config: Mapping[str, Any]) -> Recommended | None:
    """The recommendation in a pipeline's config or `model_index.json`; None if it has none.

    Raises:
        ValueError: it is no recommendation.

    Examples:
        >>> from finelip_sdxl.foreign_files import read_json
        >>> from finelip_sdxl.miniature import miniature_path
        >>> recommended_of(read_json(miniature_path() / "model_index.json"))
        Recommended(steps=20, guidance_scale=5.0)
    """
    entry = config.get(_KEY)
    if entry is None:
        return None
    found: dict[str, Any] = dict(entry) if isinstance(entry, Mapping) else {}
    steps, scale = found.get("num_inference_steps"), found.get("guidance_scale")
    is_whole, is_number = type(steps) is int, isinstance(scale, int | float)
    if steps is None or scale is None or not is_whole or steps < 1 or not is_number or not 0 <= scale < 1000:
        raise ValueError(
            f"The model's {_KEY} is {entry!r:.100}; expected num_inference_steps of at least 1 and a guidance_scale of"
            " at least 0: correct its model_index.json."
        )
    return Recommended(steps, float(scale))


def recommended_arguments(config: Mapping[str, Any], given: Container[str]) -> dict[str, Any]:
    """The arguments of a call that the model recommends and that are not among the `given` ones.

    Args:
        config: the pipeline's config.
        given: names of the arguments that the caller passes.

    Examples:
        >>> config = {_KEY: {"num_inference_steps": 20, "guidance_scale": 3}}
        >>> recommended_arguments(config, given=["prompt", "guidance_scale"])
        {'num_inference_steps': 20}
    """
    found = recommended_of(config)
    arguments = {} if found is None else {"num_inference_steps": found.steps, "guidance_scale": found.guidance_scale}
    return {name: value for name, value in arguments.items() if name not in given}


def record_recommended(pipe: Any, recommended: Recommended | None) -> None:
    """Record a recommendation in the config of a pipeline, which `save_pretrained` writes; None records nothing."""
    if recommended is not None:
        entry = {"num_inference_steps": recommended.steps, "guidance_scale": recommended.guidance_scale}
        pipe.register_to_config(**{_KEY: entry})
