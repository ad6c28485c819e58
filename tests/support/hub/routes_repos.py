"""Routes that make, list, describe, change and delete whole repositories."""

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from hub.accounts import Caller
from hub.cards import validate
from hub.describe import info
from hub.refusal import Refusal, no_repository
from hub.repositories import Repository
from hub.state import (
    REPO,
    CallerOf,
    Readable,
    Revision,
    State,
    StateOf,
    Visible,
    Writable,
    key_of,
    paged,
    visible_repositories,
)

router = APIRouter()
SDKS = ("gradio", "docker", "static")


def _id_of(body: dict[str, Any], caller: Caller) -> tuple[str, str]:
    """Kind and id of the repository that a body names; without an organisation it is the caller's."""
    return body.get("type") or "model", f"{body.get('organization') or caller.user}/{body['name']}"


@router.post("/api/repos/create")
async def create(request: Request, state: StateOf, caller: CallerOf) -> JSONResponse:
    body = await request.json()
    kind, repo_id = _id_of(body, caller)
    user = state.accounts.require_write(repo_id.split("/")[0], caller, f"create a {kind}")
    if kind == "space" and body.get("sdk") not in SDKS:
        raise Refusal(400, f"A Space needs an sdk, one of {', '.join(SDKS)}")
    if existing := state.repositories.get((kind, repo_id)):
        raise Refusal(409, f"You already created this {kind} repo", url=state.page_url(existing))
    private = body.get("private") is True or body.get("visibility") == "private"
    repository = Repository(kind, repo_id, user, private, body.get("sdk"))
    state.repositories[kind, repo_id] = repository
    return JSONResponse({"url": state.page_url(repository), "name": repo_id, "id": repo_id})


@router.delete("/api/repos/delete")
async def delete(request: Request, state: StateOf, caller: CallerOf) -> Response:
    kind, repo_id = _id_of(await request.json(), caller)
    _owned(state, caller, kind, repo_id)
    del state.repositories[kind, repo_id]
    return Response("OK")


@router.post("/api/repos/move")
async def move(request: Request, state: StateOf, caller: CallerOf) -> Response:
    body = await request.json()
    kind, source, target = body.get("type") or "model", body["fromRepo"], body["toRepo"]
    repository = _owned(state, caller, kind, source)
    state.accounts.require_write(target.split("/")[0], caller, f"create a {kind}")
    if (kind, target) in state.repositories:
        raise Refusal(409, f"{target} exists")
    old_key, repository.repo_id = key_of(repository), target
    state.repositories[kind, target] = state.repositories.pop((kind, source))
    for owners in state.store.owners.values():
        if old_key in owners:
            owners.add(key_of(repository))
    return Response("OK")


def _owned(state: State, caller: Caller, kind: str, repo_id: str) -> Repository:
    repository = state.accounts.require_sight(state.repositories.get((kind, repo_id)), caller)
    state.accounts.require_write(repository.namespace, caller, f"change {kind}s")
    return repository


@router.put(REPO + "/settings")
async def settings(request: Request, repository: Writable) -> dict[str, Any]:
    body = await request.json()
    if "visibility" in body or "private" in body:
        repository.private = body.get("private") is True or body.get("visibility") == "private"
    repository.gated = body.get("gated", repository.gated)
    return {"private": repository.private, "gated": repository.gated}


@router.get("/api/{kind:kind}s")
async def listing(request: Request, kind: str, state: StateOf, caller: CallerOf) -> JSONResponse:
    """Repositories of an author, with a word in their id, and with all the tags."""
    query = request.query_params
    wanted = query.getlist("filter")
    found = [
        {name: value for name, value in described.items() if name != "siblings" or query.get("full")}
        for repository in visible_repositories(state, caller, kind)
        if query.get("author") in (None, repository.namespace) and query.get("search", "") in repository.repo_id
        if set(wanted) <= {*(described := info(repository))["tags"]}
    ]
    page, headers = paged(request, found, int(query.get("limit", state.page_size)))
    return JSONResponse(page, headers=headers)


@router.get(REPO)
async def describe(request: Request, repository: Visible) -> dict[str, Any]:
    return _described(request, repository, "main")


@router.get(REPO + "/revision/{revision}")
async def describe_revision(request: Request, repository: Visible, revision: Revision) -> dict[str, Any]:
    return _described(request, repository, revision)


def _described(request: Request, repository: Repository, revision: str) -> dict[str, Any]:
    late = request.state.fault.stale == "commit"
    query = request.query_params
    found = info(repository, repository.at(revision, late), blobs=query.get("blobs", "").lower() in ("true", "1"))
    if expand := query.getlist("expand") + query.getlist("expand[]"):
        return {name: value for name, value in found.items() if name in ("_id", "id", *expand)}
    return found


@router.get(REPO + "/auth-check")
async def auth_check(repository: Readable) -> dict[str, Any]:
    return {}


@router.post("/api/validate-yaml")
async def validate_yaml(request: Request) -> JSONResponse:
    body = await request.json()
    found = validate(body["content"], body.get("repoType") or "model")
    return JSONResponse(found, 400 if found["errors"] else 200)


@router.get("/api/{kind:kind}s/{name}")
async def canonical(kind: str, name: str, caller: CallerOf) -> None:
    """No repository here is without a namespace."""
    raise no_repository() if caller.user else Refusal(401, "Invalid username or password.", "RepoNotFound")
