"""`RequestLog`: what clients sent and were answered, without their tokens."""

import json
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any
from urllib.parse import parse_qs

from hub.faults import Fault


@dataclass
class LoggedRequest:
    """A request; `user` is whose token it carried, where one is looked at, `status` what was answered, if anything."""

    operation: str
    method: str
    path: str
    query: str
    headers: dict[str, str]
    had_token: bool
    fault: Fault
    body: bytes = b""
    user: str | None = None
    status: int | None = None

    @property
    def parameters(self) -> dict[str, list[str]]:
        return parse_qs(self.query)

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def lines(self) -> list[Any]:
        """The lines of an NDJSON body: a commit's header and operations."""
        return [json.loads(line) for line in self.body.splitlines() if line.strip()]


@dataclass
class RequestLog:
    """All requests in the order in which they came."""

    entries: list[LoggedRequest] = field(default_factory=list)

    def of(self, operation: str = "*", path: str = "*") -> list[LoggedRequest]:
        """Those of an operation to a path; both may hold `*` and `?`."""
        return [
            entry for entry in list(self.entries) if fnmatch(entry.operation, operation) and fnmatch(entry.path, path)
        ]

    def clear(self) -> None:
        self.entries.clear()
