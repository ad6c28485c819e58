"""The checkpoints that a point goes on from, if it is interrupted: the last one that is whole.

A checkpoint counts once the file `complete` is in it, which is written when everything else is and holds the checksums
of all that. One that is found to be damaged is removed, and the one before it is gone on from. One that cannot be read
may be whole: it stays, and the point fails.
"""

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open

from depthscope.errors import SweepError
from depthscope.files.atomic import MISSING, is_access_error, reason, require_opens, write_atomically
from depthscope.files.checksums import checksums, damaged_file, is_whole, sealed
from depthscope.processes import Processes
from depthscope.runs.layout import COMPLETE, TRAINER_STATE, checkpoints

__all__ = ["mark_complete", "remove_checkpoints", "unreadable_file", "usable_checkpoint"]

# What a checkpoint of an older version, which has no checksums, has to hold at least.
PARTS = (TRAINER_STATE, "scheduler.pt", "rng_state*.pth", "optimizer*", "*model*")


def mark_complete(checkpoint: Path) -> None:
    """Say that everything in a checkpoint is written."""
    (checkpoint / COMPLETE).unlink(missing_ok=True)
    write_atomically(checkpoint / COMPLETE, json.dumps(sealed({"files": checksums(checkpoint)})))


def usable_checkpoint(folder: Path, processes: Processes, noted: Callable[[str], None]) -> Path | None:
    """The last whole checkpoint in the folder of a point, None where there is none; all processes call it together.

    Args:
        folder: of the point.
        processes: that train it.
        noted: is told what is damaged.

    Raises:
        SweepError: the last one cannot be read; the message says what to do.
    """
    if processes.is_main:
        usable: Path | None = None
        damaged = []
        for path in reversed(checkpoints(folder).values()):
            try:
                whole, name = _is_marked(path), _damage(path) if usable is None else None
            except OSError as error:
                raise SweepError(
                    f"{error.filename or path} cannot be read: {reason(error)}. Once it can be, the training goes on "
                    f"from there; delete {path} to go on from what is before it."
                ) from error
            if not whole:  # interrupted while it was written
                shutil.rmtree(path)
            elif name is not None:
                damaged.append(f"{path.name} is damaged ({name})")
                shutil.rmtree(path)
            elif usable is None:
                usable = path
        if damaged:
            then = "the training begins anew" if usable is None else f"the training goes on from {usable.name}"
            noted(f"{', '.join(damaged)}; {then}")
    if processes.count > 1:
        torch.distributed.barrier()
    return max(checkpoints(folder).items(), default=(0, None))[1]


def remove_checkpoints(folder: Path) -> None:
    """Remove all checkpoints in the folder of a point."""
    for checkpoint in checkpoints(folder).values():
        shutil.rmtree(checkpoint)


def unreadable_file(folder: Path) -> str | None:
    """The first file in a folder that is cut or empty, as far as that can be seen without its checksum.

    Raises:
        OSError: one cannot be read, which says nothing of what is in it.
    """
    for path in sorted(folder.rglob("*")):
        try:
            if path.is_file():
                require_opens(path)
            if path.suffix in (".pt", ".pth", ".bin"):
                with zipfile.ZipFile(path) as archive:  # as torch saves; read, not unpickled
                    whole = archive.testzip() is None
            elif path.suffix == ".safetensors":
                with safe_open(path, framework="pt"):
                    whole = True
            elif path.suffix == ".json":
                whole = bool(json.loads(path.read_bytes()))
            else:
                whole = True
        except MemoryError:
            raise
        except Exception as error:  # whatever a damaged file makes the libraries raise
            if is_access_error(error):
                raise
            whole = False
        if not whole:
            return path.relative_to(folder).as_posix()
    return None


def _is_marked(checkpoint: Path) -> bool:
    """Whether everything in a checkpoint was written."""
    try:
        os.stat(checkpoint / COMPLETE)
    except MISSING:
        return False
    return True


def _damage(checkpoint: Path) -> str | None:
    """What in a checkpoint is damaged or missing; None where it is whole.

    Raises:
        OSError: a file cannot be read, which says nothing of what is in it.
    """
    try:
        said = (checkpoint / COMPLETE).read_bytes()
        if not said:  # of an older version, or emptied
            return next((part for part in PARTS if not any(checkpoint.glob(part))), None) or unreadable_file(checkpoint)
        content = json.loads(said)
        whole = isinstance(content, dict) and isinstance(content.get("files"), dict) and is_whole(content)
    except (*MISSING, ValueError):
        return COMPLETE
    return damaged_file(checkpoint, content["files"]) if whole else COMPLETE
