"""Makes the whole miniature SDXL, from nothing to the folder that ships; a run that stopped goes on where it was."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

# In order: both CLIPs and the VAE need only the world, the UNet needs all three.
STAGES = (
    ("train_clip.py", "--pair", "1"),
    ("train_clip.py", "--pair", "2"),
    ("train_vae.py",),
    ("train_unet.py",),
    ("assemble.py",),
)


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flags.add_argument("--runs", type=Path, default=Path("runs/miniature"), help="folder of checkpoints")
    arguments = flags.parse_args()
    for script, *options in STAGES:
        command = [sys.executable, str(Path(__file__).parent / script), *options, "--runs", str(arguments.runs)]
        print(" ".join(command), flush=True)
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
