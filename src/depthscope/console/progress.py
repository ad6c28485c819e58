"""A progress bar with the remaining time, weighted by the actual work."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from rich.console import RenderableType
from rich.progress import (
    BarColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import (
    Progress as Bar,
)
from rich.text import Text

from depthscope.console.terminal import terminal

# Receives the current stage, and the share of the work that is done, from 0 to 1.
Listener = Callable[[str, float], None]

# The estimate uses this many last seconds: experiments on early layers take longer than on late ones.
ESTIMATE_SECONDS = 120.0


class BarWithResults(Bar):
    """A bar with a line below it for the results so far."""

    results = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        """The bar and the line."""
        yield from super().get_renderables()
        if self.results:
            yield Text(self.results, style="dim", overflow="ellipsis", no_wrap=True)


class Progress:
    """Counts the work that is done, and shows it on a bar or passes it to a `listener`, if there is one."""

    def __init__(self, total: float, bar: BarWithResults | None, listener: Listener | None = None) -> None:
        self.total = total
        self.done = 0.0
        self.stage = "starting"
        self._share = 0.0  # the largest that was told: another estimate of the whole does not take any back
        self._bar = bar
        self._listener = listener
        self._task = bar.add_task(self.stage, total=total) if bar else None

    def at(self, stage: str) -> None:
        """Begin a stage."""
        self.stage = stage
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=stage)
        self._notify()

    def advance(self, work: float) -> None:
        """Count work done, in forward passes of one layer over one block."""
        self.done += work
        if self._bar is not None and self._task is not None:
            self._bar.advance(self._task, work)
        self._notify()

    @property
    def is_seen(self) -> bool:
        """Whether there is a bar."""
        return self._bar is not None

    def expect(self, total: float) -> None:
        """Correct the whole of the work."""
        self.total = total
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, total=total)

    def so_far(self, results: str) -> None:
        """Show the results so far below the bar."""
        if self._bar is not None:
            self._bar.results = results

    def _notify(self) -> None:
        if self._listener is not None:
            self._share = max(self._share, min(1.0, self.done / self.total) if self.total else 1.0)
            self._listener(self.stage, self._share)


@contextmanager
def showing_status(doing: str, *, visible: bool) -> Iterator[None]:
    """Show on a terminal what is being done, for work of unknown length."""
    console = terminal(stderr=True)
    if not visible or not console.is_terminal:
        yield
        return
    with console.status(Text(f"{doing} ...")):
        yield


@contextmanager
def showing_progress(total: float, *, visible: bool, listener: Listener | None = None) -> Iterator[Progress]:
    """Show a bar on standard error during the work inside; nothing is drawn on a file or a pipe.

    A `listener` receives the progress instead.
    """
    if listener is not None:
        yield Progress(total, None, listener)
        return
    console = terminal(stderr=True)
    if not visible or not (console.is_terminal or console.is_jupyter):
        yield Progress(total, None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("elapsed,"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    with BarWithResults(*columns, console=console, transient=True, speed_estimate_period=ESTIMATE_SECONDS) as bar:
        yield Progress(total, bar)
