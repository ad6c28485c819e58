"""Uploads as they arrive: one that stops in the middle is given up, and nothing of it stays."""

import os
import re
from pathlib import Path
from typing import Any

import anyio
from starlette.formparsers import MultiPartException

from jobs.processes import is_own
from jobs.queue import DESERTED_SECONDS

__all__ = ["Receiving"]

UPLOAD = re.compile(r"/upload/?$")
UNFINISHED = "tmp*"  # how the parser names a file that it has not read to its end


class Receiving:
    """A layer around the server's program (ASGI) that gives up uploads which do not go on.

    Gradio's parser removes the files that it has begun where it is told so by its own exception; what it leaves of
    forms that are none is removed when no upload is on its way.
    """

    def __init__(self, app: Any) -> None:
        self.app = app
        self._count = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one request."""
        if scope["type"] != "http" or scope["method"] != "POST" or not UPLOAD.search(scope["path"]):
            await self.app(scope, receive, send)
            return
        is_read = False

        async def next_part() -> Any:
            nonlocal is_read
            if is_read:
                return await receive()
            try:
                with anyio.fail_after(DESERTED_SECONDS):
                    message = await receive()
            except TimeoutError:
                raise MultiPartException(f"The upload stood still for {DESERTED_SECONDS:g} seconds.") from None
            if message["type"] == "http.disconnect":
                raise MultiPartException("The upload was cut off.")
            is_read = not message.get("more_body", False)
            return message

        self._count += 1
        try:
            await self.app(scope, next_part, send)
        finally:
            self._count -= 1
            if not self._count:
                await anyio.to_thread.run_sync(self._remove_unfinished, scope["app"].uploaded_file_dir)

    def _remove_unfinished(self, folder: str) -> None:
        """Remove the files of broken forms, if the folder is this process's own."""
        if is_own(Path(folder)):
            for path in Path(folder).glob(UNFINISHED):
                if path.is_file() and not self._count:
                    os.unlink(path)
