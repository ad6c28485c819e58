"""A visitor's input as a task or a report; and messages of jobs as words."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

from depthscope import LayerReport, Settings
from depthscope.errors import ReportError
from depthscope.text.choices import BOS_CHOICES
from jobs.estimate import Estimator, Shape, in_words, shape_of
from jobs.tasks import DTYPES, SAMPLE, Task, Text, choose_settings
from safety.config import read_object
from safety.limits import Limits
from safety.problems import Problem, too_long
from safety.repository import HubModel, dataset_commit, look_up
from safety.uploads import fingerprint, require_size, require_upload
from safety.weights import gguf_facts

__all__ = ["Choices", "Planned", "failed", "from_hub", "from_upload", "progress_bar", "read_report", "still_there"]


@dataclass(frozen=True)
class Choices:
    """What to measure, on how much of which text, and in which precision."""

    scores: tuple[str, ...]
    tokens: int = 512
    block_size: int = 128
    dtype: str = "auto"
    text: Text = SAMPLE
    bos: str = "auto"

    def __post_init__(self) -> None:
        if self.bos not in BOS_CHOICES:
            raise Problem(
                "settings",
                f"{str(self.bos)[:40]!a} is not a choice for BOS; choose one of {', '.join(BOS_CHOICES)}.",
            )
        if self.dtype not in DTYPES:
            raise Problem(
                "settings", f"{str(self.dtype)[:40]!a} is not a precision; choose one of {', '.join(sorted(DTYPES))}."
            )


@dataclass(frozen=True)
class Planned:
    """A task, the shape of its model (a guess if it is in an archive), and the estimated seconds."""

    task: Task
    shape: Shape
    seconds: float
    is_known: bool = True
    most_seconds: float = math.inf  # of an analysis

    def in_words(self) -> str:
        """The estimate in words: the model, the work and the time."""
        model = self.task.model
        size = f", {model.weight_bytes / 2**20:,.0f} MiB of weights" if isinstance(model, HubModel) else ""
        known = f": {self.shape.layers} layers{size}" if self.is_known else ""
        estimate = (
            f"{self.task.name}{known}. Analysing it on {self.task.settings.eval_blocks} "
            f"blocks of {self.task.settings.block_size} tokens should take about {in_words(self.seconds)}."
        )
        if self.seconds <= self.most_seconds:
            return estimate
        return f"{estimate} This Space gives {in_words(self.most_seconds)}, so that fewer blocks will be measured."


def from_hub(
    name: str, revision: str, choices: Choices, limits: Limits, estimator: Estimator, token: str | None = None
) -> Planned:
    """Plan the analysis of a model on the Hub.

    Raises:
        Problem: there is no such model, or it may not be read, is too large, or has an unsupported format.
    """
    model = look_up(name, revision.strip() or None, token, limits)
    parameters = model.weight_bytes / _bytes_a_weight(model.config)
    require_size(parameters, limits, f"{model.name} has about", slack=1.05)
    shape = shape_of(model.config, parameters, limits)
    settings = _settings(choices, shape, limits)
    task = Task(model.name, model, model.sha, _pinned(choices.text), settings, choices.dtype, token)
    seconds = estimator.seconds(shape, settings, download_bytes=model.total_bytes, weight_bytes=model.weight_bytes)
    return Planned(replace(task, seconds=seconds), shape, seconds, most_seconds=limits.max_job_seconds)


def from_upload(paths: Sequence[str], choices: Choices, limits: Limits, estimator: Estimator) -> Planned:
    """Plan the analysis of an upload; an archive is only opened in the process of the job.

    Raises:
        Problem: the upload cannot be a model.
    """
    files = [Path(path) for path in paths]
    with still_there():
        require_upload(files, limits)
        size = sum(file.stat().st_size for file in files)
        config, parameters = _uploaded_facts(files, limits, size)
        identity = fingerprint(files)
    shape = shape_of(config, parameters, limits)
    settings = _settings(choices, shape, limits)
    name = files[0].stem if len(files) == 1 else "uploaded model"
    seconds = estimator.seconds(shape, settings, weight_bytes=size)
    model = tuple(map(str, files))
    task = Task(name[:80], model, identity, _pinned(choices.text), settings, choices.dtype, seconds=seconds)
    return Planned(task, shape, seconds, is_known=bool(config), most_seconds=limits.max_job_seconds)


@contextmanager
def still_there() -> Iterator[None]:
    """Refuse an upload that has been deleted, at the end of its analysis or after an hour.

    Raises:
        Problem: a file has been deleted.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise Problem("upload", "The uploaded files have been deleted. Upload them again.") from error


def _uploaded_facts(files: Sequence[Path], limits: Limits, size: int) -> tuple[dict[str, Any], float]:
    """The config and the number of weights of an upload; no config if it is in an archive."""
    if files[0].suffix.lower() == ".gguf":
        counted, config = gguf_facts(files[0], limits)
        return config, float(counted)
    for file in files:
        if file.name == "config.json":
            config = read_object(file, limits.max_json_bytes, "broken_config")
            return config, size / _bytes_a_weight(config)
    return {}, size / 4.0


def _pinned(text: Text) -> Text:
    """A dataset's text with its present commit, so that results of an earlier commit are not shown."""
    return replace(text, commit=dataset_commit(text.value.partition(":")[0])) if text.kind == "dataset" else text


def read_report(path: str | None, limits: Limits) -> LayerReport:
    """Read an uploaded report.

    Raises:
        Problem: there is no file, or it is too large, damaged or not a report.
    """
    if not path:
        raise Problem("report", "No report was uploaded. Choose a .json file that depthscope analyze --out wrote.")
    file = Path(path)
    with still_there():
        size = file.stat().st_size
    if size > limits.max_report_bytes:
        raise too_long("report", "The report", limits.max_report_bytes)
    try:
        report = LayerReport.load(file)
    except ReportError as error:
        raise Problem("report", str(error).replace(str(file), file.name)) from error
    if len(report.layers) > limits.max_layers:
        raise Problem("report", f"The report has {len(report.layers):,} layers; at most {limits.max_layers} are shown.")
    return report


def progress_bar(stage: str, share: float, left: float | None = None) -> str:
    """A progress bar with the stage and the estimated time left, as HTML."""
    percent = round(100 * min(max(share, 0.0), 1.0))
    rest = f" · about {in_words(left)} left" if left is not None else ""
    return (
        "<div class='ds-progress' role='status'><div "
        f"class='ds-line'><span>{escape(stage)}</span><span>{percent}%{escape(rest)}</span></div><div class='ds-track' "
        f"aria-hidden='true'><div style='width: {percent}%'></div></div></div>"
    )


def failed(problem: Problem, *, partly: bool = False) -> str:
    """A problem as HTML."""
    rest = " The results so far are below." if partly else ""
    title = "Stopped" if problem.kind == "stopped" else "Not analysed"
    return f"<div class='ds-problem' role='alert'><strong>{title}.</strong> {escape(str(problem))}{rest}</div>"


def _settings(choices: Choices, shape: Shape, limits: Limits) -> Settings:
    return choose_settings(
        choices.scores,
        choices.tokens,
        choices.block_size,
        layers=shape.layers,
        width=shape.width,
        limits=limits,
        bos=choices.bos,
    )


def _bytes_a_weight(config: dict[str, Any]) -> float:
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return 2.0 if "16" in dtype else 4.0
