"""Figures of a family of a sweep (plotly), small enough to be placed side by side, with key and explanation.

    score_panels           one score along the axis of the family: every seed, mean and spread, the untrained control
    paper_panels           the paper's results along the same axis
    training_figures       loss and last-layer variance over training
    layer_figures          variance, cost of linearising and cost of skipping per layer

Backgrounds are transparent and texts grey, to suit light and dark pages; colours are Okabe and Ito's, and lines also
differ in their dashes. Names come from files, so they are escaped: plotly interprets HTML.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from depthscope.report.comparison import relative_depth
from depthscope.report.measures import LAYER_SCORES
from depthscope.report.report import LayerReport
from depthscope.sweep.report.derived import COLUMNS
from depthscope.sweep.report.families import Layout, Line, Place, cell
from depthscope.sweep.report.paper import PaperSeries, paper_series
from depthscope.sweep.report.results import Curve, PointResult, SweepResults
from depthscope.views.plots.style import (
    BLUE,
    DASHES,
    GREEN,
    HOVER,
    ORANGE,
    PALETTE,
    PURPLE,
    SKY,
    SMALLEST_COST,
    TEXT_GREY,
    VERMILION,
    capital,
    finish,
    log_ticks,
    plotly_text,
    rounded,
)
from depthscope.wording.numbers import format_number, format_with_error

__all__ = ["Drawn", "Key", "layer_figures", "panel_key", "paper_panels", "score_panels", "training_figures"]

# From cool to warm, for variants that have an order.
ORDERED = (BLUE, SKY, GREEN, ORANGE, VERMILION, PURPLE)
DIGITS = 5  # significant digits; more are not visible
PANEL_HEIGHT = 220
LAYER_HEIGHT = 320
MOST_STEPS = 200  # of a curve; more would overlap
TINY = 1e-100
MOST_CHARACTERS = 40  # of all labels of a panel's axis together
NARROW = 4  # a logarithmic axis over a smaller ratio would have hardly any tick

# The scores to draw, in order, and those that always have a logarithmic axis.
PANELS = (
    "loss",
    "variance_last",
    "variance_growth",
    "linearise_excess_mean_no0",
    "linearise_excess_sum_no0",
    "usefulness_at_1.01",
    "skip_excess_mean_no0",
    "skip_excess_sum_no0",
    "effective_depth_skip",
    "causal",
    "permutation",
    "jacobian_mean_no0",
)
LOGARITHMIC = frozenset({"variance_last", "variance_growth"})
# Before training the loss is that of guessing, far above all others.
WITHOUT_CONTROL = frozenset({"loss"})
COST = "at most 0.01% is drawn at 0.01%"


@dataclass(frozen=True)
class Key:
    """An entry of a key: its name, and how it is drawn."""

    label: str
    color: str
    dash: str  # plotly's name
    mark: str = ""  # a character instead of a line


@dataclass(frozen=True)
class Drawn:
    """A figure with its name, title and key; its explanation is in `figure.layout.meta`."""

    name: str
    title: str
    figure: go.Figure
    key: list[Key] = field(default_factory=list)


# ------------------------------------------------------------------------------------------------ scores along the axis


def score_panels(results: SweepResults, layout: Layout) -> list[Drawn]:
    """Every score of the family along its axis."""
    drawn = []
    for name in PANELS:
        if any(cell(results, place.variant, name).mean is not None for place in layout.places):
            drawn.append(Drawn(name, capital(COLUMNS[name].label), _score_panel(results, layout, name)))
    return drawn


def panel_key(results: SweepResults, layout: Layout) -> list[Key]:
    """The key to the lines and marks of the panels."""
    several, ordered = len(results.seeds) > 1, layout.axis.is_ordered
    alone = "mean over seeds" if several else "trained"
    lines = [
        Key(line.label or alone, _line_color(index), DASHES[index % len(DASHES)], "" if ordered else "●")
        for index, line in enumerate(layout.lines)
    ]
    seeds = [Key("one seed", TEXT_GREY, "", "○")] if several else []
    control = any(point.untrained is not None for place in layout.places for point in results.of_variant(place.variant))
    return lines + seeds + ([Key("before training", TEXT_GREY, "dot", "" if ordered else "–")] if control else [])


def _score_panel(results: SweepResults, layout: Layout, name: str) -> go.Figure:
    figure = go.Figure()
    drawn: list[float] = []
    for index, line in enumerate(layout.lines):
        color, dash = _line_color(index), DASHES[index % len(DASHES)]
        if name not in WITHOUT_CONTROL:
            shade = TEXT_GREY if len(layout.lines) == 1 else color
            drawn += _draw_control(figure, results, layout, line, name, shade)
        drawn += _draw_seeds(figure, results, line, name, color)
        drawn += _draw_means(figure, results, layout, line, name, color, dash)
    number = COLUMNS[name]
    log = name in LOGARITHMIC or _is_wide(drawn)
    _y_axis(figure, drawn, number.unit, log, zero=name != "loss")
    _x_axis(figure, layout)
    return _finished(figure, f"{capital(number.phrase)}.", _panel_height(layout))


def _draw_means(
    figure: go.Figure, results: SweepResults, layout: Layout, line: Line, name: str, color: str, dash: str
) -> list[float]:
    """The means over seeds with their standard deviations."""
    cells = [(place, cell(results, place.variant, name)) for place in line.places]
    present = [(place, each, each.mean) for place, each in cells if each.mean is not None]
    texts = [
        f"{plotly_text(layout.name_of(line, place))}: {format_with_error(mean, each.deviation)}"
        + (f" ({each.seeds} seeds)" if each.seeds > 1 else "")
        for place, each, mean in present
    ]
    spread = [each.deviation or 0.0 for _, each, _ in present]
    # On a logarithmic axis a bar may not reach zero.
    down = [min(deviation, 0.9 * abs(mean)) for deviation, (_, _, mean) in zip(spread, present, strict=True)]
    figure.add_scatter(
        x=[place.position for place, _, _ in present],
        y=rounded([mean for _, _, mean in present], DIGITS),
        error_y={
            "array": rounded(spread, DIGITS),
            "arrayminus": rounded(down if name in LOGARITHMIC else spread, DIGITS),
            "color": color,
            "thickness": 1.4,
            "width": 4,
            "visible": any(spread),
        },
        mode="lines+markers" if layout.axis.is_ordered else "markers",
        line={"color": color, "width": 2, "dash": dash},
        marker={"size": 7, "color": color},
        hovertext=texts,
        hoverinfo="text",
        showlegend=False,
    )
    return [mean for _, _, mean in present]


def _draw_seeds(figure: go.Figure, results: SweepResults, line: Line, name: str, color: str) -> list[float]:
    """Draw each seed as a small open mark, if there are several seeds."""
    marks = [
        (place.position, value, point.seed)
        for place in line.places
        for point in results.of_variant(place.variant)
        if (value := point.numbers.get(name)) is not None
    ]
    if len({seed for _, _, seed in marks}) < 2:
        return []
    figure.add_scatter(
        x=[position for position, _, _ in marks],
        y=rounded([value for _, value, _ in marks], DIGITS),
        mode="markers",
        marker={"size": 6, "color": color, "symbol": "circle-open", "opacity": 0.75},
        hovertext=[f"seed {seed}: {format_number(value)}" for _, value, seed in marks],
        hoverinfo="text",
        showlegend=False,
    )
    return [value for _, value, _ in marks]


def _draw_control(
    figure: go.Figure, results: SweepResults, layout: Layout, line: Line, name: str, color: str
) -> list[float]:
    """The same score before training, over seeds."""
    cells = [(place, cell(results, place.variant, f"untrained_{name}").mean) for place in line.places]
    present = [(place, value) for place, value in cells if value is not None]
    ordered = layout.axis.is_ordered
    figure.add_scatter(
        x=[place.position for place, _ in present],
        y=rounded([value for _, value in present], DIGITS),
        mode="lines" if ordered and len(present) > 1 else "markers",
        line={"color": color, "width": 1.5, "dash": "dot"},
        marker={"symbol": "line-ew", "size": 16, "line": {"color": color, "width": 2}},
        opacity=0.8,
        hovertext=[f"{plotly_text(layout.name_of(line, p))}, before training: {format_number(v)}" for p, v in present],
        hoverinfo="text",
        showlegend=False,
    )
    return [value for _, value in present]


# ------------------------------------------------------------------------------------------------------------ the paper


def paper_panels(layout: Layout) -> list[Drawn]:
    """The paper's results along this axis, one panel per score."""
    values = [place.value for place in layout.places]
    return [
        Drawn(f"paper-{index}", _paper_title(series), _paper_panel(series))
        for index, series in enumerate(paper_series(layout.axis.setting, values))
    ]


