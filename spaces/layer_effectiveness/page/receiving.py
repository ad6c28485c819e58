"""Uploads in transfer: one that stalls is aborted, and its files are removed."""

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
UNFINISHED = "tmp*"  # the parser's name for an incomplete file


class Receiving:
    """A layer around the server's program (ASGI) that aborts stalled uploads.

    Gradio's parser removes its incomplete files on its own exception. Files of invalid forms are removed when no upload
    is in transfer.
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
                raise MultiPartException(f"The upload stalled for {DESERTED_SECONDS:g} seconds.") from None
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
