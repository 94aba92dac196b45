"""Trains one of the miniature's two CLIP pairs on captions of at most 77 tokens, as SDXL's own encoders were.

Contrast on whole captions alone hardly teaches which color belongs to which shape. So every mention of an object is
also grounded: the penultimate state at the end of its sentence is held against the image tower's features of the
object's cell, among all cells of the batch, and linear heads read place, shape, color and size from it. The noun by
which a linked sentence points back is a mention too, and links with two or more candidates weigh more: without
either, encoders stay at guessing among the colors named so far.
"""

from __future__ import annotations

import json

import torch
import torch.nn.functional as F
from common import parser, train, training_scenes
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from finelip_sdxl.miniature.captions import Caption, long_caption, short_caption
from finelip_sdxl.miniature.drawing import draw_batch
from finelip_sdxl.miniature.tokenizer import build_tokenizer
from finelip_sdxl.miniature.world import ATTRIBUTES, COLORS, PLACES, SHAPES, Scene, make_scene

WIDTHS = {1: 128, 2: 160}  # SDXL's are 768 and 1280
LAYERS = 6
GROUNDING_DIM = 128
HARD_LINK_WEIGHT = 4.0
CONTRAST_WEIGHT = 0.3


def build_clip(pair: int, tokenizer: CLIPTokenizer) -> CLIPModel:
    """A CLIP of the miniature: SDXL's first text encoder has QuickGELU, its second GELU."""
    width = WIDTHS[pair]
    text = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": 77,
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "hidden_act": "quick_gelu" if pair == 1 else "gelu",
        "projection_dim": width,
    }
    vision = {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 96,
        "patch_size": 8,
        "projection_dim": width,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=width))


class Grounding(nn.Module):
    """What holds mentions against cells while a CLIP is trained; it is not shipped."""

    def __init__(self, text_width: int, image_width: int) -> None:
        super().__init__()
        self.phrase = nn.Linear(text_width, GROUNDING_DIM)
        self.region = nn.Linear(image_width, GROUNDING_DIM)
        self.attributes = nn.ModuleDict({name: nn.Linear(text_width, len(v)) for name, v in ATTRIBUTES.items()})
        self.scale = nn.Parameter(torch.tensor(2.7))


class Mentions:
    """The mentions of a batch that the tokens hold, flat.

    Attributes:
        row, token: Which caption, and which of its tokens ends the mention; (mentions,).
        cell: Which of the batch's cells it names, nine for each scene; (mentions,).
        labels: For each attribute, (mentions,); -100 where the sentence does not say it.
        plain, linked, hard: Which mentions are plain, which are links, and which links have two or more candidates.
    """

    def __init__(self, scenes: list[Scene], captions: list[Caption], encoding, device: str) -> None:
        rows, tokens, cells, kinds, candidates = [], [], [], [], []
        labels: dict[str, list[int]] = {name: [] for name in ATTRIBUTES}
        for row, (scene, caption) in enumerate(zip(scenes, captions, strict=True)):
            for mention in caption.mentions:
                token = encoding.char_to_token(row, mention.end - 1)
                if token is None:
                    continue
                thing = scene.objects[mention.index]
                rows.append(row)
                tokens.append(token)
                cells.append(row * len(PLACES) + mention.index)
                kinds.append(mention.kind)
                candidates.append(mention.candidates)
                for name, values in ATTRIBUTES.items():
                    unknown = name == "size" and not mention.size_named
                    labels[name].append(-100 if unknown else values.index(getattr(thing, name)))
        self.row, self.token, self.cell = (torch.tensor(x, device=device) for x in (rows, tokens, cells))
        self.labels = {name: torch.tensor(values, device=device) for name, values in labels.items()}
        self.linked = torch.tensor([kind == "linked" for kind in kinds], device=device)
        self.plain = torch.tensor([kind == "plain" for kind in kinds], device=device)
        self.hard = self.linked & (torch.tensor(candidates, device=device) >= 2)


def training_captions(scenes: list[Scene], step: int) -> list[Caption]:
    """Seven of ten captions are short ones; the rest are long ones, which the tokenizer cuts."""
    return [
        (short_caption if k % 10 < 7 else long_caption)(scene, f"train-{step}-{k}") for k, scene in enumerate(scenes)
    ]


def tokenize(tokenizer: CLIPTokenizer, captions: list[Caption]):  # noqa: ANN201
    return tokenizer(
        [caption.text for caption in captions],
        padding="max_length",
        truncation=True,
        max_length=tokenizer.model_max_length,
        return_tensors="pt",
    )


