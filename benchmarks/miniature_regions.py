"""Whether each region of a picture follows its own prompt: unseen scenes of the miniature world, scored exactly.

    python benchmarks/miniature_regions.py --json runs/regions.json --sheet docs/results/regions-sheet.png

The picture's prompt is the long caption of a scene. Some cells are regions, each with the long caption of another scene
for its prompt, in which the cell's object is described past stock's 77 tokens. In a region that object should stand,
elsewhere the first scene's. An object is right if its cell shows its shape and color. Figures are in percent with a
95 % interval (bootstrap over scenes), and all rows draw from the same noise.

With --json a stopped benchmark goes on. With --sheet, pictures of the first scenes are written.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from finelip_sdxl import FineLIPSDXLPipeline, regional_prompts
from finelip_sdxl.files import written_whole
from finelip_sdxl.images import label_grid, save_compact
from finelip_sdxl.miniature.captions import Caption, long_caption
from finelip_sdxl.miniature.scoring import score_picture
from finelip_sdxl.miniature.tokenizer import build_tokenizer
from finelip_sdxl.miniature.world import PLACES, Scene, make_scene
from finelip_sdxl.options import STOCK_POSITIONS
from finelip_sdxl.report import command_line, report_header

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that this runs as a script

from benchmarks.miniature_pictures import add_sampling_flags, cell, load_stock, with_interval, writable

REGIONS = (3, 6)  # regions of a picture


@dataclass(frozen=True)
class Region:
    """A region: its cell, and the scene and caption that it should follow."""

    cell: int
    scene: Scene
    text: str

    @property
    def mask(self) -> np.ndarray:
        """The cell, (3, 3)."""
        return (np.arange(len(PLACES)) == self.cell).astype(np.float32).reshape(3, 3)


@dataclass(frozen=True)
class Way:
    """A row: the pipeline, and whether it draws with regions."""

    open: Callable[[], FineLIPSDXLPipeline]
    has_regions: bool = True


def open_finelip() -> FineLIPSDXLPipeline:
    return FineLIPSDXLPipeline.from_pretrained("miniature")


def open_stock() -> FineLIPSDXLPipeline:
    return FineLIPSDXLPipeline(**load_stock().components)


WAYS = {
    "no regions": Way(open_finelip, has_regions=False),
    "regions, stock encoders": Way(open_stock),
    "regions, FineLIP": Way(open_finelip),
}


def make_regions(seed: int, number: int) -> list[Region]:
    """Regions in random cells, each with a caption of its own that describes its cell past stock's tokens."""
    tokenizer = build_tokenizer(max_length=248)

    def is_past_stock(caption: Caption, place: int) -> bool:
        tokens = tokenizer(caption.text)
        return any(
            mention.index == place and tokens.char_to_token(mention.start) >= STOCK_POSITIONS
            for mention in caption.described
        )

    regions = []
    for place in random.Random(f"regions {seed}").sample(range(len(PLACES)), number):
        for name in (f"region-{seed}-{place}-{attempt}" for attempt in count()):
            scene = make_scene(name)
            caption = long_caption(scene, name)
            if is_past_stock(caption, place):
                regions.append(Region(place, scene, caption.text))
                break
    return regions


def draw(pipe: Any, text: str, regions: list[Region], seed: int, arguments: argparse.Namespace) -> Image.Image:
    pipe.set_progress_bar_config(disable=True)
    pairs = [(region.mask, region.text) for region in regions]
    with regional_prompts(pipe, pairs) if pairs else nullcontext():
        image: Image.Image = pipe(
            text,
            num_inference_steps=arguments.steps,
            guidance_scale=arguments.guidance_scale,
            generator=torch.Generator().manual_seed(seed),
        ).images[0]
    return image


def count_right(way: Way, arguments: argparse.Namespace, name: str) -> list[list[list[int]]]:
    """Right and described objects by scene and column: in the regions and elsewhere, for each of `REGIONS`."""
    pipe, found = way.open(), []
    for seed in tqdm(range(arguments.scenes), desc=name):
        scene, counts = make_scene(f"unseen-{seed}"), []
        caption = long_caption(scene, f"unseen-{seed}")
        image = None
        for number in REGIONS:
            regions = make_regions(seed, number)
            if image is None or way.has_regions:
                image = draw(pipe, caption.text, regions if way.has_regions else [], seed, arguments)
            inside = [score_picture(image, region.scene)[region.cell].right for region in regions]
            taken = {region.cell for region in regions}
            own = score_picture(image, scene)
            outside = [own[mention.index].right for mention in caption.described if mention.index not in taken]
            counts += [[sum(scores), len(scores)] for scores in (inside, outside)]
        found.append(counts)
    return found


def table(found: dict[str, list[list[list[int]]]]) -> str:
    heads = [f"{number} regions: {where}" for number in REGIONS for where in ("in them", "elsewhere")]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name, counts in found.items():
        lines.append(f"| {name} | {' | '.join(map(cell, with_interval(np.array(counts))))} |")
    return "\n".join(lines)


def draw_sheet(arguments: argparse.Namespace) -> Image.Image:
    """Pictures of the first scene by way, and what they should be."""
    text = long_caption(make_scene("unseen-0"), "unseen-0").text
    pipes = [(way, way.open()) for way in WAYS.values()]
    rows = [
        [draw(pipe, text, make_regions(0, number) if way.has_regions else [], 0, arguments) for way, pipe in pipes]
        for number in REGIONS
    ]
    title = "\n".join(f"{number} regions: {', '.join(map(describe, make_regions(0, number)))}" for number in REGIONS)
    return label_grid(rows, [f"{number} regions" for number in REGIONS], list(WAYS), title)


def describe(region: Region) -> str:
    """The object that should stand in a region, and where that is."""
    thing = region.scene.objects[region.cell]
    return f"{thing.color} {thing.shape} in the {thing.place}"


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sampling_flags(flags, scenes=15)
    text = "file of results, written after each row; they are not drawn again (delete it after a change of weights)"
    flags.add_argument("--json", type=writable, metavar="FILE", help=text)
    flags.add_argument("--sheet", type=writable, metavar="PNG", help="file for pictures of the first scene")
    arguments = flags.parse_args()

    settings = f"{arguments.scenes} scenes, {arguments.steps} steps, guidance {arguments.guidance_scale:g}"
    saved = json.loads(arguments.json.read_text()) if arguments.json and arguments.json.exists() else {}
    found: dict[str, Any] = saved.setdefault(settings, {})
    for name in (name for name in WAYS if name not in found):
        found[name] = {"right": count_right(WAYS[name], arguments, name), "day": time.strftime("%Y-%m-%d")}
        if arguments.json:
            with written_whole(arguments.json) as temporary:
                temporary.write_text(json.dumps(saved))
    days = sorted({entry["day"] for entry in found.values()})
    command = command_line("python benchmarks/miniature_regions.py", sys.argv[1:])
    print(f"{report_header(' to '.join(dict.fromkeys((days[0], days[-1]))))}; {settings}: `{command}`\n")
    print(table({name: found[name]["right"] for name in WAYS}))
    if arguments.sheet:
        save_compact(draw_sheet(arguments), arguments.sheet)


if __name__ == "__main__":
    main()
