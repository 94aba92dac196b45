"""Data sets of images with long captions, and their batches for training."""

from finelip_sdxl.data.augmentation import CaptionAugmentation
from finelip_sdxl.data.caption_dataset import CaptionDataset, UnreadableImageError, split_sentences
from finelip_sdxl.data.formats import open_dataset
from finelip_sdxl.data.preprocessing import load_image_processor, load_tokenizer, tokenize
from finelip_sdxl.data.prompt_sets import Prompt, PromptSet, open_prompts
from finelip_sdxl.data.regions import Region, follow_regions
from finelip_sdxl.data.shards import TrainingShards
from finelip_sdxl.data.training import ImageTextDataset, ResumableBatchSampler, collate

__all__ = [
    "CaptionAugmentation",
    "CaptionDataset",
    "ImageTextDataset",
    "Prompt",
    "PromptSet",
    "Region",
    "ResumableBatchSampler",
    "TrainingShards",
    "UnreadableImageError",
    "collate",
    "follow_regions",
    "load_image_processor",
    "load_tokenizer",
    "open_dataset",
    "open_prompts",
    "split_sentences",
    "tokenize",
]
