"""Puts the trained conditioning adapter into the package, in half precision."""

# ruff: noqa: E402  (flags are parsed before the imports that take seconds)

from __future__ import annotations

import json
import os
from functools import partial

from assembling import parse as parse_flags

from finelip_sdxl.miniature import miniature_path

parse = partial(
    parse_flags, __doc__, ("adapter/last",), miniature_path().parent, "folder that gets conditioning_adapter"
)

if __name__ == "__main__":  # wrong flags are refused before the imports that take seconds
    parse()

from finelip_sdxl import ConditioningAdapter
from finelip_sdxl.files import written_folder


def main() -> None:
    arguments = parse()
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
