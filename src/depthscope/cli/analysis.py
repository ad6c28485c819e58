"""`depthscope analyze`, `show`, `compare` and `scores`."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from depthscope.cli.options import (
    HOW,
    OUTPUT,
    TEXT,
    AttnImplementation,
    BaseModel,
    BlockSize,
    Bos,
    Column,
    Dataset,
    Device,
    Dtype,
    Model,
    Quiet,
    ReportOut,
    Revision,
    Split,
    Text,
    TrustRemoteCode,
)
from depthscope.cli.paths import READS, WRITES
from depthscope.cli.shared import app, errors_for_people, say
from depthscope.console.terminal import terminal
from depthscope.errors import ReportError, SettingsError
from depthscope.files.atomic import reason

if TYPE_CHECKING:
    from depthscope.report.report import LayerReport

DEPTH = "What to measure"  # a panel of the help


@app.command()
def analyze(
    model: Model,
    text: Text = None,
    dataset: Dataset = None,
    column: Column = None,
    split: Split = None,
    fit_blocks: Annotated[
        int, typer.Option(help="Blocks at the start of the text that fit the linear maps.", rich_help_panel=TEXT)
    ] = 16,
    eval_blocks: Annotated[
        int | None,
        typer.Option(
            help="Blocks after those, to measure all scores on: 8, or with --budget or --precision the most of them, "
            "256 or what the text holds.",
            show_default=False,
            rich_help_panel=TEXT,
        ),
    ] = None,
    block_size: BlockSize = 256,
    bos: Bos = "auto",
    scores: Annotated[
        str,
        typer.Option(
            help="Scores to compute, separated by commas; [bold]depthscope scores[/] explains them.",
            rich_help_panel=DEPTH,
        ),
    ] = "all",
    pairs: Annotated[
        str,
        typer.Option(
            help="Pairs of layers to swap: all, adjacent, or a share to sample such as 0.25.", rich_help_panel=DEPTH
        ),
    ] = "all",
    probes: Annotated[
        str, typer.Option(help="Random probes per layer for the Jacobian distance, or exact.", rich_help_panel=DEPTH)
    ] = "16",
    threshold: Annotated[
        float, typer.Option(help="Loss ratio above which a layer counts as useful.", rich_help_panel=DEPTH)
    ] = 1.1,
    ridge: Annotated[
        float, typer.Option(help="Ridge of the linear fit, relative; 0 is plain least squares.", rich_help_panel=DEPTH)
    ] = 0.0,
    in_sample: Annotated[
        bool, typer.Option("--in-sample", help="Fit the linear maps on the evaluation blocks.", rich_help_panel=DEPTH)
    ] = False,
    paper_code: Annotated[
        bool,
        typer.Option("--paper-code", help="Compute what the paper's released code computes.", rich_help_panel=DEPTH),
    ] = False,
    sublayers: Annotated[
        bool,
        typer.Option(
            "--sublayers",
            help="Measure skip, causal and usefulness for the attention and the MLP of each layer too.",
            rich_help_panel=DEPTH,
        ),
    ] = False,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Add blocks until this time is spent: seconds, or 60s, 5m, 1h. Loading the model and reading the text "
            "come on top. At least two blocks are measured. Ctrl-C ends it early, with what has been measured.",
            metavar="TIME",
            rich_help_panel=DEPTH,
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="Add blocks until no layer's loss ratio (skip, usefulness) has a larger standard error than this "
            "share of it: 2%, or 0.02.",
            metavar="SHARE",
            rich_help_panel=DEPTH,
        ),
    ] = None,
    exact_losses: Annotated[
        bool,
        typer.Option(
            "--exact-losses",
            help="Compute the losses of changed models from all logits. By default they are estimated where the "
            "vocabulary is large, to about the same standard errors.",
            rich_help_panel=DEPTH,
        ),
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of probes and of all samples.", rich_help_panel=DEPTH)] = 0,
    batch_size: Annotated[
        int | None, typer.Option(help="Blocks in a forward pass; scores do not depend on it.", rich_help_panel=HOW)
    ] = None,
    dtype: Dtype = "auto",
    device: Device = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    attn_implementation: AttnImplementation = None,
    base_model: BaseModel = None,
    offload: Annotated[
        bool,
        typer.Option(
            "--offload",
            help="Keep the layers' weights in the files (with a GPU, in main memory) and read them layer by layer; "
            "this happens by itself where they do not fit in memory.",
            rich_help_panel=HOW,
        ),
    ] = False,
    out: ReportOut = None,
    html: Annotated[
        Path | None, typer.Option(help="Write a page with interactive plots.", rich_help_panel=OUTPUT), WRITES
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Measure how much every layer of MODEL contributes.

    Several processes share the work under torchrun: torchrun --nproc-per-node 2 -m depthscope analyze MODEL ...
    """
    with errors_for_people():
        if text and dataset:
            raise SettingsError("Both --text and --dataset were given; choose one.")
        require_places(out, html)
        from depthscope.analysis.analyze import analyze as measure
        from depthscope.processes import Processes
        from depthscope.settings import USUAL_BLOCKS, Settings

        settings = Settings(
            scores=scores,
            fit_blocks=fit_blocks,
            eval_blocks=USUAL_BLOCKS if eval_blocks is None else eval_blocks,
            block_size=block_size,
            bos=bos,
            batch_size=batch_size,
            threshold=threshold,
            ridge=ridge,
            in_sample=in_sample,
            paper_code=paper_code,
            pairs=_share_or_word(pairs),
            probes=_count_or_word(probes),
            seed=seed,
            sublayers=sublayers,
            budget=budget,
            precision=precision,
            exact_losses=exact_losses,
        )
        report = measure(
            model,
            text=text,
            dataset=dataset,
            column=column,
            split=split,
            settings=settings,
            revision=revision,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            attn_implementation=attn_implementation,
            base_model=base_model,
            offload=offload or None,
            progress=not quiet,
        )
        if Processes.here().is_main:
            deliver(report, out, html, quiet)


