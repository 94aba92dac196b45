"""What the FineLIP-SDXL pipelines share: encoders of 248 positions, and prompts of any length.

`encode_prompt` is the one seam. Every SDXL pipeline of Diffusers turns texts into embeddings there, and nothing behind
it cares how long they are, so the denoising loops stay Diffusers' own.
"""

import inspect
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, get_type_hints

import torch
from diffusers import DiffusionPipeline
from diffusers.hooks import apply_group_offloading
from diffusers.loaders.single_file_utils import SingleFileComponentError
from diffusers.utils import USE_PEFT_BACKEND, scale_lora_layers, unscale_lora_layers
from diffusers.utils.torch_utils import get_module_execution_device
from huggingface_hub import file_exists
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from finelip_sdxl.checkpoints import load_finelip
from finelip_sdxl.conditioning_adapter import ConditioningAdapter
from finelip_sdxl.merging import add_difference
from finelip_sdxl.miniature import MODEL_NAME, miniature_path, resolve_base
from finelip_sdxl.model_card import BASE, MADE_FROM, MERGED_WITH, model_card, public_name
from finelip_sdxl.prompts import (
    FINELIP_MERGE,
    HIDDEN_STATES,
    LENGTH_BUCKETS,
    LONG_PROMPT,
    NEGATIVE_PROMPT,
    PROMPT,
    SHORT_PROMPT,
    STOCK_POSITIONS,
    PromptReader,
    PromptReport,
    check_choice,
    check_length_buckets,
    check_texts,
    empty_row,
    read_prompts,
    token_rows,
    weight_rows,
)
from finelip_sdxl.stretch import stretched_row_indices
from finelip_sdxl.text_encoders import (
    build_text_encoder,
    num_positions,
    stretch_text_encoder,
    text_encoder_tensors,
    with_max_length,
)
from finelip_sdxl.weighting import WEIGHTING, apply_weights

logger = logging.getLogger(__name__)

# To the type checker the mixin's parent is an SDXL pipeline, of which it knows too little to help.
_Parent: Any = object

_ENCODERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
_HELD = ("stock_text_encoder", "stock_text_encoder_2")
_ADAPTER = "conditioning_adapter"
_BESIDE = ("controlnet", "adapter")  # what some pipelines need beside an SDXL
# Key in `model_index.json` of a pipeline of ours that was saved with encoders of 77 positions; stock skips such keys.
_UNSWAPPED = "_finelip_sdxl_unswapped"
_HUB_ARGUMENTS = ("cache_dir", "local_files_only", "proxies", "revision", "token")
_OPTIONS: dict[str, Callable[[Any], Any]] = {
    "short_prompt": partial(check_choice, "short_prompt", choices=SHORT_PROMPT),
    "hidden_states": partial(check_choice, "hidden_states", choices=HIDDEN_STATES),
    "long_prompt": partial(check_choice, "long_prompt", choices=LONG_PROMPT),
    "length_buckets": check_length_buckets,
    "weighting": partial(check_choice, "weighting", choices=WEIGHTING),
}


def _option(name: str, doc: str) -> property:
    """An option that lives in the pipeline's config, so that Diffusers saves it and hands it on."""
    return property(
        lambda self: self.config[name],
        lambda self, value: self.register_to_config(**{name: _OPTIONS[name](value)}),
        doc=doc,
    )


