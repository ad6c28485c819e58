"""Where text comes from: files, folders, datasets, strings, or the Python standard library's own source.

Every source becomes a `Source`: a name for the report and documents in a fixed order, read lazily, so that no more of a
large file or of a streamed dataset is read than is needed.
"""

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any

from depthscope.documents import Document, Source
from depthscope.errors import CorpusError, SettingsError
from depthscope.messages import one_line
from depthscope.quiet import quiet
from depthscope.stdlib_text import python_stdlib

__all__ = ["find_source"]

# fmt: off
TEXT_SUFFIXES = frozenset((
    ".txt", ".text", ".md", ".markdown", ".rst", ".org", ".adoc", ".tex", ".log", ".srt", ".html", ".htm", ".xml",
    ".yaml", ".yml", ".toml", ".cfg", ".ini", ".ipynb", ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".rs",
    ".go", ".java", ".kt", ".scala", ".js", ".jsx", ".ts", ".tsx", ".rb", ".php", ".pl", ".lua", ".r", ".jl", ".hs",
    ".ml", ".swift", ".cs", ".css", ".sh", ".sql",
))
# fmt: on
# What `datasets` reads, by its own name for the format.
TABLE_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
USUAL_COLUMNS = ("text", "content")
STRING_TYPES = ("string", "large_string")

LONGEST_PATH = 1024
REACH_TIMEOUT = 10.0  # seconds


def find_source(source: Any, dataset: str | None = None, column: str | None = None, split: str | None = None) -> Source:
    """Say which documents a user means; see `load_blocks` for what may be given.

    Raises:
        CorpusError: the source does not exist or cannot be read.
        SettingsError: options that do not go together.
    """
    if dataset is not None:
        if source is not None:
            raise SettingsError(
                f"Both a text ({_brief(source)}) and the dataset {dataset!r} were given; give one of them."
            )
        return _named_dataset(dataset, column, split)
    if _is_dataset(source):
        return _dataset_object(source, column, split)
    if split is not None:
        raise SettingsError(f"split={split!r} was given, but only a dataset has splits; leave it out.")
    if source is None:
        _refuse_column(column, "the embedded corpus")
        return python_stdlib()
    if paths := _as_paths(source):
        return _paths(paths, column)
    _refuse_column(column, "text given as strings")
    return Source("text", _strings(source))


# Files and folders


def _as_paths(source: Any) -> list[Path]:
    """The paths that a user means, or an empty list for documents.

    One string is a path. In a list, strings are paths only where every one of them exists or has a known file suffix.
    """
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
    return path.suffix.lower() in TEXT_SUFFIXES | TABLE_FORMATS.keys() or path.exists()


def _paths(paths: list[Path], column: str | None) -> Source:
    for path in paths:
        _check_exists(path)
    if any(path.suffix.lower() in TABLE_FORMATS for path in paths):
        _import_datasets(str(paths[0]))
    else:
        _refuse_column(column, "a text file")
    name = paths[0].resolve().name + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
    return Source(name, (document for path in paths for document in _path_documents(path, column)))


def _check_exists(path: Path) -> None:
    text = str(path)
    if "\n" in text or "\0" in text or len(text) > LONGEST_PATH:
        raise CorpusError(
            f"A string is taken as the path of a text file, but {_brief(text)} cannot be one. "
            "To give the text itself, put it in a list: [text]."
        )
    if not path.exists():
        raise CorpusError(
            f"There is no file or folder {text!r}. Check the path; a dataset of the Hugging Face Hub is given as a "
            "dataset, not as a text file, and the text itself as a list of strings."
        )


def _path_documents(path: Path, column: str | None) -> Iterator[Document]:
    if path.is_dir():
        yield from map(Document.from_file, _text_files(path))
    elif path.suffix.lower() in TABLE_FORMATS:
        yield from _table_file(path, column)
    else:
        yield Document.from_file(path)


def _text_files(folder: Path) -> list[Path]:
    """The text files below a folder, hidden ones left out, in the order of their paths."""
    relative = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    visible = [path for path in relative if not any(part.startswith(".") for part in path.parts)]
    texts = [folder / path for path in visible if path.suffix.lower() in TEXT_SUFFIXES]
    if not texts:
        found = ", ".join(sorted({path.suffix or "no suffix" for path in visible})) or "nothing"
        raise CorpusError(
            f"The folder {str(folder)!r} holds no text file (.txt, .md, .py and the like; found: {found}). "
            "Name the files themselves to have them read whatever their suffix."
        )
    return texts


# Datasets


def _is_dataset(source: Any) -> bool:
    datasets = sys.modules.get("datasets")  # importing it takes a second, and without it nobody can hold its objects
    if datasets is None:
        return False
    kinds = (datasets.Dataset, datasets.IterableDataset, datasets.DatasetDict, datasets.IterableDatasetDict)
    return isinstance(source, kinds)


def _named_dataset(dataset: str, column: str | None, split: str | None) -> Source:
    """A dataset of the Hub or a dataset folder, as `name` or `name:config`, streamed."""
    if Path(dataset).is_file():
        return _paths([Path(dataset)], column)
    name, _, config = dataset.partition(":")
    label = dataset
    if Path(name).is_dir():
        label = Path(name).resolve().name
    else:
        _require_hub(name)
    loaded = _load_dataset(dataset, name, config or None, streaming=True)
    chosen, found = _choose_split(loaded, split, dataset)
    return Source(f"{label} ({chosen})" if chosen else label, _rows(found, column, dataset))


