"""The parts of a report on the page: figures, table, facts, files to download, code to reproduce it."""

import json
import re
import shutil
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from gradio.components.plot import PlotData

from depthscope import LayerReport, compare, write_page
from depthscope.files.csv_cells import csv_of_frame
from depthscope.report.measures import LAYER_SCORES, shown_in
from depthscope.views.plots import sparsity
from depthscope.views.plots.report import EXPLANATIONS, TITLES, figures
from depthscope.views.plots.style import TITLE_HEIGHT
from depthscope.views.report_page import reproduce
from depthscope.wording.numbers import format_count, format_with_error
from jobs.processes import own_folder, own_folders

__all__ = [
    "code",
    "drawn",
    "explanations",
    "facts",
    "files",
    "layer_table",
    "listing",
    "plot_data",
    "titles",
]

titles = {**TITLES, "sparsity": sparsity.TITLE}
explanations = {**EXPLANATIONS, "sparsity": sparsity.EXPLANATION}
CONFIG = {
    "responsive": True,
    "displaylogo": False,
    "showSendToCloud": False,
    "displayModeBar": "hover",
    "modeBarButtons": [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
}
MAP_HEIGHT = 430  # two maps side by side are about as wide
FILES = "files"
COPIED_SECONDS = 600


def drawn(report: LayerReport) -> dict[str, PlotData]:
    """Every figure for which the report has scores, by its name in `titles`."""
    found: dict[str, go.Figure] = dict(figures(report))
    if (figure := sparsity.sparsity(report)) is not None:
        found["sparsity"] = figure
    return {name: plot_data(figure, name) for name, figure in found.items()}


def plot_data(figure: go.Figure, name: str) -> PlotData:
    """A figure for Gradio's plot: without its title, which is the heading above, and with our buttons."""
    content: dict[str, Any] = json.loads(figure.to_json())
    layout = content["layout"]
    if layout.pop("title", None) is not None:
        layout["margin"]["t"] = max(10, layout["margin"]["t"] - TITLE_HEIGHT)
        layout["height"] = MAP_HEIGHT if name.endswith("_map") else layout.get("height", MAP_HEIGHT) - TITLE_HEIGHT
    saved = {"format": "png", "filename": f"depthscope-{name}", "scale": 2}
    content["config"] = {**CONFIG, "toImageButtonOptions": saved}
    return PlotData(type="plotly", plot=json.dumps(content))


def layer_table(report: LayerReport) -> pd.DataFrame:
    """A table with one row per layer and the rounded scores of the report; the browser can sort it."""
    near = report.near_identity()
    columns: dict[str, list[Any]] = {"layer": list(range(len(report.layers)))}
    if near is not None:
        columns["near the identity"] = ["yes" if layer in near.layers else "" for layer in columns["layer"]]
    for name in shown_in("space"):
        if report.has(name):
            columns[LAYER_SCORES[name].label] = [
                None if value is None else float(f"{value:.4g}" if "ratio" not in name else f"{value:.5f}")
                for value in report.column(name)
            ]
    return pd.DataFrame(columns)


def facts(report: LayerReport) -> str:
    """The model, the text and the notes as HTML; all names are escaped."""
    model, data = report.model, report.data
    parts = [
        model.get("architecture"),
        _count(model.get("num_parameters"), "parameters"),
        f"revision {str(model.get('revision'))[:10]}" if model.get("revision") else None,
        model.get("dtype"),
        f"{data.get('tokens', 0):,} tokens of {data['name']}",
        f"loss {format_with_error(report.scores.get('loss'), report.scores.get('loss_se'))} nats per token",
    ]
    line = " · ".join(escape(str(part)) for part in parts if part)
    notes = "".join(f"<li>{escape(note)}</li>" for note in report.notes)
    listed = f"<ul class='ds-notes'>{notes}</ul>" if notes else ""
    return f"<p class='ds-facts'>{line}</p>{listed}"


def files(reports: Sequence[LayerReport], folder: Path | None = None) -> dict[str, str]:
    """Write the files to download: the report as JSON, its layers as CSV, and a self-contained page; paths by type."""
    _remove_old_files()
    place = folder or own_folder(FILES)
    stem = _stem(reports[0].model["name"]) if len(reports) == 1 else "comparison"
    page = write_page(place / f"{stem}.html", list(reports))
    if len(reports) == 1:
        saved = reports[0].save(place / f"{stem}.json")
        table = place / f"{stem}.csv"
        table.write_text(csv_of_frame(reports[0].to_frame()), encoding="utf-8")
        return {"json": str(saved), "csv": str(table), "html": str(page)}
    table = place / f"{stem}.csv"
    table.write_text(csv_of_frame(compare(reports).layers_frame()), encoding="utf-8")
    return {"csv": str(table), "html": str(page)}


def code(report: LayerReport) -> str:
    """The code to reproduce the report, on the command line and in Python."""
    command = reproduce(report)
    extra = "[gguf]" if report.model.get("source") == "gguf" else ""
    return f"pip install 'depthscope{extra}'\n\n{command} \\\n    --out report.json --html report.html"


def listing(text: str, label: str) -> str:
    """Lines of code as HTML; a long line is scrolled, also with the keyboard."""
    return f"<pre class='ds-code' tabindex='0' role='region' aria-label='{escape(label)}'>{escape(text)}</pre>"


def _remove_old_files() -> None:
    """Remove the files that were written; Gradio has copied them into its own cache, which it empties by age."""
    for place in own_folders(FILES):
        if time.time() - place.stat().st_mtime > COPIED_SECONDS:
            shutil.rmtree(place, ignore_errors=True)


def _stem(name: str) -> str:
    """A file name from a model's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name.rsplit("/", 1)[-1]).strip("-.")[:60] or "report"


def _count(number: Any, noun: str) -> str | None:
    return f"{format_count(number, '')} {noun}" if isinstance(number, int) else None
