"""Load a FineLIP from whatever CLIP weights there are: published checkpoints, open_clip, transformers.

The way of the weights, top-down: read tensors (and a config, if there is one), rename them to the keys of
transformers' `CLIPModel`, make one positional table of at least 248 rows, derive the config, build the model.
`save_published` goes the way back, to a file in the layout of the published checkpoints.
"""

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, list_repo_files
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
)

from finelip_sdxl.files import written_whole
from finelip_sdxl.foreign_files import (
    Shapes,
    check_finite,
    check_numbers,
    config_errors,
    read_json,
    read_tensors,
    shard_names,
)
from finelip_sdxl.miniature import resolve_finelip
from finelip_sdxl.model import FineLIPConfig, FineLIPModel
from finelip_sdxl.model_card import MADE_FROM, public_name
from finelip_sdxl.prompts import STOCK_POSITIONS
from finelip_sdxl.stretch import FACTOR, KEEP, check_stretch, stretch_positions
from finelip_sdxl.text_encoders import (
    POSITION_TABLE,
    TOKEN_TABLE,
    TextEncoder,
    build_model,
    check_text_config,
    check_tower_config,
    dims,
    text_encoder_tensors,
    tower_sizes,
)

logger = logging.getLogger(__name__)

Source = str | Path | Mapping[str, Tensor] | FineLIPModel | CLIPModel | TextEncoder

# What its authors' models need: heads are 64 wide, save in the image towers of open_clip's H, g and bigG.
_HEAD_WIDTH = 64
_VISION_HEAD_WIDTHS = {1280: 80, 1408: 88, 1664: 104}
# open_clip's large text towers (H, g, bigG); OpenAI's, Long-CLIP's and FineLIP's are 512 and 768 wide.
_OPEN_CLIP_TEXT_WIDTHS = (1024, 1280)

_SECOND_TABLE = "text_model.embeddings.position_embedding_res.weight"
_PATCHES = "vision_model.embeddings.patch_embedding.weight"


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
    """Load CLIP weights of any common layout as a FineLIP whose text tower reads 248 positions.

    `source` is one of

    - a `.pt`, `.pth` or `.bin` file (loaded with `weights_only=True`) or a `.safetensors` file: a FineLIP, Long-CLIP or
      SmartCLIP checkpoint, an OpenAI CLIP or open_clip state dict (ViT), also nested under `state_dict` or `model` and
      with `module.` before its keys, or a bare transformers CLIP file;
    - a directory or hub id of a transformers CLIP model (also of Long-CLIP and FG-CLIP v1), of a CLIP text encoder, or
      of what `FineLIPModel` saved;
    - `miniature-clip-1` or `-2`, `miniature-finelip-1` or `-2`: of the miniature that comes with this package;
    - a state dict in memory, or a loaded `FineLIPModel`, `CLIPModel`, `CLIPTextModel` or
      `CLIPTextModelWithProjection`, which is not modified; on the CPU, unchanged weights share its memory.

    The number of positions is that of the tensors, whatever a config says. Two tables (FineLIP and Long-CLIP train the
    later rows in a second one) are merged: rows before `keep` from the first, the others from the second. Of FG-CLIP,
    which has parts for short and for long texts, those for long ones are taken. 77 rows are stretched, and the text
    config then records `stretched_from`, `stretch_keep` and `stretch_factor`; more rows stay.

    A file without a config does not say all: heads are taken to be 64 wide (80, 88 and 104 in the image towers of
    open_clip's H, g and bigG). The activation is QuickGELU if the keys are those of a published checkpoint or of
    OpenAI's, GELU if the text tower is as wide as open_clip's H, g or bigG, and otherwise QuickGELU, which is right for
    OpenAI's weights and wrong for LAION's smaller ones: pass `activation="gelu"` there.

    Args:
        source: see above.
        keep: leading positions that a stretch leaves alone, and that a second table leaves to the first.
        factor: positions that a stretch makes of each later one, from 1 to 1000.
        dtype: of the model; by default the widest in `source`, so that nothing is lost.
        activation: "quick_gelu" or "gelu", against what the source says or suggests.
        subfolder: of a directory or hub repository, e.g. "text_encoder" for an SDXL.
        variant: of the weights in a directory or hub repository, e.g. "fp16" for `model.fp16.safetensors`. Without it,
            the plain ones, or those of the only variant that is there, which is then logged.
        **hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only`, as for `from_pretrained`.

    Returns:
        The model, in evaluation mode. It has an image tower, projections and the weights of a token refinement where
        `source` has them.

    Raises:
        FileNotFoundError: if a path, or a file that must be in a directory, does not exist.
        OSError: if a hub repository or a file cannot be read.
        ValueError: if the weights are not a CLIP's (the message says what they look like), incomplete, not finite or
            not those that the config speaks of, if a file holds or leads to more than weights, or if an argument is out
            of range.

    Example:
        >>> from transformers import CLIPTextConfig, CLIPTextModel
        >>> stock = CLIPTextModel(CLIPTextConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=1))
        >>> model = load_finelip(stock)
        >>> model.config.text_config.max_position_embeddings, model.config.text_config.stretched_from
        (248, 77)
    """
    kind = "state dict" if isinstance(source, Mapping) else type(source).__name__
    name = str(Path(source, subfolder)) if isinstance(source, str | Path) else f"The given {kind}"
    tensors, config = _read(source, subfolder, variant, hub_kwargs)
    finelip_config, tensors = convert_weights(
        tensors, config, keep=keep, factor=factor, dtype=dtype, activation=activation, name=name
    )
    if isinstance(source, str | Path):
        setattr(finelip_config.text_config, MADE_FROM, public_name(source))
    if not isinstance(source, FineLIPModel):  # which was loaded, and seen through, by this function
        check_finite(tensors, name)
    return build_model(FineLIPModel, finelip_config, tensors, name)


