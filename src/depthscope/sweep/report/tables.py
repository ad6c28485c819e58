"""The tables of a sweep: per point, per layer and per variant; for programs, notes and the terminal.

    results.csv, results.parquet   one row per point: its settings and all numbers of `depthscope.sweep.report.derived`
    layers.parquet                 one row per layer of each trained and untrained model: its scores and their errors
    tables.md                      per family one row per variant, over seeds, and the changes in sentences

No table contains a time, a date or a path, and rows are in the order of the sweep: equal results give equal bytes.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from depthscope.console.terminal import terminal
from depthscope.files.csv_cells import csv_cell
from depthscope.files.validation import UNPRINTABLE
from depthscope.report.measures import LAYER_SCORES
from depthscope.report.report import LayerReport
from depthscope.sweep.report.derived import COLUMNS, CONTROL, MAIN, SCORES
from depthscope.sweep.report.families import Cell, as_number, axis_label, cell, format_value, lay_out
from depthscope.sweep.report.results import IndexedFamily, PointResult, SweepResults
from depthscope.sweep.report.words import family_title, family_words, noise_words, status_lines
from depthscope.wording.markdown import inline
from depthscope.wording.numbers import format_number, format_with_error

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["FamilyTable", "control_table", "layer_rows", "main_table", "print_results", "result_rows", "to_csv"]
__all__ += ["to_markdown", "to_parquet"]

# In the order of importance: a narrow terminal drops the last ones first.
TERMINAL = (
    "loss",
    "variance_last",
    "skip_excess_sum_no0",
    "causal",
    "linearise_excess_mean_no0",
    "permutation_no0",
    "jacobian_mean_no0",
    "variance_growth",
)
SHORT = {
    "loss": "loss",
    "variance_last": "last variance",
    "skip_excess_sum_no0": "sum skip",
    "causal": "causal",
    "linearise_excess_mean_no0": "mean linear",
    "permutation_no0": "permute",
    "jacobian_mean_no0": "Jacobian",
    "variance_growth": "growth",
}
GAP = 2  # characters between two columns of the terminal
MOST_CHANGES = 5  # of a family in a terminal
MOST_INTEGER = 2**63
MOST_SAFE = 20_000  # characters of a line, which may contain names from files


# ---------------------------------------------------------------------------------------------------- rows of a sweep


def result_rows(results: SweepResults) -> list[dict[str, Any]]:
    """One row per point, in the order of the sweep; every row has every column."""
    axes = list(dict.fromkeys(axis for family in results.families for axis in family.axes))
    columns = _columns_of(axes, [[point.setting(axis) for point in results.points] for axis in axes])
    rows = []
    for index, point in enumerate(results.points):
        families = ";".join(family.name for family in results.families if point.variant in family.variants)
        row: dict[str, Any] = {
            "point": point.name,
            "variant": point.variant,
            "seed": point.seed,
            "families": families,
            "status": point.status,
        }
        row |= {f"setting_{axis}": column[index] for axis, column in columns.items()}
        row["layers"] = None if point.report is None else len(point.report.layers)
        row |= {name: _whole(name, point.numbers.get(name)) for name in _number_columns()}
        rows.append(row)
    return rows


def layer_rows(results: SweepResults) -> list[dict[str, Any]]:
    """One row per layer of every trained and untrained model, with the scores that any of them has."""
    reports = [
        (point, kind, report)
        for point in results.points
        for kind, report in (("trained", point.report), ("untrained", point.untrained))
        if report is not None
    ]
    present = {name for _, _, report in reports for row in report.layers for name in row}
    names = [column for name in LAYER_SCORES for column in (name, f"{name}_se") if column in present]
    return [row for point, kind, report in reports for row in _layers(point, kind, report, names)]


def _layers(point: PointResult, kind: str, report: LayerReport, names: Sequence[str]) -> list[dict[str, Any]]:
    columns = {name: report.column(name) for name in names}
    count = len(report.layers)
    return [
        {
            "point": point.name,
            "variant": point.variant,
            "seed": point.seed,
            "model": kind,
            "num_layers": count,
            "layer": layer,
            **{name: column[layer] for name, column in columns.items()},
        }
        for layer in range(count)
    ]


def _number_columns() -> list[str]:
    sizes = [name for name in COLUMNS if name not in {score.name for score in SCORES}]
    names = [
        column for name in sizes for column in ((name, f"{name}_se") if name in ("loss", "perplexity") else (name,))
    ]
    names += ["untrained_loss", "gain_loss"]
    return names + [
        column
        for score in SCORES
        for column in (score.name, f"{score.name}_se", f"untrained_{score.name}", f"gain_{score.name}")
    ]


def _whole(name: str, value: float | None) -> float | int | None:
    """Convert counts to whole numbers; FLOPs are beyond the integers of a table."""
    return int(value) if name in ("parameters", "active_parameters", "tokens") and value is not None else value


def _columns_of(axes: Sequence[str], columns: Sequence[list[Any]]) -> dict[str, list[Any]]:
    """Settings as columns of one type each: numbers if all are numbers, else texts."""
    typed: dict[str, list[Any]] = {}
    for axis, values in zip(axes, columns, strict=True):
        present = [value for value in values if value is not None]
        if all(isinstance(v, int) and not isinstance(v, bool) and abs(v) < MOST_INTEGER for v in present):
            typed[axis] = values
        elif all(as_number(value) is not None for value in present):
            typed[axis] = [as_number(value) for value in values]
        else:
            typed[axis] = [None if value is None else format_value(value) for value in values]
    return typed


# ------------------------------------------------------------------------------------------------------ for programs


def to_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as CSV; floats have the shortest exact digits, and no text is a formula."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(map(csv_cell, rows[0]))
    writer.writerows(["" if value is None else csv_cell(value) for value in row.values()] for row in rows)
    return stream.getvalue()


def to_parquet(rows: Sequence[dict[str, Any]]) -> bytes:
    """Rows as a parquet file; a column holds texts, whole numbers or floats, and nulls."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {name: [row[name] for row in rows] for name in rows[0]} if rows else {}
    table = pa.table({name: pa.array(values, _type(name, values)) for name, values in columns.items()})
    stream = io.BytesIO()
    pq.write_table(table, stream)
    return stream.getvalue()


