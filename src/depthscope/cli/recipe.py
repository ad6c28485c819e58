"""`depthscope recipe`."""

from pathlib import Path
from typing import Annotated

import typer

from depthscope.cli.paths import FILLS
from depthscope.cli.shared import app, errors_for_people, say
from depthscope.console.terminal import terminal

BUDGET, LIMITS, MODEL = "Budget (one of the first three)", "Limits", "The model"


@app.command()
def recipe(
    layers: Annotated[int, typer.Option(help="Decoder layers.")],
    width: Annotated[int, typer.Option(help="Hidden size.")],
    tokens: Annotated[float | None, typer.Option(help="Training tokens, such as 5e9.", rich_help_panel=BUDGET)] = None,
    flops: Annotated[float | None, typer.Option(help="Floating-point operations.", rich_help_panel=BUDGET)] = None,
    gpu_hours: Annotated[float | None, typer.Option(help="Hours of one GPU.", rich_help_panel=BUDGET)] = None,
    gpu: Annotated[str, typer.Option(help="GPU model.", rich_help_panel=BUDGET)] = "h100",
    utilisation: Annotated[
        float, typer.Option(help="Share of the peak that training reaches.", rich_help_panel=BUDGET)
    ] = 0.4,
    gpus: Annotated[int, typer.Option(help="GPUs that share the training.", rich_help_panel=LIMITS)] = 1,
    memory: Annotated[
        float | None, typer.Option(help="GB per GPU; limits the number of experts.", rich_help_panel=LIMITS)
    ] = None,
    max_length: Annotated[int | None, typer.Option(help="Longest sequence, in tokens.", rich_help_panel=LIMITS)] = None,
    dense: Annotated[bool, typer.Option("--dense", help="No experts.", rich_help_panel=LIMITS)] = False,
    heads: Annotated[
        int | None, typer.Option(help="Attention heads; chosen from the width by default.", rich_help_panel=LIMITS)
    ] = None,
    head_multiple: Annotated[
        int,
        typer.Option(help="Heads and KV heads are multiples of this (tensor parallelism).", rich_help_panel=LIMITS),
    ] = 1,
    vocab_size: Annotated[int, typer.Option(help="Entries of the tokenizer.", rich_help_panel=MODEL)] = 50304,
    norm_scaling: Annotated[
        str, typer.Option(help="none, or depth: LayerNorm Scaling.", rich_help_panel=MODEL)
    ] = "none",
    depth_scaled_init: Annotated[
        bool,
        typer.Option("--depth-scaled-init", help="Shrink the initialisation with depth.", rich_help_panel=MODEL),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Write config.json, training_arguments.json, sweep.yaml and recipe.md to this folder."),
        FILLS,
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
) -> None:
    """Turn a depth, a width and a budget into a model and its training, with the evidence for each choice.

    The rule of thumb of arXiv 2603.15389: long sequences, weight decay, grouped queries, experts. A star marks values
    that the paper did not test.
    """
    with errors_for_people():
        from depthscope.recipes import recipe as make_recipe
        from depthscope.recipes.tables import print_recipe, recipe_markdown
        from depthscope.recipes.write import write_recipe

        chosen = make_recipe(
            layers,
            width,
            tokens=tokens,
            flops=flops,
            gpu_hours=gpu_hours,
            gpu=gpu,
            gpus=gpus,
            utilisation=utilisation,
            memory=memory,
            heads=heads,
            head_multiple=head_multiple,
            dense=dense,
            max_length=max_length,
            vocab_size=vocab_size,
            norm_scaling=norm_scaling,
            depth_scaled_init=depth_scaled_init,
        )
        written = [] if out is None else write_recipe(chosen, out)
        if markdown:
            typer.echo(recipe_markdown(chosen), nl=False)
        else:
            print_recipe(chosen, terminal())
        if written and not markdown:
            say(f"Written to {out}: {', '.join(path.name for path in written)}.")


__all__ = ["recipe"]
