"""Numbers as text: rounded to significant digits, with their unit or their error."""

import math
import sys

__all__ = ["format_count", "format_number", "format_with_error"]

MISSING = "–"


def format_number(value: float | None, digits: int = 4) -> str:
    """Write a number with `digits` significant digits, thousands separated; a dash where there is none."""
    if value is None:
        return MISSING
    if value == 0:
        return "0"
    if not math.isfinite(value):
        return f"{value:g}"
    rounded = float(f"{value:.{digits - 1}e}")
    exponent = int(f"{rounded:e}".split("e")[1])
    if exponent >= 15 or exponent < -5:
        return f"{rounded:.{digits - 1}e}"
    return f"{rounded:,.{max(0, digits - 1 - exponent)}f}"


def format_count(number: float, gap: str = " ") -> str:
    """Write a count with three significant digits and its unit, `gap` between them: 97 k, 475 M, 1.28 B, 1.5 T."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * size:  # from here on three digits round it up to the unit
            return f"{number / size:.3g}{gap}{unit}"
    return f"{number:.3g}"


def format_with_error(value: float | None, error: float | None) -> str:
    """Write `value ± error`, the error with two significant digits and the value to the same decimal place."""
    if value is None or error is None or not math.isfinite(value) or not math.isfinite(error):
        return format_number(value)
    if error <= abs(value) * sys.float_info.epsilon:  # zero, or below the precision of the value
        return format_number(value)
    decimals = 1 - _exponent(error, 2)
    if decimals > 8 or max(abs(value), error) >= 1e15:
        number = f"{value:.{max(1, decimals + _exponent(value, 2))}e}" if value else "0"
        return f"{number} ± {error:.1e}"
    places = max(0, decimals)
    # Adding 0 removes the sign of a value that rounds to 0.
    return f"{round(value, decimals) + 0.0:,.{places}f} ± {round(error, decimals):,.{places}f}"


def _exponent(value: float, digits: int) -> int:
    """The power of ten of a number's first digit, once it is rounded to `digits` significant ones."""
    return int(f"{value:.{digits - 1}e}".split("e")[1])
