"""Publishing a sweep or a run on the Hub: the work of `depthscope push`.

Each branch is written in one commit, and only if it differs from the Hub's. A push first compares the files with those
on the Hub, so an interrupted push continues when it is started again. huggingface_hub finds the token (`hf auth login`,
HF_TOKEN); it is never shown.
"""

import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from depthscope.console.progress import Progress, showing_progress, showing_status
from depthscope.errors import HubError, SettingsError
from depthscope.hub.collection import publish_collection
from depthscope.hub.commit import PushedRevision, push_trees
from depthscope.hub.errors import LOG_IN
from depthscope.hub.plan import Options, PushPlan, check_names, make_plan
from depthscope.hub.retry import Patience, Stopped
from depthscope.hub.tree import Tree, require_room, write_trees

__all__ = ["Publication", "client", "publish", "push"]

REPOSITORIES_AT_ONCE = 4
WRITERS = ("admin", "write", "contributor")


@dataclass
class Publication:
    """The result of a push.

    Attributes:
        plan: the planned content of the Hub.
        revisions: every branch with its changes; empty for a dry run.
        collection: the slug of the collection, if there is one.
        folder: the folder that a dry run wrote.
        notes: messages for the user.
    """

    plan: PushPlan
    revisions: list[PushedRevision] = field(default_factory=list)
    collection: str | None = None
    folder: Path | None = None
    notes: list[str] = field(default_factory=list)


def push(
    source: str | os.PathLike[str],
    to: str,
    *,
    private: bool = False,
    native: bool = False,
    steps: bool = True,
    license: str | None = None,
    language: Sequence[str] = (),
    datasets: Sequence[str] | None = None,
    base_model: str | None = None,
    only: Sequence[str] = (),
    space: str | None = None,
    collection: str | None = None,
    overwrite: bool = False,
    dry_run: str | os.PathLike[str] | None = None,
    token: str | None = None,
    progress: bool = True,
    patience: Patience | None = None,
) -> Publication:
    """Publish a sweep or a run on the Hub; run it again to update it, or to continue after an interruption.

    Args:
        source: the folder of a sweep, of one of its points, of a Trainer's run, or of a saved model.
        to: a user or an organisation; for a single run also `namespace/name`.
        private: make the repositories and the collection private.
        native: also push each model in an architecture of transformers, if one expresses it exactly.
        steps: push the checkpoints of the training as branches `step<N>`.
        license: the Hub's identifier of the licence, for the cards.
        language: language codes, for the cards.
        datasets: data sets on the Hub that the models were trained on.
        base_model: the model on the Hub that a run started from.
        only: names or patterns of points or variants of a sweep.
        space: a Space that the collection lists.
        collection: the title of the collection; a single run gets one only with this or `space`.
        overwrite: replace files on the Hub that somebody else made or changed.
        dry_run: write the files to this folder, which must be new or empty, and push nothing.
        token: a token, instead of the one that huggingface_hub finds.
        progress: whether to show progress on a terminal.
        patience: how to retry when the Hub does not answer.

    Raises:
        HubError: there is nothing to publish, the Hub refused or did not answer, or others' files would be replaced.
        SettingsError: the Hub would refuse a value.
        ReportError: a file of the run is damaged.
    """
    if not isinstance(source, (str, os.PathLike)) or not os.fspath(source).strip():
        raise SettingsError(
            f"{source!r} is not the path of a folder; give the folder of a sweep, a run or a saved model."
        )
    check_names(to, space)
    if dry_run is not None:
        require_room(Path(os.fspath(dry_run)))  # before the cards are written
    options = Options(native, steps, license, language, datasets, base_model, only, space, collection)
    with tempfile.TemporaryDirectory(prefix="depthscope-push-") as work:
        api = None
        patience = patience or Patience()
        if dry_run is None:
            with _quiet_client():
                api = client(token)
                # Before the work, since checking the token takes a second.
                patience.carry_out("log in", lambda: _require_permission(api, to.partition("/")[0]))
        with showing_status("Writing cards", visible=progress):
            plan = make_plan(Path(source), to, Path(work), options)
        if api is not None:
            return publish(api, plan, patience, private=private, overwrite=overwrite, progress=progress)
        folder = Path(os.fspath(dry_run))  # type: ignore[arg-type]
        write_trees(plan.trees, folder)
        return Publication(plan, folder=folder, notes=list(plan.notes))


