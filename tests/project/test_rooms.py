"""Rooms that only read what was measured load neither torch nor transformers, which take seconds.

import-linter (`make lint`) sees the imports of modules; this one sees also what their packages and libraries import.
"""

import subprocess
import sys

TORCH_FREE = ("errors", "settings", "wording", "console", "files", "report", "runs", "views")
TORCH_FREE += ("hub.cards", "sweep.report")
IMPORT_ALL = """
import pkgutil, sys
from importlib import import_module
for room in sys.argv[1:]:
    package = import_module(f"depthscope.{room}")
    for module in pkgutil.walk_packages(getattr(package, "__path__", []), f"{package.__name__}."):
        import_module(module.name)
        heavy = {"torch", "transformers", "accelerate", "peft"} & sys.modules.keys()
        assert not heavy, f"{module.name} imports {', '.join(sorted(heavy))}"
"""


def test_rooms_that_only_read_import_no_torch() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL, *TORCH_FREE], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
