"""A Hugging Face Hub on the loopback interface, just large enough to download models from folders.

`FakeHub({"org/name": folder}, refusals)` serves those folders; `refusals` names repositories that answer with an error
code of the Hub instead, such as `GatedRepo` or `RepoNotFound`, or with `ServerError`.
"""

import hashlib
import json
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType

COMMIT = "c0ffee" * 6 + "c0ff"


class FakeHub:
    """Serves inside a `with` block; `url` is what HF_ENDPOINT should be."""

    def __init__(self, repositories: Mapping[str, Path], refusals: Mapping[str, str]) -> None:
        handler = type("Handler", (_Handler,), {"repositories": repositories, "refusals": refusals})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "FakeHub":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    repositories: Mapping[str, Path]
    refusals: Mapping[str, str]

    def log_message(self, *_: object) -> None:
        """Say nothing on the terminal."""

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        repository, rest = "/".join(parts[2:4] if is_api else parts[:2]), parts[4:] if is_api else parts[2:]
        refusal = self.refusals.get(repository)
        if refusal == "GatedRepo" and is_api:
            refusal = None  # the Hub tells anybody what a gated repository holds
        if refusal == "ServerError":
            return self.answer(500)
        if refusal or repository not in self.repositories:
            return self.answer(403 if refusal == "GatedRepo" else 404, code=refusal or "RepoNotFound")
        files = {path.name: path for path in self.repositories[repository].iterdir()}
        return self.answer_api(rest, files, repository) if is_api else self.answer_file(files.get(rest[-1]))

    do_HEAD = do_GET

    def answer_api(self, rest: list[str], files: Mapping[str, Path], repository: str) -> None:
        if rest[:1] == ["tree"]:
            tree = [
                {"type": "file", "path": name, "size": path.stat().st_size, "oid": ""} for name, path in files.items()
            ]
            return self.answer(200, json.dumps(tree if len(rest) == 2 else []).encode())
        if rest[:1] == ["revision"] and rest[1] not in ("main", COMMIT):
            return self.answer(404, code="RevisionNotFound")
        siblings = [{"rfilename": name} for name in files]
        return self.answer(200, json.dumps({"id": repository, "sha": COMMIT, "siblings": siblings}).encode())

    def answer_file(self, path: Path | None) -> None:
        if path is None:
            return self.answer(404, code="EntryNotFound")
        content = path.read_bytes()
        return self.answer(200, content, etag=hashlib.sha1(content).hexdigest())

    def answer(self, status: int, content: bytes = b"{}", code: str | None = None, etag: str | None = None) -> None:
        headers = {"X-Error-Code": code, "ETag": etag and f'"{etag}"', "X-Repo-Commit": COMMIT}
        self.send_response(status)
        for name, value in headers.items():
            if value:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
