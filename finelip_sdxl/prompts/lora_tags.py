"""LoRAs that a prompt names as A1111 does, `<lora:name:0.8>`: they are loaded or left out, and never encoded."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches
from math import isfinite
from pathlib import Path

_TAG = re.compile(r"<lora:[^<>]*>", re.IGNORECASE)


@dataclass(frozen=True)
class LoraTag:
    """A LoRA in a prompt.

    Attributes:
        text: the tag as it stands in the prompt.
    """

    text: str

    @property
    def name(self) -> str:
        return self._parts[0].strip()

    @property
    def scale(self) -> float:
        """Its scale; 1 where the tag has none.

        Raises:
            ValueError: the tag has no name, or something other than one number behind it.
        """
        _, *rest = self._parts
        try:
            scale = float(rest[0]) if rest else 1.0
        except ValueError:
            scale = float("nan")
        if not self.name or len(rest) > 1 or not isfinite(scale):
            raise ValueError(f"{self.text:.60} is no LoRA: expected <lora:name> or <lora:name:scale>, such as 0.8.")
        return scale

    @property
    def _parts(self) -> list[str]:
        return self.text[1:-1].split(":")[1:]

    def __str__(self) -> str:
        return self.text


def take_loras(text: str) -> tuple[str, tuple[LoraTag, ...]]:
    """A prompt without its LoRAs, and these.

    Examples:
        >>> text, (lora,) = take_loras("a fox <lora:ink style:0.8> in the snow")
        >>> text, lora.name, lora.scale
        ('a fox  in the snow', 'ink style', 0.8)
    """
    return _TAG.sub("", text), tuple(LoraTag(found) for found in _TAG.findall(text))


def find_loras(tags: list[LoraTag], folder: Path) -> dict[Path, float]:
    """The files of LoRAs, found by their names in a folder and the folders in it, and their scales.

    A LoRA that is named twice has the last of its scales, as in A1111.

    Raises:
        ValueError: a tag has no name or no scale that is a number; or no file, or two, have the name.

    Examples:
        >>> find_loras([], Path("."))
        {}
    """
    files: dict[str, list[Path]] = {}
    for file in sorted(folder.rglob("*.safetensors")):
        files.setdefault(file.stem, []).append(file)
    scales: dict[Path, float] = {}
    for tag in tags:
        scale, found = tag.scale, files.get(tag.name, [])
        if len(found) > 1:
            raise ValueError(f"{tag} is the name of {found[0]} and of {found[1]}: rename one of them.")
        if not found:
            near = get_close_matches(tag.name, files, 1)
            hint = f"did you mean {near[0]}?" if near else "its .safetensors file has to be there."
            raise ValueError(f"{tag} names no LoRA in {folder}: {hint}")
        scales[found[0]] = scale
    return scales
