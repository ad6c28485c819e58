"""Running a sweep: point after point, several at once in worker processes, or each on all processes of torchrun.

    OUT/sweep.yaml     the specification, with all that it extends
    OUT/sweep.json     the points and families, for readers of the results
    OUT/data/          the tokens (`depthscope.sweep.data`)
    OUT/points/        one folder per point (`depthscope.sweep.point`)
    OUT/report/        tables and the page (`depthscope.sweep.report.page`)

Finished points are skipped. A point that fails is recorded, the sweep continues, and the next run tries the point
again. A point that was measured with other settings is measured again from its trained model; one that was trained with
other settings is refused. A point that cannot be read is left unchanged and named in the report.
"""

import fnmatch
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from filelock import FileLock, Timeout

from depthscope.errors import SweepError
from depthscope.files.atomic import remove_leftovers, write_atomically
from depthscope.processes import Processes
from depthscope.runs.layout import (
    DATA,
    DATA_PART,
    DATA_RECORD,
    DIVERGED,
    FAILED,
    FINISHED,
    MODEL,
    POINTS,
    SWEEP_FILE,
    SWEEP_INDEX,
    UNREADABLE,
    point_folder,
)
from depthscope.sweep.cost.requirements import require_text_and_packages
from depthscope.sweep.data import Corpus, open_corpus, prepare_corpus
from depthscope.sweep.grid import Grid, Point, expand
from depthscope.sweep.point import forget_measurements, recorded_status, run_point, status_if_done
from depthscope.sweep.progress import SweepProgress, showing_points
from depthscope.sweep.recorded import Differences, differences, require_readable
from depthscope.sweep.specification import Specification, Sweep
from depthscope.sweep.workers import run_in_workers
from depthscope.wording.messages import listed

__all__ = ["Outcome", "default_folder", "describe", "run_sweep", "select"]

SCHEMA_VERSION = 1
POLL = 0.5  # seconds


@dataclass(frozen=True)
class Outcome:
    """The result of a sweep: the status per point, and the number of points that were skipped as finished."""

    out: Path
    statuses: dict[str, str]
    skipped: int

    @property
    def failed(self) -> list[str]:
        """The points that failed."""
        return [point for point, status in self.statuses.items() if status == FAILED]

    @property
    def unreadable(self) -> list[str]:
        """The points whose records are damaged; they were left unchanged."""
        return [point for point, status in self.statuses.items() if status == UNREADABLE]

    @property
    def diverged(self) -> list[str]:
        """The points whose losses or activations were not finite."""
        return [point for point, status in self.statuses.items() if status == DIVERGED]


def default_folder(sweep: Sweep) -> Path:
    """The default folder of a sweep."""
    return Path("sweeps") / sweep.specification.name


def select(sweep: Sweep, grid: Grid, only: Sequence[str]) -> list[Point]:
    """The points whose name, variant or family matches one of the patterns; all points without patterns.

    Raises:
        SweepError: a pattern matches nothing.
    """
    chosen: dict[str, Point] = {}
    for pattern in only:
        families = [family for family in grid.families if fnmatch.fnmatch(family.name, pattern)]
        variants = {variant for family in families for variant in family.variants}
        matches = [
            point
            for point in grid.points
            if point.variant in variants or any(fnmatch.fnmatch(name, pattern) for name in (point.name, point.variant))
        ]
        if not matches:
            names = ", ".join([*(family.name for family in grid.families), *(point.name for point in grid.points)])
            raise SweepError(f"--only {pattern} matches no point. The families and points are {names}.")
        chosen |= {point.name: point for point in matches}
    return [point for point in grid.points if not only or point.name in chosen]


def run_sweep(
    sweep: Sweep, out: Path | None = None, *, only: Sequence[str] = (), jobs: int | None = None, progress: bool = True
) -> Outcome:
    """Run the remaining points of a sweep.

    Args:
        sweep: the sweep.
        out: its folder; `sweeps/<name>` by default.
        only: names or patterns of points, variants or families; if empty, all points are run.
        jobs: points at once, each in its own process with a share of the cores, or a GPU; by default the hardware
            decides. Under torchrun every point runs on all processes.
        progress: whether to show progress on a terminal.

    Raises:
        SpecificationError: the grid is not allowed.
        SweepError: the folder cannot be used (not writable, damaged, trained with other settings, or in use by another
            process), or the processes of torchrun cannot share a step evenly.
        CorpusError: the text is missing or too short.
    """
    grid = expand(sweep)
    chosen = select(sweep, grid, only)
    out = default_folder(sweep) if out is None else out
    processes = Processes.here()
    _require_even_shares(chosen, processes.count)
    _keep_source(sweep, out)
    lock = FileLock(out / ".lock")
    if processes.is_main:
        require_text_and_packages(sweep, grid, out)
        _make_folder(out)
        _acquire(lock, out)
    try:
        if processes.is_main:
            for folder in (out, out / DATA, out / DATA_PART, *(out / POINTS).iterdir()):
                remove_leftovers(folder)
            _outdated_points(sweep, grid, chosen, out)  # refuses points before any text is tokenized
        with showing_points(len(chosen), visible=progress and processes.is_main) as progress_bar:
            if processes.is_main:
                corpus = prepare_corpus(sweep, grid, out, progress_bar.say)
                outdated = _outdated_points(sweep, grid, chosen, out, corpus)
                _discard_measurements(outdated, out, progress_bar.say)
                _write_index(sweep, grid, out, corpus)
            if processes.count > 1:
                _wait_for_tokens(out)
            progress_bar.begin()
            return _run_points(sweep.specification, grid, chosen, out, jobs, progress_bar, processes)
    finally:
        lock.release()


