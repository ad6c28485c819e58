"""Documents: texts with a name, read from their start only as far as they are needed."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from depthscope.errors import CorpusError

__all__ = ["Document", "Source"]


@dataclass(frozen=True)
class Document:
    """One text, read from its start as far as asked: `read(limit)` gives at most `limit` characters, all for None."""

    name: str
    read: Callable[[int | None], str]

    @classmethod
    def from_text(cls, text: str, name: str) -> "Document":
        """Wrap a string."""
        return cls(name, lambda limit: text if limit is None else text[:limit])

    @classmethod
    def from_file(cls, path: Path) -> "Document":
        """Wrap a UTF-8 text file, opened at every read."""
        return cls(str(path), partial(_read_file, path))


@dataclass(frozen=True)
class Source:
    """A name for the report, and the documents in order."""

    name: str
    documents: Iterable[Document]


def _read_file(path: Path, limit: int | None) -> str:
    try:
        with path.open(encoding="utf-8-sig") as file:  # a byte order mark is not text
            text = file.read(-1 if limit is None else limit)
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{str(path)!r} is not UTF-8 text. Give a plain text file; convert other encodings to UTF-8 and unpack "
            "archives first."
        ) from error
    except OSError as error:
        raise CorpusError(f"{str(path)!r} cannot be read: {error.strerror or error}. Check its permissions.") from error
    if "\0" in text:
        raise CorpusError(f"{str(path)!r} is a binary file, not text. Give a plain UTF-8 text file.")
    return text
