"""A tiny SDXL with random weights: its tokenizers, text encoders and UNet; and tiny sizes for code of SDXL's sizes."""

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, PreTrainedModel

from finelip_sdxl import sdxl_sizes

WORDS = ["a", "the", "red", "blue", "square", "fox", "hare", "above", "of", "and", "in", "quiet", "small", "large"]

_ENCODER = {"num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
# Sizes in place of those of `finelip_sdxl.sdxl_sizes`.
CLIP_L, BIG_G = {**_ENCODER, "hidden_size": 16}, {**_ENCODER, "hidden_size": 24, "projection_dim": 24}
UNET = {
    **sdxl_sizes.UNET,
    "block_out_channels": (32, 64, 64),
    "transformer_layers_per_block": 1,
    "attention_head_dim": (2, 4, 4),
    "cross_attention_dim": 40,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 24 + 6 * 8,
}


def make_tokenizer(model_max_length: int = 77, pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """A CLIP tokenizer that knows `WORDS` and spells everything else byte by byte."""
    symbols = sorted(ByteLevel.alphabet())
    tokens = symbols + [symbol + "</w>" for symbol in symbols]
    merges = []
    for word in WORDS:
        left = word[0]
        for place, letter in enumerate(word[1:], start=2):
            right = letter + "</w>" if place == len(word) else letter
            if (left, right) not in merges:
                merges.append((left, right))
                tokens.append(left + right)
            left += right
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=model_max_length, pad_token=pad_token)


def make_text_encoder(
    hidden_size: int, projection_dim: int | None = None, positions: int = 77, seed: int = 0
) -> PreTrainedModel:
    """A text encoder of three layers; with `projection_dim` one that also gives a pooled vector."""
    tokenizer = make_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=positions,
        projection_dim=projection_dim or hidden_size,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_factor=20.0,  # else random embeddings are so small that all texts look alike
    )
    torch.manual_seed(seed)
    if projection_dim:
        return CLIPTextModelWithProjection(config).eval()
    # As loaded from a hub's file, whose keys begin with `text_model.`.
    weights = {f"text_model.{key}": value for key, value in CLIPTextModel(config).state_dict().items()}
    return CLIPTextModel.from_pretrained(None, config=config, state_dict=weights).eval()


def make_text_encoders() -> dict[str, PreTrainedModel]:
    """Both text encoders of the tiny SDXL."""
    return {
        "text_encoder": make_text_encoder(32, seed=1),
        "text_encoder_2": make_text_encoder(48, projection_dim=24, seed=2),
    }


def make_unet(**changes: Any) -> UNet2DConditionModel:
    """The tiny UNet, with changes of its config."""
    config = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (2, 4),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "transformer_layers_per_block": 1,
        "projection_class_embeddings_input_dim": 6 * 8 + 24,
        "cross_attention_dim": 32 + 48,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**{**config, **changes}).eval()
