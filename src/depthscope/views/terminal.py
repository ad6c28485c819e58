"""Reports and comparisons as tables in a terminal (rich), fitted to its width.

On a narrow terminal the least important columns are dropped rather than wrapped. Texts in a report come from strangers,
so they are never interpreted as rich markup.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from depthscope.console.terminal import terminal
from depthscope.report.accuracy import Accuracy
from depthscope.report.comparison import Comparison
from depthscope.report.measures import GLOBAL_SCORES, LAYER_SCORES, Measure, Term, format_score, shown_in
from depthscope.report.report import LayerReport
from depthscope.report.summary import summarize
from depthscope.views.accuracy import accuracy_table
from depthscope.wording.numbers import format_number, format_with_error

__all__ = ["layer_table", "print_comparison", "print_measures", "print_report", "scores_table"]

NEAR_STYLE = "cyan"
HEADLINE_STYLE = "bold"
BAR_WIDTH = 8
EIGHTHS = " ▏▎▍▌▋▊▉█"
MEANING_WIDTH = 110  # below this the meanings of the global scores would wrap to one word per line
UNIT_WIDTH = 62
GAP = 2  # characters between two columns

# The ranks of columns that are not numbers, beside the `keep` of the numbers.
KEEP = {"variance bar": 150, "kind": 160, "skip_ratio bar": 190}


@dataclass(frozen=True)
class _Column:
    """A column that may be added to a table: its key, heading and cells."""

    key: str
    heading: str
    cells: list[str]
    justify: Literal["left", "right"] = "right"

    @property
    def width(self) -> int:
        return max(len(text) for text in [self.heading, *self.cells])


def layer_table(report: LayerReport, width: int | None = None) -> Table:
    """Build the table of layers, one row per layer, with the scores that are present and fit the width.

    Args:
        report: the report.
        width: width in characters; None for all columns.
    """
    near = report.near_identity()
    near_layers = set(near.layers) if near else set()
    columns = _fitting(_layer_columns(report, near_layers), width)
    table = _table()
    for column in columns:
        table.add_column(Text(column.heading), justify=column.justify, no_wrap=True)
    for layer in range(len(report.layers)):
        style = NEAR_STYLE if layer in near_layers else ""
        cells = [Text(column.cells[layer], style="dim" if column.key.endswith(" bar") else "") for column in columns]
        table.add_row(*cells, style=style)
    return table


def scores_table(report: LayerReport, width: int | None = None) -> Table:
    """Build the table of global scores: each with its standard error over blocks and, if it fits, its meaning.

    Args:
        report: the report.
        width: width in characters; None for no limit.
    """
    names = report.global_scores
    values = [format_with_error(report.scores[name], report.scores.get(f"{name}_se")) for name in names]
    terms = [GLOBAL_SCORES.get(name, Term(name, "", "")) for name in names]
    table = _table()
    table.add_column("score", no_wrap=True)
    table.add_column("value ± se", justify="right", no_wrap=True, min_width=max(map(len, values), default=0))
    columns = [[Text(term.label) for term in terms], values]
    if width is None or width >= UNIT_WIDTH:
        table.add_column("", no_wrap=True)
        columns.append([term.unit for term in terms])
    if width is None or width >= MEANING_WIDTH:
        table.add_column("meaning")
        columns.append([term.phrase for term in terms])
    for row in zip(*columns, strict=True):
        table.add_row(*row)
    return table


def print_report(report: LayerReport, console: Console | None = None) -> None:
    """Print a report: summary, global scores, layers and notes."""
    console = console or terminal()
    parts: list[RenderableType] = [
        _headline(report),
        Text(),
        scores_table(report, console.width),
        Text(),
        table := layer_table(report, console.width),
        _legend(report, with_bars=any(str(column.header) == "" for column in table.columns)),
        *_downstream(report.downstream),
        *_notes(report.notes, "Notes"),
        _origin(report),
    ]
    _print(Group(*parts), console)


def _downstream(accuracies: Sequence[Accuracy]) -> list[RenderableType]:
    return [Text(), accuracy_table(accuracies)] if accuracies else []


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Print reports side by side: warnings, global scores, and layers by relative depth."""
    console = console or terminal()
    names = _short_labels(comparison)
    parts: list[RenderableType] = [
        Text("Comparison", style=HEADLINE_STYLE),
        *(Text(f"  {name}: {label}", overflow="fold") for name, label in zip(names, comparison.labels, strict=True)),
        *_notes(comparison.warnings, "Before comparing"),
        Text(),
        _score_comparison(comparison, names),
        Text(f"* differs from {names[0]} by more than two combined standard errors", style="dim"),
        Text(),
        _layer_comparison(comparison, names, console.width),
    ]
    _print(Group(*parts), console)


