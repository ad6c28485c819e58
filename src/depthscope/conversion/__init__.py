"""A model as another class that computes the same, or nearly: DepthLM from and to other architectures, and reshaped."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from depthscope.conversion.native import to_depthlm, to_native
    from depthscope.conversion.reshape import deepen, to_gqa, upcycle

# Where each name lives, imported when first used: torch and transformers take seconds.
_HOME = {
    "deepen": "reshape",
    "to_depthlm": "native",
    "to_gqa": "reshape",
    "to_native": "native",
    "upcycle": "reshape",
}

__all__ = ["deepen", "to_depthlm", "to_gqa", "to_native", "upcycle"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'depthscope.conversion' has no attribute {name!r}")
    return getattr(import_module(f"depthscope.conversion.{_HOME[name]}"), name)
