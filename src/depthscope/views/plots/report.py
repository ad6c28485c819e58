"""Figures of a report (plotly), each a function `LayerReport -> Figure`.

    effectiveness       every score over the layers, one panel per score, with bands of one standard error
    variance_growth     the residual stream's variance per layer, and the parts of its growth
    skip_cost           the layers ranked by the cost of leaving them out
    causal_map          how skipping a layer (row) changes the update of a later one (column)
    permutation_map     how swapping two layers changes the loss
    compare_layers      the scores of several reports in the same panels

Layers count from 0. Backgrounds are transparent and texts grey, to suit light and dark pages. The colours
are Okabe and Ito's, which colour-blind people can distinguish, and the maps use viridis. `layout.meta` holds the
explanation of the figure from `EXPLANATIONS`. Names from reports are escaped, since plotly interprets HTML.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from depthscope.errors import ReportError
from depthscope.report.comparison import compare, relative_depth
from depthscope.report.measures import LAYER_SCORES, Panel
from depthscope.report.report import LayerReport, Matrix
from depthscope.views.plots.style import (
    BLUE,
    DASHES,
    GREEN,
    HOVER,
    ORANGE,
    PALETTE,
    PANELS,
    SKY,
    SMALLEST_COST,
    TEXT_GREY,
    TINY,
    TITLE_HEIGHT,
    VARIANCE_PANEL,
    VERMILION,
    finish,
    is_wide,
    log_ticks,
    plotly_text,
    rounded,
)
from depthscope.wording.numbers import format_number, format_with_error

__all__ = [
    "EXPLANATIONS",
    "FIGURES",
    "TITLES",
    "causal_map",
    "compare_layers",
    "effectiveness",
    "figures",
    "permutation_map",
    "skip_cost",
    "variance_growth",
]

PANEL_HEIGHT = 150
MAP_HEIGHT = 520
MAP_SCALE = "Viridis"
FEW_LAYERS = 12  # up to here every layer has a tick
MOST_NAMED = 40  # characters of a model's name

TITLES = {
    "effectiveness": "How much each layer contributes",
    "skip_cost": "The cost of leaving out one layer",
    "variance_growth": "How the variance of the residual stream grows with depth",
    "causal_map": "Which later layers depend on which layer",
    "permutation_map": "Which layers can be swapped",
    "compare_layers": "Layers of the reports compared",
}
EXPLANATIONS = {
    "effectiveness": "Each panel shows one score over the layers, with a band of one standard error; the lower the "
    "value of a layer, the nearer it is to the identity. Open circles are at or below the bottom of their scale.",
    "variance_growth": "The upper panel shows the variance of the residual stream after each layer, and of the "
    "outputs of attention and MLP, on a logarithmic scale. The lower panel shows how each layer changes it: the "
    "variance of its update, and twice the update's covariance with the residual stream (below zero: the layer cancels "
    "part of the residual stream), as shares of the larger of the variances before and after the layer.",
    "skip_cost": "The layers from the cheapest to the costliest to leave out, one at a time, by the rise of the loss. "
    "Bars at the top edge exceed the scale; their label or hover text gives the value.",
    "causal_map": "Each row is a skipped layer, each column a later layer: bright where the later layer's update "
    "changes much without the skipped layer, dark where it hardly depends on it.",
    "permutation_map": "Each cell is the relative change of the loss when the two layers are swapped: dark where "
    "their order hardly matters.",
    "compare_layers": "Each panel shows one score of every report over the layers, by relative depth if "
    "the models differ in depth.",
}


def effectiveness(report: LayerReport) -> go.Figure:
    """Draw every score over the layers, one panel per score.

    Raises:
        ReportError: the report has none of these scores.
    """
    panels = [panel for panel in PANELS if report.has(panel.score)]
    if not panels:
        raise _missing("score per layer", "skip,usefulness,causal")
    figure = _panels([panel.title for panel in panels])
    for row, panel in enumerate(panels, start=1):
        series = _series(report, panel)
        color = PALETTE[(row - 1) % len(PALETTE)]
        positions = list(range(len(series.values)))
        _draw(figure, row, positions, series, color=color, name=panel.title, log=is_wide(panel, series.values))
        _scale(figure, row, panel, [series.values])
    _layer_axis(figure, len(panels), len(report.layers))
    return _finish(figure, "effectiveness", legend=False)


def variance_growth(report: LayerReport) -> go.Figure:
    """Draw the variance of the residual stream per layer, and the parts of its growth if the report has them.

    Raises:
        ReportError: the report has no variance.
    """
    if not report.has("variance"):
        raise _missing("variance", "variance")
    split = report.has("variance_update") and report.has("variance_covariance")
    titles = ["Variance", "The effect of the update on the variance"][: 1 + split]
    figure = _panels(titles, heights=[0.55, 0.45][: 1 + split], panel_height=260)
    names = {"variance": "residual stream", "attention_variance": "attention", "mlp_variance": "MLP"}
    for (score, name), color in zip(names.items(), (BLUE, VERMILION, GREEN), strict=True):
        if report.has(score):
            series = _series(report, Panel(score, name, "variance"))
            _draw(figure, 1, list(range(len(series.values))), series, color=color, name=name, log=True, legend=True)
    every = [value for score in names for value in report.column(score)]
    _log_axis(figure, 1, "variance", every)
    if split:
        _draw_growth(figure, report)
    _layer_axis(figure, len(titles), len(report.layers))
    return _finish(figure, "variance_growth")


def skip_cost(report: LayerReport) -> go.Figure:
    """Draw the layers ranked by the cost of leaving them out.

    Raises:
        ReportError: the report has no skip ratios.
    """
    ranked = report.ranked("skip_ratio")
    if not ranked:
        raise _missing("skip ratios", "skip")
    near = report.near_identity()
    errors = report.column("skip_ratio_se")
    costs = {layer: 100 * (ratio - 1) for layer, ratio in ranked}
    top = _readable_top(list(costs.values()))
    figure = go.Figure()
    for name, color, is_near in (("near the identity", ORANGE, True), ("others", BLUE, False)):
        layers = [layer for layer, _ in ranked if bool(near and layer in near.layers) is is_near]
        figure.add_bar(
            x=[str(layer) for layer in layers],
            y=[min(costs[layer], top) for layer in layers],
            error_y={
                "array": [_error_within(costs[layer], errors[layer], top) for layer in layers],
                "color": TEXT_GREY,
                "thickness": 1,
                "width": 2,
            },
            text=[f"{format_number(costs[layer], 2)}%" if costs[layer] > top else "" for layer in layers],
            textposition="inside",
            textangle=-90,
            insidetextanchor="end",
            customdata=[format_with_error(1 + costs[layer] / 100, errors[layer]) for layer in layers],
            hovertemplate="layer %{x}<br>loss × %{customdata} when left out<extra></extra>",
            marker={"color": color},
            name=name,
            showlegend=bool(layers) and near is not None and bool(near.layers),
        )
    figure.update_xaxes(
        type="category",
        categoryorder="array",
        categoryarray=[str(layer) for layer, _ in ranked],
        title_text="layer, cheapest first",
        showgrid=False,
    )
    figure.update_yaxes(title_text="rise of the loss, %", zeroline=True, zerolinecolor=TEXT_GREY)
    figure.update_layout(height=400, bargap=0.25, uniformtext={"minsize": 9, "mode": "hide"})
    return _finish(figure, "skip_cost")


def causal_map(report: LayerReport) -> go.Figure:
    """Draw the causal score of every pair of layers.

    Raises:
        ReportError: the report has no causal pairs.
    """
    return _map(
        report,
        "causal",
        axes=("later layer", "skipped layer"),
        hover="skip layer %{y}: layer %{x}'s update changes by %{customdata}",
        unit="relative change",
    )


def permutation_map(report: LayerReport) -> go.Figure:
    """Draw the permutation score of every pair of layers.

    Raises:
        ReportError: the report has no permutation pairs.
    """
    return _map(
        report,
        "permutation",
        axes=("layer", "layer"),
        hover="swap layers %{y} and %{x}: the loss changes by %{customdata} of itself",
        unit="relative change",
    )


def compare_layers(reports: Sequence[LayerReport]) -> go.Figure:
    """Draw the scores of two or more reports in the same panels, by relative depth if the depths differ.

    Raises:
        SettingsError: fewer than two reports.
        ReportError: no two of them share a score.
    """
    comparison = compare(reports)
    panels = [panel for panel in (*PANELS, VARIANCE_PANEL) if panel.score in comparison.layer_scores]
    if not panels:
        raise ReportError("no two of the reports share a score per layer; analyse the models with the same scores.")
    figure = _panels([panel.title for panel in panels])
    for row, panel in enumerate(panels, start=1):
        drawn = [_series(report, panel) for report in reports]
        every = [value for series in drawn for value in series.values]
        for index, series in enumerate(drawn):
            length = len(series.values)
            layers = list(range(length))
            positions = layers if comparison.same_depth else [relative_depth(layer, length) for layer in layers]
            _draw(
                figure,
                row,
                positions,
                series,
                color=PALETTE[index % len(PALETTE)],
                dash=DASHES[index % len(DASHES)],
                name=_safe_name(comparison.labels[index]),
                log=is_wide(panel, every),
                legend=row == 1,
                group=str(index),
            )
        _scale(figure, row, panel, [series.values for series in drawn])
    if comparison.same_depth:
        _layer_axis(figure, len(panels), len(reports[0].layers))
    else:
        figure.update_xaxes(title_text="relative depth, 0 embeddings to 1 head", row=len(panels), col=1)
    return _finish(figure, "compare_layers")


FIGURES: dict[str, Callable[[LayerReport], go.Figure]] = {
    "effectiveness": effectiveness,
    "skip_cost": skip_cost,
    "variance_growth": variance_growth,
    "causal_map": causal_map,
    "permutation_map": permutation_map,
}


def figures(report: LayerReport) -> dict[str, go.Figure]:
    """Draw every figure that the report has scores for, by name, in the order of `FIGURES`."""
    available = {
        "effectiveness": any(report.has(panel.score) for panel in PANELS),
        "skip_cost": report.has("skip_ratio"),
        "variance_growth": report.has("variance"),
        "causal_map": _is_drawable(report.pairs.get("causal")),
        "permutation_map": _is_drawable(report.pairs.get("permutation")),
    }
    return {name: draw(report) for name, draw in FIGURES.items() if available[name]}


# ------------------------------------------------------------------------------------------------------------ series


@dataclass(frozen=True)
class _Series:
    """The drawing of one score: values, the ends of their error bands, hover texts, and which values are clamped."""

    values: list[float | None]
    low: list[float | None]
    high: list[float | None]
    texts: list[str]
    clamped: list[bool]


def _series(report: LayerReport, panel: Panel) -> _Series:
    """One score per layer in the form of its panel: unchanged, or as the rise of the loss in percent."""
    raw, errors = report.column(panel.score), report.column(f"{panel.score}_se")
    label = LAYER_SCORES[panel.score].label
    texts = [f"{label} {format_with_error(value, error)}" for value, error in zip(raw, errors, strict=True)]
    if not panel.cost:
        low = [None if v is None else v - (e or 0.0) for v, e in zip(raw, errors, strict=True)]
        high = [None if v is None else v + (e or 0.0) for v, e in zip(raw, errors, strict=True)]
        return _Series(raw, low, high, texts, [False] * len(raw))
    return _Series(
        values=[_percent(v, 0.0) for v in raw],
        low=[_percent(v, -(e or 0.0)) for v, e in zip(raw, errors, strict=True)],
        high=[_percent(v, e or 0.0) for v, e in zip(raw, errors, strict=True)],
        texts=texts,
        clamped=[v is not None and v - 1 <= SMALLEST_COST for v in raw],
    )


def _percent(ratio: float | None, shift: float) -> float | None:
    """Turn a loss ratio into a rise in percent, at least the smallest value on the logarithmic axis."""
    return None if ratio is None else 100 * max(ratio + shift - 1, SMALLEST_COST)


def _readable_top(costs: list[float]) -> float:
    """The top of a linear axis on which ordinary layers are readable beside a few very costly ones."""
    ordered = sorted(costs)
    usual = ordered[(len(ordered) - 1) * 3 // 4]
    return ordered[-1] if usual <= 0 else min(ordered[-1], 4 * usual)


def _error_within(cost: float, error: float | None, top: float) -> float:
    """The length of an error bar in percent; 0 on a bar that exceeds the scale."""
    return 0.0 if error is None or cost > top else 100 * error


# ----------------------------------------------------------------------------------------------------------- drawing


def _panels(titles: Sequence[str], heights: list[float] | None = None, panel_height: int = PANEL_HEIGHT) -> go.Figure:
    """Make panels below each other that share the axis of layers."""
    rows = len(titles)
    height = panel_height * rows + 110
    figure = make_subplots(
        rows=rows,
        cols=1,
        shared_xaxes=True,
        subplot_titles=list(titles),
        row_heights=heights,
        vertical_spacing=min(0.9 / max(rows - 1, 1), 38 / (height - 110)),
    )
    # The panels' titles, at their left end.
    figure.update_annotations(font={"size": 13, "color": TEXT_GREY}, x=0, xanchor="left")
    figure.update_layout(height=height)
    return figure


def _draw(
    figure: go.Figure,
    row: int,
    positions: Sequence[float],
    series: _Series,
    *,
    color: str,
    name: str,
    log: bool,
    dash: str = "solid",
    legend: bool = False,
    group: str | None = None,
) -> None:
    """Draw one line with its error band of one standard error into a panel."""
    group = group or name
    band_x, band_y = _band(positions, series, log)
    figure.add_scatter(
        x=band_x,
        y=band_y,
        fill="toself",
        fillcolor=_transparent(color),
        line={"width": 0},
        mode="lines",
        hoverinfo="skip",
        showlegend=False,
        legendgroup=group,
        row=row,
        col=1,
    )
    figure.add_scatter(
        x=list(positions),
        y=rounded(series.values),
        mode="lines+markers",
        line={"color": color, "width": 2, "dash": dash},
        marker={
            "size": 6,
            "color": color,
            "symbol": ["circle-open" if clamped else "circle" for clamped in series.clamped],
        },
        customdata=[[layer, text] for layer, text in enumerate(series.texts)],
        hovertemplate=f"{f'{name}, ' if legend or group != name else ''}layer %{{customdata[0]}}: %{{customdata[1]}}"
        "<extra></extra>",
        name=name,
        showlegend=legend,
        legendgroup=group,
        row=row,
        col=1,
    )


def _band(positions: Sequence[float], series: _Series, log: bool) -> tuple[list[float | None], list[float | None]]:
    """Outline the band of a series: one closed polygon for each run of layers without a gap."""
    runs: list[list[int]] = []
    for index, (low, high) in enumerate(zip(series.low, series.high, strict=True)):
        if low is None or high is None or (log and low <= 0):
            continue
        if runs and runs[-1][-1] == index - 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    x: list[float | None] = []
    y: list[float | None] = []
    for run in runs:
        back = run[::-1]
        x += [*(positions[i] for i in run), *(positions[i] for i in back), None]
        y += [*(series.high[i] for i in run), *(series.low[i] for i in back), None]
    return x, rounded(y)


def _layer_axis(figure: go.Figure, rows: int, num_layers: int) -> None:
    """Label the axis of layers below the last panel, without fractional ticks."""
    figure.update_xaxes(title_text="layer", row=rows, col=1)
    if num_layers <= FEW_LAYERS:
        figure.update_xaxes(dtick=1)


def _scale(figure: go.Figure, row: int, panel: Panel, values: Sequence[Sequence[float | None]]) -> None:
    """Choose a panel's axis."""
    every = [value for series in values for value in series]
    if is_wide(panel, every):
        _log_axis(figure, row, panel.unit, every)
    else:
        figure.update_yaxes(title_text=panel.unit, rangemode="tozero", row=row, col=1)


