"""DepthLM, its presets and its sizes."""

from typing import TYPE_CHECKING

from depthscope import lazily

if TYPE_CHECKING:
    from depthscope.models.configuration_depthlm import DepthLMConfig
    from depthscope.models.modeling_depthlm import DepthLMForCausalLM, DepthLMModel
    from depthscope.models.presets_depthlm import PRESETS
    from depthscope.models.sizes import ModelSize, model_size

# Where each name lives, imported when first used: torch and transformers take seconds.
_HOME = {
    "DepthLMConfig": "configuration_depthlm",
    "DepthLMForCausalLM": "modeling_depthlm",
    "DepthLMModel": "modeling_depthlm",
    "ModelSize": "sizes",
    "PRESETS": "presets_depthlm",
    "model_size": "sizes",
}

__all__ = [
    "PRESETS",
    "DepthLMConfig",
    "DepthLMForCausalLM",
    "DepthLMModel",
    "ModelSize",
    "model_size",
]


__getattr__ = lazily(__name__, _HOME)
