"""Planning a push: from a folder to the trees of its repositories and a collection.

    a sweep         one repository per finished point, a data set with the reports, a collection
    a run           one repository: a point of a sweep, the output folder of a Trainer, or a saved model

`main` is the trained model with its card; the training checkpoints are the branches step0, step1, step2, ... With
`native`, a model that an architecture of transformers expresses exactly gets a second repository, `<name>-native`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from depthscope.errors import ConversionError, HubError, SettingsError
from depthscope.files.atomic import reason
from depthscope.files.checksums import damaged_file
from depthscope.files.validation import read_object
from depthscope.hub.cards.data import DepthCardData
from depthscope.hub.cards.figures import write_figures
from depthscope.hub.cards.read import read_card_data
from depthscope.hub.cards.render import render_card
from depthscope.hub.collection import LONGEST_TITLE, PAPER, CollectionPlan, Item
from depthscope.hub.errors import require_repository_name
from depthscope.hub.layer_stats import PARQUET, write_layer_stats
from depthscope.hub.model_files import find_steps, model_files
from depthscope.hub.names import model_repository, step_branch
from depthscope.hub.reports_dataset import Reported, reports_tree
from depthscope.hub.tree import MAIN, Tree
from depthscope.loading.checkpoint import CONFIG
from depthscope.runs.finished_files import known_checksums
from depthscope.runs.layout import (
    CHECKSUMS,
    FINISHED,
    HISTORY,
    MODEL,
    NOT_RUN,
    POINT,
    REPORTS,
    RESULT,
    SWEEP_INDEX,
    point_folder,
)
from depthscope.wording.messages import one_line

__all__ = ["Options", "PushPlan", "check_names", "make_plan"]

NATIVE = "-native"


@dataclass(frozen=True)
class Options:
    """The options of a push; see `depthscope.push`."""

    native: bool = False
    steps: bool = True
    license: str | None = None
    language: Sequence[str] = ()
    datasets: Sequence[str] | None = None
    base_model: str | None = None
    only: Sequence[str] = ()
    space: str | None = None
    collection: str | None = None


@dataclass
class PushPlan:
    """The trees of each repository, with `main` last; a collection; and notes for the user."""

    repositories: list[list[Tree]] = field(default_factory=list)
    collection: CollectionPlan | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def trees(self) -> list[Tree]:
        """All trees."""
        return [tree for trees in self.repositories for tree in trees]


def make_plan(source: Path, to: str, work: Path, options: Options) -> PushPlan:
    """Plan the push of a folder, and write the files made for the Hub (cards, figures, exports) to `work`.

    Args:
        source: the folder of a sweep or a run.
        to: a namespace; for a run also `namespace/name`.
        work: an empty folder that must exist until the trees are pushed.
        options: the options of the push.

    Raises:
        HubError: there is nothing to publish.
        SettingsError: the Hub would refuse a value, or two models would get the same repository.
        ReportError: a file is damaged.
    """
    if not source.is_dir():
        raise SettingsError(f"There is no folder {str(source)!r}: give the folder of a sweep or of a run.")
    source = source.resolve()  # gives `.` and links their real names
    namespace, _, name = to.partition("/")
    plan = PushPlan()
    if (source / SWEEP_INDEX).is_file():
        if name:
            raise SettingsError(f"A sweep becomes several repositories: give --to {namespace}, without a name.")
        _add_sweep(plan, source, namespace, work, options)
    else:
        _add_run(plan, source, to if name else f"{namespace}/{_run_name(source, namespace)}", work, options)
    _require_different(plan)
    return plan


def check_names(to: str, space: str | None = None) -> None:
    """Refuse a destination or a Space whose name the Hub would refuse.

    Raises:
        SettingsError: the name is not allowed.
    """
    if not isinstance(to, str):
        raise SettingsError(f"to is {to!r}; give a user or an organisation on the Hub, or namespace/name.")
    namespace, _, name = to.partition("/")
    require_repository_name(f"{namespace}/{name or 'name'}", f"--to {to!r}")
    if space is not None:
        require_repository_name(space, f"--space {space!r}")


# ------------------------------------------------------------------------------------------------------------- a sweep


def _add_sweep(plan: PushPlan, source: Path, namespace: str, work: Path, options: Options) -> None:
    index = read_object(source / SWEEP_INDEX)
    sweep = str(index.get("name") or source.name)
    listed = [point for point in index.get("points") or [] if isinstance(point, dict)]
    selected = [point for point in listed if _is_selected(point, options.only)]
    if options.only and not selected:
        names = ", ".join(str(point.get("point")) for point in listed)
        raise SettingsError(f"--only {' '.join(options.only)} matches no point. The points are {names}.")
    points, unfinished = [], []
    for facts in selected:
        folder = point_folder(source, _folder_name(str(facts.get("point"))))
        status = read_object(folder / RESULT).get("status", NOT_RUN)
        if status == FINISHED and (folder / MODEL).is_dir():
            points.append(Reported(folder, facts, model_repository(namespace, sweep, str(facts["point"]))))
        else:
            unfinished.append(f"{facts.get('point')} ({status})")
    if not points:
        raise HubError(f"No point of the sweep in {str(source)!r} is finished: run it first (depthscope sweep run).")
    if unfinished:
        plan.notes.append(f"Left out, since they are not finished: {', '.join(unfinished)}.")
    has_reports = any((point.folder / name).is_file() for point in points for name in REPORTS)
    reports = model_repository(namespace, sweep, "reports") if has_reports else None
    for number, point in enumerate(points):
        _add_model(plan, point.folder, point.repo_id, work / f"{number}", options, reports_dataset=reports)
    models = [trees[-1].repo_id for trees in plan.repositories]
    items = [Item("paper", PAPER), *(Item("model", repo_id) for repo_id in models)]
    if reports:
        reports_branch = reports_tree(points, reports, work / "reports", sweep=sweep, license=options.license)
        plan.repositories.append([reports_branch])
        items.append(Item("dataset", reports))
    if options.space:
        items.append(Item("space", options.space))
    title = options.collection or f"depthscope: {sweep}"[:LONGEST_TITLE].strip()
    plan.collection = CollectionPlan(namespace, title, tuple(items))


def _is_selected(point: dict[str, Any], only: Sequence[str]) -> bool:
    names = (str(point.get("point")), str(point.get("variant")))
    return not only or any(fnmatch(name, pattern) for name in names for pattern in only)


def _folder_name(point: str) -> str:
    if Path(point).name != point or point in ("", ".", ".."):
        raise HubError(
            f"{SWEEP_INDEX} names the point {point!r}, which is not the name of a folder; the file is damaged."
        )
    return point


# --------------------------------------------------------------------------------------------------------------- a run


def _add_run(plan: PushPlan, source: Path, repo_id: str, work: Path, options: Options) -> None:
    if options.only:
        raise SettingsError("--only chooses points of a sweep; this is one run.")
    _add_model(plan, source, repo_id, work, options, reports_dataset=None)
    if options.collection or options.space:
        items = [Item("paper", PAPER), *(Item("model", trees[-1].repo_id) for trees in plan.repositories)]
        items += [Item("space", options.space)] if options.space else []
        namespace, _, name = repo_id.partition("/")
        title = options.collection or f"depthscope: {name}"[:LONGEST_TITLE].strip()
        plan.collection = CollectionPlan(namespace, title, tuple(items))


def _run_name(source: Path, namespace: str) -> str:
    """The name of a run's repository: the folder's name; for a point of a sweep, the sweep's name comes before it."""
    index = read_object(source.parent.parent / SWEEP_INDEX) if (source / POINT).is_file() else {}
    if index:
        return model_repository(namespace, str(index.get("name")), source.name).partition("/")[2]
    return source.name


