"""depthscope: how much every layer of a language model contributes.

    report = depthscope.analyze("model")    # a LayerReport: global scores, one row a layer, pairs of layers
    stack = depthscope.LayerStack(model)    # find, watch and stand in for the layers of any causal language model

Importing it makes `AutoConfig`, `AutoModel` and `AutoModelForCausalLM` know DepthLM. Layers count from 0 everywhere,
losses are in nats.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from depthscope.models.registration import register as _register

if TYPE_CHECKING:
    from depthscope.analysis.analyze import AnalysisInterrupted, analyze
    from depthscope.errors import (
        AnalysisError,
        ConversionError,
        CorpusError,
        DepthscopeError,
        HubError,
        ModelLoadError,
        NoLayerStackError,
        NonFiniteError,
        OutOfMemoryError,
        ReportError,
        SettingsError,
    )
    from depthscope.hub.callback import HubCheckpointCallback
    from depthscope.hub.push import push
    from depthscope.layers.stack import Capture, LayerStack
    from depthscope.layers.stand_ins import AffineMap
    from depthscope.loading.load import load_model
    from depthscope.loading.loaded import LoadedModel
    from depthscope.models.configuration_depthlm import DepthLMConfig
    from depthscope.models.modeling_depthlm import DepthLMForCausalLM, DepthLMModel
    from depthscope.recipes import Recipe, recipe
    from depthscope.report.comparison import Comparison, compare
    from depthscope.report.report import LayerReport
    from depthscope.settings import Settings
    from depthscope.text.blocks import Blocks, load_blocks
    from depthscope.views.report_page import write_page

# Where each public name lives. They are imported when first used: torch and transformers take seconds.
_PLACES = {
    "analysis.analyze": ("AnalysisInterrupted", "analyze"),
    "layers.stack": ("Capture", "LayerStack"),
    "report.comparison": ("Comparison", "compare"),
    "text.blocks": ("Blocks", "load_blocks"),
    "errors": (
        "AnalysisError",
        "ConversionError",
        "CorpusError",
        "DepthscopeError",
        "HubError",
        "ModelLoadError",
        "NoLayerStackError",
        "NonFiniteError",
        "OutOfMemoryError",
        "ReportError",
        "SettingsError",
    ),
    "hub.callback": ("HubCheckpointCallback",),
    "hub.push": ("push",),
    "loading.load": ("load_model",),
    "loading.loaded": ("LoadedModel",),
    "models": ("DepthLMConfig", "DepthLMForCausalLM", "DepthLMModel"),
    "views.report_page": ("write_page",),
    "recipes": ("Recipe", "recipe"),
    "report.report": ("LayerReport",),
    "settings": ("Settings",),
    "layers.stand_ins": ("AffineMap",),
}
_HOME = {name: module for module, names in _PLACES.items() for name in names}

__all__ = [
    "AffineMap",
    "AnalysisError",
    "AnalysisInterrupted",
    "Blocks",
    "Capture",
    "Comparison",
    "ConversionError",
    "CorpusError",
    "DepthLMConfig",
    "DepthLMForCausalLM",
    "DepthLMModel",
    "DepthscopeError",
    "HubCheckpointCallback",
    "HubError",
    "LayerReport",
    "LayerStack",
    "LoadedModel",
    "ModelLoadError",
    "NoLayerStackError",
    "NonFiniteError",
    "OutOfMemoryError",
    "Recipe",
    "ReportError",
    "Settings",
    "SettingsError",
    "analyze",
    "compare",
    "load_blocks",
    "load_model",
    "push",
    "recipe",
    "write_page",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'depthscope' has no attribute {name!r}")
    return getattr(import_module(f"depthscope.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]


_register()
