"""HTML from the templates in `templates/`, with every value escaped; CSS from `styles/`; JavaScript from `scripts/`."""

import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from jinja2.ext import Extension


class _OneLine(Extension):
    """Takes out the line breaks and indents of a template, since some elements show white space."""

    def preprocess(self, source: str, name: str | None, filename: str | None = None) -> str:
        return re.sub(r"\n\s*", "", source)


_HERE = Path(__file__).parent
_TEMPLATES = Environment(
    loader=FileSystemLoader(_HERE / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    extensions=[_OneLine],
)


def render(name: str, **values: Any) -> str:
    """Fill a template.

    Args:
        name: its file in `templates/`, without `.html`.
        **values: its variables.

    Examples:
        >>> render("hint", sentence="a < b")
        '<div class="meter-hint">a &lt; b</div>'
    """
    return _TEMPLATES.get_template(f"{name}.html").render(values)


def read_style(name: str) -> str:
    """The CSS in a file of `styles/`, named without `.css`."""
    return (_HERE / "styles" / f"{name}.css").read_text(encoding="utf-8")


def read_script(name: str) -> str:
    """The JavaScript in a file of `scripts/`, named without `.js`."""
    return (_HERE / "scripts" / f"{name}.js").read_text(encoding="utf-8")
