"""The delta merge: the weights that FineLIP's training changed, added to a fine-tune's text encoder."""

import copy

import torch

from finelip_sdxl.provenance import forget_stretch
from finelip_sdxl.text_encoders import TextEncoder, build_text_encoder, text_encoder_tensors


def add_difference(own: TextEncoder, finelip: TextEncoder, base: TextEncoder) -> TextEncoder:
    """A new text encoder with the weights `own + finelip - base`, and the config and dtype of `own`.

    All three have the same number of positions: stretch encoders of 77 first, as FineLIP's training does.

    Args:
        own: the text encoder that was fine-tuned from `base`.
        finelip: the text encoder that was trained from `base` on long texts.
        base: the CLIP text encoder from which both were trained. With another one, the sum means nothing.

    Raises:
        ValueError: the three differ in their keys or shapes, or have adapters.

    Examples:
        >>> from transformers import CLIPTextConfig, CLIPTextModel
        >>> config = CLIPTextConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=1)
        >>> own, finelip, base = (CLIPTextModel(config) for _ in range(3))
        >>> type(add_difference(own, finelip, base)).__name__
        'CLIPTextModel'
    """
    tensors = text_encoder_tensors(own)
    trained, before = text_encoder_tensors(finelip), text_encoder_tensors(base)
    for name, others in (("FineLIP", trained), ("base that it was trained from", before)):
        shapes = [{key: tuple(tensor.shape) for key, tensor in each.items()} for each in (tensors, others)]
        if differing := sorted(
            key for key in shapes[0].keys() | others.keys() if shapes[0].get(key) != shapes[1].get(key)
        ):
            key = differing[0]
            raise ValueError(
                f"This text encoder and the {name} differ in {len(differing)} weights, such as {key!r}:"
                f" {shapes[0].get(key, 'absent')} and {shapes[1].get(key, 'absent')}. Only encoders that were trained"
                " from the same CLIP can be merged."
            )
    config = copy.deepcopy(own.config)
    forget_stretch(config)
    merged = {}
    for key, tensor in tensors.items():
        # In float32: the changes are small compared with the weights.
        change = trained[key].to(tensor.device, torch.float32) - before[key].to(tensor.device, torch.float32)
        merged[key] = (tensor.float() + change).to(tensor.dtype)
    return build_text_encoder(config, merged)
