"""Conversion of models: DepthLM to and from other architectures, and DepthLMs of another shape."""

from typing import TYPE_CHECKING

from depthscope import lazily

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


__getattr__ = lazily(__name__, _HOME)
