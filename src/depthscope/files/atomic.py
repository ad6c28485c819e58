"""Writing files completely or not at all, and reading them up to a bound.

Failures become one `ReportError` that names the path and what to do; nothing half-written is left behind.
"""

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from depthscope.errors import ReportError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "MISSING",
    "is_access_error",
    "read_text",
    "reason",
    "remove_leftovers",
    "require_opens",
    "require_path",
    "write_atomically",
    "write_together",
]

# The file does not exist. Other errors of the system (no permission, too many open files, an error of the disk or the
# network) do not show that its content is damaged, so nothing may be discarded because of them.
MISSING = (FileNotFoundError, IsADirectoryError, NotADirectoryError)


REMEDIES = {
    errno.ENOSPC: "no space is left on the device; free some, or choose a path on another one",
    errno.EDQUOT: "the disk quota is used up; free some space, or choose a path elsewhere",
    errno.EFBIG: "the file would be larger than the system allows; raise the limit, or choose a path elsewhere",
    errno.EACCES: "permission denied; check the permissions of the file and its folder, or choose another path",
    errno.EPERM: "the system does not permit it; choose a folder that you may write to",
    errno.EROFS: "the file system is read-only; choose a path elsewhere",
    errno.ENOENT: "the folder does not exist; create it first, or choose another path",
    errno.ENOTDIR: "a part of the path is a file, not a folder; choose another path",
    errno.EISDIR: "it is a folder; give the path of a file in it",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
}


def write_atomically(path: str | os.PathLike[str], content: str | bytes) -> Path:
    """Write a file so that at any moment `path` holds the old content or the new one, never a part of it.

    The content goes to a temporary file in the same folder, is flushed to the disk and then renamed. A symbolic link is
    followed; an existing file keeps its permissions; a device or pipe is written to directly.

    Args:
        path: the file to write.
        content: what to write; text is written as UTF-8 with the newlines it has.

    Returns:
        The path.

    Raises:
        ReportError: it cannot be written; the message says why and what to do. No temporary file stays behind.
    """
    require_path(path)
    data = content.encode("utf-8") if isinstance(content, str) else content
    try:
        target = Path(os.path.realpath(path))
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, "Is a directory")
        if target.exists() and not target.is_file():
            target.write_bytes(data)
        else:
            _replace(target, data)
    except (OSError, ValueError) as error:
        raise ReportError(f"cannot write {os.fspath(path)!r}: {reason(error)}.") from error
    return Path(path)


def write_together(folder: Path, contents: Mapping[str, str | bytes]) -> list[Path]:
    """Write several files to a folder, which is created if missing: all of them, or none if there is no room for all.

    Returns:
        Their paths, in the order of `contents`.

    Raises:
        ReportError: the folder or a file cannot be written; what was there before is still there.
    """
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ReportError(f"cannot create the folder {str(folder)!r}: {reason(error)}.") from error
    try:
        with contextlib.ExitStack() as stack:
            places = {}
            for name, content in contents.items():
                target = Path(os.path.realpath(folder / name))
                data = content.encode("utf-8") if isinstance(content, str) else content
                places[target] = stack.enter_context(_beside(target, data))
            for target, temporary in places.items():
                os.replace(temporary, target)
    except OSError as error:
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise ReportError(f"cannot write {str(folder)!r}: {reason(error)}.") from error
    _flush_folder(folder)
    return [folder / name for name in contents]


def require_path(path: Any) -> None:
    """Check that an argument is a path.

    Raises:
        ReportError: it is neither a string nor a path, or it is empty.
    """
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        raise ReportError(f"{path!r} is not the path of a file; give one as a string or a Path.")


def read_text(path: str | os.PathLike[str], max_bytes: int) -> str:
    """Read a UTF-8 text file of at most `max_bytes` bytes.

    Raises:
        ReportError: the file is missing, too large, unreadable or not UTF-8 text.
    """
    require_path(path)
    name = repr(os.fspath(path))
    try:
        with open(path, "rb") as file:
            data = file.read(max_bytes + 1)
    except FileNotFoundError as error:
        raise ReportError(f"there is no file {name}; give the path of a report, as written by --out.") from error
    except (OSError, ValueError) as error:
        raise ReportError(f"cannot read {name}: {reason(error)}.") from error
    if len(data) > max_bytes:
        raise ReportError(f"{name} is larger than {max_bytes / 2**20:g} MiB, the most that a report may take.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ReportError(f"{name} is not UTF-8 text (byte {error.start}), so it is not a report.") from error


def require_opens(path: str | os.PathLike[str]) -> None:
    """Check that a file can be opened: the libraries in Rust report every file that they cannot open as missing.

    Raises:
        OSError: the system's own error.
    """
    with open(path, "rb"):
        pass


def is_access_error(error: BaseException) -> bool:
    """Whether a file, or the file behind an error's cause, could not be accessed; its content may be intact."""
    system = error if isinstance(error, OSError) else error.__cause__
    return isinstance(system, OSError) and not isinstance(system, MISSING)


def remove_leftovers(folder: str | os.PathLike[str]) -> None:
    """Remove the temporary files of writers that were killed; files that are being written stay."""
    if fcntl is None:
        return
    for path in Path(folder).glob(".depthscope-*.tmp"):
        with contextlib.suppress(OSError):  # locked by its writer, already renamed, or of another user
            descriptor = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            finally:
                os.close(descriptor)


def _replace(target: Path, data: bytes) -> None:
    """Write `data` beside `target`, flush it to the disk, and rename it to `target`."""
    with _beside(target, data) as temporary:
        os.replace(temporary, target)
    _flush_folder(target.parent)


@contextlib.contextmanager
def _beside(target: Path, data: bytes) -> Iterator[Path]:
    """Write `data` to a temporary file beside `target`, flushed to the disk, with the permissions of `target`.

    The caller renames the file inside the context; if something fails there, the file is removed.
    """
    descriptor, temporary = _new_file(target.parent)
    lock = None if fcntl is None else os.dup(descriptor)  # kept until the file is renamed
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            temporary.chmod(stat.S_IMODE(target.stat().st_mode))
        yield temporary
    except BaseException:  # Ctrl-C too must leave no stray file; everything is raised again.
        temporary.unlink(missing_ok=True)
        raise
    finally:
        if lock is not None:
            os.close(lock)


def _new_file(folder: Path) -> tuple[int, Path]:
    """Open a temporary file and lock it where possible, so that `remove_leftovers` of another process keeps it."""
    while True:
        path = folder / f".depthscope-{secrets.token_hex(6)}.tmp"
        # Not tempfile.mkstemp: its files are private to the user, where an ordinary file follows the umask.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        if fcntl is not None:
            with contextlib.suppress(OSError):  # not on every file system
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        if path.exists():
            return descriptor, path
        os.close(descriptor)  # another process removed it before it was locked


def _flush_folder(folder: Path) -> None:
    """Make a rename in `folder` durable where the system can; the content itself is safe without it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def reason(error: OSError | ValueError) -> str:
    """Why a path cannot be read or written, and what to do, without the error number."""
    if not isinstance(error, OSError):  # a path with a null byte
        return str(error)
    return REMEDIES.get(error.errno or 0, error.strerror or str(error))
