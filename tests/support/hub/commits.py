"""What the client sends to make a commit (NDJSON), and how each line changes the files."""

import base64
import binascii
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hub.objects import File
from hub.refusal import Refusal
from hub.storage import LfsStore

Files = dict[str, File]
PATH = re.compile(r"(?!\.git/)(?!/)(?!.*//)(?!(?:.*/)?\.{1,2}(?:/|$)).+[^/]")


@dataclass(frozen=True)
class CommitPayload:
    """A parsed commit: its header and its operations in order."""

    title: str
    description: str
    parent: str | None
    operations: tuple[tuple[str, dict[str, Any]], ...]

    @classmethod
    def parse(cls, body: bytes) -> "CommitPayload":
        """Read the lines; the first is the header."""
        try:
            lines = [json.loads(line) for line in body.splitlines() if line.strip()]
            header, *rest = [(line["key"], line["value"]) for line in lines]
            if header[0] != "header" or not header[1]["summary"]:
                raise Refusal(400, "A commit starts with a header that has a summary")
            parent = header[1].get("parentCommit")
            return cls(header[1]["summary"], header[1].get("description", ""), parent, tuple(rest))
        except (ValueError, KeyError, TypeError) as error:
            raise Refusal(400, f"Not a commit: {error}") from error

    def applied(self, repo_key: str, store: LfsStore) -> Callable[[Files], None]:
        """What the operations do to the files of a repository."""

        def change(files: Files) -> None:
            for key, value in self.operations:
                if key not in _OPERATIONS:
                    raise Refusal(400, f"Unknown operation {key!r}")
                path = str(value.get("path"))
                if not PATH.fullmatch(path := path.rstrip("/") if key == "deletedFolder" else path):
                    raise Refusal(400, f"Invalid path {path!r}")
                try:
                    _OPERATIONS[key](files, path, value, repo_key, store)
                except KeyError as error:
                    raise Refusal(400, f"An operation {key!r} needs {error}") from error

        return change


def _add(files: Files, path: str, value: dict[str, Any], repo_key: str, store: LfsStore) -> None:
    try:
        content = value["content"]
        is_base64 = value.get("encoding", "utf-8") == "base64"
        files[path] = File(base64.b64decode(content, validate=True) if is_base64 else content.encode())
    except binascii.Error as error:
        raise Refusal(400, f"The content of {path} is not base64: {error}") from error


def _add_lfs(files: Files, path: str, value: dict[str, Any], repo_key: str, store: LfsStore) -> None:
    content = store.find(repo_key, value["oid"])
    if value.get("algo") != "sha256" or content is None:
        raise Refusal(400, f"LFS pointer pointed to a file that does not exist: {path} ({value['oid']})")
    if value.get("size", len(content)) != len(content):
        raise Refusal(400, f"LFS pointer of {path} states {value['size']} bytes; the object has {len(content)}")
    files[path] = File(content, is_lfs=True)


def _delete(files: Files, path: str, value: dict[str, Any], repo_key: str, store: LfsStore) -> None:
    if files.pop(path, None) is None:
        raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")


def _delete_folder(files: Files, path: str, value: dict[str, Any], repo_key: str, store: LfsStore) -> None:
    inside = [name for name in files if name.startswith(path + "/")]
    if not inside:
        raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
    for name in inside:
        del files[name]


_OPERATIONS = {"file": _add, "lfsFile": _add_lfs, "deletedFile": _delete, "deletedFolder": _delete_folder}
