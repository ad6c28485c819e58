"""Which arguments of a command are paths, and what it does with them, so that no output overwrites an input.

The annotation of each argument that may be a path says what the command does with it:

    model: Annotated[str, typer.Argument(...), READS]
    out: Annotated[Path | None, typer.Option(...), WRITES] = None

Before a command begins, `refuse_overwriting` compares all its paths. A `Path` without such a mark is a mistake in the
program, and `paths_of` raises.
"""

import inspect
import os
import stat
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer
from typer.models import ArgumentInfo, OptionInfo

from depthscope.errors import SettingsError

__all__ = [
    "ADDS_TO",
    "FILLS",
    "READS",
    "READS_TREE",
    "WRITES",
    "Use",
    "paths_of",
    "refuse_empty_paths",
    "refuse_overwriting",
]


class Use(Enum):
    """What a command does with a path."""

    READS = "a file, or the files of a folder; the name of something else where there is no such path"
    READS_TREE = "a file, or all files below a folder"
    WRITES = "a file"
    ADDS_TO = "a file that is read, and written again with more in it"
    FILLS = "a folder that files are written into"


READS, READS_TREE, WRITES, ADDS_TO, FILLS = Use

# How the files that depthscope writes begin: reports, records of accuracies, pages. They may be overwritten.
JSON_HEAD = b'{\n  "schema_version"'
PAGE_HEAD, PAGE_MARK, HEAD_BYTES = b"<!doctype html>", b"depthscope", 8192


@dataclass(frozen=True)
class _NamedPath:
    """One path, the option or argument that names it, and what is done with it."""

    option: str
    use: Use
    path: Path

    @property
    def is_written(self) -> bool:
        return self.use in (WRITES, ADDS_TO, FILLS)


def paths_of(command: Callable[..., Any]) -> dict[str, tuple[str, Use]]:
    """The parameters of a command that are paths: how the help names each, and what is done with it.

    Raises:
        TypeError: a parameter is a `Path` whose annotation does not say what is done with it.
    """
    found = {}
    for name, parameter in inspect.signature(command).parameters.items():
        kind, *marks = get_args(parameter.annotation) if get_origin(parameter.annotation) is Annotated else [None]
        use = next((mark for mark in marks if isinstance(mark, Use)), None)
        if use is not None:
            found[name] = (_label(name, marks), use)
        elif Path in (kind, parameter.annotation, *_inside(kind), *_inside(parameter.annotation)):
            raise TypeError(
                f"{command.__name__}: {name} is a path; say in its annotation whether it is read or written"
            )
    return found


def refuse_empty_paths(command: Callable[..., Any]) -> None:
    """Make a command refuse an empty path, such as an unset shell variable; Python would take the current folder.

    Raises:
        TypeError: as by `paths_of`.
    """
    declared = paths_of(command)
    for name, parameter in inspect.signature(command).parameters.items():
        kind, *marks = get_args(parameter.annotation) if name in declared else [None]
        info = next((mark for mark in marks if isinstance(mark, (ArgumentInfo, OptionInfo))), None)
        if info is not None and Path in (kind, *_inside(kind)):
            info.parser = _path
            info.metavar = info.metavar or "PATH"


def _path(text: str | Path) -> Path:
    if not str(text).strip():
        raise typer.BadParameter(f"{str(text)!r} is blank; give a file or a folder, such as . for the current one.")
    return Path(text)


