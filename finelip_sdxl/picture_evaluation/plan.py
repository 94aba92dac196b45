"""The plan of a run: which pictures are drawn, from which settings, to which files. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from finelip_sdxl.comparison.settings import MAX_SEED, Settings

if TYPE_CHECKING:
    from finelip_sdxl.data.prompt_sets import PromptSet

PICTURES = "pictures"  # the folder of pictures in that of a run


class Place(NamedTuple):
    """A picture's column, the index of its prompt, and its number among the prompt's pictures, from 0."""

    column: str
    prompt: int
    number: int

    @property
    def file(self) -> str:
        """The picture's file in the folder of a run."""
        return f"{PICTURES}/{self.column}/{self.prompt:05}_{self.number:02}.png"


@dataclass(frozen=True)
class PicturePlan:
    """Prompts, columns and settings of pictures.

    Attributes:
        prompts: the prompts.
        columns: keys of `COLUMNS`.
        settings: settings of all pictures. Its seed is the first one; its prompt does not count.
        images_per_prompt: pictures of each prompt in each column, each from a seed of its own.

    Raises:
        ValueError: a prompt is too long, or the last seed would be too large.
    """

    prompts: PromptSet
    columns: Sequence[str]
    settings: Settings
    images_per_prompt: int = 1

    def __post_init__(self) -> None:
        last = self.settings.seed + len(self.prompts.prompts) * self.images_per_prompt - 1
        if last > MAX_SEED:
            raise ValueError(f"`seed` is {self.settings.seed}; the last picture's would be {last}, past {MAX_SEED}.")
        for index, prompt in enumerate(self.prompts.prompts):
            try:
                replace(self.settings, prompt=prompt.text)
            except (ValueError, TypeError) as error:
                raise ValueError(f"Prompt {index + 1} of {self.prompts.spec} cannot be drawn: {error}") from error

    def places(self) -> Iterator[Place]:
        """All pictures: prompt by prompt, so that a stopped run has all columns of the first prompts."""
        for prompt in range(len(self.prompts.prompts)):
            for column in self.columns:
                for number in range(self.images_per_prompt):
                    yield Place(column, prompt, number)

    def settings_of(self, place: Place) -> Settings:
        """The settings of one picture. All columns of a prompt have the same seeds, and no two prompts share one."""
        seed = self.settings.seed + place.prompt * self.images_per_prompt + place.number
        return replace(self.settings, prompt=self.prompts.prompts[place.prompt].text, seed=seed)

    def files_of(self, folder: Path, column: str, prompt: int) -> list[Path]:
        """The files of a prompt's pictures in one column."""
        return [folder / Place(column, prompt, number).file for number in range(self.images_per_prompt)]