def _table() -> Table:
    """Make a table with at most `GAP` characters between two columns."""
    return Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, GAP - 1, 0, 0))


def print_measures(measures: Iterable[Measure], console: Console | None = None) -> None:
    """Print the meaning, formula, unit and source of every score."""
    console = console or terminal()
    parts: list[RenderableType] = []
    for measure in measures:
        title = Text(measure.title, style=HEADLINE_STYLE).append(f"  {measure.name}", style=NEAR_STYLE)
        facts = [f"unit: {measure.unit}", f"source: {measure.source}"]
        if measure.better:
            facts.insert(1, f"{measure.better} if layers contribute more")
        details = Text(f"{measure.formula}\n{' · '.join(facts)}", style="dim")
        parts += [title, Padding(Group(Text(measure.meaning), details), (0, 0, 1, 2))]
    _print(Group(*parts), console)


def _headline(report: LayerReport) -> RenderableType:
    """The summary of a report, with the effective depth emphasised."""
    first, *others = summarize(report).splitlines()
    grid = Table.grid(padding=(0, 1))
    for line in others:
        grid.add_row("•", Text(line, style=HEADLINE_STYLE if line.startswith("Effective depth") else ""))
    return Group(Text(first, style=HEADLINE_STYLE, overflow="fold"), grid)


def _legend(report: LayerReport, with_bars: bool) -> Text:
    """The legend below the table of layers, for its less obvious columns and marks."""
    near = report.near_identity()
    text = Text()
    if near and near.layers:
        text.append(f"≈ near the identity: {near.criterion}\n", style=NEAR_STYLE)
    parts = [
        f"{LAYER_SCORES[name].heading}: {LAYER_SCORES[name].phrase}"
        for name in ("usefulness_ratio", "skip_ratio")
        if report.has(name)
    ]
    if with_bars:
        parts.append("bars: variance on a log scale; the cost of skipping, full for the costliest layers")
    return text.append("\n".join(parts), style="dim")


def _notes(notes: Sequence[str], title: str) -> list[RenderableType]:
    if not notes:
        return []
    table = Table.grid(padding=(0, 1))
    for note in notes:
        table.add_row("•", Text(note, overflow="fold"))
    return [Text(f"\n{title}", style="bold yellow"), table]


def _origin(report: LayerReport) -> Text:
    """When and with which versions the report was made, and the fingerprint of its text."""
    made = datetime.fromisoformat(report.created.replace("Z", "+00:00"))
    parts = [
        f"made {made:%Y-%m-%d %H:%M}",
        *(f"{name} {version}" for name, version in report.versions.items() if version),
        f"text {report.data['fingerprint'][:16]}",
    ]
    return Text(f"\n{' · '.join(parts)}", style="dim", overflow="fold")


def _layer_columns(report: LayerReport, near: set[int]) -> list[_Column]:
    rows = range(len(report.layers))
    columns = [_Column("layer", "layer", [f"≈ {layer}" if layer in near else str(layer) for layer in rows])]
    kinds = [str(row.get("kind", "")) for row in report.layers]
    if len(set(kinds)) > 1:
        columns.append(_Column("kind", "kind", [kind[:24] for kind in kinds], "left"))
    for name in shown_in("table"):
        if not report.has(name):
            continue
        values = report.column(name)
        columns.append(
            _Column(name, LAYER_SCORES[name].heading or name, [format_score(name, value) for value in values])
        )
        if name in BARS:
            columns.append(_Column(f"{name} bar", "", BARS[name](values), "left"))
    return columns


def _fitting(columns: list[_Column], width: int | None) -> list[_Column]:
    """Drop columns, the least important first, until the others fit the width."""
    keep = KEEP | {name: term.keep for name, term in LAYER_SCORES.items() if term.keep is not None}
    dropped = sorted({column.key for column in columns} & keep.keys(), key=lambda key: (keep[key], key))
    while width is not None and sum(column.width + GAP for column in columns) - GAP > width and dropped:
        key = dropped.pop(0)
        columns = [column for column in columns if column.key not in (key, f"{key} bar")]
    return columns


