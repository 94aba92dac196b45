"""Loading and saving of the pipelines, and the swap to text encoders of 248 positions."""

import inspect
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from huggingface_hub import file_exists
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from finelip_sdxl.checkpoints.load import FineLIPWeights, read_finelip
from finelip_sdxl.checkpoints.merging import add_difference
from finelip_sdxl.checkpoints.sources import Source
from finelip_sdxl.conditioning_adapter import ConditioningAdapter
from finelip_sdxl.foreign_files import check_finite, read_json
from finelip_sdxl.names import Location, bundled_model, bundled_sdxl, resolve, sdxl_path
from finelip_sdxl.old_names import with_new_names
from finelip_sdxl.options import (
    AS_SAVED,
    ENCODERS,
    FINELIP_MERGE,
    STOCK_POSITIONS,
    Emphasis,
    FineLIPMerge,
    HiddenStates,
    Overflow,
    ShortPromptEncoder,
    Weighting,
    check_choice,
)
from finelip_sdxl.pipelines.calls import OPTIONS, argument_names, refuse_unknown
from finelip_sdxl.pipelines.checking import (
    check_component,
    check_folder,
    loading_errors,
    single_file_errors,
    write_configs,
)
from finelip_sdxl.pipelines.model_card import model_card
from finelip_sdxl.pipelines.prompt_encoding import PromptEncodingMixin
from finelip_sdxl.provenance import Provenance, base_of, forget_stretch, public_name, record_base, without_paths
from finelip_sdxl.recommended import recommended_of, record_recommended
from finelip_sdxl.text_encoders import (
    TextEncoder,
    build_text_encoder,
    check_tokenizer,
    num_positions,
    stretch_text_encoder,
    text_encoder_tensors,
    with_max_length,
)

logger = logging.getLogger(__name__)

ORIGINAL_ENCODERS = ("stock_text_encoder", "stock_text_encoder_2")

ADAPTER = "conditioning_adapter"

# Key in `model_index.json` of a pipeline of ours that was saved with encoders of 77 positions; stock skips such keys.
UNSWAPPED = "_finelip_sdxl_unswapped"

_BESIDE = ("controlnet", "adapter")  # components that some pipelines need beside an SDXL

# Arguments that Diffusers takes by `**kwargs`, so that no signature names them. It drops unknown names.
LOADING_ARGUMENTS = (
    "cache_dir",
    "config",
    "custom_pipeline",
    "custom_revision",
    "device_map",
    "disable_mmap",
    "dtype",
    "force_download",
    "load_connected_pipeline",
    "local_files_only",
    "low_cpu_mem_usage",
    "max_memory",
    "offload_folder",
    "offload_state_dict",
    "original_config",
    "provider",
    "provider_options",
    "proxies",
    "quantization_config",
    "revision",
    "sess_options",
    "token",
    "torch_dtype",
    "trust_remote_code",
    "use_flashpack",
    "use_onnx",
    "use_safetensors",
    "variant",
)
SAVING_ARGUMENTS = ("commit_message", "create_pr", "private", "repo_id", "token")

_HUB_ARGUMENTS = ("cache_dir", "local_files_only", "proxies", "revision", "token")