def _paper_title(series: PaperSeries) -> str:
    note = f" ({series.note})" if series.note else ""
    return f"{capital(COLUMNS[series.score].label)}{note}"


def _paper_panel(series: PaperSeries) -> go.Figure:
    positions = list(range(len(series.values)))
    figure = go.Figure()
    figure.add_scatter(
        x=positions,
        y=list(series.values),
        mode="lines+markers",
        line={"color": TEXT_GREY, "width": 2},
        marker={"symbol": "diamond", "size": 8, "color": TEXT_GREY},
        hovertext=[
            f"{series.axis} {position}: {value:g}"
            for position, value in zip(series.positions, series.values, strict=True)
        ],
        hoverinfo="text",
        showlegend=False,
    )
    log = series.score in LOGARITHMIC or _is_wide(series.values)
    _y_axis(figure, series.values, COLUMNS[series.score].unit, log, zero=series.score != "perplexity")
    figure.update_xaxes(title_text=series.axis, tickvals=positions, ticktext=list(series.positions))
    figure.update_xaxes(range=[-0.4, len(positions) - 0.6], showgrid=False)
    source_note = " Read off a plot." if series.read_off else ""
    return _finished(figure, f"{capital(COLUMNS[series.score].phrase)}.{source_note}", PANEL_HEIGHT)


