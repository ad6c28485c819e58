"""Texts in a CSV file that a spreadsheet program would read as a formula; names come from strangers.

A text that begins like a formula gets an apostrophe before it, which marks it as text (OWASP, "CSV Injection").
Numbers, also negative ones, stay as they are.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["csv_cell", "csv_of_frame"]

# The wide forms too, which some programs read as the narrow ones.
BEGINNINGS = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")


def csv_cell(value: Any) -> Any:
    """The content of a cell; only a text that begins like a formula and is no number is changed."""
    if not isinstance(value, str) or not (
        value.lstrip().startswith(BEGINNINGS) or value.startswith(("\t", "\r", "\n"))
    ):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value


def csv_of_frame(frame: "pd.DataFrame") -> str:
    """A frame as CSV without its index."""
    return frame.rename(columns=csv_cell).map(csv_cell).to_csv(index=False)
