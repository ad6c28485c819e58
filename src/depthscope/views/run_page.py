"""One self-contained HTML page of a training run: the layers over time, and where they stand at the end."""

import os
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from depthscope.files.atomic import write_atomically
from depthscope.views.page import framed, render
from depthscope.views.plots.run import run_figures
from depthscope.views.run_terminal import RunHistory, term
from depthscope.wording.numbers import format_number

__all__ = ["render_run_page", "write_run_page"]


def write_run_page(path: str | os.PathLike[str], run: RunHistory) -> Path:
    """Write the page of a run to a file, whole or not at all.

    Raises:
        ReportError: the file cannot be written.
    """
    return write_atomically(path, render_run_page(run))


def render_run_page(run: RunHistory) -> str:
    """Render the page of a run; it asks nothing of the network."""
    drawn: dict[str, Any] = {}
    plots = [_plot(name, figure, drawn) for name, figure in run_figures(run).items()]
    columns = []
    for metric in run.metrics:
        _, values = run.over_time(metric)
        columns.append((term(metric).label, term(metric).phrase, values[-1]))
    return render(
        "run.html.j2",
        drawn,
        title=run.name,
        summary=summary(run),
        plots=plots,
        columns=columns,
        num_layers=max((len(column) for _, _, column in columns), default=0),
    )


def summary(run: RunHistory) -> list[str]:
    """What a run shows, in sentences."""
    steps = [row["step"] for row in run.rows]
    lines = [f"Measured from step {min(steps)} to step {max(steps)}, at {len(set(steps))} steps."]
    if "variance" in run.metrics:
        at, values = run.over_time("variance")
        first, last = values[0][-1], values[-1][-1]
        if first is not None and last is not None:
            change = f"from {format_number(first, 3)} (step {at[0]}) to {format_number(last, 3)} (step {at[-1]})"
            lines.append(f"The variance of the residual stream after the last layer went {change}.")
        if values[-1][0] and last is not None:
            growth = format_number(last / values[-1][0], 3)
            lines.append(f"It is {growth} times that after the first layer at the end.")
    if run.not_finite is not None:
        where = f"first after layer {run.not_finite['layer']}, in step {run.not_finite['step']}"
        lines.append(f"Activations were not finite: {where}.")
    return lines


def _plot(name: str, figure: go.Figure, drawn: dict[str, Any]) -> dict[str, Any]:
    """Put a figure into `drawn` by the id of its element, and say how the page frames it."""
    element = f"run-{name.replace('_', '-')}"
    title, height, drawn[element] = framed(figure)
    return {"element": element, "title": title, "explanation": figure.layout.meta, "height": height}