# -------------------------------------------------------------------------------------------------------- over training


def training_figures(results: SweepResults, layout: Layout) -> list[Drawn]:
    """Loss and variance over training, one line per variant."""
    figures = []
    loss = "Training loss over tokens, one line per variant: the mean over seeds, and each seed in a faint line."
    variance = "Variance of the residual stream after the last layer over tokens; both axes are logarithmic."
    for name, title, meaning, unit, curve_of, log in (
        ("course-loss", "Loss over training", loss, "nats/token", lambda point: point.losses, False),
        ("course-variance", "Last variance over training", variance, "", _last_variance, True),
    ):
        figure = go.Figure()
        drawn: list[float] = []
        for line_index, place, line in _variants(layout):
            curves = [_thinned(curve_of(point)) for point in results.of_variant(place.variant)]
            style = _style(layout, place, line_index)
            drawn += _draw_curves(figure, curves, style, plotly_text(layout.name_of(line, place)))
        if drawn:
            _y_axis(figure, drawn, unit, log, zero=False)
            _token_axis(figure)
            figures.append(Drawn(name, title, _finished(figure, meaning, LAYER_HEIGHT), _variant_key(layout)))
    return figures


def _last_variance(point: PointResult) -> Curve:
    rows = [
        (tokens, column[-1])
        for tokens, column in zip(point.variances.tokens, point.variances.values, strict=True)
        if column
    ]
    return Curve([tokens for tokens, _ in rows], [value for _, value in rows])


def _draw_curves(figure: go.Figure, curves: list[Curve], style: dict[str, Any], name: str) -> list[float]:
    """Draw each seed's curve in a faint line, and the mean where all trained seeds have a value."""
    curves = [curve for curve in curves if curve.tokens]
    if not curves:
        return []
    present = [dict(zip(curve.tokens, curve.values, strict=True)) for curve in curves]
    shared = [tokens for tokens in present[0] if all(each.get(tokens) is not None for each in present)]
    means = [fmean(each[tokens] for each in present) for tokens in shared]
    if len(curves) > 1:
        for curve in curves:
            _faint(figure, curve.tokens, curve.values, style)
    _strong(
        figure,
        shared,
        means,
        style,
        [f"{name}<br>{tokens:,} tokens: {format_number(v)}" for tokens, v in zip(shared, means, strict=True)],
    )
    return [value for each in present for value in each.values() if value is not None]


# ------------------------------------------------------------------------------------------------------------- by layer


def layer_figures(results: SweepResults, layout: Layout) -> list[Drawn]:
    """Variance and costs per layer, one line per variant, by relative depth if the depths differ."""
    reports = {
        place.variant: [point.report for point in results.of_variant(place.variant) if point.report is not None]
        for place in layout.places
    }
    controls = {
        place.variant: [point.untrained for point in results.of_variant(place.variant) if point.untrained is not None]
        for place in layout.places
    }
    depths = {len(report.layers) for several in reports.values() for report in several}
    figures = []
    for score, title, cost in (
        ("variance", "Variance by layer", False),
        ("usefulness_ratio", "Cost of linearising each layer", True),
        ("skip_ratio", "Cost of skipping each layer", True),
        ("jacobian", "Jacobian distance of each layer", False),
    ):
        if any(report.has(score) for several in reports.values() for report in several):
            shown = controls if score == "variance" else {}
            figure = _layer_figure(layout, reports, shown, score, cost, len(depths) > 1)
            key = _variant_key(layout)
            if any(shown.values()):
                key.append(Key("before training", TEXT_GREY, "dot"))
            figures.append(Drawn(f"layer-{score.replace('_', '-')}", title, figure, key))
    return figures