def save_published(model: FineLIPModel, path: str | Path) -> None:
    """Write a FineLIP as the published checkpoints are: OpenAI's keys, a second positional table, `cross_net.*`.

    What a model lacks (image tower, projections, token refinement) its file lacks too. Both positional tables are
    the whole table, so that their reader may take the rows from either. `load_finelip` gives the same model back, bit
    for bit; only the record of a stretch (`stretched_from`) has no place in such a file.

    Args:
        model: without adapters (merge or unload a LoRA first).
        path: a `.safetensors` or `.pt` file. It is replaced only once the new one is whole.

    Raises:
        ValueError: if `path` has another suffix, or the model is one that this layout, which has no config, cannot
            tell from others: heads that are not 64 wide, GELU, or other positions, image sizes or end tokens than its
            tensors suggest. `save_pretrained` writes those.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from transformers import CLIPTextConfig, CLIPTextModel
        >>> stock = CLIPTextModel(CLIPTextConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=1))
        >>> model = load_finelip(stock)
        >>> with TemporaryDirectory() as folder:
        ...     save_published(model, f"{folder}/finelip.safetensors")
        ...     again = load_finelip(f"{folder}/finelip.safetensors")
        >>> all(torch.equal(weight, again.state_dict()[key]) for key, weight in model.state_dict().items())
        True
    """
    path = Path(path)
    if path.suffix not in (".safetensors", ".pt"):
        raise ValueError(f"{path} is neither named .safetensors nor .pt: give one of these suffixes.")
    _check_published_layout_suffices(model, path)
    tensors = to_published_keys({key: tensor.detach().cpu() for key, tensor in model.state_dict().items()})
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
    """What `load_finelip` makes of a state dict, before a model is built: also for tensors on the meta device.

    Args:
        tensors: of any layout that `load_finelip` takes; emptied on the way, so that fused weights and their parts are
            not all in memory at once.
        config: the content of the `config.json` beside the weights, if there is one.
        keep: see `load_finelip`.
        factor: see `load_finelip`.
        dtype: see `load_finelip`.
        activation: see `load_finelip`.
        name: of the source, for messages.

    Returns:
        The config and the weights of a `FineLIPModel`.

    Raises:
        ValueError: see `load_finelip`.

    Example:
        >>> from transformers import CLIPConfig, CLIPModel
        >>> with torch.device("meta"):
        ...     weights = CLIPModel(CLIPConfig()).state_dict()
        >>> config, weights = convert_weights(weights)
        >>> config.text_config.num_attention_heads, weights[POSITION_TABLE].shape
        (8, torch.Size([248, 512]))
    """
    if activation not in (None, "quick_gelu", "gelu"):
        raise ValueError(f"activation={activation!r} is unknown: give 'quick_gelu', 'gelu' or None.")
    tensors, is_published = to_clip_keys(tensors, name)
    _cast(tensors, dtype, name)
    stretched_from = _settle_positions(tensors, keep, factor, name)
    finelip_config = _derive_config(tensors, config, activation, is_published, name)
    if stretched_from is not None:
        finelip_config.text_config.stretched_from = stretched_from
        finelip_config.text_config.stretch_keep = keep
        finelip_config.text_config.stretch_factor = factor
    scale = finelip_config.logit_scale_init_value
    tensors.setdefault("logit_scale", tensors[POSITION_TABLE].new_tensor(scale))
    return finelip_config, tensors


