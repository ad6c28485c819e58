"""A recipe as text: its choices, reasons and evidence, for a terminal and in Markdown."""

from collections.abc import Iterable

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from depthscope.recipes.evidence import STUDY, Evidence, Finding
from depthscope.recipes.request import GB
from depthscope.recipes.rule import Recipe
from depthscope.wording.numbers import format_count

__all__ = ["print_recipe", "recipe_markdown"]

STAR = "an extrapolation: the paper did not test this value (it tested few combinations of values)"
PAPER = "arXiv 2603.15389, 1 B active parameters, 5 B tokens; accuracy at 32 layers, perplexity at 16"
CHOICE_WIDTH = 16


def print_recipe(recipe: Recipe, console: Console) -> None:
    """Print the choices and reasons, fitted to the terminal, and then the evidence."""
    console.print(Text(_title(recipe), style="bold"))
    console.print(Text(_size(recipe)), "", sep="\n")
    console.print(_choice_table(recipe.evidence))
    console.print(Text(f"* {STAR}", style="dim"))
    console.print("", Text("Evidence", style="bold"), sep="\n")
    console.print(_evidence_table(row for row in recipe.evidence if row.small is not None))
    console.print(Text(f"paper: {PAPER}", style="dim"), Text(f"small models: {STUDY}", style="dim"), sep="\n")
    for warning in recipe.warnings:
        console.print(Text("Warning: ", style="bold yellow") + Text(warning))


def recipe_markdown(recipe: Recipe) -> str:
    """The recipe as Markdown, with choices, reasons and evidence in one table."""
    titles = ("choice", "value", "why", "paper", "small models")
    lines = [f"## {_title(recipe)}", "", _size(recipe), "", f"| {' | '.join(titles)} |", "| --- " * len(titles) + "|"]
    for row in recipe.evidence:
        small = "" if row.small is None else _finding_text(row.small)
        cells = (_marked(row).replace("*", r"\*"), row.value, row.why, row.paper, small)
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", rf"\*: {STAR}. Paper: {PAPER}. Small models: {STUDY}."]
    lines += [f"\n**Warning:** {warning}" for warning in recipe.warnings]
    return "\n".join(lines) + "\n"


def _choice_table(rows: Iterable[Evidence]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("choice", no_wrap=True, width=CHOICE_WIDTH)
    table.add_column("value", no_wrap=True)
    table.add_column("why")
    for row in rows:
        table.add_row(Text(_marked(row)), Text(row.value, style="bold"), Text(row.why))
    return table


def _evidence_table(rows: Iterable[Evidence]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True, width=CHOICE_WIDTH)
    table.add_column()
    for row in rows:
        assert row.small is not None
        small = Text(f"small models {_finding_text(row.small)}")
        table.add_row(Text(row.choice), Group(Text(f"paper: {row.paper}"), small))
    return table


def _marked(row: Evidence) -> str:
    return row.choice if row.tested else f"{row.choice} *"


def _finding_text(finding: Finding) -> str:
    verdict = "leave it open" if finding.verdict == "open" else finding.verdict
    return f"{verdict}: {finding.text}"


def _title(recipe: Recipe) -> str:
    layers, width = recipe.request.layers, recipe.request.width
    return f"Recipe for {layers} layer{'s' * (layers > 1)} of width {width:,} on {recipe.training.tokens:,} tokens"


def _size(recipe: Recipe) -> str:
    size, request = recipe.size, recipe.request
    gpus = "one GPU" if request.gpus == 1 else f"each of {request.gpus} GPUs"
    return (
        f"{format_count(size.total)} parameters, {format_count(size.active)} active per token. Training: "
        f"{recipe.flops:.2g} FLOPs, {_time(recipe.gpu_hours)} on one {request.kind.name} at "
        f"{request.utilisation:.0%} of its peak. "
        f"Memory, roughly: {_number(recipe.memory / GB)} GB on {gpus}."
    )


def _time(hours: float) -> str:
    scale, unit = next(((s, u) for s, u in ((1, "hours"), (60, "minutes")) if hours * s >= 1), (3600, "seconds"))
    return f"{_number(hours * scale)} {unit}"


def _number(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"