def _log_axis(figure: go.Figure, row: int, unit: str, values: Sequence[float | None]) -> None:
    """Make a panel's axis logarithmic, with ticks at powers of ten, or at 1, 2 and 5 times them if these are few."""
    defined = [value for value in values if value is not None and value > TINY]
    ticks = log_ticks(min(defined), max(defined)) if defined else []
    figure.update_yaxes(
        title_text=unit, type="log", tickvals=ticks, ticktext=[f"{tick:,.15g}" for tick in ticks], row=row, col=1
    )


def _draw_growth(figure: go.Figure, report: LayerReport) -> None:
    """Draw the two parts of each layer's growth and their sum below the variances."""
    after = report.column("variance")
    parts = {"variance_update": ("Var(update)", SKY), "variance_covariance": ("2 Cov", ORANGE)}
    columns = {name: report.column(name) for name in parts}
    sums: list[float | None] = []
    scales: list[float | None] = []
    for layer, value in enumerate(after):
        update, covariance = columns["variance_update"][layer], columns["variance_covariance"][layer]
        if value is None or update is None or covariance is None:
            sums.append(None)
            scales.append(None)
            continue
        scale = max(value, value - update - covariance)
        scales.append(scale if scale > 0 else None)
        sums.append((update + covariance) / scale if scale > 0 else None)
    layers = list(range(len(after)))
    for name, (label, color) in parts.items():
        values = columns[name]
        figure.add_bar(
            x=layers,
            y=rounded([None if v is None or s is None else v / s for v, s in zip(values, scales, strict=True)]),
            customdata=[format_number(value) for value in values],
            hovertemplate=f"layer %{{x}}: {label} = %{{customdata}}<extra></extra>",
            marker={"color": color, "line": {"width": 0}},
            name=label,
            row=2,
            col=1,
        )
    figure.add_scatter(
        x=layers,
        y=rounded(sums),
        mode="markers",
        marker={"symbol": "diamond", "size": 6, "color": VERMILION},
        hovertemplate="layer %{x}: variance changes by %{y:+.1%} of the larger<extra></extra>",
        name="net",
        row=2,
        col=1,
    )
    figure.update_layout(barmode="relative", bargap=0.25, legend_entrywidth=75)
    figure.update_yaxes(
        title_text="of the larger", tickformat=".0%", zeroline=True, zerolinecolor=TEXT_GREY, row=2, col=1
    )


