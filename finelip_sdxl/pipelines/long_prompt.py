"""`LongPromptMixin`, the common part of all pipelines: encoders of 248 positions, and prompts of any length."""

import inspect
import json
import os
import re
from collections.abc import Sequence
from functools import wraps
from textwrap import dedent, indent
from typing import Any, get_type_hints

from diffusers.hooks import apply_group_offloading
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from finelip_sdxl.attribution.trace import traced_call
from finelip_sdxl.conditioning_adapter import ConditioningAdapter
from finelip_sdxl.old_names import with_new_names
from finelip_sdxl.options import (
    AS_SET,
    LENGTH_BUCKETS,
    Emphasis,
    HiddenStates,
    Overflow,
    ShortPromptEncoder,
    Weighting,
    check_adapter_scale,
)
from finelip_sdxl.picture_sizes import check_side, side_factor
from finelip_sdxl.pipelines.calls import OPTIONS, check_numbers, option_in_force, takes_options
from finelip_sdxl.pipelines.encoder_swap import ADAPTER, ORIGINAL_ENCODERS, UNSWAPPED, EncoderSwapMixin
from finelip_sdxl.pipelines.loras import loras_of
from finelip_sdxl.pipelines.prompt_encoding import EMBEDDINGS, one_at_a_time
from finelip_sdxl.pipelines.regional_prompts import regional_call
from finelip_sdxl.pipelines.schedules import scheduled_call
from finelip_sdxl.pipelines.stock_class import IMAGES, VIDEOS, check_stock_class, encode_prompt_arguments
from finelip_sdxl.pipelines.text_projections import cached_text_projections
from finelip_sdxl.recommended import recommended_arguments


def _option(name: str, doc: str) -> property:
    """A property for an option in the pipeline's config, where Diffusers saves it and `from_pipe` finds it. During a
    call, its value is the call's."""
    return property(
        lambda self: option_in_force(self, name, self.config[name]),
        lambda self, value: self.register_to_config(**{name: OPTIONS[name](value)}),
        doc=doc,
    )