def _dataset_object(source: Any, column: str | None, split: str | None) -> Source:
    chosen, found = _choose_split(source, split, "the dataset")
    name = getattr(getattr(found, "info", None), "dataset_name", None) or "dataset"
    return Source(f"{name} ({chosen})" if chosen else name, _rows(found, column, "the dataset"))


def _choose_split(dataset: Any, split: str | None, what: str) -> tuple[str | None, Any]:
    if not isinstance(dataset, Mapping):
        if split is not None:
            raise SettingsError(f"split={split!r} was given, but {what} is a single split already; leave it out.")
        return None, dataset
    if split is None:
        split = "train" if "train" in dataset else next(iter(dataset), None)
    if split not in dataset:
        raise CorpusError(f"{what} has no split {split!r}; it has: {', '.join(map(str, dataset)) or 'none'}.")
    return split, dataset[split]


def _table_file(path: Path, column: str | None) -> Iterator[Document]:
    if path.stat().st_size == 0:
        return
    kind = TABLE_FORMATS[path.suffix.lower()]
    table = _load_dataset(str(path), kind, None, data_files=str(path), split="train", streaming=True)
    yield from _rows(table, column, str(path))


def _load_dataset(what: str, path: str, config: str | None, **options: Any) -> Any:
    datasets = _import_datasets(what)
    with _dataset_errors(what), quiet():
        return datasets.load_dataset(path, config, **options)


def _import_datasets(what: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise CorpusError(f"Reading {what!r} needs the package `datasets`: pip install datasets.") from error
    return datasets


def _require_hub(dataset: str) -> None:
    """Fail at once where the Hub is out of reach; `datasets` itself tries for half a minute."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    with _dataset_errors(dataset), suppress(HfHubHTTPError):  # an answer is all that is wanted
        HfApi().dataset_info(dataset, timeout=REACH_TIMEOUT)


@contextmanager
def _dataset_errors(what: str) -> Iterator[None]:
    """Turn what `datasets` raises, when it opens a dataset or on its way through the rows, into a `CorpusError`."""
    from datasets.exceptions import DatasetNotFoundError, DatasetsError
    from huggingface_hub.errors import HFValidationError, HTTPError

    try:
        yield
    except (DatasetNotFoundError, HFValidationError) as error:
        raise CorpusError(
            f"There is no dataset {what!r} that can be read: no such folder here, and on the Hugging Face Hub it is "
            "missing, private or gated. Check the name (name or name:config); for a private or gated one, log in with "
            "`hf auth login`."
        ) from error
    except (ConnectionError, HTTPError) as error:
        raise CorpusError(
            f"The dataset {what!r} is not on this machine, and the Hugging Face Hub cannot be reached. Check the "
            "network, or give a text file instead."
        ) from error
    except (DatasetsError, OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise CorpusError(
            f"The dataset {what!r} cannot be read: {one_line(error)} Check the file or the dataset's page."
        ) from error


def _rows(dataset: Any, column: str | None, what: str) -> Iterator[Document]:
    with _dataset_errors(what):
        rows: Iterator[Mapping[str, Any]]
        if dataset.features is not None:  # then nothing but the text has to be read
            columns = {
                name: getattr(feature, "dtype", None) in STRING_TYPES for name, feature in dataset.features.items()
            }
            column = _choose_column(columns, column, what)
            rows = iter(dataset.select_columns([column]))
        else:
            rows = iter(dataset)
            first = next(rows, None)
            if first is None:
                return
            column = _choose_column({name: isinstance(value, str) for name, value in first.items()}, column, what)
            rows = chain([first], rows)
        for row in rows:
            if (text := row[column]) is not None:
                yield Document.from_text(_text_of(text, column, what), what)


def _choose_column(columns: Mapping[str, bool], column: str | None, what: str) -> str:
    """The column that holds the text, among columns of which is known whether they hold strings."""
    listed = ", ".join(columns)
    if column is not None:
        if column not in columns:
            raise CorpusError(f"{what} has no column {column!r}; it has: {listed}.")
        return column
    texts = [name for name, is_text in columns.items() if is_text]
    usual = [name for name in USUAL_COLUMNS if name in texts]
    if usual or len(texts) == 1:
        return (usual or texts)[0]
    raise CorpusError(f"Which column of {what} holds the text is not clear; name it with `column`. It has: {listed}.")


def _text_of(value: Any, column: str, what: str) -> str:
    if not isinstance(value, str):
        raise CorpusError(
            f"The column {column!r} of {what} holds {type(value).__name__}, not text; name another column."
        )
    return value


# Strings


def _strings(source: Any) -> Iterator[Document]:
    if isinstance(source, (bytes, Mapping)) or not isinstance(source, Iterable):
        raise CorpusError(
            f"Text was expected as a path, a dataset or an iterable of strings, not as {type(source).__name__}."
        )
    return _string_documents(source)


def _string_documents(source: Iterable[Any]) -> Iterator[Document]:
    for index, item in enumerate(source):
        if isinstance(item, os.PathLike):
            yield from _path_documents(Path(item), None)
        elif isinstance(item, str):
            yield Document.from_text(item, f"document {index}")
        else:
            raise CorpusError(
                f"Documents are strings, but item {index} is {type(item).__name__}. "
                "Give the text of each document, or a dataset and the column that holds it."
            )


def _refuse_column(column: str | None, what: str) -> None:
    if column is not None:
        raise SettingsError(f"column={column!r} was given, but {what} has no columns; leave it out.")


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
