"""What pyproject.toml, the pinned requirements and the installed package say of each other."""

import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import depthscope

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML by itself")

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text().splitlines()
    found = [re.fullmatch(r"([\w.-]+)==([\w.+]+)", line) for line in lines if line and not line.startswith("#")]
    assert all(found), "every line is an exact pin"
    return {canonicalize_name(match[1]): match[2] for match in found if match}


def requirements() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"]
    named = [*PROJECT["dependencies"], *(line for extra in extras.values() for line in extra)]
    return [requirement for requirement in map(Requirement, named) if requirement.name != "depthscope"]


def numbers(text: str) -> tuple[int, ...]:
    parts = [int(part) for part in text.split(".")]
    return (*parts, *[0] * (3 - len(parts)))


def test_the_floors_that_are_tested_are_the_floors_that_are_declared() -> None:
    tested = pins("requirements-floor.txt")
    for requirement in requirements():
        (bound,) = requirement.specifier
        assert bound.operator == ">="
        assert numbers(tested[canonicalize_name(requirement.name)]) == numbers(bound.version), requirement.name


def test_the_pinned_environment_is_one_that_is_declared_to_work() -> None:
    pinned = pins("requirements-dev.txt")
    for requirement in requirements():
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement.name


def test_every_public_name_is_there() -> None:
    for name in depthscope.__all__:
        assert getattr(depthscope, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = depthscope.no_such_name


def test_the_package_is_typed_and_carries_its_templates() -> None:
    folder = Path(depthscope.__file__).parent
    assert (folder / "py.typed").is_file()
    assert (folder / "templates" / "report.html.j2").is_file()


def test_help_and_version_answer_without_importing_torch() -> None:
    code = "import sys, depthscope.cli, depthscope; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    run = subprocess.run([sys.executable, "-m", "depthscope", "--version"], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == f"depthscope {version('depthscope')}"
