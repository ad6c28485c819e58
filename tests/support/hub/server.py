"""`LocalHub`: the Hub's parts behind a server on a free port, and how clients are pointed at it."""

import logging
import os
import socket
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from huggingface_hub import HfApi

from hub import routes_accounts, routes_collections, routes_files, routes_repos, routes_revisions
from hub.clients import pointed_at
from hub.faults import Faults
from hub.large_files import is_large
from hub.objects import File
from hub.refusal import Refusal
from hub.repositories import Repository
from hub.request_log import LoggedRequest, RequestLog
from hub.state import State, key_of
from hub.storage import LfsStore
from hub.wire import CuttableProtocol, Wire


class LocalHub:
    """Runs inside a `with` block; `url` is what HF_ENDPOINT should be.

    Repositories, collections and accounts can be looked at and changed from the test while clients use them: requests
    are carried out one after another, each as a whole. `part_size` makes uploads of more bytes come in parts;
    `page_size` is the number of entries in a page of a list. `token` and `client` are those of the user in whose name
    this process is connected, where the fixture made the Hub.
    """

    token: str
    client: HfApi

    def __init__(self, part_size: int | None = None, page_size: int = 1000) -> None:
        self.state = State(store=LfsStore(part_size), page_size=page_size)
        self.faults, self.log = Faults(), RequestLog()
        self._socket = socket.create_server(("127.0.0.1", 0))
        port = self._socket.getsockname()[1]
        self.url = self.state.url = f"http://127.0.0.1:{port}"
        # Another host by name, as on the Hub: clients must not send it their token.
        self.state.storage_url = f"http://localhost:{port}"
        app = Wire(_app(self.state), self.faults, self.log)
        self._server = uvicorn.Server(
            uvicorn.Config(app, http=CuttableProtocol, lifespan="off", log_config=None, proxy_headers=False)
        )
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)

    def __enter__(self) -> "LocalHub":
        # What a test breaks on purpose is not worth a line on the terminal.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._thread.join()
        self._socket.close()

    # Accounts

    def add_user(self, name: str, **organizations: str) -> str:
        """A user with their roles in organisations ("read", "write" or "admin"); gives a token that may write."""
        self.state.accounts.users.add(name)
        for organization, role in organizations.items():
            self.set_role(name, organization, role)
        return self.add_token(name)

    def set_role(self, user: str, organization: str, role: str) -> None:
        self.state.accounts.organizations.setdefault(organization, {})[user] = role

    def add_token(self, user: str, role: str = "write") -> str:
        """A token of a user; `role` is "read" or "write"."""
        return self.state.accounts.add_token(user, role)

    def expire(self, token: str) -> None:
        self.state.accounts.tokens[token].expired = True

    # What is there

    def add_repository(self, repo_id: str, folder: Path, kind: str = "model", private: bool = False) -> Repository:
        """A repository with the files of a folder, as if somebody had pushed them."""
        repository = Repository(kind, repo_id, repo_id.split("/")[0], private)
        self.state.repositories[kind, repo_id] = repository

        def add(files: dict[str, File]) -> None:
            for path in filter(Path.is_file, folder.rglob("*")):
                name, content = path.relative_to(folder).as_posix(), path.read_bytes()
                file = files[name] = File(content, is_large(name, len(content), content[:512], files))
                if file.is_lfs:
                    self.state.store.keep(key_of(repository), file.sha256, content)

        repository.commit("main", add, f"Upload {folder.name}", author=repository.namespace)
        return repository

    def repository(self, repo_id: str, kind: str = "model") -> Repository:
        return self.state.repositories[kind, repo_id]

    def sent(self, operation: str = "*", path: str = "*") -> list[LoggedRequest]:
        """The requests that came, of an operation (operations.py), to a path; both may hold `*`."""
        return self.log.of(operation, path)

    # Clients

    def api(self, token: str | None = None) -> HfApi:
        """A client in this process; works inside `connected` only."""
        return HfApi(endpoint=self.url, token=token or False)

    def environment(self, token: str | None, home: Path) -> dict[str, str]:
        """The variables of a process whose clients use this Hub as `token`, with an empty cache at `home`.

        All that this process inherited is kept, but for the settings of Hugging Face's libraries.
        """
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
        settings = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        settings |= {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1,localhost"}
        return inherited | settings | ({"HF_TOKEN": token} if token else {})

    @contextmanager
    def connected(self, token: str | None = None, home: Path | None = None) -> Iterator[HfApi]:
        """Point this process's clients at this Hub, as `token`, with an empty cache (at `home`); gives an HfApi."""
        with tempfile.TemporaryDirectory() as temporary:
            settings: Mapping[str, str] = self.environment(token, home or Path(temporary))
            with pointed_at(settings):
                yield self.api(token)


def _app(state: State) -> FastAPI:
    app = FastAPI(openapi_url=None)
    app.state.hub = state
    app.add_exception_handler(Refusal, _refused)
    for routes in (routes_accounts, routes_collections, routes_repos, routes_revisions, routes_files):
        app.include_router(routes.router)
    return app


async def _refused(request: Request, refusal: Refusal) -> JSONResponse:
    headers = {"X-Error-Message": refusal.message, "X-Error-Code": refusal.code, "X-Repo-Commit": refusal.commit}
    present = {name: value for name, value in headers.items() if value}
    return JSONResponse({"error": refusal.message, **refusal.more}, refusal.status, present)