def refuse_overwriting(command: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Refuse to run a command if one of its paths would overwrite another.

    Args:
        command: the command.
        arguments: its arguments by name.

    Raises:
        SettingsError: two outputs are one file, or an output is a file that is read; the message names both options.
    """
    named = list(_named_paths(command, arguments))
    for index, one in enumerate(named):
        for other in named[index + 1 :]:
            if one.is_written and other.is_written:
                _refuse_outputs(one, other)
            elif one.is_written or other.is_written:
                _refuse_input(*((one, other) if one.is_written else (other, one)))


def _inside(kind: Any) -> Iterator[Any]:
    """The types in a union or a list, at any depth."""
    for part in get_args(kind):
        yield part
        yield from _inside(part)


def _label(name: str, marks: list[Any]) -> str:
    """What the help calls a parameter: MODEL, or --out."""
    info = next((mark for mark in marks if isinstance(mark, (ArgumentInfo, OptionInfo))), None)
    if isinstance(info, ArgumentInfo):
        return info.metavar or name.upper()
    return f"--{name.replace('_', '-')}"


def _named_paths(command: Callable[..., Any], arguments: Mapping[str, Any]) -> Iterator[_NamedPath]:
    for name, (label, use) in paths_of(command).items():
        value = arguments.get(name)
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if item is None or not os.fspath(item) or "\0" in os.fspath(item):
                continue
            path = Path(item)
            if use not in (READS, READS_TREE):
                yield _NamedPath(label, use, path)
                continue
            yield from (_NamedPath(label, use, place) for place in _read_with(_local_path(path)))


def _local_path(path: Path) -> Path:
    """The local path that an argument names: ~ is the home folder, and a configuration may follow a data set's name."""
    path = path.expanduser() if str(path).startswith("~") else path
    before = Path(str(path).partition(":")[0])
    return before if ":" in str(path) and not os.path.lexists(path) and os.path.lexists(before) else path


def _read_with(path: Path) -> Iterator[Path]:
    """A path, and the paths that are read with it: the other parts of a GGUF file, the base model of an adapter."""
    yield path
    if path.suffix.lower() == ".gguf":
        from depthscope.loading.gguf.split import parts_beside

        yield from parts_beside(path)
    elif os.path.isfile(path / "adapter_config.json"):
        from depthscope.loading.checkpoint import local_base

        yield from filter(None, [local_base(path)])


def _refuse_outputs(one: _NamedPath, other: _NamedPath) -> None:
    if not _is_special(one.path) and _are_one(one.path, other.path, fold=True):
        differing = "" if one.path.name == other.path.name else ", which some file systems treat as one name"
        raise SettingsError(
            f"{one.option} ({one.path}) and {other.option} ({other.path}) would overwrite each other{differing}. Give "
            "each a name of its own."
        )


def _refuse_input(output: _NamedPath, source: _NamedPath) -> None:
    if _is_special(output.path) or not os.path.lexists(source.path):
        return
    if _are_one(output.path, source.path, fold=False):
        overwritten = str(source.path)
    elif output.use is not FILLS and os.path.isdir(source.path) and (inside := _file_in(source, output)):
        overwritten = f"{inside}, a file that is read there"
    else:
        return
    raise SettingsError(
        f"{output.option} ({output.path}) would overwrite what {source.option} names ({overwritten}). Give "
        f"{output.option} another path."
    )


def _is_special(path: Path) -> bool:
    """Whether a path is a device or a pipe, where writing overwrites nothing."""
    try:
        kind = os.stat(path).st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(kind) or stat.S_ISDIR(kind))


def _are_one(one: Path, other: Path, *, fold: bool) -> bool:
    """Whether two paths are one file or folder, through links too.

    For existing files the file system decides, with its own rules on upper and lower case. For files that do not exist
    yet, `fold` treats names in one folder that differ only by case or by the encoding of an accent as one, so that a
    command that works on one file system loses no file on another.
    """
    try:
        if os.path.samefile(one, other):
            return True
    except OSError:
        pass
    first, second = Path(os.path.realpath(one)), Path(os.path.realpath(other))
    if first == second:
        return True
    return fold and _folded(first.name) == _folded(second.name) and _are_one(first.parent, second.parent, fold=False)


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _file_in(source: _NamedPath, output: _NamedPath) -> Path | None:
    """The file in an input folder that an output would overwrite, under any name or link.

    A report or page in the folder of a model or a run is no part of the model or the run: it may be overwritten. In a
    folder of texts every file may be text.
    """
    try:
        output_stat = os.stat(output.path)
    except OSError:
        return None  # the output does not exist yet
    if source.use is READS and _is_ours(output.path):
        return None
    for folder, folders, files in os.walk(source.path):
        if source.use is READS:
            folders.clear()
        for name in files:
            path = Path(folder, name)
            try:
                file_stat = os.stat(path)
            except OSError:
                continue
            if os.path.samestat(file_stat, output_stat):
                return path
    return None


def _is_ours(path: Path) -> bool:
    """Whether a file begins like the reports, accuracies and pages that depthscope writes."""
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError:
        return False
    return head.startswith(JSON_HEAD) or (head.lstrip().startswith(PAGE_HEAD) and PAGE_MARK in head)
