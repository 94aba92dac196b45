"""Shared parts of the miniature's benchmarks: rows of a table that encode captions in different ways and draw unseen
scenes from them, the score of the pictures, and a file of results.

All rows draw from the same noise. Counts are arrays (scenes, columns, 2): right and described objects.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compel import CompelForSDXL
from diffusers import StableDiffusionXLPipeline
from diffusers.utils import logging
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

from finelip_sdxl import FineLIPSDXLPipeline
from finelip_sdxl.console import COUNT
from finelip_sdxl.files import written_whole
from finelip_sdxl.foreign_files import read_json
from finelip_sdxl.images import save_compact
from finelip_sdxl.miniature import miniature_path
from finelip_sdxl.miniature.captions import Caption, long_caption, short_caption
from finelip_sdxl.miniature.scoring import ObjectScore, score_picture
from finelip_sdxl.miniature.tokenizer import build_tokenizer
from finelip_sdxl.miniature.world import Scene, make_scene
from finelip_sdxl.options import STOCK_POSITIONS
from finelip_sdxl.recommended import recommended_of
from finelip_sdxl.report import report_header

BATCH_SIZE = 25
RECOMMENDED = recommended_of(read_json(miniature_path() / "model_index.json"))  # steps and guidance
COLUMNS = (
    "short: plain",
    "short: linked",
    "long, kept by stock: plain",
    "long, kept by stock: linked",
    "long, cut by stock: plain",
    "long, cut by stock: linked",
)
CUT_BY_STOCK, SHORT = slice(4, 6), slice(0, 2)  # columns
# Two pairs of encoders of 248 positions: trained ones, and stretched stock ones.
ENCODERS = {
    "FineLIP": ("miniature-finelip-1", "miniature-finelip-2"),
    "stretched": ("miniature-clip-1", "miniature-clip-2"),
}

COLORS = {"FineLIP": "tab:blue", "stretched": "tab:orange", "stock": "0.5"}

# Pictures of a batch of captions, from the keyword arguments that all rows share (steps, guidance, seeds).
Draw = Callable[..., list[Image.Image]]


@dataclass(frozen=True)
class Row:
    """A row of a table: one way to encode captions.

    Attributes:
        name: its name in tables and in the file of results.
        open: loads (and, if need be, first trains) the models, and returns their drawing function.
        weights: the folder that `open` loads, if it was trained here.
        kinds: kinds of captions to draw.
    """

    name: str
    open: Callable[[], Draw]
    weights: Path | None = None
    kinds: tuple[str, ...] = ("short", "long")


# Rows


def draw_with(pipe: StableDiffusionXLPipeline) -> Draw:
    """Drawing with a pipeline, on the accelerator if there is one."""
    pipe.set_progress_bar_config(disable=True)
    if torch.accelerator.is_available():
        pipe.to(torch.accelerator.current_accelerator())
    return lambda texts, **arguments: pipe(texts, **arguments).images


def load_stock() -> StableDiffusionXLPipeline:
    logging.set_verbosity_error()  # it would repeat all cut text
    return StableDiffusionXLPipeline.from_pretrained(miniature_path())


def open_stock() -> Draw:
    return draw_with(load_stock())


def open_windows() -> Draw:
    """Drawing with compel's windows of 77."""
    stock = load_stock()
    draw = draw_with(stock)
    windows = CompelForSDXL(stock)

    def draw_windows(texts: list[str], **arguments) -> list[Image.Image]:
        found = windows(texts)
        return draw(None, prompt_embeds=found.embeds, pooled_prompt_embeds=found.pooled_embeds, **arguments)

    return draw_windows


def open_unaligned(encoders: str | tuple[str | Path, str | Path], **options: Any) -> Draw:
    """Drawing with unaligned encoders of 248 positions, for short captions too: a pair by its name, or any two."""
    finelip, finelip_2 = ENCODERS[encoders] if isinstance(encoders, str) else map(str, encoders)
    return draw_with(
        FineLIPSDXLPipeline.from_pretrained(
            "miniature",
            finelip=finelip,
            finelip_2=finelip_2,
            conditioning_adapter=None,
            short_prompt_encoder="long",
            **options,
        )
    )


