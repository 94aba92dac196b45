"""The command `compare`: a prompt drawn in several ways, to one PNG file with labels."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from finelip_sdxl.cli.drawing import add_parts, open_comparison, part_parameters
from finelip_sdxl.cli.options import (
    PICTURES,
    Commands,
    add_command,
    add_drawing,
    add_encoding,
    add_prompt,
    add_refiner,
    check_models,
    chosen_prompt,
    device_and_dtype,
    settings_by_seed,
)
from finelip_sdxl.cli.output import image_files, picture_parameters, print_notice
from finelip_sdxl.comparison.settings import check_columns
from finelip_sdxl.console import announce, quiet_diffusers
from finelip_sdxl.options import COLUMNS
from finelip_sdxl.prompts.plan import EncoderPlan, counted_in

if TYPE_CHECKING:
    from finelip_sdxl.comparison.comparison import Picture


def add_parser(commands: Commands) -> None:
    text = "draw a prompt as stock SDXL, compel and FineLIP-SDXL encode it, side by side"
    command = add_command(commands, "compare", compare, text)
    add_prompt(command)
    command.add_argument("--out", default="comparison.png", metavar="PNG", help="file to write (default: %(default)s)")
    text = "columns to draw, each once (default: all)"
    command.add_argument("--columns", nargs="+", choices=tuple(COLUMNS), default=tuple(COLUMNS), help=text)
    text = "number of seeds, a row each (default: %(default)s)"
    command.add_argument("--seeds", type=PICTURES, default=1, metavar="N", help=text)
    text = "list the phrases of the prompt that acted nowhere in each column's picture"
    command.add_argument("--list-ignored", action="store_true", help=text)
    add_drawing(command)
    add_refiner(command)
    add_parts(command)
    add_encoding(command)


def compare(options: argparse.Namespace) -> None:
    """Print how many tokens each column encodes, draw all columns from every seed, and write one PNG file."""
    prompt, (file,) = chosen_prompt(options), image_files(options.out, 1)
    chosen = check_columns(options.columns)
    rows = settings_by_seed(options, prompt, options.seeds)
    check_models(options)
    announce(f"Opening {options.base}…")

    quiet_diffusers()
    from finelip_sdxl.comparison import comparison
    from finelip_sdxl.images import save_png
    from finelip_sdxl.miniature.parsing import parse_description
    from finelip_sdxl.provenance import public_name

    columns = [column for column in COLUMNS if column in chosen]
    device, dtype = device_and_dtype(options)
    opened = open_comparison(options, device, dtype)
    opened.plan(options.negative_prompt or "", columns)  # a text that compel cannot parse is refused before drawing
    plans = opened.plan(prompt, columns)
    for column, plan in plans.items():
        print(f"{COLUMNS[column]} encodes {_outline(plan)}")
    for line in counted_in(plans.values()):
        print(line)
    print_notice(prompt, plans.values())

    pictures = []
    for settings in rows:
        for column in columns:
            pictures.append(opened.draw(column, settings, traced=options.list_ignored))
            seconds = f"{pictures[-1].seconds:.1f} s"
            print(f"{COLUMNS[column]} drew seed {settings.seed} in {seconds}", flush=True)
            for line in _ignored(pictures[-1]):
                print(line, flush=True)
    described = parse_description(prompt) if opened.is_miniature else ()
    parameters = {
        **picture_parameters(options, pictures[0].settings, dtype, opened.pipe),
        **part_parameters(options),
        "refiner": options.refiner and public_name(options.refiner),
        "width": pictures[0].image.width,
        "height": pictures[0].image.height,
        "columns": columns,
        "seed": rows[0].seed,
        "seeds": [settings.seed for settings in rows],
    }
    save_png(comparison.label_pictures(pictures, described), file, parameters)
    print(file)


def _ignored(picture: Picture) -> list[str]:
    """The phrases that acted nowhere in a traced picture, a line each, below their number."""
    if picture.trace is None:
        return []
    phrases = picture.trace.phrases()
    ignored = [phrase for phrase in phrases if phrase.is_ignored]
    words = [f"  {phrase.text}{'' if phrase.is_encoded else ' (cut)'}" for phrase in ignored]
    return [f"  {len(ignored)} of {len(phrases)} phrases acted nowhere{':' if ignored else ''}", *words]


def _outline(plan: EncoderPlan) -> str:
    """A plan's tokens in one line. Start and end token are counted once, however many windows there are."""
    encoded = sum(len(window.token_ids) for window in plan.windows) + 2
    windows = "1 window" if len(plan.windows) == 1 else f"{len(plan.windows)} windows"
    cut = f"{plan.cut_tokens} are CUT" if plan.cut_tokens else "nothing is cut"
    return f"{encoded} of {encoded + plan.cut_tokens} tokens, in {windows} of {plan.positions} positions; {cut}"
