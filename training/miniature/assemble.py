"""Puts the trained parts together: a stock SDXL folder in half precision, and the rest of both CLIPs beside it.

The folder opens in `StableDiffusionXLPipeline.from_pretrained`, with and without `dtype=`.
"""

# ruff: noqa: E402  (flags are parsed before the imports that take seconds)

from __future__ import annotations

import json
import os
from functools import partial

from assembling import parse as parse_flags

from finelip_sdxl.miniature import miniature_path

parse = partial(
    parse_flags, __doc__, ("clip_1", "clip_2", "vae", "unet"), miniature_path(), "folder of the pipeline; replaced"
)

if __name__ == "__main__":  # wrong flags are refused before the imports that take seconds
    parse()

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from train_unet import NOISE_SCHEDULE
from transformers import CLIPModel

from finelip_sdxl.files import written_folder
from finelip_sdxl.miniature.tokenizer import build_tokenizer
from finelip_sdxl.recommended import Recommended, record_recommended
from finelip_sdxl.text_encoders import TextEncoder, build_text_encoder


def text_encoder(clip: CLIPModel, projection: bool) -> TextEncoder:
    """The text tower of a CLIP as SDXL has it: the second one keeps its projection."""
    keys = ("text_model.", "text_projection.") if projection else ("text_model.",)
    tensors = {key: tensor for key, tensor in clip.state_dict().items() if key.startswith(keys)}
    return build_text_encoder(clip.config.text_config, tensors)


def main() -> None:
    arguments = parse()

    clips = [CLIPModel.from_pretrained(arguments.runs / f"clip_{pair}").half() for pair in (1, 2)]
    pipe = StableDiffusionXLPipeline(
        vae=AutoencoderKL.from_pretrained(arguments.runs / "vae").half(),
        text_encoder=text_encoder(clips[0], projection=False),
        text_encoder_2=text_encoder(clips[1], projection=True),
        tokenizer=build_tokenizer(),
        tokenizer_2=build_tokenizer(pad_token="!"),
        unet=UNet2DConditionModel.from_pretrained(arguments.runs / "unet").half(),
        scheduler=EulerDiscreteScheduler(**NOISE_SCHEDULE, timestep_spacing="trailing"),
        add_watermarker=False,
    )
    record_recommended(pipe, Recommended(steps=20, guidance_scale=3.0))
    with written_folder(arguments.output_dir, replaced=os.listdir) as new:
        pipe.save_pretrained(new)
        # Without dtype= a text encoder takes its dtype from its config, and everything else loads as float32.
        for name in ("text_encoder", "text_encoder_2"):
            path = new / name / "config.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), "dtype": "float32"}, indent=2) + "\n")

    rest = arguments.output_dir.parent / "clips"
    rest.mkdir(exist_ok=True)
    for pair, clip in enumerate(clips, start=1):
        # The second text projection is in the pipeline's folder already.
        keys = ("vision_model.", "visual_projection.", "logit_scale", *(("text_projection.",) if pair == 1 else ()))
        tensors = {key: tensor.contiguous() for key, tensor in clip.state_dict().items() if key.startswith(keys)}
        save_file(tensors, rest / f"clip_{pair}.safetensors", metadata={"format": "pt"})
        (rest / f"clip_{pair}.json").write_text(clip.config.to_json_string())
    size = sum(path.stat().st_size for path in arguments.output_dir.parent.glob("**/*.safetensors"))
    print(f"{arguments.output_dir}: {size / 2**20:.1f} MiB of weights")


if __name__ == "__main__":
    with torch.no_grad():
        main()
