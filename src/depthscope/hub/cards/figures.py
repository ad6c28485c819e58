"""The figures of a model card as PNG, drawn by matplotlib: plotly would need a browser, which servers lack.

    variance_by_layer           variance of the residual stream, and of the outputs of attention and MLP
    effectiveness_by_layer      the contribution of each layer, one panel per score, with bands of one standard error
    learning_curve              loss over training, and the variance per layer

Layers count from 0. The same model before training is drawn in grey. The background is white, also on a dark page, and
a figure contains no text of a record. The same record and version of matplotlib give the same bytes.
"""

import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from depthscope.errors import DepthscopeError
from depthscope.files.atomic import write_atomically
from depthscope.hub.cards.data import DepthCardData, LossCurve, VarianceCurves
from depthscope.report.report import LayerReport
from depthscope.views.plots.style import (
    BLUE,
    GREEN,
    PALETTE,
    PANELS,
    SMALLEST_COST,
    TINY,
    VERMILION,
    is_wide,
    log_ticks,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["FOLDER", "draw", "figure_names", "write_figures"]

FOLDER = "figures"  # in the repository of the model
RESOLUTION = 150  # dots an inch
COLORS = 96  # of a figure; enough for its lines and their edges, at a third of the size
CONTROL = "#9a9a9a"
GRID = "#e3e3e3"
TEXT = "#333333"
MOST_MARKED = 48  # layers; more markers would overlap
FEW_LAYERS = 12  # up to here every layer has a tick
SPLITS = ("held-out", "evaluation")
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.edgecolor": "#b0b0b0",
    "axes.labelcolor": TEXT,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "text.color": TEXT,
    "lines.linewidth": 1.5,
    "lines.markersize": 3.5,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


def figure_names(data: DepthCardData) -> list[str]:
    """The figures that the record has data for, in the order of the card."""
    report = data.report
    available = {
        "variance_by_layer": report is not None and report.has("variance"),
        "effectiveness_by_layer": report is not None and any(report.has(panel.score) for panel in PANELS),
        "learning_curve": data.losses is not None or data.variances is not None,
    }
    return [name for name in FIGURES if available[name]]


def write_figures(folder: str | os.PathLike[str], data: DepthCardData, within: str = FOLDER) -> list[Path]:
    """Draw the figures that the card of a record shows.

    Args:
        folder: the folder of the card.
        data: the record of the model.
        within: the subfolder of the figures, as the card names it.

    Returns:
        The files, in the order of the card.

    Raises:
        DepthscopeError: matplotlib is not installed.
        ReportError: a file cannot be written.
    """
    names = figure_names(data)
    target = Path(folder) / within
    if names:
        target.mkdir(parents=True, exist_ok=True)
    return [write_atomically(target / f"{name}.png", draw(name, data)) for name in names]


def draw(name: str, data: DepthCardData) -> bytes:
    """Draw the figure of this name as PNG.

    Raises:
        DepthscopeError: matplotlib is not installed.
    """
    try:
        from matplotlib import style
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from PIL import Image  # which matplotlib needs too
    except ImportError as error:
        raise DepthscopeError(
            "The figures of a model card are drawn by matplotlib, which is not installed: pip install depthscope[hub]."
        ) from error
    # Independent of the user's style, and without pyplot, whose state stays unchanged.
    with style.context(["default", STYLE]):
        figure = FIGURES[name](data)
        figure.set_dpi(RESOLUTION)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        drawn = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    picture = io.BytesIO()
    drawn.quantize(COLORS, dither=Image.Dither.NONE).save(picture, format="PNG", optimize=True)
    return picture.getvalue()


# ------------------------------------------------------------------------------------------------------------ figures


def _variance(data: DepthCardData) -> "Figure":
    report, control = _measured(data), data.untrained
    figure = _figure(7.2, 3.1)
    axes = figure.subplots()
    names = {"attention_variance": ("attention", VERMILION), "mlp_variance": ("MLP", GREEN)}
    for score, (label, color) in names.items():
        if report.has(score):
            _line(axes, report.column(score), color=color, label=f"output of the {label}", linewidth=1.1)
    if control is not None and control.has("variance"):
        _line(axes, control.column("variance"), color=CONTROL, label="residual stream before training", linestyle="--")
    _line(axes, report.column("variance"), report.column("variance_se"), color=BLUE, label="residual stream")
    _log_axis(axes)
    axes.set_ylabel("variance")
    _layers(axes, len(report.layers))
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right upper")
    return figure


def _effectiveness(data: DepthCardData) -> "Figure":
    report, control = _measured(data), data.untrained
    panels = [panel for panel in PANELS if report.has(panel.score)]
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = _figure(3.7 * columns if columns > 1 else 5.5, 1.75 * rows + 0.35)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
    for index, (axes, panel) in enumerate(zip(grid.flat, panels, strict=False)):
        costs = panel.cost
        drawn = [report] if control is None or not control.has(panel.score) else [control, report]
        for each in drawn:
            values, errors = each.column(panel.score), each.column(f"{panel.score}_se")
            if costs:
                values = [None if value is None else 100 * (value - 1) for value in values]
                errors = [None if error is None else 100 * error for error in errors]
            floor = 100 * SMALLEST_COST if costs else None
            if each is control:
                _line(axes, values, color=CONTROL, linestyle="--", floor=floor)
            else:
                _line(axes, values, errors, color=PALETTE[index % len(PALETTE)], floor=floor)
        every = [value for each in drawn for value in each.column(panel.score)]
        if is_wide(panel, every):
            _log_axis(axes)
        else:
            axes.set_ylim(bottom=min(0.0, *(value for value in every if value is not None)))
        axes.set_title(panel.title)
        axes.set_ylabel(panel.unit)
        _layers(axes, len(report.layers), label=index >= len(panels) - columns)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    return figure


def _learning(data: DepthCardData) -> "Figure":
    panels = [each for each in (data.losses, data.variances) if each is not None]
    figure = _figure(3.7 * len(panels) if len(panels) > 1 else 5.5, 2.7)
    for axes, curve in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels, strict=True):
        if isinstance(curve, LossCurve):
            _draw_losses(axes, curve, data)
        else:
            _draw_variances(figure, axes, curve)
        axes.set_xlabel({"tokens": "tokens trained on", "steps": "optimiser step"}[curve.unit])
        _thousands(axes)
    return figure


