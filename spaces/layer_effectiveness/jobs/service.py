"""The service behind the page: limits, queue, results and estimates for all visitors, and the steps of an analysis."""

import os
import shutil
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import anyio

from depthscope import LayerReport
from jobs import zero_gpu
from jobs.estimate import Estimator
from jobs.processes import own_folder, run
from jobs.queue import WATCH_SECONDS, Jobs, Results, has_left
from jobs.readers import Readers
from jobs.result_store import result_store
from jobs.visitor import Choices, Planned, from_hub, from_upload, progress_bar, still_there
from safety.limits import Limits
from safety.problems import Problem, stopped
from safety.repository import HubModel

__all__ = ["EXAMPLES", "Service", "Visit"]

EXAMPLES = (
    "HuggingFaceTB/SmolLM2-135M",
    "HuggingFaceTB/SmolLM2-360M",
    "openai-community/gpt2",
    "EleutherAI/pythia-70m",
    "EleutherAI/pythia-160m",
    "Qwen/Qwen3-0.6B",
)
EXAMPLES_VARIABLE = "DEPTHSCOPE_SPACE_EXAMPLES"  # ids, separated by commas
REMEMBERED_SECONDS = 300.0  # plans are cached, so that an estimate and the start after it ask the Hub once
MOST_REMEMBERED = 256
MOST_DRAWN = 2  # reports that are read or drawn at the same time, beside the jobs


@dataclass(frozen=True)
class Visit:
    """One run of an action of a visitor; Stop ends it at any point."""

    owner: str
    stop: threading.Event = field(default_factory=threading.Event)
    is_over: threading.Event = field(default_factory=threading.Event)
    began: float = field(default_factory=time.monotonic)

    def go_on(self) -> None:
        """Raises Problem if the visitor has pressed Stop."""
        if self.stop.is_set():
            raise stopped()


