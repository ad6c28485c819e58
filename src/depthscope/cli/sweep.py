"""`depthscope sweep run`, `plan`, `report` and `presets`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from depthscope.cli.paths import FILLS, READS
from depthscope.cli.shared import Program, app, errors_for_people, say
from depthscope.console.terminal import terminal
from depthscope.runs.layout import FAILED
from depthscope.wording.messages import counted

if TYPE_CHECKING:
    from depthscope.sweep.report.results import SweepResults

sweep_app = Program(
    help="Train a grid of models, measure each, and report the results.", no_args_is_help=True, rich_markup_mode="rich"
)
app.add_typer(sweep_app, name="sweep")

File = Annotated[
    str,
    typer.Argument(
        help="A sweep file (YAML), or a preset: [bold]depthscope sweep presets[/] lists them.", metavar="FILE"
    ),
    READS,
]
Folder = Annotated[Path, typer.Argument(help="The folder of a sweep.", metavar="DIR"), READS]
AMISS = 1  # the exit code if a point failed or a file of one is damaged; the report is made all the same


@sweep_app.command()
def run(
    file: File,
    out: Annotated[Path | None, typer.Option(help="The sweep's folder; sweeps/NAME by default."), FILLS] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Only this point, variant or family; * matches anything. For several: --only A --only B."),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Points to train at once; by default one per GPU, or one per processor core."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the points and train nothing.")] = False,
) -> None:
    """Train and measure every point of FILE, and report. Finished points are skipped; interrupted ones continue.

    Models too large for one device: torchrun --nproc-per-node 8 -m depthscope sweep run FILE.
    """
    with errors_for_people("Run the same command again to continue."):
        from depthscope.processes import Processes
        from depthscope.sweep.cost.requirements import require_text_and_packages
        from depthscope.sweep.grid import expand
        from depthscope.sweep.runner import default_folder, describe, run_sweep, select
        from depthscope.sweep.specification import load_sweep

        sweep, damaged = load_sweep(file), False
        if dry_run:
            grid = expand(sweep)
            require_text_and_packages(sweep, grid, out or default_folder(sweep))
            _list_points(select(sweep, grid, only or []))
            return
        outcome = run_sweep(sweep, out, only=only or [], jobs=jobs)
        if Processes.here().is_main:
            say(f"{sweep.specification.name}: {describe(outcome)}.")
            damaged = _report(outcome.out).is_damaged
        if outcome.failed:
            say("Run the same command again to retry the points that failed.")
        if outcome.failed or outcome.unreadable or damaged:
            raise typer.Exit(AMISS)


@sweep_app.command()
def report(folder: Folder) -> None:
    """Write the tables (Markdown, CSV, parquet) and the page of a sweep, finished or not, to DIR/report.

    The exit code is 1 if a point failed or is damaged.
    """
    with errors_for_people():
        results = _report(folder)
        if results.is_damaged or results.with_status(FAILED):
            raise typer.Exit(AMISS)


@sweep_app.command()
def plan(
    file: File,
    gpu: Annotated[str, typer.Option(help="GPU model to plan for.")] = "h100",
    gpus: Annotated[int, typer.Option(min=1, help="GPUs that share a model.")] = 8,
    utilisation: Annotated[float, typer.Option(help="Share of the peak that training reaches.")] = 0.4,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
) -> None:
    """Estimate the cost of FILE: parameters, FLOPs, GPU hours, memory. Trains nothing."""
    with errors_for_people():
        from depthscope.sweep.cost.plan import plan as make_plan
        from depthscope.sweep.cost.plan import print_plan
        from depthscope.sweep.grid import expand
        from depthscope.sweep.specification import load_sweep

        sweep = load_sweep(file)
        cost = make_plan(sweep, expand(sweep), gpu=gpu, gpus=gpus, utilisation=utilisation)
        if markdown:
            typer.echo(cost.to_markdown())
        else:
            print_plan(cost, terminal())


@sweep_app.command()
def presets() -> None:
    """List the sweeps that come with depthscope."""
    with errors_for_people():
        from depthscope.sweep.extending import preset_names
        from depthscope.sweep.grid import expand
        from depthscope.sweep.specification import load_sweep

        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        for name, justify in (("preset", "left"), ("models", "right"), ("tokens each", "right"), ("what", "left")):
            table.add_column(name, justify=justify, no_wrap=name != "what")  # type: ignore[arg-type]
        for name in preset_names():
            sweep = load_sweep(name)
            points = expand(sweep).points
            tokens = max(point.training.tokens for point in points)
            table.add_row(name, str(len(points)), f"{tokens:,}", sweep.specification.description)
        terminal().print(table)


def _report(folder: Path) -> "SweepResults":
    from depthscope.sweep.report.page import write_report
    from depthscope.sweep.report.results import load_results
    from depthscope.sweep.report.tables import print_results

    written, results = write_report(folder), load_results(folder)
    print_results(results, terminal())
    page = next(path for path in written if path.suffix == ".html")
    # Not wrapped, since an address on two lines cannot be opened.
    terminal().print(
        Text(f"Tables and page: {page.parent}\nOpen {page.resolve().as_uri()} in a browser."), soft_wrap=True
    )
    return results


def _list_points(points: list) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("point", overflow="fold")
    for name in ("layers", "hidden", "T", "steps", "tokens"):
        table.add_column(name, justify="right", no_wrap=True)
    for point in points:
        config, training = point.config(vocab_size=512), point.training
        numbers = (config.num_hidden_layers, config.hidden_size, training.sequence_length, training.steps)
        table.add_row(point.name, *map(str, numbers), f"{training.steps * training.batch_tokens:,}")
    terminal().print(table)
    say(f"{counted(len(points), 'point')}; nothing was trained.")


__all__ = ["plan", "presets", "report", "run"]
