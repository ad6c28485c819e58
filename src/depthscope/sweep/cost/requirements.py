"""The requirements of a sweep, its text and packages, checked before anything is trained.

`sweep plan` does not check them, since it plans for other machines.
"""

from importlib.util import find_spec
from pathlib import Path

from depthscope.sweep.data import require_text
from depthscope.sweep.grid import Grid
from depthscope.sweep.specification import Sweep

__all__ = ["require_text_and_packages"]

# By transformers' names; transformers downloads those from the Hub ("kernels-community/...") itself.
PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}


def require_text_and_packages(sweep: Sweep, grid: Grid, out: Path) -> None:
    """Refuse a sweep that would fail later.

    Raises:
        CorpusError: a file of the text is missing or cannot be read.
        SpecificationError: the package of an attention implementation is not installed.
    """
    _require_attention(sweep, grid)
    require_text(sweep, out)


def _require_attention(sweep: Sweep, grid: Grid) -> None:
    for point in grid.points:
        attention = point.training.attention
        package = PACKAGES.get(attention)
        if package is not None and find_spec(package) is None:
            lines = [path for path in sweep.file.places if "attention" in path and sweep.file.at(path) == attention]
            raise sweep.error(
                lines[0] if lines else ("training", "attention"),
                f"{attention} needs the package {package}, which is not installed; install it, or give auto.",
            )