def _run_points(
    specification: Specification,
    grid: Grid,
    chosen: list[Point],
    out: Path,
    jobs: int | None,
    progress_bar: SweepProgress,
    processes: Processes,
) -> Outcome:
    statuses: dict[str, str] = {}
    to_do = []
    unreadable = _unreadable(chosen, out)
    for reason in unreadable.values():
        progress_bar.note(reason)
    for point in chosen:
        status = UNREADABLE if point.name in unreadable else status_if_done(point_folder(out, point.name))
        if status is None:
            to_do.append(point)
        else:
            statuses[point.name] = status
            progress_bar.finished(point.name, status, before=status != UNREADABLE)
    skipped = len(statuses) - len(unreadable)
    # All points of the grid count, not only the remaining ones, so that a point gets the same cores in every run.
    jobs = _jobs(jobs, len(grid.points), processes)
    alone = jobs == 1 and torch.cuda.device_count() < 2  # else Trainer would spread a point over all visible GPUs
    if to_do and not alone and processes.count == 1:
        statuses |= run_in_workers(to_do, specification, grid, out, jobs, progress_bar)
    elif to_do:
        corpus = open_corpus(out, grid.longest)
        for point in to_do:
            status = run_point(
                point, specification, corpus, grid.shortest, out, progress_bar.reporter(point.name), progress_bar.note
            )
            statuses[point.name] = status
            progress_bar.finished(point.name, status)
    ordered = {point.name: statuses[point.name] for point in chosen}
    return Outcome(out, ordered, skipped)


def _jobs(selected: int | None, points: int, processes: Processes) -> int:
    """The number of points to run at once: one per GPU or core, since small models gain little from several."""
    if processes.count > 1:
        return 1
    if selected is None:
        gpus = torch.cuda.device_count()
        available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        selected = gpus or available
    return max(1, min(selected, points))


def _acquire(lock: FileLock, out: Path) -> None:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise SweepError(
            f"another process is running a sweep in {out}. Wait for it, stop it, or choose another --out."
        ) from None


def _make_folder(out: Path) -> None:
    try:
        (out / POINTS).mkdir(parents=True, exist_ok=True)
        (out / ".lock").touch()
    except OSError as error:
        raise SweepError(f"the folder {out} cannot be written: {error.strerror}. Choose another --out.") from error


def _wait_for_tokens(out: Path) -> None:
    """Wait for the tokens, since tokenizing may take hours and a barrier would time out.

    If the main process fails, torchrun ends the others.
    """
    while not (out / DATA / DATA_RECORD).is_file():
        time.sleep(POLL)
    torch.distributed.barrier()


def _require_even_shares(points: list[Point], processes: int) -> None:
    """Check that the processes can share a step evenly, in whole micro-batches."""
    for point in points:
        sequences, micro = point.training.sequences, point.training.micro_batch_size
        share = sequences // processes
        if sequences % processes or (micro is not None and share % min(micro, share)):
            raise SweepError(
                f"{point.name}: an optimiser step has {sequences} sequences, which {processes} processes cannot share "
                f"evenly{'' if micro is None else f' in micro-batches of {micro}'}. Start a number of processes that "
                "divides it, or change batch_tokens or micro_batch_size."
            )


def _unreadable(points: Sequence[Point], out: Path) -> dict[str, str]:
    """The points whose records are damaged, each with the problem and what to do."""
    problems = {}
    for point in points:
        try:
            require_readable(out, point)
            recorded_status(point_folder(out, point.name))
        except SweepError as error:
            problems[point.name] = str(error)
    return problems


