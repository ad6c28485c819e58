"""Times and shares that people write with their unit: 60s, 5m, 1h; 2%."""

import math
import re
from typing import Any

from depthscope.errors import SettingsError
from depthscope.wording.numeric import require_number

__all__ = ["format_seconds", "format_share", "seconds_of", "share_of"]

SECONDS = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
NUMBER = r"\s*([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?|[0-9]+\.)\s*"
LONGEST = 365 * 24 * 3600.0
TIME, SHARE = re.compile(f"{NUMBER}(|s|m|min|h)\\s*", re.ASCII), re.compile(f"{NUMBER}(|%)\\s*", re.ASCII)


def seconds_of(name: str, value: Any) -> float:
    """A time above 0 and of at most a year, given in seconds or as a text with its unit.

    Raises:
        SettingsError: the value is no such time.
    """
    found = TIME.fullmatch(value) if isinstance(value, str) else None
    number = float(found[1]) * SECONDS[found[2]] if found else value
    expected = "a time above 0 and of at most a year: seconds, or a text such as 60s, 5m or 1h"
    return _within(name, value, number, LONGEST, expected)


def share_of(name: str, value: Any, meaning: str) -> float:
    """A share above 0 and below 1, given as a number or as a text, which may be a percentage.

    Raises:
        SettingsError: the value is no such share.
    """
    found = SHARE.fullmatch(value) if isinstance(value, str) else None
    number = float(found[1]) / (100 if found[2] else 1) if found else value
    expected = f"{meaning}: a share above 0 and below 1 such as 0.02, or a text such as 2%"
    return _within(name, value, number, math.nextafter(1, 0), expected)


def _within(name: str, given: Any, number: Any, most: float, expected: str) -> float:
    """The number, if it is one and above 0; a refusal has what was given."""
    try:
        return require_number(name, number, expected, above=0, below=math.nextafter(most, math.inf))
    except SettingsError:
        if isinstance(given, str):
            raise SettingsError(f"{name} is {given[:60]!r}; give {expected}.") from None
        raise


def format_seconds(seconds: float) -> str:
    """A time in words, with three digits: 58.3 seconds, 4.5 minutes, 2 hours."""
    for size, unit in ((3600.0, "hour"), (60.0, "minute")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}s"
    return "1 second" if seconds == 1 else f"{seconds:.3g} seconds"


def format_share(share: float) -> str:
    """A share as a percentage, with two digits: 1.8%."""
    return f"{100 * share:.2g}%" if share < 1 else f"{100 * share:.0f}%"
