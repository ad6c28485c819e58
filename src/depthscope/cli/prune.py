"""`depthscope prune`: layers removed from a model by a plan."""

from pathlib import Path
from typing import Annotated

import typer

from depthscope.cli.options import (
    OUTPUT,
    TEXT,
    AttnImplementation,
    BlockSize,
    Bos,
    Column,
    Dataset,
    Device,
    Dtype,
    Model,
    Quiet,
    Revision,
    Split,
    Text,
    TrustRemoteCode,
)
from depthscope.cli.paths import FILLS, READS, WRITES
from depthscope.cli.shared import app, errors_for_people, say
from depthscope.console.terminal import terminal
from depthscope.errors import SettingsError

WHAT = "What to remove"  # a panel of the help


@app.command()
def prune(
    model: Model,
    layers: Annotated[int | None, typer.Option(help="How many layers to remove.", rich_help_panel=WHAT)] = None,
    max_loss: Annotated[
        float | None,
        typer.Option(help="Remove layers while the loss stays at most this, nats per token.", rich_help_panel=WHAT),
    ] = None,
    keep_parameters: Annotated[
        float | None,
        typer.Option(help="Remove layers while this share of the parameters is left: 0.8.", rich_help_panel=WHAT),
    ] = None,
    by: Annotated[
        str,
        typer.Option(
            help="How layers are chosen: repaired or greedy (the loss measured again after each removal, with a map "
            "over the gap or without), skip, usefulness, block_influence (one shot), or angular (a run of layers).",
            rich_help_panel=WHAT,
        ),
    ] = "repaired",
    candidates: Annotated[
        int | None,
        typer.Option(
            help="Choose among so many layers, the cheapest at the removal before; default: all.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    repair: Annotated[
        str,
        typer.Option(
            help="weights fits the matrix before each gap anew, without training; none; auto takes the lower loss.",
            rich_help_panel=WHAT,
        ),
    ] = "auto",
    plan: Annotated[
        Path | None,
        typer.Option(help="Carry out this plan, on the same text, instead of making one.", rich_help_panel=WHAT),
        READS,
    ] = None,
    text: Text = None,
    dataset: Dataset = None,
    column: Column = None,
    split: Split = None,
    fit_blocks: Annotated[
        int, typer.Option(help="Blocks at the start of the text that repairs are fitted on.", rich_help_panel=TEXT)
    ] = 32,
    choose_blocks: Annotated[
        int, typer.Option(help="Blocks after those, that layers are chosen on.", rich_help_panel=TEXT)
    ] = 8,
    eval_blocks: Annotated[
        int, typer.Option(help="Blocks after those, that the losses in the plan are of.", rich_help_panel=TEXT)
    ] = 16,
    block_size: BlockSize = 256,
    bos: Bos = "auto",
    seed: Annotated[int, typer.Option(help="Seed of sampled positions.", rich_help_panel=WHAT)] = 0,
    exact_losses: Annotated[
        bool,
        typer.Option("--exact-losses", help="Compute losses from all logits, as in analyze.", rich_help_panel=WHAT),
    ] = False,
    dtype: Dtype = "auto",
    device: Device = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    attn_implementation: AttnImplementation = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Write the smaller model and the plan into this new folder.", rich_help_panel=OUTPUT),
        FILLS,
    ] = None,
    plan_only: Annotated[
        Path | None,
        typer.Option(help="Write the plan into this file, and cut nothing.", metavar="FILE", rich_help_panel=OUTPUT),
        WRITES,
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Remove layers from MODEL, repair what that breaks, and save a smaller model of the same class.

    The plan is printed as a table: after each removal the loss with nothing in the gaps, with other weights in the
    layer before each (what is saved), and with an affine map over each, on text that nothing was chosen or fitted on.
    """
    with errors_for_people():
        if text and dataset:
            raise SettingsError("Both --text and --dataset were given; choose one.")
        if (out is None) == (plan_only is None):
            raise SettingsError("Give --out FOLDER for the smaller model, or --plan-only FILE for the plan alone.")
        if plan is not None and plan_only is not None:
            raise SettingsError("Both --plan and --plan-only were given: there is nothing to do.")
        from depthscope.report.cut_plan import CutPlan

        made = None if plan is None else CutPlan.load(plan)
        from depthscope.loading.load import load_model
        from depthscope.surgery import plan_cut
        from depthscope.surgery import prune as carry_out
        from depthscope.surgery.plans.choosing import require_criterion
        from depthscope.surgery.pruning import require_repair
        from depthscope.surgery.save import require_new
        from depthscope.text.blocks import load_blocks
        from depthscope.views.plan_terminal import print_plan

        require_criterion(by)
        require_repair(repair)
        if out is not None:
            require_new(out)
        loaded = load_model(
            model,
            revision=revision,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            attn_implementation=attn_implementation,
            offload=False,
        )
        sizes = {"fit_blocks": fit_blocks, "choose_blocks": choose_blocks, "eval_blocks": eval_blocks}
        if made is not None:
            sizes = {name: int(str(made.settings[name])) for name in sizes}
            block_size = int(str(made.settings["block_size"]))
        blocks = load_blocks(
            text,
            loaded.require_tokenizer(),
            num_blocks=sum(sizes.values()),
            block_size=block_size,
            dataset=dataset,
            column=column,
            split=split,
            bos=bos,
        )
        if made is None:
            made = plan_cut(
                loaded.model,
                blocks,
                layers=layers,
                max_loss=max_loss,
                keep_parameters=keep_parameters,
                by=by,
                candidates=candidates,
                exact_losses=exact_losses,
                seed=seed,
                facts=loaded.facts,
                progress=not quiet,
                **sizes,
            )
            layers = None
        if not quiet:
            print_plan(made, terminal())
        if plan_only is not None:
            made.save(plan_only)
            say(f"Plan: {plan_only}")
            return
        assert out is not None
        proof = carry_out(
            loaded.model,
            made,
            out,
            layers=layers,
            blocks=blocks,
            repair=repair,  # type: ignore[arg-type]
            tokenizer=loaded.tokenizer,
        )
        say(
            f"Model: {out} (proved: logits to {proof.difference:.1g} of the largest, {proof.new_tokens} tokens decoded "
            "alike with and without a cache, the same in a fresh process)"
        )
