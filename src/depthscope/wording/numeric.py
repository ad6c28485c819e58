"""Numbers that people give: whole or not, finite, within bounds; checked before any work, and told with the bounds."""

import math
import numbers
import reprlib
import sys
from typing import Any

from depthscope.errors import SettingsError

__all__ = ["LARGEST_SEED", "MOST", "require_number", "require_whole"]

MOST = 2**31 - 1  # of anything that is counted: no memory holds more
LARGEST_SEED = 2**63 - 1  # what a report holds, and every generator takes


def require_whole(name: str, value: Any, least: int = 1, what: str = "", most: int = MOST) -> int:
    """A whole number from `least` to `most`; integers of NumPy count, booleans do not.

    Raises:
        SettingsError: anything else; the message names it and what is allowed.
    """
    whole = int(value) if isinstance(value, numbers.Integral) and not isinstance(value, bool) else None
    if whole is None or not least <= whole <= most:
        bounds = f"of at most {most:,}" if whole is not None and whole > most else f"of at least {least}"
        of = f" ({what})" if what else ""
        raise SettingsError(f"{name} is {_shown(value)}; give a whole number {bounds}{of}.")
    return whole


def require_number(
    name: str, value: Any, what: str, *, above: float = -math.inf, least: float = -math.inf, below: float = math.inf
) -> float:
    """A finite number above a bound, or of at least one, and below another.

    Args:
        name: what it is called.
        value: what was given.
        what: what to give, in words: "a share of the peak above 0".
        above: a bound that it is greater than.
        least: the smallest that is allowed.
        below: a bound that it is less than.

    Raises:
        SettingsError: anything else.
    """
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    # An integer of hundreds of digits is no float, and larger than any bound.
    is_finite = is_number and (isinstance(value, numbers.Integral) or math.isfinite(value))
    if not is_finite or not above < value or not least <= value < min(below, sys.float_info.max):
        raise SettingsError(f"{name} is {_shown(value)}; give {what}.")
    return float(value)


def _shown(value: Any) -> str:
    try:
        return reprlib.repr(value)
    except ValueError:  # Python writes no number of more digits
        return "a number of thousands of digits"
