"""Sections of the paper in miniature: which models each compares, and their figures from the cells."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from finelip_sdxl import FineLIPModel
from finelip_sdxl.evaluation.intervals import Interval, mean_interval
from finelip_sdxl.miniature.dataset import MiniatureScenes

from .cells import BASE, Cells, MissingError, Training, base_digest
from .measures import (
    FAMILY,
    PERTURBATIONS,
    SIMILARITIES,
    ChangedCaptions,
    Ranks,
    ShortCaptions,
    growth,
    hits,
    load_model,
    mean_of,
    published_hits,
    rank,
    slot_cosines,
)
from .pictures import SELF_JUDGED, in_sdxl, picture_rows, scores_of

NOTHING = " ".join(
    f"--{name}-weight 0" for name in ("triplet", "contrastive", "fine-contrastive", "region", "distillation")
)
PAPER, LONG_CLIP, ALL = "FineLIP, the paper's loss", "Long-CLIP's recipe", "FineLIP, all losses"
# Losses by name, with flags of training/train_finelip.py. Each has a best learning rate of its own.
LOSSES = {
    PAPER: f"{NOTHING} --triplet-weight 1",
    "triplet, hardest negative only": f"{NOTHING} --triplet-weight 1 --hardest",
    LONG_CLIP: f"{NOTHING} --contrastive-weight 1",
    "contrastive loss of late interaction": f"{NOTHING} --fine-contrastive-weight 1",
    # With the weights of the miniature's preset: the triplet loss is a sum over the batch, the contrastive one a mean.
    "triplet and contrastive": f"{NOTHING} --triplet-weight 0.02 --contrastive-weight 1",
    ALL: "",
}
MAIN = (LONG_CLIP, PAPER, ALL)  # rows with several seeds
SHIPPED = "miniature-finelip-1"
STOCK, STRETCHED, THAT_SHIPS = "stock, cut at 77", "stretched, not trained", "FineLIP that ships"

AS_PUBLISHED = " (published)"
# What each ablation changes of the paper's loss; the published value changes nothing.
ABLATIONS = {
    "positional table": {
        f"stretched, 20 rows kept{AS_PUBLISHED}": "",
        "stretched, no row kept (308 positions)": "--stretch-keep 0",
        "learned from scratch": "--new-positions",
    },
    "share of refined tokens": {
        "0.1": "--refined-share 0.1",
        f"0.2{AS_PUBLISHED}": "",
        "0.4": "--refined-share 0.4",
        "0.6": "--refined-share 0.6",
        "1": "--refined-share 1",
    },
    "token refinement": {
        "of neither": "--refinement none",
        "of images": "--refinement images",
        "of texts": "--refinement texts",
        f"of both{AS_PUBLISHED}": "",
    },
    "LeakyReLU": {f"slope 0.1{AS_PUBLISHED}": "", "none": "--interaction-slope 1"},
    "partners of a token": {f"the best{AS_PUBLISHED}": "", "the mean of all": "--interaction-pooling mean"},
    "margin": {"0.1": "--margin 0.1", f"0.2{AS_PUBLISHED}": "", "0.4": "--margin 0.4"},
}
# The paper's ablations, with what it says: the first of two is better.
CLAIMS: list[tuple[str, tuple[str, str], tuple[str, str]]] = [
    (
        "A stretched positional table is better than one learned from scratch.",
        ("positional table", f"stretched, 20 rows kept{AS_PUBLISHED}"),
        ("positional table", "learned from scratch"),
    ),
    *(
        (
            f"A share of 0.2 refined tokens is better than {share}.",
            ("share of refined tokens", f"0.2{AS_PUBLISHED}"),
            ("share of refined tokens", share),
        )
        for share in ("0.1", "0.4", "0.6", "1")
    ),
    (
        "Refinement of both sides is better than of images alone.",
        ("token refinement", f"of both{AS_PUBLISHED}"),
        ("token refinement", "of images"),
    ),
    (
        "The triplet loss of late interaction is better than its contrastive loss.",
        ("loss", PAPER),
        ("loss", "contrastive loss of late interaction"),
    ),
    ("FineLIP is better than Long-CLIP's recipe.", ("loss", PAPER), ("loss", LONG_CLIP)),
]


# Trainings


@dataclass(frozen=True)
class Candidate:
    """A learning rate of a loss, and its Recall@1 by similarity on the scenes that choose; None if it diverged."""

    rate: float
    recall: dict[str, float] | None


def candidates(loss: str, cells: Cells) -> list[Candidate]:
    """All learning rates of a loss, with the first seed, on scenes that no table shows."""
    found = []
    for rate in cells.budget.learning_rates:
        training = Training(LOSSES[loss], rate, seed=0)
        ranks = ranks_of(training, "validation", cells)
        found.append(Candidate(rate, None if ranks is None else recall_of(ranks)))
    return found


def best_rate(loss: str, cells: Cells) -> float | None:
    """The learning rate with the highest Recall@1 by any similarity; None if all have diverged."""
    scored = [(max(one.recall.values()), one.rate) for one in candidates(loss, cells) if one.recall is not None]
    return max(scored)[1] if scored else None


def recall_of(ranks: Ranks) -> dict[str, float]:
    """Recall@1 in percent, as the mean of both directions, by similarity."""
    found = {name: hits(ranks, weight) for name, weight in SIMILARITIES.items()}
    return {name: 100 * float(families.mean()) for name, families in found.items() if families is not None}


def at_best_rate(loss: str, seed: int, cells: Cells, more: str = "") -> Training | None:
    """The training of a loss at its best learning rate, with further flags."""
    rate = best_rate(loss, cells)
    return None if rate is None else Training(f"{LOSSES[loss]} {more}".strip(), rate, seed)


def ranks_of(training: Training | None, data: str, cells: Cells) -> Ranks | None:
    """The ranks of a trained model on one of `_DATA`; None if it has diverged."""
    folder = None if training is None else cells.trained(training)
    if training is None or folder is None:
        return None
    settings = {"training": cells.settings_of(training), "data": data, "scenes": cells.budget.scenes}
    make = partial(_rank, partial(load_model, folder), data, cells.budget.scenes, training.all_tokens)
    found: Ranks = cells.result("ranks", settings, make)
    return found if training.trains_interaction else {"1.0": found["1.0"]}


def ranks_of_given(name: str, data: str, cells: Cells, **options: Any) -> Ranks:
    """The ranks of a model that is not trained here."""
    settings = {"model": name, "base": base_digest(), "data": data, "scenes": cells.budget.scenes, **options}
    found: Ranks = cells.result("ranks", settings, partial(_rank, partial(load_model, name, **options), data,
        cells.budget.scenes))  # fmt: skip
    return found


def _rank(load: Callable[[], FineLIPModel], data: str, scenes: int, all_tokens: bool = False) -> Ranks:
    return rank(load(), _DATA[data](scenes), all_tokens)


_DATA: dict[str, Callable[[int], Any]] = {
    "validation": partial(MiniatureScenes, "validation"),
    "long": partial(MiniatureScenes, "test"),
    "short": partial(ShortCaptions, "test"),
    **{
        name: lambda size, change=change: ChangedCaptions(MiniatureScenes("test", size), change)
        for name, change in PERTURBATIONS.items()
    },
}


# Part 1: retrieval


@dataclass(frozen=True)
class RetrievalRow:
    """A row of part 1: ranks on long and on short captions, of each seed."""

    name: str
    long: list[Ranks]
    short: list[Ranks]


def retrieval(cells: Cells) -> list[RetrievalRow]:
    rows = []
    for name, (model, options) in _GIVEN.items():
        if name != THAT_SHIPS:
            rows.append(RetrievalRow(name, *([ranks_of_given(model, data, cells, **options)] for data in _CAPTIONS)))
    for loss in MAIN:
        of_data = []
        for data in _CAPTIONS:
            found = [ranks_of(at_best_rate(loss, seed, cells), data, cells) for seed in range(cells.budget.seeds)]
            of_data.append([ranks for ranks in found if ranks is not None])
        rows.append(RetrievalRow(loss, *of_data))
    model, options = _GIVEN[THAT_SHIPS]
    rows.append(RetrievalRow(THAT_SHIPS, *([ranks_of_given(model, data, cells, **options)] for data in _CAPTIONS)))
    return rows


_CAPTIONS = ("long", "short")
_GIVEN: dict[str, tuple[str, dict[str, Any]]] = {
    STOCK: (BASE, {"factor": 1}),
    STRETCHED: (BASE, {}),
    THAT_SHIPS: (SHIPPED, {}),
}


def figure_of(ranks: list[Ranks], weight: float, direction: str | None = None, family: int = FAMILY) -> Interval | None:
    """Recall@1 in percent over seeds, with its interval over families; None without such a similarity."""
    found = [families for of_seed in ranks if (families := hits(of_seed, weight, direction, family)) is not None]
    return mean_of(found) if found else None


def spread_of(ranks: list[Ranks]) -> tuple[float, float] | None:
    """The lowest and highest Recall@1 in percent of several seeds, as the mean of both directions, by the published
    score."""
    found = [100 * float(published_hits(of_seed).mean()) for of_seed in ranks]
    return (min(found), max(found)) if len(found) > 1 else None


# Part 2: pictures


@dataclass(frozen=True)
class PictureRow:
    """A row of part 2, with the scores of `pictures.scores_of`."""

    name: str
    scores: dict[str, Any]

    @property
    def is_self_judged(self) -> bool:
        return self.name in SELF_JUDGED


def pictures(cells: Cells) -> list[PictureRow]:
    trainings = {loss: at_best_rate(loss, 0, cells) for loss in MAIN}
    trainings = {loss: training for loss, training in trainings.items() if training is not None}
    find: dict[str, Callable[[], Path | None]] = {
        loss: partial(cells.trained, training) for loss, training in trainings.items()
    }
    depends = {in_sdxl(loss): cells.settings_of(training) for loss, training in trainings.items()}
    return [PictureRow(row.name, scores_of(row, depends.get(row.name), cells)) for row in picture_rows(find)]


# Figures of pictures that could stand for the objects, with whether more is better.
STAND_INS = {"fid": False, "kid": False, "cmmd": False, "sentences": True, "sentences after 77": True}


@dataclass(frozen=True)
class Order:
    """How a figure orders the rows, against the order of their objects.

    Attributes:
        pairs: number of pairs of rows whose objects differ for sure.
        agree: number of them that the figure puts in the same order.
    """

    pairs: int
    agree: int


def orders(rows: list[PictureRow]) -> dict[str, Order]:
    """The order of rows by each stand-in, against that of the objects."""
    pairs = [
        (one, other)
        for one, other in itertools.combinations(rows, 2)
        if is_sure(difference(one.scores["objects"], other.scores["objects"]))
    ]
    found = {}
    for name, more_is_better in STAND_INS.items():
        values = {row.name: _value(row.scores[name]) for row in rows}
        if any(value is None for value in values.values()):
            continue
        agree = sum(
            (values[one.name] - values[other.name] > 0)
            == ((_value(one.scores["objects"]) > _value(other.scores["objects"])) == more_is_better)
            for one, other in pairs
        )
        found[name] = Order(len(pairs), agree)
    return found


def correlation_of_prompts(row: PictureRow, figure: str, objects: str) -> float | None:
    """Pearson's correlation over prompts of a figure and of the share of right objects; None if either is constant."""
    pairs = [
        (one, other)
        for one, other in zip(row.scores[figure], row.scores[objects], strict=True)
        if one is not None and other is not None
    ]
    if len(pairs) < 3 or min(np.std(np.asarray(pairs), axis=0)) < 1e-9:
        return None
    return float(np.corrcoef(np.asarray(pairs).T)[0, 1])


