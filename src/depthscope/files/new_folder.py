"""Writing a folder completely or not at all."""

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
def new_folder(out: Path, error_class: type[DepthscopeError]) -> Iterator[Path]:
    """Yield a temporary folder that becomes `out` at the end, or is removed if anything fails.

    Args:
        out: the folder to write; new, or empty.
        error_class: the error to raise if it cannot be written.
    """
    out = Path(os.path.realpath(out))
    exists = out.is_dir()  # it may be a mount or the current folder, which cannot be replaced
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name[:100]}-", dir=out if exists else out.parent))
    except OSError as error:
        raise error_class(f"cannot write {str(out)!r}: {reason(error)}.") from error
    try:
        yield temporary
        if exists:
            for path in list(temporary.iterdir()):
                path.rename(out / path.name)
        else:
            temporary.chmod(0o777 & ~_umask())  # mkdtemp's are private to the user
            temporary.rename(out)
    except Exception as error:
        cause = system_error(error)
        if cause is None:
            raise
        raise error_class(f"cannot write {str(out)!r}: {reason(cause)}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def system_error(error: Exception) -> OSError | None:
    """The operating system's error behind an error of Python or of a library in Rust; None if there is none."""
    if isinstance(error, OSError):
        return error
    number = IN_RUST.search(str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else None


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
