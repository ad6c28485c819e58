"""Numbers of NumPy and PyTorch as Python numbers: YAML writes others as Python objects, and JSON cannot write them."""

import math
from numbers import Integral, Real
from typing import Any

__all__ = ["finite_number", "plain_scalars"]


def plain_scalars(value: Any) -> Any:
    """Replace scalars of other libraries in a JSON-like value by Python's; an array without dimensions is a scalar.

    Everything else in it stays as it is.
    """
    if isinstance(value, dict):
        return {plain_scalars(key): plain_scalars(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_scalars(item) for item in value]
    # NumPy's float64 and str_ are subclasses of Python's, but YAML does not write them as plain numbers and texts.
    if type(value).__module__ != "builtins" and getattr(value, "shape", None) == () and hasattr(value, "item"):
        return value.item()
    return value


def finite_number(value: Any, limit: float = math.inf) -> float | int | None:
    """A real number of any library as a Python number; None if it is no number, not finite or beyond ±`limit`."""
    value = plain_scalars(value)
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    value = int(value) if isinstance(value, Integral) else float(value)
    # An integer of hundreds of digits cannot become a float, so `isfinite` would fail on it.
    is_finite = isinstance(value, int) or math.isfinite(value)
    return value if is_finite and abs(value) <= limit else None