@app.command()
def show(
    report: Annotated[
        Path,
        typer.Argument(
            help="A report written by analyze --out, or the output folder of a training with a depthscope callback.",
            metavar="REPORT|RUN",
        ),
        READS,
    ],
    html: Annotated[Path | None, typer.Option(help="Write a page with interactive plots."), WRITES] = None,
) -> None:
    """Show a saved report, or the layers over a training run."""
    with errors_for_people():
        require_places(html)
        if report.is_dir() or report.suffix == ".jsonl":
            _show_run(report, html)
            return
        from depthscope.report.report import LayerReport

        deliver(LayerReport.load(report), None, html, quiet=False, saved=report)


def _show_run(run: Path, html: Path | None) -> None:
    from depthscope.views.run_terminal import RunHistory, print_run

    history = RunHistory.load(run)
    print_run(history, terminal())
    if html is not None:
        from depthscope.views.run_page import write_run_page

        write_run_page(html, history)
        say(f"Page: {html}")


@app.command()
def compare(
    reports: Annotated[list[Path], typer.Argument(help="Two or more reports.", metavar="REPORT..."), READS],
    html: Annotated[Path | None, typer.Option(help="Write a page that shows the layers side by side."), WRITES] = None,
) -> None:
    """Compare reports: the differences, and which exceed the noise."""
    with errors_for_people():
        from depthscope.report.comparison import compare as compare_reports
        from depthscope.report.report import LayerReport
        from depthscope.views.terminal import print_comparison

        if len(reports) < 2:
            raise SettingsError(f"{len(reports)} report was given; compare needs at least two.")
        require_places(html)
        loaded = [LayerReport.load(path) for path in reports]
        print_comparison(compare_reports(loaded), terminal())
        if html is not None:
            from depthscope.views.report_page import write_page

            write_page(html, loaded)
            say(f"Page: {html}")


@app.command()
def scores() -> None:
    """Explain every score in a sentence or two."""
    with errors_for_people():
        from depthscope.report.measures import EXPLAINED
        from depthscope.views.terminal import print_measures

        print_measures(EXPLAINED, terminal())


def deliver(report: "LayerReport", out: Path | None, html: Path | None, quiet: bool, saved: Path | None = None) -> None:
    """Write the report and its page, then print it; where that fails, the measurements are kept in a temporary folder.

    Args:
        report: the report.
        out: where to save it.
        html: where to write its page.
        quiet: whether to print nothing.
        saved: the file that already holds the report, if there is one.
    """
    from depthscope.views.terminal import print_report

    failure: ReportError | None = None
    written = []
    try:
        if out is not None:
            saved = report.save(out)
            written.append(f"Report: {out}")
        if html is not None:
            from depthscope.views.report_page import write_page

            write_page(html, report)
            written.append(f"Page:   {html}")
    except ReportError as error:
        failure = ReportError(f"{error}{_safe(report, saved)}")
    try:
        if not quiet:
            print_report(report, terminal())
        for line in written:
            say(line)
    except BrokenPipeError:  # the reader closed the pipe
        raise
    except OSError as error:
        failure = failure or ReportError(f"cannot write the standard output: {reason(error)}.{_safe(report, saved)}")
    if failure is not None:
        raise failure


def _safe(report: "LayerReport", saved: Path | None) -> str:
    """Save a report that could not be delivered in a temporary folder, and say where it is."""
    if saved is None:
        try:
            folder = Path(tempfile.mkdtemp(prefix="depthscope-"))
        except OSError:
            return ""
        try:
            saved = report.save(folder / "report.json")
        except ReportError:
            folder.rmdir()
            return ""
    return f" The measurements are safe in {saved}."


def require_places(*places: Path | None) -> None:
    """Refuse outputs that cannot be written, before hours of work are spent."""
    for place in places:
        if place is None:
            continue
        if place.is_dir():
            raise ReportError(f"{place} is a folder; give the name of a file to write.")
        if not place.absolute().parent.is_dir():
            raise ReportError(f"The folder {place.absolute().parent} does not exist; create it, or write elsewhere.")


def _share_or_word(pairs: str) -> "float | str":
    try:
        return float(pairs)
    except ValueError:
        return pairs


def _count_or_word(probes: str) -> "int | str":
    try:
        return int(probes)
    except ValueError:
        return probes
