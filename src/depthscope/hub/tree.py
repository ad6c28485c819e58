"""`Tree`: the files that a branch of a repository shall hold, and their local paths.

A push adds `.depthscope.json`, a list of its files with their digests, so that a later push replaces and removes these
files and no others.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from huggingface_hub.utils.sha import git_hash, sha_fileobj

from depthscope.errors import ReportError, SettingsError
from depthscope.files.new_folder import new_folder
from depthscope.files.strict_json import encode, parse

__all__ = ["MAIN", "MANIFEST", "Digest", "Kind", "Tree", "read_manifest", "require_room", "write_trees"]

MAIN = "main"
MANIFEST = ".depthscope.json"
SCHEMA_VERSION = 1
LARGEST_SMALL = 16 * 2**20  # bytes; larger files are large files on the Hub, without git's digest

Kind = Literal["model", "dataset"]


@dataclass(frozen=True)
class Digest:
    """The digest of a file on the Hub: `sha256` of a large file, else `git`, the id of its blob."""

    sha256: str | None
    git: str | None

    @classmethod
    def of(cls, path: Path) -> "Digest":
        """Both digests of a local file; for a file that is large on the Hub only `sha256`."""
        with open(path, "rb") as file:
            sha256 = sha_fileobj(file).hex()
        return cls(sha256, git_hash(path.read_bytes()) if path.stat().st_size <= LARGEST_SMALL else None)

    def agrees(self, other: "Digest") -> bool:
        """Whether two digests belong to the same content, by a digest that both have."""
        if self.sha256 and other.sha256:
            return self.sha256 == other.sha256
        return self.git is not None and self.git == other.git


@dataclass(frozen=True)
class Tree:
    """The files of one branch.

    Attributes:
        repo_id: the repository.
        kind: the type of the repository.
        revision: the branch.
        files: the local path of each file of the repository.
    """

    repo_id: str
    kind: Kind
    revision: str
    files: Mapping[str, Path]

    def folder(self, root: Path) -> Path:
        """The folder of the tree when it is written below `root`."""
        return root / f"{self.kind}s" / self.repo_id / self.revision

    @cached_property
    def digests(self) -> dict[str, Digest]:
        """The digest of every file; this reads all files."""
        return {path: Digest.of(file) for path, file in sorted(self.files.items())}

    @cached_property
    def size(self) -> int:
        """The size of all files in bytes."""
        return sum(file.stat().st_size for file in self.files.values())

    @cached_property
    def manifest(self) -> bytes:
        """The content of `.depthscope.json` for this tree."""
        files = {
            path: {"sha256": digest.sha256} | ({"git": digest.git} if digest.git else {})
            for path, digest in self.digests.items()
        }
        content = {"made_by": "depthscope push", "schema_version": SCHEMA_VERSION, "files": files}
        return (encode(content) + "\n").encode()


def read_manifest(content: bytes) -> dict[str, Digest]:
    """The digests of the files of an earlier push, by path; {} if the list is not valid."""
    try:
        manifest: Any = parse(content.decode(errors="replace"), MANIFEST)
    except ReportError:
        return {}
    files = (
        manifest.get("files")
        if isinstance(manifest, dict) and manifest.get("schema_version") == SCHEMA_VERSION
        else None
    )
    if not isinstance(files, dict):
        return {}
    return {
        path: Digest(digest.get("sha256"), digest.get("git"))
        for path, digest in files.items()
        if isinstance(digest, dict)
    }


def write_trees(trees: list[Tree], folder: Path) -> None:
    """Write trees as folders, `folder/<kind>s/<namespace>/<name>/<branch>/`, as a push would write them.

    Raises:
        SettingsError: the folder is not empty, or cannot be written.
    """
    require_room(folder)
    with new_folder(folder, SettingsError) as temporary:
        for tree in trees:
            root = tree.folder(temporary)
            for path, file in tree.files.items():
                (root / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, root / path)
            (root / MANIFEST).write_bytes(tree.manifest)


def require_room(folder: Path) -> None:
    """Refuse a folder that is not empty.

    Raises:
        SettingsError: the folder is not empty, or is a file.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SettingsError(f"{str(folder)!r} exists and is not empty: give a new folder, or empty it.")
