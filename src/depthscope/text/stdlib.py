"""The embedded corpus: the source of Python's own standard library, found at run time.

It needs no network and no file in this package. It is English (docstrings, comments) and code, and the same for
everybody with the same version of Python.
"""

import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from depthscope.errors import CorpusError
from depthscope.text.documents import Document, Source

__all__ = ["python_stdlib"]

SLICE_CHARACTERS = 4000

# Interactive programs, tests and generated tables: neither prose nor code written by people.
LEFT_OUT = frozenset({"idlelib", "turtledemo", "pydoc_data", "encodings", "stringprep"})
LEFT_OUT_FOLDERS = frozenset({"test", "tests", "idle_test", "__pycache__", "site-packages", "_bundled"})


def python_stdlib(root: Path | None = None) -> Source:
    """The source of Python's standard library, found at run time: English docstrings and code, the same for everybody.

    Modules are in sorted order and cut at line boundaries into slices of about 4,000 characters. The first slices of
    all modules come first, then all second slices, and so on, so that even a few thousand tokens have variety.

    Raises:
        CorpusError: this Python has no source of its library.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    modules = _modules(root)
    name = f"python-stdlib-{sys.version_info.major}.{sys.version_info.minor}"
    if not modules:
        raise CorpusError(
            "The embedded corpus is the source of Python's standard library, but this Python does not have it (looked "
            f"in {str(root)!r}). Give a text file or a dataset instead."
        )
    return Source(name, _round_robin([_slices(path, path.relative_to(root).as_posix()) for path in modules]))


def _modules(root: Path) -> list[Path]:
    """The public modules by dotted name; only names that Python itself lists, so no installed packages."""
    modules: list[Path] = []
    for name in sorted(sys.stdlib_module_names - LEFT_OUT):
        if name.startswith("_"):
            continue
        if (module := root / f"{name}.py").is_file():
            modules.append(module)
        elif (package := root / name).is_dir():
            modules.extend(path for path in sorted(package.rglob("*.py")) if _is_public(path.relative_to(root)))
    return modules


def _is_public(module: Path) -> bool:
    private = module.name.startswith("_") and module.name != "__init__.py"
    return not private and LEFT_OUT_FOLDERS.isdisjoint(module.parts)


def _slices(path: Path, name: str) -> Iterator[Document]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except UnicodeDecodeError:
        return  # a few modules of some versions are in Latin-1
    piece: list[str] = []
    for line in lines:
        piece.append(line)
        if sum(map(len, piece)) >= SLICE_CHARACTERS:
            yield Document.from_text("".join(piece), name, whole=name)
            piece = []
    if piece:
        yield Document.from_text("".join(piece), name, whole=name)


def _round_robin(iterators: list[Iterator[Document]]) -> Iterator[Document]:
    while iterators:
        remaining = []
        for iterator in iterators:
            for item in iterator:
                yield item
                remaining.append(iterator)
                break
        iterators = remaining
