"""Finding the files of a model (a Hub repository, a folder or a GGUF file) and checking that they may be loaded.

These checks read no weights, and each cause has its own message: no files, no permission, no network, no config, no
weights, pickles only. Weights are read from safetensors and GGUF files only: loading a pickle can run hidden code.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache
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
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open

from depthscope.errors import ModelLoadError
from depthscope.files.atomic import reason, require_opens
from depthscope.loading.gguf.header import MAGIC
from depthscope.loading.gguf.split import cut_into_pieces
from depthscope.wording.messages import listed, one_line

__all__ = [
    "CONFIG",
    "INDEX",
    "WEIGHTS",
    "Checkpoint",
    "damaged_file",
    "explain_hub_error",
    "find_checkpoint",
    "find_relative_folder",
    "is_pickle",
    "local_base",
    "require_weights",
]

CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# What FSDP2 writes, one file per process.
PROCESS_SHARD = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
# Files that a Trainer writes beside the weights.
NOT_WEIGHTS = re.compile(r"training_args|optimizer|scheduler|scaler|rng_state|trainer_state")
# The number of folders that a relative path may start from: a checkpoint, its run, the folder of runs, the project.
STARTS = 4
REACH_TIMEOUT = 10.0  # seconds


@dataclass(frozen=True)
class Checkpoint:
    """The files of one model: the name that the user gave, its location, and the names of its files.

    `location` is the argument of `from_pretrained`: a repository id (then `revision` is a commit), or a folder. If the
    Hub cannot be reached, it is the cached folder of the repository.
    """

    name: str
    source: str  # "hub", "folder" or "gguf"
    location: str
    files: frozenset[str]
    revision: str | None = None
    gguf_file: str | None = None  # its full path: transformers looks for a bare name in the current folder first
    token: str | None = None

    @property
    def is_local(self) -> bool:
        """Whether `location` is a folder on this machine."""
        return Path(self.location).is_dir()

    @property
    def is_adapter(self) -> bool:
        """Whether the files are those of a PEFT adapter, without the weights of a model."""
        return ADAPTER_CONFIG in self.files and self.gguf_file is None and not {WEIGHTS, INDEX} & self.files

    @property
    def where(self) -> dict[str, Any]:
        """The arguments of `from_pretrained` that choose the files."""
        hub = {} if self.is_local else {"revision": self.revision, "token": self.token}
        gguf = {"gguf_file": self.gguf_file} if self.gguf_file else {}
        return {"pretrained_model_name_or_path": self.location, **hub, **gguf}

    def inner_models(self) -> list[str]:
        """Subfolders that hold a model or an adapter, such as a Trainer's checkpoints, by number and name."""
        if not self.is_local:
            return []
        folders = {file.parent for name in (CONFIG, ADAPTER_CONFIG) for file in Path(self.location).glob(f"*/{name}")}
        return [str(folder) for folder in sorted(folders, key=_by_number)]

    def fetch(self, filename: str) -> Path | None:
        """The path of one file, downloaded if needed; None if there is no such file."""
        if filename not in self.files:
            return None
        if self.is_local:
            return Path(self.location, filename)
        with hub_errors(self.name, self.revision):
            return Path(hf_hub_download(self.location, filename, revision=self.revision, token=self.token))

    def read_json(self, filename: str) -> dict[str, Any]:
        """The JSON object in one of the files; {} if there is no such file."""
        path = self.fetch(filename)
        if path is None:
            return {}
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ModelLoadError(f"{filename} of {self.name!r} cannot be read: {reason(error)}.") from error
        except (ValueError, RecursionError) as error:
            raise ModelLoadError(
                f"{filename} of {self.name!r} is not valid JSON ({one_line(error)}) Repair the file, or fetch it again."
            ) from error
        if not isinstance(content, dict):
            raise ModelLoadError(
                f"{filename} of {self.name!r} holds a JSON {type(content).__name__}, but an object was expected. "
                "Repair the file, or fetch it again."
            )
        return content


