"""The paper in miniature: FineLIP's claims on retrieval, generation and ablations, tested on the miniature world.

    python benchmarks/paper.py --estimate
    python benchmarks/paper.py --only learning-rates
    python benchmarks/paper.py

Trains FineLIPs of the miniature with training/train_finelip.py, compares them, draws with them, and writes
docs/results/paper.md with its plots. Every training and every figure is a cell in --output-dir, kept by its settings
and made once. So a stopped run, even after kill -9, goes on, and sections can be made one after the other with --only;
the page then has those that are complete. --estimate says how long it takes: the default is meant for about four
hours of two cores. A GPU is used if there is one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that this runs as a script

from finelip_sdxl.console import COUNT, Parser, number, quiet_diffusers, quiet_imports
from finelip_sdxl.files import check_file, check_writable
from finelip_sdxl.report import command_line
from finelip_sdxl.training.command_line import run_recipe

if TYPE_CHECKING:
    from benchmarks.miniature_paper.cells import Cells

# By what it needs: those before make what those after share.
SECTION_NAMES = ("learning-rates", "retrieval", "pictures", "ablations", "beyond")
FAMILY = 5  # scenes of a family of the miniature; batches and scenes hold whole ones
# Minutes of two cores beside trainings, a rough estimate for the default numbers of scenes and pictures.
MINUTES = {"learning-rates": 15, "retrieval": 10, "pictures": 30, "ablations": 25, "beyond": 15}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        prog="paper.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add, default = parser.add_argument, "(default: %(default)s)"
    rate = number(float, above=0, most=1)
    add("--output-dir", type=Path, default=Path("runs/paper"), metavar="FOLDER", help=f"folder of all cells {default}")
    page = Path("docs/results/paper.md")
    add("--page", type=Path, default=page, metavar="FILE", help=f"page to write, with plots beside it {default}")
    text = f"sections to make: {', '.join(SECTION_NAMES)} (default: all)"
    add("--only", nargs="+", choices=SECTION_NAMES, default=SECTION_NAMES, metavar="SECTION", help=text)
    add("--steps", type=COUNT, default=150, metavar="N", help=f"steps of each training {default}")
    add("--batch-size", type=COUNT, default=40, metavar="PAIRS", help=f"pairs of a step, a multiple of 5 {default}")
    text = f"learning rates, of which each loss gets its best {default}"
    add("--learning-rates", nargs="+", type=rate, default=[1e-4, 3e-4, 1e-3], metavar="X", help=text)
    add("--seeds", type=COUNT, default=3, metavar="N", help=f"seeds of the rows of retrieval {default}")
    add("--ablation-seeds", type=COUNT, default=1, metavar="N", help=f"seeds of the ablations {default}")
    add(
        "--scenes", type=COUNT, default=500, metavar="N", help=f"unseen scenes for retrieval, a multiple of 5 {default}"
    )
    add("--pictures", type=number(int, least=2), default=150, metavar="N", help=f"pictures of each row {default}")
    text = "steps of a picture (default: as the miniature recommends)"
    add("--drawing-steps", type=COUNT, metavar="N", help=text)
    add("--estimate", action="store_true", help="print what is left and its time, and make nothing")
    options = parser.parse_args(arguments)
    for flag in ("batch_size", "scenes"):
        if (value := getattr(options, flag)) % FAMILY:
            name = f"--{flag.replace('_', '-')}"
            parser.error(f"{name} is {value}; expected a multiple of {FAMILY}, the scenes of a family.")
    if len(set(options.learning_rates)) < len(options.learning_rates):
        parser.error("--learning-rates names one twice: name each once.")
    try:
        check_writable(options.output_dir)
        check_file(options.page)
    except OSError as error:
        parser.error(str(error))
    options.command = command_line("python benchmarks/paper.py", sys.argv[1:] if arguments is None else arguments)
    return options


def print_estimate(cells: Cells, sections: Sequence[str]) -> None:
    """Prints the trainings that each section still needs, and the time they take. Trainings that an earlier section
    makes count there alone."""
    from benchmarks.miniature_paper.sections import trainings_of

    seen: set[tuple[str, str, float | None, int]] = set()
    minutes_each = cells.seconds_per_step() * cells.budget.steps / 60
    total = 0.0
    for section in sections:
        wanted = [training for training in trainings_of(section, cells) if training not in seen]
        seen.update(wanted)
        other = MINUTES[section]
        minutes = len(wanted) * minutes_each + other
        total += minutes
        text = f"{section}: {len(wanted)} trainings left of {minutes_each:.1f} min, and up to {other} min of comparing"
        print(f"{text}: about {minutes:.0f} min", file=sys.stderr)
    print(f"in all about {total / 60:.1f} h", file=sys.stderr, flush=True)


def make(options: argparse.Namespace) -> None:
    """Makes the sections, and writes the page after each."""
    quiet_imports()

    from benchmarks.miniature_paper.cells import Budget, Cells
    from benchmarks.miniature_paper.page import write_page
    from benchmarks.miniature_paper.sections import SECTIONS

    quiet_diffusers()
    budget = Budget(
        steps=options.steps,
        batch_size=options.batch_size,
        learning_rates=tuple(options.learning_rates),
        seeds=options.seeds,
        ablation_seeds=options.ablation_seeds,
        scenes=options.scenes,
        pictures=options.pictures,
        drawing_steps=options.drawing_steps,
    )
    cells = Cells(options.output_dir, budget)
    sections = [section for section in SECTION_NAMES if section in options.only]
    print_estimate(cells, sections)
    if options.estimate:
        return
    for section in sections:
        print(f"\n{section}", file=sys.stderr, flush=True)
        SECTIONS[section](cells)
        for file in write_page(options.page, cells, options.command):
            print(file)


def main(arguments: Sequence[str] | None = None) -> None:
    run_recipe("paper.py", make, parse, arguments)


if __name__ == "__main__":
    main()
