"""The page: one prompt, encoded in three ways, drawn side by side."""

from __future__ import annotations

import hashlib
import inspect
import random
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from html import escape
from itertools import product
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.blocks import BlockFunction
from PIL import Image

from demo import meter, phrases_view, scoring_view
from demo.progress import Line, Place, Progress, Stopped, Visitors, Waiting, follow
from demo.rendering import render
from demo.theme import ABOUT_MINIATURE, DRAW, DRAW_ALL, PHRASES_SCRIPT, bar, heading, intro, sources_line, status_line
from finelip_sdxl.comparison.comparison import MIN_REFINED_STEPS, Comparison, Picture, label_pictures
from finelip_sdxl.comparison.settings import MAX_SEED, MIN_SIDE, Settings, check_columns, check_number
from finelip_sdxl.images import read_parameters, save_png
from finelip_sdxl.miniature.notice import REAL_SDXL, unknown
from finelip_sdxl.miniature.parsing import DescribedObject, is_of_world, parse_description
from finelip_sdxl.options import COLUMNS, HIDDEN_STATES
from finelip_sdxl.picture_sizes import side_factor

EXAMPLES = Path(__file__).parent / "examples"
# Far more than three windows of 248 tokens. compel takes seconds for texts that are much longer.
MAX_CHARACTERS = 6000
MAX_STEPS = 100
MAX_SEEDS = 8
MAX_WAITING = 20
KEPT_SECONDS = 3600  # pictures of visitors who never announce that they leave, such as clients of the API
OUTPUTS = 5  # components of each column
MAPS = "maps-"  # first part of the names of files with heat maps
PICTURE_HEIGHT = 300  # with everything above it, it fits into a window of 900 pixels
# The settings in the order of the events' inputs.
FIELDS = (
    "prompt",
    "negative_prompt",
    "steps",
    "guidance_scale",
    "width",
    "height",
    "conditioning_adapter_scale",
    "hidden_states",
    "weighting",
    "emphasis",
    "seed",
)
_ENDPOINTS = ("tokens", "compare")  # of the API
# Tells `scripts/phrases.js` that the pictures are there.
PHRASE_SHOWN = "() => document.querySelector('#phrases .phrases')?.dispatchEvent(new Event('shown', {bubbles: true}))"
# An event of the page alone. Gradio's own signs of progress would cover the page's.
_PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
# Drawing waits in the page's own line, which can say how long, and not in Gradio's queue.
_UNLIMITED: dict[str, Any] = {"concurrency_limit": None}


def build_page(comparison: Comparison, folder: Path, max_side: int, max_waiting: int = MAX_WAITING) -> gr.Blocks:
    """The Gradio page of a comparison.

    Args:
        comparison: the models that draw.
        folder: place of the pictures to download. A visitor's pictures are deleted when the page is closed.
        max_side: the largest width and height, in pixels.
        max_waiting: number of runs that may wait for their turn.
    """
    return _Page(comparison, folder, max_side, max_waiting).build()


class _Blocks(gr.Blocks):
    """Gradio's page, with a sentence of our own for a call of the API with too few or too many values."""

    def validate_inputs(self, block_fn: BlockFunction, inputs: list[Any]) -> None:
        if block_fn.api_name in _ENDPOINTS and len(inputs) != len(block_fn.inputs):
            names = [name for name in inspect.signature(block_fn.fn).parameters if name != "request"]
            raise gr.Error(
                f"/{block_fn.api_name} takes {len(names)} value{'s' * (len(names) > 1)} in this order: "
                f"{', '.join(names)}; but it got {len(inputs)}. Pass each of them, with null for its default where"
                " docs/guides/demo.md says that the default is the model's or the pipeline's.",
                title="Not drawn",
                print_exception=False,
            )
        super().validate_inputs(block_fn, inputs)


