"""transformers' own generic model tests, taken from the source distribution of the version that is installed.

`python tests/generic_suite.py` fetches them once into the environment, where `tests/test_generic_models.py` finds them.
They are no part of this project, and no wheel carries them.
"""

import importlib
import subprocess
import sys
import tarfile
import tempfile
import unittest
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any, NoReturn
from unittest.mock import patch

import pytest

VERSION = version("transformers")
HOME = Path(sys.prefix, ".transformers-tests", VERSION)
# The name under which the folder of tests is imported: "tests" would be anyone's.
PACKAGE = "transformers_tests"
TIMEOUT_SECONDS = 300


def fetch() -> None:
    """Put the .py files of the distribution's tests folder under `HOME`; does nothing where they already are."""
    if HOME.is_dir():
        return
    HOME.parent.mkdir(exist_ok=True)
    # In the folder's own file system, so that it appears there complete or not at all.
    with tempfile.TemporaryDirectory(dir=HOME.parent) as scratch:
        fresh = Path(scratch, "fresh")
        _extract(_download(Path(scratch)), fresh / PACKAGE)
        try:
            fresh.rename(HOME)
        except OSError:
            if not HOME.is_dir():  # otherwise another process was faster
                raise


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--retries", "1", "--no-deps", "--no-binary", "transformers", "--dest", str(folder)]
    if find_spec("setuptools") is not None:
        command.append("--no-build-isolation")  # which spares pip a fresh environment, only to read the metadata
    subprocess.run([*command, f"transformers=={VERSION}"], check=True, timeout=TIMEOUT_SECONDS)
    return folder / f"transformers-{VERSION}.tar.gz"


def _extract(archive: Path, target: Path) -> None:
    target.mkdir(parents=True)
    with tarfile.open(archive) as distribution:
        for member in distribution:
            parts = PurePosixPath(member.name).parts
            if member.isfile() and parts[1:2] == ("tests",) and member.name.endswith(".py"):
                member.name = str(PurePosixPath(*parts[2:]))
                distribution.extract(member, target, filter="data")
    if not (target / "test_modeling_common.py").is_file():
        raise FileNotFoundError(f"{archive.name} has no tests/test_modeling_common.py")
    # test_configuration_common.py executes the one beside it; the distribution leaves it out.
    (target / "__init__.py").touch()


class LeftOut:
    """Stands for a table that the distribution lacks: a test that reads it is skipped."""

    def __deepcopy__(self, memo: dict) -> NoReturn:
        raise unittest.SkipTest("transformers' source distribution lacks the table that this goes through")


class NoTests:
    """Stands for a class of further tests that the distribution lacks."""


# What the files import of neighbours that the distribution lacks.
LEFT_OUT: dict[str, dict[str, Any]] = {
    "exporters.test_export": {"ExportTesterMixin": NoTests},
    "generation.test_utils": {"GenerationTesterMixin": NoTests},
    "utils.test_configuration_utils": {"config_common_kwargs": LeftOut()},
}


def load(name: str) -> ModuleType:
    """Import one file of the tests, such as "test_modeling_common"; skips the importing module where that cannot be."""
    if not HOME.is_dir():
        pytest.skip(
            f"no tests of transformers {VERSION} in {HOME.parent}: python tests/generic_suite.py fetches them",
            allow_module_level=True,
        )
    pytest.importorskip("parameterized", reason="transformers' tests need the package parameterized")
    if str(HOME) not in sys.path:
        sys.path.append(str(HOME))
    for neighbour, names in LEFT_OUT.items():
        _stand_in(neighbour, names)
    # The files use markers of their own, which --strict-markers refuses; a generator without a configuration does not.
    with patch.object(pytest, "mark", pytest.MarkGenerator(_ispytest=True)):
        return importlib.import_module(f"{PACKAGE}.{name}")


def _stand_in(neighbour: str, names: dict[str, Any]) -> None:
    folder, file = neighbour.split(".")
    if Path(HOME, PACKAGE, folder, f"{file}.py").is_file():
        return
    for path in (folder, neighbour):
        sys.modules.setdefault(f"{PACKAGE}.{path}", ModuleType(f"{PACKAGE}.{path}"))
    vars(sys.modules[f"{PACKAGE}.{neighbour}"]).update(names)


if __name__ == "__main__":
    try:
        fetch()
    except (OSError, subprocess.SubprocessError, tarfile.TarError) as problem:
        sys.exit(f"The tests of transformers {VERSION} could not be fetched: {problem}")