def _value(score: Any) -> Any:
    """The value of a distance, or the mean over prompts of another figure."""
    if isinstance(score, dict) or score is None:
        return score and score["value"]
    interval = mean_interval(score)
    return interval and interval.value


# Part 3: ablations


def ablations(cells: Cells) -> dict[str, dict[str, list[Ranks]]]:
    """Ranks of each seed, by ablation and value: the losses, each at its own best learning rate, and `ABLATIONS`, at
    that of the paper's loss."""
    seeds = range(cells.budget.ablation_seeds)
    found: dict[str, dict[str, list[Ranks]]] = {"loss": {}}
    for loss in LOSSES:
        of_seeds = [ranks_of(at_best_rate(loss, seed, cells), "long", cells) for seed in seeds]
        found["loss"][loss] = [ranks for ranks in of_seeds if ranks is not None]
    for name, values in ABLATIONS.items():
        found[name] = {}
        for value, flags in values.items():
            of_seeds = [ranks_of(at_best_rate(PAPER, seed, cells, flags), "long", cells) for seed in seeds]
            found[name][value] = [ranks for ranks in of_seeds if ranks is not None]
    return found


@dataclass(frozen=True)
class Verdict:
    """The miniature's answer to a sentence of the paper: the difference in points of Recall@1, by published scores."""

    claim: str
    difference: Interval | None

    @property
    def words(self) -> str:
        if self.difference is None:
            return "not known: a training diverged"
        if not is_sure(self.difference):
            return "no difference that these scenes show"
        return "as in the paper" if self.difference.value > 0 else "the other way round"


