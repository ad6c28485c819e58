"""Documents: texts, chats or token ids with a name, of which only the part that is needed is read."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from depthscope.errors import CorpusError
from depthscope.text.special_tokens import encode
from depthscope.wording.messages import one_line

__all__ = ["Document", "Source"]


@dataclass(frozen=True)
class Document:
    """One text: `read(limit)` returns its first `limit` characters, or all for None.

    For a chat or token ids, `tokens(tokenizer)` returns the ids, and `read` raises a `CorpusError`. If this is one of
    several pieces of a text, `whole` is the name of that text; otherwise it is empty.
    """

    name: str
    read: Callable[[int | None], str]
    tokens: Callable[[Any], list[int]] | None = None
    whole: str = ""

    @classmethod
    def from_text(cls, text: str, name: str, whole: str = "") -> "Document":
        """Wrap a string."""
        return cls(name, lambda limit: text if limit is None else text[:limit], whole=whole)

    @classmethod
    def from_file(cls, path: Path) -> "Document":
        """Wrap a UTF-8 text file, which is opened at every read."""
        return cls(str(path), partial(_read_file, path))

    @classmethod
    def from_chat(cls, messages: Sequence[Mapping[str, Any]], name: str) -> "Document":
        """Wrap a chat: messages with `role` and `content`, which the tokenizer's chat template turns into text."""
        return cls(name, partial(_refuse_text, name, "chats"), partial(_chat_ids, messages, name))

    @classmethod
    def from_ids(cls, ids: list[int], name: str) -> "Document":
        """Wrap a document of token ids."""
        return cls(name, partial(_refuse_text, name, "token ids"), partial(_checked_ids, ids, name))


@dataclass(frozen=True)
class Source:
    """A name for the report, and the documents in order."""

    name: str
    documents: Iterable[Document]


def _read_file(path: Path, limit: int | None) -> str:
    try:
        with path.open(encoding="utf-8-sig") as file:  # without the byte order mark
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


def _refuse_text(name: str, what: str, limit: int | None) -> str:
    raise CorpusError(f"{name} holds {what}, where text is needed. Give a column or a file of plain text.")


def _chat_ids(messages: Sequence[Mapping[str, Any]], name: str, tokenizer: Any) -> list[int]:
    """The ids of a chat as its template writes it; the template includes special tokens, so no others are added."""
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        raise CorpusError(
            f"{name} holds chats, but the tokenizer has no chat template. Give the tokenizer of a chat model, or write "
            "the chats as text yourself and name that column."
        )
    # In a table, every message has the keys of all messages; a template tests whether a key exists.
    present = [{key: value for key, value in message.items() if value is not None} for message in messages]
    try:
        return encode(tokenizer, tokenizer.apply_chat_template(present, tokenize=False))
    except (TemplateError, ValueError, TypeError, LookupError) as error:
        raise CorpusError(
            f"The chat template of the tokenizer cannot write a chat of {name}: {one_line(error)}"
        ) from error


def _checked_ids(ids: list[int], name: str, tokenizer: Any) -> list[int]:
    """Return the ids, or refuse them if the tokenizer does not have them all."""
    size = len(tokenizer) if hasattr(tokenizer, "__len__") else None
    if ids and (min(ids) < 0 or (size is not None and max(ids) >= size)):
        wrong, last = min(ids) if min(ids) < 0 else max(ids), "" if size is None else f" to {size - 1}"
        raise CorpusError(
            f"{name} holds the token id {wrong}, but the tokenizer's ids are from 0{last}. Give ids of the model's own "
            "tokenizer, or the text."
        )
    return ids
