"""The comparison: one prompt, encoded in three ways and drawn from the same noise.

All columns share one UNet and one VAE, and differ in the embeddings that the UNet gets. So one pipeline draws them all:
it encodes the prompt itself for FineLIP-SDXL, and takes embeddings for the other columns.
"""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from transformers import CLIPTokenizer

from finelip_sdxl.attribution.trace import AttentionTrace, trace_attention
from finelip_sdxl.comparison.compel import open_compel, parsing, plan_by_compel
from finelip_sdxl.comparison.settings import WEIGHTINGS, Settings, check_columns
from finelip_sdxl.images import label_grid, sampler_name, to_image
from finelip_sdxl.miniature import miniature_path
from finelip_sdxl.miniature.parsing import DescribedObject, is_of_world
from finelip_sdxl.miniature.scoring import score_objects
from finelip_sdxl.names import sdxl_path
from finelip_sdxl.options import (
    COLUMNS,
    EMPHASIS,
    LOADED,
    STOCK_POSITIONS,
    Emphasis,
    Weighting,
    check_choice,
    check_texts,
)
from finelip_sdxl.picture_sizes import side_factor
from finelip_sdxl.pipelines import FineLIPSDXLImg2ImgPipeline, FineLIPSDXLPipeline
from finelip_sdxl.pipelines.export import in_stock_class
from finelip_sdxl.pipelines.opening import open_text_to_image
from finelip_sdxl.prompts.compel_operators import is_more_than_weights
from finelip_sdxl.prompts.plan import EncoderPlan, EncoderSpec, PromptPlan, plan_prompts
from finelip_sdxl.prompts.specs import sdxl_specs
from finelip_sdxl.provenance import public_name
from finelip_sdxl.recommended import Recommended, recommended_of
from finelip_sdxl.text_encoders import TextEncoder, num_positions, unstretch_text_encoder, with_max_length

# Where a refiner takes over, as a share of the denoising; SDXL's authors trained theirs on the last fifth.
HAND_OVER, MIN_REFINED_STEPS = 0.8, 5

# Arguments of a picture that its embeddings depend on
_ENCODED_WITH = ("hidden_states", "conditioning_adapter_scale")

Pipe = FineLIPSDXLPipeline | FineLIPSDXLImg2ImgPipeline

# Called after each step with its number and the number of all steps. An error that it raises ends the drawing.
OnStep = Callable[[int, int], None]


@dataclass(frozen=True)
class Picture:
    """A drawn column: its key in `COLUMNS`, the picture, its settings, the seconds of drawing, the `sources` of its
    comparison, and the trace of its drawing, if one was asked for."""

    column: str
    image: Image.Image
    settings: Settings
    seconds: float
    sources: Mapping[str, str] = field(default_factory=dict)
    trace: AttentionTrace | None = field(default=None, repr=False, compare=False)

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters in the picture's file."""
        size = {"width": self.image.width, "height": self.image.height}
        about = {"column": self.column, "finelip_sdxl": version("finelip-sdxl")}
        return {**asdict(self.settings), **size, **self.sources, **about}


def label_pictures(pictures: Sequence[Picture], described: Sequence[DescribedObject] = ()) -> Image.Image:
    """Put pictures together: a row for each seed, a column for each way of encoding, the prompt above.

    Args:
        pictures: pictures of one prompt, every column from every seed.
        described: for the miniature, the objects that the prompt describes. Each picture's count of right objects
            stands below it.

    Raises:
        ValueError: there are no pictures, or a column was not drawn from every seed.

    Examples:
        >>> star = Picture("stock", Image.new("RGB", (96, 96)), Settings("a red star", seed=7), seconds=1.0)
        >>> label_pictures([star]).mode
        'RGB'
    """
    columns = [column for column in COLUMNS if any(picture.column == column for picture in pictures)]
    by_place = {(picture.settings.seed, picture.column): picture.image for picture in pictures}
    seeds = list(dict.fromkeys(picture.settings.seed for picture in pictures))
    rows = [[by_place[seed, column] for column in columns if (seed, column) in by_place] for seed in seeds]
    captions = [[_count_right(image, described) for image in row] for row in rows] if described else None
    return label_grid(
        rows,
        [f"seed {seed}" for seed in seeds],
        [COLUMNS[column] for column in columns],
        title=pictures[0].settings.prompt if pictures else "",
        captions=captions,
    )


