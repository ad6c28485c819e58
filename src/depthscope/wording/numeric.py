"""Checks of numbers that people give: whole, finite, within bounds. The message of a refusal names the bounds."""

import math
import numbers
import reprlib
import sys
from typing import Any

from depthscope.errors import SettingsError

__all__ = ["LARGEST_SEED", "MOST", "require_number", "require_whole"]

MOST = 2**31 - 1  # of anything that is counted: no memory holds more
LARGEST_SEED = 2**63 - 1  # what a report holds, and every generator takes


def require_whole(name: str, value: Any, least: int = 1, meaning: str = "", most: int = MOST) -> int:
    """Return a whole number from `least` to `most`; NumPy's integers are accepted, booleans are not.

    Raises:
        SettingsError: the value is not such a number; the message names the value and the bounds.
    """
    number = int(value) if isinstance(value, numbers.Integral) and not isinstance(value, bool) else None
    if number is None or not least <= number <= most:
        bounds = f"of at most {most:,}" if number is not None and number > most else f"of at least {least}"
        note = f" ({meaning})" if meaning else ""
        raise SettingsError(f"{name} is {_short_repr(value)}; give a whole number {bounds}{note}.")
    return number


def require_number(
    name: str, value: Any, expected: str, *, above: float = -math.inf, least: float = -math.inf, below: float = math.inf
) -> float:
    """Return a finite number within bounds.

    Args:
        name: the setting's name.
        value: its value.
        expected: the allowed values in words, such as "a share of the peak above 0".
        above: the value must be greater than this.
        least: the value must be at least this.
        below: the value must be less than this.

    Raises:
        SettingsError: the value is not such a number.
    """
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    # An integer of hundreds of digits cannot become a float, and is larger than any bound.
    is_finite = is_number and (isinstance(value, numbers.Integral) or math.isfinite(value))
    if not is_finite or not above < value or not least <= value < min(below, sys.float_info.max):
        raise SettingsError(f"{name} is {_short_repr(value)}; give {expected}.")
    return float(value)


def _short_repr(value: Any) -> str:
    try:
        return reprlib.repr(value)
    except ValueError:  # Python writes no number of more digits
        return "a number of thousands of digits"