def find_checkpoint(name: str, *, revision: str | None = None, token: str | None = None) -> Checkpoint:
    """Find the files of the model `name`: a folder, a .gguf file, or else a repository on the Hugging Face Hub.

    Raises:
        ModelLoadError: there is no such model, or it cannot be reached.
    """
    path = Path(name).expanduser()
    try:
        if path.is_dir() and name.strip():  # a blank name is not the current folder
            return Checkpoint(name, "folder", str(path), _files_in(path))
        if path.is_file():
            return _single_file(name, path)
    except OSError as error:
        raise ModelLoadError(f"{name!r} cannot be read: {error.strerror or error}. Check the path.") from error
    _refuse_missing_path(name, path)
    return _hub_checkpoint(name, revision, token)


def find_relative_folder(name: str, beside: Path) -> Path | None:
    """The folder of a relative path in a file that is not relative to the current folder; None if there is none.

    Args:
        name: the path, such as ./base or out/base.
        beside: the folder of the file that contains the path. The path is relative to this folder or to one of its
            parents: a training writes paths relative to the folder where it was started.
    """
    if Path(name).is_absolute() or not name.strip():
        return None
    folder = beside.absolute()
    starts = [folder, *folder.parents][:STARTS]
    return next((start / name for start in starts if (start / name / CONFIG).is_file()), None)


def local_base(folder: Path) -> Path | None:
    """The local folder or file of the base model of the adapter in `folder`; None if there is none."""
    try:
        name = Checkpoint(str(folder), "folder", str(folder), _files_in(folder)).read_json(ADAPTER_CONFIG)
    except (OSError, ModelLoadError):
        return None  # loading reports the problem
    base = name.get("base_model_name_or_path")
    if not isinstance(base, str) or not base.strip() or "\0" in base:
        return None
    return Path(base) if os.path.exists(base) else find_relative_folder(base, folder)


def require_weights(checkpoint: Checkpoint, config: dict[str, Any]) -> list[str]:
    """Return the files that hold the weights; refuse a checkpoint without weights or with weights that can run code.

    Raises:
        ModelLoadError: no weights, pickles only, missing shards, or the weights of one process among many.
    """
    if checkpoint.gguf_file:
        return []
    named = config.get("transformers_weights")  # a config may name another file
    candidates = (named,) if isinstance(named, str) else (WEIGHTS, INDEX)
    chosen = next((file for file in candidates if file in checkpoint.files), None)
    if parts := sorted(file for file in checkpoint.files if PROCESS_SHARD.fullmatch(file)):
        raise ModelLoadError(_process_shards(checkpoint.name, parts, chosen))
    if chosen is None:
        raise ModelLoadError(_no_weights(checkpoint))
    if not chosen.endswith((".safetensors", ".safetensors.index.json")):
        raise ModelLoadError(_pickle_only(checkpoint.name, [chosen]))
    return _require_shards(checkpoint, chosen) if chosen.endswith(".index.json") else [chosen]


def damaged_file(checkpoint: Checkpoint) -> tuple[str, str] | None:
    """The first local safetensors file that is damaged, and why; None if there is none.

    Raises:
        ModelLoadError: a file cannot be opened; its content may be intact.
    """
    if checkpoint.is_local:
        folder = Path(checkpoint.location)
    else:
        config = try_to_load_from_cache(checkpoint.location, CONFIG, revision=checkpoint.revision)
        if not isinstance(config, str):
            return None
        folder = Path(config).parent
    for path in sorted(folder.glob("*.safetensors")):
        try:
            require_opens(path)
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            return path.name, one_line(error)
        except OSError as error:
            raise ModelLoadError(f"{path.name} of {checkpoint.name!r} cannot be read: {reason(error)}.") from error
    return None


def is_pickle(name: str) -> bool:
    """Whether a file holds weights in a form that can run code."""
    return name.lower().endswith(PICKLE_SUFFIXES) and not NOT_WEIGHTS.search(name)


@contextmanager
def hub_errors(name: str, revision: str | None = None) -> Iterator[None]:
    """Turn an exception of the Hub's client into a `ModelLoadError` that names the cause."""
    try:
        yield
    except (HTTPError, OSError, EntryNotFoundError) as error:
        raise ModelLoadError(explain_hub_error(error, name, revision)) from error


