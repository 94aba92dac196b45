"""The command `tokens`: the plan of a prompt for each text encoder."""

import argparse
from typing import Any

from finelip_sdxl.cli.options import (
    Commands,
    add_base,
    add_command,
    add_encoding,
    add_prompt,
    chosen_prompt,
    config_source,
    loading_arguments,
)
from finelip_sdxl.console import quiet_transformers
from finelip_sdxl.options import (
    ENCODERS,
    LENGTH_BUCKETS,
    OVERFLOW,
    SHORT_PROMPT_ENCODER,
    STOCK_POSITIONS,
    WEIGHTING,
    check_choice,
    check_length_buckets,
    check_texts,
)
from finelip_sdxl.prompts.plan import EncoderSpec, plan_prompts


def add_parser(commands: Commands) -> None:
    command = add_command(
        commands, "tokens", tokens, "show the plan of a prompt: windows, lengths and cut tokens of each text encoder"
    )
    add_prompt(command)
    add_base(command)
    add_encoding(command, hidden_states=False)


def tokens(options: argparse.Namespace) -> None:
    """Print the plan of a prompt for each text encoder. Loads tokenizers and configs, but no weights."""
    prompt = check_texts("prompt", chosen_prompt(options))
    negative = None if options.negative_prompt is None else check_texts("negative_prompt", options.negative_prompt)
    described = config_source(options)
    if described is None:
        raise ValueError(f"{options.base} holds weights alone: pass --config with an SDXL that has its tokenizers.")
    specs, saved = _encoder_specs(described)
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
    )
    print(report)


def _encoder_specs(base: str) -> tuple[list[EncoderSpec], dict[str, Any]]:
    """The text encoders that `from_pretrained` makes of a base, and the options that are saved with the base."""
    quiet_transformers()
    from diffusers import DiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTokenizer

    from finelip_sdxl.pipelines.old_names import with_new_names
    from finelip_sdxl.provenance import Provenance
    from finelip_sdxl.stretch import FACTOR, KEEP

    index = with_new_names(DiffusionPipeline.load_config(base))
    specs = []
    for encoder, tokenizer in ENCODERS.items():
        if not (index.get(encoder) or [None])[0]:
            continue
        config: Any = CLIPTextConfig.from_pretrained(base, subfolder=encoder)
        positions = config.max_position_embeddings
        specs.append(
            EncoderSpec(
                encoder,
                CLIPTokenizer.from_pretrained(base, subfolder=tokenizer),
                positions=KEEP + FACTOR * (positions - KEEP) if positions <= STOCK_POSITIONS else positions,
                has_stock=Provenance.of(config).is_stock(positions) or f"stock_{encoder}" in index,
            )
        )
    if not specs or "text_encoder_2" not in index:
        raise ValueError(f"{base} lacks the CLIP text encoders of an SDXL: pass another base.")
    return specs, index
