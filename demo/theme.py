"""How the page looks: theme, styles and the small pieces of HTML that its events write anew."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

import gradio as gr

from demo.rendering import read_style, render
from finelip_sdxl.options import COLUMNS

INTRO = """<h1>FineLIP-SDXL</h1>
<p>SDXL stops reading a prompt after 77 tokens. Here one prompt is read in three ways and drawn from the same noise by
the same UNet, so that whatever differs comes from what was read.</p>"""

ABOUT_MINIATURE = """This is the *miniature*, a small SDXL that comes with FineLIP-SDXL and draws scenes of nine
objects. It knows nothing but its own world: click on an example and change its places, shapes and colors. Because every
object is known, each is marked right or wrong in shape, color and place. With `--base` the same page runs any SDXL."""

ABOUT = {
    "stock": "reads 77 tokens, drops the rest",
    "compel": "reads windows of 77 tokens, each by itself",
    "finelip": "reads up to 248 tokens at once",
}

# What stands before the names of what draws.
SOURCES = {
    "base": "",
    "finelip": "FineLIP ",
    "finelip_2": "second FineLIP ",
    "conditioning_adapter": "adapter ",
    "refiner": "refiner ",
}

THEME = gr.themes.Soft(
    primary_hue="cyan", neutral_hue="slate", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
).set(  # Text has a contrast of at least 4.5 to what is behind it, and what can be pressed or filled in one of 3.
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

STYLE = "\n".join(map(read_style, ("meter", "verdict", "page")))


def heading(column: str, share: str = "") -> str:
    """A column's title, what it does and, once it is drawn, how much is right."""
    return render("heading", title=COLUMNS[column], share=share, about=ABOUT[column])


def sources_line(sources: Mapping[str, str]) -> str:
    """What draws, by the `sources` of a comparison.

    Example:
        >>> sources_line({"base": "sdxl-base", "finelip": "longclip", "dtype": "float16"})
        'Draws with sdxl-base, FineLIP longclip.'
    """
    named = [title + sources[name] for name, title in SOURCES.items() if name in sources]
    return escape(f"Draws with {', '.join(named)}.")


def status_line(text: str, done: float | None = None) -> str:
    """What a column is at, with a bar if it is under way; `done` is a share."""
    return render("status", text=text, percent=None if done is None else f"{100 * done:.0f}")