@dataclass
class Service:
    """One Space."""

    limits: Limits = field(default_factory=Limits.from_environment)
    estimator: Estimator = field(default_factory=Estimator)

    def __post_init__(self) -> None:
        runner = zero_gpu.run if zero_gpu.is_here() else run
        self.readers = Readers()
        results = Results(self.limits.max_results, result_store())
        self.jobs = Jobs(self.limits, results, runner, self.readers.heard)
        self.examples = [name.strip() for name in os.environ.get(EXAMPLES_VARIABLE, ",".join(EXAMPLES)).split(",")]
        self.offers_login = "OAUTH_CLIENT_ID" in os.environ  # set where the Space's front matter says hf_oauth: true
        self.drawing = anyio.CapacityLimiter(MOST_DRAWN)
        self.reading = anyio.CapacityLimiter(self.limits.max_jobs)  # of published sweeps, each in a process
        self._visits: list[Visit] = []
        self._plans: dict[Any, tuple[float, Planned]] = {}
        self._lock = threading.Lock()

    @contextmanager
    def visit(self, owner: str) -> Iterator[Visit]:
        """A context whose work `stop` ends, and which also ends when the visitor leaves."""
        visit = Visit(owner)
        with self._lock:
            self._visits.append(visit)
        threading.Thread(target=self._watch, args=(visit,), daemon=True).start()
        try:
            yield visit
        finally:
            visit.is_over.set()
            with self._lock:
                self._visits = [other for other in self._visits if other is not visit]

    def stop(self, owner: str) -> None:
        """Stop everything that a visitor has started."""
        with self._lock:
            mine = [visit for visit in self._visits if visit.owner == owner]
        for visit in mine:
            visit.stop.set()
        self.jobs.stop(owner)

    def close(self) -> None:
        """Stop everything."""
        with self._lock:
            visits = list(self._visits)
        for visit in visits:
            visit.stop.set()
        self.jobs.close()

    async def plan(
        self,
        name: str | None,
        revision: str,
        uploaded: Sequence[str] | None,
        choices: Choices,
        token: str | None = None,
    ) -> Planned:
        """Plan the analysis of the model `name` on the Hub, or of an upload if there is no name.

        Raises:
            Problem: there is no such model, or it is refused.
        """
        if name is None:
            work = partial(from_upload, list(uploaded or ()), choices, self.limits, self.estimator)
            return await anyio.to_thread.run_sync(work)
        key = (name, revision, choices)
        may_be_kept = token is None and choices.text.kind in ("sample", "dataset")
        if may_be_kept and (kept := self._remembered(key)) is not None:
            return kept
        work = partial(from_hub, name, revision, choices, self.limits, self.estimator, token)
        planned = await anyio.to_thread.run_sync(work)
        if may_be_kept:
            with self._lock:
                self._plans[key] = time.monotonic(), planned
                while len(self._plans) > MOST_REMEMBERED:
                    self._plans.pop(next(iter(self._plans)))
        return planned

    async def follow(self, planned: Planned, visit: Visit) -> AsyncIterator[str | LayerReport]:
        """Run an analysis: yields its progress (HTML) and growing reports; the last one is complete.

        Raises:
            Problem: the analysis failed or was stopped.
        """
        visit.go_on()
        planned, clean = _with_own_files(planned)
        try:  # in a thread: results may be kept on the Hub
            job = await anyio.to_thread.run_sync(self.jobs.submit, planned.task, visit.owner, clean)
        except Problem:
            clean()
            raise
        if visit.stop.is_set():
            self.jobs.stop(visit.owner)
        report = None
        async for message in self.jobs.listen(job):
            match message["event"]:
                case "waiting":
                    yield progress_bar(_place_in_words(message["place"]), 0.0)
                case "stage":
                    yield progress_bar(
                        message["stage"], message["share"], _seconds_left(planned, job.began, message["share"])
                    )
                case "partial":
                    report = LayerReport.from_json(message["report"])
                    yield report
                case "done" if report is None:
                    yield LayerReport.from_json(message["report"])
        # The stated shape of an upload may be wrong, and a report that ended early tells nothing of the whole.
        if report is not None and report.budget is None and isinstance(planned.task.model, HubModel):
            self.estimator.learn(planned.shape, planned.task.settings, time.monotonic() - job.began)

    def _watch(self, visit: Visit) -> None:
        """Stop work outside the queue, such as reading a published sweep, when its visitor has left."""
        while not visit.is_over.wait(WATCH_SECONDS):
            if has_left(max(visit.began, self.readers.heard(visit.owner))):
                visit.stop.set()
                return

    def _remembered(self, key: Any) -> Planned | None:
        with self._lock:
            when, planned = self._plans.get(key, (0.0, None))
        return planned if time.monotonic() - when < REMEMBERED_SECONDS else None


def _seconds_left(planned: Planned, began: float, share: float) -> float:
    """The seconds left: at first from the estimate, later more and more from the progress."""
    gone = time.monotonic() - began
    by_plan = max(planned.seconds - gone, planned.seconds * (1 - share) / 2)
    return by_plan if share < 0.1 else (1 - share) * by_plan + share * gone * (1 - share) / share


def _place_in_words(place: int) -> str:
    return (
        "Waiting for a free place"
        if place == 0
        else f"Waiting: {place} {'analysis' if place == 1 else 'analyses'} before yours"
    )


def _with_own_files(planned: Planned) -> tuple[Planned, Callable[[], None]]:
    """Give a job its own files; they and the upload are removed when it ends.

    Equal uploads of two visitors are stored once: the end of one visitor's job must not remove the other's files.
    """
    if isinstance(planned.task.model, HubModel):
        return planned, lambda: None
    folder = own_folder("upload")
    given = [Path(path) for path in planned.task.model]
    try:
        with still_there():
            taken = tuple(str(_second_name(path, folder)) for path in given)
    except Problem:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return replace(planned, task=replace(planned.task, model=taken)), partial(_remove, folder, given)


def _second_name(path: Path, folder: Path) -> Path:
    """Link a file into a folder, or copy it if the file system has no links."""
    target = folder / path.name
    try:
        os.link(path, target, follow_symlinks=False)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(path, target, follow_symlinks=False)
    return target


def _remove(folder: Path, given: Sequence[Path]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for path in given:
        path.unlink(missing_ok=True)
        with suppress(OSError):  # deleted, or replaced by another file
            path.parent.rmdir()
