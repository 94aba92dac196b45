"""How much of a prompt each way of reading it brings into the picture, on unseen scenes of the miniature world.

    python benchmarks/miniature_story.py --scenes 500

Prints a table: the share of described objects that are right in shape, color and place, apart by plain and linked
sentences and by whether stock's 77 tokens hold the sentence whole, each with a 95 % interval (bootstrap over scenes).
All rows draw from the same noise. Chance is what pictures score against the next scene of the list.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import torch
from compel import CompelForSDXL
from diffusers import StableDiffusionXLPipeline
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from finelip_sdxl import FineLIPSDXLPipeline
from finelip_sdxl.miniature import miniature_path
from finelip_sdxl.miniature.captions import Caption, long_caption, short_caption
from finelip_sdxl.miniature.drawing import IMAGE_SIZE, draw_scene
from finelip_sdxl.miniature.scoring import score_picture
from finelip_sdxl.miniature.tokenizer import build_tokenizer
from finelip_sdxl.miniature.world import Scene, make_scene
from finelip_sdxl.prompts import STOCK_POSITIONS

BATCH_SIZE = 25
SHEET_COLUMNS = 6
COLUMNS = ("plain, read whole", "linked, read whole", "plain, cut by stock", "linked, cut by stock")

# Pictures of a batch of captions, from the keyword arguments that every row shares (steps, guidance, seeds).
Draw = Callable[..., list[Image.Image]]


@dataclass
class Sample:
    scene: Scene
    caption: Caption
    read_whole: tuple[bool, ...]  # for each described object, whether stock's 77 tokens hold its sentence


def make_samples(count: int, kind: str, tokenizer) -> list[Sample]:
    write = short_caption if kind == "short" else long_caption
    samples = []
    for k in range(count):
        scene = make_scene(f"unseen-{k}")
        caption = write(scene, f"unseen-{k}")
        encoding = tokenizer(caption.text, truncation=True, max_length=STOCK_POSITIONS)
        # The last token of a cut text is the end token; everything before it was read.
        read = tuple(encoding.char_to_token(mention.end - 1) is not None for mention in caption.described)
        samples.append(Sample(scene, caption, read))
    return samples


def score(samples: list[Sample], images: list[Image.Image], shift: int = 0) -> np.ndarray:
    """Right and described objects for each sample and column, (samples, columns, 2)."""
    counts = np.zeros((len(samples), len(COLUMNS), 2))
    for k, sample in enumerate(samples):
        scores = score_picture(images[(k + shift) % len(images)], sample.scene)
        for mention, read in zip(sample.caption.described, sample.read_whole, strict=True):
            column = (mention.kind == "linked") + (0 if read else 2)
            counts[k, column] += scores[mention.index].right, 1
    return counts


def share_with_interval(counts: np.ndarray) -> list[tuple[float, float, float]]:
    """For each column the share of right objects in percent, and its 95 % interval; NaN where there are none."""
    random = np.random.default_rng(0)
    again = counts[random.integers(len(counts), size=(2000, len(counts)))].sum(axis=1)
    with np.errstate(invalid="ignore"):
        share = 100 * counts.sum(axis=0)[:, 0] / counts.sum(axis=0)[:, 1]
        low, high = np.percentile(100 * again[..., 0] / again[..., 1], (2.5, 97.5), axis=0)
    return list(zip(share.tolist(), low.tolist(), high.tolist(), strict=True))


def draw_sheet(samples: list[Sample], rows: dict[str, list[Image.Image]]) -> Image.Image:
    """The described scenes above what each reading made of their captions, twice as large."""
    rows = {"the scene": [draw_scene(sample.scene) for sample in samples], **rows}
    size, label, gap = 2 * IMAGE_SIZE, 28, 8
    sheet = Image.new("RGB", (len(samples) * (size + gap) - gap, len(rows) * (size + label + gap) - gap), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(18)
    for row, (name, images) in enumerate(rows.items()):
        top = row * (size + label + gap)
        pen.text((0, top), name, fill="black", font=font)
        for column, image in enumerate(images[: len(samples)]):
            sheet.paste(image.resize((size, size), Image.Resampling.LANCZOS), (column * (size + gap), top + label))
    return sheet


def rows() -> dict[str, tuple[str, Draw]]:
    """Each row's name: the captions it draws, and how."""
    stock = StableDiffusionXLPipeline.from_pretrained(miniature_path(), dtype=torch.float32)
    windows = CompelForSDXL(stock)
    clips = {"finelip": "miniature-clip-1", "finelip_2": "miniature-clip-2"}
    stretched = FineLIPSDXLPipeline.from_pretrained("miniature", **clips, short_prompt="stretched")
    trained = FineLIPSDXLPipeline.from_pretrained("miniature", short_prompt="stretched")
    default = FineLIPSDXLPipeline.from_pretrained("miniature")
    for pipe in (stock, stretched, trained, default):
        pipe.set_progress_bar_config(disable=True)

    def draw_with(pipe: StableDiffusionXLPipeline) -> Draw:
        return lambda texts, **arguments: pipe(texts, **arguments).images

    def draw_windows(texts: list[str], **arguments) -> list[Image.Image]:
        read = windows(texts)
        return stock(prompt_embeds=read.embeds, pooled_prompt_embeds=read.pooled_embeds, **arguments).images

    return {
        "stock": ("short", draw_with(stock)),
        "stretched, not trained, also for short prompts": ("short", draw_with(stretched)),
        "FineLIP, not aligned, also for short prompts": ("short", draw_with(trained)),
        "FineLIP-SDXL's default": ("short", draw_with(default)),
        "stock, cut at 77": ("long", draw_with(stock)),
        "compel, windows of 77": ("long", draw_windows),
        "stretched, not trained": ("long", draw_with(stretched)),
        "FineLIP, not aligned": ("long", draw_with(trained)),
    }


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--scenes", type=int, default=500, help="unseen scenes (default 500)")
    flags.add_argument("--steps", type=int, default=20, help="Euler steps (default 20)")
    flags.add_argument("--guidance-scale", type=float, default=3.0, help="classifier-free guidance (default 3.0)")
    flags.add_argument("--only", nargs="*", default=[], help="names of the rows to draw (default all)")
    flags.add_argument("--json", type=Path, help="also write the figures here")
    flags.add_argument("--sheet", type=Path, help="also write a PNG here: the first scenes, a row for each reading")
    arguments = flags.parse_args()

    tokenizer = build_tokenizer()
    samples = {kind: make_samples(arguments.scenes, kind, tokenizer) for kind in ("short", "long")}
    drawn: dict[str, list[Image.Image]] = {}
    counts = {}
    started = time.time()
    all_rows = rows()
    for name, (kind, draw) in all_rows.items():
        if arguments.only and name not in arguments.only:
            continue
        images: list[Image.Image] = []
        for first in tqdm(range(0, arguments.scenes, BATCH_SIZE), desc=f"{name} ({kind})"):
            texts = [sample.caption.text for sample in samples[kind][first : first + BATCH_SIZE]]
            seeds = [torch.Generator().manual_seed(first + k) for k in range(len(texts))]
            images += draw(
                texts,
                num_inference_steps=arguments.steps,
                guidance_scale=arguments.guidance_scale,
                generator=seeds,
            )
        drawn[name] = images
        counts[f"{name} ({kind})"] = score(samples[kind], images)
    if "stock, cut at 77" in drawn:
        counts["chance (long)"] = score(samples["long"], drawn["stock, cut at 77"], shift=1)

    print(f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__};", end=" ")
    print(f"{arguments.scenes} scenes, {arguments.steps} steps, guidance {arguments.guidance_scale}", end="; ")
    print(f"{time.time() - started:.0f} s\n")
    print("| read by (captions) |", " | ".join(COLUMNS), "|")
    print("|---" * (len(COLUMNS) + 1) + "|")
    figures = {name: share_with_interval(count) for name, count in counts.items()}
    for name, shares in figures.items():
        cells = ["–" if np.isnan(share) else f"{share:.1f} ({low:.1f}–{high:.1f})" for share, low, high in shares]
        print(f"| {name} |", " | ".join(cells), "|")
    if "stock" in drawn and "FineLIP-SDXL's default" in drawn:
        pairs = zip(drawn["stock"], drawn["FineLIP-SDXL's default"], strict=True)
        equal = sum(a.tobytes() == b.tobytes() for a, b in pairs)
        print(f"\nShort captions: {equal} of {arguments.scenes} default pictures equal stock's bit for bit.")
    if arguments.sheet:
        long_rows = {name: images for name, images in drawn.items() if all_rows[name][0] == "long"}
        draw_sheet(samples["long"][:SHEET_COLUMNS], long_rows).save(arguments.sheet)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
