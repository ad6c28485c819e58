"""What a repository is made of, named by the ids that git gives: files, folders and commits."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cached_property
from pathlib import PurePosixPath

Files = Mapping[str, "File"]


def git_id(kind: str, content: bytes) -> str:
    return hashlib.sha1(f"{kind} {len(content)}\0".encode() + content).hexdigest()


@dataclass(frozen=True)
class File:
    """One version of a file; of a large one git holds a pointer only."""

    content: bytes
    is_lfs: bool = False

    @property
    def size(self) -> int:
        return len(self.content)

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()

    @cached_property
    def blob_id(self) -> str:
        return git_id("blob", self.pointer if self.is_lfs else self.content)

    @property
    def etag(self) -> str:
        """The id of the content: the client names its cached copy by it, and compares it before it uploads."""
        return self.sha256 if self.is_lfs else self.blob_id


def folder_ids(files: Files) -> dict[str, str]:
    """The id of every folder, by its path; the root's is "."."""
    children: dict[str, dict[str, tuple[str, str]]] = {".": {}}
    for path, file in files.items():
        node = PurePosixPath(path)
        children.setdefault(str(node.parent), {})[node.name] = ("100644", file.blob_id)
        for parent in node.parents:
            children.setdefault(str(parent), {})
    ids: dict[str, str] = {}
    for folder in sorted(children, key=lambda path: len(PurePosixPath(path).parts), reverse=True):
        # Git sorts a folder as if its name ended in a slash.
        entries = sorted(children[folder].items(), key=lambda entry: entry[0] + "/" * (entry[1][0] == "40000"))
        content = b"".join(f"{mode} {name}\0".encode() + bytes.fromhex(of) for name, (mode, of) in entries)
        ids[folder] = git_id("tree", content)
        if folder != ".":
            children[str(PurePosixPath(folder).parent)][PurePosixPath(folder).name] = ("40000", ids[folder])
    return ids


@dataclass(frozen=True)
class Commit:
    """A state of all files, and how it came about."""

    files: Files
    parent: str | None
    title: str
    description: str
    author: str
    date: datetime

    @cached_property
    def commit_id(self) -> str:
        parent = f"parent {self.parent}\n" if self.parent else ""
        # Seconds are git's, microseconds keep two commits apart that a test makes within one.
        who = f"{self.author} <{self.author}@localhost> {self.date.timestamp():.6f} +0000"
        text = f"tree {folder_ids(self.files)['.']}\n{parent}author {who}\n\n{self.title}\n\n{self.description}"
        return git_id("commit", text.encode())


def now() -> datetime:
    return datetime.now(timezone.utc)


def written(date: datetime) -> str:
    """A date as the Hub writes it."""
    return date.strftime("%Y-%m-%dT%H:%M:%S.") + f"{date.microsecond // 1000:03d}Z"
