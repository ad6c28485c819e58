"""The scores, one file per score (or a family read off the same tensors), each over a `LayerStack`.

Every file opens with its formula, units and source; its record in `depthscope.report.measures` says the rest. Whatever
class of these files has the name of a record is found here: `SCORES`, in the order of the records. They are looked for
when they are first asked for, so that `depthscope.scores.work` needs no torch.
"""

from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

from depthscope.report.measures import MEASURES

if TYPE_CHECKING:
    from depthscope.scores.base import Score, effective_depth

    SCORES: dict[str, type[Score]]

__all__ = ["SCORES", "Score", "effective_depth"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for module in iter_modules(__path__):
        import_module(f"{__name__}.{module.name}")
    base = import_module(f"{__name__}.base")
    found = _classes(base.Score)
    globals().update(
        SCORES={name: found[name] for name in MEASURES if name in found},
        Score=base.Score,
        effective_depth=base.effective_depth,
    )
    return globals()[name]


def _classes(of: type[object]) -> dict[str, Any]:
    """All classes below one, by the names of their records."""
    found: dict[str, Any] = {}
    for each in of.__subclasses__():
        found |= _classes(each)
        if "name" in vars(each):
            found[vars(each)["name"]] = each
    return found
