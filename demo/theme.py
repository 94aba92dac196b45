"""The look of the page: theme, styles and the small pieces of HTML that its events replace."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

import gradio as gr

from demo.rendering import read_script, read_style, render
from finelip_sdxl.options import COLUMNS

DRAW, DRAW_ALL = "Draw", "Draw all"

ABOUT_MINIATURE = """This is the *miniature*, a small SDXL that comes with FineLIP-SDXL and draws scenes of nine
objects. It knows nothing but its own world: click on an example and change its places, shapes and colors. Because every
object is known, each is marked right or wrong in shape, color and place. With `--base` the same page runs any SDXL."""

ABOUT = {
    "stock": "encodes 77 tokens, leaves out the rest",
    "compel": "encodes windows of 77 tokens, each by itself",
    "finelip": "encodes up to 248 tokens at once",
}

# Titles of the parts that draw.
SOURCES = {
    "base": "Model",
    "finelip": "FineLIP",
    "finelip_2": "second FineLIP",
    "conditioning_adapter": "adapter",
    "refiner": "refiner",
}

THEME = gr.themes.Soft(
    primary_hue="cyan", neutral_hue="slate", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
).set(  # Text has a contrast of at least 4.5 to its background, and controls a contrast of at least 3.
    body_text_color_subdued="*neutral_600",
    block_title_text_color="*body_text_color",
    block_title_background_fill="none",
    block_title_padding="0",
    input_border_width="1px",
    input_border_color="*neutral_500",
    input_border_color_dark="*neutral_500",
    input_placeholder_color="*neutral_500",
    input_placeholder_color_dark="*neutral_300",
    checkbox_border_color="*neutral_500",
    checkbox_border_color_dark="*neutral_300",
    checkbox_border_color_hover="*neutral_600",
    checkbox_border_color_hover_dark="*neutral_300",
    checkbox_border_color_focus="*primary_700",
    checkbox_border_color_focus_dark="*primary_300",
    checkbox_border_color_selected="white",
    checkbox_border_color_selected_dark="white",
    checkbox_background_color_selected="*primary_700",
    checkbox_background_color_selected_dark="*primary_700",
    checkbox_label_border_color="*neutral_500",
    checkbox_label_border_color_dark="*neutral_500",
    checkbox_label_background_fill_selected="*primary_700",
    checkbox_label_background_fill_selected_dark="*primary_700",
    slider_color="*primary_700",
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_dark="*primary_700",
    button_primary_background_fill_hover_dark="*primary_800",
    button_primary_border_color="*primary_700",
    button_primary_border_color_dark="*primary_600",
    button_secondary_border_color="*neutral_500",
    button_secondary_border_color_hover="*neutral_500",
    button_secondary_border_color_dark="*neutral_500",
    button_secondary_background_fill_hover_dark="*neutral_700",
)

SCRIPT, PHRASES_SCRIPT = read_script("page"), read_script("phrases")
STYLE = "\n".join(map(read_style, ("meter", "verdict", "phrases", "page")))


def intro(is_miniature: bool) -> str:
    """What the page shows, in a few sentences."""
    return render("intro", is_miniature=is_miniature)


def heading(column: str, share: str = "") -> str:
    """A column's title, its way of encoding and, once it is drawn, its share of right objects."""
    return render("heading", title=COLUMNS[column], share=share, about=ABOUT[column])


def sources_line(sources: Mapping[str, str]) -> str:
    """The names of the parts that draw, from the `sources` of a comparison.

    Examples:
        >>> sources_line({"base": "sdxl-base", "finelip": "longclip", "dtype": "float16"})
        'Model: sdxl-base · FineLIP: longclip'
    """
    return escape(" · ".join(f"{title}: {sources[name]}" for name, title in SOURCES.items() if name in sources))


def status_line(text: str, done: float | None = None, prompt: str | None = None) -> str:
    """The state of a column.

    Args:
        text: a few words.
        done: for a column under way, its share that is done, shown as a bar.
        prompt: for a drawn column, its prompt; the page marks the picture once another is written.
    """
    return render("status", text=text, percent=None if done is None else f"{100 * done:.0f}", prompt=prompt)


def bar(text: str, done: float) -> str:
    """A bar at the button, for a share that is done."""
    return render("bar", text=text, percent=f"{100 * done:.0f}")
