"""transformers' own generic model tests, taken from the source distribution of the version that is installed.

`python tests/support/generic_suite.py` fetches them once into the environment, where
`tests/models/test_generic_models.py` finds them. They are no part of this project, and no wheel carries them.
"""

import functools
import importlib
import subprocess
import sys
import tarfile
import tempfile
import time
import unittest
from collections.abc import Callable
from datetime import timedelta
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
FETCH_SECONDS = 300
RANKS_SECONDS = 120


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
    try:
        subprocess.run([*command, f"transformers=={VERSION}"], check=True, timeout=FETCH_SECONDS)
    except subprocess.SubprocessError as problem:
        raise OSError("pip could not download its source distribution") from problem
    return folder / f"transformers-{VERSION}.tar.gz"


def _extract(archive: Path, target: Path) -> None:
    target.mkdir(parents=True)
    with tarfile.open(archive) as distribution:
        for member in distribution:
            parts = PurePosixPath(member.name).parts
            content = distribution.extractfile(member)  # none of what is no file
            if content is not None and parts[1:2] == ("tests",) and parts[-1].endswith(".py") and ".." not in parts:
                place = target.joinpath(*parts[2:])
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(content.read())
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


def run_distributed(world_size: int) -> Callable[[Callable], Callable]:
    """Stands for a decorator that the distribution lacks: `world_size` processes run the function, given their rank."""
    return lambda function: functools.partial(_run_ranks, function, world_size)


def _run_ranks(function: Callable, world_size: int, *args: Any) -> None:
    from torch.multiprocessing import start_processes  # here, because fetching is to take no torch

    if sys.platform != "linux":
        raise unittest.SkipTest("forks the processes of a group: fresh ones would import torch for seconds each")
    with tempfile.TemporaryDirectory() as folder:
        given = (function, world_size, Path(folder, "rendezvous").as_uri(), args)
        ranks = start_processes(_run_rank, given, nprocs=world_size, join=False, start_method="fork")
        deadline = time.monotonic() + RANKS_SECONDS
        try:
            while not ranks.join(timeout=1):  # raises what a rank has raised
                if time.monotonic() > deadline:
                    raise TimeoutError(f"the processes of {function.__name__} have not ended")
        finally:
            for process in ranks.processes:
                process.kill()


def _run_rank(rank: int, function: Callable, world_size: int, rendezvous: str, args: tuple) -> None:
    import torch.distributed as dist

    timeout = timedelta(seconds=RANKS_SECONDS)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size, timeout=timeout)
    function(rank, *args)
    dist.destroy_process_group()


# What the files import of neighbours that the distribution lacks.
LEFT_OUT: dict[str, dict[str, Any]] = {
    "exporters.test_export": {"ExportTesterMixin": NoTests},
    "generation.test_utils": {"GenerationTesterMixin": NoTests},
    "utils.test_configuration_utils": {"config_common_kwargs": LeftOut()},
    "distributed_testing_utils": {"run_distributed": run_distributed},
}


def load(name: str) -> ModuleType:
    """Import one file of the tests, such as "test_modeling_common"; skips the importing module where that cannot be."""
    if not HOME.is_dir():
        pytest.skip(
            f"no tests of transformers {VERSION} in {HOME.parent}: python tests/support/generic_suite.py fetches them",
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
    if Path(HOME, PACKAGE, *neighbour.split(".")).with_suffix(".py").is_file():
        return
    name = PACKAGE
    for part in neighbour.split("."):
        name = f"{name}.{part}"
        module = sys.modules.setdefault(name, ModuleType(name))
    vars(module).update(names)


if __name__ == "__main__":
    try:
        fetch()
    except (OSError, tarfile.TarError) as problem:
        sys.exit(f"No tests of transformers {VERSION}: {problem}.")
