"""What the Hub tells of a repository and of its files, as JSON."""

import json
from pathlib import PurePosixPath
from typing import Any

from hub import cards
from hub.objects import Commit, File, folder_ids, written
from hub.repositories import Repository


def info(repository: Repository, commit: Commit | None = None, blobs: bool = False) -> dict[str, Any]:
    """A repository at a commit (the head of main if None); `blobs` adds sizes and ids of files."""
    commit = commit or repository.head
    data, text = cards.front_matter(commit.files)
    found = {
        "_id": repository.head.commit_id[:24],
        "id": repository.repo_id,
        "author": repository.namespace,
        "sha": commit.commit_id,
        "lastModified": written(repository.head.date),
        "createdAt": written(repository.created),
        "private": repository.private,
        "gated": repository.gated,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": cards.tags(data, text),
        "siblings": [_sibling(path, file, blobs) for path, file in sorted(commit.files.items())],
        "usedStorage": _used_storage(repository),
    }
    if data:
        found["cardData"] = json.loads(json.dumps(data, default=str))
    if repository.kind == "model":
        found |= {"modelId": repository.repo_id} | {
            name: data[name] for name in ("library_name", "pipeline_tag", "model-index") if name in data
        }
    if repository.kind == "space":
        found["sdk"] = data.get("sdk", repository.sdk)
    return found


def _used_storage(repository: Repository) -> int:
    versions = {file.sha256: file.size for commit in repository.commits.values() for file in commit.files.values()}
    return sum(versions.values())


def _sibling(path: str, file: File, blobs: bool) -> dict[str, Any]:
    if not blobs:
        return {"rfilename": path}
    found = {"rfilename": path, "size": file.size, "blobId": file.blob_id}
    if file.is_lfs:
        found["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": len(file.pointer)}
    return found


def entries(repository: Repository, commit: Commit, expand: bool) -> dict[str, dict[str, Any]]:
    """All files and folders at a commit, by path; `expand` adds each one's last commit."""
    folders = {path: of for path, of in folder_ids(commit.files).items() if path != "."}
    found = {path: {"type": "directory", "oid": of, "size": 0, "path": path} for path, of in folders.items()}
    for path, file in commit.files.items():
        found[path] = {"type": "file", "oid": file.blob_id, "size": file.size, "path": path}
        if file.is_lfs:
            found[path]["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": len(file.pointer)}
    if expand:
        for path, entry in found.items():
            last = repository.last_change(path, commit)
            entry["lastCommit"] = {"id": last.commit_id, "title": last.title, "date": written(last.date)}
            if entry["type"] == "file":
                entry["securityFileStatus"] = {"status": "safe", "avScan": None, "pickleImportScan": None}
    return dict(sorted(found.items()))


def is_below(path: str, folder: str, recursive: bool) -> bool:
    """Whether a path is in a folder ("" is the root), directly or at any depth."""
    parents = [str(parent) for parent in PurePosixPath(path).parents]
    return (folder or ".") in (parents if recursive else parents[:1])
