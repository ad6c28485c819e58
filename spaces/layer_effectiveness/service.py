"""What all visitors share (limits, queue, results, estimates), and the way of one analysis through them."""

import os
import shutil
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import anyio

import zero_gpu
from depthscope import LayerReport
from estimate import Estimator
from jobs import Jobs, Results
from limits import Limits
from problems import Problem
from processes import remove_stale_folders, run
from result_store import result_store
from visitor import Choices, Planned, from_hub, from_upload, progress_bar

__all__ = ["EXAMPLES", "Service"]

EXAMPLES = (
    "HuggingFaceTB/SmolLM2-135M",
    "HuggingFaceTB/SmolLM2-360M",
    "openai-community/gpt2",
    "EleutherAI/pythia-70m",
    "EleutherAI/pythia-160m",
    "Qwen/Qwen3-0.6B",
)
EXAMPLES_VARIABLE = "DEPTHSCOPE_SPACE_EXAMPLES"  # ids, separated by commas
UPLOADS = "depthscope-space-upload-"
REMEMBERED_SECONDS = 300.0  # a plan, so that an estimate and the start after it ask the Hub once
MOST_REMEMBERED = 256


@dataclass
class Service:
    """One Space."""

    limits: Limits = field(default_factory=Limits.from_environment)
    estimator: Estimator = field(default_factory=Estimator)

    def __post_init__(self) -> None:
        remove_stale_folders()
        runner = zero_gpu.run if zero_gpu.is_here() else run
        self.jobs = Jobs(self.limits, Results(self.limits.max_results, result_store()), runner)
        self.examples = [name.strip() for name in os.environ.get(EXAMPLES_VARIABLE, ",".join(EXAMPLES)).split(",")]
        self.offers_login = "OAUTH_CLIENT_ID" in os.environ  # set where the Space's front matter says hf_oauth: true
        self._plans: dict[Any, tuple[float, Planned]] = {}
        self._lock = threading.Lock()

    async def plan(
        self,
        name: str | None,
        revision: str,
        uploaded: Sequence[str] | None,
        choices: Choices,
        token: str | None = None,
    ) -> Planned:
        """Plan the analysis of the model `name` on the Hub, or without a name that of an upload.

        Raises:
            Problem: there is no such model, or it is not taken here.
        """
        if name is None:
            work = partial(from_upload, list(uploaded or ()), choices, self.limits, self.estimator)
            return await anyio.to_thread.run_sync(work)
        key = (name, revision, choices)
        if token is None and (kept := self._remembered(key)) is not None:
            return kept
        work = partial(from_hub, name, revision, choices, self.limits, self.estimator, token)
        planned = await anyio.to_thread.run_sync(work)
        if token is None:
            with self._lock:
                self._plans[key] = time.monotonic(), planned
                while len(self._plans) > MOST_REMEMBERED:
                    self._plans.pop(next(iter(self._plans)))
        return planned

    async def follow(self, planned: Planned, owner: str) -> AsyncIterator[str | LayerReport]:
        """Run an analysis: gives lines about its progress (HTML) and reports, each with more in it; the last is whole.

        Raises:
            Problem: it failed or was stopped.
        """
        planned, clean = _with_own_files(planned)
        try:
            job = self.jobs.submit(planned.task, owner, clean)
        except Problem:
            clean()
            raise
        report = None
        async for message in self.jobs.listen(job):
            match message["event"]:
                case "waiting":
                    yield progress_bar(_place_in_words(message["place"]), 0.0)
                case "stage":
                    yield progress_bar(message["stage"], message["share"], _left(planned, job.began, message["share"]))
                case "partial":
                    report = LayerReport.from_json(message["report"])
                    yield report
                case "done" if report is None:
                    yield LayerReport.from_json(message["report"])
        if report is not None:
            self.estimator.learn(planned.shape, planned.task.settings, time.monotonic() - job.began)

    def _remembered(self, key: Any) -> Planned | None:
        with self._lock:
            when, planned = self._plans.get(key, (0.0, None))
        return planned if time.monotonic() - when < REMEMBERED_SECONDS else None


def _left(planned: Planned, began: float, share: float) -> float:
    """How many seconds are left: as planned at first, and more and more as it goes."""
    gone = time.monotonic() - began
    by_plan = max(planned.seconds - gone, planned.seconds * (1 - share) / 2)
    return by_plan if share < 0.1 else (1 - share) * by_plan + share * gone * (1 - share) / share


def _place_in_words(place: int) -> str:
    return (
        "Waiting for a free place"
        if place == 0
        else f"Waiting: {place} {'analysis' if place == 1 else 'analyses'} before yours"
    )


def _with_own_files(planned: Planned) -> tuple[Planned, Any]:
    """Give a job files of its own, which are removed when it ends: what is uploaded twice lies in one place only."""
    task = planned.task
    paths = [Path(path) for path in task.model] if isinstance(task.model, tuple) else []
    text = Path(task.text.value) if task.text.kind == "file" else None
    if not paths and text is None:
        return planned, lambda: None
    folder = Path(tempfile.mkdtemp(prefix=UPLOADS))
    clean = partial(shutil.rmtree, folder, ignore_errors=True)
    try:
        if paths:
            task = replace(task, model=tuple(str(_moved(path, folder)) for path in paths))
        if text is not None:
            task = replace(task, text=replace(task.text, value=str(_moved(text, folder))))
    except FileNotFoundError as error:
        clean()
        raise Problem("upload", "The uploaded files are not there any more. Upload them again.") from error
    return replace(planned, task=task), clean


def _moved(path: Path, folder: Path) -> Path:
    target = Path(shutil.move(path, folder / path.name))
    if path.parent.is_dir() and not any(path.parent.iterdir()):
        path.parent.rmdir()
    return target
