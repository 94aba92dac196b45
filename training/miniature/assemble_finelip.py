"""Puts the two trained FineLIPs into the package, in half precision."""

# ruff: noqa: E402  (flags are parsed before the imports that take seconds)

from __future__ import annotations

import json
import os
from functools import partial

from assembling import parse as parse_flags

from finelip_sdxl.miniature import miniature_path

parse = partial(
    parse_flags,
    __doc__,
    ("finelip_1/last", "finelip_2/last"),
    miniature_path().parent,
    "folder that gets finelip_1 and finelip_2",
)

if __name__ == "__main__":  # wrong flags are refused before the imports that take seconds
    parse()

from finelip_sdxl import load_finelip
from finelip_sdxl.files import written_folder


def main() -> None:
    arguments = parse()
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