class _Page:
    def __init__(self, comparison: Comparison, folder: Path, max_side: int, max_waiting: int) -> None:
        self.comparison, self.folder = comparison, folder
        self.max_side = min(max_side, 4 * max(comparison.size))  # no SDXL draws larger ones well
        self.visitors, self.line = Visitors(), Line(max_waiting)
        self.examples = _read_examples(EXAMPLES / ("miniature" if comparison.is_miniature else "sdxl"))
        self.defaults = Settings(next(iter(self.examples.values()))).filled(comparison.recommended)
        self._opening: list[Picture] = []
        self._opening_lock = threading.Lock()

    # Layout

    def build(self) -> gr.Blocks:
        with _Blocks(title="FineLIP-SDXL", analytics_enabled=False, delete_cache=(600, 3600)) as page:
            gr.HTML(intro(self.comparison.is_miniature), elem_classes="intro")
            prompt = gr.Textbox(
                self.defaults.prompt,
                label="Prompt",
                placeholder="A long description",
                lines=3,
                max_lines=7,
                elem_id="prompt",
                render=False,
            )
            gr.Examples(
                [[text] for text in self.examples.values()],
                [prompt],
                example_labels=list(self.examples),
                label="Examples",
                elem_id="examples",
                api_visibility="private",
            )
            with gr.Column(elem_id="prompt-and-meter"):
                prompt.render()
                meter_html = gr.HTML(self._meter(self.defaults.prompt), elem_id="meter")
            with gr.Row(elem_id="actions"):
                with gr.Column(scale=6, min_width=180, elem_id="draw-and-bar"):
                    draw = gr.Button(DRAW, variant="primary", elem_id="draw")
                    bar_html = gr.HTML(elem_id="bar")
                stop = gr.Button("Stop", variant="stop", scale=1, min_width=90, interactive=False, elem_id="stop")
                # Without bounds: Gradio would print a traceback where the settings have a sentence.
                seed = gr.Number(0, label="Seed", precision=0, min_width=190, elem_id="seed")
                keep_seed = gr.Checkbox(
                    False, label="Keep the seed", container=False, min_width=140, elem_id="keep-seed"
                )
            boxes, outputs = self._build_columns()
            phrases = gr.HTML(elem_id="phrases", elem_classes="drawn", js_on_load=PHRASES_SCRIPT)
            fields, columns, upload = self._build_options(prompt, seed)
            inputs = [*fields, keep_seed, columns]
            draw_grid, stop_grid, seeds, grid_outputs = self._build_grid()
            self._build_notes()

            controls = [draw, stop, draw_grid, stop_grid, bar_html]
            self._start(draw, self.draw_columns, inputs, [seed, *outputs, phrases, draw, bar_html], controls)
            self._start(draw_grid, self.draw_grid, [*inputs, seeds], [seed, *grid_outputs, draw_grid], controls)
            # What is pressed follows what is shown.
            phrases.select(
                self.show_phrase,
                None,
                outputs[1::OUTPUTS],
                trigger_mode="always_last",
                **_PRIVATE,
                **_UNLIMITED,
            ).success(None, None, None, js=PHRASE_SHOWN, **_PRIVATE)
            for button in (stop, stop_grid):
                button.click(self.stop, queue=False, api_visibility="private")
            # compel's parser takes seconds for long texts: its part follows, and typing does not wait for it.
            soon: dict[str, Any] = {"queue": False, "trigger_mode": "always_last", **_PRIVATE}
            weighting = fields[FIELDS.index("weighting")]
            for changed in (prompt, weighting):
                changed.change(self.render_meter, [prompt, weighting], meter_html, **soon).then(
                    self.render_whole_meter, [prompt, weighting], meter_html, **soon
                )
            upload.upload(self.load_settings, upload, [*fields, keep_seed], **_PRIVATE)
            columns.change(self.show_columns, columns, boxes, queue=False, **_PRIVATE)
            self._keep_prompt(page, prompt)
            page.load(self.open, None, [*outputs, phrases], **_PRIVATE, **_UNLIMITED)
            page.unload(self.leave)
            gr.api(self.tokens, api_name="tokens", queue=False)
            gr.api(self.compare, api_name="compare", **_UNLIMITED)
        return page

    def _start(
        self, button: gr.Button, draw: Callable, inputs: list[Any], outputs: list[Any], controls: list[Any]
    ) -> None:
        """On a click, note the run at once, so that it can be stopped. Run it, and free the buttons in any case."""
        button.click(self.ask, None, controls[:-1], queue=False, **_PRIVATE).then(
            draw, inputs, outputs, **_PRIVATE, **_UNLIMITED
        ).then(self.rest, None, controls, queue=False, **_PRIVATE)

    def _keep_prompt(self, page: gr.Blocks, prompt: gr.Textbox) -> None:
        """Keep what was typed in the visitor's browser, so that it is there after a reload."""
        name = f"finelip-sdxl-prompt-{self.comparison.sources.get('base', '')}"
        # A fixed secret, since one that is new at each start would lose the text. It is the visitor's own text.
        kept = gr.BrowserState(None, storage_key=name, secret=name)
        prompt.change(None, prompt, kept, js="(prompt) => prompt", **_PRIVATE)
        page.load(None, [kept, prompt], prompt, js="(kept, first) => kept ?? first", **_PRIVATE)

    def _build_columns(self) -> tuple[list[Any], list[Any]]:
        boxes, outputs = [], []
        with gr.Row(equal_height=False, elem_id="columns"):
            for column, title in COLUMNS.items():
                with gr.Column(
                    min_width=200, elem_id=f"column-{column}", elem_classes=["column", "drawn", f"meter-{column}"]
                ) as box:
                    title_line = gr.HTML(heading(column))
                    picture = gr.Image(
                        format="png",
                        show_label=False,
                        buttons=["fullscreen"],
                        interactive=False,
                        alt_text=f"Picture by {title}",
                        height=PICTURE_HEIGHT,
                        elem_classes="picture",
                    )
                    status = gr.HTML(status_line("not drawn yet"))
                    judged = gr.HTML()
                    download = gr.DownloadButton("Download PNG", size="sm", interactive=False)
                boxes.append(box)
                outputs += [title_line, picture, status, download, judged]
        return boxes, outputs

    def _build_options(
        self, prompt: gr.Textbox, seed: gr.Number
    ) -> tuple[list[Any], gr.CheckboxGroup, gr.UploadButton]:
        width, height = self.comparison.size
        has_adapter = self.comparison.pipe.conditioning_adapter is not None
        with gr.Accordion("Advanced", open=False, elem_id="advanced"):
            negative_prompt = gr.Textbox(
                "",
                label="Negative prompt",
                lines=1,
                max_lines=4,
                elem_id="negative-prompt",
            )
            columns = gr.CheckboxGroup(
                [(title, column) for column, title in COLUMNS.items()], value=list(COLUMNS), label="Columns"
            )
            with gr.Row():
                least = MIN_REFINED_STEPS if "refiner" in self.comparison.sources else 1
                steps = gr.Slider(least, MAX_STEPS, self.defaults.steps, step=1, label="Steps", elem_id="steps")
                guidance_scale = gr.Slider(0, 20, self.defaults.guidance_scale, step=0.5, label="Guidance scale")
            with gr.Row():
                sides = [
                    gr.Slider(MIN_SIDE, self.max_side, side, step=side_factor(self.comparison.pipe), label=label)
                    for label, side in (("Width", width), ("Height", height))
                ]
            with gr.Row():
                weighting = gr.Radio(
                    [("none", "none"), ("compel: (fox)1.2, fox++", "compel"), ("A1111: (fox:1.2)", "a1111")],
                    value=self.comparison.pipe.weighting or "none",
                    label="Weights in the prompt",
                    info="In FineLIP-SDXL's column. compel's column always takes its own; stock has none.",
                    elem_id="weighting",
                )
                emphasis = gr.Dropdown(
                    [
                        ("compel", "compel"),
                        ("A1111", "a1111"),
                        ("A1111, mean not restored", "a1111_no_norm"),
                        ("ComfyUI", "comfyui"),
                    ],
                    value=self.comparison.pipe.emphasis,
                    label="Effect of weights",
                    info="In FineLIP-SDXL's column: as this tool computes it",
                    elem_id="emphasis",
                )
                hidden_states = gr.Radio(
                    list(HIDDEN_STATES),
                    value=self.comparison.pipe.hidden_states,
                    label="Hidden states",
                    info="In FineLIP-SDXL's column" + ("; last switches the adapter off" if has_adapter else ""),
                    elem_id="hidden-states",
                )
            adapter_scale = gr.Slider(
                0,
                1,
                1 if has_adapter else 0,
                step=0.05,
                label="Conditioning adapter",
                info="Its share in FineLIP-SDXL's column",
                interactive=has_adapter,
                elem_id="adapter",
            )
            upload = gr.UploadButton("Load settings from a PNG", file_types=[".png"], size="sm", elem_id="load")
        fields = [
            prompt,
            negative_prompt,
            steps,
            guidance_scale,
            *sides,
            adapter_scale,
            hidden_states,
            weighting,
            emphasis,
            seed,
        ]
        return fields, columns, upload

    def _build_grid(self) -> tuple[gr.Button, gr.Button, gr.Slider, list[Any]]:
        with gr.Accordion("Many seeds", open=False, elem_id="many-seeds", elem_classes="drawn"):
            with gr.Row():
                seeds = gr.Slider(
                    1,
                    MAX_SEEDS,
                    4,
                    step=1,
                    label="Number of seeds",
                    info="The first is the seed beside Draw; the others follow it.",
                    scale=2,
                    elem_id="seeds",
                )
                draw = gr.Button(DRAW_ALL, variant="primary", scale=2, elem_id="draw-grid")
                stop = gr.Button("Stop", variant="stop", scale=1, interactive=False, elem_id="stop-grid")
            status = gr.HTML(status_line("every column, from each seed, in one picture"), elem_classes="meter-finelip")
            grid = gr.Image(
                format="png",
                show_label=False,
                buttons=["fullscreen"],
                interactive=False,
                alt_text="All pictures",
                elem_classes="picture",
            )
            download = gr.DownloadButton("Download PNG", size="sm", interactive=False, elem_id="download-grid")
        return draw, stop, seeds, [grid, status, download]

    def _build_notes(self) -> None:
        gr.HTML(sources_line(self.comparison.sources), elem_id="sources")
        if self.comparison.is_miniature:
            gr.Markdown(ABOUT_MINIATURE, elem_id="about-miniature")

    # Planning

    def render_meter(self, prompt: str, weighting: str, request: gr.Request) -> str:
        """The meter without compel, at once."""
        self.visitors.types(_session(request), f"{weighting} {prompt}")
        return self._meter(prompt, weighting, pending=("compel",))

    def render_whole_meter(self, prompt: str, weighting: str, request: gr.Request) -> Any:
        """The meter with compel, unless other text was typed meanwhile."""
        whole = self._meter(prompt, weighting)
        return gr.skip() if self.visitors.typed_since(_session(request), f"{weighting} {prompt}") else whole

    def _meter(self, prompt: str | None, weighting: str | None = None, pending: tuple[str, ...] = ()) -> str:
        prompt = prompt or ""
        if len(prompt) > MAX_CHARACTERS:
            return _hint(_too_long(prompt))
        plans, trouble = {}, ""
        for column in (column for column in COLUMNS if column not in pending):
            try:
                plans |= self.comparison.plan_for_reader(prompt, [column], weighting)
            except ValueError as error:  # such as unfinished brackets, which compel cannot parse
                trouble += _hint(str(error))
        foreign = self.comparison.is_miniature and not is_of_world(prompt)
        note = unknown(prompt, f"python demo/app.py --base {REAL_SDXL}") if foreign else ""
        return meter.render_meter(prompt, plans, COLUMNS, pending, note) + trouble

    def tokens(self, prompt: str) -> dict[str, Any]:
        """The plan of a prompt in each column: the windows, as texts and in tokens, and the cut text."""
        with _answered("Not planned"):
            _check_text("prompt", prompt)
            return {
                column: {
                    "windows": [{"text": window.text, "tokens": len(window.token_ids)} for window in plan.windows],
                    "cut_text": plan.cut_text,
                    "cut_tokens": plan.cut_tokens,
                    "counted_in": plan.vocabulary,
                }
                for column, plan in self.comparison.plan_for_reader(prompt).items()
            }

    # Settings

    def settings(self, values: Sequence[Any]) -> Settings:
        """The settings in the page's fields, or in a call of the API, checked.

        Raises:
            ValueError, TypeError: a setting is missing, out of range, or of another type.
        """
        named = dict(zip(FIELDS, values, strict=True))
        for name in ("prompt", "negative_prompt"):
            _check_text(name, named[name])
        if not named["prompt"].strip():
            raise ValueError("The prompt is empty: write one, or click on an example.")
        for name, least, most in (("steps", 1, MAX_STEPS), ("seed", 0, MAX_SEED)):
            named[name] = _whole(named[name])
            check_number(name, named[name], least, most, whole=True)
        for name in ("width", "height"):
            named[name] = _whole(named[name])
            check_number(name, named[name], MIN_SIDE, self.max_side, whole=True)
        settings = Settings(**named)
        settings.check_size(side_factor(self.comparison.pipe))
        return settings

    def load_settings(self, file: str) -> list[Any]:
        """The page's fields from the parameters in a PNG. The uploaded file is deleted."""
        with _answered("Not loaded"):
            try:
                settings = Settings.from_parameters(read_parameters(file))
            finally:
                with suppress(OSError):
                    Path(file).unlink()
        values = [getattr(settings, name) for name in FIELDS]
        # A value out of the page's bounds is shown now, and refused when it is to be drawn.
        gr.Info(f"Loaded from the picture: prompt, seed {settings.seed}, {settings.steps} steps.")
        return [*(gr.skip() if value is None else value for value in values), True]

    # Buttons

    def ask(self, request: gr.Request) -> list[Any]:
        """Note a run, and return the buttons of a visitor for whom something runs."""
        self.visitors.ask(_session(request))
        draw, stop = gr.update(value="Drawing…", interactive=False), gr.update(interactive=True)
        return [draw, stop, draw, stop]

    def rest(self) -> list[Any]:
        """The buttons and the bar of a visitor for whom nothing runs."""
        stop = gr.update(interactive=False)
        return [gr.update(value=DRAW, interactive=True), stop, gr.update(value=DRAW_ALL, interactive=True), stop, ""]

    def stop(self, request: gr.Request) -> None:
        self.visitors.stop(_session(request))

    def leave(self, request: gr.Request) -> None:
        self.visitors.leave(_session(request))
        self._delete_pictures(request)

    def show_columns(self, columns: list[str]) -> list[Any]:
        return [gr.update(visible=column in columns) for column in COLUMNS]

    # Drawing

    def open(self, request: gr.Request) -> Iterator[list[Any]]:
        """The pictures of the first example, which a page opens with. The first visitor sees them being drawn."""
        if not self.comparison.is_miniature and self.comparison.pipe._execution_device.type == "cpu":
            return  # they would take minutes
        if not self._opening:
            waits = [gr.skip()] * (OUTPUTS * len(COLUMNS) + 1)
            waits[2::OUTPUTS] = [status_line("the first example is being drawn")] * len(COLUMNS)
            yield waits
        with _answered():
            pictures = self._draw_opening()
            if not self.visitors.is_busy(_session(request)):
                described = self._describe(self.defaults.prompt)
                flag = threading.Event()  # nothing runs that could be stopped
                shown = [part for picture in pictures for part in self._show(picture, described, request, flag)]
                yield [*shown, _render_phrases(pictures)]

    def _draw_opening(self) -> list[Picture]:
        with self._opening_lock:
            if not self._opening:
                with self.line.join(self._work(self.defaults) * len(COLUMNS)) as place:
                    for _ in place.wait(threading.Event()):
                        pass
                    drawn = [
                        event
                        for column in COLUMNS
                        for event in self._follow(column, self.defaults, threading.Event(), place, traced=True)
                    ]
                self._opening = [event for event in drawn if isinstance(event, Picture)]
            return self._opening

    def draw_columns(self, request: gr.Request, *values: Any) -> Iterator[list[Any]]:
        """Draw the columns one after the other, and yield the page's outputs at every step."""
        with _answered(), self.visitors.running(_session(request)) as flag:
            *values, keeps_seed, columns = values
            settings = self.settings(_with_seed(values, keeps_seed))
            columns = self._check_columns(columns, settings)
            described = self._describe(settings.prompt)
            self._delete_pictures(request)  # which the page shows no longer
            shown: list[Any] = [settings.seed]
            for column in COLUMNS:
                waits = "waits" if column in columns else "left out"
                shown += [heading(column), None, status_line(waits), gr.update(value=None, interactive=False), ""]
            yield [*shown, "", gr.update(value="Drawing…"), ""]
            unchanged: list[Any] = [gr.skip()] * (len(shown) + 3)
            finished: list[Picture] = []
            try:
                with self.line.join(self._work(settings) * len(columns)) as place:
                    for waiting in place.wait(flag):
                        yield [*unchanged[:-2], gr.update(value=_waiting(waiting)), ""]
                    for drawn, column in enumerate(column for column in COLUMNS if column in columns):
                        first = 1 + OUTPUTS * list(COLUMNS).index(column)
                        for event in self._follow(column, settings, flag, place, traced=True):
                            shown = [*unchanged]
                            if isinstance(event, Progress):
                                done = (drawn + event.step / event.steps) / len(columns)
                                text = f"Drawing… step {event.step} of {event.steps}"
                                if len(columns) > 1:
                                    text += f", picture {drawn + 1} of {len(columns)}"
                                shown[-2:] = gr.update(value=text), bar(text, done)
                                shown[first + 2] = _steps_done(event)
                            else:
                                shown[first : first + OUTPUTS] = self._show(event, described, request, flag)
                                finished.append(event)
                                shown[-3] = _render_phrases(finished)
                            yield shown
            except Exception as error:
                stopped = isinstance(error, Stopped)
                shown = [*unchanged]
                for number, name in enumerate(COLUMNS):
                    if name in columns and not any(picture.column == name for picture in finished):
                        shown[1 + OUTPUTS * number + 2] = status_line("stopped" if stopped else "not drawn")
                yield shown
                if stopped:
                    return
                raise

    def _show(
        self,
        drawn: Picture,
        described: tuple[DescribedObject, ...] | None,
        request: gr.Request,
        flag: threading.Event,
    ) -> tuple[Any, ...]:
        """The outputs of a drawn column."""
        steps = drawn.settings.steps
        done = f"{steps} step{'s' if steps > 1 else ''} in {drawn.seconds:.1f} s, seed {drawn.settings.seed}"
        picture, share, details = scoring_view.judge(drawn.image, described)
        file = self._save_picture(drawn, request, flag)
        status = status_line(done, prompt=drawn.settings.prompt)
        return heading(drawn.column, share), picture, status, _file_to_download(file), details

    def show_phrase(self, data: gr.EventData, request: gr.Request) -> list[Any]:
        """The columns' pictures with the overlay of a phrase, or, for none, whole as they were drawn."""
        with _answered("Not shown"):
            number, text = _asked(data._data)
            folder = self._folder_of(request)
            kept = {column: folder / f"{MAPS}{column}.png" for column in COLUMNS}
            about = {column: read_parameters(file) for column, file in kept.items() if file.exists()}
            rows = phrases_view.match({column: found["phrases"] for column, found in about.items()})
            is_here = number is None or (number < len(rows) and phrases_view.letters(rows[number].text) == text)
            if not about or not is_here:
                raise ValueError("The pictures of this phrase are here no longer: draw the prompt again.")
            shown: list[Any] = []
            for column in COLUMNS:
                if column not in about:
                    shown.append(gr.skip())
                    continue
                with Image.open(folder / about[column]["picture"]) as image:
                    picture = image.convert("RGB")
                described = self._describe(about[column]["prompt"])
                place = None if number is None else rows[number].numbers.get(column)
                if place is None:
                    shown.append(scoring_view.judge(picture, described)[0])
                    continue
                whole = scoring_view.judge(picture, None if described is None else ())[0]
                with Image.open(kept[column]) as tiles:
                    shown.append(phrases_view.overlay_phrase(whole, tiles, place, len(about[column]["phrases"])))
            return shown

    def draw_grid(self, request: gr.Request, *values: Any) -> Iterator[list[Any]]:
        """Draw every column from each seed, then put all pictures into one."""
        with _answered(), self.visitors.running(_session(request)) as flag:
            *values, keeps_seed, columns, seeds = values
            settings = self.settings(_with_seed(values, keeps_seed))
            columns = self._check_columns(columns, settings)
            seeds = _whole(seeds)
            check_number("seeds", seeds, 1, MAX_SEEDS, whole=True)
            rows = settings.over_seeds(seeds)
            skip = gr.skip()
            nothing = gr.update(value=None, interactive=False)
            yield [settings.seed, None, status_line("waits"), nothing, gr.update(value="Drawing…")]
            total, pictures = len(rows) * len(columns), list[Picture]()
            try:
                with self.line.join(self._work(settings) * total) as place:
                    for waiting in place.wait(flag):
                        yield [skip, skip, skip, skip, gr.update(value=_waiting(waiting))]
                    for drawn, column in product(rows, [column for column in COLUMNS if column in columns]):
                        number = f"picture {len(pictures) + 1} of {total}"
                        for event in self._follow(column, drawn, flag, place):
                            if isinstance(event, Progress):
                                done = (len(pictures) + event.step / event.steps) / total
                                status = status_line(f"{number}: {COLUMNS[column]}, seed {drawn.seed}", done)
                                yield [skip, skip, status, skip, gr.update(value=f"Drawing… {number}")]
                            else:
                                pictures.append(event)
            except Exception as error:
                stopped = isinstance(error, Stopped)
                yield [skip, skip, status_line("stopped" if stopped else "not drawn"), skip, skip]
                if stopped:
                    return
                raise
            grid = label_pictures(pictures, self._describe(settings.prompt) or ())
            parameters = pictures[0].parameters | {"column": columns, "seeds": [row.seed for row in rows]}
            file = self._save("finelip-sdxl-grid.png", grid, parameters, request, flag)
            status = status_line(f"{total} pictures", prompt=settings.prompt)
            yield [skip, grid, status, _file_to_download(file), skip]

    def compare(
        self,
        prompt: str,
        request: gr.Request,
        columns: list[str] = list(COLUMNS),  # noqa: B006  (Gradio shows it to callers)
        negative_prompt: str = "",
        steps: int | None = None,
        guidance_scale: float | None = None,
        width: int = 0,
        height: int = 0,
        conditioning_adapter_scale: float = 1.0,
        hidden_states: str | None = None,
        seed: int = 0,
        weighting: str | None = None,
        emphasis: str | None = None,
    ) -> Iterator[list[gr.FileData]]:
        """PNG files of the columns in their order, each with its parameters inside. Without steps and guidance scale
        the model's own are taken, and for a width or height of 0, too. Each step yields the files so far; between steps
        a call can be canceled."""
        with _answered(), self.visitors.running(_session(request)) as flag:
            own_width, own_height = self.comparison.size
            size = [
                own if type(side) is int and side == 0 else side
                for side, own in ((width, own_width), (height, own_height))
            ]
            values = (
                prompt,
                negative_prompt,
                self.defaults.steps if steps is None else steps,
                self.defaults.guidance_scale if guidance_scale is None else guidance_scale,
                *size,
                conditioning_adapter_scale,
                hidden_states,
                weighting,
                emphasis,
                seed,
            )
            settings = self.settings(values)
            columns = self._check_columns(columns, settings)
            files: list[gr.FileData] = []
            with self.line.join(self._work(settings) * len(columns)) as place:
                for _ in place.wait(flag):
                    yield files
                for column in columns:
                    for event in self._follow(column, settings, flag, place):
                        if isinstance(event, Picture):
                            files.append(gr.FileData(path=str(self._save_picture(event, request, flag))))
                        yield files

    def _follow(
        self, column: str, settings: Settings, flag: threading.Event, place: Place, traced: bool = False
    ) -> Iterator[Progress | Picture]:
        options: dict[str, Any] = {"traced": True} if traced else {}
        for event in follow(lambda on_step: self.comparison.draw(column, settings, on_step, **options), flag):
            if isinstance(event, Progress):
                place.advance(self._work(settings) / event.steps)
            yield event

    def _work(self, settings: Settings) -> float:
        """The work of a picture: its pixels in all steps."""
        width, height = self.comparison.size
        return settings.steps * (settings.width or width) * (settings.height or height)

    def _check_columns(self, columns: Any, settings: Settings) -> list[str]:
        """Check, before the first is drawn, that there are columns, and that each can plan the texts."""
        if columns is None or columns == []:
            raise ValueError("No column is chosen: choose at least one under Advanced.")
        columns = check_columns(columns)
        for text in (settings.prompt, settings.negative_prompt):
            self.comparison.plan(text, columns, settings.weighting, settings.emphasis)
        return columns

    def _describe(self, prompt: str) -> tuple[DescribedObject, ...] | None:
        return parse_description(prompt) if self.comparison.is_miniature else None

    # Files

    def _save_picture(self, picture: Picture, request: gr.Request, flag: threading.Event) -> Path:
        """The picture's file; the maps of its phrases lie beside it."""
        name = f"finelip-sdxl-{picture.column}-{picture.settings.seed}.png"
        phrases = phrases_view.list_phrases(picture.trace)
        if picture.trace is not None and phrases:
            about = {**picture.parameters, "phrases": [phrase.text for phrase in phrases], "picture": name}
            tiles = phrases_view.tile_maps(picture.trace, phrases, picture.image.size)
            self._save(f"{MAPS}{picture.column}.png", tiles, about, request, flag)
        return self._save(name, picture.image, picture.parameters, request, flag)

    def _delete_pictures(self, request: gr.Request) -> None:
        shutil.rmtree(self._folder_of(request), ignore_errors=True)

    def _save(
        self, name: str, image: Image.Image, parameters: dict[str, Any], request: gr.Request, flag: threading.Event
    ) -> Path:
        for folder in self.folder.glob("*"):
            with suppress(OSError):  # other visitors come and go meanwhile
                if time.time() - folder.stat().st_mtime > KEPT_SECONDS:
                    shutil.rmtree(folder)
        folder = self._folder_of(request)
        folder.mkdir(parents=True, exist_ok=True)
        save_png(image, folder / name, parameters)
        if flag.is_set():  # the page was perhaps closed, and its folder deleted, while this was written
            (folder / name).unlink(missing_ok=True)
            raise Stopped
        return folder / name

    def _folder_of(self, request: gr.Request) -> Path:
        # The browser chooses a session's name. Its digest is the name of one folder, and of nobody else's.
        return self.folder / hashlib.sha256(_session(request).encode("utf-8", "replace")).hexdigest()[:32]


