"""Unpacking an untrusted .zip into a new folder, with checks of paths, links and sizes.

Only the files of a model are written, under names that this module chooses. Everything else in the archive is counted
and checked, but not unpacked.
"""

import stat
import struct
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from safety.limits import Limits
from safety.model_files import is_model_file, is_weights
from safety.problems import NO_ROOM, Problem, no_room, too_large

__all__ = ["unpack"]

CHUNK = 1 << 20
SMALL = 1 << 20  # below this size a high ratio is harmless: JSON and empty files compress well
PLAIN = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
END, END_SIZE, LONGEST_COMMENT = b"PK\x05\x06", 22, 1 << 16
ZIP64_LOCATOR, ZIP64_LOCATOR_SIZE, ZIP64_SIZE = b"PK\x06\x07", 20, 56
DIRECTORY_BYTES_A_FILE = 4096  # more than any valid entry of the central directory has
JUNK = ("__MACOSX/", ".git/", ".ipynb_checkpoints/")
ENCRYPTED = 0x1
LONGEST_NAME = 255  # bytes, which is what file systems take


def unpack(archive: Path, folder: Path, limits: Limits) -> None:
    """Write the files of the one model in `archive` into `folder`, flat.

    Raises:
        Problem: the archive is damaged, hostile or too large, or holds no model or several; the message names the
        cause.
    """
    _refuse_huge_directory(archive, limits)
    try:
        with zipfile.ZipFile(archive) as opened:
            chosen = _choose(_checked_entries(opened, limits), archive.name)
            for entry, name in chosen:
                _write(opened, entry, folder / name)
    except (zipfile.BadZipFile, zlib.error, EOFError, struct.error, NotImplementedError, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            raise no_room() from error
        reason = getattr(error, "strerror", None) or error  # without the paths here
        raise Problem("upload", f"{archive.name} is not a readable .zip file ({reason}). Pack it again.") from error


def _refuse_huge_directory(archive: Path, limits: Limits) -> None:
    """Check the size of the central directory before Python reads it into memory."""
    size = archive.stat().st_size
    with archive.open("rb") as file:
        file.seek(max(0, size - END_SIZE - LONGEST_COMMENT - ZIP64_LOCATOR_SIZE - ZIP64_SIZE))
        tail = file.read()
    place = tail.rfind(END)
    if place < 0 or len(tail) - place < END_SIZE:
        raise Problem("upload", f"{archive.name} is not a .zip file, or it is cut off. Pack and upload it again.")
    count, directory = struct.unpack("<10xHI", tail[place : place + 16])
    if tail[:place][-ZIP64_LOCATOR_SIZE:].startswith(ZIP64_LOCATOR):  # Python uses its numbers
        record = tail[:place][-ZIP64_LOCATOR_SIZE - ZIP64_SIZE :]
        count, directory = struct.unpack("<32xQQ", record[:48]) if len(record) > ZIP64_SIZE else (2**64, 2**64)
    if count > limits.max_files or directory > limits.max_files * DIRECTORY_BYTES_A_FILE:
        raise _too_many(archive.name, limits)


def _too_many(name: str, limits: Limits) -> Problem:
    return Problem(
        "upload",
        f"{name} holds more than {limits.max_files} files. Pack only what save_pretrained wrote: config.json, the "
        "tokenizer's files and *.safetensors.",
    )


def _checked_entries(opened: zipfile.ZipFile, limits: Limits) -> list[tuple[zipfile.ZipInfo, PurePosixPath]]:
    """The files of an archive; the whole archive is refused if an entry is suspicious."""
    entries = opened.infolist()
    if len(entries) > limits.max_files:
        raise _too_many(Path(str(opened.filename)).name, limits)
    checked, seen, total = [], set(), 0
    for entry in entries:
        path = _checked_path(entry, limits)
        _check_kind(entry)
        if entry.is_dir():
            continue
        total += entry.file_size
        _check_size(entry, total, limits)
        if (key := str(path).casefold()) in seen:
            raise Problem("upload", f"The archive holds {_safe_name(entry)} twice. Pack it again.")
        seen.add(key)
        checked.append((entry, path))
    return checked


def _checked_path(entry: zipfile.ZipInfo, limits: Limits) -> PurePosixPath:
    name = entry.orig_filename  # `filename` ends where a null byte hides the rest
    path = PurePosixPath(name)
    hostile = (
        any(ord(letter) < 32 or letter in '\\:*?"<>|\x7f' for letter in name)
        or path.is_absolute()
        or ".." in path.parts
        or not path.parts
        or len(name.encode()) > LONGEST_NAME
    )
    if hostile:
        raise Problem(
            "upload",
            f"The archive holds a file with the path {_safe_name(entry)}, which leads outside or is not a plain "
            "name. Pack the model's folder again.",
        )
    if len(path.parts) > limits.max_folders + 1:
        raise Problem(
            "upload", f"{_safe_name(entry)} lies deeper than {limits.max_folders} folders; pack the model's folder."
        )
    return path


def _check_kind(entry: zipfile.ZipInfo) -> None:
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        what = "a link" if kind == stat.S_IFLNK else "a device, a pipe or a socket"
        raise Problem("upload", f"{_safe_name(entry)} in the archive is {what}; pack plain files only.")
    if entry.flag_bits & ENCRYPTED:
        raise Problem("upload", f"{_safe_name(entry)} is protected by a password; pack the model without one.")
    if entry.compress_type not in PLAIN:
        raise Problem("upload", f"{_safe_name(entry)} is packed in an unusual way; pack it again as an ordinary .zip.")


def _check_size(entry: zipfile.ZipInfo, total: int, limits: Limits) -> None:
    if total > limits.max_unpacked_bytes:
        raise too_large("Unpacked, the archive", limits.max_unpacked_bytes)
    if entry.file_size > SMALL and entry.file_size > limits.max_ratio * max(entry.compress_size, 1):
        raise Problem(
            "upload",
            f"{_safe_name(entry)} would unpack to more than {limits.max_ratio} times its size, which weights never do.",
        )


def _choose(entries: list[tuple[zipfile.ZipInfo, PurePosixPath]], name: str) -> list[tuple[zipfile.ZipInfo, str]]:
    """The files of the one model: all in the folder of config.json, or the one .gguf file."""
    entries = [(entry, path) for entry, path in entries if not str(path).startswith(JUNK) and path.name[0] != "."]
    homes = sorted({path.parent for _, path in entries if path.name == "config.json"}, key=str)
    if len(homes) > 1:
        # A model with its own training checkpoints in folders below it.
        above = [home for home in homes if all(home in other.parents or home == other for other in homes)]
        if not above:
            listed = ", ".join(map(str, homes[:4]))
            raise Problem("upload", f"{name} holds several models ({listed}). Upload one of these folders.")
        homes = above
    if homes:
        return [(entry, path.name) for entry, path in entries if path.parent == homes[0] and is_model_file(path.name)]
    ggufs = [(entry, path.name) for entry, path in entries if path.suffix.lower() == ".gguf"]
    if len(ggufs) == 1:
        return ggufs
    if len(ggufs) > 1:
        raise Problem("upload", f"{name} holds {len(ggufs)} .gguf files. Upload one of them.")
    if any(path.suffix.lower() in (".zip", ".tar", ".gz", ".7z") for _, path in entries):
        raise Problem("upload", f"{name} holds another archive. Pack the model's folder itself.")
    weights = any(is_weights(path.name) for _, path in entries)
    what = "weights but no config.json" if weights else "no config.json"
    raise Problem("broken_config", f"{name} holds {what}. Pack a whole folder that save_pretrained wrote.")


def _write(opened: zipfile.ZipFile, entry: zipfile.ZipInfo, target: Path) -> None:
    """Write one file, up to the size stated in the archive."""
    left = entry.file_size
    with opened.open(entry) as source, target.open("xb") as file:
        while chunk := source.read(min(CHUNK, left + 1)):
            left -= len(chunk)
            if left < 0:
                raise Problem("upload", f"{_safe_name(entry)} is larger than the archive says. Pack it again.")
            file.write(chunk)
    if left:
        raise Problem("upload", f"{_safe_name(entry)} is shorter than the archive says. Pack it again.")


def _safe_name(entry: zipfile.ZipInfo) -> str:
    """A file name that is safe for a page and a terminal."""
    name = entry.orig_filename
    return ascii(name if len(name) <= 80 else f"{name[:79]}...")
