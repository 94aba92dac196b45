"""Settings of a picture, with their ranges, and checks of the columns."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from finelip_sdxl.options import COLUMNS, EMPHASIS, HIDDEN_STATES, WEIGHTING, check_choice, check_texts
from finelip_sdxl.picture_sizes import check_side
from finelip_sdxl.recommended import Recommended

MAX_STEPS, MAX_GUIDANCE, MAX_SEED, MIN_SIDE, MAX_SIDE = 200, 50.0, 2**32 - 1, 64, 2048

# No weights, or one of their syntaxes; the word stands for None, which is the pipeline's own here.
WEIGHTINGS = ("none", *(syntax for syntax in WEIGHTING if syntax is not None))

MAX_ROWS = 100  # seeds of one comparison; all its pictures are in memory at once


@dataclass(frozen=True)
class Settings:
    """Settings of one picture.

    Attributes:
        prompt: text of any length.
        negative_prompt: text; empty for none.
        steps: denoising steps, 1 to 200; None for as many as the model recommends.
        guidance_scale: classifier-free guidance, 0 to 50; off up to 1. None for the one that the model recommends.
        seed: seed of the noise. Noise is drawn on the CPU, so it is the same on every device.
        width, height: pixels, from 64 to 2048; None for the model's own. See `check_size`.
        conditioning_adapter_scale: share of the adapter that counts in FineLIP-SDXL's column, 0 to 1.
        hidden_states: `"penultimate"` or `"last"`, in the same column; None for the pipeline's own.
        weighting: syntax of weights in the same column, `"none"`, `"compel"` or `"a1111"`; None for the pipeline's own.
        emphasis: effect of a weight in the same column, `"compel"`, `"a1111"`, `"a1111_no_norm"` or `"comfyui"`; None
            for the pipeline's own.

    Raises:
        ValueError, TypeError: a setting is out of range, or of another type.

    Examples:
        >>> Settings("a red star", steps=0)
        Traceback (most recent call last):
        ValueError: `steps` is 0; expected a whole number from 1 to 200.
    """

    prompt: str
    negative_prompt: str = ""
    steps: int | None = None
    guidance_scale: float | None = None
    seed: int = 0
    width: int | None = None
    height: int | None = None
    conditioning_adapter_scale: float = 1.0
    hidden_states: str | None = None
    weighting: str | None = None
    emphasis: str | None = None

    def __post_init__(self) -> None:
        for name in ("prompt", "negative_prompt"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"`{name}` must be a string, but is {getattr(self, name)!r:.60}.")
            check_texts(name, getattr(self, name))
        if self.steps is not None:
            check_number("steps", self.steps, 1, MAX_STEPS, whole=True)
        if self.guidance_scale is not None:
            check_number("guidance_scale", self.guidance_scale, 0, MAX_GUIDANCE)
        check_number("seed", self.seed, 0, MAX_SEED, whole=True)
        check_number("conditioning_adapter_scale", self.conditioning_adapter_scale, 0, 1)
        for name in ("width", "height"):
            side = getattr(self, name)
            if side is not None:
                check_number(name, side, MIN_SIDE, MAX_SIDE, whole=True)
        if self.hidden_states is not None:
            check_choice("hidden_states", self.hidden_states, HIDDEN_STATES)
        if self.weighting is not None:
            check_choice("weighting", self.weighting, WEIGHTINGS)
        if self.emphasis is not None:
            check_choice("emphasis", self.emphasis, EMPHASIS)

    def check_size(self, factor: int) -> None:
        """Refuse a width or height that a model cannot draw.

        Args:
            factor: of the model (`finelip_sdxl.picture_sizes`): 8, or 16 for the miniature.

        Raises:
            ValueError: one is no multiple of the factor.
        """
        for name in ("width", "height"):
            if getattr(self, name) is not None:
                check_side(name, getattr(self, name), factor)

    def filled(self, recommended: Recommended) -> Settings:
        """These settings, with the steps and the guidance scale that a model recommends where they are None.

        Examples:
            >>> Settings("a red star", steps=4).filled(Recommended(steps=20, guidance_scale=3.0)).guidance_scale
            3.0
        """
        steps = recommended.steps if self.steps is None else self.steps
        scale = recommended.guidance_scale if self.guidance_scale is None else self.guidance_scale
        return replace(self, steps=steps, guidance_scale=scale)

    def over_seeds(self, count: int) -> list[Settings]:
        """These settings with this seed, and with each of the next seeds.

        Args:
            count: number of seeds, 1 to 100.

        Raises:
            ValueError: `count` is out of range, or a seed would be too large.
        """
        check_number("seeds", count, 1, MAX_ROWS, whole=True)
        return [replace(self, seed=self.seed + number) for number in range(count)]

    @classmethod
    def from_parameters(cls, parameters: dict[str, Any]) -> Settings:
        """Settings from the parameters in a picture's file. Other entries are ignored.

        Raises:
            ValueError, TypeError: the parameters hold no prompt, or one of them is out of range.

        Examples:
            >>> Settings.from_parameters({"prompt": "a red star", "steps": 20, "base": "miniature"}).steps
            20
        """
        if "prompt" not in parameters:
            raise ValueError("These parameters hold no prompt: pass a picture that FineLIP-SDXL has drawn.")
        names = {field.name for field in fields(cls)}
        # The command line writes null for an option that was not given.
        known = {name: value for name, value in parameters.items() if name in names and value is not None}
        if known.get("hidden_states") == "published":  # the old name of the last states
            known["hidden_states"] = "last"
        return cls(**known)


def check_columns(columns: Any) -> list[str]:
    """`columns` as a list of keys of `COLUMNS`.

    Raises:
        TypeError: `columns` is no list of strings.
        ValueError: `columns` is empty, or a column is unknown or there twice.

    Examples:
        >>> check_columns(("stock", "finelip"))
        ['stock', 'finelip']
    """
    if not isinstance(columns, list | tuple) or not all(isinstance(column, str) for column in columns):
        raise TypeError(f"`columns` must be a list of {', '.join(map(repr, COLUMNS))}, but is {columns!r:.60}.")
    if not columns:
        raise ValueError(f"`columns` is empty; pass at least one of {', '.join(map(repr, COLUMNS))}.")
    for column in columns:
        check_choice("column", column[:60], tuple(COLUMNS))
        if columns.count(column) > 1:
            raise ValueError(f"`columns` names {column!r} {columns.count(column)} times: pass each column once.")
    return list(columns)


def check_number(name: str, value: Any, least: float, most: float, whole: bool = False) -> None:
    """Refuse a value that is no number from `least` to `most`, or with `whole` no whole one.

    Raises:
        ValueError: the message names the range.
    """
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value <= most:
        kind = "a whole number" if whole else "a number"
        raise ValueError(f"`{name}` is {value!r:.60}; expected {kind} from {least:g} to {most:.10g}.")