def _draw_losses(axes: "Axes", curve: LossCurve, data: DepthCardData) -> None:
    axes.plot(curve.at, _numbers(curve.values), color=BLUE, label="training")
    if data.evaluation is not None:
        label = f"{data.evaluation.split if data.evaluation.split in SPLITS else 'other'} text, at the end"
        axes.axhline(data.evaluation.loss, color=VERMILION, linestyle="--", linewidth=1.2, label=label)
    axes.set_title("Loss")
    axes.set_ylabel("nats per token")
    axes.legend()


def _draw_variances(figure: "Figure", axes: "Axes", curve: VarianceCurves) -> None:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    layers = min(len(values) for values in curve.values)
    # The last tenth of viridis is too bright for white paper.
    scale, colors = Normalize(0, max(1, layers - 1)), colormaps["viridis"]
    for layer in range(layers):
        values = _numbers([values[layer] for values in curve.values])
        axes.plot(curve.at, values, color=colors(0.9 * scale(layer)), linewidth=1.0)
    _log_axis(axes)
    axes.set_title("Variance of the residual stream after each layer")
    mappable = ScalarMappable(Normalize(0, max(1, layers - 1) / 0.9), colors)
    bar = figure.colorbar(mappable, ax=axes, pad=0.02, aspect=30, boundaries=None)
    bar.ax.set_ylim(0, max(1, layers - 1))
    bar.set_label("layer")
    bar.locator = _whole_ticks()
    bar.outline.set_visible(False)
    bar.update_ticks()


FIGURES: dict[str, Callable[[DepthCardData], "Figure"]] = {
    "variance_by_layer": _variance,
    "effectiveness_by_layer": _effectiveness,
    "learning_curve": _learning,
}


# -------------------------------------------------------------------------------------------------------------- parts


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height))


def _measured(data: DepthCardData) -> LayerReport:
    if data.report is None:
        raise DepthscopeError("The record has no report of layers, so there is nothing to draw.")
    return data.report


def _line(
    axes: "Axes",
    values: Sequence[float | None],
    errors: Sequence[float | None] = (),
    *,
    color: str,
    floor: float | None = None,
    **options: Any,
) -> None:
    """Draw one score over the layers with its error band; values below `floor` are open circles at `floor`."""
    layers = range(len(values))
    heights = _numbers(values)
    clipped = heights if floor is None else [max(height, floor) if height == height else height for height in heights]
    mark = "o" if len(values) <= MOST_MARKED else None
    axes.plot(layers, clipped, color=color, marker=mark, **options)
    if errors:
        spread = [error or 0.0 for error in errors]
        low = [height - error for height, error in zip(heights, spread, strict=True)]
        high = [height + error for height, error in zip(heights, spread, strict=True)]
        if floor is not None:
            low, high = [max(value, floor) for value in low], [max(value, floor) for value in high]
        axes.fill_between(layers, low, high, color=color, alpha=0.2, linewidth=0)
    below = [layer for layer in layers if floor is not None and heights[layer] <= floor]
    if below and mark and floor is not None:
        axes.plot(below, [floor] * len(below), linestyle="", marker="o", color=color, markerfacecolor="white")


def _layers(axes: "Axes", count: int, label: bool = True) -> None:
    axes.set_xlim(-0.5, count - 0.5)
    axes.xaxis.set_major_locator(_whole_ticks(count))
    if label:
        axes.set_xlabel("layer")


def _log_axis(axes: "Axes") -> None:
    """Make the vertical axis logarithmic, with ticks at powers of ten, or at 1, 2 and 5 times them."""
    from matplotlib.ticker import NullLocator

    drawn = np.concatenate([np.asarray(line.get_ydata(), float) for line in axes.get_lines()])
    drawn = drawn[drawn > TINY]
    axes.set_yscale("log")
    if drawn.size:
        ticks = log_ticks(float(drawn.min()), float(drawn.max()))
        low, high = axes.get_ylim()
        axes.set_yticks(ticks, [f"{tick:,.15g}" for tick in ticks])
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_ylim(low, high)


def _whole_ticks(count: int | None = None) -> Any:
    from matplotlib.ticker import MaxNLocator, MultipleLocator

    return MultipleLocator(1) if count is not None and count <= FEW_LAYERS else MaxNLocator(integer=True)


def _thousands(axes: "Axes") -> None:
    """Label an axis of tokens or steps as 100K, 2M."""
    from matplotlib.ticker import EngFormatter

    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _numbers(values: Sequence[float | None]) -> list[float]:
    return [float("nan") if value is None else value for value in values]
