"""Custom nodes for ComfyUI: text encoders of 248 positions, prompts of any length, and the miniature.

Link this folder into ComfyUI's `custom_nodes`. The nodes use the package `finelip_sdxl`, which must be installed in
ComfyUI's Python.
"""

import logging
from importlib.util import find_spec

if find_spec("finelip_sdxl") is None:
    # ComfyUI says of a folder without mappings that its import failed, and prints no traceback.
    logging.getLogger(__name__).error(
        "FineLIP-SDXL's nodes need its package in ComfyUI's Python: run `pip install FOLDER` with the folder of its"
        " repository, and start ComfyUI again."
    )
else:
    from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

    __all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
