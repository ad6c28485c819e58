"""JSON that is read strictly and written canonically, so that equal content gives equal bytes."""

import json
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from depthscope.errors import ReportError

__all__ = ["canonical", "encode", "parse"]


def parse(text: str, source: str, *, not_finite_is_null: bool = False) -> Any:
    """Parse JSON; refuse NaN, infinities, duplicate keys, and digits or depth beyond what Python reads safely.

    Args:
        text: the JSON.
        source: the name of the text in an error message.
        not_finite_is_null: read NaN, Infinity and -Infinity as null, for files of other programs.

    Raises:
        ReportError: the text is refused; the message says where and why.
    """
    if not isinstance(text, str):
        raise ReportError(f"{source} is {type(text).__name__}, not JSON text; give a string.")
    constant = _null if not_finite_is_null else _refuse_constant
    try:
        return json.loads(text, parse_constant=constant, object_pairs_hook=_without_duplicates)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise ReportError(f"{source} is not JSON ({error.msg} at {place}); it is damaged, or not a report.") from error
    except RecursionError as error:
        raise ReportError(f"{source} is not a report: its JSON is nested too deeply.") from error
    except ValueError as error:
        raise ReportError(f"{source} is not a valid report: {error}.") from error


def canonical(value: Any, first: Sequence[str] = ()) -> Any:
    """Order the keys of a JSON-like value: those in `first` in their order, then the others by name, at every level."""
    if isinstance(value, Mapping):
        keys = [key for key in first if key in value] + sorted(value.keys() - set(first))
        return {key: canonical(value[key]) for key in keys}
    if isinstance(value, list):
        return [canonical(item) for item in value]
    return value


def encode(value: Any, indent: str = "") -> str:
    """Encode JSON with an indent, but each list of plain values, such as a row of a matrix, on one line."""
    inner = indent + "  "
    if isinstance(value, dict) and value:
        items = [f"{inner}{_plain(key)}: {encode(item, inner)}" for key, item in value.items()]
        return "{\n" + ",\n".join(items) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value):
        return "[\n" + ",\n".join(f"{inner}{encode(item, inner)}" for item in value) + f"\n{indent}]"
    return _plain(value)


def _plain(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _null(name: str) -> None:
    return None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"it holds {name}; only finite numbers and null are allowed")


def _without_duplicates(items: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, value in items:
        if key in content:
            raise ValueError(f"the field {reprlib.repr(key)} is given twice")
        content[key] = value
    return content
