"""A progress bar with the time left, weighted by the work that is really done."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
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

# The estimate looks back this far, in seconds: experiments on early layers take longer than on late ones.
ESTIMATE_SECONDS = 120.0


class Progress:
    """Says what is being done and how far it is; `quiet` shows nothing and still counts."""

    def __init__(self, total: float, bar: Bar | None) -> None:
        self.total = total
        self.done = 0.0
        self.stage = "starting"
        self._bar = bar
        self._task = bar.add_task(self.stage, total=total) if bar else None

    def at(self, stage: str) -> None:
        """Say what comes next."""
        self.stage = stage
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=stage)

    def advance(self, work: float) -> None:
        """Count work done, in forward passes of one layer over one block."""
        self.done += work
        if self._bar is not None and self._task is not None:
            self._bar.advance(self._task, work)


@contextmanager
def showing_status(doing: str, *, visible: bool) -> Iterator[None]:
    """Say on a terminal what is being done, for work whose length is not known."""
    console = Console(stderr=True)
    if not visible or not console.is_terminal:
        yield
        return
    with console.status(Text(f"{doing} ...")):
        yield


@contextmanager
def showing_progress(total: float, *, visible: bool) -> Iterator[Progress]:
    """Show a bar on standard error while the work inside goes on; on a file or a pipe nothing is drawn."""
    console = Console(stderr=True)
    if not visible or not (console.is_terminal or console.is_jupyter):
        yield Progress(total, None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("gone,"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    with Bar(*columns, console=console, transient=True, speed_estimate_period=ESTIMATE_SECONDS) as bar:
        yield Progress(total, bar)
