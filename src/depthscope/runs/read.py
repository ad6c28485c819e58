"""Reading what a run has left in its folder, up to a bound and trusting nothing of it. No torch."""

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

__all__ = ["Course", "losses", "losses_of", "read_sealed", "variances"]


@dataclass(frozen=True)
class Course:
    """Something over training: at optimiser `steps` it had `values`, one number or one per layer; None: not finite.

    `unread` is the number of lines of its file that cannot be read.
    """

    steps: list[int] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)
    unread: int = 0


def read_sealed(path: Path, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Read a JSON object that a run has written, and whose checksum, where it has one, is right.

    Raises:
        ReportError: it is missing, too large, no JSON, or not what was written.
    """
    content = parse(read_text(path, max_bytes), path.name)
    if not isinstance(content, dict) or not is_whole(content):
        raise ReportError(f"{path.name} is not what was written.")
    return content


def losses(run: Path) -> Course:
    """The training losses in `log.jsonl`; empty where there is none.

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


def losses_of(rows: Iterable[Any], unread: int = 0) -> Course:
    """The training losses in rows of a log; what is no such row is left out."""
    kept = [row for row in rows if isinstance(row, dict) and "loss" in row and _is_step(row.get("step"))]
    return Course([row["step"] for row in kept], [_number(row["loss"]) for row in kept], unread)


def variances(run: Path) -> Course:
    """The variance of every layer in `layer_stats.jsonl`; empty where there is none.

    Raises:
        ReportError: the file is too large, or cannot be read.
    """
    path = run / HISTORY
    if not path.is_file():
        return Course()
    if path.stat().st_size > MAX_BYTES:
        raise ReportError(f"{str(path)!r} is larger than {MAX_BYTES / 2**20:g} MiB.")
    rows = read_history(path)
    # A last line without its end is being written, or was when the run was interrupted.
    course = Course(unread=path.read_bytes().count(b"\n") - len(rows))
    for row in rows:
        layers = row.get("layers")
        column = layers.get("variance") if isinstance(layers, dict) else None
        if isinstance(column, list) and _is_step(row["step"]):
            course.steps.append(row["step"])
            course.values.append([_number(value) for value in column])
    return course


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def _number(value: Any) -> float | None:
    """A number out of a file, None where there is none that can be drawn."""
    number = finite_number(value, MAX_FLOAT)
    return None if number is None else float(number)
