"""Writing a whole folder: it appears complete or not at all."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from depthscope.errors import DepthscopeError
from depthscope.files.atomic import reason

__all__ = ["new_folder", "system_error"]

# How the libraries in Rust, which write weights and tokenizers, quote the number of the system's error.
IN_RUST = re.compile(r"(?:os error |code: )(\d+)")


@contextmanager
def new_folder(out: Path, raised: type[DepthscopeError]) -> Iterator[Path]:
    """A folder to fill that becomes `out` in the end, or vanishes if anything goes wrong.

    Args:
        out: the folder to write; new, or empty.
        raised: what to raise where it cannot be written.
    """
    out = Path(os.path.realpath(out))
    is_there = out.is_dir()  # then it may be a mount, or the current folder, whose place nothing can take
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name[:100]}-", dir=out if is_there else out.parent))
    except OSError as error:
        raise raised(f"cannot write {str(out)!r}: {reason(error)}.") from error
    try:
        yield temporary
        if is_there:
            for path in list(temporary.iterdir()):
                path.rename(out / path.name)
        else:
            temporary.chmod(0o777 & ~_umask())  # mkdtemp's are private to the user
            temporary.rename(out)
    except Exception as error:
        cause = system_error(error)
        if cause is None:
            raise
        raise raised(f"cannot write {str(out)!r}: {reason(cause)}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def system_error(error: Exception) -> OSError | None:
    """The system's error in what Python, or a library in Rust, raised; None where it was something else."""
    if isinstance(error, OSError):
        return error
    number = IN_RUST.search(str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else None


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
