"""The keys of CLIP's weights in every layout, and their translation to transformers' keys and back."""

import re
from collections.abc import Iterable

import torch
from torch import Tensor

from finelip_sdxl.text_encoders import POSITION_TABLE, TOKEN_TABLE

SECOND_TABLE = "text_model.embeddings.position_embedding_res.weight"

PATCHES = "vision_model.embeddings.patch_embedding.weight"

# Renaming: from any layout to the keys of `FineLIPModel`.


_NO_WEIGHTS = ("position_ids", "attn_mask", "input_resolution", "context_length", "vocab_size")

# Weights for training only: SmartCLIP's networks that mask images, masks of Long-CLIP's two tables, FG-CLIP's scales.
_TRAINING_ONLY = r"^\w*mask\w*\.|(^|\.)mask[12]$|^logit_scale_(finegraind|hardneg)$"

_PUBLISHED_ONLY = r"position(al)?_embedding_res|^input_resolution$|^cross_net\."

_CLIP_TEXT_KEY = r"^(?:text_model\.)*(?:embeddings\.)?token_embedding\.weight$"

# OpenAI's names and ours, for both directions; ^ and $ are the ends of a key.
_OPENAI_NAMES = (
    ("^token_embedding.weight$", f"^{TOKEN_TABLE}$"),
    ("^positional_embedding$", f"^{POSITION_TABLE}$"),
    ("^positional_embedding_res$", f"^{SECOND_TABLE}$"),
    ("^text_projection$", "^text_projection.weight$"),
    ("^visual.class_embedding$", "^vision_model.embeddings.class_embedding$"),
    ("^visual.positional_embedding$", "^vision_model.embeddings.position_embedding.weight$"),
    ("^visual.conv1.weight$", f"^{PATCHES}$"),
    ("^visual.proj$", "^visual_projection.weight$"),
    ("^ln_final.", "^text_model.final_layer_norm."),
    ("^visual.ln_pre.", "^vision_model.pre_layrnorm."),
    ("^visual.ln_post.", "^vision_model.post_layernorm."),
    ("^transformer.resblocks.", "^text_model.encoder.layers."),
    ("^visual.transformer.resblocks.", "^vision_model.encoder.layers."),
    (".ln_1.", ".layer_norm1."),
    (".ln_2.", ".layer_norm2."),
    (".attn.", ".self_attn."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
    ("^cross_net.aggr_net.", "^image_refinement."),
    ("^cross_net.cap_aggr_net.", "^text_refinement."),
)

# FG-CLIP encodes long texts with the parts on the left, and short texts with the parts on the right.
_FOR_LONG_TEXTS = {
    "text_model.embeddings.position_embedding_ori.weight": POSITION_TABLE,
    "text_filip_projection.weight": "text_projection.weight",
}

_TRANSPOSED = ("text_projection.weight", "visual_projection.weight")  # OpenAI stores the transposed matrices

_TRANSFORMERS_PATTERNS = (
    (r"^(text_model|vision_model)\.(?:\1\.)+", r"\1."),  # wrappers that nest the tower once more
    (r"^(embeddings|encoder|final_layer_norm)\.", r"text_model.\1."),  # CLIPTextModel built by transformers >= 5.6
    (r"\.position_embedding_res$", ".position_embedding_res.weight"),
)


def to_clip_keys(tensors: dict[str, Tensor], name: str) -> tuple[dict[str, Tensor], bool]:
    """Rename the weights of any supported layout to the keys of `FineLIPModel`.

    Args:
        tensors: a state dict; it is emptied.
        name: name of the source, for messages.

    Returns:
        The renamed tensors (a second positional table under `…position_embedding_res.weight`), and whether there were
        keys that only OpenAI's and the published FineLIP and Long-CLIP checkpoints have.

    Raises:
        ValueError: this is no CLIP with a text tower, or its image tower is no ViT.

    Examples:
        >>> weights = {"token_embedding.weight": torch.zeros(9, 4), "ln_final.bias": torch.ones(4)}
        >>> sorted(to_clip_keys(weights, "x.pt")[0])
        ['text_model.embeddings.token_embedding.weight', 'text_model.final_layer_norm.bias']
    """
    for prefix in ("module.", "text."):  # from DataParallel, and from open_clip's CustomTextCLIP
        for key in [key for key in tensors if key.startswith(prefix)]:
            tensors[key.removeprefix(prefix)] = tensors.pop(key)
    is_published = any(re.search(_PUBLISHED_ONLY, key) for key in tensors)
    for key in [key for key in tensors if key.split(".")[-1] in _NO_WEIGHTS or re.search(_TRAINING_ONLY, key)]:
        del tensors[key]

    if _matches(tensors, _UNSUPPORTED_CLIPS) or not any(re.search(_CLIP_TEXT_KEY, key) for key in tensors):
        raise ValueError(
            f"{name} is no checkpoint of a CLIP with a supported text tower: it looks like {describe_weights(tensors)}."
        )

    is_openai = "token_embedding.weight" in tensors
    renamed: dict[str, Tensor] = {}
    for key in list(tensors):
        tensor = tensors.pop(key)
        if not is_openai:
            for pattern, replacement in _TRANSFORMERS_PATTERNS:
                key = re.sub(pattern, replacement, key)
            renamed[key] = tensor
            continue
        key = _rename(key, _OPENAI_NAMES)
        if ".in_proj_" in key:
            # Cloned: views would share the memory of the fused weight, in saved files and in training, too.
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                renamed[key.replace("in_proj_", f"{part}_proj.")] = piece.clone()
        else:
            renamed[key] = tensor.T.contiguous() if key in _TRANSPOSED else tensor
    for key, ours in _FOR_LONG_TEXTS.items():
        if key in renamed:
            renamed[ours] = renamed.pop(key)
    return renamed, is_published


def to_openai_keys(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of a `FineLIPModel` to the published FineLIP's keys: the inverse of `to_clip_keys`.

    Args:
        tensors: the state dict of a `FineLIPModel`.

    Returns:
        Contiguous tensors that share no memory with one another.

    Examples:
        >>> sorted(to_openai_keys({POSITION_TABLE: torch.zeros(248, 4), "image_refinement.scale": torch.ones(1)}))
        ['cross_net.aggr_net.scale', 'positional_embedding', 'positional_embedding_res']
    """
    tensors = {**tensors, SECOND_TABLE: tensors[POSITION_TABLE].clone()}
    renamed: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        new_key = _rename(key, [(ours, theirs) for theirs, ours in _OPENAI_NAMES])
        if re.search(r"\.[kv]_proj\.", key):
            continue  # fused with the query's
        if ".q_proj." in key:
            parts = [tensors[key.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
            renamed[new_key.replace("q_proj.", "in_proj_")] = torch.cat(parts)
        else:
            renamed[new_key] = (tensor.T if key in _TRANSPOSED else tensor).contiguous()
    return renamed


def _rename(key: str, names: Iterable[tuple[str, str]]) -> str:
    marked = f"^{key}$"
    for old, new in names:
        marked = marked.replace(old, new)
    return marked[1:-1]


# Kinds of weights, by the keys that only they have; the first match counts. These have CLIP's token table.
_UNSUPPORTED_CLIPS = (
    (r"^logit_bias$|^vision_model\.head\.|^text_model\.head\.", "a SigLIP"),
    (r"rotary|(^|\.)rope\.|inv_freq", "a CLIP with rotary positions (RoPE), and SDXL's encoders need a table"),
    (r"^visual\.(layer1|attnpool)\.", "a CLIP with a ResNet for images, and only ViT is supported"),
    (
        r"\.theta$",
        "a CLIP in geometric parametrization (GmP), with each weight split into theta and r: pass its author's file of"
        " plain weights",
    ),
    (r"^visual\.trunk\.|^transformer\.(embeddings|encoder)\.", "an open_clip with a tower of another library"),
)

_OTHER_WEIGHTS = (
    (r"lora_|lora\.|\.hada_|\.lokr_", "a LoRA"),
    (r"^(model\.diffusion_model|conditioner|first_stage_model|cond_stage_model)\.", "a single-file Stable Diffusion"),
    (r"^(add_embedding|label_emb)\.", "the UNet of an SDXL"),
    (r"^(down_blocks|mid_block|input_blocks|middle_block)\.", "a UNet"),
    (r"^(encoder|decoder)\.(down_blocks|up_blocks|down|up|mid)\.|^quant_conv\.", "a VAE"),
    (r"\.SelfAttention\.|^shared\.weight$", "a T5"),
    (r"word_embeddings", "a BERT"),
    (r"^text_adapter\.", "an LLM2CLIP, which encodes texts by a language model"),
    (r"^clip_[lg]$|^emb_params$|^string_to_param", "a textual inversion"),
    (r"^vision_model\.|^visual\.|^text_model\.class_embedding", "the image tower of a CLIP, without its text tower"),
    (r"aggr_net\.", "a token refinement without its CLIP"),
    (r"^model\.layers\.|(^|\.)embed_tokens\.", "a language model"),
)


def describe_weights(keys: Iterable[str]) -> str:
    """A description of a state dict for people, by its keys.

    Examples:
        >>> describe_weights(["down_blocks.0.resnets.0.conv1.weight", "add_embedding.linear_1.weight"])
        'the UNet of an SDXL'
    """
    keys = sorted(keys)
    if not keys:
        return "a file without weights"
    examples = ", ".join(repr(key) for key in keys[:3])
    return _matches(keys, _UNSUPPORTED_CLIPS + _OTHER_WEIGHTS) or f"{len(keys)} weights with keys such as {examples}"


def _matches(keys: Iterable[str], kinds: Iterable[tuple[str, str]]) -> str | None:
    for pattern, description in kinds:
        if any(re.search(pattern, key) for key in keys):
            return description
    return None
