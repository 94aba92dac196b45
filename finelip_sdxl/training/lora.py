"""A LoRA of SDXL's UNet and text encoders: its layers, its loss, and its files in Diffusers' and kohya's layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from diffusers.training_utils import cast_training_params
from diffusers.utils import convert_state_dict_to_kohya
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from finelip_sdxl import FineLIPSDXLPipeline
from finelip_sdxl.options import ENCODERS
from finelip_sdxl.training.alignment import encode
from finelip_sdxl.training.denoising import DenoisingLoss

# Linear layers of a CLIP text encoder, by the ends of their names.
ENCODER_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
# Linear layers of the UNet's transformers, as regular expressions, by the values of `options.LORA_LAYERS`.
_ATTENTION = r"(to_q|to_k|to_v|to_out\.0)"
UNET_LAYERS = {
    "cross-attention": rf".*\.attn2\.{_ATTENTION}",
    "attention": rf".*\.attn[12]\.{_ATTENTION}",
    "transformer": rf".*\.attentions\.\d+\.(proj_in|proj_out|.*\.{_ATTENTION}|.*\.ff\.net\.(0\.proj|2))",
}

DIFFUSERS_FILE, KOHYA_FILE = "pytorch_lora_weights.safetensors", "lora_kohya.safetensors"


def encoder_lora(name: str, encoder: Any, rank: int) -> LoraConfig:
    """Returns the LoRA of a text encoder, of all layers that change what the UNet gets.

    The UNet gets the states before the last layer. Behind it comes only the second encoder's pooled vector.
    """
    layers = encoder.config.num_hidden_layers
    trained = layers if name == "text_encoder_2" else layers - 1
    return LoraConfig(
        r=rank, lora_alpha=rank, target_modules=list(ENCODER_LAYERS), layers_to_transform=list(range(trained))
    )


class Lora:
    """Trains a LoRA of a pipeline's UNet, and perhaps of its text encoders; nothing else of it gets a gradient.

    Args:
        pipe: the pipeline.
        rank: rank of all low-rank changes. Alpha is the rank, so the changes count as they are.
        layers: which layers of the UNet, a key of `UNET_LAYERS`.
        with_encoders: also train the text encoders.
    """

    def __init__(self, pipe: FineLIPSDXLPipeline, rank: int, layers: str, with_encoders: bool) -> None:
        for model in pipe.components.values():
            if isinstance(model, nn.Module):
                model.requires_grad_(False)
        self.rank, self.models = rank, dict[str, nn.Module](unet=pipe.unet)
        pipe.unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=UNET_LAYERS[layers]))
        for name in ENCODERS if with_encoders else ():
            self.models[name] = encoder = getattr(pipe, name)
            encoder.add_adapter(encoder_lora(name, encoder, rank))
        cast_training_params([*self.models.values()], dtype=torch.float32)
        self.parameters = [
            parameter for model in self.models.values() for parameter in model.parameters() if parameter.requires_grad
        ]

    def save_pretrained(self, folder: Path) -> None:
        """Writes `DIFFUSERS_FILE`, for `load_lora_weights`, and `KOHYA_FILE`, for ComfyUI, A1111 and sd-scripts."""
        weights = {
            name: get_peft_model_state_dict(model, save_embedding_layers=False) for name, model in self.models.items()
        }
        for name in weights.keys() & ENCODERS.keys():
            # transformers 5 has no module `text_model` in the first encoder; all files name it, and Diffusers knows.
            weights[name] = {f"text_model.{key.removeprefix('text_model.')}": own for key, own in weights[name].items()}
        StableDiffusionXLPipeline.save_lora_weights(
            folder, weight_name=DIFFUSERS_FILE, **{f"{name}_lora_layers": own for name, own in weights.items()}
        )
        named = {f"{name}.{key}": tensor for name, own in weights.items() for key, tensor in own.items()}
        save_file(convert_state_dict_to_kohya(named), folder / KOHYA_FILE, metadata=self._kohya_metadata())

    def _kohya_metadata(self) -> dict[str, str]:
        """What other programs show of a LoRA, and by what they know that it belongs to an SDXL."""
        rank = str(self.rank)
        return {
            "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
            "ss_base_model_version": "sdxl_base_v1-0",
            "ss_network_module": "networks.lora",
            "ss_network_dim": rank,
            "ss_network_alpha": rank,
        }


class LoraTask(nn.Module):
    """The loss of a batch, as one module, for training with several processes.

    Args:
        pipe: the pipeline with the LoRA.
        lora: the LoRA.
        snr_gamma: see `DenoisingLoss`.
    """

    def __init__(self, pipe: FineLIPSDXLPipeline, lora: Lora, snr_gamma: float | None) -> None:
        super().__init__()
        self.trained = nn.ParameterList(lora.parameters)  # so a checkpoint holds these alone, and nothing of SDXL
        self.pipe, self.losses = pipe, DenoisingLoss(pipe, snr_gamma)
        with torch.no_grad():
            self.absent = encode_absent(pipe)

    def forward(self, items: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Returns the mean loss. Pictures of one size with captions of one length go through the UNet together.

        Args:
            items: of each picture `latents` and `noise`, (channels, height, width), `timesteps`, (), `time_ids`, (6,),
                `dropped`, whether it counts as one without a caption, and its `caption`, or else `caption_states`,
                (tokens, dim), and `caption_pooled`, (dim,).
        """
        groups: dict[tuple[Any, ...], list[dict[str, Tensor]]] = {}
        for item in items:
            states, pooled = self._conditioning(item)
            tensors = {name: item[name] for name in ("latents", "noise", "timesteps", "time_ids")}
            tensors |= {"states": states.to(tensors["latents"].device), "pooled": pooled.to(tensors["latents"].device)}
            groups.setdefault((tensors["latents"].shape, states.shape), []).append(tensors)
        losses = [
            self.losses(**{name: torch.stack([tensors[name] for tensors in group]) for name in group[0]})
            for group in groups.values()
        ]
        return {"loss": torch.cat(losses).mean()}

    def _conditioning(self, item: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The UNet's input for a caption, or for none."""
        if "caption_states" in item:
            return self.absent if item["dropped"] else (item["caption_states"], item["caption_pooled"])
        states, pooled = (encoded[0] for encoded in encode(self.pipe, [item["caption"]]))
        if item["dropped"]:
            absent, absent_pooled = encode_absent(self.pipe)
            # With the caption times 0: several processes need a gradient of every parameter, if only of 0.
            return absent + 0 * states.sum(), absent_pooled + 0 * pooled.sum()
        return states, pooled


def encode_absent(pipe: FineLIPSDXLPipeline) -> tuple[Tensor, Tensor]:
    """Returns what the UNet gets without a text, (tokens, dim) and (dim,): what the pipeline takes for an absent
    negative prompt, so that guidance pushes away from what was trained as that."""
    _, states, _, pooled = cast(Any, pipe).encode_prompt("a", do_classifier_free_guidance=True)
    return states[0], pooled[0]
