"""Long prompts for SDXL: FineLIP text encoders of 248 positions in a Diffusers pipeline."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from finelip_sdxl.console import drop_torchvision_warnings

drop_torchvision_warnings()

if TYPE_CHECKING:
    __version__: str
    from finelip_sdxl.attribution.trace import AttentionTrace, Phrase, trace_attention
    from finelip_sdxl.checkpoints.load import load_finelip, save_openai_layout
    from finelip_sdxl.conditioning import Conditioning
    from finelip_sdxl.conditioning_adapter import ConditioningAdapter
    from finelip_sdxl.interaction import late_interaction
    from finelip_sdxl.losses import contrastive_loss, triplet_margin_loss
    from finelip_sdxl.miniature import miniature_clip, miniature_finelip, miniature_path
    from finelip_sdxl.model import FineLIPConfig, FineLIPModel
    from finelip_sdxl.pipelines import (
        FineLIPSDXLAdapterPipeline,
        FineLIPSDXLControlNetImg2ImgPipeline,
        FineLIPSDXLControlNetInpaintPipeline,
        FineLIPSDXLControlNetPipeline,
        FineLIPSDXLControlNetUnionImg2ImgPipeline,
        FineLIPSDXLControlNetUnionInpaintPipeline,
        FineLIPSDXLControlNetUnionPipeline,
        FineLIPSDXLImg2ImgPipeline,
        FineLIPSDXLInpaintPipeline,
        FineLIPSDXLPipeline,
        long_prompts,
    )
    from finelip_sdxl.pipelines.regional_prompts import regional_prompts
    from finelip_sdxl.stretch import stretch_positions
    from finelip_sdxl.token_refinement import TokenRefinement

# Public names and the modules that hold them, imported on first use: `import finelip_sdxl` alone stays cheap.
_EXPORTS = {
    "AttentionTrace": "finelip_sdxl.attribution.trace",
    "Conditioning": "finelip_sdxl.conditioning",
    "ConditioningAdapter": "finelip_sdxl.conditioning_adapter",
    "FineLIPConfig": "finelip_sdxl.model",
    "FineLIPModel": "finelip_sdxl.model",
    "FineLIPSDXLAdapterPipeline": "finelip_sdxl.pipelines",
    "FineLIPSDXLControlNetImg2ImgPipeline": "finelip_sdxl.pipelines",
    "FineLIPSDXLControlNetInpaintPipeline": "finelip_sdxl.pipelines",
    "FineLIPSDXLControlNetPipeline": "finelip_sdxl.pipelines",
    "FineLIPSDXLControlNetUnionImg2ImgPipeline": "finelip_sdxl.pipelines",
    "FineLIPSDXLControlNetUnionInpaintPipeline": "finelip_sdxl.pipelines",
    "FineLIPSDXLControlNetUnionPipeline": "finelip_sdxl.pipelines",
    "FineLIPSDXLImg2ImgPipeline": "finelip_sdxl.pipelines",
    "FineLIPSDXLInpaintPipeline": "finelip_sdxl.pipelines",
    "FineLIPSDXLPipeline": "finelip_sdxl.pipelines",
    "Phrase": "finelip_sdxl.attribution.trace",
    "TokenRefinement": "finelip_sdxl.token_refinement",
    "contrastive_loss": "finelip_sdxl.losses",
    "late_interaction": "finelip_sdxl.interaction",
    "load_finelip": "finelip_sdxl.checkpoints.load",
    "long_prompts": "finelip_sdxl.pipelines",
    "miniature_clip": "finelip_sdxl.miniature",
    "miniature_finelip": "finelip_sdxl.miniature",
    "miniature_path": "finelip_sdxl.miniature",
    "regional_prompts": "finelip_sdxl.pipelines.regional_prompts",
    "save_openai_layout": "finelip_sdxl.checkpoints.load",
    "stretch_positions": "finelip_sdxl.stretch",
    "trace_attention": "finelip_sdxl.attribution.trace",
    "triplet_margin_loss": "finelip_sdxl.losses",
}

__all__ = [
    "AttentionTrace",
    "Conditioning",
    "ConditioningAdapter",
    "FineLIPConfig",
    "FineLIPModel",
    "FineLIPSDXLAdapterPipeline",
    "FineLIPSDXLControlNetImg2ImgPipeline",
    "FineLIPSDXLControlNetInpaintPipeline",
    "FineLIPSDXLControlNetPipeline",
    "FineLIPSDXLControlNetUnionImg2ImgPipeline",
    "FineLIPSDXLControlNetUnionInpaintPipeline",
    "FineLIPSDXLControlNetUnionPipeline",
    "FineLIPSDXLImg2ImgPipeline",
    "FineLIPSDXLInpaintPipeline",
    "FineLIPSDXLPipeline",
    "Phrase",
    "TokenRefinement",
    "__version__",
    "contrastive_loss",
    "late_interaction",
    "load_finelip",
    "long_prompts",
    "miniature_clip",
    "miniature_finelip",
    "miniature_path",
    "regional_prompts",
    "save_openai_layout",
    "stretch_positions",
    "trace_attention",
    "triplet_margin_loss",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    if name == "__version__":
        return import_module("importlib.metadata").version("finelip-sdxl")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
