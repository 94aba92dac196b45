"""The type of a pipeline for functions of this package: its parts and options, for every class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from finelip_sdxl.conditioning_adapter import ConditioningAdapter


class LongPromptPipeline(Protocol):
    """A pipeline with `LongPromptMixin`.

    Attributes:
        text_encoder, text_encoder_2: SDXL's text encoders; None where there is none.
        conditioning_adapter: the adapter; None if there is none.
        hidden_states: the states that the UNet gets, `"penultimate"` or `"last"`.
        config: the options, and the names of sources.
        components: the parts by their names.
    """

    text_encoder: Any
    text_encoder_2: Any
    conditioning_adapter: ConditioningAdapter | None

    @property
    def hidden_states(self) -> str: ...

    @property
    def config(self) -> Mapping[str, Any]: ...

    @property
    def components(self) -> Mapping[str, Any]: ...

    @classmethod
    def _stock_class(cls) -> type[DiffusionPipeline]: ...
