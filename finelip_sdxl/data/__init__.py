"""Images with captions: the data sets of long captions, and what training and evaluation ask of them."""

from finelip_sdxl.data.captioned_images import CaptionedImages, UnreadableImageError, split_sentences

__all__ = ["CaptionedImages", "UnreadableImageError", "split_sentences"]
