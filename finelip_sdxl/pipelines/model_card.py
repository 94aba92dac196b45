"""The model card of a shared pipeline: its parts and their sources, licenses, and its use."""

from __future__ import annotations

import re
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id

from finelip_sdxl.names import bundled_model, bundled_sdxl
from finelip_sdxl.options import ENCODERS
from finelip_sdxl.pipelines.protocol import LongPromptPipeline
from finelip_sdxl.provenance import HUB_ID, Provenance, base_of, public_name
from finelip_sdxl.text_encoders import num_positions

# Licenses of bases, where they are known here; other parts of a pipeline have their own licenses.
_LICENSES = {"stabilityai/stable-diffusion-xl-base-1.0": "openrail++"}


def model_card(pipe: LongPromptPipeline, repo_id: str) -> ModelCard:
    """The model card of a pipeline of this package. Names in it stay text: special characters are escaped.

    Args:
        pipe: the pipeline.
        repo_id: the repository where it is shared, such as `"me/long-sdxl"`.

    Returns:
        The card. Its license is the base's license if all parts come from the base, and otherwise `other`, to be
        filled in by hand.

    Raises:
        ValueError: `repo_id` is no name that the hub allows.

    Examples:
        >>> from finelip_sdxl import FineLIPSDXLPipeline
        >>> pipe = FineLIPSDXLPipeline.from_pretrained("miniature")
        >>> print(model_card(pipe, "me/tiny").content.split("## ")[1])  # doctest: +NORMALIZE_WHITESPACE
        Parts
        <BLANKLINE>
        | part | description |
        |---|---|
        | `text_encoder` | `miniature-finelip-1` in place of the base's; encodes 248 tokens |
        | `text_encoder_2` | `miniature-finelip-2` in place of the base's; encodes 248 tokens |
        | `stock_text_encoder` | the base's own; encodes prompts of up to 77 tokens as the base does |
        | `stock_text_encoder_2` | the base's own; encodes prompts of up to 77 tokens as the base does |
        | `conditioning_adapter` | aligns the text encoders with the UNet; stock Diffusers leaves it out |
        | all else | as in `miniature` |
    """
    validate_repo_id(repo_id)
    base = _public(base_of(pipe.config))
    sources = [name for name in (base, *_origins(pipe)) if name is not None]
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["stable-diffusion-xl", "long-prompts", "finelip-sdxl"],
        base_model=[name for name in sources if HUB_ID.fullmatch(name)] or None,
        **_license(pipe, base),
    )
    # `ModelCard.from_template` takes more lines, for a Jinja template of the same text with its values beside it.
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_text(pipe, repo_id, base, sources)}")


def _origins(pipe: LongPromptPipeline) -> list[str]:
    """Public names of the sources that replaced text encoders or were merged into them."""
    records = [Provenance.of(getattr(pipe, name).config) for name in ENCODERS if getattr(pipe, name) is not None]
    origins = [_public(source) for record in records for source in (record.made_from, record.merged_with)]
    return list(dict.fromkeys(name for name in origins if name is not None))


def _license(pipe: LongPromptPipeline, base: str | None) -> dict[str, Any]:
    if (bundled := bundled_sdxl(base)) is not None:
        if all(bundled_model(name) is not None for name in _origins(pipe)):
            return {"license": bundled.license}
    elif base in _LICENSES and not _origins(pipe) and pipe.conditioning_adapter is None:
        return {"license": _LICENSES[base]}
    return {"license": "other", "license_name": "those-of-its-parts"}


def _text(pipe: LongPromptPipeline, repo_id: str, base: str | None, sources: list[str]) -> str:
    parts = "\n".join(f"| {name} | {what} |" for name, what in _parts(pipe, base))
    origins = ", ".join(_named(name) for name in dict.fromkeys(sources)) or "the parts above"
    is_refiner = pipe.text_encoder is None
    kind = "FineLIPSDXLImg2ImgPipeline" if is_refiner else "FineLIPSDXLPipeline"
    return f"""# {repo_id.split("/")[-1]}

An SDXL for prompts of any length: its text encoders have 248 positions instead of 77, and longer prompts are encoded in
windows. Made with FineLIP-SDXL.

## Parts

| part | description |
|---|---|
{parts}

## Use

```python
import torch
from finelip_sdxl import {kind}

pipe = {kind}.from_pretrained("{repo_id}", dtype=torch.float16).to("cuda")
print(pipe.describe_prompt(long_prompt))
pipe(long_prompt{", image=picture" if is_refiner else ""}).images[0].save("picture.png")
```

Stock Diffusers opens it too, by `DiffusionPipeline.from_pretrained("{repo_id}")`: it pads every prompt to 248 tokens,
cuts longer prompts, and leaves out the parts that it does not know.

## License

The sources of the weights have licenses that hold here: {origins}.
"""


def _parts(pipe: LongPromptPipeline, base: str | None) -> list[tuple[str, str]]:
    rows = []
    for name in ENCODERS:
        if (encoder := getattr(pipe, name)) is not None:
            rows.append((f"`{name}`", f"{_encoder(encoder)}; encodes {num_positions(encoder)} tokens"))
    for name in ENCODERS:
        if getattr(pipe, f"stock_{name}") is not None:
            rows.append((f"`stock_{name}`", "the base's own; encodes prompts of up to 77 tokens as the base does"))
    if pipe.conditioning_adapter is not None:
        what = "aligns the text encoders with the UNet; stock Diffusers leaves it out"
        rows.append(("`conditioning_adapter`", what))
    rows.append(("all else", f"as in {_named(base)}" if base else "as in the base"))
    return rows


def _encoder(encoder: Any) -> str:
    record = Provenance.of(encoder.config)
    if (origin := _public(record.merged_with)) is not None:
        return f"the base's, with the delta of {_named(origin)} added"
    if (rows := record.stretched_from) is not None:
        return f"the base's, its {_escaped(str(rows))} positions stretched, not trained"
    if (origin := _public(record.made_from)) is not None:
        return f"{_named(origin)} in place of the base's"
    return "the base's" if num_positions(encoder) <= 77 else "trained or replaced"


def _public(source: Any) -> str | None:
    """The public name of a recorded source; a config from elsewhere may hold a path."""
    return None if source is None else public_name(source)


def _named(name: str) -> str:
    if HUB_ID.fullmatch(name):
        return f"[{name}](https://huggingface.co/{name})"
    return f"`{name}`" if re.fullmatch(r"[\w .:/+-]+", name) else _escaped(name)


def _escaped(text: str) -> str:
    """Text without any meaning in Markdown, HTML or a table's row."""
    return "".join(letter if letter.isalnum() else f"&#{ord(letter)};" for letter in " ".join(text.split()))