# ------------------------------------------------------------------------------------------------------------- a model


def _add_model(
    plan: PushPlan, folder: Path, repo_id: str, work: Path, options: Options, *, reports_dataset: str | None
) -> None:
    require_repository_name(repo_id, f"the repository {repo_id!r}")
    model = folder / MODEL if (folder / MODEL).is_dir() else folder
    files = model_files(model)
    _require_whole(folder, model, files)
    steps = find_steps(folder) if options.steps else {}
    work.mkdir(parents=True, exist_ok=True)
    native = _export(plan, model, repo_id, work / "native") if options.native else None
    shared: dict[str, Any] = {
        "license": options.license,
        "language": options.language,
        "datasets": options.datasets,
        "reports_dataset": reports_dataset,
    }
    data = read_card_data(
        folder,
        repo_id=repo_id,
        base_model=options.base_model,
        native_repo=repo_id + NATIVE if native else None,
        revisions=[step_branch(step) for step in steps],
        **shared,
    )
    measured = _measured(folder, work)
    branches = [Tree(repo_id, "model", step_branch(step), model_files(path)) for step, path in steps.items()]
    plan.repositories.append([*branches, Tree(repo_id, "model", MAIN, files | measured | _card(data, work / "card"))])
    if native is not None:
        config = read_object(native / CONFIG)
        derived = read_card_data(folder, repo_id=repo_id + NATIVE, base_model=repo_id, **shared)
        derived = derived.model_copy(update={"config": config})
        reports = {name: path for name, path in measured.items() if name in REPORTS}
        exported = model_files(native) | reports | _card(derived, work / "native-card")
        plan.repositories.append([Tree(repo_id + NATIVE, "model", MAIN, exported)])


