"""LoRAs that the prompts of one call name: loaded before it, and gone after it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finelip_sdxl.prompts.lora_tags import find_loras, take_loras


@contextmanager
def loras_of(pipe: Any, prompts: Iterable[Any], folder: Path | None) -> Iterator[None]:
    """Within this context, a pipeline has the LoRAs that its prompts name, with their scales.

    Args:
        pipe: the pipeline.
        prompts: texts or lists of texts; anything else names none.
        folder: the folder of the LoRAs; with None the context does nothing.

    Raises:
        ValueError: a LoRA is not there or does not fit this SDXL; or the pipeline has LoRAs already, whose scales would
            be lost.
    """
    texts = [text for prompt in prompts for text in (prompt if isinstance(prompt, list | tuple) else [prompt])]
    tags = [tag for text in texts if isinstance(text, str) for tag in take_loras(text)[1]]
    if folder is None or not tags:
        yield
        return
    scales = find_loras(tags, folder)
    if any(pipe.get_list_adapters().values()):
        raise ValueError(
            f"The prompt names {tags[0]}, but this pipeline has LoRAs already: unload them by unload_lora_weights and"
            " name all of them in the prompt, or load this one yourself and leave `lora_dir` out."
        )
    try:
        for number, file in enumerate(scales):
            _load(pipe, file, f"prompt_{number}")
        pipe.set_adapters([f"prompt_{number}" for number in range(len(scales))], list(scales.values()))
        yield
    finally:
        pipe.unload_lora_weights()


def _load(pipe: Any, file: Path, name: str) -> None:
    try:
        pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name, use_safetensors=True)
    except Exception as error:  # Diffusers, peft and safetensors raise many kinds for files that are no LoRA
        raise ValueError(
            f"{file} cannot be loaded into this SDXL ({' '.join(str(error).split()):.200}): name a LoRA that was"
            " trained from an SDXL."
        ) from error
    if not any(name in adapters for adapters in pipe.get_list_adapters().values()):
        raise ValueError(f"{file} holds no weights for this SDXL: name a LoRA that was trained from an SDXL.")
