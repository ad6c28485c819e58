"""Checks of JSON from strangers: bounds on its numbers, texts and depth, and errors in plain words."""

import os
import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from depthscope.errors import ReportError
from depthscope.files.atomic import read_text
from depthscope.files.strict_json import parse

__all__ = [
    "MAX_BYTES",
    "MAX_FLOAT",
    "MAX_INTEGER",
    "UNPRINTABLE",
    "cleaned",
    "first_problem",
    "first_value",
    "read_object",
]

MAX_BYTES = 64 * 2**20  # of one file
MAX_INTEGER = 2**63 - 1
MAX_FLOAT = 1e100  # beyond any measurement, and far enough from overflow to compute with
MAX_TEXT = 20_000  # characters of one string
MAX_MESSAGE = 400  # characters

# Control characters could drive a terminal, and bidirectional ones disguise a name; a lone surrogate cannot be written.
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def read_object(path: str | os.PathLike[str], max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Read a JSON object of another program, with null for numbers that are not finite; {} if there is no such file.

    Raises:
        ReportError: the file is too large, not JSON or not an object.
    """
    if not Path(path).is_file():
        return {}
    name = repr(os.fspath(path))
    content = parse(read_text(path, max_bytes), name, not_finite_is_null=True)
    if not isinstance(content, dict):
        raise ReportError(f"{name} is JSON but not an object; it is damaged, or not the expected file.")
    return content


def cleaned(value: Any, where: str, *, max_depth: int, numbers: bool = True) -> Any:
    """Copy a JSON-like value and replace unprintable characters; refuse values too deep, too long or not finite.

    Args:
        value: the value.
        where: the name of the value in a message.
        max_depth: the deepest nesting of lists and mappings.
        numbers: also refuse numbers that are not finite or beyond their bounds.

    Raises:
        ValueError: the value is refused; the message names the field and the bound.
    """

    def copy(value: Any, where: str, depth: int) -> Any:
        if depth > max_depth:
            raise ValueError(f"{where} is nested deeper than {max_depth} levels")
        if isinstance(value, str):
            if len(value) > MAX_TEXT:
                raise ValueError(f"{where} is a text of {len(value):,} characters; at most {MAX_TEXT:,} are allowed")
            return UNPRINTABLE.sub("\ufffd", value)
        if numbers and isinstance(value, float) and not abs(value) <= MAX_FLOAT:
            raise ValueError(f"{where} is {value}, expected null or a finite number of at most {MAX_FLOAT:g}")
        if numbers and isinstance(value, int) and abs(value) > MAX_INTEGER:
            raise ValueError(f"{where} is an integer beyond 64 bits")
        if isinstance(value, Mapping):
            items = ((copy(key, f"a name in {where}", depth + 1), item) for key, item in value.items())
            prefix = "" if depth == 0 else f"{where}."
            return {key: copy(item, f"{prefix}{key}", depth + 1) for key, item in items}
        if isinstance(value, (list, tuple)):
            return [copy(item, f"{where}[{index}]", depth + 1) for index, item in enumerate(value)]
        return value

    return copy(value, where, 0)


def first_problem(error: ValidationError, whole: str = "") -> str:
    """The first problem, as "path.of.field: problem"; `whole` names the file if the problem is in no single field."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(map(str, first["loc"])) or whole
    message = UNPRINTABLE.sub("\ufffd", first["msg"].removeprefix("Value error, "))[:MAX_MESSAGE].rstrip(".")
    return f"{where}: {message}" if where else message


def first_value(error: ValidationError) -> str:
    """The first problem with the value that was found, and how many more there are."""
    problems = error.errors(include_url=False, include_context=False)
    first = problems[0]
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    message = first["msg"].removeprefix("Value error, ")
    value = first["input"]
    if isinstance(value, (str, int, float, type(None))) and first["type"] not in ("missing", "value_error"):
        message += f", not {reprlib.repr(value)}"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    joint = "" if message.startswith("[") or not field else ": "
    problem = UNPRINTABLE.sub("\ufffd", f"{field}{joint}{message}")
    return f"{problem[:500]}{more}"