def explain_hub_error(error: BaseException, name: str, revision: str | None = None) -> str:
    """The message for an exception of the Hub's client about the model `name`."""
    match error:
        case GatedRepoError():
            return (
                f"The repository {name!r} is gated: its owners grant access on request. Ask for access at "
                f"{constants.ENDPOINT}/{name}, then log in with `hf auth login` (or give a token) and try again."
            )
        case RepositoryNotFoundError():
            return (
                f"There is no folder or file {name!r}, and no such repository on the Hugging Face Hub that you may "
                "see. Check the spelling; for a private repository, log in with `hf auth login` or give a token."
            )
        case RevisionNotFoundError():
            return f"The repository {name!r} has no revision {revision!r}. Give an existing branch, tag or commit."
        case LocalEntryNotFoundError():
            return _unreachable(name)
        case EntryNotFoundError():
            return f"A file of the repository {name!r} is gone ({one_line(error)}) Try again, or give a revision."
        case HfHubHTTPError():
            return (
                f"The Hugging Face Hub answered {error.response.status_code} when asked for {name!r}. Try again "
                "later; for 401 or 403, check your token with `hf auth whoami`."
            )
        case HTTPError() | ConnectionError() | TimeoutError():
            return _unreachable(name)
    return (
        f"The files of {name!r} cannot be stored in the cache {constants.HF_HUB_CACHE!r}: {one_line(error)} Make room "
        "there, or set HF_HOME to another folder."
    )


# Files and folders


def _by_number(folder: Path) -> tuple[int, str]:
    """checkpoint-1000 after checkpoint-200."""
    number = re.search(r"(\d+)$", folder.name)
    return (int(number[1]) if number else -1, folder.name)


def _files_in(folder: Path) -> frozenset[str]:
    return frozenset(file.name for file in folder.iterdir() if file.is_file())


def _single_file(name: str, path: Path) -> Checkpoint:
    with path.open("rb") as file:
        is_gguf = file.read(len(MAGIC)) == MAGIC
    if why := cut_into_pieces(name):
        raise ModelLoadError(why)
    if path.suffix.lower() == ".gguf":
        if not is_gguf:
            raise ModelLoadError(
                f"{name!r} is not a GGUF file: it does not start with the letters GGUF. It may be damaged, a pointer "
                "file of Git LFS, or a piece of a file that was cut up; fetch it again, or join the pieces."
            )
        return Checkpoint(name, "gguf", str(path.parent), frozenset({path.name}), gguf_file=str(path.absolute()))
    if is_gguf:
        raise ModelLoadError(f"{name!r} is a GGUF file by its first letters. Give it a name that ends with .gguf.")
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise ModelLoadError(_pickle_only(str(path.parent), [path.name]))
    raise ModelLoadError(
        f"{name!r} is a single file, but a model is a folder (config.json, *.safetensors), a .gguf file or the id of a "
        f"repository on the Hugging Face Hub. Give the folder instead: {str(path.parent)!r}."
    )


def _refuse_missing_path(name: str, path: Path) -> None:
    """Refuse a missing path before the Hub is asked, so that a typing error in a path gets its own message."""
    looks_like_path = name.startswith(("/", "./", "../", "~", ".\\", "..\\")) or path.suffix.lower() in (
        ".gguf",
        ".safetensors",
        *PICKLE_SUFFIXES,
    )
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        if not looks_like_path and "/" not in name and "\\" not in name:
            raise ModelLoadError(
                f"{name!r} is neither a path nor the id of a model. Give a folder, a .gguf file or an id of the "
                "Hugging Face Hub, such as HuggingFaceTB/SmolLM2-135M."
            ) from error
        looks_like_path = True
    if looks_like_path:
        raise ModelLoadError(
            f"There is no file or folder {name!r}. Check the path (the current folder is {str(Path.cwd())!r})."
        )


# The Hub


