"""Tables of text -> documents: datasets of the Hub, on disk or in memory, files of rows, data frames.

A row is a text, a chat (a list of messages with `role` and `content`) or token ids, according to the column.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from numbers import Integral
from pathlib import Path
from typing import Any

from depthscope.console.quiet import quiet
from depthscope.errors import CorpusError, SettingsError
from depthscope.text.documents import Document, Source
from depthscope.wording.messages import one_line

__all__ = [
    "TABLE_FORMATS",
    "document_of",
    "import_datasets",
    "is_saved",
    "is_table",
    "kind_of",
    "named_dataset",
    "saved_dataset",
    "table_file",
    "table_object",
]

# File suffixes, and the names of their formats in `datasets`.
TABLE_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
# The usual names of columns; any other column must be named, unless it is the only one.
USUAL_TEXTS, USUAL_CHATS, USUAL_IDS = ("text", "content"), ("messages", "conversations", "conversation"), ("input_ids",)
STRING_TYPES = ("string", "large_string", "string_view")
MASK = "attention_mask"  # beside ids: 0 at padding
PEEKED = 20  # rows that are searched for a value of each column

REACH_TIMEOUT = 10.0  # seconds


@dataclass(frozen=True)
class _Table:
    """Columns by name, with whether they hold strings (None: unknown), and a function that reads their rows."""

    columns: Mapping[str, bool | None]
    rows: Callable[[list[str]], Iterable[Mapping[str, Any]]]


# Objects in memory


def is_table(source: Any) -> bool:
    """Whether an object is a dataset, a data frame of pandas or a table of pyarrow."""
    return _is_dataset(source) or _is_frame(source) or _is_arrow(source)


def table_object(source: Any, column: str | None, split: str | None) -> Source:
    """The documents of such an object."""
    if _is_dataset(source):
        chosen, found = _choose_split(source, split, "the dataset")
        name = getattr(getattr(found, "info", None), "dataset_name", None) or "dataset"
        return Source(f"{name} ({chosen})" if chosen else name, _dataset_rows(found, column, "the dataset"))
    if split is not None:
        raise SettingsError(f"split={split!r} was given, but only a dataset has splits; leave it out.")
    if _is_arrow(source):
        table = import_datasets("the table").Dataset(source)
        return Source("table", _dataset_rows(table, column, "the table"))
    return Source("data frame", _documents(_frame(source), column, "the data frame"))


# If a module has not been imported, no object is of its types; importing it would take a second.
def _is_dataset(source: Any) -> bool:
    datasets = sys.modules.get("datasets")
    if datasets is None:
        return False
    kinds = (datasets.Dataset, datasets.IterableDataset, datasets.DatasetDict, datasets.IterableDatasetDict)
    return isinstance(source, kinds)


def _is_frame(source: Any) -> bool:
    pandas = sys.modules.get("pandas")
    return pandas is not None and isinstance(source, (pandas.DataFrame, pandas.Series))


def _is_arrow(source: Any) -> bool:
    pyarrow = sys.modules.get("pyarrow")
    return pyarrow is not None and isinstance(source, pyarrow.Table)


def _frame(source: Any) -> _Table:
    frame = source.to_frame() if source.ndim == 1 else source
    if not frame.columns.is_unique:
        raise CorpusError("Two columns of the data frame have the same name; rename one.")
    own = {str(name): name for name in frame.columns}

    def rows(names: list[str]) -> Iterator[Mapping[str, Any]]:
        return (
            dict(zip(names, values, strict=True)) for values in zip(*(frame[own[name]] for name in names), strict=True)
        )

    def holds_text(name: str) -> bool:
        return any(isinstance(value, str) for value in frame[own[name]].dropna().head(1))

    return _Table({name: holds_text(name) or None for name in own}, rows)


# Datasets by name, in folders and in files


def named_dataset(dataset: str, column: str | None, split: str | None) -> Source:
    """A dataset of the Hub or a dataset folder, as `name` or `name:config`, streamed."""
    name, _, config = dataset.partition(":")
    if is_saved(Path(dataset)):
        return saved_dataset(Path(dataset), column, split)
    label = dataset
    if Path(name).is_dir():
        label = Path(name).resolve().name
    else:
        _require_hub(name)
    loaded = _load_dataset(dataset, name, config or None, streaming=True)
    chosen, found = _choose_split(loaded, split, dataset)
    return Source(f"{label} ({chosen})" if chosen else label, _dataset_rows(found, column, dataset))


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote a folder: a dataset, or one folder for each split."""
    return (folder / "dataset_dict.json").is_file() or all(
        (folder / name).is_file() for name in ("state.json", "dataset_info.json")
    )


def saved_dataset(folder: Path, column: str | None, split: str | None) -> Source:
    """The dataset that `save_to_disk` wrote to a folder."""
    what, datasets = str(folder), import_datasets(str(folder))
    with _dataset_errors(what), quiet():
        loaded = datasets.load_from_disk(what)
    chosen, found = _choose_split(loaded, split, what)
    label = folder.resolve().name
    return Source(f"{label} ({chosen})" if chosen else label, _dataset_rows(found, column, what))


def table_file(path: Path, column: str | None) -> Iterator[Document]:
    """The documents of a file of rows."""
    if path.stat().st_size == 0:
        return
    kind = TABLE_FORMATS[path.suffix.lower()]
    table = _load_dataset(str(path), kind, None, data_files=str(path), split="train", streaming=True)
    yield from _dataset_rows(table, column, str(path))


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


def _load_dataset(what: str, path: str, config: str | None, **options: Any) -> Any:
    datasets = import_datasets(what)
    with _dataset_errors(what), quiet():
        return datasets.load_dataset(path, config, **options)


