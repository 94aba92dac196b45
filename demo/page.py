"""The page: one prompt, encoded in three ways, drawn side by side."""

from __future__ import annotations

import hashlib
import random
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from demo import meter, scoring_view
from demo.progress import Progress, Stopped, Visitors, follow
from demo.rendering import render
from demo.theme import ABOUT_MINIATURE, INTRO, heading, sources_line, status_line
from finelip_sdxl.comparison.comparison import MIN_REFINED_STEPS, Comparison, Picture, label_pictures
from finelip_sdxl.comparison.settings import MAX_SEED, MIN_SIDE, Settings
from finelip_sdxl.images import read_parameters, save_png
from finelip_sdxl.miniature.notice import REAL_SDXL, unknown
from finelip_sdxl.miniature.parsing import DescribedObject, is_of_world, parse_description
from finelip_sdxl.options import COLUMNS, HIDDEN_STATES

EXAMPLES = Path(__file__).parent / "examples"
# Far more than three windows of 248 tokens. compel takes seconds for texts that are much longer.
MAX_CHARACTERS = 6000
MAX_STEPS = 100
MAX_SEEDS = 8
KEPT_SECONDS = 3600  # pictures of visitors who never announce that they leave, such as clients of the API
OUTPUTS = 5  # components of each column
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
    "seed",
)


def build_page(comparison: Comparison, folder: Path, max_side: int) -> gr.Blocks:
    """The Gradio page of a comparison.

    Args:
        comparison: the models that draw.
        folder: place of the pictures to download. A visitor's pictures are deleted when the page is closed.
        max_side: the largest width and height, in pixels.
    """
    return _Page(comparison, folder, max_side).build()


