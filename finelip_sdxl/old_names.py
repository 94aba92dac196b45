"""Option names and values in folders saved before version 0.1, and their names and values today."""

from collections.abc import Mapping
from typing import Any

# Old name: the name today, and the values that changed, old to new.
_RENAMED: dict[str, tuple[str, dict[str, str]]] = {
    "short_prompt": ("short_prompt_encoder", {"stock": "original", "stretched": "long"}),
    "long_prompt": ("overflow", {}),
    "hidden_states": ("hidden_states", {"published": "last"}),
}


def with_new_names(index: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a `model_index.json`, with today's option names and values.

    Examples:
        >>> with_new_names({"short_prompt": "stretched", "long_prompt": "truncate", "hidden_states": "penultimate"})
        {'short_prompt_encoder': 'long', 'overflow': 'truncate', 'hidden_states': 'penultimate'}
    """
    translated = {}
    for name, value in index.items():
        new_name, new_values = _RENAMED.get(name, (name, {}))
        translated[new_name] = new_values.get(value, value) if isinstance(value, str) else value
    return translated
