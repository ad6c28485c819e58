"""Making a branch of a repository hold a tree in one commit, or leaving it if it already does."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_url
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

from depthscope.errors import HubError
from depthscope.hub.retry import Patience
from depthscope.hub.tree import MAIN, MANIFEST, Digest, Kind, Tree, read_manifest
from depthscope.wording.messages import listed

__all__ = ["Changes", "PushedRevision", "Remote", "changes", "push_trees"]

UPLOADS = 4  # large files at once, in a commit


@dataclass(frozen=True)
class Remote:
    """A branch on the Hub: its last commit, its files, and the files that an earlier push wrote."""

    commit: str
    files: dict[str, Digest]
    pushed: dict[str, Digest] = field(default_factory=dict)


@dataclass(frozen=True)
class Changes:
    """The changes to a branch: paths to write and to remove, and paths to keep since somebody else changed them."""

    write: list[str]
    remove: list[str]
    kept: list[str]


@dataclass(frozen=True)
class PushedRevision:
    """The result for a branch: its commit, the numbers of files written and removed, and the files of others kept."""

    repo_id: str
    kind: Kind
    revision: str
    commit: str
    is_changed: bool
    written: int = 0
    removed: int = 0
    kept: tuple[str, ...] = ()


def push_trees(
    api: HfApi,
    trees: list[Tree],
    patience: Patience,
    *,
    private: bool = False,
    overwrite: bool = False,
    done: Callable[[PushedRevision], None] = lambda revision: None,
) -> list[PushedRevision]:
    """Update the branches of one repository, in order; the repository and its branches are created if missing.

    A new branch starts at the first commit of the repository, so a branch without its own commit is empty and is not
    mistaken for a checkpoint.

    Args:
        api: the client.
        trees: the trees of one repository.
        patience: how to retry.
        private: make the repository private; an existing public one is refused.
        overwrite: replace files that somebody else made or changed.
        done: called after each branch.

    Raises:
        HubError: the Hub refused or did not answer, or the push would replace files of somebody else.
    """
    repo_id, kind = trees[0].repo_id, trees[0].kind
    patience.carry_out(f"open {repo_id}", lambda: _open(api, repo_id, kind, private))
    branches: set[str] = {MAIN}
    if any(tree.revision != MAIN for tree in trees):
        refs = patience.carry_out(
            f"list the branches of {repo_id}", lambda: api.list_repo_refs(repo_id, repo_type=kind)
        )
        branches |= {branch.name for branch in refs.branches}
    pushed = []
    for tree in trees:
        if tree.revision not in branches:
            patience.carry_out(f"make the branch {tree.revision} of {repo_id}", partial(_branch, api, tree))
        pushed.append(_push(api, tree, patience, overwrite))
        done(pushed[-1])
    return pushed


def changes(tree: Tree, remote: Remote, overwrite: bool = False) -> Changes:
    """The changes that make a branch hold a tree.

    Raises:
        HubError: a file that the push would replace was made or changed by somebody else.
    """
    write: list[str] = []
    remove: list[str] = []
    kept: list[str] = []
    foreign: list[str] = []
    for path, ours in tree.digests.items():
        theirs, known = remote.files.get(path), remote.pushed.get(path)
        if theirs is not None and ours.agrees(theirs):
            continue
        if theirs is None or overwrite or (known is not None and known.agrees(theirs)):
            write.append(path)
        elif known is not None and known.agrees(ours):
            kept.append(path)  # changed on the Hub, not here
        else:
            foreign.append(path)
    if foreign:
        where = f"{tree.repo_id}" + ("" if tree.revision == MAIN else f" ({tree.revision})")
        raise HubError(
            f"{where} has files that no push made, or that were changed on the Hub: {listed(foreign)}. Choose "
            "another name, or replace them with --overwrite."
        )
    for path, known in remote.pushed.items():
        if path in remote.files and path not in tree.files and path != MANIFEST:
            (remove if known.agrees(remote.files[path]) else kept).append(path)
    return Changes(write, remove, kept)


def _open(api: HfApi, repo_id: str, kind: str, private: bool) -> None:
    try:
        info = api.repo_info(repo_id, repo_type=kind)
    except RepositoryNotFoundError as error:
        if error.response.status_code != 404:  # 401: the token is not accepted
            raise
        api.create_repo(repo_id, repo_type=kind, private=private or None, exist_ok=True)
        return
    if private and not info.private:
        raise HubError(
            f"{repo_id} exists and is public: make it private in its settings first, or push without --private."
        )


def _branch(api: HfApi, tree: Tree) -> None:
    first = api.list_repo_commits(tree.repo_id, repo_type=tree.kind)[-1].commit_id
    api.create_branch(tree.repo_id, repo_type=tree.kind, branch=tree.revision, revision=first, exist_ok=True)


def _push(api: HfApi, tree: Tree, patience: Patience, overwrite: bool) -> PushedRevision:
    where = tree.repo_id if tree.revision == MAIN else f"{tree.repo_id} ({tree.revision})"
    attempts: list[Changes] = []
    committed: list[int] = []  # the size of each attempted commit

    def step() -> str:
        """Compare and commit what is missing; after an attempt whose answer got lost, nothing is left to do."""
        remote = _remote(api, tree)
        required = changes(tree, remote, overwrite)
        attempts.append(required)
        ours = CommitOperationAdd(MANIFEST, tree.manifest)
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(CommitOperationAdd(path, tree.files[path]) for path in required.write),
            *(CommitOperationDelete(path) for path in required.remove),
        ]
        if operations or remote.pushed != read_manifest(tree.manifest):
            operations.append(ours)
        if not operations:
            return remote.commit
        committed.append(len(operations))
        return api.create_commit(
            tree.repo_id,
            operations,
            repo_type=tree.kind,
            revision=tree.revision,
            commit_message=_message(tree, required),
            parent_commit=remote.commit,  # refuses to overwrite a commit made in between
            num_threads=UPLOADS,
        ).oid

    commit = patience.carry_out(f"write {where}", step)
    first = attempts[0]
    return PushedRevision(
        tree.repo_id,
        tree.kind,
        tree.revision,
        commit,
        bool(committed),
        len(first.write),
        len(first.remove),
        tuple(attempts[-1].kept),
    )


def _remote(api: HfApi, tree: Tree) -> Remote:
    info = api.repo_info(tree.repo_id, repo_type=tree.kind, revision=tree.revision, files_metadata=True)
    files = {
        file.rfilename: Digest(file.lfs.sha256, None) if file.lfs else Digest(None, file.blob_id)
        for file in getattr(info, "siblings", None) or []
    }
    commit = str(info.sha)
    pushed = read_manifest(_read(api, tree, commit)) if MANIFEST in files else {}
    return Remote(commit, files, pushed)


def _read(api: HfApi, tree: Tree, commit: str) -> bytes:
    url = hf_hub_url(tree.repo_id, MANIFEST, repo_type=tree.kind, revision=commit, endpoint=api.endpoint)
    response = http_backoff("GET", url, headers=build_hf_headers(token=api.token), follow_redirects=True)
    hf_raise_for_status(response)
    return response.content


def _message(tree: Tree, required: Changes) -> str:
    subject = "Training checkpoint " + tree.revision if tree.revision != MAIN else tree.repo_id.rpartition("/")[2]
    parts = [f"{len(required.write)} files"] if required.write else []
    parts += [f"{len(required.remove)} removed"] if required.remove else []
    return f"{subject}: {', '.join(parts) or 'list of files'} (depthscope push)"