class _Page:
    def __init__(self, comparison: Comparison, folder: Path, max_side: int) -> None:
        self.comparison, self.folder = comparison, folder
        self.max_side = min(max_side, 4 * max(comparison.size))  # no SDXL draws larger ones well
        self.visitors = Visitors()
        self.examples = _read_examples(EXAMPLES / ("miniature" if comparison.is_miniature else "sdxl"))
        self.defaults = Settings(next(iter(self.examples.values()))).filled(comparison.recommended)

    # Layout

    def build(self) -> gr.Blocks:
        with gr.Blocks(title="FineLIP-SDXL", analytics_enabled=False, delete_cache=(600, 3600)) as page:
            gr.HTML(INTRO, elem_classes="intro")
            prompt = gr.Textbox(
                self.defaults.prompt,
                label="Prompt",
                placeholder="A long description",
                lines=3,
                max_lines=8,
                elem_id="prompt",
            )
            gr.Examples(
                [[text] for text in self.examples.values()],
                [prompt],
                example_labels=list(self.examples),
                label="Examples",
                elem_id="examples",
                api_visibility="private",
            )
            meter_html = gr.HTML(self._meter(self.defaults.prompt), elem_id="meter")
            fields, random_seed, columns, upload = self._build_options(prompt)
            with gr.Tabs():
                with gr.Tab("Compare"):
                    compared = self._build_columns(fields, random_seed, columns)
                with gr.Tab("Many seeds"):
                    self._build_grid(fields, random_seed, columns)
            self._build_notes()

            private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
            # compel's parser takes seconds for long texts: its part follows, and typing does not wait for it.
            soon: dict[str, Any] = {"queue": False, "trigger_mode": "always_last", **private}
            prompt.change(self.render_meter, prompt, meter_html, **soon).then(
                self.render_whole_meter, prompt, meter_html, **soon
            )
            upload.upload(self.load_settings, upload, [*fields, random_seed], **private)
            columns.change(self.show_columns, columns, compared, queue=False, **private)
            page.unload(self.leave)
            gr.api(self.tokens, api_name="tokens", queue=False)
            gr.api(self.compare, api_name="compare", **_ONE_AT_A_TIME)
        return page

    def _build_options(self, prompt: gr.Textbox) -> tuple[list[Any], gr.Checkbox, gr.CheckboxGroup, gr.UploadButton]:
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
                # Without bounds: Gradio would print a traceback where the settings have a sentence.
                seed = gr.Number(0, label="Seed", precision=0, elem_id="seed")
                random_seed = gr.Checkbox(False, label="Random seed", info="A new one for each run, shown in the box")
            with gr.Row():
                sides = [
                    gr.Slider(MIN_SIDE, self.max_side, side, step=8, label=label)
                    for label, side in (("Width", width), ("Height", height))
                ]
            with gr.Row():
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
                hidden_states = gr.Radio(
                    list(HIDDEN_STATES),
                    value=self.comparison.pipe.hidden_states,
                    label="Hidden states",
                    info="In FineLIP-SDXL's column" + ("; last switches the adapter off" if has_adapter else ""),
                    elem_id="hidden-states",
                )
            upload = gr.UploadButton("Load settings from a PNG", file_types=[".png"], size="sm", elem_id="load")
        fields = [prompt, negative_prompt, steps, guidance_scale, *sides, adapter_scale, hidden_states, seed]
        return fields, random_seed, columns, upload

    def _build_columns(self, fields: list[Any], random_seed: gr.Checkbox, columns: gr.CheckboxGroup) -> list[Any]:
        with gr.Row():
            draw = gr.Button("Draw", variant="primary", scale=3, elem_id="draw")
            stop = gr.Button("Stop", variant="stop", scale=1, elem_id="stop")
        boxes, outputs = [], []
        with gr.Row(equal_height=False):
            for column, title in COLUMNS.items():
                with gr.Column(
                    min_width=280, elem_id=f"column-{column}", elem_classes=["column", f"meter-{column}"]
                ) as box:
                    title_line = gr.HTML(heading(column))
                    picture = gr.Image(
                        format="png",
                        show_label=False,
                        buttons=["fullscreen"],
                        interactive=False,
                        alt_text=f"Picture by {title}",
                        height=360,
                        elem_classes="picture",
                    )
                    status = gr.HTML(status_line("not drawn yet"))
                    download = gr.DownloadButton("Download PNG", size="sm", interactive=False)
                    judged = gr.HTML()
                boxes.append(box)
                outputs += [title_line, picture, status, download, judged]
        _start(draw, self.ask, self.draw_columns, [*fields, random_seed, columns], [fields[-1], *outputs])
        stop.click(self.stop, queue=False, api_visibility="private")
        return boxes

    def _build_grid(self, fields: list[Any], random_seed: gr.Checkbox, columns: gr.CheckboxGroup) -> None:
        with gr.Row():
            seeds = gr.Slider(
                1, MAX_SEEDS, 4, step=1, label="Seeds, from the one under Advanced on", scale=2, elem_id="seeds"
            )
            draw = gr.Button("Draw all", variant="primary", scale=2, elem_id="draw-grid")
            stop = gr.Button("Stop", variant="stop", scale=1, elem_id="stop-grid")
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
        inputs = [*fields, random_seed, columns, seeds]
        _start(draw, self.ask, self.draw_grid, inputs, [fields[-1], grid, status, download])
        stop.click(self.stop, queue=False, api_visibility="private")

    def _build_notes(self) -> None:
        gr.HTML(sources_line(self.comparison.sources), elem_id="sources")
        if self.comparison.is_miniature:
            gr.Markdown(ABOUT_MINIATURE, padding=True, elem_id="about-miniature")

    # Planning

    def render_meter(self, prompt: str, request: gr.Request) -> str:
        """The meter without compel, at once."""
        self.visitors.types(_session(request), prompt)
        return self._meter(prompt, pending=("compel",))

    def render_whole_meter(self, prompt: str, request: gr.Request) -> Any:
        """The meter with compel, unless other text was typed meanwhile."""
        whole = self._meter(prompt)
        return gr.skip() if self.visitors.typed_since(_session(request), prompt) else whole

    def _meter(self, prompt: str | None, pending: tuple[str, ...] = ()) -> str:
        prompt = prompt or ""
        if len(prompt) > MAX_CHARACTERS:
            return _hint(_too_long(prompt))
        plans, trouble = {}, ""
        for column in (column for column in COLUMNS if column not in pending):
            try:
                plans |= self.comparison.plan_for_reader(prompt, [column])
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

    def settings(self, values: tuple[Any, ...]) -> Settings:
        """The settings in the page's fields, or in a call of the API, checked.

        Raises:
            ValueError, TypeError: a setting is missing, out of range, or of another type.
        """
        named = dict(zip(FIELDS, values, strict=True))
        for name in ("prompt", "negative_prompt"):
            named[name] = "" if named[name] is None else named[name]
            _check_text(name, named[name])
        if not named["prompt"].strip():
            raise ValueError("The prompt is empty: write one, or click on an example.")
        for name in ("steps", "seed", "width", "height"):
            if named[name] is None:
                raise ValueError(f"There is no {name}: enter a whole number.")
            named[name] = _whole(named[name])
        if any(isinstance(named[name], int) and named[name] > self.max_side for name in ("width", "height")):
            raise ValueError(f"Width and height are limited to {self.max_side} pixels here.")
        if isinstance(named["steps"], int) and named["steps"] > MAX_STEPS:
            raise ValueError(f"Steps are limited to {MAX_STEPS} here.")
        return Settings(**named)

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
        return [*(gr.skip() if value is None else value for value in values), False]

    # Drawing

    def ask(self, request: gr.Request) -> None:
        self.visitors.ask(_session(request))
        shutil.rmtree(self._folder_of(request), ignore_errors=True)  # of pictures that the page no longer shows

    def stop(self, request: gr.Request) -> None:
        self.visitors.stop(_session(request))

    def leave(self, request: gr.Request) -> None:
        self.visitors.leave(_session(request))
        shutil.rmtree(self._folder_of(request), ignore_errors=True)

    def show_columns(self, columns: list[str]) -> list[Any]:
        return [gr.update(visible=column in columns) for column in COLUMNS]

    def draw_columns(self, request: gr.Request, *values: Any) -> Iterator[list[Any]]:
        """Draw the columns one after the other, and yield the page's outputs at every step."""
        with _answered(), self.visitors.running(_session(request)) as flag:
            *values, is_random, columns = values
            settings = self.settings(_with_seed(values, is_random))
            self._check_columns(columns, settings)
            described = self._describe(settings.prompt)
            shown: list[Any] = [settings.seed]
            for column in COLUMNS:
                waits = "waits" if column in columns else "left out"
                shown += [heading(column), None, status_line(waits), gr.update(value=None, interactive=False), ""]
            yield shown
            for number, column in enumerate(COLUMNS):
                if column not in columns:
                    continue
                first = 1 + OUTPUTS * number
                try:
                    for event in self._follow(column, settings, flag):
                        shown = [gr.skip()] * len(shown)
                        if isinstance(event, Progress):
                            shown[first + 2] = _steps_done(event)
                        else:
                            shown[first : first + OUTPUTS] = self._show(event, described, request)
                        yield shown
                except Exception as error:
                    stopped = isinstance(error, Stopped)
                    shown = [gr.skip()] * len(shown)
                    for other, name in enumerate(COLUMNS):
                        if name in columns and other >= number:
                            shown[1 + OUTPUTS * other + 2] = status_line("stopped" if stopped else "not drawn")
                    yield shown
                    if stopped:
                        return
                    raise

    def _show(
        self, drawn: Picture, described: tuple[DescribedObject, ...] | None, request: gr.Request
    ) -> tuple[Any, ...]:
        """The outputs of a drawn column."""
        done = f"{drawn.settings.steps} steps in {drawn.seconds:.1f} s, seed {drawn.settings.seed}"
        picture, share, details = scoring_view.judge(drawn.image, described)
        file = self._save(drawn, request)
        return heading(drawn.column, share), picture, status_line(done), _file_to_download(file), details

    def draw_grid(self, request: gr.Request, *values: Any) -> Iterator[list[Any]]:
        """Draw every column from each seed, then put all pictures into one."""
        with _answered(), self.visitors.running(_session(request)) as flag:
            *values, is_random, columns, seeds = values
            settings = self.settings(_with_seed(values, is_random))
            self._check_columns(columns, settings)
            seeds = _whole(seeds)
            if isinstance(seeds, int) and seeds > MAX_SEEDS:
                raise ValueError(f"Seeds are limited to {MAX_SEEDS} here.")
            rows = settings.over_seeds(seeds)
            yield [settings.seed, None, status_line("waits"), gr.update(value=None, interactive=False)]
            total, pictures = len(rows) * len(columns), []
            try:
                for drawn in rows:
                    for column in (column for column in COLUMNS if column in columns):
                        for event in self._follow(column, drawn, flag):
                            if isinstance(event, Progress):
                                done = (len(pictures) + event.step / event.steps) / total
                                text = f"picture {len(pictures) + 1} of {total}: {COLUMNS[column]}, seed {drawn.seed}"
                                yield [gr.skip(), gr.skip(), status_line(text, done), gr.skip()]
                            else:
                                pictures.append(event)
            except Exception as error:
                stopped = isinstance(error, Stopped)
                yield [gr.skip(), gr.skip(), status_line("stopped" if stopped else "not drawn"), gr.skip()]
                if stopped:
                    return
                raise
            grid = label_pictures(pictures, self._describe(settings.prompt) or ())
            file = self._new_file(request, "finelip-sdxl-grid.png")
            save_png(grid, file, pictures[0].parameters | {"column": columns, "seeds": [row.seed for row in rows]})
            yield [gr.skip(), grid, status_line(f"{total} pictures"), _file_to_download(file)]

    def compare(
        self,
        prompt: str,
        request: gr.Request,
        columns: list[str] = list(COLUMNS),  # noqa: B006  (Gradio shows it to callers)
        negative_prompt: str = "",
        steps: int = 30,
        guidance_scale: float = 5.0,
        width: int = 0,
        height: int = 0,
        conditioning_adapter_scale: float = 1.0,
        hidden_states: str | None = None,
        seed: int = 0,
    ) -> Iterator[list[gr.FileData]]:
        """PNG files of the columns in their order, each with its parameters inside. A width or height of 0 is the
        model's own. Each step yields the files so far; between steps a call can be canceled."""
        with _answered(), self.visitors.running(_session(request)) as flag:
            own_width, own_height = self.comparison.size
            size = [
                own if type(side) is int and side == 0 else side
                for side, own in ((width, own_width), (height, own_height))
            ]
            values = (
                prompt,
                negative_prompt,
                steps,
                guidance_scale,
                *size,
                conditioning_adapter_scale,
                hidden_states,
                seed,
            )
            settings = self.settings(values)
            self._check_columns(columns, settings)
            files: list[gr.FileData] = []
            for column in columns:
                for event in self._follow(column, settings, flag):
                    if isinstance(event, Picture):
                        files.append(gr.FileData(path=str(self._save(event, request))))
                    yield files

    def _follow(self, column: str, settings: Settings, flag: threading.Event) -> Iterator[Progress | Picture]:
        return follow(lambda on_step: self.comparison.draw(column, settings, on_step), flag)

    def _check_columns(self, columns: list[str], settings: Settings) -> None:
        """Check, before the first is drawn, that there are columns, and that each can plan the texts."""
        if not columns:
            raise ValueError("No column is chosen: choose at least one under Advanced.")
        for text in (settings.prompt, settings.negative_prompt):
            self.comparison.plan(text, columns)

    def _describe(self, prompt: str) -> tuple[DescribedObject, ...] | None:
        return parse_description(prompt) if self.comparison.is_miniature else None

    # Files

    def _save(self, picture: Picture, request: gr.Request) -> Path:
        file = self._new_file(request, f"finelip-sdxl-{picture.column}-{picture.settings.seed}.png")
        save_png(picture.image, file, picture.parameters)
        return file

    def _new_file(self, request: gr.Request, name: str) -> Path:
        for folder in self.folder.glob("*"):
            with suppress(OSError):  # other visitors come and go meanwhile
                if time.time() - folder.stat().st_mtime > KEPT_SECONDS:
                    shutil.rmtree(folder)
        folder = self._folder_of(request)
        folder.mkdir(parents=True, exist_ok=True)
        return folder / name

    def _folder_of(self, request: gr.Request) -> Path:
        # The browser chooses a session's name. Its digest is the name of one folder, and of nobody else's.
        return self.folder / hashlib.sha256(_session(request).encode("utf-8", "replace")).hexdigest()[:32]


