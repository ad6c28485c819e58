"""Jobs on ZeroGPU, where a GPU is lent for the time of one decorated call, in a process that the platform makes.

Elsewhere nothing of this is used: jobs run in processes of our own (see `processes`).
"""

import shutil
import tempfile
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from limits import Limits
from problems import Problem
from tasks import Task

__all__ = ["duration", "is_here", "run"]

LONGEST = 120  # seconds of a loan; longer ones wait longer in the platform's queue
SPEED_UP = 15.0  # of such a GPU over the two cores that estimates are made for
STARTING_SECONDS = 20.0


def is_here() -> bool:
    """Whether this Space runs on ZeroGPU."""
    spec = find_spec("spaces")
    if spec is None or spec.origin is None:  # not installed; a folder of that name is no package
        return False
    from spaces.config import Config

    return bool(Config.zero_gpu)


def duration(task: Task, folder: str, limits: Limits, seconds: float) -> int:
    """How long a GPU is needed for a job that would take so many seconds on two cores."""
    return int(min(LONGEST, limits.max_job_seconds, STARTING_SECONDS + seconds / SPEED_UP))


def run(task: Task, limits: Limits, stop: threading.Event) -> Iterator[dict[str, Any]]:
    """Do a job on a lent GPU; as `processes.run`."""
    folder = Path(tempfile.mkdtemp(prefix="depthscope-space-job-"))
    try:
        for message in lent()(task, str(folder), limits, task.seconds):
            if stop.is_set():
                raise Problem("stopped", "Stopped, as you asked.")
            if message["event"] == "failed":
                raise Problem(message["kind"], message["message"])
            yield message
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def lent() -> Any:
    """The decorated generator; made once, when the app starts."""
    import spaces

    return spaces.GPU(duration=duration)(on_gpu)


def on_gpu(task: Task, folder: str, limits: Limits, seconds: float) -> Iterator[dict[str, Any]]:
    """Do a job, and give its messages as they come."""
    from worker import work

    messages: SimpleQueue[dict[str, Any] | None] = SimpleQueue()

    def all_of_it() -> None:
        try:
            work(task, Path(folder), limits, messages.put)
        finally:
            messages.put(None)

    threading.Thread(target=all_of_it, daemon=True).start()
    while (message := messages.get()) is not None:
        yield message
