"""A run of pictures without a pipeline: the miniature's own scenes, right in one column and mixed up in another."""

import json
from pathlib import Path

from finelip_sdxl.comparison import Settings
from finelip_sdxl.data import open_prompts
from finelip_sdxl.data.prompt_sets import PromptSet
from finelip_sdxl.images import save_png
from finelip_sdxl.picture_evaluation.manifest import MANIFEST
from finelip_sdxl.picture_evaluation.plan import PicturePlan

COLUMNS = ("stock", "finelip")


def miniature_run(folder: Path, scenes: int = 5, images_per_prompt: int = 1) -> PicturePlan:
    """The column `finelip` shows each prompt's scene, `stock` that of the next prompt of another family."""
    plan = PicturePlan(open_prompts(f"miniature:{scenes}"), COLUMNS, Settings(""), images_per_prompt)
    far = open_prompts(f"miniature:{2 * scenes + 5}").images
    for place in plan.places():
        shown = place.prompt if place.column == "finelip" else place.prompt + scenes + 5 - scenes % 5
        save_png(far.image(shown), folder / place.file, {"prompt": plan.prompts.prompts[place.prompt].text})
    write_manifest(folder, plan.prompts)
    return plan


def write_manifest(folder: Path, prompts: PromptSet) -> None:
    settings = {"data": prompts.spec, "images_per_prompt": 1, "steps": 1}
    (folder / MANIFEST).write_text(json.dumps({"settings": settings, "columns": list(COLUMNS)}))
