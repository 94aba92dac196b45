"""Trains the miniature's UNet on captions cut at 77 tokens, as SDXL's was, after its VAE and both its CLIPs.

All nine objects of a scene are drawn, whatever the cut caption still mentions. As in SDXL, the UNet is told the size
of the original picture and where it was cropped, takes both encoders' penultimate states and the second's pooled
vector, and gets zeros for an empty prompt. Latents and encoded captions are computed once and kept in files.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from common import parser, train
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from tqdm import tqdm
from train_clip import training_captions
from transformers import CLIPModel

from finelip_sdxl.files import written_whole
from finelip_sdxl.miniature.drawing import IMAGE_SIZE, draw_batch
from finelip_sdxl.miniature.tokenizer import build_tokenizer
from finelip_sdxl.miniature.world import make_scene

SCENES = 20_000
CAPTIONS = 3  # of each scene
SCALE = 16  # pixels of a latent, each way
NOISE_SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
}


def build_unet(latent_channels: int, state_width: int, pooled_width: int) -> UNet2DConditionModel:
    """SDXL's UNet, small: no attention at the finest level, ``text_time`` conditioning."""
    time_width = 32
    return UNet2DConditionModel(
        sample_size=IMAGE_SIZE // SCALE,
        in_channels=latent_channels,
        out_channels=latent_channels,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(48, 96, 128),
        layers_per_block=1,
        attention_head_dim=(4, 4, 4),  # the number of heads, as in SDXL's own config
        cross_attention_dim=state_width,
        norm_num_groups=16,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=time_width,
        projection_class_embeddings_input_dim=pooled_width + 6 * time_width,
    )


@torch.no_grad()
def latents_of_scenes(vae: AutoencoderKL, path: Path, count: int) -> tuple[Tensor, Tensor]:
    """Latents, (count, channels, 12, 12), and SDXL's time ids, (count, 6), of the training scenes; kept in a file.

    One picture in ten comes from an original of half the size, one in ten is a crop of an enlarged one, so that the
    two conditionings mean what they mean in SDXL.
    """
    if not path.exists():
        latents, time_ids = [], []
        random = torch.Generator().manual_seed(0)
        for first in tqdm(range(0, count, 100), desc="latents"):
            images = draw_batch([make_scene(f"train-{k}") for k in range(first, first + 100)])
            ids = torch.tensor([[IMAGE_SIZE, IMAGE_SIZE, 0, 0, IMAGE_SIZE, IMAGE_SIZE]]).repeat(100, 1)
            images[:10] = F.interpolate(F.avg_pool2d(images[:10], 2), scale_factor=2, mode="bilinear")
            ids[:10, :2] = IMAGE_SIZE // 2
            enlarged = F.interpolate(images[10:20], size=(IMAGE_SIZE + 32, IMAGE_SIZE + 32), mode="bilinear")
            for k in range(10):
                top, left = torch.randint(1, 33, (2,), generator=random).tolist()
                images[10 + k] = enlarged[k, :, top : top + IMAGE_SIZE, left : left + IMAGE_SIZE]
                ids[10 + k, 2:4] = torch.tensor([top, left])
            encoded = [vae.encode(part.to(vae.device)).latent_dist.mode() for part in images.split(20)]
            latents.append(torch.cat(encoded).cpu() * vae.config.scaling_factor)
            time_ids.append(ids)
        with written_whole(path) as temporary:
            torch.save({"latents": torch.cat(latents), "time_ids": torch.cat(time_ids)}, temporary)
    cached = torch.load(path, weights_only=True)
    return cached["latents"], cached["time_ids"]


