"""The checkpoints of a point: after an interruption, training resumes from the last intact one.

A checkpoint is complete if it holds the file `complete`, which is written last and holds the checksums of all other
files. A damaged checkpoint is removed, and the one before it is used. A checkpoint that cannot be read may be intact:
it is kept, and the point fails.
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

# The files that a checkpoint of an older version, without checksums, must hold.
PARTS = (TRAINER_STATE, "scheduler.pt", "rng_state*.pth", "optimizer*", "*model*")


def mark_complete(checkpoint: Path) -> None:
    """Mark a checkpoint as completely written."""
    (checkpoint / COMPLETE).unlink(missing_ok=True)
    write_atomically(checkpoint / COMPLETE, json.dumps(sealed({"files": checksums(checkpoint)})))


def usable_checkpoint(folder: Path, processes: Processes, note: Callable[[str], None]) -> Path | None:
    """The last intact checkpoint in the folder of a point; None if there is none. All processes call this together.

    Args:
        folder: the folder of the point.
        processes: the processes that train it.
        note: called with a message about damaged checkpoints.

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
                    f"{error.filename or path} cannot be read: {reason(error)}. Make it readable to resume the "
                    f"training from there, or delete {path} to resume from the checkpoint before it."
                ) from error
            if not whole:  # interrupted while it was written
                shutil.rmtree(path)
            elif name is not None:
                damaged.append(f"{path.name} is damaged ({name})")
                shutil.rmtree(path)
            elif usable is None:
                usable = path
        if damaged:
            then = "the training starts again" if usable is None else f"the training resumes from {usable.name}"
            note(f"{', '.join(damaged)}; {then}")
    if processes.count > 1:
        torch.distributed.barrier()
    return max(checkpoints(folder).items(), default=(0, None))[1]


def remove_checkpoints(folder: Path) -> None:
    """Remove all checkpoints in the folder of a point."""
    for checkpoint in checkpoints(folder).values():
        shutil.rmtree(checkpoint)


def unreadable_file(folder: Path) -> str | None:
    """The first file in a folder that is cut or empty, as far as this is visible without a checksum.

    Raises:
        OSError: a file cannot be read; its content may be intact.
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
    """The damaged or missing file of a checkpoint; None if the checkpoint is intact.

    Raises:
        OSError: a file cannot be read; its content may be intact.
    """
    try:
        written = (checkpoint / COMPLETE).read_bytes()
        if not written:  # of an older version, or emptied
            return next((part for part in PARTS if not any(checkpoint.glob(part))), None) or unreadable_file(checkpoint)
        content = json.loads(written)
        whole = isinstance(content, dict) and isinstance(content.get("files"), dict) and is_whole(content)
    except (*MISSING, ValueError):
        return COMPLETE
    return damaged_file(checkpoint, content["files"]) if whole else COMPLETE