def verdicts(found: dict[str, dict[str, list[Ranks]]]) -> list[Verdict]:
    return [Verdict(claim, _difference(*(found[name][value] for name, value in pair))) for claim, *pair in CLAIMS]


def picture_verdict(rows: list[PictureRow]) -> Verdict:
    """As `verdicts`, of the paper's second task: the difference in points of right objects."""
    objects = {row.name: 100 * np.asarray(row.scores["objects"]) for row in rows}
    pair = [objects.get(in_sdxl(loss)) for loss in (PAPER, LONG_CLIP)]
    known_difference = None if any(scores is None for scores in pair) else difference(*pair)
    return Verdict("In SDXL, FineLIP is better than Long-CLIP's recipe (objects right).", known_difference)


def _difference(better: list[Ranks], worse: list[Ranks]) -> Interval | None:
    sides = [[published_hits(ranks) for ranks in side] for side in (better, worse)]
    if not all(sides):
        return None
    return difference(*(100 * np.mean(np.asarray(side), axis=0) for side in sides))


def difference(one: Any, other: Any) -> Interval:
    """The mean difference of two rows over the same scenes or families, with the interval of the paired bootstrap."""
    found = mean_interval((np.asarray(one, dtype=float) - np.asarray(other, dtype=float)).tolist())
    assert found is not None
    return found


