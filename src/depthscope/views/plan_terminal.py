"""A plan of a cut as a table in a terminal: one row for each number of layers removed."""

from itertools import pairwise

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from depthscope.report.cut_plan import CutPlan
from depthscope.wording.messages import ranges
from depthscope.wording.numbers import format_count, format_with_error

__all__ = ["plan_table", "print_plan"]


def plan_table(plan: CutPlan) -> Table:
    """Build the table: losses in nats per token, with the standard error of the difference to the whole model."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("removed", justify="right", no_wrap=True)
    table.add_column("layers", min_width=len("layers"))
    for heading in ("loss", "other weights", "with maps", "parameters"):
        table.add_column(heading, justify="right", no_wrap=True)
    whole = Text(format_with_error(plan.loss, plan.loss_se))
    table.add_row("0", "", whole, "", "", format_count(plan.parameters))
    for before, step in pairwise([None, *plan.steps]):
        assert step is not None
        known = set(before.removed) if before is not None else set()
        new = sorted(set(step.removed) - known)
        is_nested = known <= set(step.removed)
        table.add_row(
            str(len(step.removed)),
            Text(f"+ {ranges(new)}" if is_nested and known else ranges(step.removed)),
            *(
                Text("-" if loss is None else format_with_error(loss, error))
                for loss, error in (
                    (step.loss, step.loss_se),
                    (step.weights_loss, step.weights_loss_se),
                    (step.map_loss, step.map_loss_se),
                )
            ),
            format_count(step.parameters),
        )
    return table


def print_plan(plan: CutPlan, console: Console) -> None:
    """Print the plan: what it is of, the table, and the notes."""
    by = plan.settings.get("by")
    console.print(
        Text(f"{plan.model['name']}: layers to remove, chosen by {by}; losses in nats per token", style="bold")
    )
    console.print(plan_table(plan))
    for note in plan.notes:
        console.print(Text(note, style="dim"))
