"""Which files are large: those that .gitattributes names, that are binary, or that are long."""

from fnmatch import fnmatch
from pathlib import PurePosixPath

from hub.objects import Files

LONGEST_REGULAR = 10 * 1024 * 1024


def is_large(path: str, size: int, sample: bytes, files: Files) -> bool:
    """Whether a file is stored as a large one, by its path, its size, its first bytes and what is in its repository."""
    attributes = files[".gitattributes"].content.decode() if ".gitattributes" in files else ""
    patterns = [line.split()[0] for line in attributes.splitlines() if "filter=lfs" in line.split()]
    return size > LONGEST_REGULAR or _is_binary(sample) or any(_matches(path, pattern) for pattern in patterns)


def _matches(path: str, pattern: str) -> bool:
    """As git does: a pattern without a slash is one of file names."""
    return fnmatch(path if "/" in pattern else PurePosixPath(path).name, pattern)


def _is_binary(sample: bytes) -> bool:
    """Not text; the sample may end within a letter."""
    try:
        text = sample.decode()
    except UnicodeDecodeError as error:
        return len(sample) - error.start > 3 or error.reason != "unexpected end of data"
    return "\0" in text