def _layer_figure(
    layout: Layout,
    reports: dict[str, list[LayerReport]],
    controls: dict[str, list[LayerReport]],
    score: str,
    cost: bool,
    relative: bool,
) -> go.Figure:
    figure = go.Figure()
    drawn: list[float] = []

    def position(layer: int, count: int) -> float:
        return relative_depth(layer, count) if relative else layer

    def prepared(report: LayerReport) -> list[float | None]:
        values = report.column(score)
        return [None if v is None else 100 * max(v - 1, SMALLEST_COST) for v in values] if cost else values

    for _, place, _ in _variants(layout):
        for report in controls.get(place.variant, [])[:1]:  # one seed, since seeds hardly differ before training
            values = prepared(report)
            places = [position(layer, len(values)) for layer in range(len(values))]
            _strong(
                figure,
                places,
                values,
                {"color": TEXT_GREY, "dash": "dot", "width": 1.2},
                ["before training"] * len(places),
            )
            drawn += [value for value in values if value is not None]
    for line_index, place, line in _variants(layout):
        columns = [prepared(report) for report in reports[place.variant]]
        drawn += _draw_layers(
            figure, columns, _style(layout, place, line_index), plotly_text(layout.name_of(line, place)), position, cost
        )
    _y_axis(figure, drawn, "%" if cost else "", True, zero=False)
    figure.update_xaxes(title_text="relative depth, 0 embeddings to 1 head" if relative else "layer")
    quantity = capital(LAYER_SCORES[score].phrase)
    if cost:
        quantity = f"{quantity}, as a rise in percent on a logarithmic axis; {COST}"
    return _finished(
        figure, f"{quantity}. One line per variant: the mean over seeds, and each seed in a faint line.", LAYER_HEIGHT
    )


def _draw_layers(
    figure: go.Figure,
    columns: list[list[float | None]],
    style: dict[str, Any],
    name: str,
    position: Callable[[int, int], float],
    cost: bool,
) -> list[float]:
    if not columns:
        return []
    count = len(columns[0])
    places = [position(layer, count) for layer in range(count)]
    means = [_mean([column[layer] for column in columns if len(column) == count]) for layer in range(count)]
    if len(columns) > 1:
        for column in columns:
            _faint(figure, places, column, style)
    unit = "%" if cost else ""
    texts = [f"{name}<br>layer {layer}: {format_number(value, 3)}{unit}" for layer, value in enumerate(means)]
    _strong(figure, places, means, {**style, "marks": count <= 32}, texts)
    return [value for column in columns for value in column if value is not None]


# -------------------------------------------------------------------------------------------------------------- styles


def _variants(layout: Layout) -> Iterator[tuple[int, Place, Line]]:
    for index, line in enumerate(layout.lines):
        for place in line.places:
            yield index, place, line


def _variant_key(layout: Layout) -> list[Key]:
    return [
        Key(layout.name_of(line, place), style["color"], style["dash"])
        for index, place, line in _variants(layout)
        for style in [_style(layout, place, index)]
    ]


