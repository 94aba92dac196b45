"""The miniature's tokenizer: CLIP's byte-pair encoding, trained on the words of captions.

Every word of a caption is one token. Any other text has tokens too, at worst one for each byte.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from finelip_sdxl.prompts import vocabulary

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

MERGES = Path(__file__).parent / "merges.txt"  # written by training/miniature/train_tokenizer.py


def build_tokenizer(pad_token: str = vocabulary.END, max_length: int = 77) -> CLIPTokenizer:
    """A `CLIPTokenizer` for the miniature, in CLIP's layout; see `finelip_sdxl.prompts.vocabulary`.

    SDXL's second tokenizer pads with `"!"`, its first with the end token.
    """
    merges = MERGES.read_text(encoding="utf-8").splitlines()
    return vocabulary.build_tokenizer(merges, pad_token, max_length)
