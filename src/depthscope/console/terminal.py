"""The terminal that tables are printed on, with a bounded width."""

import os
import shutil
from typing import IO

from rich.console import Console

__all__ = ["readable_width", "terminal"]

NARROWEST, WIDEST = 40, 1000  # characters


def terminal(*, stderr: bool = False, file: IO[str] | None = None) -> Console:
    """A rich console on standard output, on standard error or on `file`.

    `COLUMNS` sets its width. Some shells and services set it to 0, which means unknown; on a console of width 0 rich
    prints nothing.
    """
    if "COLUMNS" in os.environ or "LINES" in os.environ:
        # shutil, unlike rich, ignores sizes that are not above 0.
        return Console(
            stderr=stderr, file=file, width=readable_width(), height=max(1, shutil.get_terminal_size().lines)
        )
    console = Console(stderr=stderr, file=file)
    if not NARROWEST <= console.width <= WIDEST:
        console.width = _bounded(console.width)
    return console


def readable_width() -> int:
    """The width of the terminal in characters, within bounds."""
    return _bounded(shutil.get_terminal_size().columns)


def _bounded(width: int) -> int:
    return min(max(width, NARROWEST), WIDEST)