def _type(name: str, values: Sequence[Any]) -> "pa.DataType":
    import pyarrow as pa

    present = [value for value in values if value is not None]
    if any(isinstance(value, str) for value in present):
        return pa.string()
    whole = present and all(isinstance(value, int) for value in present)
    return pa.int64() if whole or name in ("parameters", "active_parameters", "tokens", "layers") else pa.float64()


# -------------------------------------------------------------------------------------------------------- for people


@dataclass(frozen=True)
class FamilyTable:
    """A family as a table of texts: column headings, their meanings, and rows; the first `words` columns are texts."""

    headings: list[str]
    meanings: list[str]
    words: int
    rows: list[list[str]]


def main_table(results: SweepResults, family: IndexedFamily, names: Sequence[str] = MAIN) -> FamilyTable:
    """The scores of the variants of a family, means over seeds with their standard deviations."""
    return _family_table(results, family, [name for name in names if _has(results, family, name)], "")


def control_table(results: SweepResults, family: IndexedFamily) -> FamilyTable:
    """The same scores of the models before training; without columns if no control was measured."""
    names = [name for name in CONTROL if _has(results, family, f"untrained_{name}")]
    return _family_table(results, family, names, "untrained_")


def _has(results: SweepResults, family: IndexedFamily, name: str) -> bool:
    return any(cell(results, variant, name).mean is not None for variant in family.variants)


def _family_table(results: SweepResults, family: IndexedFamily, names: Sequence[str], prefix: str) -> FamilyTable:
    layout = lay_out(results, family)
    axes = layout.axes
    named = layout.axis.setting is None  # without an axis, names distinguish the variants
    headings = [*(["variant"] if named else []), *map(axis_label, axes), "seeds"]
    meanings = [*(["its name"] if named else []), *axes, "finished seeds"]
    rows = []
    for variant in (place.variant for place in layout.places):
        points = results.of_variant(variant)
        values = [variant] if named else []
        values += [format_value(points[0].setting(axis)) for axis in axes]
        done = sum(point.finished for point in points)
        seeds = str(done) if done == len(points) else f"{done} of {len(points)}"
        cells = [cell(results, variant, f"{prefix}{name}") for name in names]
        rows.append([*values, seeds, *map(format_cell, cells)])
    for name in names:
        number = COLUMNS[name]
        headings.append(f"{number.label} [{number.unit}]" if number.unit else number.label)
        meanings.append(number.formula)
    return FamilyTable(headings, meanings, len(axes) + named, rows)