def is_sure(found: Interval) -> bool:
    """Whether the interval of a difference leaves out 0."""
    return found.low is not None and found.high is not None and (found.low > 0 or found.high < 0)


# Part 4: beyond the paper


@dataclass(frozen=True)
class BeyondRow:
    """A row of part 4: cosines between tokens at the start and at the end of training, growth of similarity, and ranks
    on changed captions."""

    name: str
    start: dict[str, float | None] | None
    end: dict[str, float | None]
    growth: dict[str, dict[str, list[float]]]
    changed: dict[str, Ranks] = field(default_factory=dict)


def beyond(cells: Cells) -> list[BeyondRow]:
    rows = []
    for loss in MAIN:
        training = at_best_rate(loss, 0, cells)
        folder = None if training is None else cells.trained(training)
        if training is None or folder is None:
            continue
        own = cells.settings_of(training)
        start = cells.result("slots", {"start of": own}, partial(_slots, partial(load_start, training, cells)))
        is_refined = training.trains_interaction
        load = partial(load_model, folder)
        changed = {name: ranks_of(training, name, cells) or {} for name in ("long", *PERTURBATIONS)}
        rows.append(_beyond_row(loss, start, {"training": own}, load, changed, cells, is_refined))
    changed = {name: ranks_of_given(SHIPPED, name, cells) for name in ("long", *PERTURBATIONS)}
    rows.append(_beyond_row(THAT_SHIPS, None, {"model": SHIPPED}, partial(load_model, SHIPPED), changed, cells))
    return rows