def open_aligned(encoders: str, method: str, flags: str, weights: Path) -> Draw:
    """Drawing with the pipeline of `load_aligned`."""
    return draw_with(load_aligned(encoders, method, flags, weights))


def load_aligned(encoders: str, method: str, flags: str, weights: Path) -> FineLIPSDXLPipeline:
    """The miniature with encoders aligned by training/align_adapter.py. A missing run of `weights` is trained first."""
    run = weights.parent
    if not (run / "last").exists():
        finelip, finelip_2 = ENCODERS[encoders]
        own = ["--base", "miniature", "--method", method, "--finelip", finelip, "--finelip-2", finelip_2]
        own += ["--validate-every", "0"]
        own += ["--precomputed", str(run.parent / "precomputed")]  # many runs share the latents and states of stage 2
        train("align_adapter.py", [*own, *flags.split()], run)
    if not weights.exists():
        sys.exit(f"{run} has no {weights.name}: train it with both stages, or pass another --runs.")
    if method == "adapter":
        finelip, finelip_2 = ENCODERS[encoders]
        adapter = weights
    else:  # a LoRA is merged into the encoders
        finelip, finelip_2 = str(weights / "text_encoder"), str(weights / "text_encoder_2")
        adapter = None
    return FineLIPSDXLPipeline.from_pretrained(
        "miniature",
        finelip=finelip,
        finelip_2=finelip_2,
        conditioning_adapter=adapter,
        short_prompt_encoder="long",
    )


def train(recipe: str, flags: Sequence[str], run: Path) -> None:
    """Run a recipe of training/, named by its file, into the folder of a run."""
    script = Path(__file__).parent.parent / "training" / recipe
    command = [sys.executable, str(script), "--output-dir", str(run), *flags]
    if subprocess.run(command).returncode:
        sys.exit(f"This training failed (see its messages above): {' '.join(command[1:])}")


# Pictures and their scores


@dataclass(frozen=True)
class Sample:
    kind: str  # of the caption, short or long
    scene: Scene
    caption: Caption
    ends: tuple[int, ...]  # for each described object, the position of its sentence's last token

    @property
    def columns(self) -> list[int]:
        """The column of each described object. Stock's last token is the end token."""
        return [
            (mention.kind == "linked") + 2 * (self.kind == "long") + 2 * (end >= STOCK_POSITIONS - 1)
            for mention, end in zip(self.caption.described, self.ends, strict=True)
        ]


def make_samples(count: int, kind: str) -> list[Sample]:
    """Captions of unseen scenes."""
    tokenizer = build_tokenizer(max_length=248)
    write = short_caption if kind == "short" else long_caption
    samples = []
    for k in range(count):
        scene = make_scene(f"unseen-{k}")
        caption = write(scene, f"unseen-{k}")
        encoding = tokenizer(caption.text)
        ends = tuple(encoding.char_to_token(mention.end - 1) for mention in caption.described)
        samples.append(Sample(kind, scene, caption, ends))
    return samples


def draw_samples(draw: Draw, samples: list[Sample], steps: int, guidance_scale: float, name: str) -> list[Image.Image]:
    images: list[Image.Image] = []
    for first in tqdm(range(0, len(samples), BATCH_SIZE), desc=name):
        texts = [sample.caption.text for sample in samples[first : first + BATCH_SIZE]]
        seeds = [torch.Generator().manual_seed(first + k) for k in range(len(texts))]
        images += draw(texts, num_inference_steps=steps, guidance_scale=guidance_scale, generator=seeds)
    return images