def _map(report: LayerReport, name: str, *, axes: tuple[str, str], hover: str, unit: str) -> go.Figure:
    """Draw an L x L matrix as a heat map; undefined cells stay empty. The colours are logarithmic in the value."""
    matrix = report.pairs.get(name)
    if matrix is None or not _is_drawable(matrix):
        raise _missing(f"{name} pairs", name)
    errors = report.pairs.get(f"{name}_se") or [[None] * len(row) for row in matrix]
    defined = [value for row in matrix for value in row if value is not None]
    positive = [value for value in defined if value > TINY]
    # Colours can distinguish about three decades; an exact zero gets the lowest colour.
    top = max(positive, default=1.0)
    floor = min(max(min(positive, default=top), top * 1e-3), top * 0.5)
    layers = list(range(len(matrix)))
    figure = go.Figure(
        go.Heatmap(
            x=layers,
            y=layers,
            z=[rounded([None if v is None else math.log10(max(v, floor)) for v in row]) for row in matrix],
            zmin=math.log10(floor),
            zmax=math.log10(top),
            customdata=[
                [format_with_error(value, error) for value, error in zip(*rows, strict=True)]
                for rows in zip(matrix, errors, strict=True)
            ],
            hovertemplate=f"{hover}<extra></extra>",
            hoverongaps=False,
            colorscale=MAP_SCALE,
            colorbar=_colorbar(floor, top, unit),
            xgap=0.5,
            ygap=0.5,
        )
    )
    if len(layers) <= FEW_LAYERS:
        figure.update_layout(xaxis_dtick=1, yaxis_dtick=1)
    figure.update_xaxes(title_text=axes[0], showgrid=False, constrain="domain")
    figure.update_yaxes(
        title_text=axes[1],
        showgrid=False,
        zeroline=False,
        autorange="reversed",
        scaleanchor="x",
        constrain="domain",
    )
    figure.update_layout(height=MAP_HEIGHT)
    return _finish(figure, f"{name}_map", legend=False)


