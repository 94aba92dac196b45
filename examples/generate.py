"""Draw a long prompt, and say how it is encoded: the whole library in twenty lines.

    python examples/generate.py --out picture.png
    python examples/generate.py --base stabilityai/stable-diffusion-xl-base-1.0 --prompt-file my_prompt.txt

Without flags it draws with the miniature, on a CPU. A real SDXL wants a GPU.
"""

import argparse
from pathlib import Path

import torch

from finelip_sdxl import FineLIPSDXLPipeline

PROMPT = Path(__file__).with_name("long_prompt.txt")


def main(arguments: list[str] | None = None) -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--base", default="miniature", help="hub id or folder of an SDXL (default: miniature)")
    flags.add_argument("--finelip", help="FineLIP or Long-CLIP in place of CLIP-L (default: stretched)")
    flags.add_argument("--prompt-file", type=Path, default=PROMPT, help="text file with the prompt")
    flags.add_argument("--steps", type=int, help="denoising steps (default: the model's own)")
    flags.add_argument("--out", default="picture.png", help="file to write")
    options = flags.parse_args(arguments)

    on_gpu = torch.cuda.is_available()
    pipe = FineLIPSDXLPipeline.from_pretrained(
        options.base,
        finelip=options.finelip,
        dtype=torch.float16 if on_gpu else torch.float32,
    ).to("cuda" if on_gpu else "cpu")

    prompt = options.prompt_file.read_text(encoding="utf-8").strip()
    print(pipe.describe_prompt(prompt))  # the windows, and what is cut: nothing
    generator = torch.Generator().manual_seed(0)
    image = pipe(prompt=prompt, num_inference_steps=options.steps, generator=generator).images[0]
    image.save(options.out)
    print(options.out)


if __name__ == "__main__":
    main()
