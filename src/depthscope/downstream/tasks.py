"""Names of tasks -> lm-eval's own tasks, with documents from the Hugging Face Hub or a folder of JSON lines.

The questions and the scoring of a task are always those of the installed lm-eval; a file replaces only the documents
(`tasks.yaml` has the changes). A name is one of our groups, such as `paper`, or a task, group or tag of lm-eval.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from depthscope.errors import CorpusError, DepthscopeError, SettingsError
from depthscope.wording.messages import counted, listed, one_line

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager

__all__ = ["GROUPS", "Selection", "load_tasks", "require_lm_eval", "select"]

TABLE = yaml.safe_load((Path(__file__).parent / "tasks.yaml").read_text(encoding="utf-8"))
KNOWN: dict[str, dict[str, Any]] = TABLE["tasks"]
GROUPS: dict[str, list[str]] = TABLE["groups"]
SUFFIX = ".jsonl"


@dataclass(frozen=True)
class Selection:
    """The tasks to run, by lm-eval's names, each with the file that holds its documents, or None for the Hub."""

    files: dict[str, Path | None]
    notes: list[str] = field(default_factory=list)


def require_lm_eval() -> None:
    """Refuse early if lm-eval is not installed.

    Raises:
        DepthscopeError: lm-eval is missing; the message says how to install it.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise DepthscopeError(
            f"Downstream tasks need the package lm-eval, which is not installed ({error}). Install it: "
            'pip install "depthscope[eval]".'
        ) from error


def select(names: str | Sequence[str], data: str | Path | None = None) -> Selection:
    """Find the tasks and their documents.

    Args:
        names: tasks or groups, separated by commas or as a list.
        data: a folder with the documents, one file `<task>.jsonl` per task, with the columns of the original dataset;
            tasks of a group without a file are left out, with a note. None reads the Hub.

    Raises:
        SettingsError: no task is named.
        CorpusError: the folder does not exist, or a task that is named by itself has no file in it.
    """
    requested = [name.strip() for name in (names.split(",") if isinstance(names, str) else names) if name.strip()]
    if not requested:
        raise SettingsError(f"No task was given. Name tasks of lm-eval, or a group: {', '.join(GROUPS)}.")
    tasks = list(dict.fromkeys(task for name in requested for task in GROUPS.get(name, [name])))
    if data is None:
        return Selection(dict.fromkeys(tasks))
    folder = Path(data)
    files = _files(folder)
    missing = [name for name in requested if name not in GROUPS and name not in files]
    chosen = {task: files[task] for task in tasks if task in files}
    if missing or not chosen:
        raise CorpusError(
            f"{str(folder)!r} has no documents for {listed(missing or requested)}. It holds {', '.join(files)}; add "
            f"{(missing or tasks)[0]}{SUFFIX}, or leave out the folder to read from the Hugging Face Hub."
        )
    left_out = [task for task in tasks if task not in files]
    verbs = ("has", "was") if len(left_out) == 1 else ("have", "were")
    note = f"{counted(len(left_out), 'task')} {verbs[0]} no file in {folder.name}/ and {verbs[1]} left out: "
    note += f"{', '.join(left_out)}."
    return Selection(dict(chosen), [note] if left_out else [])


def load_tasks(selection: Selection) -> dict[str, "ConfigurableTask"]:
    """Load lm-eval's tasks with their documents.

    Raises:
        SettingsError: lm-eval does not know a task.
        CorpusError: the documents cannot be read, or do not fit the task.
    """
    manager = _manager(selection.files)
    tasks: dict[str, ConfigurableTask] = {}
    for name, file in selection.files.items():
        if name not in manager.task_index:
            raise SettingsError(_unknown(name, manager))
        if file is not None:
            _require_columns(name, file)
        with _task_errors(name, file):
            tasks |= manager.load([name if file is None else _with_file(name, file)])["tasks"]
    return tasks


def _manager(names: Iterable[str]) -> "TaskManager":
    """lm-eval's index of the needed folders; for a name not known here, of all folders, which takes seconds."""
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    if all(name in KNOWN for name in names):
        folders = dict.fromkeys(root / KNOWN[name]["folder"] for name in names)
        manager = lm_eval.tasks.TaskManager(include_path=[str(path) for path in folders], include_defaults=False)
        if all(name in manager.task_index for name in names):
            return manager
    return _whole_index()


@cache
def _whole_index() -> "TaskManager":
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _with_file(name: str, file: Path) -> dict[str, Any]:
    """A group of one task with lm-eval's definition but other documents."""
    changes = TABLE["file"] | KNOWN.get(name, {}).get("file", {})
    source = {"dataset_kwargs": {"data_files": {TABLE["file"]["validation_split"]: str(file)}}}
    return {"group": f"{name} from a file", "task": [{"task": name, **changes, **source}]}


def _files(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise CorpusError(f"There is no folder {str(folder)!r}; give the folder that holds <task>{SUFFIX} files.")
    files = {path.stem: path for path in sorted(folder.glob(f"*{SUFFIX}"))}
    if not files:
        raise CorpusError(
            f"The folder {str(folder)!r} holds no {SUFFIX} file; give one per task, such as boolq{SUFFIX}."
        )
    return files


def _require_columns(name: str, file: Path) -> None:
    """Refuse a file with other columns: lm-eval would use the name of a missing column as text."""
    columns = KNOWN.get(name, {}).get("columns", [])
    try:
        with file.open(encoding="utf-8") as lines:
            first = json.loads(next(lines, ""))
    except (OSError, ValueError) as error:
        raise CorpusError(
            f"{str(file)!r} is not a file of JSON lines ({one_line(error)}) Repair it or fetch it again."
        ) from error
    missing = [column for column in columns if column not in first] if isinstance(first, dict) else columns
    if missing:
        raise CorpusError(
            f"The documents in {str(file)!r} have no {listed(missing)}, which {name} needs. Use the columns of the "
            f"original dataset: {', '.join(columns)}."
        )


@contextmanager
def _task_errors(name: str, file: Path | None) -> Iterator[None]:
    """Turn exceptions in reading the documents of a task into a `CorpusError`."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError, HTTPError
    from jinja2 import TemplateError

    what = f"The documents of {name}" + (f" in {str(file)!r}" if file else "")
    try:
        yield
    except (ConnectionError, HfHubHTTPError, HTTPError) as error:
        raise CorpusError(
            f"{what} are not on this machine, and the Hugging Face Hub cannot be reached ({one_line(error)}) Check the "
            f"network, or give a folder with {name}{SUFFIX} as --data (in Python: data=)."
        ) from error
    except (DatasetsError, TemplateError, OSError, ValueError, LookupError, TypeError, RuntimeError) as error:
        raise CorpusError(f"{what} cannot be read: {one_line(error)} Check the file or the dataset.") from error


def _unknown(name: str, manager: "TaskManager") -> str:
    known = [*GROUPS, *manager.all_tasks]
    close = get_close_matches(name, known, n=3)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    groups = ", ".join(GROUPS)
    return f"lm-eval has no task {name!r}.{hint} To list its tasks: lm-eval ls tasks. Groups of depthscope: {groups}."
