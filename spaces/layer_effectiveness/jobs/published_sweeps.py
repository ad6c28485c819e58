"""A published depth sweep: the reports of its models and the variance over their training, read from the Hub.

    the dataset of reports     reports.parquet: one row per report, with the column `report` (a LayerReport as JSON)
    each model's repository    layer_stats.parquet: the history of its training

`depthscope push` writes both. Like all untrusted files, the Parquet files are read in the process of a job.
"""

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.hf_api import RepoFile

from depthscope import LayerReport
from depthscope.errors import ReportError
from jobs.processes import run_apart
from jobs.tasks import DATASET
from safety.limits import Limits
from safety.problems import Problem, too_long
from safety.repository import hub_problems

__all__ = ["Course", "Sweep", "read_sweep", "sweep_of", "tell_sweep"]

REPORTS, HISTORY = "reports.parquet", "layer_stats.parquet"
MOST_BYTES = 64 * 2**20
MOST_REPORTS = 64
MOST_COURSES = 8
MOST_STEPS = 400
SECONDS = 120
METRIC = "variance"


@dataclass(frozen=True)
class Course:
    """The variance after the last layer over the steps of one training."""

    name: str
    layers: int
    steps: list[float]
    values: list[float]


@dataclass(frozen=True)
class Sweep:
    """The reports of the trained models, those of the same models before training, and the training curves."""

    trained: list[LayerReport]
    untrained: list[LayerReport]
    courses: list[Course]


def read_sweep(name: str, limits: Limits, stop: threading.Event) -> Sweep:
    """Read a published sweep from its dataset of reports, until `stop` is set.

    Raises:
        Problem: there is no such dataset, or it is not a dataset of reports.
    """
    name = name.strip().removeprefix("https://huggingface.co/datasets/")
    if not DATASET.fullmatch(name) or ":" in name:
        raise Problem("report", f"{name[:80]!a} is not the name of a dataset; give one such as NAMESPACE/NAME.")
    content: dict[str, Any] = {}
    bounded = replace(limits, max_job_seconds=min(SECONDS, limits.max_job_seconds))
    for message in run_apart(partial(tell_sweep, name), bounded, stop):
        content = message
    return sweep_of(content)


def sweep_of(content: dict[str, Any]) -> Sweep:
    """The sweep from the message of a job's process."""
    return Sweep(
        trained=[LayerReport.from_json(text) for text in content["trained"]],
        untrained=[LayerReport.from_json(text) for text in content["untrained"]],
        courses=[Course(**course) for course in content["courses"]],
    )


def tell_sweep(name: str, folder: Path, limits: Limits, emit: Callable[[dict[str, Any]], None]) -> None:
    """In the process of the job: read the files and send their content."""
    try:
        rows = _rows(_download(name, REPORTS, "dataset", folder))
        reports: dict[bool, list[str]] = {True: [], False: []}
        models: dict[str, int] = {}
        for row in rows:
            report = LayerReport.from_json(str(row.get("report"))).to_json()
            trained = row.get("trained") is not False
            reports[trained].append(report)
            if trained and isinstance(row.get("model"), str):
                models[row["model"]] = int(row.get("layers") or 0)
        courses = [
            course for model, layers in list(models.items())[:MOST_COURSES] for course in _course(model, layers, folder)
        ]
        emit({"event": "done", "trained": reports[True], "untrained": reports[False], "courses": courses})
    except Problem as problem:
        emit({"event": "failed", "kind": problem.kind, "message": str(problem)})
    except (ReportError, OSError, ValueError) as error:  # pyarrow's errors are among the last two
        words = f"The reports of {name} cannot be read ({str(error)[:200]})."
        emit({"event": "failed", "kind": "report", "message": words})


def _download(name: str, file: str, kind: str, folder: Path) -> Path:
    with hub_problems(name, None, None, kind, "report"):
        found = HfApi(token=False).get_paths_info(name, [file], repo_type=kind)
        if not found:
            raise Problem(
                "report", f"{name} has no {file}, so it is not a dataset of reports written by depthscope push."
            )
        if not isinstance(found[0], RepoFile) or found[0].size > MOST_BYTES:
            raise too_long("report", f"{file} of {name}", MOST_BYTES)
        return Path(hf_hub_download(name, file, repo_type=kind, local_dir=folder / "model", token=False))


def _rows(path: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq  # takes half a second

    file = pq.ParquetFile(path)
    if file.metadata.num_rows > MOST_REPORTS:
        raise Problem(
            "report", f"The dataset holds {file.metadata.num_rows} reports; at most {MOST_REPORTS} are shown here."
        )
    wanted = [column for column in ("report", "trained", "model", "layers") if column in file.schema_arrow.names]
    if "report" not in wanted:
        raise Problem("report", "The dataset has no column `report`, so it has no reports.")
    rows: list[dict[str, Any]] = file.read(columns=wanted).to_pylist()
    return rows


def _course(model: str, layers: int, folder: Path) -> Sequence[dict[str, Any]]:
    """The variance after a model's last layer over its training; None if it was not published."""
    import pyarrow.parquet as pq

    try:
        path = _download(model, HISTORY, "model", folder)
    except Problem:
        return []
    filters = [("metric", "==", METRIC), ("layer", "==", layers - 1)]
    rows = pq.read_table(path, columns=["step", "value"], filters=filters).to_pylist()
    rows = [row for row in rows if isinstance(row["value"], float) and row["step"] is not None]
    rows = sorted(rows, key=lambda row: row["step"])[:: max(1, len(rows) // MOST_STEPS)]
    if len(rows) < 2:
        return []
    steps, values = [float(row["step"]) for row in rows], [float(row["value"]) for row in rows]
    return [json.loads(json.dumps({"name": model, "layers": layers, "steps": steps, "values": values}))]