def _session(request: gr.Request) -> str:
    """A visitor's name. A visitor without one gets a new name at each call."""
    return request.session_hash if isinstance(request.session_hash, str) else secrets.token_hex(16)


def _read_examples(folder: Path) -> dict[str, str]:
    """Example prompts by their names on the page."""
    return {
        file.stem.replace("-", " ").capitalize(): file.read_text(encoding="utf-8").strip()
        for file in sorted(folder.glob("*.txt"))
    }


@contextmanager
def _answered(title: str = "Not drawn") -> Iterator[None]:
    """Turn every error into a message on the page, and for callers of the API.

    The page takes messages for HTML, and they hold text from outside, such as a file's name. So they are escaped here,
    the one place that makes messages.
    """
    try:
        yield
    except (ValueError, TypeError, MemoryError, Stopped) as error:
        # The visitor's mistake, so no traceback is printed.
        raise gr.Error(escape(str(error), quote=False), title=title, print_exception=False) from error
    except OSError as error:  # its text names files of this machine
        raise gr.Error(f"A file could not be written here: {error.strerror or 'unknown'}.", title=title) from error
    except Exception as error:
        text = escape(f"{type(error).__name__}: {error}", quote=False)
        raise gr.Error(f"This is a fault of the page; its log says more. {text}", title=title) from error


