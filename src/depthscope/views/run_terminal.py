"""The history of a training run (`layer_stats.jsonl`) as a table in a terminal."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from depthscope.console.terminal import terminal
from depthscope.errors import ReportError
from depthscope.report.measures import LAYER_SCORES, Term, shown_in
from depthscope.runs.history import read_history
from depthscope.wording.numbers import format_number

__all__ = ["SHOWN", "RunHistory", "print_run", "term"]

SPARKS = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 16
# Metrics of runs that are not scores of a report.
TERMS = {
    "max_activation": Term(
        "largest activation", "", "largest absolute activation after the layer", "largest", at={"run": 90}
    ),
    "attention_norm": Term("attention norm", "", "length of the attention's output"),
    "mlp_norm": Term("MLP norm", "", "length of the MLP's output"),
    "skewness": Term("skewness", "", "of the features of a token after the layer"),
    "kurtosis": Term("kurtosis", "", "of the features of a token after the layer"),
    "outliers": Term("outliers", "", "share of features beyond three standard deviations"),
}
SHOWN = shown_in("run", LAYER_SCORES | TERMS)


@dataclass(frozen=True)
class RunHistory:
    """The measurements of the callbacks in one run."""

    name: str
    rows: list[dict[str, Any]]

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "RunHistory":
        """Read the history of a run from its output folder or its file.

        Raises:
            ReportError: there is no history, or it is empty.
        """
        rows = read_history(path)
        if not rows:
            raise ReportError(f"The history in {path} is empty: no training step has been logged yet.")
        folder = Path(path).resolve()
        return cls(folder.name if folder.is_dir() else folder.parent.name, rows)

    @property
    def metrics(self) -> list[str]:
        """The per-layer metrics, starting with those of `SHOWN`."""
        measured = {metric for row in self.rows for metric in row.get("layers", {})}
        return [name for name in SHOWN if name in measured] + sorted(measured - set(SHOWN))

    def over_time(self, metric: str) -> tuple[list[int], list[list[float | None]]]:
        """The steps at which a metric was measured, and its values [steps][L]."""
        rows = [row for row in self.rows if metric in row.get("layers", {})]
        return [row["step"] for row in rows], [row["layers"][metric] for row in rows]

    def to_frame(self) -> Any:
        """A pandas data frame, one row per step and layer, one column per metric."""
        import pandas as pd

        cells: dict[tuple[int, int], dict[str, Any]] = {}
        for row in self.rows:
            for metric, column in row.get("layers", {}).items():
                for layer, value in enumerate(column):
                    cells.setdefault((row["step"], layer), {})[metric] = value
        return pd.DataFrame([{"step": step, "layer": layer, **cell} for (step, layer), cell in sorted(cells.items())])

    @property
    def not_finite(self) -> dict[str, int] | None:
        """The first step and layer whose activations were NaN or infinite."""
        return next((row["not_finite"] for row in self.rows if "not_finite" in row), None)


def term(metric: str) -> Term:
    """The term of a metric; its label says if it was measured on fixed blocks."""
    if metric.startswith("blocks_"):
        base = term(metric.removeprefix("blocks_"))
        return Term(f"{base.label}, on blocks", base.unit, f"{base.phrase}, on fixed blocks")
    return LAYER_SCORES.get(metric) or TERMS.get(metric) or Term(metric.replace("_", " "), "", "")


def print_run(run: RunHistory, console: Console | None = None) -> None:
    """Print the last values per layer, with the variance over time, in as many columns as fit."""
    console = console or terminal()
    steps = [row["step"] for row in run.rows]
    parts: list[RenderableType] = [
        Text(f"{run.name}: steps {min(steps)} to {max(steps)}, {len(run.metrics)} metrics per layer", style="bold")
    ]
    if run.not_finite is not None:
        place = f"first after layer {run.not_finite['layer']}, in step {run.not_finite['step']}"
        parts.append(Text(f"Activations were not finite: {place}.", style="bold red"))
    parts += [Text(), _table(run, console.width), *_legend(run)]
    console.print(Group(*parts))


def _table(run: RunHistory, width: int) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("layer", justify="right", no_wrap=True)
    columns: list[list[str]] = []
    room = width - 7
    for metric in run.metrics:
        if metric not in SHOWN:
            continue
        steps, values = run.over_time(metric)
        heading = term(metric).heading or term(metric).label
        layers = range(len(values[-1]))
        last = [format_number(_float(values[-1][layer]), 3) for layer in layers]
        sparks = [_spark([_float(row[layer]) for row in values]) for layer in layers]
        has_sparks = metric == "variance" and len(steps) > 1
        needed = max(len(heading), *map(len, last)) + 2 + (len(sparks[0]) + 2 if has_sparks else 0)
        if needed > room:
            break
        room -= needed
        table.add_column(heading, justify="right", no_wrap=True)
        columns.append(last)
        if has_sparks:
            table.add_column("", no_wrap=True)
            columns.append(sparks)
    for layer, cells in enumerate(zip(*columns, strict=True)):
        table.add_row(str(layer), *cells)
    return table


def _legend(run: RunHistory) -> list[RenderableType]:
    step = max(row["step"] for row in run.rows)
    return [Text(f"Last values (step {step}); the bars show the change from the first log to the last.", style="dim")]


def _spark(values: Sequence[float]) -> str:
    """A line of bars on its own scale, which is logarithmic if it spans more than a factor of ten."""
    every = max(1, math.ceil(len(values) / SPARK_WIDTH))
    picked = list(values[::-1][::every][::-1])
    finite = [value for value in picked if math.isfinite(value)]
    if not finite:
        return ""
    low, high = min(finite), max(finite)
    wide = low > 0 and high / low > 10

    def height(value: float) -> str:
        if not math.isfinite(value):
            return " "
        if high == low:
            return SPARKS[0]
        share = math.log(value / low) / math.log(high / low) if wide else (value - low) / (high - low)
        return SPARKS[round(share * (len(SPARKS) - 1))]

    return "".join(map(height, picked))


def _float(value: float | None) -> float:
    return float("nan") if value is None else value
