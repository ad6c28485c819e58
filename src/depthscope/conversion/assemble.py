"""A model from a configuration and weights: the last step of every conversion."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from depthscope.models.configuration_depthlm import DepthLMConfig

__all__ = ["assemble", "changed", "largest_logit_difference"]


def assemble(config: PreTrainedConfig, weights: Mapping[str, Tensor], like: PreTrainedModel) -> Any:
    """The model of `config` with a copy of `weights`, in the dtype, on the device and in the mode of `like`.

    Raises `RuntimeError` if a weight is missing, has no place or has another shape, which is an error of the caller.
    """
    with no_init_weights():
        # A copy: choices on the model (of attention, of experts) are stored in its configuration.
        model = AutoModelForCausalLM.from_config(deepcopy(config), dtype=like.dtype)
    model.load_state_dict(dict(weights), strict=True)
    model.tie_weights()
    if like.generation_config is not None:
        model.generation_config = type(like.generation_config).from_dict(like.generation_config.to_dict())
    return model.to(like.device).train(like.training)


def changed(config: DepthLMConfig, **changes: Any) -> DepthLMConfig:
    """A copy of a configuration with other values, validated like a new one."""
    kept = {
        name: value
        for name, value in config.to_dict().items()
        if name not in ("_name_or_path", "architectures", "auto_map", "dtype", "model_type", "transformers_version")
    }
    return DepthLMConfig(**{**kept, **changes})


def largest_logit_difference(one: PreTrainedModel, other: PreTrainedModel, tokens: int = 64, seed: int = 0) -> float:
    """The largest difference between the logits of two models, on random token ids, in float32 and evaluation mode."""
    vocabulary = one.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (2, tokens // 2), generator=torch.Generator().manual_seed(seed))
    logits = []
    for model in (one, other):
        was_training = model.training
        try:
            with torch.no_grad():
                logits.append(model.eval()(ids.to(model.device), use_cache=False).logits.float().cpu())
        finally:
            model.train(was_training)
    return (logits[0] - logits[1]).abs().max().item()
