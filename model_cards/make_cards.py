"""The cards of the checkpoints that this project releases, those of its study.

    python model_cards/make_cards.py                              # records -> cards and figures (make cards)
    python model_cards/make_cards.py --sweep DIR --namespace NAME # first make records of a sweep's finished points

`records/<name>.json` is what a card is made from, `<name>.md` the card, `figures/<name>/` its figures, `README.md` a
table of all. On the Hub a card is the README.md of its own repository, with its figures in `figures/`.
"""

from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated

import typer

from depthscope.console.quiet import quiet
from depthscope.conversion import to_native
from depthscope.errors import ConversionError, DepthscopeError
from depthscope.files.atomic import write_atomically
from depthscope.hub.cards.data import DepthCardData
from depthscope.hub.cards.figures import figure_names, write_figures
from depthscope.hub.cards.read import read_card_data
from depthscope.hub.cards.render import render_card
from depthscope.hub.names import model_repository
from depthscope.models import DepthLMForCausalLM
from depthscope.runs.layout import MODEL
from depthscope.sweep.report.results import load_results
from depthscope.wording.numbers import format_number, format_with_error

HERE = Path(__file__).parent
RECORDS, FIGURES, INDEX = "records", "figures", "README.md"
COLUMNS = ("variance_growth", "skip_ratio", "usefulness_ratio", "causal", "permutation")


def rendered(place: Path = HERE) -> dict[str, str]:
    """Every file of text that belongs beside the records in a folder, by name."""
    records = read_records(place)
    cards = {f"{name}.md": str(render_card(data, f"{FIGURES}/{name}")) for name, data in records.items()}
    return cards | {INDEX: index(records)}


def read_records(place: Path) -> dict[str, DepthCardData]:
    """The records in a folder, by name."""
    return {path.stem: DepthCardData.load(path) for path in sorted((place / RECORDS).glob("*.json"))}


def index(records: dict[str, DepthCardData]) -> str:
    """A table of all cards."""
    lines = [
        "# Checkpoints of the study",
        "",
        "Cards of checkpoints of the study ([docs/study.md](../docs/study.md)), as `depthscope push` publishes them,",
        "made by `make cards` from `records/`. Layers count from 0; losses are in nats a token, on held-out text.",
        "",
    ]
    if not records:
        return "\n".join([*lines, "There are none yet."]) + "\n"
    heads = ["layers", "parameters", "tokens", "loss", "variance growth", "skip", "linearise", "causal", "permutation"]
    lines += [f"| model | {' | '.join(heads)} |", f"| --- |{' ---: |' * len(heads)}"]
    for name, data in records.items():
        scores = data.report.scores if data.report else {}
        cells = [
            f"{data.num_layers or '–'}",
            f"{data.parameters:,}" if data.parameters else "–",
            f"{data.training.tokens:,}" if data.training.tokens else "–",
            format_number(data.evaluation.loss if data.evaluation else scores.get("loss")),
            *(format_with_error(scores.get(column), scores.get(f"{column}_se")) for column in COLUMNS),
        ]
        lines.append(f"| [{name}]({name}.md) | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def render(place: Path = HERE) -> None:
    """Write cards, figures and the table, and remove those of records that are gone."""
    texts = rendered(place)
    for name, text in texts.items():
        write_atomically(place / name, text)
    for path in place.glob("*.md"):
        if path.name not in texts:
            path.unlink()
    records = read_records(place)
    for name, data in records.items():
        for drawn in write_figures(place, data, f"{FIGURES}/{name}"):
            typer.echo(drawn.relative_to(place))
    wanted = {
        place / FIGURES / name / f"{figure}.png" for name, data in records.items() for figure in figure_names(data)
    }
    for path in place.glob(f"{FIGURES}/*/*.png"):
        if path not in wanted:
            path.unlink()


def record(
    sweep: Path,
    place: Path,
    *,
    only: Sequence[str] = (),
    namespace: str = "depthscope",
    license: str = "apache-2.0",
    language: Sequence[str] = (),
    native: bool = False,
) -> None:
    """Write the records of a sweep's finished points, of those that match one of the patterns."""
    results = load_results(sweep)
    for point in results.points:
        if only and not any(fnmatch(point.name, pattern) for pattern in only):
            continue
        if not point.finished:
            typer.echo(f"{point.name}: {point.status}, left out")
            continue
        folder = sweep / "points" / point.name
        repository = model_repository(namespace, results.name, point.name)
        steps = sorted(int(path.name.rpartition("-")[2]) for path in folder.glob("steps/step-*"))
        data = read_card_data(
            folder,
            repo_id=repository,
            license=license,
            language=language,
            native_repo=f"{repository}-native" if native and has_native_form(folder / MODEL) else None,
            revisions=[f"step{step}" for step in steps],
        )
        path = place / RECORDS / f"{repository.rpartition('/')[2]}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        typer.echo(data.save(path))


def has_native_form(folder: Path) -> bool:
    """Whether an architecture of transformers expresses a DepthLM exactly."""
    with quiet():
        model = DepthLMForCausalLM.from_pretrained(folder)
    try:
        to_native(model)
    except ConversionError:
        return False
    return True


def main(
    sweep: Annotated[Path | None, typer.Option(help="A folder of depthscope sweep run, to make records of.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="A point or a pattern of points; all by default.")] = None,
    namespace: Annotated[str, typer.Option(help="The user or organisation on the Hub.")] = "depthscope",
    license: Annotated[str, typer.Option(help="An identifier of the Hub.")] = "apache-2.0",
    language: Annotated[list[str] | None, typer.Option(help="Codes of languages; code for source code.")] = None,
    native: Annotated[bool, typer.Option("--native", help="There are exports to native architectures.")] = False,
) -> None:
    """Make the cards again from their records."""
    try:
        if sweep is not None:
            options = {"only": only or [], "namespace": namespace, "license": license, "language": language or []}
            record(sweep, HERE, **options, native=native)
        render(HERE)
    except DepthscopeError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error


if __name__ == "__main__":
    typer.run(main)
