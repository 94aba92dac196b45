"""Puts the trained parts together: a stock SDXL folder in half precision, and the rest of both CLIPs beside it.

The folder opens in `StableDiffusionXLPipeline.from_pretrained`, with and without `dtype=`.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch
from parts import load_clips, stock_pipeline
from safetensors.torch import save_file

from finelip_sdxl.files import written_folder
from finelip_sdxl.miniature import miniature_path


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flags.add_argument("--runs", type=Path, default=Path("runs/miniature"), help="folder of the trained parts")
    flags.add_argument("--output-dir", type=Path, default=miniature_path(), help="folder of the pipeline; replaced")
    arguments = flags.parse_args()

    clips = [clip.half() for clip in load_clips(arguments.runs)]
    pipe = stock_pipeline(arguments.runs).to(dtype=torch.float16)
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
