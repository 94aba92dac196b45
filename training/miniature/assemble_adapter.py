"""Puts the trained conditioning adapter into the package, in half precision."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from finelip_sdxl import ConditioningAdapter, miniature_path
from finelip_sdxl.files import written_folder


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flags.add_argument("--runs", type=Path, default=Path("runs/miniature"), help="folder of the trained parts")
    flags.add_argument("--output-dir", type=Path, default=miniature_path().parent, help="folder that gets it")
    arguments = flags.parse_args()
    folder = arguments.output_dir / "conditioning_adapter"
    with written_folder(folder, replaced=os.listdir) as new:
        ConditioningAdapter.from_pretrained(arguments.runs / "adapter" / "last").half().save_pretrained(new)
        config = json.loads((new / "config.json").read_text())
        del config["_name_or_path"]  # where it was trained
        (new / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    size = (folder / "diffusion_pytorch_model.safetensors").stat().st_size
    print(f"{folder}: {size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
