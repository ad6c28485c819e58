"""depthscope: how much every layer of a language model contributes.

    report = depthscope.analyze("model")    # a LayerReport: global scores, one row per layer, pairs of layers
    stack = depthscope.LayerStack(model)    # find, record and replace the layers of any causal language model

Importing it makes `AutoConfig`, `AutoModel` and `AutoModelForCausalLM` know DepthLM. Layers count from 0 everywhere,
losses are in nats.
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from depthscope.analysis.analyze import analyze
    from depthscope.errors import DepthscopeError
    from depthscope.hub.callback import HubCheckpointCallback
    from depthscope.hub.push import push
    from depthscope.layers.stack import LayerStack
    from depthscope.layers.stand_ins import AffineMap
    from depthscope.loading.load import load_model
    from depthscope.models.configuration_depthlm import DepthLMConfig
    from depthscope.models.modeling_depthlm import DepthLMForCausalLM, DepthLMModel
    from depthscope.recipes import recipe
    from depthscope.report.comparison import compare
    from depthscope.report.report import LayerReport
    from depthscope.settings import Settings
    from depthscope.text.blocks import Blocks, load_blocks
    from depthscope.views.report_page import write_page

# Where each public name lives. They are imported when first used: torch and transformers take seconds.
_HOME = {
    "AffineMap": "layers.stand_ins",
    "Blocks": "text.blocks",
    "DepthLMConfig": "models",
    "DepthLMForCausalLM": "models",
    "DepthLMModel": "models",
    "DepthscopeError": "errors",
    "HubCheckpointCallback": "hub.callback",
    "LayerReport": "report.report",
    "LayerStack": "layers.stack",
    "Settings": "settings",
    "analyze": "analysis.analyze",
    "compare": "report.comparison",
    "load_blocks": "text.blocks",
    "load_model": "loading.load",
    "push": "hub.push",
    "recipe": "recipes",
    "write_page": "views.report_page",
}

__all__ = [
    "AffineMap",
    "Blocks",
    "DepthLMConfig",
    "DepthLMForCausalLM",
    "DepthLMModel",
    "DepthscopeError",
    "HubCheckpointCallback",
    "LayerReport",
    "LayerStack",
    "Settings",
    "analyze",
    "compare",
    "load_blocks",
    "load_model",
    "push",
    "recipe",
    "write_page",
]


def lazily(package: str, home: Mapping[str, str]) -> Callable[[str], Any]:
    """A package's `__getattr__` (PEP 562) that imports each public name when it is first used.

    Args:
        package: its name.
        home: the module of it in which each name lives.
    """

    def attribute(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{home[name]}"), name)

    return attribute


__getattr__ = lazily(__name__, _HOME)


def __dir__() -> list[str]:
    return [*globals(), *__all__]


# Last, since the package of the models is lazy too.
import_module("depthscope.models.registration").register()