class LongPromptMixin(EncoderSwapMixin):
    """Prompts of any length for an SDXL pipeline of Diffusers.

    `finelip_sdxl.long_prompts` makes a subclass of any class that has SDXL's `encode_prompt`. A subclass with a name of
    its own needs no body: `class MyPipeline(LongPromptMixin, StableDiffusionXLPipeline): ...`.

    A call is the parent's, for one thread at a time: a second thread waits until the first has drawn, also on another
    pipeline that `from_pipe` made of this one. Pipelines with schedulers of their own draw at the same time.

    A pipeline that is built directly from components changes none of them. With encoders of 77 positions it behaves as
    its parent does. `from_pretrained` and `swap_text_encoders` put in encoders of 248 positions.

    Args:
        stock_text_encoder, stock_text_encoder_2: the original text encoders, for short prompts, where the main ones
            were replaced. Encoders that were only stretched need none: their tables hold stock's rows unchanged.
        conditioning_adapter: a network that brings the states of replaced encoders to where the UNet knows them. Texts
            encoded as stock does skip it.
        short_prompt_encoder: `"original"` encodes prompts of up to 77 tokens exactly as stock SDXL does, `"long"`
            encodes them like longer ones.
        hidden_states: `"penultimate"`, on which SDXL's UNet was trained, or `"last"`, the last layer's after the
            final norm, as in FineLIP's published recipe. Texts encoded as stock does have penultimate states always.
        overflow: treatment of prompts of more than 248 tokens: `"window"` encodes all of it in windows of 248, at most
            100 of them (see `finelip_sdxl.options.MAX_POSITIONS`), `"truncate"` cuts and logs the lost text, `"error"`
            raises.
        length_buckets: lengths in tokens; a prompt is padded to the smallest that holds it, or else to full length.
            Empty pads to full length always, as stock pipelines do.
        weighting: the syntax of weights in prompts, `"compel"` or `"a1111"`; with None all of a prompt is plain text.
            See `finelip_sdxl.prompts.weighting`.
        emphasis: the effect of a weight on a token's states: `"compel"`, `"a1111"`, `"a1111_no_norm"` or `"comfyui"`,
            each as that tool computes it.
    """

    def __init__(
        self,
        *args: Any,
        stock_text_encoder: CLIPTextModel | None = None,
        stock_text_encoder_2: CLIPTextModelWithProjection | None = None,
        conditioning_adapter: ConditioningAdapter | None = None,
        # `str` in place of literals: Diffusers inspects these types too, and knows classes only.
        short_prompt_encoder: str = "original",
        hidden_states: str = "penultimate",
        overflow: str = "window",
        length_buckets: list[int] | tuple[int, ...] | None = LENGTH_BUCKETS,
        weighting: str | None = None,
        emphasis: str = "compel",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.register_modules(
            stock_text_encoder=stock_text_encoder,
            stock_text_encoder_2=stock_text_encoder_2,
            conditioning_adapter=conditioning_adapter,
        )
        self.short_prompt_encoder = short_prompt_encoder
        self.hidden_states = hidden_states
        self.overflow = overflow
        self.length_buckets = length_buckets
        self.weighting = weighting
        self.emphasis = emphasis
        self._conditioning_adapter_scale = 1.0
        self._caches_text_projections = False
        self._said: set[str] = set()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own: Any = cls  # to a type checker these are not for assignment
        if LongPromptMixin in cls.__bases__:
            stock: Any = cls._stock_class()
            check_stock_class(stock)
            if cls.__doc__ is not None:  # without one, Python shows that of the mixin
                cls.__doc__ = _with_arguments(cls.__doc__, LongPromptMixin.__doc__)
            own._optional_components = [*stock._optional_components, *ORIGINAL_ENCODERS, ADAPTER]
            sequence = stock.model_cpu_offload_seq.replace("unet", f"{ADAPTER}->unet")
            own.model_cpu_offload_seq = "->".join([*ORIGINAL_ENCODERS, sequence])
            if VIDEOS in encode_prompt_arguments(stock):
                own.encode_prompt = _encodes_for_videos
        if "__call__" in vars(cls):
            own.__call__ = one_at_a_time(own.__call__)
        elif LongPromptMixin in cls.__bases__:
            _spell_out_call(cls)
        _spell_out_init(cls)

    @takes_options
    @one_at_a_time
    def __call__(
        self,
        /,
        *args: Any,
        short_prompt_encoder: ShortPromptEncoder = AS_SET,
        hidden_states: HiddenStates = AS_SET,
        overflow: Overflow = AS_SET,
        length_buckets: Sequence[int] | None = AS_SET,
        weighting: Weighting | None = AS_SET,
        emphasis: Emphasis = AS_SET,
        conditioning_adapter_scale: float = AS_SET,
        lora_dir: str | os.PathLike[str] | None = AS_SET,
        encoder_fingerprint: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Draw with Diffusers' own `__call__`, whose arguments come first. The options hold for this call alone; those
        that are left out are the pipeline's.

        Args:
            short_prompt_encoder (`str`, *optional*):
                The encoder of prompts of up to 77 tokens: `"original"`, as stock SDXL encodes them, or `"long"`. This
                option and the ones below hold for this call alone; the default is the pipeline's own value.
            hidden_states (`str`, *optional*):
                The text encoders' states that the UNet gets: `"penultimate"` or `"last"`.
            overflow (`str`, *optional*):
                Treatment of a prompt of more than 248 tokens: `"window"` encodes all of it, `"truncate"` cuts it,
                `"error"` raises.
            length_buckets (`Sequence[int]`, *optional*):
                Lengths in tokens; the prompt is padded to the smallest that holds it, or else to full length.
            weighting (`str`, *optional*):
                Syntax of weights in the prompts: `"compel"` or `"a1111"`, which also has schedules such as
                `[red:blue:0.5]`; with None they are plain text.
            emphasis (`str`, *optional*):
                Effect of a weight: `"compel"`, `"a1111"`, `"a1111_no_norm"` or `"comfyui"`.
            conditioning_adapter_scale (`float`, *optional*):
                Share of the conditioning adapter, from 0, as without it, to 1.
            lora_dir (`str`, *optional*):
                Folder of LoRAs. Those that the prompts name, as `<lora:name:0.8>`, are loaded for this call, and no
                other pipeline of this UNet may draw meanwhile. Without it they are left out, and logged.
            encoder_fingerprint (`str`, *optional*):
                Fingerprint of the text encoders that the embeddings are from. `pipe(**conditioning)` passes it; the
                pipeline's own encoders must be the same, if it has any.

        Raises:
            ValueError: an argument has a value that cannot be, embeddings are from other text encoders, a prompt names
                a LoRA that is not in `lora_dir` or does not fit, or it has a schedule that this pipeline cannot draw.
        """
        self._check_fingerprint(encoder_fingerprint)
        call = super().__call__
        for name in ("num_inference_steps", "guidance_scale"):  # None stands for the default: in Diffusers it fails
            if name in kwargs and kwargs[name] is None:
                del kwargs[name]
        bound = inspect.signature(call).bind_partial(*args, **kwargs)
        given = bound.arguments
        check_numbers(given)
        # Checked here, since the parent uses their shapes before it encodes.
        self._check_embeddings(**{name: given[name] for name in EMBEDDINGS if name in given})
        for name in ("width", "height"):
            if given.get(name):  # 0 stands for the model's own in Diffusers
                check_side(name, given[name], side_factor(self))
        denoisers = (self.unet, getattr(self, "controlnet", None)) if self._caches_text_projections else ()
        texts = [given.get(name) for name in ("prompt", "prompt_2")]
        loras = loras_of(self, texts, option_in_force(self, "lora_dir", None))
        schedule = scheduled_call(self, call, bound)
        # The trace begins after the regions' texts are encoded: it is of the picture's own.
        with loras, cached_text_projections(denoisers), regional_call(self, given), traced_call(self, given), schedule:
            return call(*bound.args, **bound.kwargs, **recommended_arguments(self.config, given))

    short_prompt_encoder = _option(
        "short_prompt_encoder", "The encoder of prompts of up to 77 tokens: 'original' or 'long'."
    )
    hidden_states = _option("hidden_states", "The states that the UNet gets: 'penultimate' or 'last'.")
    overflow = _option("overflow", "The treatment of tokens past 248: 'window', 'truncate' or 'error'.")
    length_buckets = _option("length_buckets", "Lengths in tokens to which prompts are padded, ascending.")
    weighting = _option("weighting", "The syntax of weights in prompts: None, 'compel' or 'a1111'.")
    emphasis = _option("emphasis", "The effect of a weight: 'compel', 'a1111', 'a1111_no_norm' or 'comfyui'.")

    @property
    def conditioning_adapter_scale(self) -> float:
        """The share of the conditioning adapter, 0 to 1; see `set_conditioning_adapter_scale`."""
        scale: float = option_in_force(self, "conditioning_adapter_scale", self._conditioning_adapter_scale)
        return scale

    def set_conditioning_adapter_scale(self, scale: float) -> None:
        """Set the share of the conditioning adapter in later calls. (A call takes one for itself, too.)

        The scale belongs to this pipeline. `from_pipe` copies it to the new one; afterward each has its own, so
        threads that need different scales use a pipeline each. `save_pretrained` does not save it.

        Args:
            scale: from 0, as without an adapter, to 1, the default and the whole adapter.

        Raises:
            ValueError: the scale is out of range.

        Examples:
            >>> from finelip_sdxl import FineLIPSDXLPipeline
            >>> pipe = FineLIPSDXLPipeline.from_pretrained("miniature")
            >>> pipe.set_conditioning_adapter_scale(0.5)
            >>> pipe.conditioning_adapter_scale
            0.5
        """
        self._conditioning_adapter_scale = check_adapter_scale(scale)

    def enable_text_projection_cache(self) -> None:
        """Compute keys and values of the text once a call, in place of once a step, in later calls.

        The UNet's cross-attention layers, and a ControlNet's, project the text embeddings at every step, and the
        results are always the same. With the cache, pictures are bit for bit those without it, and a long prompt costs
        hardly more than a short one. Embeddings that a callback replaces or changes in place are projected again, and
        so is everything after a change of the weights, such as a LoRA that is fused. Only changes through `.data` or
        NumPy are not seen within a call. Compiled models, layers with group offloading of leaves or layerwise casting,
        and calls with gradients or in inference mode go on without it.

        As long as a call lasts, the cache takes (numbers of keys and values of all these layers) · (positions) · (rows:
        images, twice with guidance) · (bytes of a number) of the device's memory. The UNet of SDXL has 166,400 such
        numbers, so one image with guidance takes 165 MB at 248 positions in half precision, and 51 MB at 77. A
        ControlNet of SDXL has 81,920.

        This belongs to the pipeline. `from_pipe` copies it to the new one; `save_pretrained` does not save it.

        Examples:
            >>> from finelip_sdxl import FineLIPSDXLPipeline
            >>> pipe = FineLIPSDXLPipeline.from_pretrained("miniature")
            >>> pipe.set_progress_bar_config(disable=True)
            >>> pipe.enable_text_projection_cache()
            >>> pipe("a red star", num_inference_steps=2).images[0].size
            (192, 192)
        """
        self._caches_text_projections = True

    def disable_text_projection_cache(self) -> None:
        """Compute keys and values of the text at every step again."""
        self._caches_text_projections = False

    @property
    def components(self) -> dict[str, Any]:
        """The parent's components, and this class's own that are not None."""
        own = (*ORIGINAL_ENCODERS, ADAPTER)
        return {name: part for name, part in super().components.items() if name not in own or part is not None}

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        """Write `model_index.json` for stock Diffusers: stock's class name, and no options that have their defaults."""
        config = json.loads(self.to_json_string())
        config["_class_name"] = self._stock_class().__name__
        parameters = inspect.signature(LongPromptMixin.__init__).parameters
        for name in OPTIONS:
            if self.config[name] == parameters[name].default:
                del config[name]
        for name in ORIGINAL_ENCODERS:
            if config[name] == [None, None]:
                del config[name]
        # With a component's usual entry, which names a module, Diffusers would refuse to download the repository.
        del config[ADAPTER]
        if self.conditioning_adapter is not None:
            config[ADAPTER] = f"{ConditioningAdapter.__module__}.{ConditioningAdapter.__qualname__}"
        if "length_buckets" in config:  # an empty list there breaks Diffusers' downloads
            config["length_buckets"] = config["length_buckets"] or None
        if self._encoders() and not self._has_long_encoders():
            config[UNSWAPPED] = True
        with open(json_file_path, "w", encoding="utf-8") as file:
            file.write(json.dumps(config, indent=2, sort_keys=True) + "\n")

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict[str, Any], ...]:
        """As the parent; options of older folders are renamed, and the adapter's entry is left to `from_pretrained`."""
        renamed = with_new_names(config_dict).items()
        own = {name: value for name, value in renamed if name != ADAPTER or not isinstance(value, str)}
        return super().extract_init_dict(own, **kwargs)

    def unload_lora_weights(self, *args: Any, **kwargs: Any) -> None:
        """As the parent. Encoders that keep a fused LoRA record it in their configs: nothing else shows it then."""
        for encoder in (self.text_encoder, self.text_encoder_2):
            if encoder is not None and any(getattr(module, "merged_adapters", ()) for module in encoder.modules()):
                encoder.config.has_fused_lora = True
        super().unload_lora_weights(*args, **kwargs)

    def enable_group_offload(self, *args: Any, **kwargs: Any) -> None:
        """As the parent. On disk, original encoders get folders of their own: Diffusers names files by layers alone,
        and these have the layer names of their replacements."""
        given = inspect.signature(super().enable_group_offload).bind(*args, **kwargs).arguments
        disk: Any = given.get("offload_to_disk_path")
        excluded = given.pop("exclude_modules", None) or []
        excluded = [excluded] if isinstance(excluded, str) else excluded
        apart = [
            name for name in ORIGINAL_ENCODERS if disk and getattr(self, name) is not None and name not in excluded
        ]
        super().enable_group_offload(**given, exclude_modules=[*excluded, *apart])
        for name in apart:
            given["offload_to_disk_path"] = os.path.join(disk, name)
            apply_group_offloading(getattr(self, name), **given)


@wraps(LongPromptMixin.encode_prompt)
def _encodes_for_videos(self: Any, *args: Any, **kwargs: Any) -> Any:
    """`encode_prompt` of a parent that counts videos where others count images."""
    if VIDEOS in kwargs:
        kwargs[IMAGES] = kwargs.pop(VIDEOS)
    return LongPromptMixin.encode_prompt(self, *args, **kwargs)


def _spell_out_call(cls: type) -> None:
    """Set a `__call__` of `cls` whose signature and docstring hold every argument: the parent's, then the options.

    It does what `LongPromptMixin.__call__` does. The parents have different arguments, so that one method cannot name
    them.
    """
    parent: Any = super(LongPromptMixin, cls).__call__  # type: ignore[misc]

    @wraps(parent)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        return LongPromptMixin.__call__(self, *args, **kwargs)

    signature, ours = inspect.signature(parent), inspect.signature(LongPromptMixin.__call__)
    parameters = [
        *(parameter for parameter in signature.parameters.values() if parameter.kind is not parameter.VAR_KEYWORD),
        *(parameter for parameter in ours.parameters.values() if parameter.kind is parameter.KEYWORD_ONLY),
    ]
    spelled_out: Any = __call__
    spelled_out.__signature__ = signature.replace(parameters=parameters)
    # Diffusers' example is left out: it is one of another class, and needs a hub.
    without_example = re.sub(r"\n *Examples?:\n.*?(?=\n *Returns:|\Z)", "\n", parent.__doc__ or "", flags=re.DOTALL)
    spelled_out.__doc__ = _with_arguments(without_example, LongPromptMixin.__call__.__doc__)
    spelled_out.__qualname__ = f"{cls.__qualname__}.__call__"
    cls.__call__ = spelled_out  # type: ignore[method-assign]


def _with_arguments(doc: str | None, ours: str | None) -> str:
    """A docstring with the arguments of another after its own."""
    parts = re.split(r"\n(?=Returns:|Examples:)", inspect.cleandoc(doc or ""), maxsplit=1)
    before = parts[0].rstrip() if "\nArgs:\n" in parts[0] else f"{parts[0].rstrip()}\n\nArgs:"
    arguments = inspect.cleandoc(ours or "").partition("Args:\n")[2].partition("\n\n")[0]
    return "\n".join([before, f"{indent(dedent(arguments), '    ')}\n", *parts[1:]])


def _spell_out_init(cls: type) -> None:
    """Set a signature with every argument for the `__init__` of `cls`: its own arguments, and all parents'.

    Diffusers takes the names and types of a pipeline's components and options from that signature, in many places. The
    parents have different ones. Written out, each would be a method of some twenty arguments, kept in step with
    Diffusers by hand.
    """
    if "__init__" not in vars(cls):

        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            super(cls, self).__init__(*args, **kwargs)  # type: ignore[arg-type]

        __init__.__qualname__ = f"{cls.__qualname__}.__init__"
        cls.__init__ = __init__  # type: ignore[misc]

    parameters: dict[str, inspect.Parameter] = {}
    for init in [vars(base)["__init__"] for base in cls.__mro__ if "__init__" in vars(base)]:
        own, hints = inspect.signature(init).parameters.values(), get_type_hints(inspect.unwrap(init))
        for parameter in own:
            if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                annotation = hints.get(parameter.name, parameter.annotation)
                parameters.setdefault(parameter.name, parameter.replace(annotation=annotation))
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in own):
            break
    ordered = sorted(parameters.values(), key=lambda parameter: parameter.kind)  # stable: keyword-only ones last
    spelled_out: Any = vars(cls)["__init__"]
    spelled_out.__signature__ = inspect.Signature(ordered)
    spelled_out.__annotations__ = {p.name: p.annotation for p in ordered if p.annotation is not p.empty}
