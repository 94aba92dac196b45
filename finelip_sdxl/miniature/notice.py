"""Sentences for people who draw with the miniature: what draws, and what it does not know of a prompt."""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING

from finelip_sdxl.prompts.plan import tokenize
from finelip_sdxl.prompts.vocabulary import clip_tokenizer

from .parsing import foreign_words, is_of_world
from .tokenizer import build_tokenizer
from .world import SHAPES

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

REAL_SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
_SHOWN = 5  # words of a prompt in a notice

DRAWS = "The miniature draws: a small SDXL that comes with the package and knows scenes of nine simple objects."


def notice(prompt: str, choose: str) -> list[str]:
    """One line that the miniature draws and, for a prompt that is not of its world, another that says so.

    Args:
        prompt: the text.
        choose: the way to a real SDXL, such as a flag with its value.

    Examples:
        >>> notice("A red star is in the top left.", "--base some/sdxl") == [DRAWS]
        True
        >>> notice("a cat on a sofa", "--base some/sdxl")[1][:61]
        'The miniature knows no object of this prompt ("cat", "sofa"),'
    """
    return [DRAWS, *([] if is_of_world(prompt) else [unknown(prompt, choose)])]


def unknown(prompt: str, choose: str) -> str:
    """The sentence for a prompt that is not of the miniature's world; arguments as in `notice`."""
    words = list(dict.fromkeys(foreign_words(prompt)))
    named = re.search(rf"\b({'|'.join(SHAPES)})\b", prompt, re.IGNORECASE)
    listed = ", ".join(f'"{word}"' for word in words[:_SHOWN]) + (", …" if len(words) > _SHOWN else "")
    own, real = (len(tokenize(tokenizer, prompt)[0]) + 2 for tokenizer in _tokenizers())
    listed = f" ({listed})" if words else ""
    return (
        f"The miniature knows {'not all' if named else 'no object'} of this prompt{listed}, and"
        f" spells it in {own:,} tokens where a real SDXL counts {real:,}. To draw it with one: {choose}"
    )


@cache
def _tokenizers() -> tuple[CLIPTokenizer, CLIPTokenizer]:
    return build_tokenizer(), clip_tokenizer()
