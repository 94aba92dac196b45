"""Choose the scorer's `CLEAN_ERROR`, the highest error of an object that looks drawn, on round trips through the VAE.

    python benchmarks/miniature_clean.py

Prints a table of errors (`finelip_sdxl.miniature.scoring.drawing_errors`) of objects of unseen scenes: as drawn,
through the VAE and back, after a Gaussian blur, and as mixtures with an object of another shape and color. Its last
column shows how much of each is clean with the threshold in the last line: the largest error of the round trips, so
that every object is clean whose latents are perfect; or, where 99 in 100 objects with a blur of 2 pixels have no larger
error, the lower threshold that keeps these out.
"""

from __future__ import annotations

import argparse
import math

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image, ImageFilter

from finelip_sdxl.miniature import miniature_path
from finelip_sdxl.miniature.drawing import draw_batch, draw_scene
from finelip_sdxl.miniature.scoring import CLEAN_ERROR, drawing_errors
from finelip_sdxl.miniature.world import Scene, make_scene
from finelip_sdxl.report import report_header

TRIPS = "through the VAE"
BLURRED = {f"blurred, sigma {blur} px": blur for blur in (1, 2, 3, 4)}  # standard deviation in pixels
SMEARED = "blurred, sigma 2 px"  # from here on, objects look smeared
MIXTURES = (0.25, 0.35, 0.5)  # share of the other object


def find_errors(pipe: StableDiffusionXLPipeline, scenes: list[Scene]) -> dict[str, np.ndarray]:
    """The errors of all objects by what was done to them, each flat."""
    drawn = [draw_scene(scene) for scene in scenes]
    errors = {"drawn": errors_of(drawn), TRIPS: errors_of(round_trips(pipe, scenes))}
    for name, blur in BLURRED.items():
        errors[name] = errors_of([image.filter(ImageFilter.GaussianBlur(blur)) for image in drawn])
    return errors | {f"mixed, {share:.0%} of another": errors_of_mixtures(scenes, share) for share in MIXTURES}


def choose_threshold(errors: dict[str, np.ndarray]) -> float:
    return min(math.ceil(100 * errors[TRIPS].max()), math.floor(100 * np.percentile(errors[SMEARED], 1))) / 100


@torch.no_grad()
def round_trips(pipe: StableDiffusionXLPipeline, scenes: list[Scene]) -> list[Image.Image]:
    decoded = [image for batch in draw_batch(scenes).split(10) for image in pipe.vae(batch).sample]
    return pipe.image_processor.postprocess(torch.stack(decoded))


def errors_of(images: list[Image.Image]) -> np.ndarray:
    """The errors of all objects, flat."""
    return np.concatenate([drawing_errors(image) for image in images])


def errors_of_mixtures(scenes: list[Scene], share: float) -> np.ndarray:
    """The errors where two objects were mixed that differ in shape and color, flat."""
    errors = []
    for scene, other in zip(scenes, [*scenes[1:], scenes[0]], strict=True):
        other = Scene(other.objects, scene.background)
        pairs = zip(scene.objects, other.objects, strict=True)
        differ = [one.shape != two.shape and one.color != two.color for one, two in pairs]
        errors.append(drawing_errors(Image.blend(draw_scene(scene), draw_scene(other), share))[differ])
    return np.concatenate(errors)


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--scenes", type=int, default=200, metavar="N", help="number of scenes (default: %(default)s)")
    arguments = flags.parse_args()
    pipe = StableDiffusionXLPipeline.from_pretrained(miniature_path())
    errors = find_errors(pipe, [make_scene(f"unseen-{k}") for k in range(arguments.scenes)])
    threshold = choose_threshold(errors)
    print(f"{report_header()}; {arguments.scenes} scenes; CLEAN_ERROR is {CLEAN_ERROR} now", end="\n\n")
    print(f"| objects | 1st percentile | median | 95th | 99th | largest | at most {threshold}, % |")
    print("|---" * 7 + "|")
    for name, found in errors.items():
        # Nearest: the error of an object that is not to be seen is infinite.
        percentiles = np.percentile(found, (1, 50, 95, 99, 100), method="nearest")
        cells = [f"{value:.2f}" for value in percentiles] + [f"{100 * np.mean(found <= threshold):.1f}"]
        print(f"| {name} |", " | ".join(cells), "|")
    print(f"\nCLEAN_ERROR = {threshold}")


if __name__ == "__main__":
    main()