class LongPromptMixin(_Parent):
    """Put before an SDXL pipeline of Diffusers, makes it read prompts of any length.

    A subclass needs no body: `class MyPipeline(LongPromptMixin, StableDiffusionXLPipeline): ...`.
    Built directly from components it changes none of them; with encoders of 77 positions it then behaves as its parent
    does. `from_pretrained` and `swap_text_encoders` give it encoders of 248 positions.

    Args:
        stock_text_encoder, stock_text_encoder_2: the encoders that short prompts are read with where the weights of
            the main ones were replaced. Encoders that were only stretched need none: stock's rows stand unchanged in
            the stretched table.
        conditioning_adapter: brings what replaced encoders give back to what the UNet knows. What is read as stock
            does not pass through it.
        short_prompt: `"stock"` reads prompts of up to 77 tokens exactly as stock SDXL does, `"stretched"` as longer
            ones.
        hidden_states: `"penultimate"`, on which SDXL's UNet was trained, or `"published"`, the last layer's after the
            final norm, which FineLIP's published recipe feeds. What is read as stock is penultimate in any case.
        long_prompt: what happens past 248 tokens: `"window"` reads all of it in windows of 248, `"truncate"` cuts and
            logs what is lost, `"error"` raises.
        length_buckets: lengths in tokens; prompts are padded to the smallest that holds them, or else to full length.
            Empty for always full length, as stock pipelines do.
        weighting: the syntax of weights in prompts, `"compel"` or `"a1111"`; None reads all that is typed as text. See
            `finelip_sdxl.weighting`.
    """

    def __init__(
        self,
        *args: Any,
        stock_text_encoder: CLIPTextModel | None = None,
        stock_text_encoder_2: CLIPTextModelWithProjection | None = None,
        conditioning_adapter: ConditioningAdapter | None = None,
        short_prompt: str = "stock",
        hidden_states: str = "penultimate",
        long_prompt: str = "window",
        length_buckets: list | tuple | None = LENGTH_BUCKETS,
        weighting: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.register_modules(
            stock_text_encoder=stock_text_encoder,
            stock_text_encoder_2=stock_text_encoder_2,
            conditioning_adapter=conditioning_adapter,
        )
        self.short_prompt = short_prompt
        self.hidden_states = hidden_states
        self.long_prompt = long_prompt
        self.length_buckets = length_buckets
        self.weighting = weighting
        self._conditioning_adapter_scale = 1.0
        self._said: set[str] = set()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if LongPromptMixin in cls.__bases__:
            stock = cls._stock_class()
            cls._optional_components = [*stock._optional_components, *_HELD, _ADAPTER]
            sequence = stock.model_cpu_offload_seq.replace("unet", f"{_ADAPTER}->unet")
            cls.model_cpu_offload_seq = "->".join([*_HELD, sequence])
        _sign(cls, "__init__")
        _sign(cls, "__call__")

    short_prompt = _option("short_prompt", "How prompts of up to 77 tokens are read: 'stock' or 'stretched'.")
    hidden_states = _option("hidden_states", "Which states the UNet gets: 'penultimate' or 'published'.")
    long_prompt = _option("long_prompt", "What happens past 248 tokens: 'window', 'truncate' or 'error'.")
    length_buckets = _option("length_buckets", "Lengths in tokens that prompts are padded to, ascending.")
    weighting = _option("weighting", "The syntax of weights in prompts: None, 'compel' or 'a1111'.")

    # Loading and saving

    @property
    def components(self) -> dict[str, Any]:
        """The parent's components, and those of this class that there are."""
        own = (*_HELD, _ADAPTER)
        return {name: part for name, part in super().components.items() if name not in own or part is not None}

    @classmethod
    def from_pretrained(
        cls,
        base: str | os.PathLike,
        finelip: Any = None,
        finelip_2: Any = None,
        finelip_merge: str = "replace",
        finelip_base: str | os.PathLike | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load an SDXL pipeline and give its text encoders 248 positions.

        Args:
            base: a hub id or directory of any SDXL, a directory that `save_pretrained` of this class wrote, or
                `"miniature"` for the small SDXL that comes with this package, and its FineLIPs with it (pass
                `"miniature-clip-1"` and `"miniature-clip-2"` to have its own encoders stretched instead).
            finelip: replaces the first text encoder (CLIP-L): anything that `finelip_sdxl.load_finelip` takes, or a
                `FineLIPModel`.
            finelip_2: replaces the second (OpenCLIP bigG) in the same way.
            finelip_merge: `"replace"`, or `"delta"`, for fine-tunes that have trained their text encoders: a FineLIP
                does not replace an encoder then, but what it has learned is added to what the encoder has (the weights
                are `own + finelip - base`, see `finelip_sdxl.merging`).
            finelip_base: for `"delta"`, the hub id or directory of the SDXL whose text encoders the FineLIPs were
                trained from, such as `"stabilityai/stable-diffusion-xl-base-1.0"`. The miniature's need none.
            conditioning_adapter (keyword): a `ConditioningAdapter`, or the hub id or directory of one, such as
                `training/align_adapter.py` writes; None for none. By default the one that `base` comes with, unless a
                FineLIP is passed, with which it was not trained.
            **kwargs: the options of this class and all arguments of `DiffusionPipeline.from_pretrained`. `dtype` is
                that of every component, float32 by default.

        Returns:
            The pipeline. Encoders that no FineLIP replaces are stretched, unless they already read 248, or were built
            directly with 77 and saved so by this class: what was saved comes back.

        Raises:
            ValueError: a FineLIP whose width is not the encoder's, one to add without a base, or an unknown option.
            OSError: `base` or a checkpoint is not there.

        Example:
            >>> from finelip_sdxl import FineLIPSDXLPipeline
            >>> pipe = FineLIPSDXLPipeline.from_pretrained("miniature")  # doctest: +SKIP
            >>> image = pipe("a very long prompt").images[0]  # doctest: +SKIP
        """
        brings_finelip = finelip is not None or finelip_2 is not None
        if base == "miniature":
            own = [name for name in _ENCODERS if kwargs.get(name) is None]
            if len(own) == 2 and not brings_finelip:
                kwargs.setdefault(_ADAPTER, miniature_path().parent / _ADAPTER)
            if finelip is None and "text_encoder" in own:
                finelip = "miniature-finelip-1"
            if finelip_2 is None and "text_encoder_2" in own:
                finelip_2 = "miniature-finelip-2"
        origin, base = public_name(base), resolve_base(base)
        merge_base = _merge_base(finelip_merge, finelip_base, finelip, finelip_2)
        finelip, finelip_2, kwargs = _prepared(finelip, finelip_2, kwargs)
        dtype = kwargs["dtype"]
        if kwargs.get("short_prompt") == "stretched":  # then nothing reads the held encoders
            kwargs = {**dict.fromkeys(_HELD), **kwargs}

        hub_arguments = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
        index = cls.load_config(base, **hub_arguments)
        adapter = kwargs.pop(_ADAPTER, None if brings_finelip else ...)
        if adapter is ... and index.get(_ADAPTER):
            adapter = ConditioningAdapter.from_pretrained(base, subfolder=_ADAPTER, dtype=dtype, **hub_arguments)
        elif isinstance(adapter, str | os.PathLike):
            adapter = ConditioningAdapter.from_pretrained(adapter, dtype=dtype, **hub_arguments)
        pipe = super().from_pretrained(base, **kwargs, conditioning_adapter=None if adapter is ... else adapter)
        pipe.register_to_config(**{BASE: index.get(BASE, origin)})
        if index.get(_UNSWAPPED) and finelip is None and finelip_2 is None:
            logger.warning("Text encoders saved with 77 positions are left so; swap_text_encoders() gives them 248.")
        else:
            pipe._swap_text_encoders(finelip, finelip_2, merge_base)
        return pipe

    @classmethod
    def from_single_file(
        cls,
        file: str | os.PathLike,
        finelip: Any = None,
        finelip_2: Any = None,
        finelip_merge: str = "replace",
        finelip_base: str | os.PathLike | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a checkpoint in the original project's layout, as fine-tunes are passed around, and give its text
        encoders 248 positions.

        Args:
            file: a `.safetensors` or `.ckpt` file, or its address on the hub.
            finelip, finelip_2, finelip_merge, finelip_base: see `from_pretrained`. Without a FineLIP the checkpoint's
                own encoders are stretched, with all that it has taught them; a FineLIP in their place knows none of it,
                and one that is added (`finelip_merge="delta"`) much.
            conditioning_adapter (keyword): a `ConditioningAdapter`, or the hub id or directory of one.
            config (keyword): a hub id or a directory of an SDXL, for its configs and tokenizers; a saved pipeline is
                one, and so is `"miniature"`. By default what Diffusers finds on the hub to go with the checkpoint.
            **kwargs: the options of this class and all arguments of Diffusers' `from_single_file`. `dtype` is that of
                every component, float32 by default.

        Returns:
            The pipeline.

        Raises:
            ValueError: a file that is no whole SDXL, or what `from_pretrained` refuses.
            OSError: the file is not there, or there are no configs for it.

        Example:
            >>> from finelip_sdxl import FineLIPSDXLPipeline
            >>> pipe = FineLIPSDXLPipeline.from_single_file("fine_tune.safetensors")  # doctest: +SKIP
        """
        if kwargs.get("config") is not None:
            kwargs["config"] = resolve_base(kwargs["config"])
        for name in _BESIDE:
            if name in inspect.signature(cls.__init__).parameters and kwargs.get(name) is None:
                raise ValueError(f"A {cls.__name__} needs a {name}, which single files do not hold: pass {name}=.")
        merge_base = _merge_base(finelip_merge, finelip_base, finelip, finelip_2)
        finelip, finelip_2, kwargs = _prepared(finelip, finelip_2, kwargs)
        adapter = kwargs.pop(_ADAPTER, None)
        if isinstance(adapter, str | os.PathLike):
            adapter = ConditioningAdapter.from_pretrained(adapter, dtype=kwargs["dtype"])
        with _single_file_errors(file, kwargs.get("config")):
            pipe = super().from_single_file(file, **kwargs)
        pipe.register_modules(conditioning_adapter=adapter)
        pipe.register_to_config(**{BASE: public_name(file)})
        pipe._swap_text_encoders(finelip, finelip_2, merge_base)
        return pipe

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> Any:
        """As Diffusers' `from_pipe`, in the dtype of `pipeline` unless another is passed. (Diffusers would cast what
        both share to float32.)"""
        if kwargs.get("dtype") is None and kwargs.get("torch_dtype") is None:
            kwargs["dtype"] = pipeline.dtype
        return super().from_pipe(pipeline, **kwargs)

    def swap_text_encoders(
        self,
        finelip: Any = None,
        finelip_2: Any = None,
        finelip_merge: str = "replace",
        finelip_base: str | os.PathLike | None = None,
    ) -> None:
        """Give both text encoders 248 positions, in place: a FineLIP where one is passed, else their stretched selves.

        For pipelines that `from_pretrained` and `from_single_file` did not make, such as those of `from_pipe`.
        Encoders that already read 248 are left as they are, and no encoder or tokenizer that was passed in is changed.

        Args:
            finelip: replaces the first text encoder; see `from_pretrained`.
            finelip_2: replaces the second.
            finelip_merge, finelip_base: see `from_pretrained`.

        Raises:
            ValueError: a FineLIP for an encoder that the pipeline does not have, of the wrong width, or to add to an
                encoder that is none of 77 positions, stretched or not.
        """
        self._swap_text_encoders(finelip, finelip_2, _merge_base(finelip_merge, finelip_base, finelip, finelip_2))

    def _swap_text_encoders(self, finelip: Any, finelip_2: Any, merge_base: str | None) -> None:
        replacements = {}
        for name, source in (("text_encoder", finelip), ("text_encoder_2", finelip_2)):
            if source is not None:
                encoder = getattr(self, name)
                replacement = _replacement(name, source, encoder)
                if merge_base is not None:
                    replacement = _merged(name, replacement, self._stock_reader(name), merge_base)
                replacements[name] = replacement.to(encoder.device, encoder.dtype)
        parts: dict[str, Any] = {}
        bare = []
        for name, tokenizer_name in _ENCODERS.items():
            encoder, tokenizer = getattr(self, name), getattr(self, tokenizer_name)
            if encoder is None:
                continue
            if name in replacements:
                stock = self._stock_reader(name)
                if self.short_prompt == "stock" and stock is not None:
                    parts[f"stock_{name}"] = stock[0]
                encoder = parts[name] = replacements[name]
            elif num_positions(encoder) <= STOCK_POSITIONS:
                encoder = parts[name] = stretch_text_encoder(encoder)
                bare.append(name)
            if tokenizer is not None and tokenizer.model_max_length != num_positions(encoder):
                parts[tokenizer_name] = with_max_length(tokenizer, num_positions(encoder))
        self.register_modules(**parts)
        if bare and not replacements:
            logger.warning(
                "%s: stretched to 248 positions but not trained on them. Such encoders read the tail of a long prompt"
                " worse than trained ones: pass a FineLIP or Long-CLIP as finelip= (finelip_2= for the second one).",
                " and ".join(bare),
            )

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Save as Diffusers does, so that stock Diffusers opens it too; see `DiffusionPipeline.save_pretrained`.

        Stock leaves out the conditioning adapter, if there is one, with a warning; so does this. With
        `push_to_hub=True` and `repo_id=`, or by `push_to_hub(repo_id)`, it is shared, with a card that says what it is
        made of if the repository has no card yet.
        """
        if self.conditioning_adapter is not None:
            logger.warning(
                "Stock Diffusers opens %s without its conditioning adapter, which FineLIP-SDXL's pipelines load. For an"
                " alignment inside the text encoders, train with `--method lora`, and use `finelip-sdxl export`.",
                save_directory,
            )
        with _prefixed_keys(self):
            super().save_pretrained(os.fspath(save_directory), *args, **kwargs)

    def _upload_folder(
        self, working_dir: str, repo_id: str, token: str | None = None, subfolder: str | None = None, **kwargs: Any
    ) -> Any:
        """As the parent; in the repository's first upload Diffusers' card, which says nothing, gives way to ours."""
        if subfolder is None and not file_exists(repo_id, "README.md", token=token):
            model_card(self, repo_id).save(os.path.join(working_dir, "README.md"))
        return super()._upload_folder(working_dir, repo_id, token=token, subfolder=subfolder, **kwargs)

    def to_json_file(self, json_file_path: str | os.PathLike) -> None:
        """Write `model_index.json`: stock's class name and only what differs from the defaults, for stock Diffusers."""
        config = json.loads(self.to_json_string())
        config["_class_name"] = self._stock_class().__name__
        parameters = inspect.signature(LongPromptMixin.__init__).parameters
        for name in _OPTIONS:
            if self.config[name] == parameters[name].default:
                del config[name]
        for name in _HELD:
            if config[name] == [None, None]:
                del config[name]
        # As a component's entry, which names a module, it would keep everyone from downloading the repository.
        del config[_ADAPTER]
        if self.conditioning_adapter is not None:
            config[_ADAPTER] = f"{ConditioningAdapter.__module__}.{ConditioningAdapter.__qualname__}"
        if "length_buckets" in config:  # an empty list there breaks Diffusers' downloads
            config["length_buckets"] = config["length_buckets"] or None
        if self._encoders() and not self._reads_long_prompts():
            config[_UNSWAPPED] = True
        with open(json_file_path, "w", encoding="utf-8") as file:
            file.write(json.dumps(config, indent=2, sort_keys=True) + "\n")

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As the parent; the entry that `to_json_file` writes for the adapter is read by `from_pretrained`."""
        own = {name: value for name, value in config_dict.items() if name != _ADAPTER or not isinstance(value, str)}
        return super().extract_init_dict(own, **kwargs)

    @classmethod
    def _stock_class(cls) -> type[DiffusionPipeline]:
        return next(
            base
            for base in cls.__mro__
            if issubclass(base, DiffusionPipeline) and not issubclass(base, LongPromptMixin)
        )

    # Drawing

    def __call__(self, *args: Any, conditioning_adapter_scale: float = 1.0, **kwargs: Any) -> Any:
        """Draw, as the parent does; its arguments are the parent's.

        Args:
            conditioning_adapter_scale: how much of the conditioning adapter counts, from 0 (nothing) to 1.

        Raises:
            ValueError: a scale out of range; and what `encode_prompt` and the parent raise.
        """
        if not 0 <= conditioning_adapter_scale <= 1:
            raise ValueError(
                f"conditioning_adapter_scale is {conditioning_adapter_scale}; expected a number from 0, without the"
                " adapter, to 1, with all of it."
            )
        self._conditioning_adapter_scale = conditioning_adapter_scale
        try:
            return super().__call__(*args, **kwargs)
        finally:
            self._conditioning_adapter_scale = 1.0

    def unload_lora_weights(self, *args: Any, **kwargs: Any) -> None:
        """As the parent. Encoders whose weights keep a fused LoRA note it in their configs: nothing else tells then."""
        for encoder in (self.text_encoder, self.text_encoder_2):
            if encoder is not None and any(getattr(module, "merged_adapters", ()) for module in encoder.modules()):
                encoder.config.has_fused_lora = True
        super().unload_lora_weights(*args, **kwargs)

    def enable_group_offload(self, *args: Any, **kwargs: Any) -> None:
        """As the parent. On disk, held encoders have folders of their own: Diffusers names files by layers alone, and
        theirs are named as those of the encoders that took their place."""
        disk: Any = kwargs.get("offload_to_disk_path")
        excluded = kwargs.pop("exclude_modules", None) or []
        excluded = [excluded] if isinstance(excluded, str) else excluded
        apart = [name for name in _HELD if disk and getattr(self, name) is not None and name not in excluded]
        super().enable_group_offload(*args, exclude_modules=[*excluded, *apart], **kwargs)
        for name in apart:
            kwargs["offload_to_disk_path"] = os.path.join(disk, name)
            apply_group_offloading(getattr(self, name), *args, **kwargs)

    # Prompts

    def describe_prompt(
        self,
        prompt: str | list[str],
        prompt_2: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        negative_prompt_2: str | list[str] | None = None,
    ) -> PromptReport:
        """What each encoder will read of a prompt, in how many windows, and what is cut. Runs no encoder.

        Args:
            prompt, prompt_2, negative_prompt, negative_prompt_2: as in a call of the pipeline.

        Returns:
            The report; print it.

        Example:
            >>> print(pipe.describe_prompt("a red square above a blue ring"))  # doctest: +SKIP
        """
        if not self._encoders():
            raise ValueError("This pipeline has no text encoders, so there is nothing that reads a prompt.")
        prompts = self._prompt_batches(prompt, prompt_2)
        negatives = self._negative_batches(negative_prompt, negative_prompt_2, batch_size=len(prompts[0]))
        return self._read(prompts, negatives)

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        prompt_2: str | list[str] | None = None,
        device: torch.device | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = None,
        negative_prompt_2: str | list[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        negative_pooled_prompt_embeds: torch.Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
        """Encode prompts of any length. The arguments are those of the parent's `encode_prompt`.

        With `weighting`, states of weighted tokens are drawn away from those of the empty prompt, or towards them, in
        each encoder by itself and last, behind the conditioning adapter, which knows states without weights. Pooled
        vectors have no weights.

        Returns:
            Prompt and negative prompt as hidden states of both encoders, (batch · images, windows · positions, dim),
            and pooled, from the first window, (batch · images, pooled dim): prompt, negative, pooled prompt, pooled
            negative. The negatives are None without classifier-free guidance.

        Raises:
            TypeError: a prompt that is not a string or a list of strings.
            ValueError: an empty list, batches of different sizes, a text of more than 20,000 characters, one that does
                not fit where `long_prompt="error"` or embeddings passed beside it fix the length, or weights that
                `finelip_sdxl.weighting.parse_weights` refuses.
        """
        if prompt_embeds is None:
            self._check_weighting()
        if self._reads_long_prompts():
            prompts, negatives, shape = None, None, None
            if prompt_embeds is None:
                prompts = self._prompt_batches(prompt, prompt_2)
                if do_classifier_free_guidance:
                    shape = self._shape_of("negative_prompt_embeds", negative_prompt_embeds)
                if any(not "".join(texts).strip() for texts in zip(*prompts, strict=True)):
                    logger.warning("`prompt` is empty, so no text guides the picture.")
            if do_classifier_free_guidance and negative_prompt_embeds is None:
                batch_size = len(prompts[0] if prompts else prompt_embeds)  # type: ignore[arg-type]
                negatives = self._negative_batches(negative_prompt, negative_prompt_2, batch_size)
                shape = None if negatives is None else self._shape_of("prompt_embeds", prompt_embeds)

            if prompts or negatives:
                report = self._read(prompts, negatives, shape)
                if report.cut:
                    lost = dict.fromkeys(f"{reading.role}: {reading.cut_text}" for reading in report.cut)
                    logger.warning("Cut and not read, %s", "; ".join(lost))
                with self._scaled_lora(lora_scale):
                    if prompts:
                        prompt_embeds, pooled = self._encode(report, PROMPT, clip_skip)
                        pooled_prompt_embeds = pooled if pooled_prompt_embeds is None else pooled_prompt_embeds
                    if negatives:  # stock does not apply clip_skip to them
                        negative_prompt_embeds, pooled = self._encode(report, NEGATIVE_PROMPT, None)
                        if negative_pooled_prompt_embeds is None:
                            negative_pooled_prompt_embeds = pooled
                prompt = prompt_2 = lora_scale = None

        # All that is left, or everything for encoders of 77 positions: zeros for an absent negative, dtype, copies.
        prompt_embeds, negative_prompt_embeds, pooled_prompt_embeds, negative_pooled_prompt_embeds = (
            super().encode_prompt(
                prompt,
                prompt_2,
                device,
                num_images_per_prompt,
                do_classifier_free_guidance,
                negative_prompt,
                negative_prompt_2,
                prompt_embeds=prompt_embeds,
                negative_prompt_embeds=negative_prompt_embeds,
                pooled_prompt_embeds=pooled_prompt_embeds,
                negative_pooled_prompt_embeds=negative_pooled_prompt_embeds,
                lora_scale=lora_scale,
                clip_skip=clip_skip,
            )
        )
        # By name, as in stock: Diffusers' tests read them off this line to call `encode_prompt` alone.
        return prompt_embeds, negative_prompt_embeds, pooled_prompt_embeds, negative_pooled_prompt_embeds

    def _encoders(self) -> list[tuple[str, Any]]:
        """Name and tokenizer of each text encoder, paired as stock pairs them: without a first tokenizer or encoder
        (the refiner has neither), the prompt goes to the second."""
        tokenizers = [self.tokenizer, self.tokenizer_2] if self.tokenizer is not None else [self.tokenizer_2]
        names = list(_ENCODERS) if self.text_encoder is not None else ["text_encoder_2"]
        pairs = zip(names, tokenizers, strict=False)
        return [
            (name, tokenizer) for name, tokenizer in pairs if tokenizer is not None and getattr(self, name) is not None
        ]

    def _readers(self) -> list[PromptReader]:
        return [
            PromptReader(
                name,
                tokenizer,
                positions=min(num_positions(getattr(self, name)), tokenizer.model_max_length),
                has_stock=self._stock_reader(name) is not None,
                expand=partial(self.maybe_convert_prompt, tokenizer=tokenizer)
                if _has_added_tokens(tokenizer)
                else None,
            )
            for name, tokenizer in self._encoders()
        ]

    def _reads_long_prompts(self) -> bool:
        return any(reader.positions > STOCK_POSITIONS for reader in self._readers())

    def _check_weighting(self) -> None:
        if self.weighting is not None and not self._reads_long_prompts():
            raise ValueError(
                f"weighting={self.weighting!r} needs text encoders of 248 positions: call swap_text_encoders() first."
            )

    def _prompt_batches(self, prompt: Any, prompt_2: Any) -> list[list[str]]:
        return self._batches(check_texts("prompt", prompt), "prompt_2", prompt_2)

    def _negative_batches(
        self, negative_prompt: Any, negative_prompt_2: Any, batch_size: int
    ) -> list[list[str]] | None:
        """For each encoder its negative prompts; None where stock uses zeros instead."""
        if negative_prompt is None and self.config.force_zeros_for_empty_prompt:
            return None
        texts = check_texts("negative_prompt", negative_prompt or "")
        if isinstance(negative_prompt or "", str):
            texts = texts * batch_size
        if isinstance(negative_prompt_2, str) and negative_prompt_2:
            negative_prompt_2 = [negative_prompt_2] * batch_size
        if len(texts) != batch_size:
            raise ValueError(
                f"`negative_prompt` holds {len(texts)} texts and `prompt` {batch_size}: pass as many, or one string."
            )
        return self._batches(texts, "negative_prompt_2", negative_prompt_2)

    def _batches(self, texts: list[str], name_2: str, value_2: Any) -> list[list[str]]:
        """For each encoder its texts."""
        texts_2 = check_texts(name_2, value_2) if value_2 else texts
        if len(texts_2) != len(texts):
            raise ValueError(
                f"`{name_2}` holds {len(texts_2)} texts and `{name_2[:-2]}` {len(texts)}: pass as many of both."
            )
        return [batch for batch, _ in zip((texts, texts_2), self._encoders(), strict=False)]

    def _read(
        self,
        prompts: list[list[str]] | None,
        negatives: list[list[str]] | None,
        shape: tuple[int, int] | None = None,
    ) -> PromptReport:
        self._check_weighting()
        if not self._reads_long_prompts():  # the parent encodes: one window, the rest cut
            return read_prompts(self._readers(), prompts, negatives, long_prompt="truncate", length_buckets=())
        return read_prompts(
            self._readers(),
            prompts,
            negatives,
            short_prompt=self.short_prompt,
            long_prompt=self.long_prompt,
            length_buckets=self.length_buckets,
            weighting=self.weighting,
            shape=shape,
        )

    def _shape_of(self, name: str, embeds: torch.Tensor | None) -> tuple[int, int] | None:
        """(windows, positions) of embeddings that were passed in, which a text beside them must match."""
        if embeds is None:
            return None
        length, capacity = embeds.shape[1], min(reader.positions for reader in self._readers())
        if length > capacity and length % capacity:
            raise ValueError(
                f"`{name}` are {length} positions long, but a text beside them is encoded to at most {capacity} or a"
                " multiple of it: pass embeddings for both."
            )
        return (1, length) if length <= capacity else (length // capacity, capacity)

    # Encoding

    def _encode(
        self, report: PromptReport, role: str, clip_skip: int | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Hidden states (batch, windows · positions, dim of both encoders) and pooled vector (batch, pooled dim)."""
        states: list[torch.Tensor] = []
        weights: list[torch.Tensor | None] = []
        empties: list[Any] = []  # states of the empty prompt where there are weights
        as_stock: list[bool] = []
        pooled = None
        for name, tokenizer in self._encoders():
            readings = report.select(name, role)
            as_stock.append(readings[0].as_stock)
            stock = self._stock_reader(name) if as_stock[-1] else None
            encoder, position_ids = stock or (getattr(self, name), None)
            device = get_module_execution_device(encoder)
            token_ids = torch.tensor(token_rows(readings, tokenizer, report.windows), device=device)
            window_states = []
            for window in token_ids.unbind(dim=1):
                output = encoder(window, position_ids=position_ids, output_hidden_states=True)
                if pooled is None and output[0].ndim == 2:  # the projected end token, of the first window
                    pooled = output[0]
                window_states.append(self._states(output, as_stock[-1], clip_skip))
            states.append(torch.cat(window_states, dim=1))
            rows = weight_rows(readings, report.windows)
            weights.append(None if rows is None else torch.tensor(rows, device=device))
            empties.append(None)
            if rows is not None:
                nothing = torch.tensor([empty_row(tokenizer, report.positions)], device=device)
                output = encoder(nothing, position_ids=position_ids, output_hidden_states=True)
                empties[-1] = self._states(output, as_stock[-1], clip_skip).repeat(1, report.windows, 1)
            self._free_held(encoder)
        if self.conditioning_adapter is not None and not all(as_stock):
            states, pooled = self._adapt(states, pooled, as_stock, clip_skip)
            # It knows states without weights, so these come last.
            empties, _ = self._adapt(empties, None, as_stock, clip_skip)
        weighted = [
            part if of_tokens is None else apply_weights(part, empty, of_tokens)
            for part, empty, of_tokens in zip(states, empties, weights, strict=True)
        ]
        return torch.cat(weighted, dim=-1), pooled

    def _adapt(
        self, states: list[torch.Tensor], pooled: torch.Tensor | None, as_stock: list[bool], clip_skip: int | None
    ) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """What the conditioning adapter makes of states and pooled vector; what was read as stock stays."""
        if self.hidden_states != "penultimate" or clip_skip is not None:
            self._warn_once("The conditioning adapter knows penultimate states only, so others do not pass through it.")
            return states, pooled
        scale = self._conditioning_adapter_scale
        if scale == 0:
            return states, pooled
        given = [None if stock else part for part, stock in zip(states, as_stock, strict=True)]
        # The pooled vector is the last encoder's.
        adapted, adapted_pooled = self.conditioning_adapter(given, None if as_stock[-1] else pooled, scale)
        states = [old if new is None else new for old, new in zip(states, adapted, strict=True)]
        return states, pooled if adapted_pooled is None else adapted_pooled

    def _states(self, output: Any, as_stock: bool, clip_skip: int | None) -> torch.Tensor:
        if self.hidden_states == "penultimate" or as_stock:
            return output.hidden_states[-2 if clip_skip is None else -(clip_skip + 2)]
        if clip_skip is not None:
            raise ValueError(
                f'clip_skip={clip_skip} counts back from the penultimate states and hidden_states="published" takes the'
                ' last: leave out clip_skip, or set hidden_states="penultimate".'
            )
        return output.last_hidden_state

    def _stock_reader(self, name: str) -> tuple[Any, torch.Tensor | None] | None:
        """The encoder that reads short prompts as stock does, and its position ids; None if nothing can."""
        encoder, held = getattr(self, name), getattr(self, f"stock_{name}")
        if held is not None and _is_stock(held):
            if not _was_extended(encoder, held):
                return held, _stock_position_ids(held)
            self._warn_once(
                f"{name} has a LoRA or added tokens that stock_{name} lacks, so {name} reads short prompts as well."
            )
        return (encoder, _stock_position_ids(encoder)) if _is_stock(encoder) else None

    def _warn_once(self, sentence: str) -> None:
        if sentence not in self._said:
            self._said.add(sentence)
            logger.warning(sentence)

    def _free_held(self, encoder: Any) -> None:
        # Model offloading frees a model when the next one in a fixed order runs; a held encoder runs in another's
        # place, so the order does not free it.
        for hook in getattr(self, "_all_hooks", []):
            if hook.model is encoder and encoder in (self.stock_text_encoder, self.stock_text_encoder_2):
                hook.offload()

    @contextmanager
    def _scaled_lora(self, scale: float | None) -> Iterator[None]:
        """The LoRA scale of a call, set and undone around the encoding as the parent does around its own."""
        if scale is None or not USE_PEFT_BACKEND:
            yield
            return
        self._lora_scale = scale
        encoders = [getattr(self, name) for name, _ in self._encoders()]
        for encoder in encoders:
            scale_lora_layers(encoder, scale)
        try:
            yield
        finally:
            for encoder in encoders:
                unscale_lora_layers(encoder, scale)


def _sign(cls: type, name: str) -> None:
    """Give a method of `cls` an explicit signature: its own arguments and those of the parent's that it hands on to.

    Diffusers reads a pipeline's components and options from `__init__` and what a call takes from `__call__`, and
    Python offers no other way to say them once for parents that differ.
    """
    if name not in vars(cls):

        def hand_on(self: Any, *args: Any, **kwargs: Any) -> Any:
            return getattr(super(cls, self), name)(*args, **kwargs)  # type: ignore[arg-type, misc]

        hand_on.__name__, hand_on.__qualname__ = name, f"{cls.__qualname__}.{name}"
        setattr(cls, name, hand_on)

    parameters: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        method = vars(base).get(name)
        if method is None:
            continue
        own, hints = inspect.signature(method).parameters.values(), get_type_hints(inspect.unwrap(method))
        for parameter in own:
            if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                annotation = hints.get(parameter.name, parameter.annotation)
                parameters.setdefault(parameter.name, parameter.replace(annotation=annotation))
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in own):
            break
    ordered = sorted(parameters.values(), key=lambda parameter: parameter.kind)  # stable: keyword-only ones last
    method = vars(cls)[name]
    method.__signature__ = inspect.Signature(ordered)
    method.__annotations__ = {p.name: p.annotation for p in ordered if p.annotation is not p.empty}


def _merge_base(finelip_merge: str, finelip_base: Any, finelip: Any, finelip_2: Any) -> str | None:
    """The SDXL whose text encoders FineLIPs to add were trained from; None if they replace encoders."""
    check_choice("finelip_merge", finelip_merge, FINELIP_MERGE)
    sources = [source for source in (finelip, finelip_2) if source is not None]
    if finelip_merge == "replace":
        if finelip_base is not None:
            raise ValueError(f"finelip_base={finelip_base} goes with finelip_merge='delta': pass both or neither.")
        return None
    if not sources:
        raise ValueError("finelip_merge='delta' adds what a FineLIP has learned: pass finelip=, finelip_2= or both.")
    if finelip_base is None and all(isinstance(name, str) and MODEL_NAME.fullmatch(name) for name in sources):
        finelip_base = "miniature"
    if finelip_base is None:
        raise ValueError(
            "finelip_merge='delta' needs finelip_base=, the hub id or directory of the SDXL whose text encoders the"
            " FineLIP was trained from, such as stabilityai/stable-diffusion-xl-base-1.0."
        )
    return resolve_base(finelip_base)


def _prepared(finelip: Any, finelip_2: Any, kwargs: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """Arguments for loading, checked before gigabytes are loaded: both FineLIPs, and keyword arguments with a dtype."""
    # Without a dtype every library falls back on its own, and half-precision repositories end in two.
    torch_dtype = kwargs.pop("torch_dtype", None)
    kwargs = {**kwargs, "dtype": kwargs.get("dtype") or torch_dtype or torch.float32}
    for name, source in (("text_encoder", finelip), ("text_encoder_2", finelip_2)):
        if source is not None and kwargs.get(name) is not None:
            raise ValueError(f"Both a FineLIP and `{name}` were passed for the same text encoder; pass one of them.")
    for name in _OPTIONS.keys() & kwargs:
        _OPTIONS[name](kwargs[name])
    finelip, finelip_2 = (source if source is None else load_finelip(source) for source in (finelip, finelip_2))
    return finelip, finelip_2, kwargs


@contextmanager
def _single_file_errors(file: Any, config: Any) -> Iterator[None]:
    """What Diffusers cannot load, in a sentence that says what to do."""
    name = os.fspath(file)
    if not os.path.isfile(name) and not name.startswith(("http://", "https://", "hf.co/")):
        raise FileNotFoundError(f"{name} does not exist, or is no file: pass a .safetensors or .ckpt file.")
    if config is not None and os.path.isdir(config) and not os.path.isfile(os.path.join(config, "model_index.json")):
        raise FileNotFoundError(
            f"config={config} has no model_index.json: pass the directory of an SDXL in Diffusers' layout."
        )
    try:
        yield
    except SingleFileComponentError as error:
        what = str(error.message).strip().splitlines()[0].rstrip(".")
        raise ValueError(f"{name} is no whole SDXL ({what}): pass another file, or config= of its kind.") from error
    except ValueError as error:
        shapes = re.search(r"\S+ expected shape .*? but got .*?\)", str(error))
        if shapes is None:
            raise
        raise ValueError(
            f"{name} is no SDXL with the sizes that its config says ({shapes[0]}): pass another file, or config= of its"
            " kind."
        ) from error
    except (EntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled, ConnectionError) as error:
        raise OSError(
            f"{name} holds weights alone, and configs and tokenizers to go with them could not be fetched from the hub:"
            " pass config=, the directory of an SDXL in Diffusers' layout."
        ) from error
    except OSError as error:
        if "Unable to load weights" not in str(error):
            raise
        raise ValueError(
            f"{name} cannot be read as a checkpoint: it is damaged, cut short, or no .safetensors or .ckpt file."
        ) from error


def _replacement(name: str, source: Any, encoder: Any) -> Any:
    """The text encoder of a FineLIP, to stand in the place of `encoder`."""
    if encoder is None:
        raise ValueError(f"A FineLIP was passed for `{name}`, but this pipeline has no such text encoder.")
    if getattr(encoder, "is_quantized", False):
        raise ValueError(
            f"`{name}` is quantized, and a FineLIP would take its place unquantized: save the SDXL with this FineLIP by"
            " `finelip-sdxl convert` first, and load that quantized."
        )
    has_projection = isinstance(encoder, CLIPTextModelWithProjection)
    replacement: Any = load_finelip(source).to_text_encoder(projection=has_projection)
    for width in ("hidden_size", "vocab_size", *(("projection_dim",) if has_projection else ())):
        found, expected = getattr(replacement.config, width), getattr(encoder.config, width)
        if found != expected:
            raise ValueError(
                f"The FineLIP for `{name}` has {width} {found}, but this SDXL needs {expected}: `finelip` takes one"
                " trained from the first encoder (CLIP-L in SDXL) and `finelip_2` from the second (OpenCLIP bigG)."
            )
    # A source of 77 positions was stretched on loading: its rows are its own, not those of this SDXL's encoder.
    vars(replacement.config).pop("stretched_from", None)
    return replacement


def _merged(name: str, finelip: Any, stock: tuple[Any, Any] | None, base: str) -> Any:
    """What `_replacement` gave, added to the encoder that reads short prompts as stock does."""
    if stock is None:
        raise ValueError(
            f"`{name}` was trained or replaced at 248 positions, and finelip_merge='delta' adds to encoders of 77: load"
            " the fine-tune itself."
        )
    own = stock[0] if num_positions(stock[0]) > STOCK_POSITIONS else stretch_text_encoder(stock[0])
    has_projection = isinstance(own, CLIPTextModelWithProjection)
    before = load_finelip(base, subfolder=name, dtype=torch.float32).to_text_encoder(projection=has_projection)
    merged = add_difference(own, finelip, before)
    setattr(merged.config, MERGED_WITH, vars(finelip.config).get(MADE_FROM))
    return merged


def _is_stock(encoder: Any) -> bool:
    """Whether an encoder's weights are stock's, be its table stretched or not."""
    stretched_from = getattr(encoder.config, "stretched_from", None)
    return num_positions(encoder) <= STOCK_POSITIONS or stretched_from == STOCK_POSITIONS


def _stock_position_ids(encoder: Any) -> torch.Tensor | None:
    """Positions (1, 77) of a stretched table that hold the stock table's rows, unchanged."""
    if num_positions(encoder) <= STOCK_POSITIONS:
        return None
    config = encoder.config
    rows = stretched_row_indices(STOCK_POSITIONS, keep=config.stretch_keep, factor=config.stretch_factor)
    return torch.as_tensor(rows, device=get_module_execution_device(encoder))[None]


def _was_extended(encoder: Any, held: Any) -> bool:
    """Whether a LoRA or new tokens were loaded into `encoder` that `held` does not have."""
    if getattr(encoder.config, "has_fused_lora", False):
        return True
    if encoder.get_input_embeddings().num_embeddings != held.get_input_embeddings().num_embeddings:
        return True
    return any(hasattr(module, "base_layer") for module in encoder.modules())


def _has_added_tokens(tokenizer: Any) -> bool:
    """Whether a textual inversion may be in a prompt. (To look for one, Diffusers tokenises the whole prompt, which
    logs a warning of "indexing errors" for long ones.)"""
    return not tokenizer.get_added_vocab().keys() <= set(tokenizer.all_special_tokens)


@contextmanager
def _prefixed_keys(pipe: Any) -> Iterator[None]:
    """While saving, puts encoders in place whose files begin their keys with `text_model.`.

    Recent `transformers` write other keys for a `CLIPTextModel` that was not loaded from such a file, and older ones
    load those as random weights.
    """
    originals = {}
    for name in ("text_encoder", "stock_text_encoder"):
        encoder = getattr(pipe, name)
        if isinstance(encoder, CLIPTextModel) and not any(
            hasattr(module, "base_layer") for module in encoder.modules()
        ):
            originals[name] = encoder
    try:
        for name, encoder in originals.items():
            setattr(pipe, name, build_text_encoder(encoder.config, text_encoder_tensors(encoder)))
        yield
    finally:
        for name, encoder in originals.items():
            setattr(pipe, name, encoder)
