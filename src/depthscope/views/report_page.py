"""The page of one or several reports: a summary, interactive figures, tables, and the command to reproduce them."""

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from depthscope.files.atomic import write_atomically
from depthscope.report.comparison import Comparison, compare, require_reports
from depthscope.report.measures import GLOBAL_SCORES, LAYER_SCORES, Term
from depthscope.report.report import LayerReport
from depthscope.report.summary import of_layers, summarize
from depthscope.views.page import framed, render
from depthscope.views.plots.report import EXPLANATIONS, compare_layers, figures
from depthscope.wording.numbers import format_number, format_with_error

__all__ = ["render_page", "reproduce", "tiles", "write_page"]

# Figures that are placed side by side on a wide page.
NARROW_FIGURES = frozenset({"causal_map", "permutation_map"})
EMBEDDED_TEXT = "python-stdlib"
BLOCK_SETTINGS = ("fit_blocks", "eval_blocks", "block_size")
# Neither is needed for the same numbers: scores do not depend on batches, and the blocks that were measured are known.
NOT_NEEDED = frozenset({"batch_size", "budget", "precision"})
VALUED_OPTIONS = (*BLOCK_SETTINGS, "pairs", "probes", "threshold", "ridge", "seed")


@dataclass(frozen=True)
class _Plot:
    """A figure on the page: the id of its element, its title, the explanation below it, its height and width."""

    element: str
    title: str
    explanation: str
    height: int
    narrow: bool


@dataclass(frozen=True)
class _Section:
    """One report in the form that the template shows."""

    report: LayerReport
    label: str
    summary: list[str]
    tiles: list[tuple[str, str, str]]
    plots: list[_Plot]
    columns: dict[str, Term]
    near: frozenset[int]
    criterion: str
    command: str


def render_page(reports: LayerReport | Sequence[LayerReport]) -> str:
    """Render one report, or several reports after a comparison, as one HTML page.

    Raises:
        ReportError: no report is given, or the reports have no score in common.
    """
    require_reports([reports] if isinstance(reports, LayerReport) else reports)
    listed = [reports] if isinstance(reports, LayerReport) else list(reports)
    drawn: dict[str, Any] = {}
    comparison = compare(listed) if len(listed) > 1 else None
    compared = []
    if comparison and comparison.layer_scores:
        compared = _plots({"compare_layers": compare_layers(listed)}, "all", drawn)
    labels = comparison.labels if comparison else [report.model["name"] for report in listed]
    sections = [
        _section(report, label, f"report{index}", drawn)
        for index, (report, label) in enumerate(zip(listed, labels, strict=True))
    ]
    return render(
        "report.html.j2",
        drawn,
        title=" and ".join(labels) if len(labels) < 3 else f"{len(labels)} models",
        sections=sections,
        comparison=comparison,
        compared=compared,
        score_rows=_score_rows,
        compared_rows=_compared_rows,
    )


def write_page(path: str | os.PathLike[str], reports: LayerReport | Sequence[LayerReport]) -> Path:
    """Write the page of one or several reports to a file, completely or not at all.

    Raises:
        ReportError: the file cannot be written, or the page cannot be rendered (see `render_page`).
    """
    return write_atomically(path, render_page(reports))


def reproduce(report: LayerReport) -> str:
    """The command that makes the report again; for a model that was an object, the Python call.

    TEXT stands for the text if it is not the embedded one: a report holds its name and fingerprint, not its path.
    """
    report_settings, data, model = report.settings, report.data, report.model
    if model.get("source") == "object":
        arguments = [f"    {name}={value!r}," for name, value in report_settings.items() if name not in NOT_NEEDED]
        return "\n".join(["depthscope.analyze(", "    model,", "    tokenizer,", *arguments, ")"])
    options: list[tuple[str, ...]] = []
    if model.get("source") == "hub" and model.get("revision"):
        options.append(("--revision", str(model["revision"])))
    if not data["name"].startswith(EMBEDDED_TEXT):
        options.append(("--text", "TEXT"))
    facts = {**report_settings, **{key: value for key, value in data.items() if key in BLOCK_SETTINGS}}
    if isinstance(scores := report_settings.get("scores"), list):
        options.append(("--scores", ",".join(map(str, scores))))
    options += [(_flag(key), str(facts[key])) for key in VALUED_OPTIONS if facts.get(key) is not None]
    # Before the option existed, no block began with BOS.
    if (bos := report_settings.get("bos", "no")) != "auto":
        options.append(("--bos", str(bos)))
    options += [(_flag(key),) for key in ("in_sample", "paper_code", "sublayers") if report_settings.get(key) is True]
    if report_settings.get("exact_losses", True) is True:  # before the option existed, all were
        options.append(("--exact-losses",))
    if model.get("dtype"):
        options.append(("--dtype", model["dtype"]))
    lines = [shlex.join(option) for option in options]
    name = shlex.quote(model["name"])
    # After "--", a model whose name starts with a dash is not parsed as an option.
    parts = (
        ["depthscope analyze", *lines, f"-- {name}"]
        if model["name"].startswith("-")
        else [f"depthscope analyze {name}", *lines]
    )
    return " \\\n    ".join(parts)


