"""Arguments of the pipelines' methods: unknown names are refused, and options hold for one call."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from difflib import SequenceMatcher
from functools import partial, wraps
from numbers import Integral, Real
from typing import Any, Concatenate, ParamSpec, TypeVar

from finelip_sdxl.options import (
    AS_SET,
    EMPHASIS,
    HIDDEN_STATES,
    OVERFLOW,
    SHORT_PROMPT_ENCODER,
    WEIGHTING,
    check_adapter_scale,
    check_choice,
    check_length_buckets,
    check_lora_dir,
)

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

# Checks of the options that a pipeline's config holds.
OPTIONS: dict[str, Callable[[Any], Any]] = {
    "short_prompt_encoder": partial(check_choice, "short_prompt_encoder", choices=SHORT_PROMPT_ENCODER),
    "hidden_states": partial(check_choice, "hidden_states", choices=HIDDEN_STATES),
    "overflow": partial(check_choice, "overflow", choices=OVERFLOW),
    "length_buckets": check_length_buckets,
    "weighting": partial(check_choice, "weighting", choices=WEIGHTING),
    "emphasis": partial(check_choice, "emphasis", choices=EMPHASIS),
}

_CALL_OPTIONS: dict[str, Callable[[Any], Any]] = {
    **OPTIONS,
    "conditioning_adapter_scale": check_adapter_scale,
    "lora_dir": check_lora_dir,
}

# Arguments of a call that are in no signature: Diffusers takes them by `**kwargs` and says that they are deprecated.
_DEPRECATED = ("callback", "callback_steps")

# The pipeline that runs now, and the options of its call. Every thread has its own.
_call: ContextVar[tuple[object, Mapping[str, Any]]] = ContextVar("call", default=(None, {}))


def takes_options(
    method: Callable[Concatenate[Any, Arguments], Result],
) -> Callable[Concatenate[Any, Arguments], Result]:
    """The method of a pipeline, with the options among its arguments in force as long as it runs.

    They take the place of the pipeline's own values (`option_in_force`), for all that this method calls: Diffusers'
    `__call__` stands between ours and `encode_prompt`, and does not know them.

    The method raises:
        TypeError: an argument has an unknown name. (Diffusers' `__call__` takes every name, and does nothing with it.)
        ValueError: an option has an unknown value.
    """

    @wraps(method)
    def call(self: Any, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        name, given = method.__name__, [name for name in kwargs if name not in _DEPRECATED]
        refuse_unknown(f"{type(self).__name__}.{name}", given, argument_names(type(self), name))
        passed = {
            name: check(kwargs[name]) for name, check in _CALL_OPTIONS.items() if kwargs.get(name, AS_SET) is not AS_SET
        }
        with _in_force(self, passed):
            return method(self, *args, **kwargs)

    return call


def option_in_force(pipe: object, name: str, own: Any) -> Any:
    """The value of an option: of the call of `pipe` that runs in this thread, if it was passed one, or else `own`, the
    pipeline's."""
    calling, options = _call.get()
    return options.get(name, own) if calling is pipe else own


def check_numbers(given: Mapping[str, Any]) -> None:
    """Check the numbers of a call by name, which Diffusers takes as they are: -1 step draws noise, and NaN nothing.

    Raises:
        ValueError: steps or a side of the picture are no whole number in range, or a guidance scale is no number.

    Examples:
        >>> check_numbers({"prompt": "a fox", "num_inference_steps": -1})
        Traceback (most recent call last):
        ValueError: `num_inference_steps` is -1; expected a whole number from 1 to 10,000.
    """
    for name, least, most in (("num_inference_steps", 1, 10_000), ("width", 0, 2**16), ("height", 0, 2**16)):
        value = given.get(name)
        is_whole = isinstance(value, Integral) and not isinstance(value, bool)
        if value is not None and not (is_whole and least <= value <= most):
            raise ValueError(f"`{name}` is {value!r:.60}; expected a whole number from {least} to {most:,}.")
    for name in ("guidance_scale", "guidance_rescale"):
        value = given.get(name)
        is_number = isinstance(value, Real) and not isinstance(value, bool)
        if value is not None and not (is_number and math.isfinite(value)):
            raise ValueError(f"`{name}` is {value!r:.60}; expected a number, such as 5.")


def argument_names(cls: type, method: str) -> set[str]:
    """The names that a method of a class takes, and those of the methods with this name that it calls by `super()`."""
    signatures = [inspect.signature(getattr(base, method)) for base in cls.__mro__ if method in vars(base)]
    return {
        name
        for signature in signatures
        for name, parameter in signature.parameters.items()
        if name != "self" and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }


def refuse_unknown(method: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Refuse arguments by unknown names.

    Args:
        method: name of the method, for the error.
        given: names of the arguments.
        known: the names that the method takes.

    Raises:
        TypeError: a name is unknown; the message holds the nearest known one, if one is near.

    Examples:
        >>> refuse_unknown("pipe", ["weightin"], ["prompt", "weighting"])
        Traceback (most recent call last):
        TypeError: `weightin` is no argument of pipe: did you mean `weighting`?
    """
    known = sorted(known)
    for name in given:
        if name not in known:
            near = {other: _nearness(name, other) for other in known}
            nearest = max(known, key=lambda other: near[other])
            hint = f"did you mean `{nearest}`?" if near[nearest] > 0.6 else f"help({method}) lists its arguments."
            raise TypeError(f"`{name}` is no argument of {method}: {hint}")


def _nearness(name: str, other: str) -> float:
    """The share of equal letters, and 1 more where the words of a name are words of the other: `steps` is nearer to
    `num_inference_steps` than to `timesteps`."""
    return SequenceMatcher(None, name, other).ratio() + ({*name.split("_")} <= {*other.split("_")})


@contextmanager
def _in_force(pipe: object, options: Mapping[str, Any]) -> Iterator[None]:
    calling, outer = _call.get()
    token = _call.set((pipe, {**outer, **options} if calling is pipe else options))
    try:
        yield
    finally:
        _call.reset(token)