def import_datasets(what: str) -> Any:
    """Import the package `datasets`, which reads `what`.

    Raises:
        CorpusError: the package is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise CorpusError(f"Reading {what!r} needs the package `datasets`: pip install datasets.") from error
    return datasets


def _require_hub(dataset: str) -> None:
    """Fail at once if the Hub cannot be reached; `datasets` itself tries for half a minute."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    with _dataset_errors(dataset), suppress(HfHubHTTPError):  # any answer shows that the Hub can be reached
        HfApi().dataset_info(dataset, timeout=REACH_TIMEOUT)


@contextmanager
def _dataset_errors(what: str) -> Iterator[None]:
    """Turn the exceptions of `datasets`, in opening a dataset or reading rows, into a `CorpusError`."""
    from datasets.exceptions import DatasetNotFoundError, DatasetsError
    from huggingface_hub.errors import HFValidationError, HTTPError

    try:
        yield
    except (DatasetNotFoundError, HFValidationError) as error:
        raise CorpusError(
            f"There is no dataset {what!r} that can be read: there is no such folder, and on the Hugging Face Hub it "
            "is missing, private or gated. Check the name (name or name:config); for a private or gated one, log in "
            "with `hf auth login`."
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


# Rows


def _dataset_rows(dataset: Any, column: str | None, what: str) -> Iterator[Document]:
    with _dataset_errors(what):
        dataset = dataset.with_format(None)  # of torch or pandas, in which rows would come as tensors and frames
        if dataset.features is not None:  # then only the column of text has to be read
            columns = {name: _is_string(feature) for name, feature in dataset.features.items()}
            yield from _documents(_Table(columns, dataset.select_columns), column, what)
            return
        if (first := next(iter(dataset), None)) is not None:
            columns = {name: True if isinstance(value, str) else None for name, value in first.items()}
            yield from _documents(_Table(columns, lambda names: dataset), column, what)


def _is_string(feature: Any) -> bool | None:
    """Whether a column holds strings; None if its values may be chats or ids and must be checked."""
    kind = getattr(feature, "dtype", None)
    if kind in STRING_TYPES:
        return True
    return False if type(feature).__name__ in ("Value", "ClassLabel") else None


def _documents(table: _Table, column: str | None, what: str) -> Iterator[Document]:
    if column is not None and column not in table.columns:
        raise CorpusError(f"{what} has no column {column!r}; it has: {', '.join(table.columns)}.")
    column = column or _choose_column(table, what)
    names = [column, MASK] if column in USUAL_IDS and MASK in table.columns else [column]
    for row in table.rows(names):
        value = row[column] if len(names) == 1 else _unpadded(row[column], row[MASK])
        if _is_missing(value):
            continue
        if (document := document_of(value, what)) is None:
            raise CorpusError(f"The column {column!r} of {what} holds {kind_of(value)}; name another column.")
        yield document


def _choose_column(table: _Table, what: str) -> str:
    """The column that holds the text, the chats or the ids."""
    texts = [name for name, is_text in table.columns.items() if is_text]
    if usual := [name for name in USUAL_TEXTS if name in texts]:
        return usual[0]
    seen = _first_values(table, [name for name, is_text in table.columns.items() if is_text is None])
    chats = [name for name, value in seen.items() if _is_chat(value)]
    if usual := [name for name in USUAL_CHATS if name in chats]:
        return usual[0]
    # A column with another name is chosen only if it is the only candidate: a column of strings may be an identifier.
    others = texts + chats + [name for name in USUAL_IDS if _is_ids(seen.get(name))]
    if len(others) == 1:
        return others[0]
    raise CorpusError(
        f"It is not clear which column of {what} holds the text; name it with `column`. It has: "
        f"{', '.join(table.columns)}."
    )


def _first_values(table: _Table, names: list[str]) -> dict[str, Any]:
    """The first value of each column in the first rows that is not missing."""
    first: dict[str, Any] = {}
    for row in islice(table.rows(names), PEEKED) if names else ():
        first |= {name: row[name] for name in names if name not in first and not _is_missing(row[name])}
        if len(first) == len(names):
            break
    return first


def document_of(value: Any, name: str) -> Document | None:
    """One row or item as a document: a string, a chat, or a list of ids; None if it is none of these."""
    if isinstance(value, str):
        return Document.from_text(value, name)
    if _is_chat(value):
        return Document.from_chat(value, name)
    return Document.from_ids([int(index) for index in value], name) if _is_ids(value) else None


def kind_of(value: Any) -> str:
    """Describe a value that is not a document, for a message."""
    if _is_list(value) and isinstance(value[0], Mapping):
        return f"lists of {' and '.join(map(str, value[0]))}, not messages with role and content"
    return f"{type(value).__name__}, not text"


def _is_chat(value: Any) -> bool:
    return _is_list(value) and all(isinstance(item, Mapping) and {"role", "content"} <= item.keys() for item in value)


def _is_ids(value: Any) -> bool:
    return _is_list(value) and all(isinstance(item, Integral) and not isinstance(item, bool) for item in value)


def _is_list(value: Any) -> bool:
    """Whether a value is a non-empty list, or an array of numpy, as data frames may hold."""
    is_list = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    return (is_list or getattr(value, "ndim", 0) == 1) and len(value) > 0


def _is_missing(value: Any) -> bool:
    """Whether a cell is empty: None, NaN, pandas' own NA, or an empty list."""
    if value is None or type(value).__name__ == "NAType" or (isinstance(value, float) and value != value):
        return True
    return not isinstance(value, str) and hasattr(value, "__len__") and len(value) == 0


def _unpadded(ids: Any, mask: Any) -> Any:
    if _is_missing(ids) or _is_missing(mask):
        return ids
    return [index for index, kept in zip(ids, mask, strict=True) if kept]
