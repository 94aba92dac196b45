"""A LoRA learns a word that stands behind token 77 of its captions, if the captions are read whole.

    python benchmarks/miniature_lora.py

Pictures are written to --runs, each with a long caption in a .txt file beside it. Their captions name one of the colors
by a word that the miniature does not know, and only behind token 77. Two LoRAs are trained by training/train_lora.py on
the same pictures: one on the captions, one on the captions cut at 77 tokens, as stock's encoders cut them. (A finished
run is not trained again.)

Then captions of unseen scenes, of the same form, are drawn without a LoRA and with each. Prints a table: the share of
described objects that are right in shape, color and place, for the new word and for all other colors, each with a 95 %
interval (bootstrap over scenes). All rows draw from the same noise, and can be drawn in several calls (--only).
"""

# ruff: noqa: E402 (the new word comes before the drawing code)

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
sys.path.append(str(REPOSITORY / "training" / "miniature"))
from new_color import NEW_COLOR, make_new_scene  # isort: skip

import numpy as np
from tqdm import tqdm

from finelip_sdxl import FineLIPSDXLPipeline
from finelip_sdxl.console import COUNT
from finelip_sdxl.files import written_folder
from finelip_sdxl.miniature.captions import Caption, long_caption
from finelip_sdxl.miniature.drawing import draw_scene
from finelip_sdxl.miniature.tokenizer import build_tokenizer
from finelip_sdxl.miniature.world import Scene
from finelip_sdxl.options import STOCK_POSITIONS
from finelip_sdxl.report import report_header

sys.path.insert(0, str(REPOSITORY))  # so that this runs as a script

from benchmarks.miniature_pictures import (
    Sample,
    add_sampling_flags,
    cell,
    draw_samples,
    draw_with,
    judge,
    train,
    with_interval,
)

POSITIONS = 248
# The table's rows: the folder of captions that a LoRA was trained on, None without one.
ROWS = {"no LoRA": None, "LoRA, captions cut at 77": "cut", "LoRA, captions whole": "whole"}
COLUMNS = ("the new word, behind token 77", "other colors, behind token 77", "other colors, before it")


# Scenes and captions


def caption_of(scene: Scene, name: str) -> Caption:
    """A long caption that describes the objects of the new word last."""
    others = [index for index, thing in enumerate(scene.objects) if thing.color != NEW_COLOR]
    return long_caption(scene, name, first=random.Random(name).sample(others, len(others)))


def make_samples(count: int, prefix: str) -> list[Sample]:
    """Scenes with captions of at most 248 tokens that have the new word, and only behind token 77."""
    tokenizer = build_tokenizer(max_length=POSITIONS)
    samples: list[Sample] = []
    number = 0
    while len(samples) < count:
        name = f"{prefix}-{number}"
        scene = make_new_scene(name)
        caption = caption_of(scene, name)
        encoding = tokenizer(caption.text)
        place = caption.text.find(NEW_COLOR)
        if place >= 0 and encoding.char_to_token(place) >= STOCK_POSITIONS and len(encoding.input_ids) <= POSITIONS:
            ends = tuple(encoding.char_to_token(mention.end - 1) for mention in caption.described)
            samples.append(Sample("long", scene, caption, ends))
        number += 1
    return samples


def cut(text: str) -> str:
    """The part of a text that stock's 77 tokens hold."""
    encoding = build_tokenizer(max_length=POSITIONS)(text, return_offsets_mapping=True)
    last = min(STOCK_POSITIONS, len(encoding.input_ids)) - 2
    return text[: encoding.offset_mapping[last][1]]


def write_pictures(folder: Path, samples: list[Sample], cuts: bool) -> None:
    """Pictures with their captions beside them; a folder that is there stays."""
    if folder.exists():
        return
    with written_folder(folder) as new:
        for number, sample in enumerate(tqdm(samples, desc=f"pictures of {folder.name}")):
            draw_scene(sample.scene).save(new / f"{number:04d}.png")
            text = sample.caption.text
            (new / f"{number:04d}.txt").write_text(cut(text) if cuts else text, encoding="utf-8")


# LoRAs and their pictures


def lora_in(runs: Path, name: str, flags: str) -> Path:
    """The folder of a LoRA. A missing one is trained first."""
    run = runs / name
    if not (run / "last").exists():
        train("train_lora.py", ["--captions", f"folder:{runs / 'pictures' / name}", *flags.split()], run)
    return run / "last"


def count_right(samples: list[Sample], judged: list[str]) -> np.ndarray:
    """Right and described objects by the columns of `COLUMNS`; (scenes, columns, 2)."""
    counts = np.zeros((len(samples), len(COLUMNS), 2))
    for row, (sample, digits) in enumerate(zip(samples, judged, strict=True)):
        for mention, end, digit in zip(sample.caption.described, sample.ends, digits, strict=True):
            is_new = sample.scene.objects[mention.index].color == NEW_COLOR
            column = 0 if is_new else 1 if end >= STOCK_POSITIONS - 1 else 2
            counts[row, column] += int(digit), 1
    return counts


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sampling_flags(flags, scenes=100)
    text = "pictures to train on (default: %(default)s)"
    flags.add_argument("--pictures", type=COUNT, default=400, metavar="N", help=text)
    text = "folder of pictures and LoRAs (default: %(default)s)"
    flags.add_argument("--runs", type=Path, default=Path("runs/lora-benchmark"), metavar="FOLDER", help=text)
    text = "further flags of training/train_lora.py (default: %(default)s); a finished LoRA is not trained again"
    flags.add_argument("--train-flags", default="--layers transformer", metavar="FLAGS", help=text)
    text = f"names of rows (default: all): {'; '.join(ROWS)}"
    flags.add_argument("--only", nargs="*", default=[*ROWS], choices=[*ROWS], metavar="ROW", help=text)
    arguments = flags.parse_args()

    names = [ROWS[row] for row in arguments.only if ROWS[row] is not None]
    pictures = make_samples(arguments.pictures, "lora")
    for name in names:
        write_pictures(arguments.runs / "pictures" / name, pictures, cuts=name == "cut")
    loras = {name: lora_in(arguments.runs, name, arguments.train_flags) for name in names}

    samples = make_samples(arguments.scenes, "unseen")
    setting = f"{arguments.scenes} scenes, {arguments.steps} steps, guidance {arguments.guidance_scale}"
    print(f"{report_header()}; {setting}", end="\n\n")
    print("| drawn with |", " | ".join(COLUMNS), "|")
    print("|---" * (len(COLUMNS) + 1) + "|", flush=True)
    for row in arguments.only:
        name = ROWS[row]
        pipe = FineLIPSDXLPipeline.from_pretrained("miniature")
        if name is not None:
            pipe.load_lora_weights(str(loras[name]))
        images = draw_samples(draw_with(pipe), samples, arguments.steps, arguments.guidance_scale, row)
        counts = count_right(samples, judge(samples, images))
        print(f"| {row} |", " | ".join(map(cell, with_interval(counts))), "|", flush=True)


if __name__ == "__main__":
    main()
