"""The command `compare`."""

import argparse

from finelip_sdxl.cli.options import chosen_prompt, device_and_dtype, loading_arguments, settings_by_seed
from finelip_sdxl.cli.output import image_files, picture_parameters
from finelip_sdxl.console import quiet_transformers
from finelip_sdxl.prompts.plan import EncoderPlan

COLUMNS = ("stock", "compel", "finelip")  # the keys of finelip_sdxl.comparison.settings.COLUMNS, whose import is heavy


def compare(options: argparse.Namespace) -> None:
    """A prompt, read in several ways and drawn from one or more seeds, to one picture with labels."""
    prompt, (file,) = chosen_prompt(options), image_files(options.out, 1)
    columns = [column for column in COLUMNS if column in options.columns]

    quiet_transformers()
    from finelip_sdxl.comparison import comparison
    from finelip_sdxl.images import save_png
    from finelip_sdxl.miniature.parsing import parse_description
    from finelip_sdxl.provenance import public_name

    rows = settings_by_seed(options, prompt, options.seeds)
    device, dtype = device_and_dtype(options)
    opened = comparison.Comparison.load(
        options.base,
        refiner=options.refiner,
        device=device,
        offload=options.offload,
        dtype=dtype,
        **loading_arguments(options),
    )
    opened.read(options.negative_prompt or "", columns)  # what compel cannot parse is refused before anything is drawn
    for column, plan in opened.read(prompt, columns).items():
        print(f"{comparison.COLUMNS[column]} reads {_outline(plan)}")

    pictures = []
    for settings in rows:
        for column in columns:
            pictures.append(opened.draw(column, settings))
            seconds = f"{pictures[-1].seconds:.1f} s"
            print(f"{comparison.COLUMNS[column]} drew seed {settings.seed} in {seconds}", flush=True)
    described = parse_description(prompt) if opened.is_miniature else ()
    parameters = {
        **picture_parameters(options, prompt, dtype, opened.pipe),
        "refiner": options.refiner and public_name(options.refiner),
        "width": pictures[0].image.width,
        "height": pictures[0].image.height,
        "columns": columns,
        "seed": rows[0].seed,
        "seeds": [settings.seed for settings in rows],
    }
    save_png(comparison.label_pictures(pictures, described), file, parameters)
    print(file)


def _outline(plan: EncoderPlan) -> str:
    """What a plan holds of its text in one line; start and end token are counted once, however many windows."""
    read = sum(len(window.token_ids) for window in plan.windows) + 2
    windows = "1 window" if len(plan.windows) == 1 else f"{len(plan.windows)} windows"
    cut = f"{plan.cut_tokens} are CUT" if plan.cut_tokens else "nothing is cut"
    return f"{read} of {read + plan.cut_tokens} tokens, in {windows} of {plan.positions} positions; {cut}"
