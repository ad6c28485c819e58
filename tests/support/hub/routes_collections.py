"""Routes about collections."""

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from hub.accounts import CAN_READ, Caller
from hub.collecting import PAPER, Collection
from hub.refusal import Refusal
from hub.state import CallerOf, State, StateOf, paged

router = APIRouter()
ONE = "/api/collections/{namespace}/{slug}"


def _visible(state: State, caller: Caller, namespace: str, slug: str) -> Collection:
    collection = state.collections.find(namespace, slug)
    if collection is None or (collection.private and state.accounts.role_in(namespace, caller) not in CAN_READ):
        raise Refusal(404, "Collection not found")
    return collection


def _writable(state: State, caller: Caller, namespace: str, slug: str) -> Collection:
    collection = _visible(state, caller, namespace, slug)
    state.accounts.require_write(namespace, caller, "change collections")
    return collection


@router.get("/api/collections")
async def listing(request: Request, state: StateOf, caller: CallerOf) -> JSONResponse:
    """Collections of an owner, those that hold an item ("models/ada/net"), the first items of each."""
    query = request.query_params
    found = [
        one.summary()
        for one in state.collections.of(query.get("owner"))
        if not one.private or state.accounts.role_in(one.namespace, caller) in CAN_READ
        if "item" not in query or any(f"{item['type']}s/{item['id']}" == query["item"] for item in one.items)
    ]
    page, headers = paged(request, found, int(query.get("limit", state.page_size)))
    return JSONResponse(page, headers=headers)


@router.post("/api/collections")
async def create(request: Request, state: StateOf, caller: CallerOf) -> dict[str, Any]:
    body = await request.json()
    state.accounts.require_write(body["namespace"], caller, "create a collection")
    private = body.get("private", False)
    collection = Collection(body["namespace"], body["title"], body.get("description", ""), private)
    return state.collections.create(collection).as_json()


@router.get(ONE)
async def read(state: StateOf, caller: CallerOf, namespace: str, slug: str) -> dict[str, Any]:
    return _visible(state, caller, namespace, slug).as_json()


@router.patch(ONE)
async def update(request: Request, state: StateOf, caller: CallerOf, namespace: str, slug: str) -> dict[str, Any]:
    collection = _writable(state, caller, namespace, slug)
    body = await request.json()
    # Checked before anything changes.
    Collection(namespace, body.get("title", collection.title), body.get("description", collection.description), False)
    for name in ("title", "description", "private", "theme", "position"):
        setattr(collection, name, body.get(name, getattr(collection, name)))
    return {"success": True, "data": collection.as_json()}


@router.delete(ONE)
async def delete(state: StateOf, caller: CallerOf, namespace: str, slug: str) -> Response:
    del state.collections.by_object_id[_writable(state, caller, namespace, slug).object_id]
    return Response()


@router.post(ONE + "/items")
async def add_item(request: Request, state: StateOf, caller: CallerOf, namespace: str, slug: str) -> dict[str, Any]:
    """Add what exists and may be seen; any number in arXiv's form is a paper."""
    collection = _writable(state, caller, namespace, slug)
    body = await request.json()
    kind, item_id = body["item"]["type"], body["item"]["id"]
    if kind == "paper" and not PAPER.fullmatch(item_id):
        raise Refusal(404, "Paper not found")
    if kind in ("model", "dataset", "space"):
        state.accounts.require_sight(state.repositories.get((kind, item_id)), caller)
    collection.add(kind, item_id, body.get("note"))
    return collection.as_json()


@router.patch(ONE + "/items/{item_id}")
async def update_item(
    request: Request, state: StateOf, caller: CallerOf, namespace: str, slug: str, item_id: str
) -> dict[str, Any]:
    body = await request.json()
    collection = _writable(state, caller, namespace, slug)
    collection.change(item_id, body.get("note"), body.get("position"))
    return {"success": True, "data": collection.find(item_id)}


@router.delete(ONE + "/items/{item_id}")
async def delete_item(state: StateOf, caller: CallerOf, namespace: str, slug: str, item_id: str) -> Response:
    _writable(state, caller, namespace, slug).remove(item_id)
    return Response()
