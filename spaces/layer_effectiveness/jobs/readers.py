"""Which visitors read what they asked for: those whose stream of answers is open, and who take from it.

A program may ask for an analysis (`POST /call/...`, `POST /queue/join`) and go away before it reads a word. Only the
connection tells: a visitor is heard as long as one stands open from which they read.
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
    """When each visitor last read, by the hash of their session."""

    def __init__(self) -> None:
        self._open: Counter[str] = Counter()  # streams that wait for something to send
        self._last: dict[str, float] = {}
        self._lock = threading.Lock()

    def heard(self, session: str) -> float:
        """The time (`time.monotonic`) at which a visitor last read; 0 where they never did."""
        with self._lock:
            return time.monotonic() if self._open[session] > 0 else self._last.get(session, 0.0)

    def come(self, session: str) -> None:
        """A stream of a visitor waits for answers: they are heard as long as it does."""
        with self._lock:
            self._open[session] += 1

    def go(self, session: str) -> None:
        """A stream is closed, or what was sent on it is not taken yet."""
        with self._lock:
            self._open[session] -= 1
            if self._open[session] <= 0:
                del self._open[session]
            self._last.pop(session, None)  # the latest are at the end
            self._last[session] = time.monotonic()
            while len(self._last) > MOST_REMEMBERED:
                del self._last[next(iter(self._last))]


class Listening:
    """A layer around the server's program (ASGI) that tells `readers` who reads.

    The server closes a stream as soon as its client is gone, killed or has closed half of the connection; a client that
    takes nothing more stops the sending once the buffers are full.
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
    """Whose answers a request reads, if any."""
    if QUEUE.search(scope["path"]):
        return next(iter(parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", ())), None)
    if found := CALL.search(scope["path"]):
        event = scope["app"].get_blocks()._queue.event_ids_to_events.get(found["event"])
        # Who names no session is known by their event.
        return found["event"] if event is None else str(event.session_hash)
    return None