def _bar(share: float) -> str:
    """Draw a bar for a share between 0 and 1, in eighths of a character."""
    eighths = round(max(0.0, min(1.0, share)) * BAR_WIDTH * 8)
    full, rest = divmod(eighths, 8)
    return "█" * full + (EIGHTHS[rest] if rest else "")


def _log_bars(values: list[float | None]) -> list[str]:
    """Draw bars on a logarithmic scale from the smallest value to the largest."""
    logs = [math.log(value) if value is not None and value > 0 else None for value in values]
    defined = [value for value in logs if value is not None]
    if not defined:
        return [""] * len(values)
    low, span = min(defined), max(max(defined) - min(defined), 1e-9)
    return ["" if value is None else _bar(0.05 + 0.95 * (value - low) / span) for value in logs]


def _cost_bars(ratios: list[float | None]) -> list[str]:
    """Draw the cost of skipping each layer, on the scale of the ordinary layers, so that outliers fill the bar."""
    costs = [max(0.0, ratio - 1) if ratio is not None else None for ratio in ratios]
    defined = sorted(cost for cost in costs if cost is not None)
    if not defined or defined[-1] == 0:
        return [""] * len(ratios)
    full = min(defined[-1], max(3 * defined[len(defined) * 3 // 4], defined[-1] / 100))
    return ["" if cost is None else _bar(cost / full) for cost in costs]


BARS: dict[str, Callable[[list[float | None]], list[str]]] = {"variance": _log_bars, "skip_ratio": _cost_bars}


def _short_labels(comparison: Comparison) -> list[str]:
    """Name the reports A, B, C, ..., since their own names are too long for column headings."""
    return [chr(ord("A") + index) if index < 26 else f"#{index + 1}" for index in range(len(comparison.labels))]


def _score_comparison(comparison: Comparison, names: Sequence[str]) -> Table:
    table = _table()
    table.add_column("score", no_wrap=True)
    table.add_column(names[0], justify="right", no_wrap=True)
    for name in names[1:]:
        table.add_column(name, justify="right", no_wrap=True)
        table.add_column(f"{name} − {names[0]}", justify="right", no_wrap=True)
        table.add_column("", style="bold")
    for row in comparison.scores:
        term = GLOBAL_SCORES.get(row.name, Term(row.name, "", ""))
        cells = [Text(term.label), Text(format_with_error(row.values[0], row.errors[0]))]
        for index in range(1, len(names)):
            difference, exceeds = row.differences[index], row.exceeds[index]
            sign = "+" if difference is not None and difference > 0 else ""
            cells.append(Text(format_with_error(row.values[index], row.errors[index])))
            cells.append(Text(f"{sign}{format_number(difference, 3)}", style="bold" if exceeds else ""))
            cells.append(Text("*" if exceeds else ""))
        table.add_row(*cells)
    return table


def _layer_comparison(comparison: Comparison, names: Sequence[str], width: int) -> Table:
    """Build the table of layers side by side, matched by relative depth if the depths differ."""
    matches = comparison.matches
    if comparison.same_depth:
        columns = [_Column("layer", "layer", [str(match.layers[0]) for match in matches])]
    else:
        columns = [_Column("layer", "depth", [f"{match.relative_depth:.2f}" for match in matches])]
        for index, name in enumerate(names):
            columns.append(_Column("layer", f"layer {name}", [str(match.layers[index]) for match in matches]))
    for score in (score for score in shown_in("compared") if score in comparison.layer_scores):
        for index, name in enumerate(names):
            values = comparison.reports[index].column(score)
            cells = [format_score(score, values[match.layers[index]]) for match in matches]
            term = LAYER_SCORES[score]
            columns.append(_Column(score, f"{term.heading or term.label} {name}", cells))
    table = _table()
    fitting = _fitting(columns, width)
    for column in fitting:
        table.add_column(Text(column.heading), justify="right", no_wrap=True)
    for row in zip(*(column.cells for column in fitting), strict=True):
        table.add_row(*row)
    return table


def _print(content: RenderableType, console: Console) -> None:
    """Print, also to a terminal or file whose encoding lacks some characters."""
    encoding = console.encoding
    if encoding.lower().startswith("utf"):
        console.print(content)
        return
    with console.capture() as capture:
        console.print(content)
    console.file.write(capture.get().encode(encoding, "replace").decode(encoding))
