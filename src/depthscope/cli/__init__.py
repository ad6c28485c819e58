"""The command line.

torch and transformers are imported inside the commands, so that `--help` answers at once. Bad input ends with one
message and exit code 2, Ctrl-C with 130.
"""

from depthscope.cli import analysis, evaluate, models, push, recipe, space, sparsity, sweep
from depthscope.cli.shared import app

__all__ = ["analysis", "app", "evaluate", "main", "models", "push", "recipe", "space", "sparsity", "sweep"]


def main() -> None:
    """Run the command line."""
    app()
