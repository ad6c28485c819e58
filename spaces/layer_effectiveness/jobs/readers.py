"""Which visitors still read their answers: those with an open stream of answers from which they read.

A program may request an analysis (`POST /call/...`, `POST /queue/join`) and end before it reads the answer. Only the
connection shows this: a visitor is present as long as they read from an open connection.
"""

import re
import threading
import time
from collections import Counter
from typing import Any
from urllib.parse import parse_qs

__all__ = ["Listening", "Readers"]

QUEUE = re.compile(r"/queue/data/?$")
CALL = re.compile(r"/call/(?:v2/)?[^/]+/(?P<event>[^/]+)/?$")
MOST_REMEMBERED = 4096  # visitors who have left


class Readers:
    """The time of each visitor's last read, by the hash of their session."""

    def __init__(self) -> None:
        self._open: Counter[str] = Counter()  # streams that wait for something to send
        self._last: dict[str, float] = {}
        self._lock = threading.Lock()

    def heard(self, session: str) -> float:
        """The time (`time.monotonic`) at which a visitor last read; 0 if never."""
        with self._lock:
            return time.monotonic() if self._open[session] > 0 else self._last.get(session, 0.0)

    def come(self, session: str) -> None:
        """Note that a stream of a visitor waits for answers; the visitor counts as reading as long as it does."""
        with self._lock:
            self._open[session] += 1

    def go(self, session: str) -> None:
        """Note that a stream is closed, or that its last message has not been read yet."""
        with self._lock:
            self._open[session] -= 1
            if self._open[session] <= 0:
                del self._open[session]
            self._last.pop(session, None)  # the latest are at the end
            self._last[session] = time.monotonic()
            while len(self._last) > MOST_REMEMBERED:
                del self._last[next(iter(self._last))]


class Listening:
    """A layer around the server's program (ASGI) that reports to `readers` who reads.

    The server closes a stream as soon as its client has ended or closed half of the connection. If a client stops
    reading, sending blocks once the buffers are full.
    """

    def __init__(self, app: Any, readers: Readers) -> None:
        self.app = app
        self.readers = readers

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one request."""
        session = _session(scope) if scope["type"] == "http" and scope["method"] == "GET" else None
        if session is None:
            await self.app(scope, receive, send)
            return

        async def taken(message: Any) -> None:
            self.readers.go(session)
            try:
                await send(message)
            finally:
                self.readers.come(session)

        self.readers.come(session)
        try:
            await self.app(scope, receive, taken)
        finally:
            self.readers.go(session)


def _session(scope: Any) -> str | None:
    """The visitor whose answers a request reads, or None."""
    if QUEUE.search(scope["path"]):
        return next(iter(parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", ())), None)
    if found := CALL.search(scope["path"]):
        event = scope["app"].get_blocks()._queue.event_ids_to_events.get(found["event"])
        # A visitor without a session is identified by their event.
        return found["event"] if event is None else str(event.session_hash)
    return None
