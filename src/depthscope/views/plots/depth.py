"""Scores against depth, and variance over training, for models of unequal depth side by side."""

from collections.abc import Sequence
from dataclasses import dataclass

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from depthscope.report.measures import GLOBAL_SCORES, shown_in
from depthscope.report.report import LayerReport
from depthscope.views.plots.style import BLUE, DASHES, PALETTE, TEXT_GREY, VERMILION, finish, plotly_text
from depthscope.wording.numbers import format_with_error

__all__ = ["EXPLANATION", "TRAINING_EXPLANATION", "DepthPoint", "against_depth", "of_reports", "over_training"]

EXPLANATION = (
    "Each panel shows one score against the number of layers, with error bars of one standard error where they are "
    "known. The mean over layers falls with depth by dilution alone: more layers share about the same work. In a "
    "sweep, dashed lines show the same models before training."
)
TRAINING_EXPLANATION = (
    "The variance of the residual stream after the last layer over the training of the models of the sweep."
)
SCORES = shown_in("depth", GLOBAL_SCORES)
COLUMNS = 2
PANEL_HEIGHT = 210


@dataclass(frozen=True)
class DepthPoint:
    """One model: its name, its number of layers, and its global scores with their standard errors."""

    name: str
    layers: int
    scores: dict[str, float | None]


def of_reports(reports: Sequence[LayerReport]) -> list[DepthPoint]:
    """One point per report."""
    return [DepthPoint(report.model["name"], report.model["num_layers"], report.scores) for report in reports]


def against_depth(
    points: Sequence[DepthPoint], references: Sequence[DepthPoint] = (), *, columns: int = COLUMNS
) -> go.Figure | None:
    """Draw the scores that at least two depths have, with `references` dashed; None if there are none."""
    every = [*points, *references]
    names = [
        name for name in SCORES if len({point.layers for point in points if point.scores.get(name) is not None}) > 1
    ]
    if not names:
        return None
    rows = -(-len(names) // columns)
    figure = make_subplots(
        rows=rows,
        cols=columns,
        subplot_titles=[GLOBAL_SCORES[name].label for name in names],
        vertical_spacing=min(0.9 / max(rows - 1, 1), 62 / (PANEL_HEIGHT * rows)),
        horizontal_spacing=0.12,
    )
    figure.update_annotations(font={"size": 13, "color": TEXT_GREY})  # the panels' titles
    for index, name in enumerate(names):
        place = {"row": index // columns + 1, "col": index % columns + 1}
        _draw(figure, name, points, BLUE, "solid", place)
        _draw(figure, name, references, VERMILION, "dash", place)
        is_last = index + columns >= len(names)
        figure.update_xaxes(
            title_text="layers" if is_last else None,
            tickvals=sorted({point.layers for point in every}),
            type="log",
            **place,
        )
    figure.update_yaxes(automargin=True, zeroline=False)
    height = PANEL_HEIGHT * rows + 70
    finish(figure, EXPLANATION, height=height, showlegend=False, margin={"l": 50, "r": 12, "t": 36, "b": 48})
    return figure


def _draw(
    figure: go.Figure, name: str, points: Sequence[DepthPoint], color: str, dash: str, place: dict[str, int]
) -> None:
    scored = sorted((point for point in points if point.scores.get(name) is not None), key=lambda point: point.layers)
    if not scored:
        return
    errors = [point.scores.get(f"{name}_se") for point in scored]
    figure.add_scatter(
        x=[point.layers for point in scored],
        y=[point.scores[name] for point in scored],
        error_y={"array": [error or 0.0 for error in errors], "color": color, "thickness": 1} if any(errors) else None,
        mode="lines+markers",
        line={"color": color, "dash": dash},
        marker={"size": 7},
        customdata=[
            [plotly_text(point.name), format_with_error(point.scores[name], error)]
            for point, error in zip(scored, errors, strict=True)
        ],
        hovertemplate="%{customdata[0]}, %{x} layers: %{customdata[1]}<extra></extra>",
        **place,
    )


def over_training(curves: Sequence[tuple[str, Sequence[float], Sequence[float]]]) -> go.Figure:
    """Draw the variance after the last layer over training, one line per model: name, steps and values."""
    figure = go.Figure()
    for index, (name, steps, values) in enumerate(curves):
        figure.add_scatter(
            x=list(steps),
            y=list(values),
            mode="lines",
            line={"color": PALETTE[index % len(PALETTE)], "dash": DASHES[index // len(PALETTE) % len(DASHES)]},
            name=plotly_text(name),
            hovertemplate=f"{plotly_text(name)}, step %{{x}}: %{{y:.4g}}<extra></extra>",
        )
    figure.update_xaxes(title_text="step of training", zeroline=False)
    figure.update_yaxes(title_text="variance", type="log", automargin=True)
    finish(
        figure,
        TRAINING_EXPLANATION,
        height=380,
        legend={"orientation": "h", "x": 0, "y": -0.2, "yanchor": "top"},
        margin={"l": 50, "r": 12, "t": 12, "b": 48},
    )
    return figure
