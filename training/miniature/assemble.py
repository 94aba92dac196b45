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
from parts import load_clips, stock_pipeline
from safetensors.torch import save_file

from finelip_sdxl.files import written_folder
from finelip_sdxl.recommended import Recommended, record_recommended


def main() -> None:
    arguments = parse()

    clips = [clip.half() for clip in load_clips(arguments.runs)]
    pipe = stock_pipeline(arguments.runs).to(dtype=torch.float16)
    record_recommended(pipe, Recommended(steps=20, guidance_scale=5.0))
    with written_folder(arguments.output_dir, replaced=os.listdir) as new:
        pipe.save_pretrained(new)
        # Without dtype= a text encoder takes its dtype from its config, and everything else loads as float32.
        for name in ("text_encoder", "text_encoder_2"):
            path = new / name / "config.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), "dtype": "float32"}, indent=2) + "\n")
        for name in ("unet", "vae"):
            path = new / name / "config.json"
            config = json.loads(path.read_text())
            del config["_name_or_path"]  # where it was trained
            path.write_text(json.dumps(config, indent=2) + "\n")

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
