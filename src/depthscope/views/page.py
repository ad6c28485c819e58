"""The common part of all HTML pages: one file without network requests, with two scripts.

The page contains plotly.js, style and script, and its content security policy forbids every request and every other
script. Texts come from strangers, so the templates escape them and the figures' JSON cannot close its script element.
The same content gives the same bytes.
"""

import base64
import hashlib
import json
import re
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from depthscope.report.measures import format_score
from depthscope.views.plots.style import TITLE_HEIGHT
from depthscope.views.templates import templates
from depthscope.wording.numbers import format_number, format_with_error

__all__ = ["framed", "render"]


def render(template: str, drawn: dict[str, Any], **content: Any) -> str:
    """Render a page.

    Args:
        template: the name of its file in `templates/`.
        drawn: its figures by the ids of their elements, as returned by `framed`.
        content: the variables of the template.
    """
    plotly_js, script = _plotly_script(), _source("report.js")
    return (
        _environment()
        .get_template(template)
        .render(
            **content,
            style=Markup(_source("report.css")),
            plotly_js=Markup(plotly_js),
            script=Markup(script),
            script_hashes=[_script_hash(plotly_js), _script_hash(script)],
            figures=_embedded(drawn),
        )
    )


def framed(figure: Any, *, square: bool = False) -> tuple[str, int, dict[str, Any]]:
    """Split a plotly figure into title, height and content; the page shows the title, so that it can wrap.

    Args:
        figure: a figure with a title.
        square: whether the style sheet keeps the figure square, so that it has no fixed height.
    """
    content = figure.to_plotly_json()
    layout = dict(content["layout"])
    title = layout.pop("title")["text"]
    layout["margin"] = {**layout["margin"], "t": layout["margin"]["t"] - TITLE_HEIGHT}
    height = int(layout.pop("height")) - TITLE_HEIGHT
    if not square:
        layout["height"] = height
    return title, height, {"data": content["data"], "layout": layout}


def _embedded(content: Any) -> Markup:
    """Encode JSON for a script element, so that nothing in it can close the element or break a line."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


@cache
def _plotly_script() -> str:
    """Plotly's own script, made safe for an HTML page."""
    return re.sub(r"</(script)", r"<\\/\1", get_plotlyjs(), flags=re.IGNORECASE)


def _source(name: str) -> str:
    """Read a file from the folder of the templates that goes into the page unchanged."""
    return (files("depthscope") / "templates" / name).read_text(encoding="utf-8")


def _script_hash(script: str) -> str:
    """The hash of a script in the form of a content security policy."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


@cache
def _environment() -> Environment:
    """The templates with their filters."""
    environment = templates(autoescape=True)
    environment.filters["number"] = format_number
    environment.filters["value"] = _as_text
    environment.globals["format_score"] = format_score
    environment.globals["format_with_error"] = format_with_error
    return environment


def _as_text(value: object) -> str:
    """Write a fact or a setting as text."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return ", ".join(_as_text(item) for item in value)
    return str(value)