class EncoderSwapMixin(PromptEncodingMixin):
    """The part of `LongPromptMixin` that loads, swaps and saves text encoders."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        finelip: Source | None = None,
        finelip_2: Source | None = None,
        finelip_merge: FineLIPMerge = "replace",
        finelip_base: str | os.PathLike[str] | None = None,
        *,
        short_prompt_encoder: ShortPromptEncoder = AS_SAVED,
        overflow: Overflow = AS_SAVED,
        hidden_states: HiddenStates = AS_SAVED,
        weighting: Weighting | None = AS_SAVED,
        emphasis: Emphasis = AS_SAVED,
        length_buckets: Sequence[int] | None = AS_SAVED,
        **kwargs: Any,
    ) -> Self:
        """Load an SDXL pipeline with text encoders of 248 positions.

        Args:
            pretrained_model_name_or_path: a hub id or directory of any SDXL, a directory that `save_pretrained` of this
                class wrote, or `"miniature"` for the small SDXL that ships with this package, with its FineLIPs. (Pass
                `"miniature-clip-1"` and `"miniature-clip-2"` to stretch its own encoders instead.)
            finelip: the replacement of the first text encoder (CLIP-L): any source for `finelip_sdxl.load_finelip`, or
                a `FineLIPModel`.
            finelip_2: the replacement of the second (OpenCLIP bigG), likewise.
            finelip_merge: `"replace"`, or `"delta"` for fine-tunes with trained text encoders. A delta merge keeps an
                encoder's own training and adds the FineLIP's: the weights become `own + finelip - base`, see
                `finelip_sdxl.checkpoints.merging`.
            finelip_base: for `"delta"`, the hub id or directory of the SDXL whose text encoders the FineLIPs were
                trained from, such as `"stabilityai/stable-diffusion-xl-base-1.0"`. The miniature's FineLIPs need none.
            conditioning_adapter (keyword): a `ConditioningAdapter`, or the hub id or directory of one, such as
                `training/align_adapter.py` writes, or `"miniature"`; None for none. The default is the adapter of the
                SDXL, or none if a FineLIP is passed, since the adapter was trained without it.
            **kwargs: the options of this class and all arguments of `DiffusionPipeline.from_pretrained`. `dtype` is
                the dtype of every component, float32 by default. An encoder that is passed as None is left out with
                its original encoder and the adapter, for embeddings from elsewhere.

        Returns:
            The pipeline. Encoders that no FineLIP replaces are stretched, unless they have 248 positions already. A
            pipeline that this class saved with encoders of 77 positions keeps them.

        Raises:
            TypeError: an argument has an unknown name.
            ValueError: the model is no SDXL; a config or a file of weights is damaged; weights are not finite; a
                tokenizer lacks its words; a FineLIP or an adapter has other widths than the encoders; a FineLIP to add
                has no base; or an option has an unknown value.
            OSError: the model or a checkpoint is not there.

        Examples:
            >>> from finelip_sdxl import FineLIPSDXLPipeline
            >>> pipe = FineLIPSDXLPipeline.from_pretrained("miniature", overflow="truncate")
            >>> pipe.tokenizer.model_max_length, pipe.overflow
            (248, 'truncate')
        """
        cls._check_names("from_pretrained", kwargs)
        kwargs |= _passed_options(
            short_prompt_encoder=short_prompt_encoder,
            overflow=overflow,
            hidden_states=hidden_states,
            weighting=weighting,
            emphasis=emphasis,
            length_buckets=length_buckets,
        )
        brings_finelip = finelip is not None or finelip_2 is not None
        if (bundled := bundled_sdxl(pretrained_model_name_or_path)) is not None:
            own = [name for name in ENCODERS if name not in kwargs]
            if len(own) == 2 and not brings_finelip:
                kwargs.setdefault(ADAPTER, bundled.conditioning_adapter)
            if finelip is None and "text_encoder" in own:
                finelip = bundled.finelips["text_encoder"]
            if finelip_2 is None and "text_encoder_2" in own:
                finelip_2 = bundled.finelips["text_encoder_2"]
        origin, base = public_name(pretrained_model_name_or_path), sdxl_path(pretrained_model_name_or_path)
        merge_base = _merge_base(finelip_merge, finelip_base, finelip, finelip_2)
        weights, weights_2, kwargs = _prepared(finelip, finelip_2, kwargs)
        dtype = kwargs["dtype"]
        if kwargs.get("short_prompt_encoder") == "long":  # then the original encoders have no use
            kwargs = {**dict.fromkeys(ORIGINAL_ENCODERS), **kwargs}
        absent = [name for name in ENCODERS if name in kwargs and kwargs[name] is None]
        kwargs = {**{f"stock_{name}": None for name in absent}, **kwargs}

        hub_arguments = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
        index = _load_index(base, hub_arguments)
        if not {"unet", "text_encoder_2"} <= index.keys():
            raise ValueError(f"{base} is a {index.get('_class_name')}; expected an SDXL: pass another base.")
        adapter = kwargs.pop(ADAPTER, None if brings_finelip or absent else ...)
        if isinstance(adapter, str | os.PathLike):
            adapter = open_adapter(adapter, dtype, **hub_arguments)
        with loading_errors(base, kwargs.get("variant")):
            if os.path.isdir(base):
                check_folder(base, leave_out=kwargs)
            if adapter is ... and index.get(ADAPTER):
                adapter = own_adapter(base, kwargs.get("variant"), dtype=dtype, **hub_arguments)
            pipe: Self = super().from_pretrained(
                base, **kwargs, conditioning_adapter=None if adapter is ... else adapter
            )
        _check_parts(pipe, base)
        record_base(pipe, base_of(index) or origin)
        record_recommended(pipe, recommended_of(index))
        if index.get(UNSWAPPED) and weights is None and weights_2 is None and pipe._encoders():
            logger.warning("Text encoders saved with 77 positions stay so; swap_text_encoders() makes them 248.")
        else:
            pipe._swap_text_encoders(weights, weights_2, merge_base)
        return pipe

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path: str | os.PathLike[str],
        finelip: Source | None = None,
        finelip_2: Source | None = None,
        finelip_merge: FineLIPMerge = "replace",
        finelip_base: str | os.PathLike[str] | None = None,
        *,
        short_prompt_encoder: ShortPromptEncoder = AS_SAVED,
        overflow: Overflow = AS_SAVED,
        hidden_states: HiddenStates = AS_SAVED,
        weighting: Weighting | None = AS_SAVED,
        emphasis: Emphasis = AS_SAVED,
        length_buckets: Sequence[int] | None = AS_SAVED,
        **kwargs: Any,
    ) -> Self:
        """Load a file in the original project's layout, such as a fine-tune, with text encoders of 248 positions.

        Args:
            pretrained_model_link_or_path: a `.safetensors` or `.ckpt` file, or its address on the hub.
            finelip, finelip_2, finelip_merge, finelip_base: see `from_pretrained`. Without a FineLIP the file's own
                encoders are stretched and keep their training. A FineLIP in their place loses it; a delta merge
                (`finelip_merge="delta"`) keeps much of it.
            conditioning_adapter (keyword): a `ConditioningAdapter`, or the hub id or directory of one.
            config (keyword): a hub id or a directory of an SDXL, for its configs and tokenizers: any saved pipeline,
                of this package or not, or `"miniature"`. The number of positions is read from a file on this machine,
                and taken to be 77 for a file on the hub. Steps and guidance that it recommends hold for the file.
                The default is the config that Diffusers finds on the hub.
            **kwargs: the options of this class and all arguments of Diffusers' `from_single_file`. `dtype` is the
                dtype of every component, float32 by default.

        Returns:
            The pipeline.

        Raises:
            TypeError: an argument has an unknown name.
            ValueError: the file is no whole SDXL; or as in `from_pretrained`.
            OSError: the file is not there, or there are no configs for it.

        A file from elsewhere is opened by its path::

            from finelip_sdxl import FineLIPSDXLPipeline

            pipe = FineLIPSDXLPipeline.from_single_file("fine_tune.safetensors", dtype=torch.float16)
        """
        cls._check_names("from_single_file", kwargs)
        if not hasattr(super(), "from_single_file"):
            raise ValueError(
                f"{cls.__name__} opens no single files: open the file by FineLIPSDXLPipeline.from_single_file, and make"
                f" a {cls.__name__} of that pipeline by from_pipe."
            )
        kwargs |= _passed_options(
            short_prompt_encoder=short_prompt_encoder,
            overflow=overflow,
            hidden_states=hidden_states,
            weighting=weighting,
            emphasis=emphasis,
            length_buckets=length_buckets,
        )
        file = pretrained_model_link_or_path
        if kwargs.get("config") is not None:
            kwargs["config"] = sdxl_path(kwargs["config"])
        for name in _BESIDE:
            if name in inspect.signature(cls.__init__).parameters and kwargs.get(name) is None:
                raise ValueError(f"A {cls.__name__} needs a {name}, which single files do not hold: pass {name}=.")
        merge_base = _merge_base(finelip_merge, finelip_base, finelip, finelip_2)
        weights, weights_2, kwargs = _prepared(finelip, finelip_2, kwargs)
        hub_arguments = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
        adapter = kwargs.pop(ADAPTER, None)
        if isinstance(adapter, str | os.PathLike):
            adapter = open_adapter(adapter, kwargs["dtype"], **hub_arguments)
        index: dict[str, Any] = {}
        with single_file_errors(file, config := kwargs.pop("config", None)), tempfile.TemporaryDirectory() as folder:
            if config is not None:
                copied = Path(folder, Path(config).name or "config")
                index = write_configs(file, config, copied, **hub_arguments)
                kwargs["config"] = str(copied)
            pipe: Self = super().from_single_file(file, **kwargs)
        pipe.register_modules(conditioning_adapter=adapter)
        _check_parts(pipe, os.fspath(file))
        record_base(pipe, public_name(file))
        record_recommended(pipe, recommended_of(index))
        pipe._swap_text_encoders(weights, weights_2, merge_base)
        return pipe

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Self:
        """Make a pipeline of this class from the components and options of another, without copying weights.

        Args:
            pipeline: the other pipeline.
            **kwargs: components and options that take the place of the other's, and the arguments of Diffusers'
                `from_pipe`. `dtype` is the dtype of every component; the default is the other's. (Without a dtype
                Diffusers casts the shared components to float32.)

        Returns:
            The pipeline, with the adapter scale and the text projection cache of the other. Encoders of 77 positions
            stay; `swap_text_encoders` makes them 248.

        Raises:
            TypeError: an argument has an unknown name.
            ValueError: the other lacks a component of this class.

        Examples:
            >>> from finelip_sdxl import FineLIPSDXLImg2ImgPipeline, FineLIPSDXLPipeline
            >>> pipe = FineLIPSDXLPipeline.from_pretrained("miniature")
            >>> FineLIPSDXLImg2ImgPipeline.from_pipe(pipe).unet is pipe.unet
            True
        """
        cls._check_names("from_pipe", kwargs)
        if not isinstance(pipeline, DiffusionPipeline):
            raise TypeError(
                f"from_pipe takes a pipeline, but got {pipeline!r:.60}: pass a pipeline, or a name to from_pretrained."
            )
        if kwargs.get("dtype") is None and kwargs.get("torch_dtype") is None:
            kwargs["dtype"] = pipeline.dtype
        pipe = super().from_pipe(pipeline, **kwargs)
        pipe.set_conditioning_adapter_scale(getattr(pipeline, "conditioning_adapter_scale", 1.0))
        pipe._caches_text_projections = getattr(pipeline, "_caches_text_projections", False)
        return pipe

    @classmethod
    def download(cls, *args: Any, **kwargs: Any) -> Any:
        """As the parent; the files are checked before `from_pretrained` builds anything of them."""
        folder = super().download(*args, **kwargs)
        check_folder(folder, leave_out=kwargs)
        return folder

    def swap_text_encoders(
        self,
        finelip: Source | None = None,
        finelip_2: Source | None = None,
        finelip_merge: FineLIPMerge = "replace",
        finelip_base: str | os.PathLike[str] | None = None,
    ) -> None:
        """Replace both text encoders in the pipeline: by a FineLIP where one is passed, else by their stretched copies.

        `from_pretrained` and `from_single_file` do this themselves; pipelines from elsewhere, such as `from_pipe`, need
        it. Encoders of 248 positions stay, and no encoder or tokenizer that was passed in is changed.

        Args:
            finelip: the replacement of the first text encoder; see `from_pretrained`.
            finelip_2: the replacement of the second.
            finelip_merge, finelip_base: see `from_pretrained`.

        Raises:
            ValueError: a FineLIP for an encoder that the pipeline lacks, or of other widths; or a delta merge with an
                encoder that was trained or replaced at 248 positions.
        """
        self._swap_text_encoders(finelip, finelip_2, _merge_base(finelip_merge, finelip_base, finelip, finelip_2))

    @classmethod
    def _check_names(cls, method: str, given: Iterable[str]) -> None:
        """Refuse unknown arguments of a method that loads: names that neither it nor `__init__` nor Diffusers takes."""
        known = argument_names(cls, method) | argument_names(cls, "__init__") | {*LOADING_ARGUMENTS}
        refuse_unknown(f"{cls.__name__}.{method}", given, known)

    @classmethod
    def _stock_class(cls) -> type[DiffusionPipeline]:
        """Diffusers' own class of this pipeline."""
        stock = (base for base in cls.__mro__ if issubclass(base, DiffusionPipeline))
        return next(base for base in stock if not issubclass(base, EncoderSwapMixin))

    def _swap_text_encoders(
        self, finelip: Source | FineLIPWeights | None, finelip_2: Source | FineLIPWeights | None, merge_base: str | None
    ) -> None:
        replacements = {}
        for name, source in (("text_encoder", finelip), ("text_encoder_2", finelip_2)):
            if source is not None:
                encoder = getattr(self, name)
                replacement = _replacement(name, source, encoder)
                if merge_base is not None:
                    replacement = _merged(name, replacement, self._original_encoder(name), merge_base)
                replacements[name] = replacement.to(encoder.device, encoder.dtype)
        parts: dict[str, Any] = {}
        bare = []
        for name, tokenizer_name in ENCODERS.items():
            encoder, tokenizer = getattr(self, name), getattr(self, tokenizer_name)
            if encoder is None:
                continue
            if name in replacements:
                stock = self._original_encoder(name)
                if self.short_prompt_encoder == "original" and stock is not None:
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
                "%s: stretched to 248 positions but not trained on them. Such encoders encode the end of a long prompt"
                " worse than trained ones: pass a FineLIP or Long-CLIP as finelip= (finelip_2= for the second one).",
                " and ".join(bare),
            )

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save a folder that stock Diffusers opens too; see `DiffusionPipeline.save_pretrained`.

        Stock Diffusers opens it without the conditioning adapter, with a warning; a warning here says so. With
        `push_to_hub=True` and `repo_id=`, or by `push_to_hub(repo_id)`, the pipeline is shared, with a card of its
        parts if the repository has no card yet. Of paths on this machine, only the last part is saved. Files of weights
        get the mode of `model_index.json`.

        Raises:
            TypeError: an argument has an unknown name.
        """
        known = argument_names(type(self), "save_pretrained") | {*SAVING_ARGUMENTS}
        refuse_unknown(f"{type(self).__name__}.save_pretrained", kwargs, known)
        if self.conditioning_adapter is not None:
            logger.warning(
                "Stock Diffusers opens this folder without its conditioning adapter, which FineLIP-SDXL's pipelines"
                " load. For an alignment inside the text encoders, train a LoRA with training/align_adapter.py, and"
                " use `finelip-sdxl export`."
            )
        without_paths(self)
        with _plain_parts(self):
            super().save_pretrained(os.fspath(save_directory), *args, **kwargs)
        folder = Path(save_directory)
        for name in self.components:
            for file in folder.glob(f"{name}/*.safetensors"):  # safetensors makes them readable to their owner alone
                shutil.copymode(folder / self.config_name, file)

    def _upload_folder(
        self,
        working_dir: str | os.PathLike[str],
        repo_id: str,
        token: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
        subfolder: str | None = None,
    ) -> Any:
        """As the parent; in a repository's first upload our card replaces Diffusers', which is a template."""
        if subfolder is None and not file_exists(repo_id, "README.md", token=token):
            model_card(self, repo_id).save(os.path.join(working_dir, "README.md"))
        return super()._upload_folder(working_dir, repo_id, token, commit_message, create_pr, subfolder)


def _passed_options(**options: Any) -> dict[str, Any]:
    """The options that a caller passed; the others come from the saved folder, or from the defaults of the class."""
    return {name: value for name, value in options.items() if value is not AS_SAVED}


def _merge_base(
    finelip_merge: str,
    finelip_base: str | os.PathLike[str] | None,
    finelip: Source | None,
    finelip_2: Source | None,
) -> str | None:
    """The SDXL whose text encoders the FineLIPs were trained from, for a delta merge; None if they replace encoders."""
    check_choice("finelip_merge", finelip_merge, FINELIP_MERGE)
    sources = [source for source in (finelip, finelip_2) if source is not None]
    if finelip_merge == "replace":
        if finelip_base is not None:
            raise ValueError(f"finelip_base={finelip_base} goes with finelip_merge='delta': pass both or neither.")
        return None
    if not sources:
        raise ValueError("finelip_merge='delta' adds a FineLIP's training: pass finelip=, finelip_2= or both.")
    bases = {None if (bundled := bundled_model(source)) is None else bundled.base for source in sources}
    if finelip_base is None:
        finelip_base = bases.pop() if len(bases) == 1 else None
    if finelip_base is None:
        raise ValueError(
            "finelip_merge='delta' needs finelip_base=, the hub id or directory of the SDXL whose text encoders the"
            " FineLIP was trained from, such as stabilityai/stable-diffusion-xl-base-1.0."
        )
    return sdxl_path(finelip_base)


def _prepared(
    finelip: Source | None, finelip_2: Source | None, kwargs: dict[str, Any]
) -> tuple[FineLIPWeights | None, FineLIPWeights | None, dict[str, Any]]:
    """Check the arguments for loading before gigabytes of the base are loaded.

    Returns:
        The weights of both FineLIPs, without models, and the keyword arguments with a dtype.
    """
    # Without a dtype every library falls back on its own, and half-precision repositories end in two.
    torch_dtype = kwargs.pop("torch_dtype", None)
    kwargs = {**kwargs, "dtype": kwargs.get("dtype") or torch_dtype or torch.float32}
    if not isinstance(kwargs["dtype"], torch.dtype | dict):  # Diffusers takes float32 for it, and only logs so
        raise TypeError(f"`dtype` is {kwargs['dtype']!r:.60}; expected one of torch, such as torch.float16.")
    adapter = kwargs.get(ADAPTER)
    if not isinstance(adapter, ConditioningAdapter | str | os.PathLike | None):
        raise TypeError(
            f"`{ADAPTER}` is {adapter!r:.60}; expected a ConditioningAdapter, the directory or hub id of one, or None."
        )
    for name, source in (("text_encoder", finelip), ("text_encoder_2", finelip_2)):
        if source is not None and kwargs.get(name) is not None:
            raise ValueError(f"Both a FineLIP and `{name}` were passed for the same text encoder; pass one of them.")
    for name in OPTIONS.keys() & kwargs:
        OPTIONS[name](kwargs[name])
    weights, weights_2 = (None if source is None else read_finelip(source) for source in (finelip, finelip_2))
    return weights, weights_2, kwargs


def _load_index(base: str, hub_arguments: dict[str, Any]) -> dict[str, Any]:
    """The content of a base's `model_index.json`, with today's option names."""
    file = _locate(base, "a directory that holds an SDXL, or a hub id", hub_arguments).find("model_index.json")
    if file is None:
        raise FileNotFoundError(f"{base} holds no model_index.json: pass a directory or a hub id of an SDXL.")
    return with_new_names(read_json(file))


def _locate(name: str | os.PathLike[str], expected: str, hub_arguments: Mapping[str, Any]) -> Location:
    """`resolve`, with the arguments of Diffusers that it knows."""
    return resolve(name, expected, **{key: value for key, value in hub_arguments.items() if key != "proxies"})


def open_adapter(source: str | os.PathLike[str], dtype: torch.dtype, **hub_arguments: Any) -> ConditioningAdapter:
    """The adapter of a directory, a hub id or, by its name, an SDXL that ships with the package.

    Raises:
        OSError: there is none.
        ValueError: it is another model, or damaged.
    """
    bundled = bundled_sdxl(source)
    place = source if bundled is None else bundled.conditioning_adapter
    location = _locate(place, "the directory or hub id of a conditioning adapter", hub_arguments)
    file = location.find("config.json")
    if file is None:
        inner = [os.path.join(place, folder) for folder in ("last", ADAPTER)]
        found = next((folder for folder in inner if os.path.isdir(folder)), None)
        hint = f"pass {found or 'the folder `last` of a run of training/align_adapter.py'}"
        kind = "is a file, and" if location.path is not None and location.path.is_file() else "holds"
        raise FileNotFoundError(f"{source} {kind} no conditioning adapter: {hint}.")
    if read_json(file).get("_class_name") != ConditioningAdapter.__name__:
        raise ValueError(
            f"{source} is no conditioning adapter: pass the folder `last` of a run of training/align_adapter.py that"
            " trained one. (A run with a LoRA writes text encoders there: pass them as finelip= and finelip_2=.)"
        )
    with loading_errors(place):
        if location.path is not None:
            check_component(location.path)
        adapter: ConditioningAdapter = ConditioningAdapter.from_pretrained(
            os.fspath(place), dtype=dtype, **hub_arguments
        )
        return adapter


def own_adapter(base: str, variant: str | None, **arguments: Any) -> ConditioningAdapter:
    """The conditioning adapter in a saved pipeline: its files of the variant if it has them, else its plain files."""
    adapter: ConditioningAdapter
    if variant is not None:
        try:
            adapter = ConditioningAdapter.from_pretrained(base, subfolder=ADAPTER, variant=variant, **arguments)
            return adapter
        except OSError:
            pass
    adapter = ConditioningAdapter.from_pretrained(base, subfolder=ADAPTER, **arguments)
    return adapter


def _check_parts(pipe: EncoderSwapMixin, source: str) -> None:
    """Check that tokenizers know words, that weights are numbers, and that the adapter fits."""
    for name in ENCODERS.values():
        if isinstance(tokenizer := getattr(pipe, name), CLIPTokenizer):
            check_tokenizer(tokenizer, f"{source}: {name}")
    for name in (*ENCODERS, *ORIGINAL_ENCODERS, ADAPTER):
        part = getattr(pipe, name)
        if part is not None and not getattr(part, "is_quantized", False):  # torchao's tensors cannot be checked
            check_finite(dict(part.named_parameters()), f"{source}: {name}")
    check_adapter(pipe)


def check_adapter(pipe: EncoderSwapMixin) -> None:
    """Check that the conditioning adapter, if there is one, has the widths of this SDXL.

    Raises:
        ValueError: it has others.
    """
    adapter, encoder_2 = pipe.conditioning_adapter, pipe.text_encoder_2
    if adapter is None or encoder_2 is None:
        return
    encoders = [encoder for encoder in (pipe.text_encoder, encoder_2) if encoder is not None]
    found = [*(encoder.config.hidden_size for encoder in encoders), encoder_2.config.projection_dim]
    if found != adapter.widths:
        raise adapter.mismatch(f"this SDXL's are {', '.join(map(str, found))}")


def _replacement(name: str, source: Source | FineLIPWeights, encoder: TextEncoder | None) -> TextEncoder:
    """The text encoder of a FineLIP, as a replacement of `encoder`."""
    if encoder is None:
        raise ValueError(f"A FineLIP was passed for `{name}`, but this pipeline has no such text encoder.")
    if getattr(encoder, "is_quantized", False):
        raise ValueError(
            f"`{name}` is quantized, and its replacement would not be: save the SDXL with this FineLIP by"
            " `finelip-sdxl convert` first, and load the result quantized."
        )
    has_projection = isinstance(encoder, CLIPTextModelWithProjection)
    weights = source if isinstance(source, FineLIPWeights) else read_finelip(source)
    if has_projection and weights.config.projection_dim is None:
        raise ValueError(
            f"The FineLIP for `{name}` has no text projection, like SDXL's first encoder: pass it as `finelip`, and as"
            " `finelip_2` one that was trained from the second (OpenCLIP bigG)."
        )
    replacement = weights.to_text_encoder(projection=has_projection)
    for width in ("hidden_size", "vocab_size", *(("projection_dim",) if has_projection else ())):
        found, expected = getattr(replacement.config, width), getattr(encoder.config, width)
        if found != expected:
            raise ValueError(
                f"The FineLIP for `{name}` has {width} {found}, but this SDXL needs {expected}: pass as `finelip` one"
                " trained from the first encoder (CLIP-L in SDXL), as `finelip_2` from the second (OpenCLIP bigG)."
            )
    # A source of 77 positions was stretched on loading. Its rows are its own, not stock's of this SDXL.
    forget_stretch(replacement.config)
    return replacement


def _merged(
    name: str, finelip: TextEncoder, stock: tuple[TextEncoder, torch.Tensor | None] | None, base: str
) -> TextEncoder:
    """The delta merge of a FineLIP's text encoder into the original text encoder."""
    if stock is None:
        raise ValueError(
            f"`{name}` was trained or replaced at 248 positions, and finelip_merge='delta' needs encoders of 77: load"
            " the fine-tune itself."
        )
    own = stock[0] if num_positions(stock[0]) > STOCK_POSITIONS else stretch_text_encoder(stock[0])
    has_projection = isinstance(own, CLIPTextModelWithProjection)
    before = read_finelip(base, subfolder=name, dtype=torch.float32).to_text_encoder(projection=has_projection)
    merged = add_difference(own, finelip, before)
    merged_with = Provenance.of(finelip.config).made_from
    replace(Provenance.of(merged.config), merged_with=merged_with).write(merged.config)
    return merged


@contextmanager
def _plain_parts(pipe: EncoderSwapMixin) -> Iterator[None]:
    """Put plain copies of encoders and tokenizers in place while a pipeline is saved.

    The keys in the saved files begin with `text_model.`: recent `transformers` leave the prefix out for a
    `CLIPTextModel` that was not loaded with it, and older ones load such a file as random weights. The saved tokenizers
    hold no truncation or padding of the last call.
    """
    originals: dict[str, Any] = {}
    for name in ENCODERS.values():
        if isinstance(tokenizer := getattr(pipe, name), CLIPTokenizer):
            originals[name] = tokenizer
    for name in ("text_encoder", "stock_text_encoder"):
        encoder = getattr(pipe, name)
        if isinstance(encoder, CLIPTextModel) and not any(
            hasattr(module, "base_layer") for module in encoder.modules()
        ):
            originals[name] = encoder
    try:
        for name, part in originals.items():
            if isinstance(part, CLIPTextModel):
                saved: Any = build_text_encoder(part.config, text_encoder_tensors(part))
            else:
                saved = with_max_length(part, part.model_max_length)
            setattr(pipe, name, saved)
        yield
    finally:
        for name, part in originals.items():
            setattr(pipe, name, part)
