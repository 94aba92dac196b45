"""Gains of FineLIP's training on the miniature world: retrieval of long captions, and knowledge in the states.

    python benchmarks/miniature_retrieval.py

Trains each row of the table with training/train_finelip.py, once for each seed, into --runs (a finished run is not
trained again). It evaluates on unseen scenes in families of five. Siblings share the first four objects of their
captions, so 77 tokens do not tell them apart. A linear probe of the penultimate states, which SDXL's UNet gets, finds
how often the color of a linked object past token 77 is known if two or more colors were named before. Last, the states
of short captions are compared with stock's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import CLIPTokenizer

from finelip_sdxl import FineLIPModel, load_finelip
from finelip_sdxl.data import load_image_processor, load_tokenizer, tokenize
from finelip_sdxl.evaluation import evaluate_retrieval
from finelip_sdxl.miniature.dataset import MiniatureScenes
from finelip_sdxl.miniature.world import COLORS
from finelip_sdxl.model import end_positions
from finelip_sdxl.options import STOCK_POSITIONS
from finelip_sdxl.report import report_header
from finelip_sdxl.text_encoders import num_positions

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that this runs as a script

from benchmarks.miniature_parts import fit_probe
from benchmarks.miniature_pictures import train

BASE = "miniature-clip-1"
NOTHING_ELSE = "--contrastive-weight 0 --region-weight 0 --distillation-weight 0"
AUGMENTED = "--drop-first 0.5 --sample-sentences 0.3 --prefix-padding 16"
# Rows that are trained here, with flags of the training script. All other flags have the miniature's defaults.
TRAINED = {
    "stretched, contrastive loss": f"{NOTHING_ELSE} --triplet-weight 0 --contrastive-weight 1",
    "FineLIP, the paper's loss": NOTHING_ELSE,
    "FineLIP, the paper's loss, augmented captions": f"{NOTHING_ELSE} {AUGMENTED}",
    "FineLIP, all losses": "",
}


def models(arguments: argparse.Namespace) -> dict[str, tuple[str, list[Callable[[], FineLIPModel]]]]:
    """Rows of the table by name: the CLIP that they come from, and a loader of each seed's model."""
    rows = {
        "stock, cut at 77": (BASE, [lambda: load_finelip(BASE, factor=1)]),
        "stretched, not trained": (BASE, [lambda: load_finelip(BASE)]),
    }
    for number, (row, flags) in enumerate(TRAINED.items()):
        rows[row] = (
            BASE,
            [
                partial(trained, f"--seed {seed} {flags} {arguments.train_flags}", arguments.runs / f"{number}-{seed}")
                for seed in range(arguments.seeds)
            ],
        )
    for pair in (1, 2):
        rows[f"FineLIP that ships, {pair}"] = (
            f"miniature-clip-{pair}",
            [partial(load_finelip, f"miniature-finelip-{pair}")],
        )
    return rows


def trained(flags: str, folder: Path) -> FineLIPModel:
    """The model of a run. A missing run is trained first."""
    if not (folder / "last").exists():
        train("train_finelip.py", ["--base", BASE, "--eval-data", "none", *flags.split()], folder)
    return load_finelip(folder / "last")


@torch.no_grad()
def penultimate_states(model: FineLIPModel, input_ids: torch.Tensor) -> torch.Tensor:
    chunks = input_ids.split(50)
    return torch.cat([model.encode_text(chunk, output_hidden_states=True).hidden_states[-2] for chunk in chunks])


def late_hard_links(
    model: FineLIPModel, tokenizer: CLIPTokenizer, data: MiniatureScenes
) -> tuple[torch.Tensor, torch.Tensor]:
    """States at the ends of sentences past token 77 that link to one of two or more colors, and the colors."""
    captions = [data.caption(index) for index in range(len(data))]
    encoding = tokenizer([caption.text for caption in captions], padding=True, return_tensors="pt")
    states = penultimate_states(model, encoding.input_ids)
    found, colors = [], []
    for row, caption in enumerate(captions):
        for mention in caption.described:
            token = encoding.char_to_token(row, mention.end - 1)
            if mention.kind == "linked" and mention.candidates >= 2 and token >= STOCK_POSITIONS:
                found.append(states[row, token])
                colors.append(list(COLORS).index(data.scene(row).objects[mention.index].color))
    return torch.stack(found), torch.tensor(colors)


