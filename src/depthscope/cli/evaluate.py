"""`depthscope evaluate`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from depthscope.cli.analysis import require_places
from depthscope.cli.options import (
    HOW,
    OUTPUT,
    AttnImplementation,
    BaseModel,
    Device,
    Dtype,
    Model,
    Quiet,
    Revision,
    TrustRemoteCode,
)
from depthscope.cli.paths import ADDS_TO, READS, WRITES
from depthscope.cli.shared import app, errors_for_people, say
from depthscope.console.terminal import terminal
from depthscope.errors import DepthscopeError

if TYPE_CHECKING:
    from depthscope.report.accuracy import Downstream
    from depthscope.report.report import LayerReport

TASKS = "Tasks"  # a panel of the help


@app.command()
def evaluate(
    model: Model,
    tasks: Annotated[
        str,
        typer.Option(help="Tasks of lm-eval, separated by commas, or the group [bold]paper[/].", rich_help_panel=TASKS),
    ] = "paper",
    data: Annotated[
        Path | None,
        typer.Option(
            help="A folder with the documents as TASK.jsonl; nothing is downloaded then.", rich_help_panel=TASKS
        ),
        READS,
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Use only the first documents of each task.", rich_help_panel=TASKS)
    ] = None,
    shots: Annotated[
        int | None,
        typer.Option(help="Solved examples before each question; the task's own by default.", rich_help_panel=TASKS),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Answers in a forward pass.", rich_help_panel=HOW)] = 8,
    dtype: Dtype = "auto",
    device: Device = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    attn_implementation: AttnImplementation = None,
    base_model: BaseModel = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the accuracies as JSON.", rich_help_panel=OUTPUT), WRITES
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(help="A report of analyze that the accuracies are added to.", rich_help_panel=OUTPUT),
        ADDS_TO,
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Measure the accuracy of MODEL on downstream tasks with lm-eval (the extra `eval`)."""
    with errors_for_people():
        require_places(out)
        from depthscope.downstream.evaluation import evaluate as measure
        from depthscope.report.report import LayerReport

        measured_report = None if report is None else LayerReport.load(report)
        downstream = measure(
            model,
            tasks=tasks,
            data=data,
            limit=limit,
            shots=shots,
            batch_size=batch_size,
            dtype=dtype,
            device=device,
            revision=revision,
            trust_remote_code=trust_remote_code,
            attn_implementation=attn_implementation,
            base_model=base_model,
            progress=not quiet,
        )
        _deliver(downstream, measured_report, out, report, quiet)


def _deliver(
    downstream: "Downstream", measured_report: "LayerReport | None", out: Path | None, report: Path | None, quiet: bool
) -> None:
    """Write the accuracies, then print them; where writing fails they are printed all the same."""
    failure: DepthscopeError | None = None
    written = []
    try:
        if out is not None:
            downstream.save(out)
            written.append(f"Accuracies: {out}")
        if report is not None and measured_report is not None:
            downstream.added_to(measured_report).save(report)
            written.append(f"Report: {report}")
    except DepthscopeError as error:
        failure = error
    if not quiet or failure is not None:
        _print_accuracies(downstream)
    for line in written:
        say(line)
    if failure is not None:
        raise failure


def _print_accuracies(downstream: "Downstream") -> None:
    from depthscope.views.accuracy import accuracy_table

    console = terminal()
    console.print(accuracy_table(downstream.accuracies))
    for note in downstream.notes:
        say(f"Note: {note}")