def _count_right(image: Image.Image, described: Sequence[DescribedObject]) -> str:
    right = sum(score.right for score in score_objects(image, described))
    return f"{right} of {len(described)} objects right"


class Comparison:
    """An SDXL that draws a prompt in three columns: cut at 77 tokens by stock, in windows of 77 by compel, and by
    FineLIP-SDXL.

    Args:
        pipe: a pipeline of this package whose text encoders have 248 positions.
        refiner: SDXL's refiner as a pipeline of this package, or None.
        offload: keep on `device` only the model that is running.
        device: the device that draws.

    Attributes:
        pipe: the pipeline of FineLIP-SDXL's column.
        is_miniature: whether `load` loaded the miniature.
        sources: names of the parts that `load` loaded (of a path the last part alone), and the dtype.

    Raises:
        ValueError: stock's encoders are not in the pipeline, and cannot be cut out of its long ones.
    """

    def __init__(
        self,
        pipe: FineLIPSDXLPipeline,
        refiner: FineLIPSDXLImg2ImgPipeline | None = None,
        *,
        device: str | torch.device = "cpu",
        offload: bool = False,
    ) -> None:
        self.pipe = pipe
        self._base = _Stage(pipe, device, offload)
        self._refiner = None if refiner is None else _Stage(refiner, device, offload)
        # Schedulers, hooks and options belong to the pipeline: one drawing at a time.
        self._drawing = threading.Lock()
        self.is_miniature = False
        self.sources: dict[str, str] = {}

    @classmethod
    def load(
        cls,
        base: str = "miniature",
        *,
        refiner: str | None = None,
        device: str | torch.device = "cpu",
        offload: bool = False,
        dtype: torch.dtype = torch.float32,
        variant: str | None = None,
        **loading: Any,
    ) -> Comparison:
        """Load the pipelines of a comparison.

        Args:
            base: hub id, directory or single file of an SDXL, or `"miniature"`.
            refiner: hub id or directory of SDXL's refiner.
            device, offload: see the class.
            dtype: type of all weights.
            variant: variant of the weight files, such as `"fp16"`.
            **loading: further arguments of `FineLIPSDXLPipeline.from_pretrained` or `from_single_file`, such as
                `finelip`, `conditioning_adapter` and `config`.

        Raises:
            ValueError, OSError: the base or another part cannot be loaded.

        Examples:
            >>> comparison = Comparison.load("miniature")
            >>> comparison.plan("a red star")["finelip"].tokens
            5
        """
        # Stock's encoders draw a column here, so they are kept even where nothing else needs them.
        short_prompt_encoder = loading.pop("short_prompt_encoder", None)
        pipe = open_text_to_image(base, dtype=dtype, variant=variant, **loading)
        pipe.short_prompt_encoder = short_prompt_encoder or pipe.short_prompt_encoder
        refining = None
        if refiner is not None:
            if Path(refiner).is_file():
                raise ValueError(f"`refiner` {refiner} is a file; expected the directory or hub id of SDXL's refiner.")
            # It encodes as the base does, by the second encoder.
            same = {name: getattr(pipe, name) for name in ("short_prompt_encoder", "overflow", "weighting", "emphasis")}
            if loading.get("finelip_2") is not None:
                merge = ("finelip_2", "finelip_merge", "finelip_base")
                same |= {name: loading[name] for name in merge if name in loading}
            refining = FineLIPSDXLImg2ImgPipeline.from_pretrained(refiner, dtype=dtype, variant=variant, **same)
        comparison = cls(pipe, refining, device=device, offload=offload)
        comparison.is_miniature = sdxl_path(base) == str(miniature_path())
        given = {"base": base, "refiner": refiner, **{name: loading.get(name) for name in LOADED}}
        names = {name: public_name(source) for name, source in given.items() if isinstance(source, str | os.PathLike)}
        comparison.sources = {**names, "dtype": str(dtype).removeprefix("torch.")}
        return comparison

    @property
    def recommended(self) -> Recommended:
        """The steps and the guidance scale for settings that leave them out."""
        return recommended_of(self.pipe.config) or Recommended()

    @property
    def size(self) -> tuple[int, int]:
        """The model's own width and height, in pixels."""
        side: int = self.pipe.default_sample_size * self.pipe.vae_scale_factor
        return side, side

    def text_encoders(self, column: str) -> list[TextEncoder]:
        """The text encoders that draw a column; FineLIP-SDXL's column has the long ones.

        Raises:
            ValueError: the column is unknown.
        """
        (column,) = check_columns([column])
        pipe = self.pipe if column == "finelip" else self._base.stock
        encoders: list[TextEncoder | None] = [pipe.text_encoder, pipe.text_encoder_2]
        return [encoder for encoder in encoders if encoder is not None]

    def plan(
        self,
        prompt: str,
        columns: Sequence[str] = tuple(COLUMNS),
        weighting: str | None = None,
        emphasis: str | None = None,
    ) -> dict[str, EncoderPlan]:
        """Plan a prompt for each column: its windows, and the text that is cut.

        Runs no encoder, and may be called while another thread draws. compel takes seconds for long texts.

        Args:
            prompt: the text.
            columns: keys of `COLUMNS`.
            weighting, emphasis: as in `Settings`.

        Returns:
            The plans by the columns' keys.

        Raises:
            TypeError: the prompt is no string, or the columns are no list of strings.
            ValueError: the prompt is too long, a column is unknown or there twice, or compel is among the columns and
                cannot parse the prompt.
        """
        return self._plan(
            prompt, columns, [encoder.spec for encoder in self.pipe._call_encoders()], weighting, emphasis
        )

    def plan_for_reader(
        self,
        prompt: str,
        columns: Sequence[str] = tuple(COLUMNS),
        weighting: str | None = None,
        emphasis: str | None = None,
    ) -> dict[str, EncoderPlan]:
        """As `plan`, for people who look at the counts: a prompt that the miniature does not know is planned as by a
        real SDXL, in CLIP's tokens."""
        if not self.is_miniature or is_of_world(prompt):
            return self.plan(prompt, columns, weighting, emphasis)
        return self._plan(prompt, columns, _sdxl_specs(), weighting, emphasis)

    def _plan(
        self,
        prompt: str,
        columns: Sequence[str],
        specs: Sequence[EncoderSpec],
        weighting: str | None,
        emphasis: str | None,
    ) -> dict[str, EncoderPlan]:
        if not isinstance(prompt, str):
            raise TypeError(f"`prompt` must be a string, but is {prompt!r:.60}.")
        check_texts("prompt", prompt)
        pipe = self.pipe
        # The tokenizer of our own pipeline: stock's and compel's tokenizers are set to cut while they draw.
        tokenizer = specs[0].tokenizer
        planned = partial(
            plan_prompts,
            short_prompt_encoder=pipe.short_prompt_encoder,
            overflow=pipe.overflow,
            length_buckets=pipe.length_buckets,
            weighting=_pick_weighting(weighting, pipe.weighting),
            emphasis=_pick_emphasis(emphasis, pipe.emphasis),
            steps=self.recommended.steps,
        )
        plans: dict[str, Callable[[], EncoderPlan]] = {
            "stock": lambda: _plan_by_stock(tokenizer, prompt),
            "compel": lambda: plan_by_compel(tokenizer, prompt),
            # Of a prompt that is drawn with several texts, the longest
            "finelip": lambda: max(
                planned(specs, [[prompt]] * len(specs)).prompts["text_encoder"], key=lambda plan: plan.tokens
            ),
        }
        return {column: plans[column]() for column in check_columns(columns)}

    def draw(self, column: str, settings: Settings, on_step: OnStep | None = None, *, traced: bool = False) -> Picture:
        """Draw one column. All columns begin with the same noise for a seed. Drawings from several threads wait for one
        another.

        Args:
            column: a key of `COLUMNS`.
            settings: prompt, seed and all other settings.
            on_step: called after each step with its number and the number of all steps. An error that it raises ends
                the drawing.
            traced: note where each phrase of the prompt acts (`trace_attention`). A refiner's steps are left out. A
                prompt with compel's `.and()`, `.blend()` and the like has no trace in compel's column, and one that is
                drawn with several texts, by a schedule, `AND` or `.blend()`, none in FineLIP-SDXL's: their tokens are
                not those of one text.

        Raises:
            ValueError: the column is unknown, the model cannot draw this size, compel cannot parse the prompt, or the
                picture holds NaN.
            MemoryError: the device's memory was not enough; a smaller picture can be drawn afterward.
        """
        check_columns([column])
        settings.check_size(side_factor(self.pipe))
        with self._drawing:
            filled = settings.filled(self.recommended)
            return self._draw_alone(column, filled, on_step or (lambda step, steps: None), traced)

    def _draw_alone(self, column: str, settings: Settings, on_step: OnStep, traced: bool) -> Picture:
        started = time.perf_counter()
        ran_out = False
        try:
            pixels, trace = self._draw(column, settings, on_step, traced)
            image = to_image(pixels)
        except RuntimeError as error:
            ran_out = is_out_of_memory(error)
            if not ran_out:
                raise
        finally:
            self._base.free()
            if self._refiner is not None:
                self._refiner.free()
        if ran_out:  # outside of the handler, whose error holds on to the memory
            raise_out_of_memory(settings.width or self.size[0], settings.height or self.size[1])
        about = {**self.sources, "sampler": sampler_name(self.pipe.scheduler)}
        return Picture(column, image, settings, time.perf_counter() - started, about, trace)

    def _draw(
        self, column: str, settings: Settings, on_step: OnStep, traced: bool
    ) -> tuple[torch.Tensor, AttentionTrace | None]:
        """The pixels, (3, height, width), and the trace of the base's steps."""
        assert settings.steps is not None  # filled
        width, height = settings.width or self.size[0], settings.height or self.size[1]
        common: dict[str, Any] = {
            "num_inference_steps": settings.steps,
            "guidance_scale": settings.guidance_scale,
            "generator": torch.Generator().manual_seed(settings.seed),
            "output_type": "pt",
        }
        base: dict[str, Any] = {
            "width": width,
            "height": height,
            "hidden_states": settings.hidden_states or self.pipe.hidden_states,
            "conditioning_adapter_scale": settings.conditioning_adapter_scale,
        }
        first = _Steps(on_step, settings.steps)
        if self._refiner is not None and settings.steps < MIN_REFINED_STEPS:
            raise ValueError(
                f"`steps` is {settings.steps}; with a refiner, which draws the last fifth of them, expected at least"
                f" {MIN_REFINED_STEPS}."
            )
        if self._refiner is not None:
            base |= {"denoising_end": HAND_OVER, "output_type": "latent"}
        drawn, trace = self._base.draw(column, settings, traced, callback_on_step_end=first, **{**common, **base})
        if self._refiner is not None:
            second = _Steps(on_step, settings.steps, already=first.done)
            drawn, _ = self._refiner.draw(
                column, settings, callback_on_step_end=second, denoising_start=HAND_OVER, image=drawn, **common
            )
        return cast(torch.Tensor, drawn[0]), trace


