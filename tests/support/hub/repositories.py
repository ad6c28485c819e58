"""`Repository`: files with a history, under branches and tags."""

import threading
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

from hub.objects import Commit, File, Files, now
from hub.refusal import Refusal, no_revision

# What the Hub puts into every new repository: files of these names are stored as large files.
GITATTRIBUTES = Path(__file__).with_name("new_repository.gitattributes").read_bytes()
SPACE_README = "---\ntitle: {name}\nemoji: 📚\ncolorFrom: blue\ncolorTo: blue\nsdk: {sdk}\npinned: false\n---\n"
SHORTEST_ID = 7


class Repository:
    """A model, dataset or Space. `kind` is "model", "dataset" or "space"; `sdk` is a Space's.

    `gated` is False, "auto" or "manual"; `readers` are the users whose request for access was granted.
    """

    def __init__(self, kind: str, repo_id: str, author: str, private: bool = False, sdk: str | None = None) -> None:
        self.kind, self.repo_id, self.private, self.sdk = kind, repo_id, private, sdk
        self.gated: bool | str = False
        self.readers: set[str] = set()
        self.created = now()
        self.commits: dict[str, Commit] = {}
        self.branches: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.lock = threading.RLock()
        files = {".gitattributes": File(GITATTRIBUTES)}
        if kind == "space":
            files["README.md"] = File(SPACE_README.format(name=repo_id.split("/")[1], sdk=sdk).encode())
        self._record("main", files, None, "initial commit", "", author)

    @property
    def namespace(self) -> str:
        return self.repo_id.split("/")[0]

    @property
    def head(self) -> Commit:
        return self.commits[self.branches["main"]]

    def files(self, revision: str = "main") -> Files:
        """All files at a branch, tag or commit."""
        return self.at(revision).files

    def at(self, revision: str, late: bool = False) -> Commit:
        """The commit that a branch, tag or (part of an) id names; `late` gives the one before a branch's last."""
        for prefix, references in (("refs/heads/", self.branches), ("refs/tags/", self.tags)):
            name = revision.removeprefix(prefix)
            if name in references:
                commit = self.commits[references[name]]
                return self.commits[commit.parent] if late and references is self.branches and commit.parent else commit
        matching = [commit_id for commit_id in self.commits if commit_id.startswith(revision)]
        if len(revision) < SHORTEST_ID or len(matching) != 1:
            raise no_revision(revision)
        return self.commits[matching[0]]

    def history(self, commit: Commit) -> Iterator[Commit]:
        """The commit and those before it, newest first."""
        yield commit
        while commit.parent:
            commit = self.commits[commit.parent]
            yield commit

    def last_change(self, path: str, commit: Commit) -> Commit:
        """The newest commit, from `commit` back, that changed a file or anything in a folder."""

        def state(files: Files) -> dict[str, str]:
            return {name: file.blob_id for name, file in files.items() if name == path or name.startswith(path + "/")}

        for newer in self.history(commit):
            if newer.parent is None or state(self.commits[newer.parent].files) != state(newer.files):
                return newer
        raise AssertionError("a history ends with a commit that has no parent")

    def commit(
        self,
        branch: str,
        change: Callable[[dict[str, File]], None],
        title: str,
        description: str = "",
        author: str = "ada",
        expected: str | None = None,
    ) -> Commit:
        """Let `change` edit a branch's files and record them, all at once or not at all.

        `expected` is the commit that the branch must be at. Without a difference the branch stays where it is.
        """
        with self.lock:
            branch = branch.removeprefix("refs/heads/")
            if branch not in self.branches:
                raise no_revision(branch)
            head = self.commits[self.branches[branch]]
            if expected is not None and not head.commit_id.startswith(expected):
                raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            files = dict(head.files)
            change(files)
            if folders := {path for path in files if any(other.startswith(path + "/") for other in files)}:
                raise Refusal(400, f"{min(folders)} cannot be a file and a folder")
            if {path: file.blob_id for path, file in files.items()} == {p: f.blob_id for p, f in head.files.items()}:
                return head
            return self._record(branch, files, head.commit_id, title, description, author)

    def _record(self, branch: str, files: Files, parent: str | None, title: str, body: str, author: str) -> Commit:
        commit = Commit(files, parent, title, body, author, self._next_date())
        self.commits[commit.commit_id] = commit
        self.branches[branch] = commit.commit_id
        return commit

    def _next_date(self) -> datetime:
        latest = max((commit.date for commit in self.commits.values()), default=self.created)
        return max(latest, now())

    def squash(self, branch: str, title: str, author: str) -> None:
        """Make one commit without a parent of a branch."""
        with self.lock:
            if branch not in self.branches:
                raise no_revision(branch)
            self._record(branch, self.commits[self.branches[branch]].files, None, title, "", author)

    def add_branch(self, branch: str, start: str = "main") -> None:
        with self.lock:
            commit_id = self.at(start).commit_id
            if branch in self.branches:
                raise Refusal(409, f"Reference already exists: refs/heads/{branch}")
            self.branches[branch] = commit_id

    def remove_branch(self, branch: str) -> None:
        with self.lock:
            if branch == "main":
                raise Refusal(403, "Cannot delete the main branch")
            if self.branches.pop(branch, None) is None:
                raise no_revision(branch)

    def add_tag(self, tag: str, revision: str) -> None:
        with self.lock:
            commit_id = self.at(revision).commit_id
            if tag in self.tags:
                raise Refusal(409, f"Tag already exists: {tag}")
            self.tags[tag] = commit_id

    def remove_tag(self, tag: str) -> None:
        with self.lock:
            if self.tags.pop(tag, None) is None:
                raise no_revision(tag)