def _outdated_points(
    sweep: Sweep, grid: Grid, chosen: list[Point], out: Path, corpus: Corpus | None = None
) -> dict[str, str]:
    """The points in the folder that must be measured again, with the settings that have changed.

    Args:
        sweep: the sweep.
        grid: its points.
        chosen: the points to run.
        out: the folder of the sweep.
        corpus: the tokens, once they are on the disk.

    Raises:
        SweepError: points were trained with other settings or on other text, or cannot be measured again in this run.
    """
    tokens = None if corpus is None else corpus.tokens
    changes = {}
    for point in grid.points:
        with suppress(SweepError):  # a damaged record, which is reported later for each point
            changes[point.name] = differences(out, point, sweep.specification, grid, tokens)
    if sweep.specification.tracking.effectiveness_every:  # scores are also measured during training
        changes = {name: Differences((*each.trained, *each.measured)) for name, each in changes.items()}
    _refuse_other_trainings({name: "; ".join(each.trained) for name, each in changes.items() if each.trained}, out)
    measured = {name: "; ".join(each.measured) for name, each in changes.items() if each.measured}
    selected = {point.name for point in chosen}
    return {
        name: changes
        for name, changes in measured.items()
        if _needs_measuring(point_folder(out, name), changes, name in selected)
    }


def _refuse_other_trainings(differing: dict[str, str], out: Path) -> None:
    if differing:
        were, those, them = ("was", "its folder", "it") if len(differing) == 1 else ("were", "their folders", "them")
        raise SweepError(
            f"{listed(list(differing))} in {out / POINTS} {were} trained with other settings than the sweep has now: "
            f"{next(iter(differing.values()))}. Choose another --out, or delete {those} to train {them} again."
        )


def _needs_measuring(folder: Path, changes: str, is_chosen: bool) -> bool:
    """Whether the point in a folder, which was measured with other settings, must be measured again."""
    status, has_model = status_if_done(folder), (folder / MODEL).is_dir()
    if status == FINISHED and not has_model:
        raise SweepError(
            f"{folder} was measured with other settings than the sweep has now ({changes}), but its trained model "
            "is missing, so it cannot be measured again. Choose another --out, or delete that folder to train it again."
        )
    if status is not None and has_model and not is_chosen:
        raise SweepError(
            f"{folder} was measured with other settings than the sweep has now ({changes}), but --only leaves it out. "
            "Run without --only to measure every trained model again, or choose another --out."
        )
    return has_model


def _discard_measurements(outdated: dict[str, str], out: Path, report: Callable[[str], None]) -> None:
    for name in outdated:
        forget_measurements(point_folder(out, name))
    if outdated:
        report(f"Measuring {listed(list(outdated))} again: {next(iter(outdated.values()))}")


def _write_index(sweep: Sweep, grid: Grid, out: Path, corpus: Corpus) -> None:
    """Write the settings and the points."""
    write_atomically(out / SWEEP_FILE, _record(sweep))
    content = {
        "schema_version": SCHEMA_VERSION,
        "name": sweep.specification.name,
        "description": sweep.specification.description,
        "families": [
            {"name": family.name, "variants": list(family.variants), "axes": list(family.axes)}
            for family in grid.families
        ],
        "seeds": sweep.specification.seeds,
        "block_size": sweep.specification.scoring.settings(grid.shortest).block_size,
        "data": {"name": corpus.name, "fingerprint": corpus.fingerprint, "vocab_size": len(corpus.tokenizer)},
        "points": [
            {
                "point": point.name,
                "variant": point.variant,
                "seed": point.seed,
                "settings": point.varied,
                "model": point.model,
                "training": point.training.model_dump(),
            }
            for point in grid.points
        ],
    }
    write_atomically(out / SWEEP_INDEX, json.dumps(content, indent=1) + "\n")


def _record(sweep: Sweep) -> str:
    return yaml.safe_dump(sweep.specification.model_dump(mode="json"), sort_keys=False)


def _keep_source(sweep: Sweep, out: Path) -> None:
    """Refuse to overwrite a file of the sweep with its record, unless that file is already the record."""
    record = out / SWEEP_FILE
    for file in sweep.files if record.is_file() else ():
        if file.exists() and os.path.samefile(record, file) and record.read_text(encoding="utf-8") != _record(sweep):
            raise SweepError(
                f"the record of the sweep in {out} would overwrite {file}, from which it is read. Move that file out "
                "of the folder, or choose another --out."
            )


def describe(outcome: Outcome) -> str:
    """The result of a sweep in one line."""
    counts = Counter(outcome.statuses.values())
    parts = [f"{counts[status]} {status}" for status in (FINISHED, DIVERGED, FAILED, UNREADABLE) if counts[status]]
    before = f" ({outcome.skipped} of them before)" if outcome.skipped else ""
    return ", ".join(parts) + before
