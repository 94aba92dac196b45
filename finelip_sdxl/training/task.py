"""The losses of FineLIP's training, on one process or several, and the frozen teacher for distillation."""

from __future__ import annotations

import copy
import math
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from finelip_sdxl import FineLIPModel, contrastive_loss, triplet_margin_loss
from finelip_sdxl.model import FineLIPTextOutput, fine_tokens
from finelip_sdxl.options import LOSSES as LOSSES
from finelip_sdxl.provenance import Provenance


class FineLIPTask(nn.Module):
    """The losses of one batch of pairs, as one module, for training with several processes.

    Negatives come from the batches of all processes. Each process compares its images with the texts of all processes.
    These rows are gathered, with gradients, to the similarities of the whole batch, and each process computes the loss
    of all of them. The mean of the processes' gradients is then the gradient of one process with the whole batch.

    Args:
        model: the model to train.
        weights: weights of the losses by name, see `LOSSES`; a loss of weight 0 is left out.
        margin: margin of the triplet loss.
        hardest: whether the triplet loss counts a pair's hardest negative only.
    """

    def __init__(self, model: FineLIPModel, weights: dict[str, float], margin: float, hardest: bool) -> None:
        super().__init__()
        self.model, self.weights, self.margin, self.hardest = model, weights, margin, hardest

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Returns the losses with a weight, by their names, and their weighted sum as `loss`."""
        model, weights = self.model, self.weights
        text: Any = model.encode_text(batch["input_ids"])
        image: Any = model.encode_image(batch["pixel_values"])
        ids = gather(batch["ids"])

        losses = {}
        if weights["triplet"] or weights["fine_contrastive"]:
            fine = gather(model.compare(fine_tokens(image)[0], *self._all_texts(text)))
        if weights["triplet"]:
            losses["triplet"] = triplet_margin_loss(fine, ids, self.margin, self.hardest)
        if weights["fine_contrastive"]:
            losses["fine_contrastive"] = contrastive_loss(fine, ids, self._scale())
        if weights["contrastive"]:
            similarity = gather(normalize(image.embeds) @ normalize(gather(text.embeds)).T)
            losses["contrastive"] = contrastive_loss(similarity, ids, self._scale())
        if weights["region"]:
            losses["region"] = self._region_loss(text.tokens, image.tokens, batch["regions"])
        if weights["distillation"]:
            losses["distillation"] = self._distillation_loss(batch)
        loss = cast(Tensor, sum(weights[name] * loss for name, loss in losses.items()))
        return {"loss": loss, **losses}

    def _all_texts(self, text: FineLIPTextOutput) -> tuple[Tensor, Tensor | None]:
        """The tokens that late interaction compares, of the texts of all processes, with their mask."""
        tokens, mask = fine_tokens(text)
        if mask is not None:  # all tokens, whose number differs between processes
            room = self.model.config.text_config.max_position_embeddings - tokens.shape[1]
            tokens, mask = F.pad(tokens, (0, 0, 0, room)), gather(F.pad(mask, (0, room)))
        return gather(tokens), mask

    def _region_loss(self, text_tokens: Tensor, image_tokens: Tensor, regions: dict[str, Tensor]) -> Tensor:
        """The contrastive loss of phrases and regions in this process's batch; equal labels are no negatives."""
        patches = image_tokens[:, 1:]
        side = math.isqrt(patches.shape[1])
        centers = (torch.arange(side, device=patches.device) + 0.5) / side
        left, top, right, bottom = regions["box"][:, :, None].unbind(1)
        across, down = (left <= centers) & (centers < right), (top <= centers) & (centers < bottom)
        inside = (down[:, :, None] & across[:, None]).flatten(1)[..., None]  # (regions, patches, 1)
        of_images = (patches[regions["row"]] * inside).sum(dim=1)
        of_texts = text_tokens[regions["row"], regions["token"]]

        label, weight = regions["label"], regions["weight"]
        alike = (label[:, None] == label[None]).fill_diagonal_(False)
        logits = (self._scale() * normalize(of_texts) @ normalize(of_images).T).masked_fill(alike, float("-inf"))
        losses = F.cross_entropy(logits, torch.arange(len(label), device=label.device), reduction="none")
        return (weight * losses).sum() / weight.sum().clamp(min=1e-6)  # 0 for a batch without regions

    def _distillation_loss(self, batch: dict[str, Any]) -> Tensor:
        """The relative squared error of short captions, with the teacher's as target: of penultimate states and of the
        embedding, as a mean over captions."""
        text: Any = self.model.encode_text(batch["short_input_ids"], output_hidden_states=True)
        mask = batch["short_mask"][..., None]
        target = batch["teacher_states"] * mask
        error = ((text.hidden_states[-2] * mask - target) ** 2).sum((1, 2)) / (target**2).sum((1, 2))
        target = batch["teacher_embeds"]
        error_of_embeds = ((text.embeds - target) ** 2).sum(1) / (target**2).sum(1)
        return cast(Tensor, (error + error_of_embeds).mean())

    def _scale(self) -> Tensor:
        return cast(Tensor, self.model.logit_scale).exp().clamp(max=100)


class FrozenTeacher:
    """A frozen copy of the text encoder at the start of training. It encodes short captions as stock does, at 77
    positions.

    Args:
        model: the model to copy.
    """

    def __init__(self, model: FineLIPModel) -> None:
        towers = nn.ModuleDict({name: model.get_submodule(name) for name in ("text_model", "text_projection")})
        self.towers = copy.deepcopy(towers).requires_grad_(False).eval()
        # None for a model that was trained at 248 positions: then all rows are used in order.
        self.rows = Provenance.of(model.config.text_config).original_row_indices()

    @torch.no_grad()
    def encode(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Returns penultimate states (batch, n, width) and embeddings (batch, C)."""
        rows = None if self.rows is None else self.rows[None, : input_ids.shape[1]].to(input_ids.device)
        out = self.towers["text_model"](input_ids=input_ids, position_ids=rows, output_hidden_states=True)
        return out.hidden_states[-2], self.towers["text_projection"](out.pooler_output)


def gather(tensor: Tensor) -> Tensor:
    """Returns the rows of all processes, (processes · batch, …); gradients flow back to the process of each row."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return tensor
    return cast(Tensor, _Gather.apply(tensor.contiguous()))  # type: ignore[no-untyped-call]  # PyTorch has no types for it


class _Gather(torch.autograd.Function):
    """The rows of all processes; backward, each process gets the sum of all processes' gradients of its own rows.

    `torch.distributed.all_gather` carries no gradient. The function in `torch.distributed.nn.functional` returns wrong
    gradients with Gloo: two processes do not agree with one process on the whole batch.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, tensor)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        # A copy, since `all_reduce` sums in place; contiguous, since it sends raw memory.
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return torch.chunk(gradient, dist.get_world_size())[dist.get_rank()]


def normalize(vectors: Tensor) -> Tensor:
    """Scales vectors to length 1, in float32 at least."""
    return F.normalize(vectors.to(torch.promote_types(vectors.dtype, torch.float32)), dim=-1)
