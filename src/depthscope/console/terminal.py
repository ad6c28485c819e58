"""The terminal that tables are printed on: never so narrow that nothing is left of them, never absurdly wide."""

import os
import shutil
from typing import IO

from rich.console import Console

__all__ = ["readable_width", "terminal"]

NARROWEST, WIDEST = 40, 1000  # characters


def terminal(*, stderr: bool = False, file: IO[str] | None = None) -> Console:
    """A console of rich on standard output, on standard error, or on what is either now and later something else.

    `COLUMNS` says how wide it is, where that is a width: 0, as some shells and services set it, is not known, and on a
    console of no width rich prints nothing at all.
    """
    if "COLUMNS" in os.environ or "LINES" in os.environ:
        # shutil, unlike rich, takes nothing for a size that is no number above 0.
        return Console(
            stderr=stderr, file=file, width=readable_width(), height=max(1, shutil.get_terminal_size().lines)
        )
    made = Console(stderr=stderr, file=file)
    if not NARROWEST <= made.width <= WIDEST:
        made.width = _bounded(made.width)
    return made


def readable_width() -> int:
    """How many characters wide the terminal is, within reason."""
    return _bounded(shutil.get_terminal_size().columns)


def _bounded(width: int) -> int:
    return min(max(width, NARROWEST), WIDEST)