def _flag(key: str) -> str:
    return f"--{key.replace('_', '-')}"


def _section(report: LayerReport, label: str, element: str, drawn: dict[str, Any]) -> _Section:
    near = report.near_identity()
    return _Section(
        report=report,
        label=label,
        summary=summarize(report).removeprefix(f"{report.model['name']}: ").splitlines(),
        tiles=tiles(report),
        plots=_plots(figures(report), element, drawn),
        columns={name: LAYER_SCORES[name] for name in report.layer_scores if name in LAYER_SCORES},
        near=frozenset(near.layers) if near else frozenset(),
        criterion=near.criterion if near else "",
        command=reproduce(report),
    )


def tiles(report: LayerReport) -> list[tuple[str, str, str]]:
    """Choose up to four numbers for the head of the page: each with what it counts, and its meaning."""
    chosen = []
    for name, score in (("effective_depth_skip", "skip_ratio"), ("effective_depth_linear", "usefulness_ratio")):
        depth = report.scores.get(name)
        if depth is not None:
            chosen.append((format_number(depth, 2), of_layers(report, score), "effective depth"))
            break
    near = report.near_identity()
    if near:
        chosen.append((str(len(near.layers)), of_layers(report, near.score), "near the identity"))
    if ranked := report.ranked("skip_ratio"):
        layer, ratio = ranked[0]
        chosen.append((f"layer {layer}", f"loss ×{ratio:.4f} without it", "cheapest to leave out"))
    growth = report.scores.get("variance_growth")
    if growth is not None:
        chosen.append((f"×{format_number(growth, 3)}", "first layer to last", "variance growth"))
    return chosen


def _plots(available: Mapping[str, go.Figure], element: str, drawn: dict[str, Any]) -> list[_Plot]:
    """Add figures to `drawn` by the ids of their elements, and return their frames for the page."""
    plots = []
    for name, figure in available.items():
        identity = f"{element}-{name.replace('_', '-')}"
        title, height, drawn[identity] = framed(figure, square=name in NARROW_FIGURES)
        plots.append(_Plot(identity, title, EXPLANATIONS[name], height, name in NARROW_FIGURES))
    return plots


def _score_rows(report: LayerReport) -> list[tuple[Term, str]]:
    """A report's global scores as terms and values with errors."""
    return [
        (
            GLOBAL_SCORES.get(name, Term(name, "", "")),
            format_with_error(report.scores[name], report.scores.get(f"{name}_se")),
        )
        for name in report.global_scores
    ]


def _compared_rows(comparison: Comparison) -> list[tuple[Term, list[tuple[str, str, bool]]]]:
    """The compared scores: the term and, per report, the value, the difference and whether it is significant."""
    return [
        (
            GLOBAL_SCORES.get(row.name, Term(row.name, "", "")),
            [
                (
                    format_with_error(value, error),
                    "" if index == 0 or difference is None else _signed(difference),
                    bool(exceeds),
                )
                for index, (value, error, difference, exceeds) in enumerate(
                    zip(row.values, row.errors, row.differences, row.exceeds, strict=True)
                )
            ],
        )
        for row in comparison.scores
    ]


def _signed(value: float) -> str:
    return f"{'+' if value > 0 else ''}{format_number(value, 3)}"