def _style(layout: Layout, place: Place, line: int) -> dict[str, Any]:
    """The colour by the position on the axis, the dashes by the line."""
    positions = [position for position, _ in layout.ticks]
    index = positions.index(place.position)
    palette = ORDERED if layout.axis.is_ordered else PALETTE
    if not layout.axis.is_ordered:  # if there are more names than colours, their dashes differ
        return {"color": palette[index % len(palette)], "dash": DASHES[(line + index // len(palette)) % len(DASHES)]}
    if len(positions) > len(palette):
        color = sample_colorscale("Viridis", [0.15 + 0.7 * index / (len(positions) - 1)])[0]
    elif 1 < len(positions) < len(palette):
        color = palette[round(index * (len(palette) - 2) / (len(positions) - 1))]
    else:
        color = palette[index]
    return {"color": color, "dash": DASHES[line % len(DASHES)]}


def _line_color(index: int) -> str:
    return PALETTE[index % len(PALETTE)]


def _faint(figure: go.Figure, x: Sequence[float], y: Sequence[float | None], style: dict[str, Any]) -> None:
    figure.add_scatter(
        x=list(x),
        y=rounded(y, DIGITS),
        mode="lines",
        line={"color": style["color"], "width": 1},
        opacity=0.35,
        hoverinfo="skip",
        showlegend=False,
    )


def _strong(
    figure: go.Figure, x: Sequence[float], y: Sequence[float | None], style: dict[str, Any], texts: list[str]
) -> None:
    figure.add_scatter(
        x=list(x),
        y=rounded(y, DIGITS),
        mode="lines+markers" if style.get("marks") else "lines",
        line={"color": style["color"], "width": style.get("width", 2), "dash": style["dash"]},
        marker={"size": 5, "color": style["color"]},
        hovertext=texts,
        hoverinfo="text",
        showlegend=False,
    )


def _x_axis(figure: go.Figure, layout: Layout) -> None:
    positions = [position for position, _ in layout.ticks]
    labels = [plotly_text(label) for _, label in layout.ticks]
    if layout.axis.is_scale:
        low, high = math.log10(positions[0]), math.log10(positions[-1])
        margin = max(0.06 * (high - low), 0.03)
        figure.update_xaxes(type="log", range=[low - margin, high + margin])
    else:
        figure.update_xaxes(range=[-0.4, len(positions) - 0.6])
    if layout.axis.setting is not None:
        figure.update_xaxes(title_text=plotly_text(layout.axis.label))
    if _is_crowded(layout):
        figure.update_xaxes(tickangle=-90)
    figure.update_xaxes(tickvals=positions, ticktext=labels, showgrid=False)


def _is_crowded(layout: Layout) -> bool:
    """Whether the labels of the axis must be vertical."""
    return sum(len(label) + 2 for _, label in layout.ticks) > MOST_CHARACTERS


def _panel_height(layout: Layout) -> int:
    """The height of a panel, with room for vertical labels."""
    longest = max(len(label) for _, label in layout.ticks)
    return PANEL_HEIGHT + (round(5.5 * longest) if _is_crowded(layout) else 0)


def _token_axis(figure: go.Figure) -> None:
    tokens = [count for trace in figure.data for count in trace.x if count > 0]
    ticks = log_ticks(min(tokens), max(tokens)) if tokens else []
    figure.update_xaxes(
        title_text="tokens", type="log", tickvals=ticks, ticktext=[_short_count(tick) for tick in ticks]
    )


def _short_count(value: float) -> str:
    """A count with k, M, B or T for thousands and their powers."""
    for factor, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:g}{unit}"
    return f"{value:g}"


def _y_axis(figure: go.Figure, values: Sequence[float], unit: str, log: bool, *, zero: bool) -> None:
    positive = [value for value in values if value > TINY]
    if log and positive and max(positive) > NARROW * min(positive):
        ticks = log_ticks(min(positive), max(positive))
        figure.update_yaxes(type="log", tickvals=ticks, ticktext=[f"{tick:,.15g}" for tick in ticks])
    elif zero:
        figure.update_yaxes(rangemode="tozero", nticks=6, exponentformat="e")
        if any(value < 0 for value in values):
            figure.update_yaxes(zeroline=True, zerolinecolor=TEXT_GREY)
    else:
        figure.update_yaxes(nticks=6, exponentformat="e")
    figure.update_yaxes(title_text=unit)


def _is_wide(values: Sequence[float]) -> bool:
    """Whether values need a logarithmic axis, since one is far above the others."""
    return bool(values) and min(values) > 0 and max(values) > 8 * median(values)


def _finished(figure: go.Figure, explanation: str, height: int) -> go.Figure:
    """Give a figure the common layout."""
    zeroline = bool(figure.layout.yaxis.zeroline)
    finish(
        figure,
        explanation,
        hoverlabel=HOVER,
        hovermode="closest",
        autosize=True,
        height=height,
        margin={"l": 50, "r": 10, "t": 10, "b": 42},
        showlegend=False,
    )
    figure.update_xaxes(zeroline=False, automargin=True, title_standoff=4)
    figure.update_yaxes(zeroline=zeroline, automargin=True, title_standoff=4)
    return figure


def _thinned(curve: Curve) -> Curve:
    every = math.ceil(len(curve.tokens) / MOST_STEPS)
    if every < 2:
        return curve
    indices = range(len(curve.tokens) - 1, -1, -every)[::-1]  # includes the last one
    return Curve([curve.tokens[index] for index in indices], [curve.values[index] for index in indices])


def _mean(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return fmean(present) if present and len(present) == len(values) else None