class _Steps:
    """Counts a pipeline's steps, and passes each on."""

    def __init__(self, on_step: OnStep, steps: int, already: int = 0) -> None:
        self.on_step, self.steps, self.done = on_step, steps, already

    def __call__(self, pipe: DiffusionPipeline, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        self.done += 1
        self.on_step(self.done, self.steps)
        return tensors


class _Stage:
    """A pipeline of this package, base or refiner. It also draws from the embeddings of stock and of compel."""

    def __init__(self, pipe: Pipe, device: str | torch.device, offload: bool) -> None:
        self.pipe = pipe
        pipe.set_progress_bar_config(disable=True)
        pipe.enable_text_projection_cache()
        encoders = {name: _stock_encoder(pipe, name) for name in ("text_encoder", "text_encoder_2")}
        # As components they are moved and offloaded with the others.
        pipe.register_modules(**{f"stock_{name}": encoder for name, encoder in encoders.items()})
        tokenizers = {
            name: with_max_length(tokenizer, STOCK_POSITIONS)
            for name in ("tokenizer", "tokenizer_2")
            if (tokenizer := getattr(pipe, name)) is not None
        }
        self.stock = in_stock_class(pipe, **encoders, **tokenizers)
        if offload:
            pipe.enable_model_cpu_offload(device=device)
        else:
            pipe.to(device)
        self.compel = open_compel(self.stock, str(device))
        # By column: the texts, options and encoders of the last picture, and its embeddings
        self._encoded: dict[str, tuple[Any, dict[str, Any]]] = {}

    def draw(
        self, column: str, settings: Settings, traced: bool = False, **arguments: Any
    ) -> tuple[Any, AttentionTrace | None]:
        if column == "finelip" and self._plan_by_us(settings).schedule:
            # Several texts for one picture: the call itself puts them in, and no token of one text is at one place.
            texts: dict[str, Any] = {"prompt": settings.prompt, "negative_prompt": settings.negative_prompt or None}
            return self.pipe(**texts, **self._weights(settings), **arguments).images, None
        embeddings = self._encode_once(column, settings, arguments)
        traced = traced and not (column == "compel" and is_more_than_weights(settings.prompt))
        tracing = trace_attention(self.pipe, self._plan(column, settings, embeddings)) if traced else nullcontext()
        with tracing as trace:
            return self.pipe(**embeddings, **arguments).images, trace

    def free(self) -> None:
        """With offloading, take the model that ran last off the device."""
        self.pipe.maybe_free_model_hooks()

    def _plan(self, column: str, settings: Settings, embeddings: Mapping[str, Any]) -> PromptPlan:
        """The plan behind a column's embeddings."""
        if column == "finelip":
            return self._plan_by_us(settings)
        tokenizer = self.pipe.tokenizer or self.pipe.tokenizer_2
        ways = {"stock": _plan_by_stock, "compel": plan_by_compel}
        windows = embeddings["prompt_embeds"].shape[1] // STOCK_POSITIONS
        return PromptPlan({"text_encoder": (ways[column](tokenizer, settings.prompt),)}, {}, STOCK_POSITIONS, windows)

    def _plan_by_us(self, settings: Settings) -> PromptPlan:
        negative = settings.negative_prompt or None if _is_guided(settings) else None
        return self.pipe.describe_prompt(
            settings.prompt,
            negative_prompt=negative,
            num_inference_steps=settings.steps,
            **self._weights(settings),
        )

    def _weights(self, settings: Settings) -> dict[str, Any]:
        """The syntax and the effect of weights, as options of the pipeline."""
        return {
            "weighting": _pick_weighting(settings.weighting, self.pipe.weighting),
            "emphasis": _pick_emphasis(settings.emphasis, self.pipe.emphasis),
        }

    # Each column's embeddings

    def _encode_once(self, column: str, settings: Settings, arguments: dict[str, Any]) -> dict[str, Any]:
        """The embeddings of a column; those of the last picture if they are from the same texts, options and encoders,
        as for pictures that differ in their seeds."""
        options = self._weights(settings) | {name: arguments[name] for name in _ENCODED_WITH if name in arguments}
        own = [getattr(self.pipe, name) for name in ("short_prompt_encoder", "hidden_states", "overflow")]
        encoders = self.pipe._fingerprint()
        key = (
            settings.prompt,
            settings.negative_prompt,
            _is_guided(settings),
            options,
            own,
            self.pipe.length_buckets,
            encoders,
        )
        last_key, embeddings = self._encoded.get(column, (None, {}))
        if not encoders or key != last_key:
            self._encoded.pop(column, None)
            ours = partial(self._encode_by_us, **options)
            ways: dict[str, Callable[[Settings], dict[str, Any]]] = {
                "stock": self._encode_by_stock,
                "compel": self._encode_by_compel,
                "finelip": ours,
            }
            embeddings = ways[column](settings)
            self.free()
            self._encoded[column] = key, embeddings
        return embeddings

    def _encode_by_us(self, settings: Settings, **options: Any) -> dict[str, Any]:
        with torch.no_grad():
            return _embeddings(
                *self.pipe.encode_prompt(
                    settings.prompt,
                    do_classifier_free_guidance=_is_guided(settings),
                    negative_prompt=settings.negative_prompt or None,
                    **options,
                )
            )

    def _encode_by_stock(self, settings: Settings) -> dict[str, Any]:
        with torch.no_grad(), _unwarned():
            return _embeddings(
                *self.stock.encode_prompt(
                    settings.prompt,
                    device=self.pipe._execution_device,
                    do_classifier_free_guidance=_is_guided(settings),
                    negative_prompt=settings.negative_prompt or None,
                )
            )

    def _encode_by_compel(self, settings: Settings) -> dict[str, Any]:
        # Where SDXL takes zeros for an absent negative prompt, compel needs none.
        negative = settings.negative_prompt or (None if self.pipe.config["force_zeros_for_empty_prompt"] else "")
        with torch.no_grad(), parsing(settings.prompt, negative or ""):
            found = self.compel(settings.prompt, negative)
        return _embeddings(found.embeds, found.negative_embeds, found.pooled_embeds, found.negative_pooled_embeds)


def _is_guided(settings: Settings) -> bool:
    return (settings.guidance_scale or 0) > 1


def _stock_encoder(pipe: Pipe, name: str) -> TextEncoder | None:
    """Stock's encoder of 77 positions for the component `name`; None if the pipeline has no such component."""
    encoder: TextEncoder | None = getattr(pipe, name)
    original: TextEncoder | None = getattr(pipe, f"stock_{name}")
    if original is not None or encoder is None:
        return original
    return encoder if num_positions(encoder) == STOCK_POSITIONS else unstretch_text_encoder(encoder)


def _pick_weighting(weighting: str | None, own: Weighting | None) -> Weighting | None:
    """A pipeline's weighting for the one of `Settings`."""
    if weighting is None:
        return own
    check_choice("weighting", weighting, WEIGHTINGS)
    return None if weighting == "none" else cast(Weighting, weighting)


def _pick_emphasis(emphasis: str | None, own: Emphasis) -> Emphasis:
    """A pipeline's emphasis for the one of `Settings`."""
    return own if emphasis is None else cast(Emphasis, check_choice("emphasis", emphasis, EMPHASIS))


@contextmanager
def _unwarned() -> Iterator[None]:
    """Silence stock's warning of cut text: the comparison shows it."""
    before = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(before)


def _embeddings(states: Any, negative: Any, pooled: Any, negative_pooled: Any) -> dict[str, Any]:
    return {
        "prompt_embeds": states,
        "negative_prompt_embeds": negative,
        "pooled_prompt_embeds": pooled,
        "negative_pooled_prompt_embeds": negative_pooled,
    }


def _plan_by_stock(tokenizer: CLIPTokenizer, prompt: str) -> EncoderPlan:
    spec = EncoderSpec("text_encoder", tokenizer, STOCK_POSITIONS)
    return plan_prompts([spec], [[prompt]], overflow="truncate", length_buckets=()).plans[0]


_sdxl_specs = cache(sdxl_specs)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that the device's memory was not enough."""
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


def raise_out_of_memory(width: int, height: int, pictures: int = 1) -> NoReturn:
    """Free memory where possible, and raise a MemoryError with advice."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    what, less = "a picture", "a smaller one"
    if pictures > 1:
        what, less = f"{pictures} pictures", "fewer at a time, smaller ones"
    raise MemoryError(
        f"The memory did not suffice for {what} of {width} × {height} pixels: try {less}, half precision"
        " (`dtype`: float16) or offloading (`offload`), and close other programs on the device."
    )
