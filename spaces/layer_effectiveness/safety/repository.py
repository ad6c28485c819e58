"""A model on the Hugging Face Hub: checks before the download, and the download.

Sizes come from the Hub's metadata. Only the files of a model are fetched, into the job's own folder; files that the
Space's owner preloads are taken from the cache.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id

from safety.config import read_object
from safety.limits import Limits
from safety.model_files import CONFIG, GGUF, INDEX, TOKENIZER_FILES, WEIGHTS, is_model_file, is_pickle, is_weights
from safety.problems import Kind, Problem, too_long

__all__ = ["HubModel", "dataset_commit", "fetch", "hub_problems", "look_up"]

REACH_SECONDS = 15.0


@dataclass(frozen=True)
class HubModel:
    """A model on the Hub as its metadata describe it: the commit, the files to fetch, their bytes, and the config."""

    name: str
    sha: str
    files: tuple[str, ...]
    total_bytes: int
    weight_bytes: int
    config: dict[str, Any]
    restricted: bool  # private or gated: its results are not shown to others


def look_up(name: str, revision: str | None, token: str | None, limits: Limits) -> HubModel:
    """Ask the Hub for a model's commit, files and config, and refuse a model beyond the limits.

    Raises:
        Problem: the model does not exist, is gated, unreachable or too large, or has no safetensors or config.
    """
    name = _checked_name(name)
    with hub_problems(name, revision, token):
        api = HfApi(token=token or False)
        info = api.model_info(name, revision=revision or None, timeout=REACH_SECONDS)
        if info.sha is None:
            raise Problem("no_such_model", f"{name} has no commit yet; upload a model to it first.")
        tree = api.list_repo_tree(name, revision=info.sha)
        sizes = {entry.path: entry.size for entry in tree if isinstance(entry, RepoFile)}
    files = _files_to_fetch(name, sizes, limits)
    restricted = bool(getattr(info, "private", None) or getattr(info, "gated", None))
    return HubModel(
        name=name,
        sha=info.sha,
        files=tuple(files),
        total_bytes=sum(sizes[file] for file in files),
        weight_bytes=sum(sizes[file] for file in files if is_weights(file)),
        config=_config(name, info.sha, token, sizes, limits),
        restricted=restricted or (token is not None and not _is_public(name)),
    )


def fetch(model: HubModel, folder: Path, token: str | None) -> None:
    """Download a model's files into `folder`.

    Raises:
        Problem: the Hub refuses the download, or cannot be reached.
    """
    with hub_problems(model.name, model.sha, token):
        snapshot_download(
            model.name,
            revision=model.sha,
            local_dir=folder,
            allow_patterns=[file.replace("[", "[[]") for file in model.files],
            token=token or False,
            max_workers=4,
        )


def dataset_commit(name: str) -> str:
    """The present commit of a public dataset.

    Raises:
        Problem: there is no such dataset, or the Hub cannot be reached.
    """
    try:
        return str(HfApi(token=False).dataset_info(name, timeout=REACH_SECONDS).sha)
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise Problem("text", f"There is no public dataset {name!a} on the Hub. Check the spelling.") from error
    except (HfHubHTTPError, HTTPError, ConnectionError, TimeoutError) as error:
        raise _unreachable(name) from error


def _checked_name(name: str) -> str:
    """The id of a repository; also from a link to its page."""
    name = name.strip().removeprefix(constants.ENDPOINT).removeprefix("https://huggingface.co").strip("/")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise Problem(
            "no_such_model",
            f"{name[:80]!a} is not the id of a model. Give an id such as HuggingFaceTB/SmolLM2-135M.",
        ) from error
    if not name:
        raise Problem(
            "no_such_model", "No model was given. Give the id of a model, such as HuggingFaceTB/SmolLM2-135M."
        )
    return name


def _files_to_fetch(name: str, sizes: dict[str, int], limits: Limits) -> list[str]:
    weights = [file for file in sizes if is_weights(file)]
    if "adapter_config.json" in sizes and not weights:
        raise Problem(
            "no_safetensors", f"{name} is an adapter. Give its base model, or a model with the adapter merged."
        )
    if CONFIG not in sizes:
        ggufs = any(file.lower().endswith(GGUF) for file in sizes)
        hint = (
            "It holds GGUF files: download one and upload it here."
            if ggufs
            else "Give a model saved with transformers."
        )
        raise Problem("broken_config", f"{name} has no config.json, so transformers cannot load it. {hint}")
    if not weights:
        what = "only pickles, which can run hidden code" if any(map(is_pickle, sizes)) else "no weights"
        raise Problem(
            "no_safetensors",
            f"{name} holds {what}; but safetensors weights are needed. Give another version of the model.",
        )
    if WEIGHTS in weights:  # the file that transformers uses
        weights = [WEIGHTS]
    files = [file for file in sizes if is_model_file(file) and (file in weights or not is_weights(file))]
    if len(files) > limits.max_files:
        raise Problem("too_large", f"{name} has {len(files)} files; the limit of this Space is {limits.max_files}.")
    for file in files:
        most = limits.max_tokenizer_bytes if file in TOKENIZER_FILES else limits.max_json_bytes
        if not is_weights(file) and file != INDEX and sizes[file] > most:
            raise too_long("too_large", f"{file} of {name}", most)
    if (total := sum(sizes[file] for file in files)) > limits.max_download_bytes:
        raise Problem(
            "too_large",
            f"{name} is {total / 2**30:.3g} GiB large; the limit of this Space is "
            f"{limits.max_download_bytes / 2**30:.3g} GiB. Analyse it on your own machine: pip install depthscope.",
        )
    return files


def _config(name: str, sha: str, token: str | None, sizes: dict[str, int], limits: Limits) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="depthscope-space-") as folder, hub_problems(name, sha, token):
        path = hf_hub_download(name, "config.json", revision=sha, local_dir=folder, token=token or False)
        return read_object(Path(path), limits.max_json_bytes, "broken_config")


def _is_public(name: str) -> bool:
    """Whether anybody may read the model, without a token."""
    try:
        return not HfApi(token=False).model_info(name, timeout=REACH_SECONDS).gated
    except (HTTPError, OSError):
        return False


@contextmanager
def hub_problems(
    name: str, revision: str | None, token: str | None, what: str = "model", absent: Kind = "no_such_model"
) -> Iterator[None]:
    """Turn exceptions of the Hub's client into a `Problem`; `absent` is its kind if the `what` does not exist."""
    try:
        yield
    except GatedRepoError as error:
        how = "with this account" if token else "after signing in, if this Space offers it"
        raise Problem(
            "gated",
            f"{name} is gated: its owners grant access on request. Ask at {constants.ENDPOINT}/{name}, and try again "
            f"{how}, or analyse it on your own machine: pip install depthscope.",
        ) from error
    except RepositoryNotFoundError as error:
        private = "or your account may not see it" if token else "or it is private"
        raise Problem(absent, f"There is no {what} {name} on the Hub, {private}. Check the spelling.") from error
    except RevisionNotFoundError as error:
        raise Problem(
            absent, f"{name} has no revision {revision!a}. Give an existing branch, tag or commit."
        ) from error
    except LocalEntryNotFoundError as error:
        raise _unreachable(name) from error
    except EntryNotFoundError as error:
        raise Problem(absent, f"A file of {name} has been removed. Try again, or give a revision.") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        raise Problem(
            "hub_unreachable", f"The Hub answered {status} to the request for {name}. Try again later."
        ) from error
    except (HTTPError, ConnectionError, TimeoutError) as error:
        raise _unreachable(name) from error


def _unreachable(name: str) -> Problem:
    return Problem("hub_unreachable", f"The Hub cannot be reached for {name}. Try again in a few minutes.")
