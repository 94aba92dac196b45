"""The command `evaluate images`: pictures of many prompts, drawn in several columns, scored and reported."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finelip_sdxl.cli.drawing import add_parts, open_comparison, part_parameters
from finelip_sdxl.cli.options import (
    PICTURES,
    Commands,
    add_command,
    add_drawing,
    add_encoding,
    add_refiner,
    check_models,
    device_and_dtype,
)
from finelip_sdxl.comparison.settings import Settings, check_columns
from finelip_sdxl.console import COUNT, announce, number, quiet_diffusers, refused_once
from finelip_sdxl.names import data_place
from finelip_sdxl.options import COLUMNS, LAYOUTS, PROMPT_KINDS
from finelip_sdxl.picture_evaluation.layouts import check_layout, check_options, write_layout
from finelip_sdxl.picture_evaluation.manifest import check_folder, check_settings

if TYPE_CHECKING:
    from finelip_sdxl.picture_evaluation.scores import Judges

MAX_BATCH = 4096

# The miniature's own judges; both CLIPs of its size draw as well, which the report says.
_OF_MINIATURE = {
    "features": "miniature-clip-1",
    "judge": "miniature-finelip-1",
    "sentence_judge": "miniature-clip-1",
}


def add_parser(subjects: Commands) -> None:
    text = "draw many prompts as stock SDXL, compel and FineLIP-SDXL encode them, and score and report the pictures"
    command = add_command(subjects, "images", evaluate_images, text)
    command.add_argument(
        "--data",
        default="miniature:20",
        metavar="KIND:PATH",
        help=f"prompts, read whole: {PROMPT_KINDS} (default: %(default)s)",
    )
    text = "folder of the data set's images (default: the data set's own layout)"
    command.add_argument("--images", metavar="DIR", help=text)
    command.add_argument("--split", default="test", metavar="NAME", help="part of the data (default: %(default)s)")
    text = "number of prompts, from the first (default: all)"
    command.add_argument("--max-prompts", type=COUNT, metavar="N", help=text)
    text = "folder for pictures, scores and report; a stopped run goes on in it (default: %(default)s)"
    command.add_argument("--output-dir", default="runs/images", metavar="DIR", help=text)
    text = "columns to draw, each once (default: all)"
    command.add_argument("--columns", nargs="+", choices=tuple(COLUMNS), default=tuple(COLUMNS), help=text)
    text = "number of pictures of each prompt in each column (default: %(default)s)"
    command.add_argument("--images-per-prompt", type=PICTURES, default=1, metavar="N", help=text)
    text = "folders for a published scorer, beside the pictures (default: %(default)s, the pictures alone)"
    command.add_argument("--layout", choices=LAYOUTS, default="plain", help=text)
    command.add_argument("--negative-prompt", metavar="TEXT", help="things that no picture should show (default: none)")
    add_drawing(command, seed=0)
    add_refiner(command)
    add_parts(command)
    add_encoding(command)
    own = "for the miniature its own, or else none"
    text = f"CLIP whose image features FID, KID and CMMD compare, or none (default: {own})"
    command.add_argument("--features", metavar="CLIP", help=text)
    text = f"FineLIP or Long-CLIP of 248 positions that judges whole prompts, or none (default: {own})"
    command.add_argument("--judge", metavar="CLIP", help=text)
    text = f"stock CLIP of 77 positions that judges each sentence for itself, or none (default: {own})"
    command.add_argument("--sentence-judge", metavar="CLIP", help=text)
    text = "directory or hub id of the judges' tokenizer, for checkpoint files (default: each judge's own)"
    command.add_argument("--tokenizer", metavar="NAME", help=text)
    text = "number of pictures or texts judged at a time (default: %(default)s)"
    command.add_argument("--batch-size", type=number(int, least=1, most=MAX_BATCH), default=32, metavar="N", help=text)


def evaluate_images(options: argparse.Namespace) -> None:
    """Draw the pictures that are missing, lay them out, score them, and write `report.md`, `.json` and `.html`."""
    with refused_once():
        columns, settings = _check(options)
    announce(f"Opening {options.base}…")

    quiet_diffusers()
    from finelip_sdxl.data import open_prompts
    from finelip_sdxl.picture_evaluation.generation import generate
    from finelip_sdxl.picture_evaluation.plan import PicturePlan
    from finelip_sdxl.picture_evaluation.processes import open_processes
    from finelip_sdxl.picture_evaluation.report import figure_table, write_report
    from finelip_sdxl.picture_evaluation.scores import Judges, score

    folder = Path(options.output_dir)
    with refused_once():
        prompts = open_prompts(options.data, options.split, options.images).first(options.max_prompts)
        plan = PicturePlan(prompts, columns, settings, options.images_per_prompt)
        check_layout(options.layout, plan)
    shared = open_processes(options.device)
    if shared.device is not None:
        options.device = str(shared.device)
    device, dtype = device_and_dtype(options)
    judges = _open_judges(options) if shared.is_main else Judges()
    if judges.features is not None:
        prompts.check_images()

    comparison = open_comparison(options, device, dtype)
    generate(
        plan,
        comparison,
        folder,
        part_parameters(options),
        process=shared.process,
        processes=shared.processes,
        wait=shared.wait,
    )
    if not shared.is_main:
        return
    laid_out = write_layout(options.layout, plan, folder)
    judges = judges.seen_by(comparison, columns)
    del comparison  # its memory is the judges'
    scores = score(plan, folder, judges, device=device, batch_size=options.batch_size)
    report = write_report(plan, folder, scores, options.command_line, device)
    print(*figure_table(scores, columns), sep="\n")
    for note in scores.notes:
        print(note)
    for place in (laid_out, *report):
        print(place)


def _check(options: argparse.Namespace) -> tuple[list[str], Settings]:
    """The columns and settings, after all checks that need no heavy import."""
    chosen = check_columns(options.columns)
    settings = Settings(
        "",
        options.negative_prompt or "",
        steps=options.steps,
        guidance_scale=options.guidance_scale,
        seed=options.seed,
        width=options.width,
        height=options.height,
        conditioning_adapter_scale=options.conditioning_adapter_scale,
    )
    check_options(options.layout, settings, options.images_per_prompt)
    data_place(options.data, options.images, prompts=True)
    folder = Path(options.output_dir)
    check_folder(folder)
    asked = {name: getattr(settings, name) for name in ("steps", "guidance_scale", "width", "height")}
    given = {name: value for name, value in asked.items() if value is not None}
    fixed = {name: getattr(settings, name) for name in ("negative_prompt", "seed", "conditioning_adapter_scale")}
    check_settings(folder, {**fixed, **given, "images_per_prompt": options.images_per_prompt})
    if options.base == "miniature":
        for role, name in _OF_MINIATURE.items():
            setattr(options, role, getattr(options, role) or name)
    check_models(options)
    return [column for column in COLUMNS if column in chosen], settings


def _open_judges(options: argparse.Namespace) -> Judges:
    from finelip_sdxl.evaluation.fidelity import open_judge
    from finelip_sdxl.picture_evaluation.scores import Judges

    opened: dict[str, Any] = {}
    for role in _OF_MINIATURE:
        name = getattr(options, role)
        if name not in (None, "none"):
            opened[role] = open_judge(name, role, options.tokenizer)
    return replace(Judges(), **opened)
