"""The command `evaluate`: recall of images by texts and of texts by images; `evaluate images` has a file of its own."""

import argparse
import json

from finelip_sdxl.cli import evaluate_images
from finelip_sdxl.cli.options import DTYPES, Commands, add_command, add_device, check_models, open_device
from finelip_sdxl.cli.output import output_file
from finelip_sdxl.console import COUNT, announce, number, quiet_transformers
from finelip_sdxl.files import written_whole
from finelip_sdxl.names import data_place
from finelip_sdxl.options import DATA_KINDS
from finelip_sdxl.report import report_entries

MAX_BATCH = 4096
NAMED = 5  # unreadable images that the screen names


def add_parser(commands: Commands) -> None:
    group = commands.add_parser("evaluate", help="measure a model", description="Measure a model.")
    subjects = group.add_subparsers(dest="subject", required=True, metavar="retrieval | images")
    add_retrieval(subjects)
    evaluate_images.add_parser(subjects)


def add_retrieval(subjects: Commands) -> None:
    text = "measure how well texts find their images, and images their texts"
    command = add_command(subjects, "retrieval", evaluate_retrieval, text)
    command.add_argument(
        "--data",
        default="miniature",
        metavar="KIND:PATH",
        help=f"images with captions: {DATA_KINDS} (default: %(default)s)",
    )
    text = "folder of the images (default: the data set's own layout)"
    command.add_argument("--images", metavar="DIR", help=text)
    command.add_argument("--split", default="test", metavar="NAME", help="part of the data (default: %(default)s)")
    command.add_argument(
        "--model",
        default="miniature-finelip-1",
        metavar="CLIP",
        help="checkpoint, directory or hub id of a FineLIP, Long-CLIP or CLIP, or miniature-clip-1 "
        "(default: %(default)s, the small one that comes with the package)",
    )
    command.add_argument(
        "--tokenizer", metavar="NAME", help="directory or hub id of a tokenizer (default: the model's)"
    )
    command.add_argument(
        "--no-stretch",
        dest="stretch",
        action="store_false",
        help="keep a CLIP's 77 positions, and cut texts there (default: stretch to 248)",
    )
    text = "length at which texts are cut, start and end token included (default: the model's positions)"
    command.add_argument("--max-tokens", type=COUNT, metavar="N", help=text)
    text = "fuse also by weights of 0.0, 0.1, … 1.0 for the global similarity (default: by 0.8 alone)"
    command.add_argument("--fusion-sweep", action="store_true", help=text)
    text = "number of images or texts encoded at a time (default: %(default)s)"
    command.add_argument("--batch-size", type=number(int, least=1, most=MAX_BATCH), default=64, metavar="N", help=text)
    add_device(command)
    command.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="type of all weights (default: %(default)s)"
    )
    command.add_argument("--json", metavar="FILE", help="file for the figures, as shares from 0 to 1")


def evaluate_retrieval(options: argparse.Namespace) -> None:
    """Print recall in both directions as a table, and write it to the JSON file of `--json`."""
    json_file = None if options.json is None else output_file("--json", options.json)
    check_models(options)
    data_place(options.data, options.images)
    announce(f"Opening {options.model}…")

    quiet_transformers()
    import torch

    from finelip_sdxl import evaluation
    from finelip_sdxl.checkpoints.load import load_finelip
    from finelip_sdxl.data import load_image_processor, load_tokenizer, open_dataset
    from finelip_sdxl.stretch import FACTOR

    device, factor = open_device(options.device), FACTOR if options.stretch else 1
    data = open_dataset(options.data, options.split, images=options.images)
    model = load_finelip(options.model, dtype=getattr(torch, options.dtype), factor=factor)
    model.to(device)  # type: ignore[arg-type]  # transformers has wrong types for it
    vision = model.config.vision_config
    if vision is None:
        raise ValueError(f"{options.model} has no image tower: pass a whole CLIP or FineLIP, not a text encoder alone.")
    positions = model.config.text_config.max_position_embeddings
    result = evaluation.evaluate_retrieval(
        model,
        data,
        load_tokenizer(options.tokenizer or options.model, positions),
        load_image_processor(options.model, vision.image_size),
        fusion_sweep=options.fusion_sweep,
        batch_size=options.batch_size,
        max_tokens=options.max_tokens,
    )

    tokens = options.max_tokens or positions
    counted = f"{result.images:,} images, {result.texts:,} texts of up to {tokens} tokens"
    print(f"{options.model} on {options.data}: {counted}")
    print(result)
    if result.unreadable:
        print(f"left out, with their captions, {len(result.unreadable):,} images that cannot be read:")
        print("\n".join(result.unreadable[:NAMED]))
        if len(result.unreadable) > NAMED:
            print(f"and {len(result.unreadable) - NAMED:,} more, which --json lists")
    if json_file is not None:
        asked = ("model", "tokenizer", "data", "images", "split", "stretch", "dtype", "batch_size")
        figures = {
            **report_entries(options.command_line, device),
            "options": {name: getattr(options, name) for name in asked} | {"max_tokens": tokens},
            **result.to_dict(),
        }
        with written_whole(json_file) as temporary:
            temporary.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        print(json_file)
