"""Jobs on ZeroGPU, which lends a GPU for one decorated call, in a process that the platform starts.

Elsewhere this module is not used: jobs run in our own processes (see `processes`).
"""

import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import gradio as gr

from jobs.estimate import DOWNLOAD_BYTES_A_SECOND
from jobs.processes import forget_owner, own_folder
from jobs.tasks import Task
from safety.limits import Limits
from safety.problems import Problem, stopped
from safety.repository import HubModel, fetch

__all__ = ["duration", "is_here", "run"]

LONGEST = 120  # seconds of a loan; longer ones wait longer in the platform's queue
SPEED_UP = 15.0  # of such a GPU over the two cores of the estimates
STARTING_SECONDS = 20.0  # and for loading
LOOK_SECONDS = 0.5
STOP = "stop"  # a file: the process on the GPU shares nothing else with the app


def is_here() -> bool:
    """Whether this Space runs on ZeroGPU."""
    spec = find_spec("spaces")
    if spec is None or spec.origin is None:  # not installed; a folder of that name is no package
        return False
    from spaces.config import Config

    return bool(Config.zero_gpu)


def duration(task: Task, folder: str, limits: Limits) -> int:
    """The seconds for which a job needs a GPU, after the download of its model."""
    downloading = task.model.total_bytes / DOWNLOAD_BYTES_A_SECOND if isinstance(task.model, HubModel) else 0.0
    measuring = max(0.0, task.seconds - downloading)
    return int(min(LONGEST, limits.max_job_seconds, STARTING_SECONDS + measuring / SPEED_UP))


def run(task: Task, limits: Limits, stop: threading.Event) -> Iterator[dict[str, Any]]:
    """Run a job on a lent GPU; like `processes.run`."""
    folder = own_folder("job")
    over = threading.Event()
    threading.Thread(target=_pass_on, args=(stop, over, folder / STOP), daemon=True).start()
    try:
        if isinstance(task.model, HubModel):  # before the loan, which is counted in seconds
            yield {"event": "stage", "stage": "Downloading the model", "share": 0.0}
            (folder / "model").mkdir()
            fetch(task.model, folder / "model", task.token)
        for message in lent()(task, str(folder), limits):
            if message["event"] == "failed":
                raise Problem(message["kind"], message["message"])
            yield message
    except gr.Error as error:  # the platform's: no GPU is free, or the visitor's share is used up
        raise stopped() if stop.is_set() else Problem("queue_full", f"No GPU was lent: {error.message}") from error
    finally:
        over.set()
        shutil.rmtree(folder, ignore_errors=True)


def lent() -> Any:
    """The decorated generator; made once, when the app starts."""
    import spaces

    return spaces.GPU(duration=duration)(on_gpu)


def on_gpu(task: Task, folder: str, limits: Limits) -> Iterator[dict[str, Any]]:
    """Run a job and yield its messages."""
    from jobs.worker import work

    forget_owner()
    messages: SimpleQueue[dict[str, Any] | None] = SimpleQueue()

    def all_of_it() -> None:
        try:
            work(task, Path(folder), replace(limits, max_job_seconds=duration(task, folder, limits)), messages.put)
        finally:
            messages.put(None)

    threading.Thread(target=all_of_it, daemon=True).start()
    while True:
        if (Path(folder) / STOP).exists():
            yield {"event": "failed", "kind": "stopped", "message": str(stopped())}
            return
        try:
            message = messages.get(timeout=LOOK_SECONDS)
        except Empty:
            continue
        if message is None:
            return
        yield message


def _pass_on(stop: threading.Event, over: threading.Event, file: Path) -> None:
    """Create a file as an event for another process."""
    while not over.is_set():
        if stop.wait(LOOK_SECONDS):
            if file.parent.is_dir():
                file.touch()
            return
