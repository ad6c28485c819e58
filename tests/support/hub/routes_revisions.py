"""Routes about history: commits, branches, tags, and the files at a revision."""

import base64
from typing import Any
from urllib.parse import parse_qs, unquote

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from hub.cards import require_valid
from hub.commits import CommitPayload
from hub.describe import entries, is_below
from hub.large_files import is_large
from hub.objects import Commit, File, written
from hub.refusal import Refusal, no_entry
from hub.repositories import Repository
from hub.state import REPO, CallerOf, Revision, StateOf, Visible, Writable, key_of, paged

router = APIRouter()
COMMITS_A_PAGE = EXPANDED_A_PAGE = 50


@router.post(REPO + "/preupload/{revision}")
async def preupload(request: Request, repository: Writable, revision: Revision) -> dict[str, Any]:
    """How each file is to be uploaded, and the id of what is there already."""
    commit = repository.at(revision)
    answers = []
    for file in (await request.json())["files"]:
        large = is_large(file["path"], file["size"], base64.b64decode(file["sample"]), commit.files)
        answer = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
        if present := commit.files.get(file["path"]):
            answer["oid"] = present.etag
        answers.append(answer)
    return {"files": answers, "commitOid": commit.commit_id}


@router.post(REPO + "/commit/{revision}")
async def commit(
    request: Request, state: StateOf, caller: CallerOf, repository: Writable, revision: Revision
) -> dict[str, Any]:
    if request.query_params.get("create_pr") in ("1", "true"):
        raise Refusal(400, "This Hub has no pull requests")
    payload = CommitPayload.parse(await request.body())
    apply = payload.applied(key_of(repository), state.store)

    def change(files: dict[str, File]) -> None:
        before = files.get("README.md")
        apply(files)
        if "README.md" in files and files["README.md"] != before:
            require_valid(files["README.md"].content.decode(errors="replace"), repository.kind)

    made = repository.commit(revision, change, payload.title, payload.description, caller.user, payload.parent)
    url = f"{state.page_url(repository)}/commit/{made.commit_id}"
    return {"success": True, "commitOid": made.commit_id, "commitUrl": url, "hookOutput": ""}


@router.get(REPO + "/commits/{revision}")
async def commits(request: Request, repository: Visible, revision: Revision) -> JSONResponse:
    history = [_commit_json(one) for one in repository.history(_at(request, repository, revision))]
    page, headers = paged(request, history, COMMITS_A_PAGE)
    return JSONResponse(page, headers=headers | {"X-Total-Count": str(len(history))})


def _commit_json(commit: Commit) -> dict[str, Any]:
    return {
        "id": commit.commit_id,
        "title": commit.title,
        "message": commit.description,
        "authors": [{"user": commit.author, "avatar": f"/avatars/{commit.author}.svg"}],
        "date": written(commit.date),
        "formatted": {"title": commit.title, "message": commit.description},
    }


def _at(request: Request, repository: Repository, revision: str) -> Commit:
    return repository.at(revision, late=request.state.fault.stale == "commit")


@router.get(REPO + "/refs")
async def refs(repository: Visible) -> dict[str, Any]:
    named = {"branches": ("heads", repository.branches), "tags": ("tags", repository.tags)}
    found = {
        name: [{"name": one, "ref": f"refs/{kind}/{one}", "targetCommit": of} for one, of in references.items()]
        for name, (kind, references) in named.items()
    }
    return {**found, "converts": [], "pullRequests": []}


@router.post(REPO + "/branch/{revision}")
async def add_branch(request: Request, repository: Writable, revision: Revision) -> Response:
    repository.add_branch(revision, (await request.json()).get("startingPoint") or "main")
    return Response(status_code=201)


@router.delete(REPO + "/branch/{revision}")
async def remove_branch(repository: Writable, revision: Revision) -> Response:
    repository.remove_branch(revision)
    return Response()


@router.post(REPO + "/tag/{revision}")
async def add_tag(request: Request, repository: Writable, revision: Revision) -> Response:
    repository.add_tag((await request.json())["tag"], revision)
    return Response(status_code=201)


@router.delete(REPO + "/tag/{revision}")
async def remove_tag(repository: Writable, revision: Revision) -> Response:
    repository.remove_tag(revision)
    return Response()


@router.post(REPO + "/super-squash/{revision}")
async def squash(request: Request, repository: Writable, caller: CallerOf, revision: Revision) -> Response:
    repository.squash(revision, (await request.json())["message"], caller.user or "")
    return Response()


@router.get(REPO + "/tree/{revision}")
@router.get(REPO + "/tree/{revision}/{folder:path}")
async def tree(
    request: Request, state: StateOf, repository: Visible, revision: Revision, folder: str = ""
) -> JSONResponse:
    commit, folder = _at(request, repository, revision), unquote(folder).strip("/")
    recursive, expand = (
        request.query_params.get(name, "").lower() in ("true", "1") for name in ("recursive", "expand")
    )
    found = [entry for path, entry in entries(repository, commit, expand).items() if is_below(path, folder, recursive)]
    if folder and not found:
        raise no_entry(folder, commit.commit_id)
    size = min(EXPANDED_A_PAGE, state.page_size) if expand else state.page_size
    page, headers = paged(request, found, size)
    return JSONResponse(page, headers=headers)


@router.post(REPO + "/paths-info/{revision}")
async def paths_info(request: Request, repository: Visible, revision: Revision) -> list[dict[str, Any]]:
    """Files and folders by path, sent as a form or as JSON; paths that are not there are left out."""
    if request.headers.get("content-type", "").startswith("application/json"):
        body = await request.json()
        paths, expand = body["paths"], bool(body.get("expand"))
    else:
        form = parse_qs((await request.body()).decode())
        paths, expand = form.get("paths", []), form.get("expand", ["false"])[0].lower() == "true"
    found = entries(repository, _at(request, repository, revision), expand)
    return [found[path.strip("/")] for path in paths if path.strip("/") in found]
