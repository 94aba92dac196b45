"""Align text encoders with SDXL's UNet by a LoRA, export the result, and draw with it in stock Diffusers.

    python examples/align_and_export.py --out runs/aligned
    python examples/align_and_export.py --base SDXL --finelip CLIP --captions sharegpt4v:captions.json --steps 2000

Without flags it takes a few steps with the miniature, on a CPU.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline

RECIPE = Path(__file__).parents[1] / "training" / "align_adapter.py"


def main(arguments: list[str] | None = None) -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--base", default="miniature", help="hub id or folder of an SDXL (default: miniature)")
    flags.add_argument("--finelip", help="FineLIP or Long-CLIP in place of the first encoder (default: stretched)")
    flags.add_argument("--captions", default="miniature:8", help="images with captions (default: %(default)s)")
    flags.add_argument("--steps", type=int, default=2, help="steps of each stage (default: %(default)s)")
    flags.add_argument("--batch-size", type=int, default=4, help="captions in a step (default: %(default)s)")
    flags.add_argument("--out", type=Path, default=Path("runs/aligned"), help="folder of run and result")
    options = flags.parse_args(arguments)
    run, plain = options.out / "run", options.out / "plain-sdxl"

    command = [sys.executable, str(RECIPE), "--method", "lora", "--base", options.base, "--captions", options.captions]
    command += ["--text-steps", str(options.steps), "--image-steps", str(options.steps), "--validate-every", "0"]
    command += ["--batch-size", str(options.batch_size), "--output-dir", str(run)]
    command += ["--finelip", options.finelip] if options.finelip else []
    subprocess.run(command, check=True)

    encoders = ["--finelip", str(run / "last" / "text_encoder"), "--finelip-2", str(run / "last" / "text_encoder_2")]
    export = [sys.executable, "-m", "finelip_sdxl.cli.main", "export", options.base, str(plain), "--overwrite"]
    subprocess.run([*export, *encoders], check=True)

    pipe = StableDiffusionXLPipeline.from_pretrained(plain)  # stock Diffusers: this package is not needed any more
    print(f"{plain}: {pipe.tokenizer.model_max_length} tokens")
    prompt = Path(__file__).with_name("long_prompt.txt").read_text(encoding="utf-8").strip()
    generator = torch.Generator().manual_seed(0)
    pipe(prompt=prompt, num_inference_steps=4, generator=generator).images[0].save(options.out / "picture.png")
    print(options.out / "picture.png")


if __name__ == "__main__":
    main()
