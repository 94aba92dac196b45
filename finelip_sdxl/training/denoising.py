"""The denoising loss of SDXL's UNet, for pictures with encoded captions."""

from __future__ import annotations

from typing import Any, cast

import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor

from finelip_sdxl import FineLIPSDXLPipeline


class DenoisingLoss:
    """The squared error of the UNet's prediction: of the noise, or of the velocity, as the scheduler's config says.

    Args:
        pipe: the pipeline, with its UNet and its schedule of noise.
        snr_gamma: gamma of min-SNR weights of timesteps (arXiv 2303.09556, section 3.4); None for equal weights.
    """

    def __init__(self, pipe: FineLIPSDXLPipeline, snr_gamma: float | None = None) -> None:
        self.pipe, self.snr_gamma = pipe, snr_gamma
        self.noise: Any = cast(Any, DDPMScheduler).from_config(pipe.scheduler.config)

    @property
    def num_timesteps(self) -> int:
        """The number of timesteps that the UNet was trained on."""
        timesteps: int = self.noise.config.num_train_timesteps
        return timesteps

    def __call__(
        self, latents: Tensor, noise: Tensor, timesteps: Tensor, time_ids: Tensor, states: Tensor, pooled: Tensor
    ) -> Tensor:
        """Returns the loss of each picture, (batch,).

        Args:
            latents: (batch, channels, height, width), scaled for the UNet.
            noise: likewise.
            timesteps: (batch,).
            time_ids: (batch, 6).
            states: of both text encoders, (batch, tokens, dim).
            pooled: (batch, dim).
        """
        unet = self.pipe.unet
        predicted = unet(
            self.noise.add_noise(latents, noise, timesteps).to(unet.dtype),
            timesteps,
            states.to(unet.dtype),
            added_cond_kwargs={"text_embeds": pooled.to(unet.dtype), "time_ids": time_ids},
        ).sample.float()
        by_velocity = self.noise.config.prediction_type == "v_prediction"
        target = self.noise.get_velocity(latents, noise, timesteps) if by_velocity else noise
        losses = F.mse_loss(predicted, target, reduction="none").flatten(1).mean(dim=1)
        if self.snr_gamma is not None:
            snr = compute_snr(self.noise, timesteps)
            losses = losses * snr.clamp(max=self.snr_gamma) / (snr + 1 if by_velocity else snr)
        return losses