def judge(
    samples: list[Sample], images: list[Image.Image], passes: Callable[[ObjectScore], bool] = lambda score: score.right
) -> list[str]:
    """For each sample a digit for each described object: 1 if its score passes; by default if it is right in shape,
    color and place."""
    judged = []
    for sample, image in zip(samples, images, strict=True):
        scores = score_picture(image, sample.scene)
        judged.append("".join(str(int(passes(scores[mention.index]))) for mention in sample.caption.described))
    return judged


def count_right(samples: list[Sample], judged: list[str]) -> np.ndarray:
    """Counts by the columns of `COLUMNS`."""
    counts = np.zeros((len(samples), len(COLUMNS), 2))
    for row, (sample, digits) in enumerate(zip(samples, judged, strict=True)):
        for column, digit in zip(sample.columns, digits, strict=True):
            counts[row, column] += int(digit), 1
    return counts


def percent(counts: np.ndarray) -> np.ndarray:
    """Share of right objects in percent, NaN without objects; (…, columns, 2) to (…, columns)."""
    with np.errstate(invalid="ignore"):
        return 100 * counts[..., 0] / counts[..., 1]


def with_interval(counts: np.ndarray, figure: Callable[[np.ndarray], np.ndarray] = percent) -> np.ndarray:
    """A figure of counts over all scenes with its 95 % interval, from 2,000 bootstrap samples of scenes; (…, 3)."""
    random = np.random.default_rng(0)
    again = figure(counts[random.integers(len(counts), size=(2000, len(counts)))].sum(axis=1))
    low, high = np.percentile(again, (2.5, 97.5), axis=0)
    return np.stack([figure(counts.sum(axis=0)), low, high], axis=-1)


def cell(figure: Sequence[float]) -> str:
    share, low, high = figure
    if np.isnan(share):
        return "–"
    # If a bootstrap sample has no object, there is no interval.
    return f"{share:.1f}" if np.isnan(low) else f"{share:.1f} ({low:.1f}–{high:.1f})"


def scale_shares(panel: Axes) -> None:
    """An axis from 0 to 100 % that shows shares near 100 apart: even in the square root of the wrong share."""
    panel.set_yscale("function", functions=(lambda y: -np.sqrt(100 - np.minimum(y, 100)), lambda y: 100 - np.square(y)))
    panel.set(ylim=(0, 100), yticks=(0, 20, 40, 60, 80, 90, 95, 99, 100))
    panel.grid(alpha=0.3)


def save_figure(figure: Figure, file: Path) -> None:
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=120)
    save_compact(Image.open(drawn), file)


# Results


class Results:
    """Scores of the drawn pictures, kept in a file if one is named, so that no row is drawn twice.

    Args:
        file: JSON file, which need not exist; None for none.
        arguments: scenes, steps and guidance. Results of other settings are kept apart.
    """

    def __init__(self, file: Path | None, arguments: argparse.Namespace) -> None:
        self.file = file
        self.setting = f"{arguments.scenes} scenes, {arguments.steps} steps, guidance {arguments.guidance_scale}"
        self.entries: dict[str, dict[str, Any]] = self._read().get(self.setting, {})

    def find(self, row: Row, kind: str) -> dict[str, Any] | None:
        """A result, or None if it is missing, of other weights, or older than the weights."""
        entry = self.entries.get(f"{row.name} ({kind})")
        weights = row.weights
        if entry is None or entry["weights"] != (weights and str(weights)):
            return None
        return None if weights and weights.exists() and weights.stat().st_mtime > entry["time"] else entry

    def add(self, row: Row, kind: str, samples: list[Sample], images: list[Image.Image], started: float) -> None:
        name = f"{row.name} ({kind})"
        self.entries[name] = {
            "weights": row.weights and str(row.weights),
            "time": started,
            "seconds": round(time.time() - started),
            "right": judge(samples, images),
            "right_and_clean": judge(samples, images, lambda score: score.right and score.clean),
            "right_by_chance": judge(samples, images[1:] + images[:1]),  # pictures of the next scene
            "pictures": [hashlib.sha256(image.tobytes()).hexdigest()[:16] for image in images],
        }
        if self.file is not None:
            everything = self._read()  # again: another process may have drawn other rows meanwhile
            everything.setdefault(self.setting, {})[name] = self.entries[name]
            with written_whole(self.file) as temporary:
                temporary.write_text(json.dumps(everything, indent=1))

    def _read(self) -> dict[str, dict[str, Any]]:
        if self.file is None or not self.file.exists():
            return {}
        try:
            everything = json.loads(self.file.read_text())
            # Fails if the file is JSON, but no file of results.
            for entries in everything.values():
                entries.values()
        except (ValueError, AttributeError) as error:
            sys.exit(f"{self.file} holds no results of this benchmark ({error}): pass another --json.")
        return everything


