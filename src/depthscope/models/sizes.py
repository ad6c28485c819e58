"""The size of a model and its training cost, counted from the model itself (built on `meta`, without memory).

A DepthLM has at most two types of layer. One layer of each type is built, and its count is multiplied by the number of
such layers, so a thousand layers take no longer than two.
"""

from copy import copy
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from depthscope.models.configuration_depthlm import DepthLMConfig

__all__ = ["LayerSizes", "ModelSize", "layer_sizes", "model_size"]

_EXPERT_WEIGHTS = ("experts.gate_up_proj", "experts.down_proj")


@dataclass(frozen=True)
class ModelSize:
    """Numbers of parameters, and floating-point operations.

    `active` parameters process one token: all but the experts that the routers do not choose.
    `training_flops_per_token` are those of the forward and backward pass; a multiplication and an addition are two
    operations. They are 6 per active parameter of a matrix product (not of the input embedding), plus 12 per feature of
    each head and per position that a token attends to, on average over a sequence of `sequence_length` tokens. The
    backward pass has twice the operations of the forward pass; the recomputation of gradient checkpointing is not
    included.
    """

    total: int
    active: int
    training_flops_per_token: int
    sequence_length: int


def model_size(config: PreTrainedConfig, sequence_length: int | None = None) -> ModelSize:
    """Count the parameters and training FLOPs of the model that `config` describes.

    Takes a [`DepthLMConfig`] or the configuration of a model with the same attention and experts (Llama, OLMoE, ...).

    Args:
        config: the configuration of the model.
        sequence_length: tokens in a training sequence; `max_position_embeddings` by default.
    """
    length = sequence_length or config.max_position_embeddings
    if isinstance(config, DepthLMConfig):
        sizes = layer_sizes(config)
        count = sizes.rest + sizes.dense * sizes.dense_layers + sizes.moe * sizes.moe_layers
    else:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        count = sum(_counts(model, config).values(), _Count())
    flops = round(6 * count.multiplied + _attention_flops(config, length))
    return ModelSize(count.total, count.active, flops, length)


@dataclass(frozen=True)
class _Count:
    """Numbers of parameters: all, those that process one token, and the part of these in matrix products."""

    total: int = 0
    active: int = 0
    multiplied: int = 0

    def __add__(self, other: "_Count") -> "_Count":
        return _Count(self.total + other.total, self.active + other.active, self.multiplied + other.multiplied)

    def __mul__(self, times: int) -> "_Count":
        return _Count(self.total * times, self.active * times, self.multiplied * times)


@dataclass(frozen=True)
class LayerSizes:
    """The parameters of a DepthLM: of a dense layer, of a layer with experts and of the rest, and numbers of layers.

    The sizes of a type without layers are 0.
    """

    dense: _Count
    dense_layers: int
    moe: _Count
    moe_layers: int
    rest: _Count


def layer_sizes(config: DepthLMConfig) -> LayerSizes:
    """Count the parameters of one layer of each type, and those outside the layers."""
    moe_layers = len(config.moe_layer_indices)
    dense_layers = config.num_hidden_layers - moe_layers
    kinds = [name for name, layers in (("moe", moe_layers), ("dense", dense_layers)) if layers]
    small = copy(config)
    small.num_hidden_layers = len(kinds)
    small.layer_types = ["full_attention"] * len(kinds)
    if moe_layers:
        small.moe_layers = [0]
    if config.norm_placement == "mix":  # the number of norms is the same
        small.norm_placement, small.mix_post_layers = "pre", None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(small)
    counts = _counts(model, config)
    sizes = {name: counts.pop(str(layer)) for layer, name in enumerate(kinds)}
    rest = sum(counts.values(), _Count())
    return LayerSizes(sizes.get("dense", _Count()), dense_layers, sizes.get("moe", _Count()), moe_layers, rest)


def _counts(model: nn.Module, config: PreTrainedConfig) -> dict[str, _Count]:
    """The parameters of each layer of `model.layers`, by its index; those outside the layers have the key ""."""
    counts: dict[str, _Count] = {}
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    for name, parameter in model.named_parameters():
        used = parameter.numel()
        if name.endswith(_EXPERT_WEIGHTS):
            used = used * config.num_experts_per_tok // parameter.shape[0]
        # A tied embedding is in one matrix product, that of the head.
        is_multiplied = parameter.dim() > 1 and (parameter is not embedding or config.tie_word_embeddings)
        layer = name.split(".")[2] if name.startswith("model.layers.") else ""
        count = _Count(parameter.numel(), used, used if is_multiplied else 0)
        counts[layer] = counts.get(layer, _Count()) + count
    return counts


def _attention_flops(config: PreTrainedConfig, length: int) -> float:
    """Training FLOPs per token of the products of queries and keys, and of probabilities and values."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    attended = sum(_mean_attended(length, config.sliding_window if "sliding" in kind else None) for kind in kinds)
    return 12 * config.num_attention_heads * head_dim * attended


def _mean_attended(length: int, window: int | None) -> float:
    """The number of positions that a token attends to, itself included, on average over a causal sequence."""
    if window is None or window >= length:
        return (length + 1) / 2
    return (window * (window + 1) / 2 + (length - window) * window) / length
