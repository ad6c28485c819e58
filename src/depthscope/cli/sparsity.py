"""`depthscope sparsity`."""

from pathlib import Path
from typing import Annotated

import typer

from depthscope.cli.analysis import deliver, require_places
from depthscope.cli.shared import app, errors_for_people
from depthscope.errors import SettingsError

TEXT, HOW, OUTPUT = "Text", "Model and device", "Output"


@app.command()
def sparsity(
    model: Annotated[
        str, typer.Argument(help="A Hub id, a folder, a [bold].gguf[/] file or a PEFT adapter folder.", metavar="MODEL")
    ],
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="Text file or directory; may be given several times. Default: Python's own library source.",
            rich_help_panel=TEXT,
        ),
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="A datasets name, or name:config, instead of --text.", rich_help_panel=TEXT)
    ] = None,
    column: Annotated[str | None, typer.Option(help="The column that holds the text.", rich_help_panel=TEXT)] = None,
    split: Annotated[str | None, typer.Option(help="The split of the dataset.", rich_help_panel=TEXT)] = None,
    blocks: Annotated[int, typer.Option(help="Blocks of text to measure on.", rich_help_panel=TEXT)] = 8,
    block_size: Annotated[int, typer.Option(help="Tokens in a block.", rich_help_panel=TEXT)] = 256,
    seed: Annotated[int, typer.Option(help="Seed of the sampled queries.", rich_help_panel=TEXT)] = 0,
    dtype: Annotated[
        str, typer.Option(help="auto, float32, bfloat16 or float16; auto is float32 on a CPU.", rich_help_panel=HOW)
    ] = "auto",
    device: Annotated[
        str | None,
        typer.Option(help="cpu, cuda, cuda:1, mps, or auto to split over several devices.", rich_help_panel=HOW),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.", rich_help_panel=HOW)] = None,
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="Run the code in the model's repository.", rich_help_panel=HOW),
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Write the report as JSON.", rich_help_panel=OUTPUT)] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page of the report.", rich_help_panel=OUTPUT)] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No table, no progress.", rich_help_panel=OUTPUT)] = False,
) -> None:
    """Measure the sparsity at work in MODEL: small weights, unattended positions, experts at rest, by layer."""
    with errors_for_people():
        if text and dataset:
            raise SettingsError("Both --text and --dataset were given; choose one.")
        require_places(out, html)
        from depthscope.analysis import analyze
        from depthscope.processes import Processes
        from depthscope.settings import SPARSITY_NAMES, Settings

        report = analyze(
            model,
            text=text,
            dataset=dataset,
            column=column,
            split=split,
            settings=Settings(
                scores=SPARSITY_NAMES, fit_blocks=0, eval_blocks=blocks, block_size=block_size, seed=seed
            ),
            revision=revision,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            progress=not quiet,
        )
        if Processes.here().is_main:
            deliver(report, out, html, quiet)
