"""`Refusal`: an error as the Hub answers it, by status, message and error code."""

from typing import Any


class Refusal(Exception):
    """Raised anywhere behind a route; `code` is the header X-Error-Code, by which the client chooses its exception."""

    def __init__(self, status: int, message: str, code: str | None = None, **more: Any) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.more = status, message, code, more
        self.commit: str | None = None


def no_repository() -> Refusal:
    """What everybody is told who may not see a repository, whether it exists or not."""
    return Refusal(404, "Repository not found", "RepoNotFound")


def no_revision(revision: str) -> Refusal:
    return Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")


def no_entry(path: str, commit: str) -> Refusal:
    refusal = Refusal(404, f"Entry not found: {path}", "EntryNotFound")
    refusal.commit = commit
    return refusal