def publish(
    api: HfApi,
    plan: PushPlan,
    patience: Patience,
    *,
    private: bool = False,
    overwrite: bool = False,
    progress: bool = False,
) -> Publication:
    """Update the Hub according to a plan.

    Raises:
        HubError: the Hub refused or did not answer, or the push would replace others' files.
    """
    publication = Publication(plan, notes=list(plan.notes))
    with _quiet_client(), showing_progress(sum(tree.size for tree in plan.trees), visible=progress) as progress_bar:
        patience = replace(patience, report_wait=_both(patience.report_wait, progress_bar.at))
        publication.revisions = _push_all(api, plan, patience, progress_bar, private=private, overwrite=overwrite)
        if plan.collection is not None:
            progress_bar.at("collection")
            publication.collection, unknown = publish_collection(api, plan.collection, patience, private=private)
            publication.notes += [
                f"The Hub does not know the {item}; the collection does not list it." for item in unknown
            ]
    if kept := [f"{pushed.repo_id} {path}" for pushed in publication.revisions for path in pushed.kept]:
        publication.notes.append(f"These files were changed on the Hub and are kept: {', '.join(kept)}.")
    return publication


def _both(first: Callable[[str], None], second: Callable[[str], None]) -> Callable[[str], None]:
    def notify(line: str) -> None:
        first(line)
        second(line)

    return notify


def client(token: str | None = None) -> HfApi:
    """A client of the Hub with a token.

    Raises:
        HubError: there is no token, or it is not valid.
    """
    secret = token or get_token()
    if not secret:
        raise HubError(f"There is no token for the Hub. {LOG_IN}.")
    if not (secret.isascii() and secret.isprintable() and " " not in secret):
        raise HubError(f"The token for the Hub has invalid characters; was more than the token pasted? {LOG_IN}.")
    return HfApi(token=secret, library_name="depthscope")


def _require_permission(api: HfApi, namespace: str) -> None:
    who: dict[str, Any] = api.whoami()
    role = (who.get("auth", {}).get("accessToken") or {}).get("role")
    if role == "read":
        raise HubError(f"The token of {who['name']} may only read. {LOG_IN}.")
    organizations = {each["name"]: each.get("roleInOrg") for each in who.get("orgs", [])}
    if namespace == who["name"] or (namespace in organizations and organizations[namespace] in (None, *WRITERS)):
        return
    if namespace in organizations:
        raise HubError(f"{who['name']} may only read in {namespace!r}: ask for write access, or use another --to.")
    mine = ", ".join([who["name"], *organizations])
    raise HubError(f"{namespace!r} is not a namespace of {who['name']}, who may push to: {mine}.")


def _push_all(
    api: HfApi, plan: PushPlan, patience: Patience, progress_bar: Progress, *, private: bool, overwrite: bool
) -> list[PushedRevision]:
    """Push repositories in parallel; the first failure stops the others after their current step."""
    sizes = {(tree.kind, tree.repo_id, tree.revision): tree.size for tree in plan.trees}

    def done(pushed: PushedRevision) -> None:
        progress_bar.at(f"{pushed.repo_id} {pushed.revision}")
        progress_bar.advance(sizes[pushed.kind, pushed.repo_id, pushed.revision])

    def push_one(trees: list[Tree]) -> list[PushedRevision]:
        return push_trees(api, trees, patience, private=private, overwrite=overwrite, done=done)

    with ThreadPoolExecutor(REPOSITORIES_AT_ONCE, thread_name_prefix="push") as pool:
        futures = [pool.submit(push_one, trees) for trees in plan.repositories]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            if not all(future.done() and future.exception() is None for future in futures):
                patience.stop.set()
    failures = [error for future in futures if (error := future.exception())]
    causes = [error for error in failures if not isinstance(error, Stopped)]
    if failures:
        raise (causes or failures)[0]
    return [revision for future in futures for revision in future.result()]


@contextmanager
def _quiet_client() -> Iterator[None]:
    """Silence huggingface_hub's progress bars, log lines and warnings; `quiet` would silence ours too."""
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", module="huggingface_hub")
        warnings.filterwarnings("ignore", message="It seems that you are about to commit a data file")
        for name in ("huggingface_hub", "httpx", "httpx2"):
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL)
        if not are_progress_bars_disabled():
            stack.callback(enable_progress_bars)
            disable_progress_bars()
        yield
