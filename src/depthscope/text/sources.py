"""Where text comes from: files, folders, datasets, strings, or the Python standard library's own source.

Every source becomes a `Source`: a name for the report, and documents in a fixed order. Documents are read lazily, so
that only the needed part of a large file or of a streamed dataset is read.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from depthscope.errors import CorpusError, SettingsError
from depthscope.text.datasets import (
    TABLE_FORMATS,
    document_of,
    import_datasets,
    is_saved,
    is_table,
    kind_of,
    named_dataset,
    saved_dataset,
    table_file,
    table_object,
)
from depthscope.text.documents import Document, Source
from depthscope.text.stdlib import python_stdlib

__all__ = ["find_source"]

# fmt: off
TEXT_SUFFIXES = frozenset((
    ".txt", ".text", ".md", ".markdown", ".rst", ".org", ".adoc", ".tex", ".log", ".srt", ".html", ".htm", ".xml",
    ".yaml", ".yml", ".toml", ".cfg", ".ini", ".ipynb", ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".rs",
    ".go", ".java", ".kt", ".scala", ".js", ".jsx", ".ts", ".tsx", ".rb", ".php", ".pl", ".lua", ".r", ".jl", ".hs",
    ".ml", ".swift", ".cs", ".css", ".sh", ".sql",
))
# fmt: on
LONGEST_PATH = 1024


def find_source(source: Any, dataset: Any = None, column: str | None = None, split: str | None = None) -> Source:
    """Find the documents of a source; `load_blocks` lists the possible sources.

    Raises:
        CorpusError: the source does not exist or cannot be read.
        SettingsError: the options exclude each other.
    """
    if dataset is not None:
        if source is not None:
            raise SettingsError(
                f"Both a text ({_brief(source)}) and the dataset {dataset!r} were given; give one of them."
            )
        if isinstance(dataset, (str, os.PathLike)):
            if not os.fspath(dataset).strip():
                raise CorpusError("The name of the dataset is empty. Give a name, name:config, or a file.")
            path = Path(dataset)
            return _paths([path], column) if path.is_file() else named_dataset(os.fspath(dataset), column, split)
        source = dataset
    if is_table(source):
        return table_object(source, column, split)
    paths = [] if source is None else _as_paths(source)
    for path in paths:
        _check_exists(path)
    if len(paths) == 1 and is_saved(paths[0]):
        return saved_dataset(paths[0], column, split)
    if split is not None:
        raise SettingsError(f"split={split!r} was given, but only a dataset has splits; leave it out.")
    if source is None:
        _refuse_column(column, "the embedded corpus")
        return python_stdlib()
    if paths:
        return _paths(paths, column)
    _refuse_column(column, "text given as strings")
    return Source("text", _strings(source))


# Files and folders


def _as_paths(source: Any) -> list[Path]:
    """The paths in a source, or an empty list for documents.

    A single string is a path. In a list, strings are paths only if every one exists or has a known file suffix.
    """
    if isinstance(source, str) and not source.strip():  # Path("") is the current folder
        raise CorpusError(
            f"The text is {source!r}; give the path of a text file, or leave it out for the embedded text."
        )
    if isinstance(source, (str, os.PathLike)):
        return [Path(source).expanduser()]
    if isinstance(source, (list, tuple)) and source and all(map(_looks_like_path, source)):
        return [Path(item).expanduser() for item in source]
    return []


def _looks_like_path(item: Any) -> bool:
    if isinstance(item, os.PathLike):
        return True
    if not isinstance(item, str) or not item.strip() or "\n" in item or "\0" in item or len(item) > LONGEST_PATH:
        return False
    path = Path(item).expanduser()
    # Not path.exists(), which raises if a text is longer than any file name.
    return path.suffix.lower() in TEXT_SUFFIXES | TABLE_FORMATS.keys() or os.path.exists(path)


def _paths(paths: list[Path], column: str | None) -> Source:
    if any(path.suffix.lower() in TABLE_FORMATS for path in paths):
        import_datasets(str(paths[0]))
    elif not any(map(is_saved, paths)):
        _refuse_column(column, "a text file")
    name = paths[0].resolve().name + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
    return Source(name, (document for path in paths for document in _path_documents(path, column)))


def _check_exists(path: Path) -> None:
    text = str(path)
    if "\n" in text or "\0" in text or len(text) > LONGEST_PATH:
        raise CorpusError(
            f"A string must be the path of a text file, but {_brief(text)} cannot be a path. "
            "To give the text itself, put it in a list: [text]."
        )
    if not os.path.exists(path):
        raise CorpusError(
            f"There is no file or folder {text!r}. Check the path. Give a dataset of the Hub as a dataset, "
            "not as a text file, and give the text itself as a list of strings."
        )


def _path_documents(path: Path, column: str | None) -> Iterator[Document]:
    if is_saved(path):
        yield from saved_dataset(path, column, None).documents
    elif path.is_dir():
        yield from map(Document.from_file, _text_files(path))
    elif path.suffix.lower() in TABLE_FORMATS:
        yield from table_file(path, column)
    else:
        yield Document.from_file(path)


def _text_files(folder: Path) -> list[Path]:
    """The text files below a folder, hidden ones left out, in the order of their paths."""
    relative = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    visible = [path for path in relative if not any(part.startswith(".") for part in path.parts)]
    texts = [folder / path for path in visible if path.suffix.lower() in TEXT_SUFFIXES]
    if not texts:
        suffixes = ", ".join(sorted({path.suffix or "no suffix" for path in visible})) or "nothing"
        raise CorpusError(
            f"The folder {str(folder)!r} holds no text file (.txt, .md, .py and the like; found: {suffixes}). "
            "Files with other suffixes are read if you name them one by one. Give the folder of a dataset as a dataset."
        )
    return texts


# Strings


def _strings(source: Any) -> Iterator[Document]:
    if isinstance(source, (bytes, Mapping)) or not isinstance(source, Iterable):
        raise CorpusError(f"Text must be a path, a dataset or an iterable of strings, not {type(source).__name__}.")
    return _string_documents(source)


def _string_documents(source: Iterable[Any]) -> Iterator[Document]:
    for index, item in enumerate(source):
        if isinstance(item, os.PathLike):
            yield from _path_documents(Path(item), None)
        elif (document := document_of(item, f"document {index}")) is not None:
            yield document
        else:
            raise CorpusError(
                f"Documents are strings, chats or lists of token ids, but item {index} is {kind_of(item)}. "
                "Give the text of each document, or a dataset and the column that holds it."
            )


def _refuse_column(column: str | None, what: str) -> None:
    if column is not None:
        raise SettingsError(f"column={column!r} was given, but {what} has no columns; leave it out.")


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
