"""`depthscope convert` and `presets`."""

from pathlib import Path
from typing import Annotated

import typer

from depthscope.cli.options import HOW, AttnImplementation, BaseModel, Model, Revision, TrustRemoteCode
from depthscope.cli.paths import FILLS
from depthscope.cli.shared import app, errors_for_people, say
from depthscope.console.terminal import terminal

SHAPE = "Another shape"  # a panel of the help


@app.command()
def convert(
    model: Model,
    out: Annotated[Path, typer.Argument(help="The folder to write; it must not exist yet.", metavar="OUT"), FILLS],
    to: Annotated[
        str,
        typer.Option(help="depthlm; native (the architecture that expresses it); or one by name: llama, olmoe, ..."),
    ] = "native",
    kv_heads: Annotated[
        int | None,
        typer.Option(help="Key and value heads: averaged in groups, or repeated.", rich_help_panel=SHAPE),
    ] = None,
    experts: Annotated[
        int | None, typer.Option(help="Turn a dense model into one with this many experts.", rich_help_panel=SHAPE)
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Experts per token, with --experts.", rich_help_panel=SHAPE)] = None,
    layers: Annotated[
        int | None, typer.Option(help="Grow to this many layers by stacking copies.", rich_help_panel=SHAPE)
    ] = None,
    preserve_function: Annotated[
        bool,
        typer.Option("--preserve-function", help="Start added layers as the identity.", rich_help_panel=SHAPE),
    ] = False,
    dtype: Annotated[
        str,
        typer.Option(
            help="float32, bfloat16, float16, or auto: the checkpoint's own if that is exact.",
            rich_help_panel=HOW,
        ),
    ] = "auto",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    attn_implementation: AttnImplementation = None,
    base_model: BaseModel = None,
) -> None:
    """Turn MODEL into a DepthLM or into a native architecture, exactly, or give it another shape.

    Exact means that the logits differ only by rounding. This is checked before anything is written, and a model
    that cannot be converted exactly is refused. Averaged heads and stacked layers need further training.
    """
    with errors_for_people():
        from depthscope.conversion.checkpoint import TargetShape, convert_checkpoint

        shape = TargetShape(kv_heads, experts, top_k, layers, preserve_function)
        with terminal(stderr=True).status("Starting") as status:
            lines = convert_checkpoint(
                model,
                out,
                to=to,
                shape=shape,
                dtype=dtype,
                revision=revision,
                trust_remote_code=trust_remote_code,
                attn_implementation=attn_implementation,
                base_model=base_model,
                stage=status.update,
            )
        for line in lines:
            say(line)


@app.command()
def presets(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
) -> None:
    """List the named shapes of DepthLM, with their parameters and training FLOPs."""
    with errors_for_people():
        from depthscope.models.preset_table import preset_markdown, preset_table

        if markdown:
            typer.echo(preset_markdown())
        else:
            terminal().print(preset_table())
