"""Fine-tunes the miniature as people fine-tune SDXL: UNet and both text encoders, on short captions of something new.

    python training/miniature/finetune.py --runs runs/finetune

The something is a word for a color that the miniature does not know. What comes out is a stock SDXL of 77 positions,
<runs>/fine_tune; benchmarks/miniature_merging.py asks what becomes of the word where its text encoders get 248
positions. Twenty minutes on one CPU core.
"""

from __future__ import annotations

from new_color import make_new_scene  # isort: skip  # before what draws

import torch
import torch.nn.functional as F
from common import parser, train
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from torch import nn

from finelip_sdxl.miniature import miniature_path
from finelip_sdxl.miniature.captions import short_caption
from finelip_sdxl.miniature.drawing import IMAGE_SIZE, draw_batch


def main() -> None:
    flags = parser(__doc__, steps=400, batch_size=24, learning_rate=3e-4)
    arguments = flags.parse_args()
    device = arguments.device
    pipe = StableDiffusionXLPipeline.from_pretrained(miniature_path(), torch_dtype=torch.float32).to(device)
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    encoders = (pipe.text_encoder, pipe.text_encoder_2)
    pipe.vae.eval()

    def encode(texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Both encoders' penultimate states side by side, and the second's pooled vector."""
        states, pooled = [], torch.empty(0)
        for encoder, tokenizer in zip(encoders, (pipe.tokenizer, pipe.tokenizer_2), strict=True):
            ids = tokenizer(texts, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
            output = encoder(ids.to(device), output_hidden_states=True)
            states.append(output.hidden_states[-2])
            pooled = output[0]
        return torch.cat(states, dim=-1), pooled

    def step_loss(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        size = arguments.batch_size
        scenes = [make_new_scene(f"fine-tune-{step * size + k}") for k in range(size)]
        absent = torch.rand(size)
        texts = [
            "" if absent[k] < 0.03 else short_caption(scene, f"fine-tune-{step}-{k}").text
            for k, scene in enumerate(scenes)
        ]
        zero = (absent > 0.9).to(device)
        with torch.no_grad():
            clean = pipe.vae.encode(draw_batch(scenes).to(device)).latent_dist.mode() * pipe.vae.config.scaling_factor
        time_ids = torch.tensor([[IMAGE_SIZE, IMAGE_SIZE, 0, 0, IMAGE_SIZE, IMAGE_SIZE]], device=device).repeat(size, 1)
        noise = torch.randn_like(clean)
        # More of the noisy steps, where the text matters.
        time = (torch.rand(size, device=device).sqrt() * scheduler.config.num_train_timesteps).long()
        noisy = scheduler.add_noise(clean, noise, time)
        # A CPU without instructions for bfloat16 takes ten times as long with it.
        with torch.autocast(device, torch.bfloat16, enabled=device != "cpu"):
            states, pooled = encode(texts)
            states = states.float().masked_fill(zero[:, None, None], 0)
            conditions = {"text_embeds": pooled.float().masked_fill(zero[:, None], 0), "time_ids": time_ids}
            predicted = pipe.unet(noisy, time, states, added_cond_kwargs=conditions).sample.float()
        loss = F.mse_loss(predicted, scheduler.get_velocity(clean, noise, time))
        return loss, {"loss": loss.item()}

    modules = nn.ModuleDict({"unet": pipe.unet, "text_encoder": encoders[0], "text_encoder_2": encoders[1]})
    train(arguments, "fine_tune", modules, step_loss)
    pipe.save_pretrained(arguments.runs / "fine_tune")


if __name__ == "__main__":
    main()
