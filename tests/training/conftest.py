"""A tiny SDXL for the tests of recipes that read the miniature's words."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from finelip_sdxl.data import load_tokenizer
from finelip_sdxl.text_encoders import build_text_encoder, text_encoder_tensors


def make_encoder(width: int, projection_dim: int | None = None, seed: int = 0) -> CLIPTextModel:
    """A text encoder of three layers and 77 positions that knows the miniature's words."""
    tokenizer = load_tokenizer("miniature-clip-1", 77)
    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=2,
        projection_dim=projection_dim or width,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_factor=3.0,
    )
    torch.manual_seed(seed)
    model = CLIPTextModelWithProjection(config) if projection_dim else CLIPTextModel(config)
    return build_text_encoder(config, text_encoder_tensors(model))


@pytest.fixture(scope="session")
def base(session_components, tmp_path_factory) -> Path:
    """A tiny SDXL with random weights that knows the miniature's words."""
    folder = tmp_path_factory.mktemp("base") / "sdxl"
    own = {
        "text_encoder": make_encoder(32, seed=1),
        "text_encoder_2": make_encoder(48, projection_dim=24, seed=2),
        "tokenizer": load_tokenizer("miniature-clip-1", 77),
        "tokenizer_2": load_tokenizer("miniature-clip-2", 77),
    }
    StableDiffusionXLPipeline(**{**session_components, **own}).save_pretrained(folder)
    return folder
