"""What a person sees while a sweep runs: a bar over the points and one for each that is running; lines in a file."""

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
from depthscope.sweep.point import Told

__all__ = ["Shown", "showing_points"]

BETWEEN = 0.2  # seconds between two updates of a bar


class Shown:
    """Bars on a terminal, or lines where there is none; nothing where `console` is None."""

    def __init__(self, points: int, console: Console | None, bars: Progress | None) -> None:
        self._console, self._bars = console, bars
        self._points = points
        self._done = 0
        self._tasks: dict[str, TaskID] = {}
        self._stages: dict[str, str] = {}
        self._updated: dict[str, float] = {}
        self._overall = bars.add_task("points", total=points) if bars else None

    def say(self, line: str) -> None:
        """Say what is being done before the first point."""
        if self._bars is not None and self._overall is not None:
            self._bars.update(self._overall, description=line)
        elif self._console is not None:
            self._console.print(Text(line), soft_wrap=True)

    def note(self, line: str) -> None:
        """Say what stays on the screen."""
        if self._console is not None:
            self._console.print(Text(line), soft_wrap=True)

    def begin(self) -> None:
        """The first point begins."""
        if self._bars is not None and self._overall is not None:
            self._bars.update(self._overall, description="points")

    def teller(self, point: str) -> Told:
        """What one point tells its progress to."""

        def told(stage: str, done: int, total: int, loss: float | None) -> None:
            self.at(point, stage, done, total, loss)

        return told

    def at(self, point: str, stage: str, done: int, total: int, loss: float | None) -> None:
        """How far a point is."""
        now = time.monotonic()
        if self._bars is None or (done < total and now - self._updated.get(point, 0.0) < BETWEEN):
            return
        self._updated[point] = now
        if self._stages.get(point) != stage:  # a bar of its own, since one cannot go back to an unknown total
            self._forget(point)
            self._stages[point] = stage
            self._tasks[point] = self._bars.add_task(point, total=total or None)
        words = f"{point}  {stage}" + (f", loss {loss:.3f}" if loss is not None else "")
        self._bars.update(self._tasks[point], description=words, completed=done)

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
def showing_points(points: int, *, visible: bool) -> Iterator[Shown]:
    """Show the progress of a sweep on standard error while it runs inside."""
    # Named, since a Console looks up sys.stderr at every line, and while the Trainer is kept quiet that is nowhere.
    console = terminal(stderr=True, file=sys.stderr)
    if not visible:
        yield Shown(points, None, None)
    elif not console.is_terminal:
        yield Shown(points, console, None)
    else:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("gone,"),
            TimeRemainingColumn(),
            TextColumn("left"),
        )
        with Progress(*columns, console=console, transient=True) as bars:
            yield Shown(points, bars.console, bars)