def draw_missing(rows: list[Row], results: Results, arguments: argparse.Namespace) -> None:
    """Draw, score and save the rows that `results` lacks."""
    samples = all_samples(arguments.scenes)
    for row in rows:
        missing = [kind for kind in row.kinds if results.find(row, kind) is None]
        draw = row.open() if missing else None
        for kind in missing:
            started = time.time()
            name = f"{row.name} ({kind})"
            images = draw_samples(draw, samples[kind], arguments.steps, arguments.guidance_scale, name)
            results.add(row, kind, samples[kind], images, started)


def all_samples(count: int) -> dict[str, list[Sample]]:
    return {kind: make_samples(count, kind) for kind in ("short", "long")}


def counts_of(row: Row, results: Results, samples: dict[str, list[Sample]], what: str = "right") -> np.ndarray:
    """Counts of a row's short and long captions together; (scenes, columns, 2)."""
    found = {kind: results.find(row, kind) for kind in row.kinds}
    return sum(count_right(samples[kind], entry[what]) for kind, entry in found.items() if entry is not None)


def circumstances(results: Results, rows: list[Row]) -> str:
    """Date, machine and settings of a table's rows."""
    entries = [results.find(row, kind) for row in rows for kind in row.kinds]
    days = sorted({date.fromtimestamp(entry["time"]).isoformat() for entry in entries if entry is not None})
    drawn = " to ".join(dict.fromkeys((days[0], days[-1])))
    seconds = sum(entry["seconds"] for entry in entries if entry is not None)
    return f"{report_header(drawn)}; {results.setting}; drawn in {seconds} s"


# Arguments


def add_sampling_flags(flags: argparse.ArgumentParser, scenes: int) -> None:
    """Add flags for the number of scenes, which is by default `scenes`, and how each is drawn."""
    text = "number of unseen scenes (default: %(default)s)"
    flags.add_argument("--scenes", type=COUNT, default=scenes, metavar="N", help=text)
    text = "Euler steps (default: %(default)s, which the miniature recommends)"
    flags.add_argument("--steps", type=COUNT, default=RECOMMENDED.steps, metavar="N", help=text)
    text = "classifier-free guidance (default: %(default)s, which the miniature recommends)"
    flags.add_argument("--guidance-scale", type=float, default=RECOMMENDED.guidance_scale, metavar="X", help=text)


def add_drawing_flags(flags: argparse.ArgumentParser, scenes: int, runs: str) -> None:
    """Add these, and those of rows that are trained."""
    add_sampling_flags(flags, scenes)
    text = "folder of the trained weights (default: %(default)s)"
    flags.add_argument("--runs", type=Path, default=Path(runs), metavar="FOLDER", help=text)
    text = "further flags of training/align_adapter.py; a finished run is not trained again"
    flags.add_argument("--train-flags", default="", metavar="FLAGS", help=text)
    text = "file of results, written after each row; its rows are not drawn again (delete it after a change of code)"
    flags.add_argument("--json", type=writable, metavar="FILE", help=text)
    flags.add_argument("--plot", type=writable, metavar="PNG", help="file for the figure")


def writable(text: str) -> Path:
    """A file in an existing folder, checked before hours of drawing."""
    file = Path(text)
    if file.is_dir() or not file.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is not the name of a file in a folder that exists")
    return file
