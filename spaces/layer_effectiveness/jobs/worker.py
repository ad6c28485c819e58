"""The work of a job, in its own process: fetch or unpack a model, load it and measure it in stages.

All untrusted files are read here, with limits on memory, time and files. Results are passed to `emit` as small
JSON-like messages:

    {"event": "stage", "stage": ..., "share": 0.3}     the present stage, and the share of the whole that is done
    {"event": "partial", "report": "{...}"}            the report so far
    {"event": "done", "report": "{...}", "is_whole": true}   the last report; not whole if the time was up before
    {"event": "failed", "kind": ..., "message": ...}   see `safety.problems`
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from depthscope import DepthscopeError
from depthscope.errors import (
    CorpusError,
    ModelLoadError,
    NoLayerStackError,
    NonFiniteError,
    NotCausalError,
    OutOfMemoryError,
    SettingsError,
)
from jobs.tasks import Task, fitted
from safety.limits import Limits
from safety.problems import NO_ROOM, Kind, Problem, no_room
from safety.repository import HubModel, fetch
from safety.uploads import Model, check_model, receive

__all__ = ["Emit", "work"]

Emit = Callable[[dict[str, Any]], None]
SHARE_OF_TIME = 0.9  # of a job's, after which it ends with what has been measured; then it is ended from outside
LOADING, READING = 0.04, 0.08  # shares of the bar, before anything is measured
KINDS: dict[type[DepthscopeError], Kind] = {
    NonFiniteError: "not_finite",
    OutOfMemoryError: "out_of_memory",
    NotCausalError: "not_causal",  # before its family
    NoLayerStackError: "unknown_architecture",
    CorpusError: "text",
    SettingsError: "settings",
    ModelLoadError: "broken_weights",
}
OUT_OF_MEMORY = (
    "The model does not fit into the memory of a job of this Space. Choose fewer tokens or a smaller model, or analyse "
    "it on your own machine: pip install depthscope."
)


def work(task: Task, folder: Path, limits: Limits, emit: Emit) -> None:
    """Run a job in `folder` and pass its messages to `emit`; a `Problem` is sent as a message, not raised.

    The folder is empty, or holds the files of a model on the Hub in its folder `model`.
    """
    for name in ("model", "empty"):
        (folder / name).mkdir(exist_ok=True)
    os.chdir(folder / "empty")  # the name of a dataset must not find a folder here
    end = time.monotonic() + SHARE_OF_TIME * limits.max_job_seconds
    try:
        with _problems(folder, task):
            _measure(task, folder, limits, emit, end)
    except Problem as problem:
        emit({"event": "failed", "kind": problem.kind, "message": str(problem)})


def _measure(task: Task, folder: Path, limits: Limits, emit: Emit, end: float) -> None:
    def tell(stage: str, share: float) -> None:
        emit({"event": "stage", "stage": stage, "share": share})

    tell("Downloading the model" if isinstance(task.model, HubModel) else "Checking the upload", 0.0)
    found = _files(task, folder / "model", limits)
    tell("Loading the model", LOADING)
    from jobs.measuring import load, measure, read_text  # they import torch and transformers

    loaded = load(task, found, limits)
    settings = task.settings
    if not isinstance(task.model, HubModel):  # the upload has not been checked before
        settings = fitted(settings, loaded.facts, limits)
    tell("Reading the text", READING)
    if loaded.tokenizer is None:
        missing = (
            loaded.tokenizer_problem or "There is no tokenizer among the files. Add it, as save_pretrained wrote it."
        )
        raise Problem("broken_tokenizer", _without_places(missing, folder, task.name))
    blocks = read_text(task.text, loaded, settings)
    report = measure(
        loaded,
        blocks,
        settings,
        lambda stage, share: tell(stage, READING + (1 - READING) * share),
        lambda so_far: emit({"event": "partial", "report": so_far.to_json()}),
        end - time.monotonic(),
    )
    emit({"event": "done", "report": report.to_json(), "is_whole": report.budget is None})


def _files(task: Task, folder: Path, limits: Limits) -> Model:
    if isinstance(task.model, HubModel):
        if not any(folder.iterdir()):
            fetch(task.model, folder, task.token)
        return check_model(folder, limits)
    return receive([Path(path) for path in task.model], folder, limits)


@contextmanager
def _problems(folder: Path, task: Task) -> Iterator[None]:
    """Turn depthscope's errors into a `Problem` with the visitor's name for the model."""
    try:
        yield
    except (DepthscopeError, MemoryError, RuntimeError) as error:
        if _is_about_memory(error):
            raise Problem("out_of_memory", OUT_OF_MEMORY) from error
        if not isinstance(error, DepthscopeError):
            raise
        kind: Kind = next((kind for family, kind in KINDS.items() if isinstance(error, family)), "crashed")
        raise Problem(kind, _without_places(str(error), folder, task.name)) from error
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise no_room() from error


def _is_about_memory(error: BaseException) -> bool:
    from depthscope.layers.memory import is_out_of_memory  # torch takes seconds
    from depthscope.loading.failures import causes

    return any(isinstance(cause, OutOfMemoryError) or is_out_of_memory(cause) for cause in causes(error))


def _without_places(message: str, folder: Path, name: str) -> str:
    """Replace the folder of the unpacked model by its name."""
    for place in (folder / "model" / "model.gguf", folder / "model"):
        message = message.replace(str(place), name)
    return message.replace(str(folder), "the job's folder")
