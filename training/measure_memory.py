"""Memory of one step of each stage of the alignment, at the size of real SDXL, with random weights.

    python training/measure_memory.py
    python training/measure_memory.py --batch-sizes 4 8 --resolution 512

Each row is measured in a process of its own: the most memory that the accelerator allocated or, on a CPU, the growth of
the process. Frozen weights are bfloat16, trained ones float32, with AdamW and an average of the weights; activations
are computed twice (--gradient-checkpointing). Models that a stage does not need are left out, as a real run keeps them
off the accelerator.
"""

# ruff: noqa: E402  (flags are parsed before the imports that take seconds)

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from finelip_sdxl.console import COUNT, Parser, number, quiet_imports
from finelip_sdxl.training.command_line import read_preset
from finelip_sdxl.training.flags.align_adapter import SDXL


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    flags = Parser(prog="measure_memory.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, captions, both = flags.add_argument, read_preset(SDXL)["batch_size"], "to measure (default: both)"
    add("--stages", nargs="+", choices=("text", "image"), default=("text", "image"), help=f"stages {both}")
    add("--methods", nargs="+", choices=("adapter", "lora"), default=("adapter", "lora"), help=f"methods {both}")
    text = f"numbers of captions in a step (default: {captions})"
    add("--batch-sizes", nargs="+", type=COUNT, default=(captions,), metavar="N", help=text)
    text = "width and height of images (default: %(default)s)"
    add("--resolution", type=number(int, least=64, most=4096), default=512, metavar="PIXELS", help=text)
    add("--device", choices=("cpu", "cuda"), help="device to measure (default: cuda if there is one)")
    return flags.parse_args(arguments)


if __name__ == "__main__":  # wrong flags are refused before the imports that take seconds and would print warnings
    quiet_imports()
    parse()

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from finelip_sdxl import FineLIPSDXLPipeline
from finelip_sdxl.data import open_dataset
from finelip_sdxl.miniature.tokenizer import build_tokenizer
from finelip_sdxl.options import ENCODERS, STOCK_POSITIONS
from finelip_sdxl.report import most_memory, report_header
from finelip_sdxl.sdxl_sizes import BIG_G, CLIP_L, UNET
from finelip_sdxl.training.alignment import Alignment, ImageAlignment, TextAlignment
from finelip_sdxl.training.memory import save_memory

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that this runs as a script

from training.align_adapter import Adapter, Lora, num_long

GIB = 2**30


def build_pipeline(stage: str, method: str, device: str) -> StableDiffusionXLPipeline:
    """Build the parts of stock that a stage needs. The miniature's tokenizers suffice: SDXL's know more words."""
    tokenizers = build_tokenizer(), build_tokenizer(pad_token="!")
    special = {"bos_token_id": tokenizers[0].bos_token_id, "eos_token_id": tokenizers[0].eos_token_id}
    needs_encoders = stage == "text" or method == "lora"
    with torch.device("meta"):
        encoders = (
            CLIPTextModel(CLIPTextConfig(**CLIP_L, **special)),
            CLIPTextModelWithProjection(CLIPTextConfig(**BIG_G, **special)),
        )
        unet = UNet2DConditionModel(**UNET)
    return StableDiffusionXLPipeline(
        vae=None,
        text_encoder=fill(encoders[0], device if needs_encoders else "meta"),
        text_encoder_2=fill(encoders[1], device if needs_encoders else "meta"),
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=fill(unet, device if stage == "image" else "meta"),
        scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
    )


def fill(model: nn.Module, device: str) -> nn.Module:
    """Give memory to a model on the meta device. The values of its weights do not matter here."""
    model.to(torch.bfloat16).requires_grad_(False).eval()
    if device == "meta":
        return model
    model.to_empty(device=device)
    for parameter in model.parameters():
        parameter.fill_(0.01)
    for module in model.modules():
        if hasattr(module, "position_ids"):
            module.position_ids = torch.arange(module.position_ids.shape[-1], device=device)[None]
    return model


def measure(stage: str, method: str, batch_size: int, resolution: int, device: str) -> tuple[float, float]:
    """Return the peak memory in GiB, and the seconds, of one step."""
    before = memory(device)
    stock = build_pipeline(stage, method, device)
    pipe = FineLIPSDXLPipeline(**stock.components, short_prompt_encoder="long", length_buckets=(STOCK_POSITIONS,))
    if stage == "text" or method == "lora":
        pipe.swap_text_encoders()
        for name in ENCODERS:  # a FineLIP shares no weights with stock
            stretched = getattr(pipe, name)
            with torch.device("meta"):
                finelip = type(stretched)(stretched.config)
            setattr(pipe, name, fill(finelip, device))
    preset = read_preset(SDXL)
    trained = Lora(pipe, preset["rank"]) if method == "lora" else Adapter(pipe, preset["hidden_dim"])
    if method == "adapter":
        trained.adapter.to(device)
    if stage == "image" or method == "lora":
        save_memory(pipe)
    losses = {"text": TextAlignment(pipe, stock, rarity={}), "image": ImageAlignment(pipe)}
    task = Alignment(trained.parameters, losses)
    average = EMAModel(trained.parameters)
    optimizer = torch.optim.AdamW(trained.parameters)

    started = time.perf_counter()
    with torch.autocast(device, torch.bfloat16):
        batch = text_batch(batch_size) if stage == "text" else image_batch(batch_size, resolution, method, device)
        loss = task(stage, batch)["loss"]
    loss.backward()
    optimizer.step()
    average.step(trained.parameters)
    seconds = time.perf_counter() - started
    return (memory(device) - before) / GIB, seconds


def text_batch(batch_size: int) -> dict[str, list[str]]:
    scenes = open_dataset(f"miniature:{batch_size}", split="train")
    longs = num_long(argparse.Namespace(batch_size=batch_size, short_share=0.4))
    return {
        "long": [scenes.captions(index)[0] for index in range(longs)],
        "short": [scenes.short_caption(index) for index in range(longs, batch_size)],
    }


def image_batch(batch_size: int, resolution: int, method: str, device: str) -> dict[str, list[dict]]:
    captions = text_batch(batch_size)
    groups = []
    for kind, tokens in (("long", 248), ("short", STOCK_POSITIONS)):
        count = len(captions[kind])
        shape = (count, 4, resolution // 8, resolution // 8)
        group = {
            "latents": torch.randn(shape, device=device),
            "noise": torch.randn(shape, device=device),
            "timesteps": torch.full((count,), 500, device=device),
            "time_ids": torch.full((count, 6), resolution, device=device),
        }
        if method == "lora":
            group["captions"] = captions[kind]
        else:
            group["states"] = torch.randn(count, tokens, CLIP_L["hidden_size"] + BIG_G["hidden_size"], device=device)
            group["pooled"] = torch.randn(count, BIG_G["projection_dim"], device=device)
        groups.append(group)
    return {"groups": groups}


def memory(device: str) -> float:
    """Return the peak memory so far, in bytes."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return most_memory()


def main() -> None:
    arguments = parse()
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    print(report_header(device=torch.cuda.get_device_name() if device == "cuda" else None), end="\n\n")
    print("| stage | method | captions a step | resolution | GiB | s |\n|---|---|---|---|---|---|")
    for stage in arguments.stages:
        for method in arguments.methods:
            for batch_size in arguments.batch_sizes:
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                    size = arguments.resolution
                    gib, seconds = process.submit(measure, stage, method, batch_size, size, device).result()
                shown = size if stage == "image" else "–"
                print(f"| {stage} | {method} | {batch_size} | {shown} | {gib:.1f} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
