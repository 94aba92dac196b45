"""The command `tokens`: the plan of a prompt for each text encoder."""

import argparse
from typing import Any

from finelip_sdxl.cli.options import (
    Commands,
    add_command,
    add_config,
    add_encoding,
    add_prompt,
    chosen_prompt,
    config_source,
    loading_arguments,
)
from finelip_sdxl.console import number, quiet_transformers
from finelip_sdxl.miniature.parsing import is_of_world
from finelip_sdxl.options import (
    EMPHASIS,
    LENGTH_BUCKETS,
    OVERFLOW,
    SHORT_PROMPT_ENCODER,
    WEIGHTING,
    check_choice,
    check_length_buckets,
    check_texts,
)
from finelip_sdxl.prompts.plan import EncoderSpec, plan_prompts
from finelip_sdxl.recommended import Recommended


def add_parser(commands: Commands) -> None:
    command = add_command(
        commands, "tokens", tokens, "show the plan of a prompt: windows, lengths and cut tokens of each text encoder"
    )
    add_prompt(command)
    text = "hub id, directory or single file of an SDXL, or miniature (default: the miniature for a text of its world,"
    command.add_argument("--base", metavar="SDXL", help=f"{text} and CLIP's vocabulary, which SDXLs share, for others)")
    add_config(command)
    text = f"denoising steps of the picture, for a prompt that changes between them (default: {Recommended.steps})"
    command.add_argument(
        "--steps", type=number(int, least=1, most=10_000), default=Recommended.steps, metavar="N", help=text
    )
    add_encoding(command, hidden_states=False)


def tokens(options: argparse.Namespace) -> None:
    """Print the plan of a prompt for each text encoder. Loads tokenizers and configs, but no weights."""
    prompt = check_texts("prompt", chosen_prompt(options))
    negative = None if options.negative_prompt is None else check_texts("negative_prompt", options.negative_prompt)
    specs, saved = _specs(options, *prompt)
    chosen = {**saved, **loading_arguments(options)}
    report = plan_prompts(
        specs,
        [prompt] * len(specs),
        None if negative is None else [negative] * len(specs),
        short_prompt_encoder=check_choice(
            "short_prompt_encoder", chosen.get("short_prompt_encoder", SHORT_PROMPT_ENCODER[0]), SHORT_PROMPT_ENCODER
        ),
        overflow=check_choice("overflow", chosen.get("overflow", OVERFLOW[0]), OVERFLOW),
        length_buckets=check_length_buckets(chosen.get("length_buckets", LENGTH_BUCKETS)),
        weighting=check_choice("weighting", chosen.get("weighting"), WEIGHTING),
        emphasis=check_choice("emphasis", chosen.get("emphasis", EMPHASIS[0]), EMPHASIS),
        steps=options.steps,
    )
    print(report)


def _specs(options: argparse.Namespace, prompt: str) -> tuple[list[EncoderSpec], dict[str, Any]]:
    """The text encoders of the base, and the options that are saved with it.

    Without a base they are those of every real SDXL or, for a text of its world, the miniature's.
    """
    counts_as_sdxl = options.base is None and options.config is None and not is_of_world(prompt)
    options.base = options.base or "miniature"
    described = config_source(options)
    if described is None:
        raise ValueError(f"{options.base} holds weights alone: pass --config with an SDXL that has its tokenizers.")

    quiet_transformers()
    from finelip_sdxl.prompts.specs import read_specs, sdxl_specs

    return (sdxl_specs(), {}) if counts_as_sdxl else read_specs(described)
