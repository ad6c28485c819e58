"""The common style of all figures of plotly and matplotlib: colours, panels, scales and backgrounds."""

import html
import math
from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from depthscope.report.measures import LAYER_SCORES, Panel, shown_in

if TYPE_CHECKING:
    import plotly.graph_objects as go

BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
PALETTE = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
DASHES = ("solid", "dash", "dot", "dashdot")
TEXT_GREY = "#767b85"
GRID_GREY = "rgba(128, 128, 128, 0.22)"
TITLE_HEIGHT = 34
FONT = "system-ui, sans-serif"
HOVER = {"font": {"family": FONT, "size": 13}, "align": "left"}
SMALLEST_COST = 1e-4  # smaller loss increases are drawn at 0.01%, since a logarithmic axis has no zero
TINY = 1e-100  # treated as zero; its logarithm is still finite


def _panels(*scores: str) -> tuple[Panel, ...]:
    return tuple(panel for score in scores if (panel := LAYER_SCORES[score].panel) is not None)


PANELS = _panels(*shown_in("panel"))
(VARIANCE_PANEL,) = _panels("variance")


def is_wide(panel: Panel, values: Sequence[float | None]) -> bool:
    """Whether values need a logarithmic axis: for some panels always, for others if one value is far above the rest."""
    defined = [value for value in values if value is not None]
    if panel.cost or panel.log:
        return True
    return bool(defined) and min(defined) > 0 and max(defined) > 8 * median(defined)


def log_ticks(low: float, high: float) -> list[float]:
    """Choose about equally spaced ticks on a logarithmic axis between two positive values."""
    exponents = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    decades = math.log10(high) - math.log10(low)
    steps = (1, 2, 5) if decades < 2.2 else (1,)
    every = max(1, round(decades / 5))
    ticks = [step * 10.0**exponent for exponent in exponents if exponent % every == 0 for step in steps]
    return [tick for tick in ticks if low * 0.8 <= tick <= high * 1.25] or [float(f"{high:.2g}")]


def rounded(values: Sequence[float | None], digits: int = 6) -> list[float | None]:
    """Keep `digits` significant digits: more are not visible, and would double the size of a page."""
    return [None if value is None or not math.isfinite(value) else float(f"{value:.{digits}g}") for value in values]


def plotly_text(text: str) -> str:
    """Escape a text for plotly, which interprets markup, links and (in hover texts) %{...}, but not `&quot;`.

    Source: plotly.js, src/lib/svg_text_utils.js (the entities that it knows) and src/lib/index.js (hovertemplate).
    """
    return html.escape(text, quote=False).replace("%{", "%&#123;")


def capital(text: str) -> str:
    """The text with its first letter as a capital."""
    return text[:1].upper() + text[1:]


def finish(figure: "go.Figure", meaning: str, title: str | None = None, **layout: Any) -> None:
    """Give a plotly figure the common layout: fonts, grid, transparent background, and its explanation in `meta`.

    Args:
        figure: the figure.
        meaning: the explanation of how to read it.
        title: the title above it.
        layout: further arguments of plotly's `update_layout`.
    """
    import plotly.graph_objects as go

    if title is not None:
        top = {"y": 1, "yref": "container", "yanchor": "top", "pad": {"t": 12}}
        figure.update_layout(title={"text": title, "x": 0, "xref": "paper", **top}, title_font_size=17)
    figure.update_layout(
        template=go.layout.Template(),
        meta=meaning,
        paper_bgcolor="rgba(0, 0, 0, 0)",
        plot_bgcolor="rgba(0, 0, 0, 0)",
        font={"family": FONT, "size": 12, "color": TEXT_GREY},
        **layout,
    )
    figure.update_xaxes(gridcolor=GRID_GREY)
    figure.update_yaxes(gridcolor=GRID_GREY)