# Reading: from a source to tensors under its own keys, and its config as a dict if it has one.


def _read(
    source: Source, subfolder: str, variant: str | None, hub_kwargs: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    source = resolve_finelip(source)
    if isinstance(source, CLIPTextModel | CLIPTextModelWithProjection):
        return text_encoder_tensors(source), source.config.to_dict()
    if isinstance(source, FineLIPModel | CLIPModel):
        return {key: tensor.detach() for key, tensor in source.state_dict().items()}, source.config.to_dict()
    if isinstance(source, Mapping):
        return dict(source), None
    if not isinstance(source, str | Path):
        raise ValueError(
            f"A FineLIP comes from a path, a hub id, a state dict or a CLIP model, not from {type(source).__name__}."
        )
    path = Path(source)
    if path.is_file():
        return _unnest(read_tensors(path)), None
    if not path.is_dir() and not _may_be_hub_id(source):
        raise FileNotFoundError(f"{source} does not exist: give a checkpoint file, a model directory or a hub id.")
    return _read_repository(str(source), subfolder, variant, hub_kwargs)


def _may_be_hub_id(source: str | Path) -> bool:
    is_file_name = Path(source).suffix in (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
    return isinstance(source, str) and not is_file_name and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source) is not None


def _unnest(content: Any) -> dict[str, Tensor]:
    """The state dict in what a training script saved."""
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        content = {}
    return {str(key): value for key, value in content.items() if isinstance(value, Tensor)}


def _read_repository(
    source: str, subfolder: str, variant: str | None, hub_kwargs: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    def find(filename: str) -> Path | None:
        return _find_file(source, subfolder, filename, hub_kwargs)

    place = f"{source}/{subfolder}" if subfolder else source
    config_file = find("config.json")
    if config_file is None:
        if find("model_index.json") is not None:
            raise ValueError(
                f"{place} is a whole pipeline: pass an encoder in it, such as {place}/text_encoder (of a hub"
                " repository, subfolder='text_encoder')."
            )
        # What the recipes write: a model in `last`, or a text encoder in each folder of that.
        inner = [Path(place, *parts) for parts in (("last",), ("last", "text_encoder"), ("text_encoder",))]
        found = next((folder for folder in inner if (folder / "config.json").is_file()), None)
        hint = "give a directory or repository of a CLIP model" if found is None else f"give {found}, which does"
        raise FileNotFoundError(f"{place} holds no config.json: {hint}.")
    config = read_json(config_file)
    _check_model_type(config, place)  # before gigabytes are fetched

    files = _weight_files(find, variant)
    if not files and not variant and (only := _only_variant(source, subfolder, hub_kwargs, place)):
        logger.warning("%s holds weights of variant %s alone, so these are loaded.", place, only)
        files = _weight_files(find, only)
    if not files:
        infix = f".{variant}" if variant else ""
        raise FileNotFoundError(f"{place} holds no model{infix}.safetensors or pytorch_model{infix}.bin.")
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors.update(_unnest(read_tensors(file)))
    check_numbers(config, len(tensors), config_file)
    return tensors, config


def _weight_files(find: Callable[[str], Path | None], variant: str | None) -> list[Path]:
    """The files of a model's weights, of a variant if one is given; none if they are not there."""
    infix = f".{variant}" if variant else ""
    for filename in (f"model{infix}.safetensors", f"pytorch_model{infix}.bin"):
        if (file := find(filename)) is not None:
            return [file]
    for filename in (f"model.safetensors.index{infix}.json", f"pytorch_model.bin.index{infix}.json"):
        if (index := find(filename)) is not None:
            shards = {name: find(name) for name in shard_names(index)}
            if lacking := [name for name, shard in shards.items() if shard is None]:
                raise FileNotFoundError(f"{index} names {lacking[0]}, which is not beside it: fetch it as well.")
            return [shard for shard in shards.values() if shard is not None]
    return []


_VARIANT = r"(?:pytorch_)?model(?:\.safetensors\.index|\.bin\.index)?\.([^.-]+)\.(?:safetensors|bin|json)"


def _only_variant(source: str, subfolder: str, hub_kwargs: dict[str, Any], place: str) -> str | None:
    """The variant of the weights in a directory or hub repository, None if there are none.

    Raises:
        ValueError: there are several.
    """
    folder = Path(source, subfolder)
    if folder.is_dir():
        names = [file.name for file in folder.iterdir()]
    else:
        try:
            asked = {name: hub_kwargs[name] for name in ("revision", "token") if name in hub_kwargs}
            paths = list_repo_files(source, **asked)
        except (HfHubHTTPError, OfflineModeIsEnabled, OSError):
            return None
        names = [Path(path).name for path in paths if Path(path).parent == Path(subfolder)]
    matches = [re.fullmatch(_VARIANT, name) for name in names]
    variants = sorted({match[1] for match in matches if match})
    if len(variants) > 1:
        raise ValueError(f"{place} holds weights of variants {', '.join(variants)}: pass one of these as variant=.")
    return variants[0] if variants else None


def _find_file(source: str, subfolder: str, filename: str, hub_kwargs: dict[str, Any]) -> Path | None:
    """A file of a directory or hub repository, None if there is none of that name."""
    if Path(source).is_dir():
        file = Path(source, subfolder, filename)
        return file if file.is_file() else None
    try:
        return Path(hf_hub_download(source, filename, subfolder=subfolder or None, **hub_kwargs))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        if filename != "config.json":  # the repository is in the cache, for its config was found: this file is not
            return None
        raise OSError(f"{source} is no path here, and the hub cannot be reached to look for it there.") from error
    except EntryNotFoundError:
        return None
    except (HfHubHTTPError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise OSError(f"{source} is no path here, and the hub does not give it ({reason}).") from error


# Renaming: from any layout to the keys of `FineLIPModel`.


_NO_WEIGHTS = ("position_ids", "attn_mask", "input_resolution", "context_length", "vocab_size")
# What only training needs: SmartCLIP's networks that mask images, masks of Long-CLIP's two tables, FG-CLIP's scales.
_TRAINING_ONLY = r"^\w*mask\w*\.|(^|\.)mask[12]$|^logit_scale_(finegraind|hardneg)$"
_PUBLISHED_ONLY = r"position(al)?_embedding_res|^input_resolution$|^cross_net\."

_CLIP_TEXT_KEY = r"^(?:text_model\.)*(?:embeddings\.)?token_embedding\.weight$"

# OpenAI's names and ours, either way; ^ and $ are the ends of a key.
_OPENAI_NAMES = (
    ("^token_embedding.weight$", f"^{TOKEN_TABLE}$"),
    ("^positional_embedding$", f"^{POSITION_TABLE}$"),
    ("^positional_embedding_res$", f"^{_SECOND_TABLE}$"),
    ("^text_projection$", "^text_projection.weight$"),
    ("^visual.class_embedding$", "^vision_model.embeddings.class_embedding$"),
    ("^visual.positional_embedding$", "^vision_model.embeddings.position_embedding.weight$"),
    ("^visual.conv1.weight$", f"^{_PATCHES}$"),
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
# FG-CLIP reads long texts with the parts on the left, and short ones with those on the right.
_FOR_LONG_TEXTS = {
    "text_model.embeddings.position_embedding_ori.weight": POSITION_TABLE,
    "text_filip_projection.weight": "text_projection.weight",
}
_TRANSPOSED = ("text_projection.weight", "visual_projection.weight")  # OpenAI multiplies by them from the other side
_TRANSFORMERS_PATTERNS = (
    (r"^(text_model|vision_model)\.(?:\1\.)+", r"\1."),  # wrappers that nest the tower once more
    (r"^(embeddings|encoder|final_layer_norm)\.", r"text_model.\1."),  # CLIPTextModel built by transformers >= 5.6
    (r"\.position_embedding_res$", ".position_embedding_res.weight"),
)


def to_clip_keys(tensors: dict[str, Tensor], name: str) -> tuple[dict[str, Tensor], bool]:
    """Rename the weights of any supported layout to the keys of `FineLIPModel`.

    Args:
        tensors: a state dict; it is emptied on the way.
        name: of the source, for messages.

    Returns:
        The renamed tensors (a second positional table under `…position_embedding_res.weight`), and whether keys were
        there that only OpenAI's and the published FineLIP and Long-CLIP checkpoints have.

    Raises:
        ValueError: if this is no CLIP with a text tower and, where it has an image tower, a ViT.

    Example:
        >>> weights = {"token_embedding.weight": torch.zeros(9, 4), "ln_final.bias": torch.ones(4)}
        >>> sorted(to_clip_keys(weights, "x.pt")[0])
        ['text_model.embeddings.token_embedding.weight', 'text_model.final_layer_norm.bias']
    """
    for prefix in ("module.", "text."):  # of DataParallel, of open_clip's CustomTextCLIP
        for key in [key for key in tensors if key.startswith(prefix)]:
            tensors[key.removeprefix(prefix)] = tensors.pop(key)
    is_published = any(re.search(_PUBLISHED_ONLY, key) for key in tensors)
    for key in [key for key in tensors if key.split(".")[-1] in _NO_WEIGHTS or re.search(_TRAINING_ONLY, key)]:
        del tensors[key]

    if _matches(tensors, _UNSUPPORTED_CLIPS) or not any(re.search(_CLIP_TEXT_KEY, key) for key in tensors):
        raise ValueError(
            f"{name} is not a checkpoint of a CLIP whose text tower can serve here: it looks like"
            f" {describe_weights(tensors)}."
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
            # Cloned, since views would keep the fused weight alive and be saved and trained as one memory.
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                renamed[key.replace("in_proj_", f"{part}_proj.")] = piece.clone()
        else:
            renamed[key] = tensor.T.contiguous() if key in _TRANSPOSED else tensor
    for key, ours in _FOR_LONG_TEXTS.items():
        if key in renamed:
            renamed[ours] = renamed.pop(key)
    return renamed, is_published


def to_published_keys(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of a `FineLIPModel` to the keys of the published FineLIP: the inverse of `to_clip_keys`.

    Args:
        tensors: the state dict of a `FineLIPModel`.

    Returns:
        Contiguous tensors; none shares memory with another.

    Example:
        >>> sorted(to_published_keys({POSITION_TABLE: torch.zeros(248, 4), "image_refinement.scale": torch.ones(1)}))
        ['cross_net.aggr_net.scale', 'positional_embedding', 'positional_embedding_res']
    """
    tensors = {**tensors, _SECOND_TABLE: tensors[POSITION_TABLE].clone()}
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


# What weights are by the keys that only they have; the first match names them. The first kind has CLIP's token table.
_UNSUPPORTED_CLIPS = (
    (r"^logit_bias$|^vision_model\.head\.|^text_model\.head\.", "a SigLIP"),
    (r"rotary|(^|\.)rope\.|inv_freq", "a CLIP with rotary positions (RoPE), and SDXL's encoders have a table of them"),
    (r"^visual\.(layer1|attnpool)\.", "a CLIP with a ResNet for images, and only ViT is supported"),
    (
        r"\.theta$",
        "a CLIP in geometric parametrization (GmP), each of its weights split into theta and r: give the file that its"
        " author has converted back to plain weights",
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
    (r"^text_adapter\.", "an LLM2CLIP, whose texts a language model reads"),
    (r"^clip_[lg]$|^emb_params$|^string_to_param", "a textual inversion"),
    (r"^vision_model\.|^visual\.|^text_model\.class_embedding", "the image tower of a CLIP, without its text tower"),
    (r"aggr_net\.", "a token refinement without its CLIP"),
    (r"^model\.layers\.|(^|\.)embed_tokens\.", "a language model"),
)


def describe_weights(keys: Iterable[str]) -> str:
    """What a state dict looks like, for people, by its keys.

    Example:
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


# Settling: one dtype, one positional table, and the config that the tensors call for.


def _cast(tensors: dict[str, Tensor], dtype: torch.dtype | None, name: str) -> None:
    """Bring all weights to `dtype`, by default to the widest of theirs, one at a time."""
    found = {tensor.dtype for tensor in tensors.values()}
    if odd := found - {torch.float16, torch.bfloat16, torch.float32, torch.float64}:
        raise ValueError(f"{name} holds {odd.pop()} weights: give them in float16, bfloat16 or float32.")
    target = dtype or reduce(torch.promote_types, found)
    for key in tensors:
        tensors[key] = tensors[key].to(target)


def _settle_positions(tensors: dict[str, Tensor], keep: int, factor: int, name: str) -> int | None:
    """Leave one positional table for the text, merged and stretched as it needs; the rows before a stretch, if any."""
    if POSITION_TABLE not in tensors:
        raise ValueError(
            f"{name} lacks the positional table of its text tower: it is no whole checkpoint, or has rotary positions"
            " (RoPE), and SDXL's encoders have a table of them."
        )
    table = tensors[POSITION_TABLE]
    dims({POSITION_TABLE: tuple(table.shape)}, POSITION_TABLE, 2, name)
    second = tensors.pop(_SECOND_TABLE, None)
    check_stretch(max(table.shape[0], STOCK_POSITIONS), keep, factor)
    if second is not None:
        if second.shape != table.shape:
            raise ValueError(
                f"{name} has two positional tables of different shapes, {tuple(table.shape)} and "
                f"{tuple(second.shape)}, which cannot be merged."
            )
        table = torch.cat([table[:keep], second[keep:]])
    rows = table.shape[0]
    if rows < STOCK_POSITIONS:
        raise ValueError(f"{name} has {rows} text positions: a CLIP has {STOCK_POSITIONS}, a stretched one more.")
    is_stock = rows == STOCK_POSITIONS
    tensors[POSITION_TABLE] = stretch_positions(table, keep=keep, factor=factor) if is_stock else table
    return rows if is_stock else None


def _derive_config(
    tensors: Mapping[str, Tensor], given: dict[str, Any] | None, activation: str | None, is_published: bool, name: str
) -> FineLIPConfig:
    """The config of the model: what tensors tell from the tensors, the rest as given or, for a bare file, inferred."""
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    config = _infer_config(shapes, is_published, name) if given is None else _read_config(given, name)
    text = config.text_config
    text.vocab_size, _ = dims(shapes, TOKEN_TABLE, 2, name)
    text.max_position_embeddings, _ = dims(shapes, POSITION_TABLE, 2, name)
    if _PATCHES not in tensors:
        config.vision_config = None
    config.projection_dim = _rows(shapes, "text_projection.weight", name)
    for tower in filter(None, (text, config.vision_config)):
        tower.hidden_act = activation or tower.hidden_act
        tower.projection_dim = config.projection_dim or tower.projection_dim
    config.refined_image_tokens = _rows(shapes, "image_refinement.weight.3.weight", name)
    config.refined_text_tokens = _rows(shapes, "text_refinement.weight.3.weight", name)
    check_text_config(text, shapes, name)
    if config.vision_config is not None:
        check_tower_config(config.vision_config, shapes, "vision_model", name)
    return config


# What a config may say, and which class of transformers knows its fields.
_CONFIG_CLASSES = {
    FineLIPConfig.model_type: FineLIPConfig,
    CLIPConfig.model_type: CLIPConfig,
    "longclip": CLIPConfig,
    CLIPTextConfig.model_type: CLIPTextConfig,
    "longclip_text_model": CLIPTextConfig,
}


def _check_model_type(config: dict[str, Any], name: str) -> None:
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in _CONFIG_CLASSES:
        raise ValueError(
            f"{name} is not a CLIP with a text tower: its config says model_type {model_type!r}, and nothing else can"
            " take the place of SDXL's text encoders."
        )


def _read_config(given: dict[str, Any], name: str) -> FineLIPConfig:
    _check_model_type(given, name)
    known: Any = _CONFIG_CLASSES[given["model_type"]]
    with config_errors(f"The config of {name}"):
        config = known.from_dict({key: value for key, value in given.items() if key != "model_type"})
    if known is CLIPConfig:
        return FineLIPConfig(text_config=config.text_config, vision_config=config.vision_config)
    return FineLIPConfig(text_config=config) if known is CLIPTextConfig else config


def _infer_config(shapes: Shapes, is_published: bool, name: str) -> FineLIPConfig:
    vocab_size, width = dims(shapes, TOKEN_TABLE, 2, name)
    is_open_clip = width in _OPEN_CLIP_TEXT_WIDTHS and not is_published
    hidden_act = "gelu" if is_open_clip else "quick_gelu"
    text_config = CLIPTextConfig(
        hidden_act=hidden_act,
        vocab_size=vocab_size,
        # CLIP's vocabularies end in the start and the end token, and its tokenizer pads with 0.
        bos_token_id=max(vocab_size - 2, 0),
        eos_token_id=vocab_size - 1,
        pad_token_id=0,
        **_tower_sizes(shapes, "text_model", _HEAD_WIDTH, name),
    )
    if _PATCHES not in shapes:
        return FineLIPConfig(text_config=text_config)
    width, channels, _, patch_size = dims(shapes, _PATCHES, 4, name)
    patches = dims(shapes, "vision_model.embeddings.position_embedding.weight", 2, name)[0] - 1
    vision_config = CLIPVisionConfig(
        hidden_act=hidden_act,
        num_channels=channels,
        patch_size=patch_size,
        image_size=patch_size * round(patches**0.5),
        **_tower_sizes(shapes, "vision_model", _VISION_HEAD_WIDTHS.get(width, _HEAD_WIDTH), name),
    )
    return FineLIPConfig(text_config=text_config, vision_config=vision_config)


def _tower_sizes(shapes: Shapes, tower: str, head_width: int, name: str) -> dict[str, Any]:
    sizes = tower_sizes(shapes, tower, name)
    width = sizes["hidden_size"]
    if width % head_width:
        raise ValueError(f"{name} has a {tower} {width} wide, which does not split into heads of {head_width}.")
    return {**sizes, "num_attention_heads": width // head_width}


# What an encoder computes with, and its file without a config leaves to be inferred.
_INFERRED = {
    "text_config": ("num_attention_heads", "hidden_act", "layer_norm_eps", "max_position_embeddings", "eos_token_id"),
    "vision_config": ("num_attention_heads", "hidden_act", "layer_norm_eps", "image_size"),
}


def _check_published_layout_suffices(model: FineLIPModel, path: Path) -> None:
    """Refuse a model that would be read as another."""
    weights = {key: tensor.to("meta") for key, tensor in model.state_dict().items()}
    if adapted := [key for key in weights if "lora" in key or "base_layer" in key]:
        raise ValueError(f"The model has weights such as {adapted[0]!r}: merge or unload the LoRA first.")
    try:
        config, _ = convert_weights(to_published_keys(weights), name=str(path))
    except ValueError as error:
        raise ValueError(f"A published checkpoint cannot hold this model, use save_pretrained: {error}") from error
    for tower, fields in _INFERRED.items():
        for field in fields if getattr(model.config, tower) is not None else ():
            own, inferred = getattr(getattr(model.config, tower), field), getattr(getattr(config, tower), field)
            # 2 is an old config's way to say that the largest id ends a text, which is what is inferred.
            if own != inferred and (field, own) != ("eos_token_id", 2):
                raise ValueError(
                    f"A published checkpoint cannot hold this model, use save_pretrained: its {tower} has {field} "
                    f"{own!r}, and {path.name} would be read with {inferred!r}."
                )


def _rows(shapes: Shapes, key: str, name: str) -> int | None:
    return dims(shapes, key, 2, name)[0] if key in shapes else None
