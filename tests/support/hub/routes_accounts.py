"""Routes about who asks: whoami."""

from typing import Any

from fastapi import APIRouter, Request

from hub.refusal import Refusal
from hub.state import CallerOf, StateOf

router = APIRouter()


@router.get("/api/whoami-v2")
async def whoami(request: Request, state: StateOf, caller: CallerOf) -> dict[str, Any]:
    if caller.user is None:
        raise Refusal(401, "Invalid username or password.")
    return state.accounts.who(request.headers["authorization"].removeprefix("Bearer "))