@torch.no_grad()
def encode_captions(clips: list[CLIPModel], texts: list[str]) -> tuple[Tensor, Tensor]:
    """Both encoders' penultimate states side by side, (texts, 77, width), and the second's pooled vectors."""
    states, pooled = [], torch.empty(0)
    # As in SDXL, the two tokenizers differ in the token that they pad with.
    for clip, tokenizer in zip(clips, (build_tokenizer(), build_tokenizer(pad_token="!")), strict=True):
        ids = tokenizer(texts, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
        output = clip.text_model(ids.to(clip.device), output_hidden_states=True)
        states.append(output.hidden_states[-2])
        pooled = clip.text_projection(output.pooler_output)
    return torch.cat(states, dim=-1).half().cpu(), pooled.half().cpu()


def encoded_captions(clips: list[CLIPModel], path: Path, scenes: int) -> tuple[Tensor, Tensor]:
    """States, (captions, scenes, 77, width), and pooled vectors, (captions, scenes, width), of the training captions;
    kept in a file."""
    if not path.exists():
        states, pooled = [], []
        for first in tqdm(range(0, CAPTIONS * scenes, 100), desc="captions"):
            scene = first % scenes
            captions = training_captions([make_scene(f"train-{k}") for k in range(scene, scene + 100)], first)
            encoded = encode_captions(clips, [caption.text for caption in captions])
            states.append(encoded[0])
            pooled.append(encoded[1])
        parts = {"states": states, "pooled": pooled}
        with written_whole(path) as temporary:
            torch.save(
                {name: torch.cat(part).unflatten(0, (CAPTIONS, scenes)) for name, part in parts.items()}, temporary
            )
    cached = torch.load(path, weights_only=True, mmap=True)
    return cached["states"], cached["pooled"]


def main() -> None:
    flags = parser(__doc__, steps=9000, batch_size=32, learning_rate=1e-3)
    flags.add_argument("--scenes", type=int, default=SCENES, help="training pictures; a multiple of 100")
    text = "folder of a trained UNet to begin with: all of its weights that fit, such as all but the first and last"
    flags.add_argument("--unet", type=Path, help=text)
    arguments = flags.parse_args()
    device = arguments.device
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    clips = [CLIPModel.from_pretrained(arguments.runs / f"clip_{pair}").eval().to(device) for pair in (1, 2)]
    all_states, all_pooled = encoded_captions(clips, arguments.runs / "captions.pt", arguments.scenes)
    no_states, no_pooled = encode_captions(clips, [""])
    vae = AutoencoderKL.from_pretrained(arguments.runs / "vae").eval().to(device)
    latents, time_ids = latents_of_scenes(vae, arguments.runs / "latents.pt", arguments.scenes)
    unet = build_unet(latents.shape[1], all_states.shape[-1], all_pooled.shape[-1]).to(device)
    if arguments.unet:
        trained, own = UNet2DConditionModel.from_pretrained(arguments.unet).state_dict(), unet.state_dict()
        unet.load_state_dict(own | {key: new for key, new in trained.items() if new.shape == own[key].shape})
    average = EMAModel(unet.parameters(), decay=0.9995, use_ema_warmup=True, power=0.75)
    scheduler = DDPMScheduler(**NOISE_SCHEDULE)

    def step_loss(step: int) -> tuple[Tensor, dict[str, float]]:
        size = arguments.batch_size
        chosen = torch.randint(len(latents), (size,))
        copies = torch.randint(CAPTIONS, (size,))
        states, pooled = all_states[copies, chosen], all_pooled[copies, chosen]
        # Three in a hundred have an empty caption, ten in a hundred none, which is zeros.
        dropped = torch.rand(size)
        states[dropped < 0.03], pooled[dropped < 0.03] = no_states, no_pooled
        states[dropped > 0.9], pooled[dropped > 0.9] = 0, 0
        clean = latents[chosen].to(device)
        noise = torch.randn_like(clean)
        # More of the noisy steps, where the text matters.
        time = (torch.rand(size, device=device).sqrt() * scheduler.config.num_train_timesteps).long()
        noisy = scheduler.add_noise(clean, noise, time)
        target = scheduler.get_velocity(clean, noise, time)
        conditions = {"text_embeds": pooled.float().to(device), "time_ids": time_ids[chosen].to(device)}
        predicted = unet(noisy, time, states.float().to(device), added_cond_kwargs=conditions).sample
        loss = F.mse_loss(predicted, target)
        return loss, {"loss": loss.item()}

    modules = nn.ModuleDict({"unet": unet})
    train(arguments, "unet", modules, step_loss, lambda step: average.step(unet.parameters()), {"average": average})

    averaged = copy.deepcopy(unet)
    average.copy_to(averaged.parameters())
    averaged.save_pretrained(arguments.runs / "unet")


if __name__ == "__main__":
    main()