def _hub_checkpoint(name: str, revision: str | None, token: str | None) -> Checkpoint:
    if constants.HF_HUB_OFFLINE:
        return _cached_checkpoint(name, revision, ModelLoadError(_unreachable(name)))
    with hub_errors(name, revision):
        try:
            info = HfApi(token=token).model_info(name, revision=revision, timeout=REACH_TIMEOUT)
        except (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError):
            raise
        except (HTTPError, OSError) as error:
            return _cached_checkpoint(name, revision, error)
        files = frozenset(file.rfilename for file in info.siblings or ())
        for filename in {CONFIG, ADAPTER_CONFIG} & files:
            # By the given revision, not by commit, so that the cache keeps the commit of that revision.
            hf_hub_download(name, filename, revision=revision, token=token)
    return Checkpoint(name, "hub", name, files, revision=info.sha, token=token)


def _cached_checkpoint(name: str, revision: str | None, reason: Exception) -> Checkpoint:
    for filename in (CONFIG, ADAPTER_CONFIG):
        cached = try_to_load_from_cache(name, filename, revision=revision)
        if isinstance(cached, str):
            folder = Path(cached).parent
            return Checkpoint(name, "hub", str(folder), _files_in(folder), revision=folder.name)
    raise reason


def _unreachable(name: str) -> str:
    if constants.HF_HUB_OFFLINE:
        return (
            f"There is no folder or file {name!r}, it is not in the cache, and the Hugging Face Hub is switched off "
            "by the environment variable HF_HUB_OFFLINE. Check the path, or unset the variable to download the model."
        )
    return (
        f"There is no folder or file {name!r}, it is not in the cache, and the Hugging Face Hub "
        f"({constants.ENDPOINT}) cannot be reached. Check the path, or the network to download the model."
    )


# Weights


def _no_weights(checkpoint: Checkpoint) -> str:
    if pickles := sorted(filter(is_pickle, checkpoint.files)):
        return _pickle_only(checkpoint.name, pickles)
    if checkpoint.source == "hub" and checkpoint.is_local:
        return (
            f"The weights of {checkpoint.name!r} are not in the cache, and the Hugging Face Hub cannot be reached. "
            "Check the network (and HF_HUB_OFFLINE) to download them."
        )
    others = sorted(
        file for file in checkpoint.files if file.endswith((".safetensors", ".gguf", ".h5", ".msgpack", ".onnx"))
    )
    others_note = f"; it has {listed(others)}, which transformers does not load" if others else ""
    return (
        f"{checkpoint.name!r} holds a config but no weights: {WEIGHTS} or {INDEX} was expected{others_note}. Fetch the "
        "weights, or save the model again with save_pretrained."
    )


def _pickle_only(name: str, pickles: list[str]) -> str:
    return (
        f"{name!r} holds its weights only as pickles ({listed(pickles)}), and loading a pickle can run hidden code; "
        "safetensors or GGUF is needed. If you trust its source, convert it once: python -c "
        f'"from transformers import AutoModelForCausalLM as M; M.from_pretrained({name!r}, use_safetensors=False)'
        ".save_pretrained('converted')\", and copy the tokenizer's files beside it."
    )


def _process_shards(name: str, parts: list[str], whole: str | None) -> str:
    """What to do about shards; transformers prefers them to a complete file, and silently drops misplaced tensors."""
    instead = f"Delete them if {whole} is the model. Otherwise put" if whole else "Put"
    return (
        f"{name!r} holds the shards that the processes of a distributed training wrote ({listed(parts)}). "
        f'{instead} them together: python -c "from transformers.distributed.checkpoint import '
        f"consolidate_distributed_checkpoint as c; c({name!r}, 'whole')\", and copy the config and tokenizer beside it."
    )


def _require_shards(checkpoint: Checkpoint, index: str) -> list[str]:
    weight_map = checkpoint.read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ModelLoadError(f"{index} of {checkpoint.name!r} has no list of weights. Fetch the file again.")
    shards = set(weight_map.values())
    if pickles := sorted(file for file in shards if not file.endswith(".safetensors")):
        raise ModelLoadError(_pickle_only(checkpoint.name, pickles))
    if absent := sorted(shards - checkpoint.files):
        raise ModelLoadError(
            f"{checkpoint.name!r} lacks {len(absent)} of its {len(shards)} weight files ({listed(absent)}). Fetch "
            "them, or the whole model, again."
        )
    return sorted(shards)
