"""An environment that has everything that this one has, except depthscope."""

import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Elsewhere", "make_elsewhere", "run_elsewhere"]


@dataclass(frozen=True)
class Elsewhere:
    """A Python of its own, and the folder of packages that PYTHONPATH must name for it.

    The .pth files of editable installs are not read there.
    """

    python: Path
    packages: Path


def make_elsewhere(folder: Path) -> Elsewhere:
    """Make one in a folder."""
    venv.create(folder / "venv", with_pip=False)
    packages = folder / "packages"
    packages.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        # The Space's files lie in a folder of depthscope's name even where the rest is an editable install.
        if not path.name.startswith("depthscope"):
            (packages / path.name).symlink_to(path)
    python = "Scripts/python.exe" if sys.platform == "win32" else "bin/python"
    return Elsewhere(folder / "venv" / python, packages)


def run_elsewhere(elsewhere: Elsewhere, code: str, *arguments: Path, cache: Path) -> subprocess.CompletedProcess[str]:
    """Run code there, offline, with a cache folder of its own."""
    settings = {
        "PYTHONPATH": str(elsewhere.packages),
        "HF_HOME": str(cache),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PATH": "",
        "HOME": str(cache),
    }
    command = [str(elsewhere.python), "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=settings, cwd=cache)
