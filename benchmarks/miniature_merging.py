"""Old and new knowledge of a fine-tune after its text encoders get 248 positions.

    python benchmarks/miniature_merging.py

The miniature is fine-tuned on a new word for a color (training/miniature/finetune.py, into --runs, unless it is there
already). Then its UNet draws unseen scenes from short and from long captions, encoded by

- the fine-tune as it is, which cuts at 77 tokens;
- its own encoders, stretched;
- the miniature's FineLIPs, which never met the new word, in their place (`finelip_merge="replace"`);
- its own encoders plus the learned change of the FineLIPs (`finelip_merge="delta"`).

The last row is the miniature before fine-tuning, with its FineLIPs. Prints a table: the share of described objects that
are right in shape, color and place, for the new word and for all other colors, each with a 95 % interval (bootstrap
over scenes). All rows draw from the same noise; all but the first encode short captions with the long encoders.
"""

# ruff: noqa: E402 (the new word comes before the drawing code)

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

TRAINING = Path(__file__).parent.parent / "training" / "miniature"
sys.path.append(str(TRAINING))
from new_color import NEW_COLOR, make_new_scene  # isort: skip

import numpy as np
from diffusers import StableDiffusionXLPipeline
from diffusers.utils import logging

from finelip_sdxl import FineLIPSDXLPipeline
from finelip_sdxl.miniature.captions import long_caption, short_caption
from finelip_sdxl.miniature.tokenizer import build_tokenizer
from finelip_sdxl.options import STOCK_POSITIONS
from finelip_sdxl.report import report_header

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that this runs as a script

from benchmarks.miniature_pictures import (
    Draw,
    Sample,
    add_sampling_flags,
    cell,
    draw_samples,
    draw_with,
    judge,
    with_interval,
)

FINELIPS = {"finelip": "miniature-finelip-1", "finelip_2": "miniature-finelip-2"}
COLUMNS = tuple(
    f"{text}: {color}"
    for text in ("short", "long, kept by stock", "long, cut by stock")
    for color in ("new word", "other colors")
)
# Writers of captions, with their largest number of tokens.
KINDS = {"short": (short_caption, STOCK_POSITIONS), "long": (long_caption, 248)}


def table_rows(fine_tune: Path) -> dict[str, Callable[[], Draw]]:
    """The table's rows by name."""

    def open_pipeline(base: Path | str, **arguments) -> Draw:
        arguments = {"conditioning_adapter": None, "short_prompt_encoder": "long", **arguments}
        return draw_with(FineLIPSDXLPipeline.from_pretrained(base, **arguments))

    return {
        "fine-tune, cut at 77": lambda: draw_with(StableDiffusionXLPipeline.from_pretrained(fine_tune)),
        "fine-tune, stretched": lambda: open_pipeline(fine_tune),
        "fine-tune, FineLIP replaces": lambda: open_pipeline(fine_tune, **FINELIPS),
        "fine-tune, FineLIP added": lambda: open_pipeline(fine_tune, finelip_merge="delta", **FINELIPS),
        "not fine-tuned, FineLIP": lambda: open_pipeline("miniature", **FINELIPS),
    }


def make_samples(count: int, kind: str) -> list[Sample]:
    """Captions of unseen scenes. A caption that the new word makes too long is left out."""
    tokenizer = build_tokenizer(max_length=248)
    write, most = KINDS[kind]
    samples: list[Sample] = []
    number = 0
    while len(samples) < count:
        name = f"unseen-{number}"
        scene = make_new_scene(name)
        caption = write(scene, name)
        encoding = tokenizer(caption.text)
        if len(encoding.input_ids) <= most:
            ends = tuple(encoding.char_to_token(mention.end - 1) for mention in caption.described)
            samples.append(Sample(kind, scene, caption, ends))
        number += 1
    return samples


def count_right(samples: list[Sample], judged: list[str]) -> np.ndarray:
    """Right and described objects by the columns of `COLUMNS`; (scenes, columns, 2)."""
    counts = np.zeros((len(samples), len(COLUMNS), 2))
    for row, (sample, digits) in enumerate(zip(samples, judged, strict=True)):
        for mention, end, digit in zip(sample.caption.described, sample.ends, digits, strict=True):
            is_old = sample.scene.objects[mention.index].color != NEW_COLOR
            text = 0 if sample.kind == "short" else 1 + (end >= STOCK_POSITIONS - 1)
            counts[row, 2 * text + is_old] += int(digit), 1
    return counts


def fine_tune_in(runs: Path, flags: str) -> Path:
    """The folder of the fine-tune. A missing one is trained first."""
    folder = runs / "fine_tune"
    if not (folder / "model_index.json").exists():
        command = [sys.executable, str(TRAINING / "finetune.py"), "--runs", str(runs), *flags.split()]
        if subprocess.run(command).returncode:
            sys.exit(f"This training failed (see its messages above): {' '.join(command[1:])}")
    return folder


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sampling_flags(flags, scenes=100)
    text = "folder of the fine-tune (default: %(default)s)"
    flags.add_argument("--runs", type=Path, default=Path("runs/finetune"), metavar="FOLDER", help=text)
    text = "further flags of training/miniature/finetune.py; a finished fine-tune is not trained again"
    flags.add_argument("--train-flags", default="", metavar="FLAGS", help=text)
    arguments = flags.parse_args()

    fine_tune = fine_tune_in(arguments.runs, arguments.train_flags)
    logging.set_verbosity_error()  # stock would repeat all cut text
    samples = {kind: make_samples(arguments.scenes, kind) for kind in KINDS}
    setting = f"{arguments.scenes} scenes, {arguments.steps} steps, guidance {arguments.guidance_scale}"
    print(f"{report_header()}; {setting}", end="\n\n")
    print("| encoded by |", " | ".join(COLUMNS), "|")
    print("|---" * (len(COLUMNS) + 1) + "|", flush=True)
    for name, open_row in table_rows(fine_tune).items():
        draw = open_row()
        counts = np.zeros((arguments.scenes, len(COLUMNS), 2))
        for kind, of_kind in samples.items():
            images = draw_samples(draw, of_kind, arguments.steps, arguments.guidance_scale, f"{name} ({kind})")
            counts += count_right(of_kind, judge(of_kind, images))
        print(f"| {name} |", " | ".join(map(cell, with_interval(counts))), "|", flush=True)


if __name__ == "__main__":
    main()
