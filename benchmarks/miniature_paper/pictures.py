"""Pictures of the paper in miniature: drawn from long captions once, and scored by what is known and by models."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from benchmarks.miniature_pictures import (
    BATCH_SIZE,
    RECOMMENDED,
    Draw,
    Row,
    Sample,
    draw_with,
    judge,
    make_samples,
    open_stock,
    open_unaligned,
    open_windows,
)
from finelip_sdxl import FineLIPSDXLPipeline
from finelip_sdxl.evaluation.distances import distance_intervals
from finelip_sdxl.evaluation.fidelity import image_embeddings, open_judge, sentence_fidelity, sentences_of
from finelip_sdxl.files import written_whole
from finelip_sdxl.miniature import miniature_path
from finelip_sdxl.miniature.drawing import draw_scene
from finelip_sdxl.options import STOCK_POSITIONS
from finelip_sdxl.picture_evaluation.drawn import read_drawn

from .cells import BASE, Cells, digest

STOCK, WINDOWS, ALIGNED = "stock, cut at 77", "compel, windows of 77", "FineLIP that ships, aligned"
# Rows that the judge of sentences draws itself: its text encoder is stock's first.
SELF_JUDGED = (STOCK, WINDOWS)


def in_sdxl(name: str) -> str:
    """The name of the row that draws with a trained model."""
    return f"{name} in SDXL"


def picture_rows(trained: Mapping[str, Callable[[], Path | None]]) -> list[Row]:
    """The ways to encode captions.

    Args:
        trained: by the names of their rows, trained models for the first text encoder; the second is stretched, as the
            paper's is.
    """
    return [
        Row(STOCK, open_stock),
        Row(WINDOWS, open_windows),
        Row("stretched, not trained", partial(open_unaligned, "stretched")),
        *(Row(in_sdxl(name), partial(_open_trained, find)) for name, find in trained.items()),
        Row("FineLIP that ships, not aligned", partial(open_unaligned, "FineLIP")),
        Row(ALIGNED, _open_aligned),
    ]


def _open_trained(find: Callable[[], Path | None]) -> Draw:
    folder = find()
    if folder is None:
        raise ValueError("This training has diverged at every learning rate: pass others.")
    return open_unaligned((folder, "miniature-clip-2"))


def _open_aligned() -> Draw:
    return draw_with(FineLIPSDXLPipeline.from_pretrained("miniature", short_prompt_encoder="long"))


def scores_of(row: Row, depends_on: Any, cells: Cells) -> dict[str, Any]:
    """The scores of a row's pictures, which are drawn first.

    Args:
        row: the way to encode captions.
        depends_on: of JSON's types, the trainings of its encoders.
        cells: the folder.

    Returns:
        By prompt: `objects`, `objects after 77` and `sentences`, `sentences after 77`; and of all: `fid`, `kid`,
        `cmmd`, each with its interval; FID is None with fewer pictures than features.
    """
    steps = cells.budget.drawing_steps or RECOMMENDED.steps
    settings = {
        "row": row.name,
        "depends on": depends_on,
        "miniature": miniature_digest(),
        "pictures": cells.budget.pictures,
        "steps": steps,
        "guidance_scale": RECOMMENDED.guidance_scale,
    }

    def make() -> dict[str, Any]:
        samples = make_samples(cells.budget.pictures, "long")
        folder = cells.folder / "pictures" / digest(settings)
        draw_missing(row, samples, folder, steps)
        return score(samples, [read_drawn(place(folder, at)) for at in range(len(samples))])

    found: dict[str, Any] = cells.result("picture-scores", settings, make)
    return found


def draw_missing(row: Row, samples: list[Sample], folder: Path, steps: int) -> None:
    """Draws the batches of pictures that are not whole yet; every picture has a seed of its own."""
    batches = [range(at, min(at + BATCH_SIZE, len(samples))) for at in range(0, len(samples), BATCH_SIZE)]
    missing = [batch for batch in batches if not all(place(folder, at).exists() for at in batch)]
    if not missing:
        return
    draw = row.open()
    folder.mkdir(parents=True, exist_ok=True)
    for batch in tqdm(missing, desc=row.name, unit="batch"):
        images = draw(
            [samples[at].caption.text for at in batch],
            generator=[torch.Generator().manual_seed(at) for at in batch],
            num_inference_steps=steps,
            guidance_scale=RECOMMENDED.guidance_scale,
        )
        for at, image in zip(batch, images, strict=True):
            with written_whole(place(folder, at)) as temporary:
                image.save(temporary, format="PNG")


def place(folder: Path, at: int) -> Path:
    return folder / f"{at:05}.png"


def score(samples: list[Sample], images: list[Image.Image]) -> dict[str, Any]:
    """The scores of pictures of these samples, see `scores_of`."""
    judged = judge(samples, images)
    found: dict[str, Any] = {"objects": [], "objects after 77": []}
    for sample, digits in zip(samples, judged, strict=True):
        right = [int(digit) for digit in digits]
        late = [digit for digit, end in zip(right, sample.ends, strict=True) if end >= STOCK_POSITIONS - 1]
        found["objects"].append(sum(right) / len(right))
        found["objects after 77"].append(sum(late) / len(late) if late else None)

    features = open_judge(BASE, "sentence_judge")
    assert features.tokenizer is not None
    embeddings = image_embeddings(features, images)
    sentences = [sentences_of(features.tokenizer, sample.caption.text)[0] for sample in samples]
    fidelity = sentence_fidelity(features, sentences, embeddings[:, None])
    found |= {"sentences": fidelity["all"], "sentences after 77": fidelity["after"]}

    real = image_embeddings(features, (draw_scene(sample.scene) for sample in samples))
    distances = distance_intervals(real, embeddings)
    found |= {name: interval.to_dict() for name, interval in distances.items()}
    if len(samples) <= features.dim:
        found["fid"] = None
    return found


def miniature_digest() -> str:
    """A digest of all weights of the miniature, with its steps and guidance."""
    found = hashlib.sha256(repr(RECOMMENDED).encode())
    for file in sorted(miniature_path().parent.rglob("*.safetensors")):
        found.update(file.read_bytes())
    return found.hexdigest()[:16]
