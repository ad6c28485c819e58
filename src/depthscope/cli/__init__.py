"""The command line.

torch and transformers are imported inside the commands, so that `--help` answers at once. Bad input ends with one
message and exit code 2, Ctrl-C with 130.
"""

from depthscope.cli import analysis, models, sparsity
from depthscope.cli.shared import app

__all__ = ["analysis", "app", "main", "models", "sparsity"]


def main() -> None:
    """Run the command line."""
    app()
