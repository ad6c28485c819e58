"""Reading the files of a run, with bounds and checks. No torch."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from depthscope.errors import ReportError
from depthscope.files.atomic import read_text
from depthscope.files.checksums import is_whole
from depthscope.files.strict_json import parse
from depthscope.files.validation import MAX_BYTES, MAX_FLOAT
from depthscope.runs.history import read_history
from depthscope.runs.layout import HISTORY, LOG
from depthscope.wording.scalars import finite_number

__all__ = ["TrainingCurve", "losses", "losses_of", "read_sealed", "variances"]


@dataclass(frozen=True)
class TrainingCurve:
    """A quantity over training: its `values` at optimiser `steps`, one number or one per layer; None if not finite.

    `unread` is the number of lines in its file that cannot be read.
    """

    steps: list[int] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)
    unread: int = 0


def read_sealed(path: Path, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Read a JSON object that a run has written, and check its checksum if it has one.

    Raises:
        ReportError: the file is missing, too large, not JSON, or does not match its checksum.
    """
    content = parse(read_text(path, max_bytes), path.name)
    if not isinstance(content, dict) or not is_whole(content):
        raise ReportError(f"{path.name} was changed or damaged after it was written.")
    return content


def losses(run: Path) -> TrainingCurve:
    """The training losses in `log.jsonl`; empty if there is no such file.

    Raises:
        ReportError: the file is too large, or cannot be read.
    """
    rows, unread = [], 0
    for line in read_text(run / LOG, MAX_BYTES).splitlines() if (run / LOG).is_file() else ():
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError):
            unread += 1
    return losses_of(rows, unread)


def losses_of(rows: Iterable[Any], unread: int = 0) -> TrainingCurve:
    """The training losses in the rows of a log; rows without a loss are left out."""
    logged = [row for row in rows if isinstance(row, dict) and "loss" in row and _is_step(row.get("step"))]
    return TrainingCurve([row["step"] for row in logged], [_number(row["loss"]) for row in logged], unread)


def variances(run: Path) -> TrainingCurve:
    """The variance per layer in `layer_stats.jsonl`; empty if there is no such file.

    Raises:
        ReportError: the file is too large, or cannot be read.
    """
    path = run / HISTORY
    if not path.is_file():
        return TrainingCurve()
    if path.stat().st_size > MAX_BYTES:
        raise ReportError(f"{str(path)!r} is larger than {MAX_BYTES / 2**20:g} MiB.")
    rows = read_history(path)
    # An incomplete last line is being written, or was when the run was interrupted.
    curve = TrainingCurve(unread=path.read_bytes().count(b"\n") - len(rows))
    for row in rows:
        layers = row.get("layers")
        column = layers.get("variance") if isinstance(layers, dict) else None
        if isinstance(column, list) and _is_step(row["step"]):
            curve.steps.append(row["step"])
            curve.values.append([_number(value) for value in column])
    return curve


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def _number(value: Any) -> float | None:
    """A number from a file; None if it cannot be drawn."""
    number = finite_number(value, MAX_FLOAT)
    return None if number is None else float(number)
