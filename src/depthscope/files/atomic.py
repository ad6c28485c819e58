"""Writing and reading whole files: written all or not at all, read no further than a bound.

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
    "read_text",
    "reason",
    "remove_leftovers",
    "require_opens",
    "require_path",
    "says_nothing_of_content",
    "write_atomically",
    "write_together",
]

# That a file is not there. Whatever else the system says (no permission, too many open files, an error of the disk or
# of the network that it is on) tells nothing of what is in the file, so that nothing may be thrown away for it.
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
    """Write several files of a folder, which is made if need be: all of them, or none where there is no room for all.

    Returns:
        Their paths, in the order of `contents`.

    Raises:
        ReportError: the folder or a file cannot be written; what was there before is still there.
    """
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ReportError(f"cannot make the folder {str(folder)!r}: {reason(error)}.") from error
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
    """Refuse what is no path.

    Raises:
        ReportError: it is not a string or a path, or an empty one.
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
    """See to it that a file can be opened, before a library in Rust is given it, which calls any other file missing.

    Raises:
        OSError: as the system says it.
    """
    with open(path, "rb"):
        pass


def says_nothing_of_content(error: BaseException) -> bool:
    """Whether an error of reading a file, or the error that it was made from, only says that it could not be read."""
    system = error if isinstance(error, OSError) else error.__cause__
    return isinstance(system, OSError) and not isinstance(system, MISSING)


def remove_leftovers(folder: str | os.PathLike[str]) -> None:
    """Remove the temporary files of writers that were killed; those that are being written stay."""
    if fcntl is None:
        return
    for path in Path(folder).glob(".depthscope-*.tmp"):
        with contextlib.suppress(OSError):  # held by its writer, finished meanwhile, or of somebody else
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
    """A temporary file beside `target` with `data`, flushed to the disk, and the permissions of `target`.

    It is to be renamed inside; where something fails there, it is removed.
    """
    descriptor, temporary = _new_file(target.parent)
    held = None if fcntl is None else os.dup(descriptor)  # the lock, until the file has its name
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
        if held is not None:
            os.close(held)


def _new_file(folder: Path) -> tuple[int, Path]:
    """Open a temporary file, locked where the system can, so that nobody takes it for one that a killed writer left."""
    while True:
        path = folder / f".depthscope-{secrets.token_hex(6)}.tmp"
        # Not tempfile.mkstemp: its files are private to the user, where an ordinary file follows the umask.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        if fcntl is not None:
            with contextlib.suppress(OSError):  # not on every file system
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        if path.exists():
            return descriptor, path
        os.close(descriptor)  # removed before it was locked


def _flush_folder(folder: Path) -> None:
    """Make a rename in `folder` durable where the system can; the content itself is safe without it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def reason(error: OSError | ValueError) -> str:
    """Say why a path cannot be read or written, and what to do, without Python's error number."""
    if not isinstance(error, OSError):  # a path with a null byte
        return str(error)
    return REMEDIES.get(error.errno or 0, error.strerror or str(error))
