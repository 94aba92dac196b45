"""Images with captions: the data sets of long captions, and what training and evaluation ask of them."""

from finelip_sdxl.data.augmentation import CaptionAugmentation
from finelip_sdxl.data.captioned_images import CaptionedImages, UnreadableImageError, split_sentences
from finelip_sdxl.data.formats import open_images
from finelip_sdxl.data.preprocessing import load_image_processor, load_tokenizer, tokenize
from finelip_sdxl.data.regions import Region, follow_regions
from finelip_sdxl.data.shards import TrainingShards
from finelip_sdxl.data.training import EpochBatches, TrainingPairs, collate

__all__ = [
    "CaptionAugmentation",
    "CaptionedImages",
    "EpochBatches",
    "Region",
    "TrainingPairs",
    "TrainingShards",
    "UnreadableImageError",
    "collate",
    "follow_regions",
    "load_image_processor",
    "load_tokenizer",
    "open_images",
    "split_sentences",
    "tokenize",
]
