"""Publishing a sweep or a run on the Hub: what `depthscope push` does.

Each branch is written in one commit, and only where it differs from what is there; what was pushed before is looked at
first, so that a push that was interrupted goes on when it is started again. The token is the one that huggingface_hub
finds (`hf auth login`, HF_TOKEN), and is never shown.
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
    """What a push came to.

    Attributes:
        plan: what was to be on the Hub.
        revisions: every branch, and what was done to it; empty for a dry run.
        collection: the slug of the collection, if there is one.
        folder: where a dry run wrote what would be pushed.
        notes: what is to be said.
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
    """Publish a sweep, or one run, on the Hub; again to bring it up to date, or to go on where it was interrupted.

    Args:
        source: the folder of a sweep, of one of its points, of a Trainer's run, or of a saved model.
        to: a user or an organisation; for a single run also `namespace/name`.
        private: make the repositories and the collection private.
        native: also push each model as an architecture of transformers, where one expresses it exactly.
        steps: push the checkpoints of the training as branches `step<N>`.
        license: an identifier of the Hub, for the cards.
        language: codes of languages, for the cards.
        datasets: data sets on the Hub that the models were trained on.
        base_model: the model on the Hub that a run started from.
        only: names or patterns of points or variants of a sweep.
        space: a Space that the collection lists.
        collection: its title; a single run has one only where this or `space` is given.
        overwrite: replace files on the Hub that somebody else made or changed.
        dry_run: write what would be pushed into this folder, which must be new or empty, and push nothing.
        token: instead of the one that huggingface_hub finds.
        progress: show it on a terminal.
        patience: with a Hub that does not answer.

    Raises:
        HubError: there is nothing to publish, the Hub refused or did not answer, or others' files are in the way.
        SettingsError: a value that the Hub would refuse.
        ReportError: a file of the run is damaged.
    """
    if not isinstance(source, (str, os.PathLike)) or not os.fspath(source).strip():
        raise SettingsError(f"{source!r} is not the path of a folder; give that of a sweep, a run or a saved model.")
    check_names(to, space)
    if dry_run is not None:
        require_room(Path(os.fspath(dry_run)))  # before cards are written
    options = Options(native, steps, license, language, datasets, base_model, only, space, collection)
    with tempfile.TemporaryDirectory(prefix="depthscope-push-") as work:
        api = None
        patience = patience or Patience()
        if dry_run is None:
            with _calm():
                api = client(token)
                # Before the work: a token that may not write is found out in a second.
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
    """Bring the Hub to what a plan says.

    Raises:
        HubError: the Hub refused or did not answer, or others' files are in the way.
    """
    publication = Publication(plan, notes=list(plan.notes))
    with _calm(), showing_progress(sum(tree.size for tree in plan.trees), visible=progress) as shown:
        patience = replace(patience, said=_both(patience.said, shown.at))
        publication.revisions = _push_all(api, plan, patience, shown, private=private, overwrite=overwrite)
        if plan.collection is not None:
            shown.at("collection")
            publication.collection, unknown = publish_collection(api, plan.collection, patience, private=private)
            publication.notes += [
                f"The Hub does not know the {item}; the collection is without it." for item in unknown
            ]
    if kept := [f"{one.repo_id} {path}" for one in publication.revisions for path in one.kept]:
        publication.notes.append(f"Changed on the Hub and left as they are: {', '.join(kept)}.")
    return publication


def _both(one: Callable[[str], None], other: Callable[[str], None]) -> Callable[[str], None]:
    def tell(line: str) -> None:
        one(line)
        other(line)

    return tell


def client(token: str | None = None) -> HfApi:
    """A client of the Hub with a token.

    Raises:
        HubError: there is no token, or what there is cannot be one.
    """
    found = token or get_token()
    if not found:
        raise HubError(f"There is no token for the Hub. {LOG_IN}.")
    if not (found.isascii() and found.isprintable() and " " not in found):
        raise HubError(f"The token for the Hub has characters that no token has; was more than it pasted? {LOG_IN}.")
    return HfApi(token=found, library_name="depthscope")


def _require_permission(api: HfApi, namespace: str) -> None:
    who: dict[str, Any] = api.whoami()
    role = (who.get("auth", {}).get("accessToken") or {}).get("role")
    if role == "read":
        raise HubError(f"The token of {who['name']} may only read. {LOG_IN}.")
    organizations = {one["name"]: one.get("roleInOrg") for one in who.get("orgs", [])}
    if namespace == who["name"] or (namespace in organizations and organizations[namespace] in (None, *WRITERS)):
        return
    if namespace in organizations:
        raise HubError(
            f"{who['name']} may only read in {namespace!r}: ask for the right to write, or use another --to."
        )
    mine = ", ".join([who["name"], *organizations])
    raise HubError(f"{namespace!r} is not a namespace of {who['name']}, who may push to: {mine}.")


def _push_all(
    api: HfApi, plan: PushPlan, patience: Patience, shown: Progress, *, private: bool, overwrite: bool
) -> list[PushedRevision]:
    """Push repositories side by side; the first failure stops the others after the step that they are in."""
    sizes = {(tree.kind, tree.repo_id, tree.revision): tree.size for tree in plan.trees}

    def done(one: PushedRevision) -> None:
        shown.at(f"{one.repo_id} {one.revision}")
        shown.advance(sizes[one.kind, one.repo_id, one.revision])

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
    return [one for future in futures for one in future.result()]


@contextmanager
def _calm() -> Iterator[None]:
    """Keep huggingface_hub's bars, log lines and warnings out of ours; `quiet` would silence ours too."""
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