def probe_links(model: FineLIPModel, tokenizer: CLIPTokenizer, size: int) -> float:
    """Share of right answers of the probe on unseen scenes."""
    states, colors = late_hard_links(model, tokenizer, MiniatureScenes("probe", 4 * size))
    scale = states.std(dim=0)
    probe = fit_probe(states / scale, colors, len(COLORS))
    states, colors = late_hard_links(model, tokenizer, MiniatureScenes("test", size))
    return (probe(states / scale).argmax(dim=-1) == colors).double().mean().item()


def short_error(model: FineLIPModel, base: FineLIPModel, tokenizer: CLIPTokenizer, size: int) -> float:
    """Squared error of short captions' states relative to stock's squared norm, over all tokens."""
    data = MiniatureScenes("test", size)
    input_ids = tokenize(tokenizer, [data.short_caption(index) for index in range(size)])
    target = penultimate_states(base, input_ids)
    at = torch.arange(input_ids.shape[1])
    mask = (at <= end_positions(input_ids, tokenizer.eos_token_id)[:, None])[..., None]
    error = ((penultimate_states(model, input_ids) - target) * mask).square().sum()
    return (error / (target * mask).square().sum()).item()


def evaluate(model: FineLIPModel, base: str, size: int) -> dict[str, float]:
    tokenizer = load_tokenizer(base, positions=num_positions(model))
    image_processor = load_image_processor(base, model.config.vision_config.image_size)
    result = evaluate_retrieval(model, MiniatureScenes("test", size), tokenizer, image_processor, progress=False)
    figures = {}
    for name, recall in result.recall.items():
        figures[f"{name}, image to text"] = 100 * recall.image_to_text[1]
        figures[f"{name}, text to image"] = 100 * recall.text_to_image[1]
    if num_positions(model) > STOCK_POSITIONS:
        figures["linked colors"] = 100 * probe_links(model, tokenizer, size)
        figures["short captions' states"] = short_error(model, load_finelip(base, factor=1), tokenizer, size)
    return figures


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    text = "folder of the trained models (default: %(default)s)"
    flags.add_argument("--runs", type=Path, default=Path("runs/retrieval"), metavar="FOLDER", help=text)
    flags.add_argument(
        "--seeds", type=int, default=3, metavar="N", help="runs of each trained row (default: %(default)s)"
    )
    flags.add_argument("--scenes", type=int, default=500, metavar="N", help="number of scenes (default: %(default)s)")
    flags.add_argument("--train-flags", default="", metavar="FLAGS", help="further flags of train_finelip.py")
    flags.add_argument("--only", nargs="*", default=[], metavar="ROW", help="names of the rows to print (default: all)")
    arguments = flags.parse_args()
    print(f"{report_header()}; {arguments.scenes} unseen scenes, {arguments.seeds} seeds\n")

    columns = [f"{name}, {way}" for name in ("global", "fine", "fused") for way in ("image to text", "text to image")]
    columns += ["linked colors", "short captions' states"]
    print("| |", " | ".join(columns), "|\n|---|" + "---|" * len(columns))
    for row, (base, of_seeds) in models(arguments).items():
        if arguments.only and row not in arguments.only:
            continue
        runs = [evaluate(load(), base, arguments.scenes) for load in of_seeds]
        cells = [cell([run.get(column) for run in runs], digits=3 if "states" in column else 1) for column in columns]
        print(f"| {row} |", " | ".join(cells), "|", flush=True)


def cell(values: list[float | None], digits: int) -> str:
    """The mean over seeds, and the smallest and largest value."""
    if None in values:
        return "–"
    text = f"{np.mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ({min(values):.{digits}f}–{max(values):.{digits}f})"


if __name__ == "__main__":
    main()
