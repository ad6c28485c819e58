"""Accuracies as a table in a terminal (rich), with the accuracy of guessing."""

from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from depthscope.report.accuracy import ACC, ACC_NORM, Accuracy, mean_accuracy
from depthscope.wording.numbers import format_number, format_with_error

__all__ = ["accuracy_table"]


def accuracy_table(accuracies: Sequence[Accuracy]) -> Table:
    """One row per task and metric, then the means over tasks."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("task")
    table.add_column("metric")
    for heading in ("value", "chance", "documents", "shots"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in accuracies:
        value, chance = format_with_error(row.value, row.stderr), format_number(row.chance, 3)
        cells = (row.task, row.metric, value, chance, _count(row.n), _count(row.shots))
        table.add_row(*map(Text, cells))
    if len({row.task for row in accuracies}) > 1:
        table.add_section()
        for metric in (ACC, ACC_NORM):
            if mean := mean_accuracy(accuracies, metric):
                table.add_row("mean over tasks", metric, format_with_error(*mean), style="bold")
    return table


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"
