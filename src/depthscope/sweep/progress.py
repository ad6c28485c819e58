"""The progress of a sweep on a terminal: one bar over all points and one per running point; in a file, lines."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from depthscope.console.terminal import terminal
from depthscope.sweep.point import ReportProgress

__all__ = ["SweepProgress", "showing_points"]

BETWEEN = 0.2  # seconds between two updates of a bar


class SweepProgress:
    """Shows bars on a terminal, lines elsewhere, and nothing if `console` is None."""

    def __init__(self, points: int, console: Console | None, bars: Progress | None) -> None:
        self._console, self._bars = console, bars
        self._points = points
        self._done = 0
        self._tasks: dict[str, TaskID] = {}
        self._stages: dict[str, str] = {}
        self._updated: dict[str, float] = {}
        self._overall = bars.add_task("points", total=points) if bars else None

    def say(self, line: str) -> None:
        """Show the current work before the first point."""
        if self._bars is not None and self._overall is not None:
            self._bars.update(self._overall, description=line)
        elif self._console is not None:
            self._console.print(Text(line), soft_wrap=True)

    def note(self, line: str) -> None:
        """Print a line that stays on the screen."""
        if self._console is not None:
            self._console.print(Text(line), soft_wrap=True)

    def begin(self) -> None:
        """The first point begins."""
        if self._bars is not None and self._overall is not None:
            self._bars.update(self._overall, description="points")

    def reporter(self, point: str) -> ReportProgress:
        """The function that receives the progress of one point."""

        def report(stage: str, done: int, total: int, loss: float | None) -> None:
            self.at(point, stage, done, total, loss)

        return report

    def at(self, point: str, stage: str, done: int, total: int, loss: float | None) -> None:
        """Show the progress of a point."""
        now = time.monotonic()
        if self._bars is None or (done < total and now - self._updated.get(point, 0.0) < BETWEEN):
            return
        self._updated[point] = now
        if self._stages.get(point) != stage:  # a new bar, since a bar cannot return to an unknown total
            self._forget(point)
            self._stages[point] = stage
            self._tasks[point] = self._bars.add_task(point, total=total or None)
        description = f"{point}  {stage}" + (f", loss {loss:.3f}" if loss is not None else "")
        self._bars.update(self._tasks[point], description=description, completed=done)

    def finished(self, point: str, status: str, before: bool = False) -> None:
        """A point is done."""
        self._done += 1
        if self._bars is not None:
            assert self._overall is not None
            self._forget(point)
            self._bars.update(self._overall, completed=self._done)
        if self._console is not None and not before:
            self._console.print(Text(f"{point}: {status} ({self._done} of {self._points})"), soft_wrap=True)

    def _forget(self, point: str) -> None:
        self._stages.pop(point, None)
        if self._bars is not None and point in self._tasks:
            self._bars.remove_task(self._tasks.pop(point))


@contextmanager
def showing_points(points: int, *, visible: bool) -> Iterator[SweepProgress]:
    """Show the progress of a sweep on standard error while it runs inside."""
    # Passed explicitly, since a Console looks up sys.stderr at every line, which is redirected during the training.
    console = terminal(stderr=True, file=sys.stderr)
    if not visible:
        yield SweepProgress(points, None, None)
    elif not console.is_terminal:
        yield SweepProgress(points, console, None)
    else:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("elapsed,"),
            TimeRemainingColumn(),
            TextColumn("left"),
        )
        with Progress(*columns, console=console, transient=True) as bars:
            yield SweepProgress(points, bars.console, bars)