def _session(request: gr.Request) -> str:
    """A visitor's name. A visitor without one gets a new name at each call."""
    return request.session_hash if isinstance(request.session_hash, str) else secrets.token_hex(16)


# Drawing waits for its turn: there is one model, however many visitors.
_ONE_AT_A_TIME: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "drawing"}


def _start(button: gr.Button, ask: Callable, draw: Callable, inputs: list[Any], outputs: list[Any]) -> None:
    """On a click, note the run at once, so that it can be stopped while it waits. Then run it."""
    private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    button.click(ask, queue=False, **private).then(draw, inputs, outputs, **private, **_ONE_AT_A_TIME)


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


def _too_long(text: str) -> str:
    return f"The text has {len(text):,} characters; at most {MAX_CHARACTERS:,} are allowed here: shorten it."


def _hint(sentence: str) -> str:
    return render("hint", sentence=sentence)


def _with_seed(values: list[Any], is_random: bool) -> tuple[Any, ...]:
    return (*values[:-1], random.randrange(MAX_SEED) if is_random else values[-1])


def _steps_done(progress: Progress) -> str:
    return status_line(
        f"step {progress.step} of {progress.steps}, {progress.seconds:.1f} s", progress.step / progress.steps
    )


def _file_to_download(file: Path) -> Any:
    return gr.update(value=str(file), interactive=True)
