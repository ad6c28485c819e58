"""`depthscope sparsity`."""

from pathlib import Path
from typing import Annotated

import typer

from depthscope.cli.analysis import deliver, require_places
from depthscope.cli.options import (
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
from depthscope.cli.paths import WRITES
from depthscope.cli.shared import app, errors_for_people
from depthscope.errors import SettingsError


@app.command()
def sparsity(
    model: Model,
    text: Text = None,
    dataset: Dataset = None,
    column: Column = None,
    split: Split = None,
    blocks: Annotated[int, typer.Option(help="Blocks of text to measure on.", rich_help_panel=TEXT)] = 8,
    block_size: BlockSize = 256,
    bos: Bos = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the sampled queries.", rich_help_panel=TEXT)] = 0,
    dtype: Dtype = "auto",
    device: Device = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    attn_implementation: AttnImplementation = None,
    base_model: BaseModel = None,
    out: ReportOut = None,
    html: Annotated[
        Path | None, typer.Option(help="Write a page of the report.", rich_help_panel=OUTPUT), WRITES
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Measure the sparsity of MODEL per layer: small weights, unattended positions, unused experts."""
    with errors_for_people():
        if text and dataset:
            raise SettingsError("Both --text and --dataset were given; choose one.")
        require_places(out, html)
        from depthscope.analysis.analyze import analyze
        from depthscope.processes import Processes
        from depthscope.settings import SPARSITY_NAMES, Settings

        report = analyze(
            model,
            text=text,
            dataset=dataset,
            column=column,
            split=split,
            settings=Settings(
                scores=SPARSITY_NAMES, fit_blocks=0, eval_blocks=blocks, block_size=block_size, bos=bos, seed=seed
            ),
            revision=revision,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            attn_implementation=attn_implementation,
            base_model=base_model,
            progress=not quiet,
        )
        if Processes.here().is_main:
            deliver(report, out, html, quiet)
