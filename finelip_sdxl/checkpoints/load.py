"""Loading of a FineLIP from CLIP weights of any origin: published checkpoints, open_clip, transformers.

The steps: read tensors (and a config, if there is one), rename them to the keys of transformers' `CLIPModel`, make one
positional table of at least 248 rows, derive the config, build the model. `save_openai_layout` is the inverse: it
writes a file in the layout of the published checkpoints.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from finelip_sdxl.checkpoints.config import derive_config
from finelip_sdxl.checkpoints.layouts import SECOND_TABLE, to_clip_keys, to_openai_keys
from finelip_sdxl.checkpoints.sources import Source, read_source
from finelip_sdxl.files import written_whole
from finelip_sdxl.foreign_files import check_finite
from finelip_sdxl.model import FineLIPConfig, FineLIPModel, text_encoder_of
from finelip_sdxl.options import STOCK_POSITIONS
from finelip_sdxl.provenance import Provenance, public_name
from finelip_sdxl.stretch import FACTOR, KEEP, check_stretch, stretch_positions
from finelip_sdxl.text_encoders import POSITION_TABLE, TextEncoder, check_shapes, dims, fill_model

logger = logging.getLogger(__name__)


def load_finelip(
    source: Source,
    *,
    keep: int = KEEP,
    factor: int = FACTOR,
    dtype: torch.dtype | None = None,
    activation: str | None = None,
    subfolder: str = "",
    variant: str | None = None,
    **hub_kwargs: Any,
) -> FineLIPModel:
    """Load CLIP weights of any common layout as a FineLIP with a text tower of 248 positions.

    `source` is one of

    - a `.pt`, `.pth` or `.bin` file (loaded with `weights_only=True`) or a `.safetensors` file: a FineLIP, Long-CLIP or
      SmartCLIP checkpoint, an OpenAI CLIP or open_clip state dict (ViT), also nested under `state_dict` or `model` and
      with `module.` before its keys, or a bare transformers CLIP file;
    - a directory or hub id of a transformers CLIP model (also of Long-CLIP and FG-CLIP v1), of a CLIP text encoder, or
      of a saved `FineLIPModel`;
    - `miniature-clip-1` or `-2`, `miniature-finelip-1` or `-2`, from the miniature that ships with this package;
    - a state dict in memory, or a loaded `FineLIPModel`, `CLIPModel`, `CLIPTextModel` or
      `CLIPTextModelWithProjection`. It is not modified; on the CPU, unchanged weights share its memory.

    The tensors decide the number of positions, and the config does not. Two positional tables (FineLIP and Long-CLIP
    train the later rows in a second one) are merged: rows before `keep` from the first, the others from the second.
    FG-CLIP has parts for short and for long texts; its parts for long texts are taken. A table of 77 rows is stretched,
    and the text config records `stretched_from`, `stretch_keep` and `stretch_factor`; longer tables stay.

    For a file without a config, heads are assumed to be 64 wide (80, 88 and 104 in the image towers of open_clip's H, g
    and bigG). The activation is GELU if the text tower is as wide as open_clip's H, g or bigG and the keys are not
    OpenAI's or a published checkpoint's, and otherwise QuickGELU. That is right for OpenAI's weights and wrong for
    LAION's smaller ones: pass `activation="gelu"` there.

    Args:
        source: see above.
        keep: leading positions that a stretch leaves unchanged, and that come from the first of two tables.
        factor: positions that a stretch makes of each later one, from 1 to 1000.
        dtype: dtype of the model; by default the widest in `source`, so nothing is lost.
        activation: "quick_gelu" or "gelu", in place of the source's own.
        subfolder: folder in a directory or hub repository, e.g. "text_encoder" for an SDXL.
        variant: variant of the weights in a directory or hub repository, e.g. "fp16" for `model.fp16.safetensors`. By
            default the plain weights; without these, the only variant in the folder, with a message in the log.
        **hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only`, as for `from_pretrained`.

    Returns:
        The model, in evaluation mode. It has an image tower, projections and a token refinement if `source` has them.

    Raises:
        FileNotFoundError: a path, or a file that must be in a directory, does not exist.
        OSError: a hub repository or a file cannot be read.
        ValueError: the weights are no CLIP's (the message describes them), incomplete, not finite, or do not match the
            config; a file holds, or leads to, more than weights; or an argument is out of range.

    Examples:
        >>> from transformers import CLIPTextConfig, CLIPTextModel
        >>> stock = CLIPTextModel(CLIPTextConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=1))
        >>> model = load_finelip(stock)
        >>> model.config.text_config.max_position_embeddings, model.config.text_config.stretched_from
        (248, 77)
    """
    return read_finelip(
        source,
        keep=keep,
        factor=factor,
        dtype=dtype,
        activation=activation,
        subfolder=subfolder,
        variant=variant,
        **hub_kwargs,
    ).to_model()


@dataclass(frozen=True)
class FineLIPWeights:
    """A FineLIP before a model is built: a config, and checked weights that match it.

    Attributes:
        config: config of the model.
        tensors: weights under the keys of `FineLIPModel`.
        name: name of the source, for messages.
    """

    config: FineLIPConfig
    tensors: dict[str, Tensor]
    name: str

    def to_model(self) -> FineLIPModel:
        """The whole model, which shares the memory of the weights on the CPU."""
        return fill_model(FineLIPModel, self.config, self.tensors, self.name)

    def to_text_encoder(self, projection: bool) -> TextEncoder:
        """The text tower alone, see `FineLIPModel.to_text_encoder`. Nothing else is built."""
        return text_encoder_of(self.config, self.tensors, projection)


def read_finelip(
    source: Source,
    *,
    keep: int = KEEP,
    factor: int = FACTOR,
    dtype: torch.dtype | None = None,
    activation: str | None = None,
    subfolder: str = "",
    variant: str | None = None,
    **hub_kwargs: Any,
) -> FineLIPWeights:
    """As `load_finelip`, with all its checks, but no model is built."""
    kind = "state dict" if isinstance(source, Mapping) else type(source).__name__
    name = str(Path(source, subfolder)) if isinstance(source, str | Path) else f"The given {kind}"
    tensors, config = read_source(source, subfolder, variant, hub_kwargs)
    finelip_config, tensors = convert_weights(
        tensors, config, keep=keep, factor=factor, dtype=dtype, activation=activation, name=name
    )
    if isinstance(source, str | Path):
        record = replace(Provenance.of(finelip_config.text_config), made_from=public_name(source))
        record.write(finelip_config.text_config)
    if not isinstance(source, FineLIPModel):  # a FineLIPModel was checked when it was loaded
        check_finite(tensors, name)
    check_shapes(FineLIPModel, finelip_config, {key: tuple(value.shape) for key, value in tensors.items()}, name)
    return FineLIPWeights(finelip_config, tensors, name)


def save_openai_layout(model: FineLIPModel, path: str | Path) -> None:
    """Write a FineLIP in the layout of the published checkpoints: OpenAI's keys, two positional tables, `cross_net.*`.

    The file lacks the parts that the model lacks (image tower, projections, token refinement). Both positional tables
    are the whole table, so other programs can take the rows from either. `load_finelip` returns the same model, bit for
    bit; only the record of a stretch (`stretched_from`) has no place in such a file.

    Args:
        model: a model without adapters (merge or unload a LoRA first).
        path: a `.safetensors` or `.pt` file. A file of this name is replaced when the new one is complete.

    Raises:
        ValueError: `path` has another suffix; or this layout, which has no config, cannot hold the model: heads that
            are not 64 wide, GELU, or positions, image sizes or end tokens other than the tensors suggest.
            `save_pretrained` writes such models.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> from transformers import CLIPTextConfig, CLIPTextModel
        >>> stock = CLIPTextModel(CLIPTextConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=1))
        >>> model = load_finelip(stock)
        >>> with TemporaryDirectory() as folder:
        ...     save_openai_layout(model, f"{folder}/finelip.safetensors")
        ...     again = load_finelip(f"{folder}/finelip.safetensors")
        >>> all(torch.equal(weight, again.state_dict()[key]) for key, weight in model.state_dict().items())
        True
    """
    path = Path(path)
    if path.suffix not in (".safetensors", ".pt"):
        raise ValueError(f"{path} has another suffix than .safetensors or .pt: pass a name with one of these.")
    _check_openai_layout_suffices(model, path)
    tensors = to_openai_keys({key: tensor.detach().cpu() for key, tensor in model.state_dict().items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as temporary:
        save_file(tensors, temporary) if path.suffix == ".safetensors" else torch.save(tensors, temporary)


def convert_weights(
    tensors: dict[str, Tensor],
    config: dict[str, Any] | None = None,
    *,
    keep: int = KEEP,
    factor: int = FACTOR,
    dtype: torch.dtype | None = None,
    activation: str | None = None,
    name: str = "The state dict",
) -> tuple[FineLIPConfig, dict[str, Tensor]]:
    """Convert a state dict to the config and weights of a `FineLIPModel`; tensors may be on the meta device.

    Args:
        tensors: a state dict of any layout that `load_finelip` takes. It is emptied, so fused weights and their parts
            are never all in memory at once.
        config: the content of the `config.json` beside the weights, if there is one.
        keep: see `load_finelip`.
        factor: see `load_finelip`.
        dtype: see `load_finelip`.
        activation: see `load_finelip`.
        name: name of the source, for messages.

    Returns:
        The config and the weights of a `FineLIPModel`.

    Raises:
        ValueError: see `load_finelip`.

    Examples:
        >>> from transformers import CLIPConfig, CLIPModel
        >>> with torch.device("meta"):
        ...     weights = CLIPModel(CLIPConfig()).state_dict()
        >>> config, weights = convert_weights(weights)
        >>> config.text_config.num_attention_heads, weights[POSITION_TABLE].shape
        (8, torch.Size([248, 512]))
    """
    if activation not in (None, "quick_gelu", "gelu"):
        raise ValueError(f"activation is {activation!r}; expected 'quick_gelu', 'gelu' or None.")
    tensors, is_published = to_clip_keys(tensors, name)
    _cast(tensors, dtype, name)
    stretched_from = _settle_positions(tensors, keep, factor, name)
    finelip_config = derive_config(tensors, config, activation, is_published, name)
    if stretched_from is not None:
        text_config = finelip_config.text_config
        Provenance.of(text_config).with_stretch(stretched_from, keep, factor).write(text_config)
    scale = finelip_config.logit_scale_init_value
    tensors.setdefault("logit_scale", tensors[POSITION_TABLE].new_tensor(scale))
    return finelip_config, tensors


# One dtype and one positional table


def _cast(tensors: dict[str, Tensor], dtype: torch.dtype | None, name: str) -> None:
    """Cast all weights to `dtype`, by default to the widest among them, one at a time."""
    found = {tensor.dtype for tensor in tensors.values()}
    if odd := found - {torch.float16, torch.bfloat16, torch.float32, torch.float64}:
        raise ValueError(f"{name} holds {odd.pop()} weights; expected float16, bfloat16 or float32.")
    target = dtype or reduce(torch.promote_types, found)
    for key in tensors:
        tensors[key] = tensors[key].to(target)


def _settle_positions(tensors: dict[str, Tensor], keep: int, factor: int, name: str) -> int | None:
    """Merge and stretch the positional table of the text as needed.

    Returns:
        The rows before a stretch; None if nothing is stretched.
    """
    if POSITION_TABLE not in tensors:
        raise ValueError(
            f"{name} lacks the positional table of its text tower: it is incomplete, or has rotary positions (RoPE),"
            " and SDXL's encoders need a table."
        )
    table = tensors[POSITION_TABLE]
    dims({POSITION_TABLE: tuple(table.shape)}, POSITION_TABLE, 2, name)
    second = tensors.pop(SECOND_TABLE, None)
    check_stretch(max(table.shape[0], STOCK_POSITIONS), keep, factor)
    if second is not None:
        if second.shape != table.shape:
            raise ValueError(
                f"{name} has two positional tables of different shapes, {tuple(table.shape)} and "
                f"{tuple(second.shape)}; expected equal ones, to merge them."
            )
        table = torch.cat([table[:keep], second[keep:]])
    rows = table.shape[0]
    if rows < STOCK_POSITIONS:
        raise ValueError(f"{name} has {rows} text positions; expected {STOCK_POSITIONS} or more.")
    is_stock = rows == STOCK_POSITIONS
    tensors[POSITION_TABLE] = stretch_positions(table, keep=keep, factor=factor) if is_stock else table
    return rows if is_stock else None


# Config fields that change an encoder's result, and that are inferred for a file without a config.
_INFERRED = {
    "text_config": ("num_attention_heads", "hidden_act", "layer_norm_eps", "max_position_embeddings", "eos_token_id"),
    "vision_config": ("num_attention_heads", "hidden_act", "layer_norm_eps", "image_size"),
}


def _check_openai_layout_suffices(model: FineLIPModel, path: Path) -> None:
    """Refuse a model that would be another one when it is loaded again."""
    weights = {key: tensor.to("meta") for key, tensor in model.state_dict().items()}
    if adapted := [key for key in weights if "lora" in key or "base_layer" in key]:
        raise ValueError(f"The model has weights such as {adapted[0]!r}: merge or unload the LoRA first.")
    try:
        config, _ = convert_weights(to_openai_keys(weights), name=str(path))
    except ValueError as error:
        raise ValueError(f"A published checkpoint cannot hold this model, use save_pretrained: {error}") from error
    for tower, fields in _INFERRED.items():
        for field in fields if getattr(model.config, tower) is not None else ():
            own, inferred = getattr(getattr(model.config, tower), field), getattr(getattr(config, tower), field)
            # In old configs, 2 stands for the largest id; the inferred value names that id.
            if own != inferred and (field, own) != ("eos_token_id", 2):
                raise ValueError(
                    f"A published checkpoint cannot hold this model, use save_pretrained: its {tower} has {field} "
                    f"{own!r}, and {path.name} would be loaded with {inferred!r}."
                )
