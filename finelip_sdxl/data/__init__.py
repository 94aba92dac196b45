"""Images with captions: the data sets of long captions, and what training and evaluation ask of them."""

from finelip_sdxl.data.captioned_images import CaptionedImages, UnreadableImageError, split_sentences
from finelip_sdxl.data.formats import open_images
from finelip_sdxl.data.preprocessing import load_image_processor, load_tokenizer, tokenize

__all__ = [
    "CaptionedImages",
    "UnreadableImageError",
    "load_image_processor",
    "load_tokenizer",
    "open_images",
    "split_sentences",
    "tokenize",
]
