"""A visitor without a browser: plain HTTP to a served Space, politely or not."""

import json
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

PATIENCE = 60.0


class Refused(Exception):
    """What the Space answers instead of a result."""


class Visitor:
    """One program that uses the REST interface of a Space."""

    def __init__(self, url: str) -> None:
        self.client = httpx.Client(base_url=f"{url}/gradio_api", timeout=PATIENCE)
        self.address = (str(urlsplit(url).hostname), int(urlsplit(url).port or 0))

    def upload(self, path: Path) -> dict[str, Any]:
        """Upload a file; gives it as an argument of an endpoint."""
        with path.open("rb") as file:
            answer = self.client.post("/upload", files={"files": (path.name, file)})
        answer.raise_for_status()
        return {"path": answer.json()[0], "meta": {"_type": "gradio.FileData"}}

    def ask(self, endpoint: str, *data: Any, session: str | None = None) -> str:
        """Ask an endpoint, without reading its answer; gives the event."""
        asked = self.client.post(f"/call/{endpoint}", json={"data": list(data), "session_hash": session})
        asked.raise_for_status()
        return str(asked.json()["event_id"])

    def join(self, endpoint: str, *data: Any, session: str) -> None:
        """Ask an endpoint as a page does; the answer comes on `/queue/data`."""
        config = self.client.get(str(self.client.base_url).replace("gradio_api/", "config")).json()
        index = next(entry["id"] for entry in config["dependencies"] if entry["api_name"] == endpoint)
        body = {"data": list(data), "fn_index": index, "session_hash": session}
        self.client.post("/queue/join", json=body).raise_for_status()

    def read(self, endpoint: str, event: str) -> Any:
        """Read the answer to its end; gives the result.

        Raises:
            Refused: the Space answers with an error, in these words.
        """
        kind, end = "", time.monotonic() + PATIENCE
        with self.client.stream("GET", f"/call/{endpoint}/{event}") as lines:
            for line in lines.iter_lines():
                assert time.monotonic() < end, "no answer came"  # signs of life come every 15 seconds
                if line.startswith("event: "):
                    kind = line.removeprefix("event: ")
                elif line.startswith("data: ") and kind in ("complete", "error"):
                    content = json.loads(line.removeprefix("data: "))
                    if kind == "error":
                        raise Refused(content["error"] if isinstance(content, dict) else str(content))
                    return content[0] if content else None
        raise Refused("the stream ended without an answer")

    def call(self, endpoint: str, *data: Any, session: str | None = None) -> Any:
        """Ask, and read the answer."""
        return self.read(endpoint, self.ask(endpoint, *data, session=session))

    @contextmanager
    def reading(self, endpoint: str, event: str) -> Iterator[socket.socket]:
        """A connection on which the answer is asked for; what comes is for the caller to read, or not."""
        with socket.create_connection(self.address, timeout=PATIENCE) as connection:
            connection.sendall(
                f"GET /gradio_api/call/{endpoint}/{event} HTTP/1.1\r\nHost: {self.address[0]}\r\n\r\n".encode()
            )
            yield connection

    def begin_upload(self, announced: int, sent: int) -> socket.socket:
        """Begin the upload of so many bytes, of which some are sent."""
        head = b'--cut\r\nContent-Disposition: form-data; name="files"; filename="model.zip"\r\n\r\n'
        connection = socket.create_connection(self.address, timeout=PATIENCE)
        connection.sendall(
            b"POST /gradio_api/upload HTTP/1.1\r\nHost: space\r\nContent-Type: multipart/form-data; boundary=cut\r\n"
            + f"Content-Length: {announced}\r\n\r\n".encode()
            + head
            + bytes(sent)
        )
        return connection


def reset(connection: socket.socket) -> None:
    """Close a connection as the death of its machine does: without a goodbye."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