def format_cell(value: Cell) -> str:
    """A mean with its standard deviation over seeds, if it has one."""
    if value.deviation:
        return format_with_error(value.mean, value.deviation)
    return format_number(value.mean, 4)


def to_markdown(results: SweepResults) -> str:
    """The families as Markdown, each with its table, its changes and its control."""
    lines = [f"# {_safe(results.name)}", ""]
    if results.description:
        lines += [_safe(results.description), ""]
    data = results.data
    lines += [
        f"Text: {_safe(data['name'])} (fingerprint {_safe(data['fingerprint'])}), {data['vocab_size']:,} tokens in the "
        f"vocabulary; scores on blocks of {results.block_size} tokens. Seeds: "
        f"{', '.join(map(str, results.seeds))}. {_threshold(results)}Layers count from 0.",
        "",
        _safe(noise_words(results)),
        "",
        *(_safe(line) for line in status_lines(results)),
    ]
    for family in results.families:
        layout = lay_out(results, family)
        lines += ["", f"## {_safe(family_title(layout))}", ""]
        lines += _markdown_table(main_table(results, family))
        lines += ["", *(f"- {_safe(line)}" for line in family_words(results, layout))]
        control = control_table(results, family)
        if len(control.headings) > control.words + 1:
            lines += ["", "Before training (the control):", "", *_markdown_table(control)]
    lines += ["", "## The columns", ""]
    used = [number for name, number in COLUMNS.items() if name in MAIN]
    lines += [f"- {_safe(number.label)}: {_safe(number.formula)}" for number in used]
    return "\n".join(lines) + "\n"


def _threshold(results: SweepResults) -> str:
    thresholds = " or ".join(f"{threshold:g}" for threshold in results.thresholds[:3])
    return f"Usefulness is the share of layers above {thresholds}. " if thresholds else ""


def _markdown_table(table: FamilyTable) -> list[str]:
    marks = ["---"] * table.words + ["---:"] * (len(table.headings) - table.words)
    rows = [table.headings, marks, *table.rows]
    return [f"| {' | '.join(text if row is marks else _safe(text) for text in row)} |" for row in rows]


def _safe(text: str) -> str:
    return inline(UNPRINTABLE.sub("\ufffd", text), most=MOST_SAFE)


# ------------------------------------------------------------------------------------------------------- in a terminal


def print_results(results: SweepResults, console: Console | None = None) -> None:
    """Print each family as a table with as many columns as fit, and its changes."""
    console = console or terminal()
    parts: list[RenderableType] = []
    for family in results.families:
        layout = lay_out(results, family)
        table = main_table(results, family, TERMINAL)
        names = [name for name in TERMINAL if _has(results, family, name)]
        if layout.axis.setting is None:
            table = _without_axes(table)
        parts += [
            Text(family_title(layout), style="bold"),
            _fitted(table, [SHORT[name] for name in names], console.width),
        ]
        parts += [Text(line, style="dim") for line in family_words(results, layout, MOST_CHANGES, paper=False)]
        parts.append(Text())
    parts += [Text(noise_words(results), style="dim")]
    parts += [Text(line, style="" if index == 0 else "yellow") for index, line in enumerate(status_lines(results))]
    console.print(Group(*parts))


def _without_axes(table: FamilyTable) -> FamilyTable:
    """A table of named variants without the columns of their settings."""
    rows = [[row[0], *row[table.words :]] for row in table.rows]
    return FamilyTable([table.headings[0], *table.headings[table.words :]], table.meanings, 1, rows)


def _fitted(table: FamilyTable, short: Sequence[str], width: int) -> Table:
    """The text columns of a table, and as many number columns as fit."""
    words = table.words + 1
    headings = [*table.headings[:words], *short]
    fitted = Table(box=None, padding=(0, GAP, 0, 0), header_style="bold")
    room = width
    for index, heading in enumerate(headings):
        cells = [row[index] for row in table.rows]
        needed = max(len(heading), *map(len, cells)) + GAP
        if index > words and needed > room:
            break
        room -= needed
        fitted.add_column(Text(heading), justify="left" if index < table.words else "right", no_wrap=True)
    for row in table.rows:
        fitted.add_row(*(Text(text) for text in row[: len(fitted.columns)]))
    return fitted
