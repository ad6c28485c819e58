"""One self-contained HTML page of a training run: the layers over time, and their last values."""

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
    """Write the page of a run to a file, completely or not at all.

    Raises:
        ReportError: the file cannot be written.
    """
    return write_atomically(path, render_run_page(run))


def render_run_page(run: RunHistory) -> str:
    """Render the page of a run; it makes no network requests."""
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
    """A summary of a run in sentences."""
    steps = [row["step"] for row in run.rows]
    lines = [f"Measured from step {min(steps)} to step {max(steps)}, at {len(set(steps))} steps."]
    if "variance" in run.metrics:
        steps, values = run.over_time("variance")
        first, last = values[0][-1], values[-1][-1]
        if first is not None and last is not None:
            change = f"from {format_number(first, 3)} (step {steps[0]}) to {format_number(last, 3)} (step {steps[-1]})"
            lines.append(f"The variance of the residual stream after the last layer changed {change}.")
        if values[-1][0] and last is not None:
            growth = format_number(last / values[-1][0], 3)
            lines.append(f"At the end it is {growth} times the variance after the first layer.")
    if run.not_finite is not None:
        place = f"first after layer {run.not_finite['layer']}, in step {run.not_finite['step']}"
        lines.append(f"Activations were not finite: {place}.")
    return lines


def _plot(name: str, figure: go.Figure, drawn: dict[str, Any]) -> dict[str, Any]:
    """Add a figure to `drawn` by the id of its element, and return its frame for the page."""
    element = f"run-{name.replace('_', '-')}"
    title, height, drawn[element] = framed(figure)
    return {"element": element, "title": title, "explanation": figure.layout.meta, "height": height}
