"""The miniature's trained parts, put together as SDXL's are."""

from __future__ import annotations

from pathlib import Path

from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from train_unet import NOISE_SCHEDULE
from transformers import CLIPModel

from finelip_sdxl.miniature.tokenizer import build_tokenizer
from finelip_sdxl.text_encoders import TextEncoder, build_text_encoder


def load_clips(runs: Path) -> list[CLIPModel]:
    return [CLIPModel.from_pretrained(runs / f"clip_{pair}") for pair in (1, 2)]


def stock_pipeline(runs: Path) -> StableDiffusionXLPipeline:
    """The parts that a folder of runs holds, in one pipeline."""
    clips = load_clips(runs)
    return StableDiffusionXLPipeline(
        vae=AutoencoderKL.from_pretrained(runs / "vae"),
        text_encoder=text_encoder(clips[0], projection=False),
        text_encoder_2=text_encoder(clips[1], projection=True),
        tokenizer=build_tokenizer(),
        tokenizer_2=build_tokenizer(pad_token="!"),
        unet=UNet2DConditionModel.from_pretrained(runs / "unet"),
        scheduler=EulerDiscreteScheduler(**NOISE_SCHEDULE, timestep_spacing="trailing"),
        add_watermarker=False,
    )


def text_encoder(clip: CLIPModel, projection: bool) -> TextEncoder:
    """The text tower of a CLIP as SDXL has it: the second one keeps its projection."""
    keys = ("text_model.", "text_projection.") if projection else ("text_model.",)
    tensors = {key: tensor for key, tensor in clip.state_dict().items() if key.startswith(keys)}
    return build_text_encoder(clip.config.text_config, tensors)
