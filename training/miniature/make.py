"""Makes the whole miniature SDXL, from nothing to the folder that ships; a run that stopped goes on where it was."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

# In order: both CLIPs and the VAE need only the world, the UNet all three; a FineLIP begins as its CLIP that ships, and
# the adapter aligns the FineLIPs that ship.
STAGES = (
    "train_clip.py --pair 1 --runs {runs}",
    "train_clip.py --pair 2 --runs {runs}",
    "train_vae.py --runs {runs}",
    "train_unet.py --runs {runs}",
    "train_decoder.py --runs {runs}",
    "assemble.py --runs {runs}",
    "../train_finelip.py --base miniature-clip-1 --mixed-precision bf16 --output-dir {runs}/finelip_1",
    "../train_finelip.py --base miniature-clip-2 --mixed-precision bf16 --output-dir {runs}/finelip_2",
    "assemble_finelip.py --runs {runs}",
    "../align_adapter.py --output-dir {runs}/adapter",
    "assemble_adapter.py --runs {runs}",
)


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flags.add_argument("--runs", type=Path, default=Path("runs/miniature"), help="folder of checkpoints")
    arguments = flags.parse_args()
    for stage in STAGES:
        script, *options = stage.split()
        options = [option.format(runs=arguments.runs) for option in options]
        command = [sys.executable, str(Path(__file__).parent / script), *options]
        print(" ".join(command), flush=True)
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