def _is_drawable(matrix: Matrix | None) -> bool:
    """Whether a matrix has at least one defined cell."""
    return matrix is not None and any(value is not None for row in matrix for value in row)


def _colorbar(floor: float, top: float, unit: str) -> dict[str, object]:
    """Label a logarithmic colour bar with the values of its colours."""
    ticks = [tick for tick in log_ticks(floor, top) if floor <= tick <= top * 1.001] or [top]
    return {
        "title": {"text": unit, "side": "right"},
        "tickvals": [round(math.log10(tick), 6) for tick in ticks],
        "ticktext": [f"{tick:.3g}" for tick in ticks],
        "thickness": 14,
        "outlinewidth": 0,
    }


def _finish(figure: go.Figure, name: str, legend: bool = True) -> go.Figure:
    finish(
        figure,
        EXPLANATIONS[name],
        TITLES[name],
        hoverlabel=HOVER,
        hovermode="closest",
        autosize=True,
        margin={"l": 62, "r": 12, "t": TITLE_HEIGHT + 30, "b": 95 if legend else 48},
        showlegend=legend,
        # Below the plot, where it fits on a narrow screen.
        legend={
            "orientation": "h",
            **{"x": 0, "xref": "container", "xanchor": "left"},
            **{"y": 0, "yref": "container", "yanchor": "bottom"},
        },
    )
    figure.update_xaxes(zeroline=False, automargin=True, title_standoff=4)
    figure.update_yaxes(automargin=True, title_standoff=6)
    return figure


def _transparent(color: str) -> str:
    red, green, blue = (int(color[start : start + 2], 16) for start in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, 0.2)"


def _safe_name(name: str) -> str:
    """Shorten a model's name and escape it."""
    short = name if len(name) <= MOST_NAMED else f"…{name[1 - MOST_NAMED :]}"
    return plotly_text(short)


def _missing(quantity: str, scores: str) -> ReportError:
    return ReportError(f"the report holds no {quantity}, so there is nothing to draw; analyse with --scores {scores}.")