def _beyond_row(
    name: str,
    start: Any,
    settings: dict[str, Any],
    load: Callable[[], FineLIPModel],
    changed: Any,
    cells: Cells,
    is_refined: bool = True,
) -> BeyondRow:
    scenes = min(cells.budget.scenes, _MOST_SCENES)
    end = cells.result("slots", {**settings, "base": base_digest()}, partial(_slots, load))
    grown = cells.result(
        "growth", {**settings, "base": base_digest(), "scenes": scenes}, lambda: growth(load(), scenes)
    )
    if not is_refined:  # without a loss of late interaction, refinement and fused similarity are of random weights
        start, end = ({kind: None if "refined" in kind else found[kind] for kind in found} for found in (start, end))
        grown = {kind: found for kind, found in grown.items() if kind.startswith("global")}
    return BeyondRow(name, start, end, grown, changed)


_MOST_SCENES = 200  # for growth: each scene has up to eight texts
_SLOT_SCENES = 50


def _slots(load: Callable[[], FineLIPModel]) -> dict[str, float | None]:
    return slot_cosines(load(), _SLOT_SCENES)


def load_start(training: Training, cells: Cells) -> FineLIPModel:
    """The model that a training begins with."""
    from accelerate.utils import set_seed

    from training.train_finelip import load_base, parse

    set_seed(training.seed)
    model = load_base(parse(training.command(cells.budget))).eval()
    return load_model(model)


# All sections


SECTIONS: dict[str, Callable[[Cells], Any]] = {
    "learning-rates": lambda cells: {loss: candidates(loss, cells) for loss in LOSSES},
    "retrieval": retrieval,
    "pictures": pictures,
    "ablations": ablations,
    "beyond": beyond,
}


def known(section: str, cells: Cells) -> Any:
    """What a section has found, from cells that may not be made; None if one of them is missing."""
    try:
        return SECTIONS[section](cells)
    except MissingError:
        return None


def trainings_of(section: str, cells: Cells) -> list[tuple[str, str, float | None, int]]:
    """The trainings that a section still needs: loss, further flags, learning rate (None for the best), and seed."""
    rates, seeds = cells.budget.learning_rates, range(cells.budget.seeds)
    losses = MAIN if section in ("retrieval", "pictures", "beyond") else tuple(LOSSES)
    wanted: list[tuple[str, str, float | None, int]] = [(loss, "", rate, 0) for loss in losses for rate in rates]
    if section == "retrieval":
        wanted += [(loss, "", None, seed) for loss in MAIN for seed in seeds if seed]
    if section == "ablations":
        seeds = range(cells.budget.ablation_seeds)
        wanted += [(loss, "", None, seed) for loss in LOSSES for seed in seeds if seed]
        changes = (flags for values in ABLATIONS.values() for flags in values.values() if flags)
        wanted += [(PAPER, flags, None, seed) for flags in changes for seed in seeds]

    def is_trained(loss: str, flags: str, rate: float | None, seed: int) -> bool:
        own = f"{LOSSES[loss]} {flags}".strip()
        return any(cells.is_trained(Training(own, one, seed)) for one in (rates if rate is None else (rate,)))

    return [training for training in wanted if not is_trained(*training)]