def _require_whole(folder: Path, model: Path, files: Mapping[str, Path]) -> None:
    """Refuse a trained model whose files do not match their checksums, if it has any."""
    sums = known_checksums(folder) or {}
    expected = {name.removeprefix(f"{MODEL}/"): value for name, value in sums.items() if name.startswith(f"{MODEL}/")}
    missing = [name for name in expected if not (model / name).is_file()]
    try:
        changed = damaged_file(model, {name: value for name, value in expected.items() if name in files})
    except OSError as error:
        raise HubError(f"the model in {model} cannot be read: {reason(error)}.") from error
    if name := next(iter(missing), changed):
        problem = "is missing" if missing else "has changed since the model was trained"
        raise HubError(
            f"{model / name} {problem}. Run the sweep again, which trains a damaged model again; or, if you changed "
            f"it on purpose, delete {folder / CHECKSUMS}."
        )


def _measured(folder: Path, work: Path) -> dict[str, Path]:
    files = {name: folder / name for name in REPORTS if (folder / name).is_file()}
    if (folder / HISTORY).is_file():
        write_layer_stats(folder / HISTORY, work / PARQUET)
        files[PARQUET] = work / PARQUET
    return files


def _card(data: DepthCardData, work: Path) -> dict[str, Path]:
    work.mkdir(parents=True)
    drawn = write_figures(work, data)
    (work / "README.md").write_text(str(render_card(data)), encoding="utf-8")
    return {path.relative_to(work).as_posix(): path for path in [work / "README.md", *drawn]}


def _export(plan: PushPlan, model: Path, repo_id: str, out: Path) -> Path | None:
    """The native export of a model; None, with a note, if there is no exact one."""
    from depthscope.conversion.checkpoint import convert_checkpoint  # a slow import: torch and transformers

    try:
        convert_checkpoint(str(model), out, to="native")
    except ConversionError as error:
        plan.notes.append(f"{repo_id} has no native export: {one_line(error)}")
        return None
    return out


# -------------------------------------------------------------------------------------------------------------- checks


def _require_different(plan: PushPlan) -> None:
    """Refuse names that differ only by case, which the Hub treats as equal."""
    seen: dict[tuple[str, str], str] = {}
    for trees in plan.repositories:
        repo_id, kind = trees[-1].repo_id, trees[-1].kind
        if (first := seen.setdefault((kind, repo_id.lower()), repo_id)) is not repo_id:
            raise SettingsError(f"{first} and {repo_id} would be the same repository: rename a point.")
