"""The scores, one file a score (or a family read off the same tensors), each over a `LayerStack`.

Every file opens with its formula, units and source; its record in `depthscope.report.measures` says the rest. Whatever
class of these files has the name of a record is found here: `SCORES`, in the order of the records.
"""

from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from depthscope.report.measures import MEASURES
from depthscope.scores.base import Score, effective_depth

__all__ = ["SCORES", "Score", "effective_depth"]


def _classes(of: type[object]) -> dict[str, Any]:
    """All classes below one, by the names of their records."""
    found: dict[str, Any] = {}
    for each in of.__subclasses__():
        found |= _classes(each)
        if "name" in vars(each):
            found[vars(each)["name"]] = each
    return found


for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
_found = _classes(Score)
SCORES: dict[str, type[Score]] = {name: _found[name] for name in MEASURES if name in _found}
