"""`layer_stats.jsonl`: what the callbacks measured in a training run, one JSON object a line.

    {"step": 40, "epoch": 0.5, "kind": "variance", "values": {...}, "layers": {"variance": [...], ...}}

`values` are single numbers, `layers` one number a layer; null where there is none. A line is on the disk before the log
that it belongs to is reported, and a run that goes on from a checkpoint drops the lines that came after it. A line that
was cut off by a crash is dropped too.
"""

import json
import math
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from depthscope.errors import ReportError
from depthscope.files import write_atomically

__all__ = ["FILE", "History", "read_history"]

FILE = "layer_stats.jsonl"


class History:
    """The history file of one run, written by its main process."""

    # The runs that this process writes, by file: several callbacks share one, and only the first of them opens it.
    _open: ClassVar[dict[Path, "weakref.ref[Any]"]] = {}

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.path = Path(folder, FILE).absolute()

    def begin(self, step: int, run: object) -> None:
        """Go on at `step`: drop what was measured later. A run from the start moves the file of an earlier one aside.

        Args:
            step: optimiser steps that the run has done.
            run: an object that the callbacks of one run have in common.
        """
        opened = self._open.get(self.path)
        if opened is not None and opened() is run:
            return
        self._open[self.path] = weakref.ref(run)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            return
        if step == 0:
            self.path.replace(self.path.with_name(FILE.replace(".", ".previous.")))
            return
        self._keep(lambda row: row["step"] <= step)

    def drop(self, step: int, kind: str) -> None:
        """Drop what was measured of one kind at one step."""
        self._keep(lambda row: row["step"] != step or row.get("kind") != kind)

    def append(self, row: dict[str, Any]) -> None:
        """Add a row, and have it on the disk on return."""
        line = json.dumps(_plain(row), allow_nan=False)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        if self.path.exists():
            kept = [line for line, row in _lines(self.path) if wanted(row)]
            write_atomically(self.path, "".join(line + "\n" for line in kept))


def read_history(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a history, in the order of their steps.

    Args:
        path: the file, or the output folder of a run.

    Raises:
        ReportError: there is no history there.
    """
    file = Path(path, FILE) if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise ReportError(
            f"There is no {FILE} in {path}: is it the output_dir of a training run with a depthscope callback?"
        )
    return sorted((row for _, row in _lines(file)), key=lambda row: row["step"])


def _lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Each line and its row, up to the first that is not whole."""
    found = []
    try:
        content = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ReportError(f"{path} cannot be read: {error.strerror}.") from error
    for line in content.split("\n")[:-1]:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not (isinstance(row, dict) and isinstance(row.get("step"), int)):
            break
        found.append((line, row))
    return found


def _plain(value: Any) -> Any:
    """JSON knows neither NaN nor infinity."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