def symmetric_contrast(a: torch.Tensor, b: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """InfoNCE both ways between the rows of a and b, (batch, dim) each."""
    logits = scale.exp() * F.normalize(a.float(), dim=-1) @ F.normalize(b.float(), dim=-1).T
    labels = torch.arange(len(a), device=a.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def cell_keys(scenes: list[Scene], device: str) -> torch.Tensor:
    """A number for each cell of the batch; equal where place, shape and color are, so that no such cell is wrong."""
    keys = [
        (place * len(SHAPES) + SHAPES.index(thing.shape)) * len(COLORS) + list(COLORS).index(thing.color)
        for scene in scenes
        for place, thing in enumerate(scene.objects)
    ]
    return torch.tensor(keys, device=device)


@torch.no_grad()
def probe(clip: CLIPModel, grounding: Grounding, tokenizer: CLIPTokenizer, count: int, device: str) -> dict[str, float]:
    """How often linear heads read unseen short captions' mentions right, apart by kind; whole batch at once."""
    scenes = [make_scene(f"probe-{k}") for k in range(count)]
    captions = [short_caption(scene, f"probe-{k}") for k, scene in enumerate(scenes)]
    encoding = tokenize(tokenizer, captions)
    states = clip.text_model(encoding.input_ids.to(device), output_hidden_states=True).hidden_states[-2]
    mentions = Mentions(scenes, captions, encoding, device)
    at = states[mentions.row, mentions.token]
    right = {name: head(at).argmax(-1) == mentions.labels[name] for name, head in grounding.attributes.items()}
    figures = {
        f"plain_{name}": right[name][mentions.plain].float().mean().item() for name in ("place", "shape", "color")
    }
    figures["size"] = right["size"][mentions.labels["size"] >= 0].float().mean().item()
    figures["linked_color"] = right["color"][mentions.linked].float().mean().item()
    figures["hard_linked_color"] = right["color"][mentions.hard].float().mean().item()
    figures["hard_links"] = float(mentions.hard.sum())
    return figures


def main() -> None:
    flags = parser(__doc__, steps=800, batch_size=64, learning_rate=1e-3)
    flags.add_argument("--pair", type=int, choices=(1, 2), default=1, help="which of SDXL's two encoders")
    arguments = flags.parse_args()
    device = arguments.device
    torch.manual_seed(arguments.pair)
    tokenizer = build_tokenizer()
    clip = build_clip(arguments.pair, tokenizer).to(device)
    clip.set_attn_implementation("eager")  # on a CPU, faster than the fused one in bfloat16
    grounding = Grounding(WIDTHS[arguments.pair], clip.config.vision_config.hidden_size).to(device)

    def step_loss(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        scenes = training_scenes(step, arguments.batch_size)
        captions = training_captions(scenes, step)
        encoding = tokenize(tokenizer, captions)
        mentions = Mentions(scenes, captions, encoding, device)
        with torch.autocast(device, torch.bfloat16):
            text = clip.text_model(encoding.input_ids.to(device), output_hidden_states=True)
            image = clip.vision_model(F.avg_pool2d(draw_batch(scenes), 2).to(device))  # 96 × 96 pixels
            contrast = symmetric_contrast(
                clip.text_projection(text.pooler_output), clip.visual_projection(image.pooler_output), clip.logit_scale
            )
        at = text.hidden_states[-2][mentions.row, mentions.token].float()
        # (scenes, 12 × 12 patches, dim) → the mean over each cell's 4 × 4 patches → (scenes × 9 cells, dim).
        patches = image.last_hidden_state[:, 1:].float().unflatten(1, (3, 4, 3, 4))
        cells = patches.mean(dim=(2, 4)).flatten(0, 2)
        phrase = F.normalize(grounding.phrase(at), dim=-1)
        logits = grounding.scale.exp() * phrase @ F.normalize(grounding.region(cells), dim=-1).T
        keys = cell_keys(scenes, device)
        twins = keys[mentions.cell][:, None] == keys[None]
        twins[torch.arange(len(twins)), mentions.cell] = False
        logits = logits.masked_fill(twins, float("-inf"))

        weight = 1 + (HARD_LINK_WEIGHT - 1) * mentions.hard.float()
        losses = F.cross_entropy(logits, mentions.cell, reduction="none")
        for name, head in grounding.attributes.items():
            losses = losses + F.cross_entropy(head(at), mentions.labels[name], reduction="none")
        loss = (weight * losses).sum() / weight.sum() + CONTRAST_WEIGHT * contrast

        figures = {"loss": loss.item(), "contrast": contrast.item()}
        if step % 25 == 0:
            color = grounding.attributes["color"](at).argmax(-1) == mentions.labels["color"]
            figures["match"] = (logits.argmax(-1) == mentions.cell).float().mean().item()
            figures["plain_color"] = color[mentions.plain].float().mean().item()
            figures["hard_color"] = color[mentions.hard].float().mean().item()
        return loss, figures

    train(arguments, f"clip_{arguments.pair}", nn.ModuleDict({"clip": clip, "grounding": grounding}), step_loss)

    figures = probe(clip, grounding, tokenizer, 1000, device)
    print(json.dumps(figures))
    folder = arguments.runs / f"clip_{arguments.pair}"
    clip.save_pretrained(folder)
    (folder / "probe.json").write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