def _check_text(name: str, text: Any) -> None:
    if not isinstance(text, str):
        raise TypeError(f"`{name}` must be a text, but is {text!r:.60}.")
    if len(text) > MAX_CHARACTERS:
        raise ValueError(_too_long(text))


def _whole(number: Any) -> Any:
    """A float without a fraction as an integer: sliders and JSON know no difference."""
    return int(number) if isinstance(number, float) and number.is_integer() else number


def _waiting(waiting: Waiting) -> str:
    about = "" if waiting.seconds is None else f", about {max(1, round(waiting.seconds))} s"
    return f"Waiting… place {waiting.place} in line{about}"


def _too_long(text: str) -> str:
    return f"The text has {len(text):,} characters; at most {MAX_CHARACTERS:,} are allowed here: shorten it."


def _hint(sentence: str) -> str:
    return render("hint", sentence=sentence)


def _render_phrases(pictures: Sequence[Picture]) -> str:
    """The list of the phrases of pictures of one prompt; empty where none was traced."""
    if not any(picture.trace for picture in pictures):
        return ""
    drawn = {picture.column: phrases_view.list_phrases(picture.trace) for picture in pictures}
    return phrases_view.render_phrases(pictures[0].settings.prompt, drawn)


def _asked(data: Any) -> tuple[int | None, str | None]:
    """The number and the letters of the phrase that an event asks for; None for none."""
    asked = data if isinstance(data, dict) else {}
    number, text = _whole(asked.get("number")), asked.get("text")
    if number is None and text is None and "number" in asked:
        return None, None
    if type(number) is not int or number < 0 or not isinstance(text, str):
        raise ValueError(f"The phrase is {data!r:.60}; expected its number in the list and its text.")
    return number, phrases_view.letters(text)


def _with_seed(values: list[Any], keeps_seed: bool) -> tuple[Any, ...]:
    return (*values[:-1], values[-1] if keeps_seed else random.randrange(MAX_SEED))


def _steps_done(progress: Progress) -> str:
    return status_line(
        f"step {progress.step} of {progress.steps}, {progress.seconds:.1f} s", progress.step / progress.steps
    )


def _file_to_download(file: Path) -> Any:
    return gr.update(value=str(file), interactive=True)
