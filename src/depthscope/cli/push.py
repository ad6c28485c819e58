"""`depthscope push`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.filesize import decimal
from rich.table import Table

from depthscope.cli.paths import FILLS, READS
from depthscope.cli.shared import app, errors_for_people, say
from depthscope.console.terminal import terminal

if TYPE_CHECKING:
    from depthscope.hub.push import Publication

CARD, COLLECTION, WHAT = "On the cards", "Collection", "What is pushed"


@app.command()
def push(
    source: Annotated[
        Path,
        typer.Argument(help="A sweep, one of its points, a Trainer's run, or a saved model.", metavar="DIR"),
        READS,
    ],
    to: Annotated[
        str, typer.Option(help="A user or an organisation on the Hub; for a single run also NAMESPACE/NAME.")
    ],
    private: Annotated[bool, typer.Option("--private", help="Make the repositories private.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Push nothing: write the files to --out, and list them.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="The folder of --dry-run; DIR-push by default."), FILLS] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace files on the Hub that somebody else made or changed.")
    ] = False,
    native: Annotated[
        bool,
        typer.Option(
            "--native",
            help="Also push each model as a Llama, Mixtral, ... in another repository.",
            rich_help_panel=WHAT,
        ),
    ] = False,
    steps: Annotated[
        bool, typer.Option(help="Push the training checkpoints as branches step<N>.", rich_help_panel=WHAT)
    ] = True,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Only these points or variants of a sweep; * matches anything.", rich_help_panel=WHAT),
    ] = None,
    license: Annotated[
        str | None, typer.Option(help="The Hub's name of the license: apache-2.0, mit, ...", rich_help_panel=CARD)
    ] = None,
    language: Annotated[
        list[str] | None, typer.Option(help="Language codes: en, de, ..., code.", rich_help_panel=CARD)
    ] = None,
    dataset: Annotated[
        list[str] | None, typer.Option(help="Datasets on the Hub that the model was trained on.", rich_help_panel=CARD)
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="The model on the Hub that a run started from.", rich_help_panel=CARD)
    ] = None,
    collection: Annotated[
        str | None,
        typer.Option(help="Title of the collection; by default the name of a sweep.", rich_help_panel=COLLECTION),
    ] = None,
    space: Annotated[
        str | None, typer.Option(help="A Space that the collection lists.", rich_help_panel=COLLECTION)
    ] = None,
) -> None:
    """Publish DIR on the Hugging Face Hub: models with cards, training checkpoints, reports, a collection.

    Only files that differ from those on the Hub are sent, each branch in one commit. Run it again to continue after a
    failure. Log in first with hf auth login, or set HF_TOKEN.
    """
    with errors_for_people("The Hub holds complete commits only; run the same command again to continue."):
        from depthscope.hub.push import push as publish

        publication = publish(
            source,
            to,
            private=private,
            native=native,
            steps=steps,
            license=license,
            language=language or (),
            datasets=dataset or None,
            base_model=base_model,
            only=only or (),
            space=space,
            collection=collection,
            overwrite=overwrite,
            dry_run=(out or Path(f"{source.resolve().name}-push")) if dry_run else None,
        )
        if publication.folder:
            _list_files(publication, publication.folder)
        else:
            _list_revisions(publication)
        for note in publication.notes:
            say(note)


def _list_files(publication: "Publication", folder: Path) -> None:
    from depthscope.hub.tree import MANIFEST

    for tree in publication.plan.trees:
        root = tree.folder(folder)
        say(f"{tree.repo_id if tree.kind == 'model' else f'{tree.kind}s/{tree.repo_id}'} ({tree.revision})")
        for path in sorted([*tree.files, MANIFEST]):
            say(f"  {decimal((root / path).stat().st_size):>11}  {path}")
    if publication.plan.collection:
        items = ", ".join(f"{item.kind} {item.item_id}" for item in publication.plan.collection.items)
        say(f"Collection {publication.plan.collection.title!r}: {items}")
    say(f"Nothing was pushed; the files are in {folder}.")


def _list_revisions(publication: "Publication") -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("repository", "branch", "commit", "files"):
        table.add_column(name, overflow="fold")
    for pushed in publication.revisions:
        repository = pushed.repo_id if pushed.kind == "model" else f"{pushed.kind}s/{pushed.repo_id}"
        changed = f"{pushed.written} written" + (f", {pushed.removed} removed" if pushed.removed else "")
        table.add_row(repository, pushed.revision, pushed.commit[:7], changed if pushed.is_changed else "unchanged")
    terminal().print(table)
    if publication.collection:
        say(f"Collection: {publication.collection}")


__all__ = ["push"]
