"""What a sweep needs of the machine that trains it, looked at before anything is trained: its text, and packages.

`sweep plan` asks for none of it, since it reckons with other machines.
"""

from importlib.util import find_spec
from pathlib import Path

from depthscope.sweep.data import require_text
from depthscope.sweep.grid import Grid
from depthscope.sweep.specification import Sweep

__all__ = ["require_what_is_needed"]

# By transformers' names; those from the Hub ("kernels-community/...") are downloaded by itself.
PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}


def require_what_is_needed(sweep: Sweep, grid: Grid, out: Path) -> None:
    """Refuse what could only fail later.

    Raises:
        CorpusError: a file of the text is not there or cannot be read.
        SpecificationError: an attention whose package is not installed.
    """
    _require_attention(sweep, grid)
    require_text(sweep, out)


def _require_attention(sweep: Sweep, grid: Grid) -> None:
    for point in grid.points:
        attention = point.training.attention
        package = PACKAGES.get(attention)
        if package is not None and find_spec(package) is None:
            said = [path for path in sweep.file.places if "attention" in path and sweep.file.at(path) == attention]
            raise sweep.error(
                said[0] if said else ("training", "attention"),
                f"{attention} needs the package {package}, which is not installed here; install it, or give auto.",
            )
