"""`layer_stats.jsonl`: what the callbacks measured in a training run, one JSON object a line.

    {"step": 40, "epoch": 0.5, "kind": "variance", "values": {...}, "layers": {"variance": [...], ...}}

`values` are single numbers, `layers` one number per layer; null means no number. A line is on the disk before the log
that it belongs to is reported. A run that continues from a checkpoint drops the lines that came after it. An incomplete
line, cut off by a crash, is skipped with a note.

A training does not end because its history cannot be written (a full disk, a missing folder): lines are kept in memory
until they can be written, and a warning at the end counts the lines that never were.
"""

import contextlib
import json
import logging
import math
import os
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

from depthscope.errors import ReportError
from depthscope.files.atomic import require_path, write_atomically
from depthscope.runs.layout import HISTORY

__all__ = ["History", "read_history"]

logger = logging.getLogger(__name__)

WAITING = 1000  # lines at most, since they take memory of the training


class History:
    """The history file of one run, written by its main process."""

    # The runs that this process writes, by file: several callbacks share a file, and only the first one opens it.
    _open: ClassVar[dict[Path, "weakref.ref[Any]"]] = {}

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.path = Path(folder, HISTORY).absolute()
        self._waiting: list[tuple[int, bytes]] = []  # steps and lines that could not be written yet
        self._lost: list[int] = []  # steps whose lines were dropped
        self._has_warned = False

    def begin(self, step: int, run: object) -> None:
        """Continue at `step`: drop later lines. A run that starts at 0 renames the file of an earlier run.

        Args:
            step: the number of optimiser steps done.
            run: an object that all callbacks of one run share.
        """
        opened = self._open.get(self.path)
        if opened is not None and opened() is run:
            return
        self._open[self.path] = weakref.ref(run)
        with self._warning_once():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not self.path.exists():
                return
            if step == 0:
                self.path.replace(self.path.with_name(HISTORY.replace(".", ".previous.")))
                return
            self._keep(lambda row: row["step"] <= step)

    def drop(self, step: int, kind: str) -> None:
        """Drop the lines of one kind at one step."""
        with self._warning_once():
            self._keep(lambda row: row["step"] != step or row.get("kind") != kind)

    def append(self, row: dict[str, Any]) -> None:
        """Add a row, and write it to the disk if possible."""
        self._waiting.append((row["step"], json.dumps(_plain(row), allow_nan=False).encode() + b"\n"))
        with self._warning_once():
            self._write(b"".join(line for _, line in self._waiting))
            self._waiting.clear()
        self._lost += [step for step, _ in self._waiting[:-WAITING]]
        del self._waiting[:-WAITING]

    def close(self) -> None:
        """Write the waiting lines, and warn of those that are lost."""
        with self._warning_once():
            if self._waiting:
                self._write(b"".join(line for _, line in self._waiting))
                self._waiting.clear()
        missing = self._lost + [step for step, _ in self._waiting]
        if missing:
            logger.warning(
                "%s lacks %d lines, of steps %d to %d, which could not be written.",
                self.path,
                len(missing),
                min(missing),
                max(missing),
            )

    @contextlib.contextmanager
    def _warning_once(self) -> Iterator[None]:
        """Warn once that the file cannot be read or written, instead of ending the training."""
        try:
            yield
        except (OSError, ReportError) as error:
            if not self._has_warned:
                cause = f"{self.path} cannot be written: {error.strerror}" if isinstance(error, OSError) else str(error)
                logger.warning("%s. The training goes on without it.", cause.rstrip("."))
                self._has_warned = True

    def _write(self, lines: bytes) -> None:
        """Append complete lines or nothing."""
        with open(self.path, "a+b", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            if end and file.seek(end - 1) is not None and file.read(1) != b"\n":
                lines = b"\n" + lines  # after an incomplete line
            try:
                written = file.write(lines)
                while written < len(lines):
                    written += file.write(lines[written:])
                os.fsync(file.fileno())
            except OSError:
                with contextlib.suppress(OSError):
                    file.truncate(end)
                raise

    def _keep(self, condition: Callable[[dict[str, Any]], bool]) -> None:
        if self.path.exists():
            kept = [line for line, row in _lines(self.path) if condition(row)]
            write_atomically(self.path, "".join(line + "\n" for line in kept))


def read_history(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a history, in the order of their steps.

    Args:
        path: the file, or the output folder of a run.

    Raises:
        ReportError: there is no such file.
    """
    require_path(path)
    file = Path(path, HISTORY) if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise ReportError(
            f"There is no {HISTORY} in {path}. Give the output_dir of a training run with a depthscope callback."
        )
    return sorted((row for _, row in _lines(file)), key=lambda row: row["step"])


def _lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Each line and its row; an incomplete line is skipped with a note."""
    lines, broken = [], []
    try:
        content = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ReportError(f"{path} cannot be read: {error.strerror}.") from error
    for number, line in enumerate(content.split("\n")[:-1], 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            lines.append((line, row))
        else:
            broken.append(number)
    if broken:
        logger.warning("%s: skipped incomplete line %s.", path, ", ".join(map(str, broken)))
    return lines


def _plain(value: Any) -> Any:
    """Replace NaN and infinities, which JSON lacks, by None."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
