"""Puts the two trained FineLIPs into the package, in half precision."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from finelip_sdxl import load_finelip, miniature_path
from finelip_sdxl.files import written_folder


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flags.add_argument("--runs", type=Path, default=Path("runs/miniature"), help="folder of the trained parts")
    flags.add_argument(
        "--output-dir", type=Path, default=miniature_path().parent, help="folder that gets finelip_1 and _2"
    )
    arguments = flags.parse_args()
    for pair in (1, 2):
        folder = arguments.output_dir / f"finelip_{pair}"
        with written_folder(folder, replaced=os.listdir) as new:
            load_finelip(arguments.runs / f"finelip_{pair}" / "last").half().save_pretrained(new)
            config = json.loads((new / "config.json").read_text())
            for part in (config, config["text_config"], config["vision_config"]):
                part["dtype"] = "float32"  # the default for who loads it without a dtype
                part.pop("made_from", None)
            (new / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        print(f"{folder}: {(folder / 'model.safetensors').stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
