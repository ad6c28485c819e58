"""Figures over time of a training run, as in the paper (arXiv 2603.15389).

The variance per layer over training, as one line per layer and as a map of layers and steps.
"""

import math

import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from depthscope.views.plots.style import TITLE_HEIGHT, capital, finish
from depthscope.views.run_terminal import SHOWN, RunHistory, term
from depthscope.wording.numbers import format_number

__all__ = ["run_figures"]

LOGARITHMIC = ("variance", "attention_variance", "mlp_variance", "max_activation", "update_norm")


def run_figures(run: RunHistory) -> dict[str, go.Figure]:
    """Figures by name, each with its title, and its explanation in `layout.meta`."""
    figures = {}
    for metric in run.metrics:
        if metric not in SHOWN:
            continue
        steps, values = run.over_time(metric)
        if len(steps) > 1:
            figures[f"{metric}_over_time"] = _lines(metric, steps, values)
        if metric == "variance" and len(steps) > 1:
            figures["variance_map"] = _map(steps, values)
    return figures


def _lines(metric: str, steps: list[int], values: list[list[float | None]]) -> go.Figure:
    """One line per layer over the steps, from the first layer (dark) to the last (light)."""
    count = len(values[-1])
    colors = sample_colorscale("Viridis", [layer / max(count - 1, 1) * 0.9 for layer in range(count)])
    figure = go.Figure()
    for layer in range(count):
        figure.add_scatter(
            x=steps,
            y=[row[layer] for row in values],
            mode="lines",
            name=f"layer {layer}",
            line={"color": colors[layer], "width": 1.6},
            hovertemplate=f"layer {layer}, step %{{x}}: %{{y:.4g}}<extra></extra>",
            showlegend=False,
        )
    # A colour bar instead of a legend of a hundred lines.
    figure.add_scatter(
        x=[None],
        y=[None],
        mode="markers",
        marker={
            "colorscale": "Viridis",
            "cmin": 0,
            "cmax": max(count - 1, 1) / 0.9,
            "color": [0],
            "showscale": True,
            "colorbar": {"title": {"text": "layer"}, "thickness": 10, "outlinewidth": 0},
        },
        hoverinfo="skip",
        showlegend=False,
    )
    defined = [value for row in values for value in row if value is not None]
    log = metric in LOGARITHMIC and defined and min(defined) > 0
    figure.update_yaxes(title_text=term(metric).unit or term(metric).label, type="log" if log else "linear")
    figure.update_xaxes(title_text="optimiser step")
    legend = "One line per layer, dark for the first and light for the last"
    return _finished(figure, f"{capital(term(metric).label)} over training", f"{legend}: {term(metric).phrase}.")


def _map(steps: list[int], values: list[list[float | None]]) -> go.Figure:
    """The variance of every layer (rows) at every log (columns), on a logarithmic scale."""
    logs = [
        [math.log10(row[layer]) if row[layer] else None for row in values]  # type: ignore[arg-type]
        for layer in range(len(values[-1]))
    ]
    texts = [[format_number(row[layer], 4) for row in values] for layer in range(len(values[-1]))]
    figure = go.Figure(
        go.Heatmap(
            x=steps,
            y=list(range(len(logs))),
            z=logs,
            text=texts,
            colorscale="Viridis",
            colorbar={"title": {"text": "log₁₀"}, "thickness": 10, "outlinewidth": 0},
            hovertemplate="layer %{y}, step %{x}: variance %{text}<extra></extra>",
        )
    )
    figure.update_xaxes(title_text="optimiser step")
    figure.update_yaxes(title_text="layer")
    explanation = "Rows are layers, columns are logs; bright cells have a large variance of the residual stream."
    return _finished(figure, "Variance of every layer over training", explanation)


def _finished(figure: go.Figure, title: str, explanation: str) -> go.Figure:
    finish(
        figure,
        explanation,
        title,
        hovermode="closest",
        height=380,
        margin={"l": 62, "r": 12, "t": TITLE_HEIGHT + 20, "b": 48},
    )
    figure.update_xaxes(zeroline=False, automargin=True)
    figure.update_yaxes(automargin=True)
    return figure
