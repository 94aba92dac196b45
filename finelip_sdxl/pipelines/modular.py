"""A text-encoder block for Modular Diffusers: prompts of any length in place of `StableDiffusionXLTextEncoderStep`."""

import inspect
from typing import Any

import torch
from diffusers.modular_pipelines.modular_pipeline import PipelineState
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, ConfigSpec, InputParam, OutputParam
from diffusers.modular_pipelines.stable_diffusion_xl.encoders import StableDiffusionXLTextEncoderStep
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from finelip_sdxl.conditioning_adapter import ConditioningAdapter
from finelip_sdxl.foreign_files import read_json
from finelip_sdxl.names import resolve
from finelip_sdxl.options import ENCODERS
from finelip_sdxl.pipelines.calls import OPTIONS
from finelip_sdxl.pipelines.encoder_swap import ADAPTER, ORIGINAL_ENCODERS, own_adapter
from finelip_sdxl.pipelines.long_prompt import LongPromptMixin
from finelip_sdxl.pipelines.prompt_encoding import EMBEDDINGS
from finelip_sdxl.pipelines.stable_diffusion_xl import FineLIPSDXLPipeline
from finelip_sdxl.prompts.plan import PromptPlan

_OPTION_INPUTS = {
    "short_prompt_encoder": "Encoder of prompts of up to 77 tokens: 'original' or 'long'.",
    "hidden_states": "States that the UNet gets: 'penultimate' or 'last'.",
    "overflow": "Treatment of tokens past 248: 'window', 'truncate' or 'error'.",
    "length_buckets": "Lengths in tokens to which prompts are padded; empty for full length always.",
    "weighting": "Syntax of weights in the prompts: 'compel' or 'a1111'.",
    "emphasis": "Effect of a weight: 'compel', 'a1111', 'a1111_no_norm' or 'comfyui'.",
}


class FineLIPSDXLTextEncoderStep(StableDiffusionXLTextEncoderStep):
    """The text-encoder block of Modular Diffusers' SDXL, for prompts of any length.

    It encodes as `FineLIPSDXLPipeline` does, bit for bit. Its components are those of Diffusers' block, the original
    text encoders and the conditioning adapter. A folder that this package saved holds all of them; those of a pipeline
    that is loaded go to `update_components`.

    Its inputs are those of Diffusers' block, the options of a pipeline of this package (None stands for the value in
    the modular pipeline's config) and `conditioning_adapter_scale`. Its outputs are the embeddings and `prompt_report`,
    the `PromptPlan` of the prompts, which is printed as a report.

    A call of the modular pipeline raises:
        TypeError, ValueError: as `FineLIPSDXLPipeline.encode_prompt`; or an encoder or a tokenizer is missing, or the
            encoders have 77 positions.

    Examples:
        >>> from diffusers import StableDiffusionXLAutoBlocks
        >>> from finelip_sdxl import FineLIPSDXLPipeline
        >>> blocks = StableDiffusionXLAutoBlocks().get_workflow("text2image")
        >>> blocks.sub_blocks["text_encoder"] = FineLIPSDXLTextEncoderStep()
        >>> pipe = blocks.init_pipeline()
        >>> pipe.update_components(**FineLIPSDXLPipeline.from_pretrained("miniature").components)
        >>> pipe.set_progress_bar_config(disable=True)
        >>> found = pipe(
        ...     prompt="A red star is in the top left. " * 12, num_inference_steps=2, output=["images", "prompt_report"]
        ... )
        >>> found["images"][0].size, found["prompt_report"].positions
        ((192, 192), 154)
    """

    @property
    def description(self) -> str:
        return "Text-encoder step for prompts of any length, with text encoders of 248 positions."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        own = (*zip(ORIGINAL_ENCODERS, (CLIPTextModel, CLIPTextModelWithProjection), strict=True),)
        specs = [ComponentSpec(name, kind) for name, kind in (*own, (ADAPTER, ConditioningAdapter))]
        return [*super().expected_components, *specs]

    @property
    def expected_configs(self) -> list[ConfigSpec]:
        parameters = inspect.signature(LongPromptMixin.__init__).parameters
        return [*super().expected_configs, *(ConfigSpec(name, parameters[name].default) for name in OPTIONS)]

    @property
    def inputs(self) -> list[InputParam]:
        options = [InputParam(name, description=description) for name, description in _OPTION_INPUTS.items()]
        scale = InputParam("conditioning_adapter_scale", default=1.0, description="Share of the adapter, from 0 to 1.")
        return [*super().inputs, *options, scale]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        report = OutputParam("prompt_report", PromptPlan, "The windows of each encoder, and the text that is cut.")
        return [*super().intermediate_outputs, report]

    @torch.no_grad()
    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        given: Any = self.get_block_state(state)
        _check_components(components)
        _load_own_adapter(components)
        # A guider that stopped early in the last picture says so until it is told of a new one.
        components.guider.set_state(step=0, num_inference_steps=None, timestep=None)
        embeddings, given.prompt_report = _encoding_pipeline(components, given)._encode_prompt(
            given.prompt,
            given.prompt_2,
            components._execution_device,
            do_classifier_free_guidance=components.guider.num_conditions > 1,
            negative_prompt=given.negative_prompt,
            negative_prompt_2=given.negative_prompt_2,
            lora_scale=(given.cross_attention_kwargs or {}).get("scale"),
            clip_skip=given.clip_skip,
        )
        for name, value in zip(EMBEDDINGS, embeddings, strict=True):
            given[name] = value
        self.set_block_state(state, given)
        return components, state


