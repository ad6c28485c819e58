"""A visitor's upload -> a new folder with the checked files of one model, or one checked GGUF file.

    a .zip file            a packed folder of save_pretrained (or a packed .gguf file)
    several files          config.json, the tokenizer's files and *.safetensors together
    a .gguf file           used directly

Every file is checked before a library reads it: see `archives`, `weights`, `config`. Fields that name code are removed,
and pickles are never written.
"""

import hashlib
import os
import shutil
import stat
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from safety.archives import unpack
from safety.config import clean_config, clean_tokenizer, read_object, require_sane_numbers
from safety.limits import Limits
from safety.model_files import CONFIG, GGUF, INDEX, is_model_file, is_pickle
from safety.problems import Problem, too_large
from safety.weights import count_safetensors, gguf_facts

__all__ = ["Model", "check_model", "fingerprint", "receive", "require_size", "require_upload"]

CHUNK = 1 << 20
LEAST_BYTES_A_PARAMETER = 0.2  # below this factor a file cannot hold its weights


@dataclass(frozen=True)
class Model:
    """A checked model: its folder or its GGUF file, and its number of parameters."""

    path: Path
    parameters: int

    @property
    def is_gguf(self) -> bool:
        """Whether the model is a GGUF file."""
        return self.path.suffix.lower() == GGUF


def require_upload(paths: Sequence[Path], limits: Limits) -> None:
    """Refuse an upload that is empty, too large or of an unsupported type, before a job is created.

    Raises:
        Problem: the upload is refused; the message says what to upload.
    """
    if not paths:
        raise Problem(
            "upload", "No file was uploaded. Choose a .zip of a model's folder, its files, or one .gguf file."
        )
    if len(paths) > limits.max_files:
        raise Problem("upload", f"{len(paths)} files were uploaded; the limit of this Space is {limits.max_files}.")
    for path in paths:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise Problem("upload", f"{path.name} is not a plain file.")
    if sum(path.stat().st_size for path in paths) > limits.max_upload_bytes:
        raise too_large("The upload", limits.max_upload_bytes)
    kinds = {path.suffix.lower() for path in paths}
    if len(paths) > 1 and kinds & {".zip", GGUF}:
        raise Problem(
            "upload", "Upload one .zip, or one .gguf file, or the files of one model's folder; not several kinds."
        )
    if len(paths) == 1 and not kinds & {".zip", GGUF}:
        name = paths[0].name
        if is_pickle(name):
            raise _pickles([name])
        raise Problem(
            "upload",
            f"{name} alone is not a model. Upload a .zip of a model's folder, all its files together (config.json, the "
            "tokenizer's files, *.safetensors), or one .gguf file.",
        )


def fingerprint(paths: Sequence[Path]) -> str:
    """The SHA-256 of the uploaded bytes, independent of the names on the visitor's disk."""
    whole = hashlib.sha256()
    for path in sorted(paths, key=lambda path: path.name):
        whole.update(path.name.encode() if len(paths) > 1 else path.suffix.lower().encode())
        content = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                content.update(chunk)
        whole.update(content.digest())
    return whole.hexdigest()


def receive(paths: Sequence[Path], folder: Path, limits: Limits) -> Model:
    """Check an upload and put its model into the empty `folder`.

    Raises:
        Problem: the upload is refused; the message says why and what to do.
    """
    require_upload(paths, limits)
    if paths[0].suffix.lower() == ".zip":
        unpack(paths[0], folder, limits)
    else:
        _take(paths, folder)
    return check_model(folder, limits)


def check_model(folder: Path, limits: Limits) -> Model:
    """Check the files of a model in `folder`, and remove fields that name code or other places.

    Raises:
        Problem: as in `receive`.
    """
    names = {path.name for path in folder.iterdir()}
    ggufs = sorted(name for name in names if name.lower().endswith(GGUF))
    if ggufs:
        return _checked_gguf(folder / ggufs[0], limits)
    if CONFIG not in names:
        raise Problem("broken_config", "There is no config.json among the files. Add it, as save_pretrained wrote it.")
    clean_config(folder / CONFIG, limits)
    if INDEX in names:
        _check_index(folder / INDEX, names, limits)
    clean_tokenizer(folder, limits)
    weights = sorted(name for name in names if name.endswith(".safetensors"))
    if not weights:
        raise Problem(
            "no_safetensors",
            "There are no safetensors weights (model.safetensors, or model-00001-of-0000N.safetensors with their "
            "index). Save the model with save_pretrained, which writes them. Pickles (.bin, .pt) are never "
            "loaded here.",
        )
    parameters = sum(count_safetensors(folder / name, limits) for name in weights)
    require_size(parameters, limits)
    return Model(folder, parameters)


def _take(paths: Sequence[Path], folder: Path) -> None:
    """Copy the files of an upload that belong to a model into the folder."""
    pickles = []
    for path in paths:
        name = path.name
        if name.lower().endswith(GGUF):
            name = "model.gguf"
        elif is_pickle(name):
            pickles.append(name)
        if name == "model.gguf" or is_model_file(name):
            if (folder / name).exists():
                raise Problem("upload", f"{name!a} was uploaded twice.")
            _copy(path, folder / name)
    taken = {path.name for path in folder.iterdir()}
    if pickles and not any(name.endswith(".safetensors") for name in taken):
        raise _pickles(pickles)


def _copy(source: Path, target: Path) -> None:
    """Link weights if the file system can; copy files that will be changed."""
    if target.suffix in (".safetensors", GGUF):
        with suppress(OSError):  # another file system, or one without links
            os.link(source, target, follow_symlinks=False)
            return
    shutil.copyfile(source, target, follow_symlinks=False)


def _pickles(names: Sequence[str]) -> Problem:
    return Problem(
        "no_safetensors",
        f"The weights are in pickles ({', '.join(ascii(name) for name in names[:3])}), and loading a pickle can run "
        "hidden code. Save the model with save_pretrained, which writes safetensors.",
    )


def _check_index(path: Path, names: set[str], limits: Limits) -> None:
    content = read_object(path, limits.max_header_bytes, "broken_weights")
    shards = content.get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise Problem("broken_weights", f"{path.name} has no list of weights. Save the model again.")
    absent = sorted({shard for shard in shards.values() if shard not in names or not is_model_file(shard)})
    if absent:
        listed = ", ".join(ascii(shard[:60]) for shard in absent[:3])
        raise Problem(
            "broken_weights", f"{path.name} names {listed}, which is not among the files. Upload all of them."
        )


def _checked_gguf(path: Path, limits: Limits) -> Model:
    parameters, metadata = gguf_facts(path, limits)
    require_sane_numbers(metadata, path.name, limits)
    if not isinstance(metadata.get("general.architecture"), str):
        raise Problem("broken_weights", "The GGUF file names no architecture. Convert the model again.")
    if parameters * LEAST_BYTES_A_PARAMETER > path.stat().st_size:
        raise Problem("broken_weights", "The GGUF file is smaller than the weights in its header.")
    require_size(parameters, limits)
    return Model(path, parameters)


def require_size(parameters: float, limits: Limits, what: str = "The model has", slack: float = 1.0) -> None:
    """Refuse a model with too many parameters; `what` begins the message, `slack` allows for a guessed number.

    Raises:
        Problem: the model has too many parameters.
    """
    if parameters > slack * limits.max_parameters:
        raise Problem(
            "too_large",
            f"{what} {parameters / 1e9:.3g} billion parameters; the limit of this Space is "
            f"{limits.max_parameters / 1e9:.3g} billion. Analyse it on your own machine: pip install depthscope.",
        )
