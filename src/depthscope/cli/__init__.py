"""The command line.

torch and transformers are imported inside the commands, so that `--help` is fast. Bad input ends with one message and
exit code 2, Ctrl-C with 130.
"""

import os

from depthscope.cli import analysis, evaluate, models, prune, push, recipe, space, sparsity, sweep
from depthscope.cli.shared import app
from depthscope.console.terminal import readable_width

__all__ = ["analysis", "app", "evaluate", "main", "models", "prune", "push", "recipe", "space", "sparsity", "sweep"]


def main() -> None:
    """Run the command line."""
    if "COLUMNS" in os.environ:
        os.environ["COLUMNS"] = str(readable_width())  # for the help pages, which typer prints
    app()
