"""`State`: all that a Hub knows, and what routes ask of it before they act."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any
from urllib.parse import quote, unquote

from fastapi import Depends, Request
from starlette.convertors import Convertor, register_url_convertor

from hub.accounts import Accounts, Caller
from hub.collecting import Collections
from hub.repositories import Repository
from hub.storage import LfsStore


class KindConvertor(Convertor[str]):
    """The kinds of repositories, in the singular, in routes such as "/api/{kind:kind}s"."""

    regex = "model|dataset|space"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("kind", KindConvertor())
REPO = "/api/{kind:kind}s/{namespace}/{name}"


@dataclass
class State:
    """The parts, and where the Hub and its file storage are reached (`url`, `storage_url`)."""

    accounts: Accounts = field(default_factory=Accounts)
    repositories: dict[tuple[str, str], Repository] = field(default_factory=dict)
    store: LfsStore = field(default_factory=LfsStore)
    collections: Collections = field(default_factory=Collections)
    page_size: int = 1000
    url: str = ""
    storage_url: str = ""

    def page_url(self, repository: Repository) -> str:
        """The address of a repository's page."""
        return f"{self.url}/{'' if repository.kind == 'model' else repository.kind + 's/'}{repository.repo_id}"


def key_of(repository: Repository) -> str:
    """The name under which the store knows a repository."""
    return f"{repository.kind}s/{repository.repo_id}"


def _state(request: Request) -> State:
    return request.app.state.hub


StateOf = Annotated[State, Depends(_state)]


def _caller(request: Request, state: StateOf) -> Caller:
    caller = state.accounts.caller(request.headers.get("authorization"))
    request.state.entry.user = caller.user
    return caller


CallerOf = Annotated[Caller, Depends(_caller)]


def _visible(state: StateOf, caller: CallerOf, namespace: str, name: str, kind: str = "model") -> Repository:
    return state.accounts.require_sight(state.repositories.get((kind, f"{namespace}/{name}")), caller)


Visible = Annotated[Repository, Depends(_visible)]


def _readable(state: StateOf, caller: CallerOf, repository: Visible) -> Repository:
    state.accounts.require_files(repository, caller)
    return repository


Readable = Annotated[Repository, Depends(_readable)]


def _writable(state: StateOf, caller: CallerOf, repository: Visible) -> Repository:
    state.accounts.require_write(repository.namespace, caller, f"write to {repository.kind}s")
    return repository


Writable = Annotated[Repository, Depends(_writable)]


def _revision(revision: str) -> str:
    return unquote(revision)


Revision = Annotated[str, Depends(_revision)]


def paged(request: Request, items: list[Any], size: int) -> tuple[list[Any], dict[str, str]]:
    """One page of items and the header that links to the next; the cursor is where it starts."""
    start = int(request.query_params.get("cursor", 0))
    if start + size >= len(items):
        return items[start:], {}
    query = [(name, value) for name, value in request.query_params.multi_items() if name != "cursor"]
    pairs = "&".join(f"{quote(name)}={quote(value)}" for name, value in [*query, ("cursor", str(start + size))])
    address = f"{request.app.state.hub.url}{request.scope['raw_path'].decode()}?{pairs}"
    return items[start : start + size], {"Link": f'<{address}>; rel="next"'}


def visible_repositories(state: State, caller: Caller, kind: str) -> Iterator[Repository]:
    """Those of a kind that the caller may know of, newest first."""
    for (its_kind, _), repository in reversed(list(state.repositories.items())):
        member = state.accounts.role_in(repository.namespace, caller) != "no_access"
        if its_kind == kind and (not repository.private or member):
            yield repository
