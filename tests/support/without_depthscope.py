"""An environment that has everything that this one has, except depthscope."""

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from forks import Forks

__all__ = ["make_elsewhere", "run_elsewhere"]


def make_elsewhere(folder: Path) -> Forks:
    """Make a Python of its own in a folder; it finds its packages by PYTHONPATH.

    The .pth files of editable installs are not read there.
    """
    venv.create(folder / "venv", with_pip=False)
    packages = folder / "packages"
    packages.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        # The Space's files lie in a folder of depthscope's name even where the rest is an editable install.
        if not path.name.startswith("depthscope"):
            (packages / path.name).symlink_to(path)
    python = "Scripts/python.exe" if sys.platform == "win32" else "bin/python"
    return Forks(folder / "venv" / python, {"PYTHONPATH": str(packages), "PATH": ""})


def run_elsewhere(elsewhere: Forks, code: str, *arguments: Path, cache: Path) -> "subprocess.CompletedProcess[str]":
    """Run code there, offline, with a cache folder of its own."""
    settings = elsewhere.environment | {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "1", "HOME": str(cache)}
    return elsewhere.run("-c", code, *arguments, env=settings, cwd=cache)