def _check_components(components: Any) -> None:
    missing = [name for pair in ENCODERS.items() for name in pair if getattr(components, name) is None]
    if missing and missing != ["text_encoder", "tokenizer"]:  # a refiner has neither
        raise ValueError(
            f"The modular pipeline has no {' and no '.join(missing)}: call load_components(), or pass all of a"
            " FineLIPSDXLPipeline's components to update_components."
        )


def _load_own_adapter(components: Any) -> None:
    """Load the conditioning adapter from where the text encoders are from. Its entry there is one that Diffusers
    skips, so that stock pipelines open such a folder."""
    specs = [components.get_component_spec(name) for name in ENCODERS]
    base, variant, revision = specs[0].pretrained_model_name_or_path, specs[0].variant, specs[0].revision
    if components.conditioning_adapter is not None or any(spec.pretrained_model_name_or_path != base for spec in specs):
        return
    hub_arguments = {} if revision is None else {"revision": revision}
    index = None if base is None else resolve(base, **hub_arguments).find("model_index.json", is_optional=True)
    if index is not None and read_json(index).get(ADAPTER):
        encoder = components.text_encoder_2
        adapter = own_adapter(base, variant, dtype=encoder.dtype, **hub_arguments)
        components.update_components(conditioning_adapter=adapter.to(encoder.device))


def _encoding_pipeline(components: Any, given: Any) -> FineLIPSDXLPipeline:
    """A pipeline of the components that encode a prompt, with the options of a call."""
    names = (*ENCODERS, *ENCODERS.values(), *ORIGINAL_ENCODERS, ADAPTER)
    options = {name: components.config[name] if given[name] is None else given[name] for name in OPTIONS}
    pipe = FineLIPSDXLPipeline(
        vae=None,
        unet=None,
        scheduler=None,
        force_zeros_for_empty_prompt=components.config.force_zeros_for_empty_prompt,
        add_watermarker=False,
        **{name: getattr(components, name) for name in names},
        **options,
    )
    pipe.set_conditioning_adapter_scale(given.conditioning_adapter_scale)
    if not pipe._has_long_encoders():
        raise ValueError(
            "These text encoders have 77 positions: load a folder that FineLIPSDXLPipeline.save_pretrained wrote, or"
            " pass all of a FineLIPSDXLPipeline's components to update_components."
        )
    return pipe
