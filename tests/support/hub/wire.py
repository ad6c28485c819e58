"""Around the app: every request is logged, and what should go wrong with it goes wrong here."""

import asyncio
from typing import Any
from urllib.parse import unquote

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from hub.faults import Fault, Faults
from hub.operations import operation_of
from hub.request_log import LoggedRequest, RequestLog


class CuttableProtocol(H11Protocol):
    """Tells each request its connection, so that it can be dropped."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.app_state = {**self.app_state, "transport": transport}
        super().connection_made(transport)


class Wire:
    """Passes requests on to the app, unless a fault says otherwise."""

    def __init__(self, app: ASGIApp, faults: Faults, log: RequestLog) -> None:
        self.app, self.faults, self.log = app, faults, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        # A branch may have a slash in its name, quoted by the client: routes see paths as they were sent.
        scope["path"] = scope["raw_path"].decode()
        operation = operation_of(scope["method"], scope["path"])
        fault = self.faults.take(operation, unquote(scope["path"]))
        entry = _log_entry(scope, operation, fault)
        self.log.entries.append(entry)
        scope["state"] |= {"entry": entry, "fault": fault}
        if fault.delay:
            await asyncio.sleep(fault.delay)
        if fault.cut == "upload":
            await receive()
            return await _drop(scope)
        body = await _body(receive)
        if operation not in ("lfs-upload", "create"):
            entry.body = body
        if fault.status:
            entry.status = fault.status
            return await _error(fault)(scope, receive, send)
        sender = _CuttingSender(send, scope, entry, fault.cut)
        await self.app(scope, _replayed(body), sender)


def _log_entry(scope: Scope, operation: str, fault: Fault) -> LoggedRequest:
    headers = {name.decode().lower(): value.decode("latin-1") for name, value in scope["headers"]}
    had_token = headers.pop("authorization", None) is not None
    query = scope["query_string"].decode()
    return LoggedRequest(operation, scope["method"], unquote(scope["path"]), query, headers, had_token, fault)


def _error(fault: Fault) -> JSONResponse:
    messages = {429: "Too Many Requests", 500: "Internal Error - We're working hard to fix this as soon as possible!"}
    headers = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
    return JSONResponse({"error": messages.get(fault.status, "Service Unavailable")}, fault.status, headers)


async def _body(receive: Receive) -> bytes:
    """The whole body; what a client that went away did not send is never acted on."""
    chunks = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionResetError("the client went away")
        chunks.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(chunks)


def _replayed(body: bytes) -> Receive:
    messages = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> Message:
        return next(messages, {"type": "http.disconnect"})

    return receive


async def _drop(scope: Scope) -> None:
    scope["state"]["transport"].abort()
    # The server takes note of a lost connection in its next round.
    await asyncio.sleep(0)


class _CuttingSender:
    """Sends what the app answers, as far as it gets."""

    def __init__(self, send: Send, scope: Scope, entry: LoggedRequest, cut: str | None) -> None:
        self.send, self.scope, self.entry, self.cut = send, scope, entry, cut
        self.is_cut = False

    async def __call__(self, message: dict[str, Any]) -> None:
        if self.is_cut:
            return
        if message["type"] == "http.response.start":
            if self.cut == "answer" or (self.cut == "download" and self.scope["method"] == "HEAD"):
                self.is_cut = True
                return await _drop(self.scope)
            self.entry.status = message["status"]
        elif self.cut == "download":
            self.is_cut = True
            content = message.get("body", b"")
            await self.send({**message, "body": content[: len(content) // 2], "more_body": True})
            self.scope["state"]["transport"].close()
            return await asyncio.sleep(0)
        await self.send(message)
