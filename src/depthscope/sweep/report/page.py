"""The report of a sweep: its tables, and one self-contained HTML page with figures, sentences and the paper's results.

    DIR/report/results.csv, results.parquet     one row per point
    DIR/report/layers.parquet                   one row per layer of each model
    DIR/report/tables.md                        one row per variant, and the changes in sentences
    DIR/report/sweep.html                       the page

Like the other pages it makes no network requests, escapes texts from files, and contains no time.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from depthscope.errors import SweepError
from depthscope.files.atomic import remove_leftovers, write_atomically
from depthscope.sweep.report.derived import COLUMNS
from depthscope.sweep.report.families import axis_label, format_value, lay_out
from depthscope.sweep.report.figures import (
    Drawn,
    Key,
    layer_figures,
    panel_key,
    paper_panels,
    score_panels,
    training_figures,
)
from depthscope.sweep.report.paper import SOURCE
from depthscope.sweep.report.results import IndexedFamily, SweepResults, load_results
from depthscope.sweep.report.tables import (
    FamilyTable,
    control_table,
    layer_rows,
    main_table,
    result_rows,
    to_csv,
    to_markdown,
    to_parquet,
)
from depthscope.sweep.report.words import family_title, family_words, noise_words, status_lines
from depthscope.views.page import render

__all__ = ["render_sweep_page", "write_report"]

REPORT = "report"
# Facts about the runs of the points, without seconds, which differ every time.
ENVIRONMENT = ("processor", "processes", "threads", "precision", "attention", "python")
MOST_VALUES = 8  # of one fact, if points differ


@dataclass(frozen=True)
class _FamilyPlot:
    element: str
    title: str
    explanation: str
    height: int
    key: list[Key]


@dataclass(frozen=True)
class _FamilySection:
    """One family in the form that the template shows."""

    element: str
    title: str
    words: list[str]
    panels: list[_FamilyPlot]
    key: list[Key]
    paper: list[_FamilyPlot]
    wide: list[_FamilyPlot]
    table: FamilyTable
    control: FamilyTable | None


def write_report(folder: str | os.PathLike[str], out: str | os.PathLike[str] | None = None) -> list[Path]:
    """Write the tables and the page of a sweep, finished or not, each file completely or not at all.

    Args:
        folder: the folder of the sweep.
        out: the folder to write; by default `report` in the folder of the sweep.

    Returns:
        The files.

    Raises:
        SweepError: the folder is not that of a sweep, or the report's folder cannot be created.
        ReportError: a file cannot be written.
    """
    results = load_results(folder)
    place = Path(folder) / REPORT if out is None else Path(out)
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SweepError(f"the folder {place} cannot be created: {error.strerror}. Choose another one.") from error
    remove_leftovers(place)
    rows = result_rows(results)
    contents: dict[str, str | bytes] = {
        "results.csv": to_csv(rows),
        "results.parquet": to_parquet(rows),
        "layers.parquet": to_parquet(layer_rows(results)),
        "tables.md": to_markdown(results),
        "sweep.html": render_sweep_page(results),
    }
    return [write_atomically(place / name, content) for name, content in contents.items()]


def render_sweep_page(results: SweepResults) -> str:
    """Render the page of a sweep."""
    drawn: dict[str, Any] = {}
    sections = [_section(results, family, f"family{index}", drawn) for index, family in enumerate(results.families)]
    return render(
        "sweep.html.j2",
        drawn,
        results=results,
        swept=_swept(results),
        status_lines=status_lines(results),
        noise=noise_words(results),
        sections=sections,
        paper=SOURCE,
        numbers=list(COLUMNS.values()),
        facts=_facts(results),
    )


def _section(results: SweepResults, family: IndexedFamily, element: str, drawn: dict[str, Any]) -> _FamilySection:
    layout = lay_out(results, family)
    control = control_table(results, family)
    return _FamilySection(
        element=element,
        title=family_title(layout),
        words=family_words(results, layout),
        panels=_framed(score_panels(results, layout), element, drawn),
        key=panel_key(results, layout),
        paper=_framed(paper_panels(layout), element, drawn),
        wide=_framed([*layer_figures(results, layout), *training_figures(results, layout)], element, drawn),
        table=main_table(results, family),
        control=control if len(control.headings) > control.words + 1 else None,
    )


def _framed(figures: list[Drawn], element: str, drawn: dict[str, Any]) -> list[_FamilyPlot]:
    """Add figures to `drawn` by the ids of their elements, and return their frames for the page."""
    plots = []
    for each in figures:
        content = each.figure.to_plotly_json()
        identity = f"{element}-{each.name.replace('_', '-').replace('.', '')}"
        drawn[identity] = {"data": content["data"], "layout": content["layout"]}
        layout = content["layout"]
        plots.append(_FamilyPlot(identity, each.title, layout["meta"], int(layout["height"]), each.key))
    return plots


def _swept(results: SweepResults) -> list[tuple[str, str]]:
    """Each family with the values of its axes."""
    rows = []
    for family in results.families:
        layout = lay_out(results, family)
        parts = []
        for axis in layout.axes:
            values = dict.fromkeys(
                format_value(results.of_variant(place.variant)[0].setting(axis)) for place in layout.places
            )
            parts.append(f"{axis_label(axis)} {', '.join(values)}")
        rows.append((family.name, "; ".join(parts) or ", ".join(family.variants)))
    return rows


def _facts(results: SweepResults) -> dict[str, dict[str, str]]:
    """Facts about the text and the runs of the points."""
    data = {
        "text": results.data["name"],
        "fingerprint": results.data["fingerprint"],
        "vocabulary": f"{results.data['vocab_size']:,}",
        "blocks of": f"{results.block_size:,} tokens",
        "seeds": ", ".join(map(str, results.seeds)),
        "usefulness above": _several([f"{threshold:g}" for threshold in results.thresholds]),
        "tokens per model": _several([f"{point.tokens:,}" for point in results.points if point.finished]),
    }
    environments = [point.environment for point in results.points]
    run = {name: _several([_word(each.get(name)) for each in environments]) for name in ENVIRONMENT}
    versions = [each["versions"] for each in environments if isinstance(each.get("versions"), dict)]
    packages = list(dict.fromkeys(name for each in versions for name in each))[:20]
    return {
        "Text": {name: value for name, value in data.items() if value},
        "How it was run": {name: value for name, value in run.items() if value},
        "Versions": {name[:40]: _several([_word(each.get(name)) for each in versions]) for name in packages},
    }


def _several(values: list[str]) -> str:
    """The distinct values, at most `MOST_VALUES` of them."""
    distinct = [value for value in dict.fromkeys(values) if value]
    more = f" and {len(distinct) - MOST_VALUES} more" if len(distinct) > MOST_VALUES else ""
    return ", ".join(distinct[:MOST_VALUES]) + more


def _word(value: Any) -> str:
    return "" if value is None or isinstance(value, (dict, list)) else format_value(value)
