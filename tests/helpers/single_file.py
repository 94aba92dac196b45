"""An SDXL as the single file in which fine-tunes are passed around: its weights under the original project's keys."""

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from finelip_sdxl.text_encoders import text_encoder_tensors

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}

UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}

VAE = {
    "conv_shortcut": "nin_shortcut",
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
    "conv_norm_out": "norm_out",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    ".resnets.": ".block.",
}

OPEN_CLIP = {
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.final_layer_norm": "ln_final",
    "text_model.encoder.layers": "transformer.resblocks",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn": "attn",
}


def save_single_file(pipe: Any, file: Path) -> None:
    """Write UNet, VAE and both text encoders of an SDXL."""
    parts = {
        "model.diffusion_model.": unet_tensors(pipe.unet),
        "first_stage_model.": vae_tensors(pipe.vae),
        "conditioner.embedders.0.transformer.": text_encoder_tensors(pipe.text_encoder),
        "conditioner.embedders.1.model.": open_clip_tensors(text_encoder_tensors(pipe.text_encoder_2)),
    }
    weights = {prefix + key: weight for prefix, part in parts.items() for key, weight in part.items()}
    save_file({key: weight.clone().contiguous() for key, weight in weights.items()}, file)


def unet_tensors(unet: Any) -> dict[str, Tensor]:
    layers = unet.config.layers_per_block
    part_of = {"resnets": "0", "attentions": "1", "downsamplers": "0.op", "upsamplers": "2.conv"}

    def place(found: re.Match) -> str:
        way, block, kind, layer = found[1], int(found[2]), found[3], int(found[4])
        last = kind in ("downsamplers", "upsamplers")
        number = block * (layers + 1) + (layers if last else layer) + (way == "down")
        part = part_of[kind]
        if kind == "upsamplers" and not hasattr(unet.up_blocks[block], "attentions"):
            part = "1.conv"
        return f"{'input' if way == 'down' else 'output'}_blocks.{number}.{part}"

    tensors = {}
    for key, weight in unet.state_dict().items():
        new = replace(key, RESNET) if ".resnets." in key else key
        new = re.sub(r"^(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)(?:\.conv(?=\.))?", place, replace(new, UNET))
        tensors[new] = weight
    return tensors


def vae_tensors(vae: Any) -> dict[str, Tensor]:
    tensors, last = {}, len(vae.decoder.up_blocks) - 1  # the decoder's blocks were counted from the finest
    for key, weight in vae.state_dict().items():
        new = re.sub(r"down_blocks\.(\d+)", r"down.\1", replace(key, VAE))
        new = re.sub(r"up_blocks\.(\d+)", lambda found: f"up.{last - int(found[1])}", new)
        is_linear = ".attn_1." in new and weight.ndim == 2  # which were convolutions once
        tensors[new] = weight[..., None, None] if is_linear else weight
    return tensors


def open_clip_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {replace(key, OPEN_CLIP): weight for key, weight in tensors.items()}
    renamed["text_projection"] = renamed.pop("text_projection.weight").T
    for key in [key for key in renamed if ".q_proj." in key]:
        joined = [renamed.pop(key.replace("q_proj", name)) for name in ("q_proj", "k_proj", "v_proj")]
        renamed[key.replace("q_proj.", "in_proj_")] = torch.cat(joined)
    return renamed


def replace(text: str, names: dict[str, str]) -> str:
    for old, new in names.items():
        text = text.replace(old, new)
    return text
