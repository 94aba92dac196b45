"""Quality of the miniature's single parts, on unseen scenes.

    python benchmarks/miniature_parts.py

Prints the seconds of one picture, and two tables: the scorer's results on clean renderings and on renderings after the
VAE, with the width of their edges, and the results of a linear probe of each text encoder's penultimate states at the
ends of the sentences about objects, in short captions.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionXLPipeline

from finelip_sdxl.miniature import miniature_path
from finelip_sdxl.miniature.captions import short_caption
from finelip_sdxl.miniature.drawing import CELL_SIZE, draw_batch, draw_scene
from finelip_sdxl.miniature.scoring import score_picture
from finelip_sdxl.miniature.world import ATTRIBUTES, BACKGROUNDS, COLORS, PLACES, Scene, make_scene
from finelip_sdxl.report import report_header

ANSWERS = {name: ATTRIBUTES[name] for name in ("place", "shape", "color")}  # the size is not always said


def score_renderings(pipe: StableDiffusionXLPipeline, scenes: list[Scene]) -> None:
    decoded = [image for batch in draw_batch(scenes).split(25) for image in pipe.vae(batch).sample]
    pictures = {
        "clean": [draw_scene(scene) for scene in scenes],
        "through the VAE": pipe.image_processor.postprocess(torch.stack(decoded)),
    }
    drawn = [np.asarray(image, dtype=np.float32) / 255 for image in pictures["clean"]]
    print("\n| renderings | shape, color and place right, % | size too, % | clean, % | edges, px | PSNR, dB |")
    print("|---|---|---|---|---|---|")
    for name, images in pictures.items():
        pairs = zip(images, scenes, strict=True)
        scores = [score for image, scene in pairs for score in score_picture(image, scene)]
        right = 100 * np.mean([score.right for score in scores])
        all_right = 100 * np.mean([score.right and score.size for score in scores])
        clean = 100 * np.mean([score.clean for score in scores])
        pixels = [np.asarray(image, dtype=np.float32) / 255 for image in images]
        width = np.mean([edge_width(p, scene) for p, scene in zip(pixels, scenes, strict=True)])
        error = np.mean([np.square(p - d).mean() for p, d in zip(pixels, drawn, strict=True)])
        psnr = "–" if name == "clean" else f"{-10 * np.log10(error):.1f}"
        print(f"| {name} | {right:.2f} | {all_right:.2f} | {clean:.2f} | {width:.2f} | {psnr} |")


def edge_width(pixels: np.ndarray, scene: Scene) -> float:
    """The mean width in pixels of the edges of a scene's objects, in a picture of it, (192, 192, 3) from 0 to 1.

    Each pixel is placed between background, 0, and the color of its cell's object, 1. On a ramp from 0 to 1 of width w
    along an edge of length l, `x · (1 - x)` sums up to `w · l / 6`, and the slope to `l`.
    """
    between, slope = 0.0, 0.0
    for thing in scene.objects:
        row, column = divmod(PLACES.index(thing.place), 3)
        cell = pixels[row * CELL_SIZE : (row + 1) * CELL_SIZE, column * CELL_SIZE : (column + 1) * CELL_SIZE]
        background = np.array(BACKGROUNDS[scene.background], dtype=np.float32) / 255
        axis = np.array(COLORS[thing.color], dtype=np.float32) / 255 - background
        x = ((cell - background) @ axis / (axis @ axis)).clip(0, 1)
        between += float((x * (1 - x)).sum())
        slope += float(np.hypot(np.diff(x, axis=0)[:, :-1], np.diff(x, axis=1)[:-1]).sum())
    return 6 * between / slope


def states_and_labels(
    encoder: torch.nn.Module, tokenizer, names: list[str]
) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Penultimate states at sentence ends (mentions, dim), their labels, and which are plain and which hard links."""
    scenes = [make_scene(name) for name in names]
    captions = [short_caption(scene, name) for scene, name in zip(scenes, names, strict=True)]
    encoding = tokenizer([caption.text for caption in captions], padding="max_length", return_tensors="pt")
    states = torch.cat(
        [encoder(ids, output_hidden_states=True).hidden_states[-2] for ids in encoding.input_ids.split(100)]
    )
    mentions = [(row, mention) for row, caption in enumerate(captions) for mention in caption.described]
    at = torch.stack([states[row, encoding.char_to_token(row, mention.end - 1)] for row, mention in mentions])
    things = [scenes[row].objects[mention.index] for row, mention in mentions]
    labels = {
        name: torch.tensor([values.index(getattr(thing, name)) for thing in things]) for name, values in ANSWERS.items()
    }
    plain = torch.tensor([mention.kind == "plain" for _, mention in mentions])
    hard = torch.tensor([mention.kind == "linked" and mention.candidates >= 2 for _, mention in mentions])
    return at, labels, plain, hard


def fit_probe(states: torch.Tensor, labels: torch.Tensor, classes: int) -> torch.nn.Linear:
    """Multinomial logistic regression with a little weight decay, from zero: the same states lead to the same probe."""
    with torch.enable_grad():
        probe = torch.nn.Linear(states.shape[1], classes)
        for parameter in probe.parameters():
            torch.nn.init.zeros_(parameter)
        optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=200, line_search_fn="strong_wolfe")

        def loss() -> torch.Tensor:
            optimizer.zero_grad()
            value = F.cross_entropy(probe(states), labels) + 1e-4 * probe.weight.pow(2).sum()
            value.backward()
            return value

        optimizer.step(loss)
    return probe


def probe_encoders(pipe: StableDiffusionXLPipeline, count: int) -> None:
    print("\nRight in percent; a hard link has two or more candidates.\n")
    print("| text encoder | plain: place | plain: shape | plain: color | hard links: color |")
    print("|---|---|---|---|---|")
    for name, tokenizer in (("text_encoder", pipe.tokenizer), ("text_encoder_2", pipe.tokenizer_2)):
        encoder = getattr(pipe, name)
        seen, seen_labels, *_ = states_and_labels(encoder, tokenizer, [f"train-{k}" for k in range(4 * count)])
        states, labels, plain, hard = states_and_labels(encoder, tokenizer, [f"unseen-{k}" for k in range(count)])
        scale = seen.std(dim=0)
        cells = []
        for attribute, values in ANSWERS.items():
            probe = fit_probe(seen / scale, seen_labels[attribute], len(values))
            right = probe(states / scale).argmax(dim=-1) == labels[attribute]
            cells.append(right[plain])
        cells.append(right[hard])  # the last attribute is the color
        print(f"| {name} |", " | ".join(f"{100 * cell.float().mean():.2f} of {len(cell)}" for cell in cells), "|")


def time_picture(pipe: StableDiffusionXLPipeline) -> None:
    pipe.set_progress_bar_config(disable=True)
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        pipe("a red star in the top left", num_inference_steps=20)
        seconds.append(time.perf_counter() - started)
    print(f"\nOne picture of 20 steps with guidance: {sorted(seconds[1:])[1]:.2f} s, the median of three.")


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--scenes", type=int, default=500, metavar="N", help="number of scenes (default: %(default)s)")
    arguments = flags.parse_args()
    pipe = StableDiffusionXLPipeline.from_pretrained(miniature_path())
    print(f"{report_header()}; {arguments.scenes} scenes")
    with torch.no_grad():
        score_renderings(pipe, [make_scene(f"unseen-{k}") for k in range(arguments.scenes)])
        probe_encoders(pipe, arguments.scenes)
    time_picture(pipe)


if __name__ == "__main__":
    main()
