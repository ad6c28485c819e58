"""Routes that carry files: downloads, and large files up and down."""

from typing import Any
from urllib.parse import unquote

from fastapi import APIRouter, Request, Response
from fastapi.responses import RedirectResponse

from hub.objects import Commit, File
from hub.refusal import Refusal, no_entry, no_repository
from hub.repositories import Repository
from hub.state import CallerOf, Readable, Revision, State, StateOf, Writable, key_of

router = APIRouter()


async def resolve(request: Request, state: StateOf, repository: Readable, revision: Revision, path: str) -> Response:
    """A file at a revision; a large one is a redirect to where it is stored, with its etag and size."""
    commit, path = repository.at(revision, late=request.state.fault.stale == "commit"), unquote(path)
    file = commit.files.get(path)
    if file is None:
        raise no_entry(path, commit.commit_id)
    etag = _etag_before(repository, commit, path) if request.state.fault.stale == "etag" else file.etag
    headers = {"X-Repo-Commit": commit.commit_id, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
    if not file.is_lfs:
        return _content(request, file.content, headers)
    headers |= {"X-Linked-ETag": f'"{etag}"', "X-Linked-Size": str(file.size)}
    return RedirectResponse(_storage_address(state, file), 302, headers)


def _etag_before(repository: Repository, commit: Commit, path: str) -> str:
    """The etag of the version before the one at a commit; of a file that never changed, another one."""
    current = commit.files[path].etag
    versions = [older.files[path].etag for older in repository.history(commit) if path in older.files]
    return next((etag for etag in versions if etag != current), current[::-1])


def _storage_address(state: State, file: File) -> str:
    return f"{state.storage_url}/lfs/downloads/{state.store.allow_download(file.sha256)}"


def _content(request: Request, content: bytes, headers: dict[str, str]) -> Response:
    """All of it, or the range asked for."""
    asked = request.headers.get("range", "").removeprefix("bytes=")
    if not asked:
        return Response(content, 200, headers, "application/octet-stream")
    first, _, last = asked.partition("-")
    start = int(first) if first else max(0, len(content) - int(last))
    end = min(int(last) + 1 if first and last else len(content), len(content))
    if start >= end:
        return Response(status_code=416, headers={"Content-Range": f"bytes */{len(content)}"})
    headers = {**headers, "Content-Range": f"bytes {start}-{end - 1}/{len(content)}"}
    return Response(content[start:end], 206, headers, "application/octet-stream")


@router.api_route("/lfs/downloads/{signature}", methods=["GET", "HEAD"])
async def storage_download(request: Request, state: StateOf, signature: str) -> Response:
    content = state.store.download(signature)
    return _content(request, content, {"ETag": f'"{state.store.downloads[signature]}"', "Accept-Ranges": "bytes"})


async def batch(request: Request, state: StateOf, repository: Writable) -> dict[str, Any]:
    """Where each object is to be uploaded; what the repository has needs no upload."""
    body = await request.json()
    if body.get("operation") != "upload":
        raise Refusal(400, "Only uploads are negotiated here")
    page, key = state.page_url(repository), key_of(repository)
    objects = []
    for wanted in body["objects"]:
        found = {"oid": wanted["oid"], "size": wanted["size"], "authenticated": True}
        if state.store.find(key, wanted["oid"]) is None:
            verify = {"href": f"{page}.git/info/lfs/objects/verify"}
            found["actions"] = {"upload": _upload_action(state, key, wanted), "verify": verify}
        objects.append(found)
    return {"transfer": "basic", "objects": objects}


def _upload_action(state: State, repo_key: str, wanted: dict[str, Any]) -> dict[str, Any]:
    signature = state.store.allow_upload(repo_key, wanted["oid"], wanted["size"])
    address = f"{state.storage_url}/lfs/uploads/{signature}"
    parts = state.store.number_of_parts(wanted["size"])
    if parts == 1:
        return {"href": address}
    urls = {str(number): f"{address}/{number}" for number in range(1, parts + 1)}
    return {"href": address, "header": {"chunk_size": str(state.store.part_size), **urls}}


async def verify(request: Request, state: StateOf, repository: Writable) -> dict[str, Any]:
    body = await request.json()
    content = state.store.find(key_of(repository), body["oid"])
    if content is None or len(content) != body["size"]:
        raise Refusal(404, f"No object {body['oid']} of {body['size']} bytes was uploaded")
    return {}


@router.put("/lfs/uploads/{signature}")
async def upload(request: Request, state: StateOf, signature: str) -> Response:
    state.store.receive(signature, await request.body())
    return Response()


@router.put("/lfs/uploads/{signature}/{number}")
async def upload_part(request: Request, state: StateOf, signature: str, number: int) -> Response:
    etag = state.store.receive_part(signature, number, await request.body())
    return Response(headers={"ETag": f'"{etag}"'})


@router.post("/lfs/uploads/{signature}")
async def complete(request: Request, state: StateOf, signature: str) -> dict[str, Any]:
    parts = (await request.json())["parts"]
    state.store.complete(signature, {part["partNumber"]: part["etag"].strip('"') for part in parts})
    return {"success": True}


async def canonical(name: str, path: str, revision: str, caller: CallerOf) -> None:
    """No repository here is without a namespace."""
    raise no_repository() if caller.user else Refusal(401, "Invalid username or password.", "RepoNotFound")


for _prefix in ("", "/{kind:kind}s"):
    _page = _prefix + "/{namespace}/{name}"
    router.api_route(_page + "/resolve/{revision}/{path:path}", methods=["GET", "HEAD"])(resolve)
    router.post(_page + ".git/info/lfs/objects/batch")(batch)
    router.post(_page + ".git/info/lfs/objects/verify")(verify)
router.api_route("/{name}/resolve/{revision}/{path:path}", methods=["GET", "HEAD"])(canonical)
