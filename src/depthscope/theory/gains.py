"""The gains of a layer's matrices, by which they multiply second moments; the theory uses nothing else of the weights.

A random matrix with elements of mean square s turns a vector of n elements with mean square 1 into one with mean square
n s, the gain. Norm weights are included in the gains of the matrices that read the output of the norm.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from depthscope.errors import SettingsError
from depthscope.models.configuration_depthlm import DepthLMConfig
from depthscope.models.modeling_depthlm import DepthLMForCausalLM

__all__ = ["LayerGains", "MLPGains", "gains_at_initialisation", "gains_of_model"]


@dataclass(frozen=True)
class MLPGains:
    """Gains of the three matrices of a gated MLP, or of one expert: `down(act(gate x) * up x)`."""

    gate: float
    up: float
    down: float


@dataclass(frozen=True)
class LayerGains:
    """Gains of one layer's matrices, and the mean squares of the weights of its other norms (None: no such norm).

    `mlp` is the dense MLP or one of the experts; `router` and `shared` are those of a layer with experts.
    """

    query: float
    key: float
    value: float
    output: float
    mlp: MLPGains
    router: float | None = None
    shared: MLPGains | None = None
    query_norm: float | None = None
    key_norm: float | None = None
    attention_output_norm: float | None = None
    mlp_output_norm: float | None = None
    attention_sum_norm: float | None = None
    mlp_sum_norm: float | None = None


def gains_at_initialisation(
    config: DepthLMConfig, density: float = 1.0, weight_std: float | Sequence[float] | None = None
) -> list[LayerGains]:
    """The gains of the layers at initialisation; norm weights are 1.

    Args:
        config: the model.
        density: the share of the elements of each matrix that is not masked; routers are not masked.
        weight_std: standard deviation of all matrices of a layer before masking, one for all layers or one per layer;
            it replaces `initializer_range` and `depth_scaled_init`.

    Raises:
        SettingsError: a density outside (0, 1], a standard deviation that is not above 0 and finite, or a number of
            standard deviations other than 1 and the number of layers.
    """
    layers = config.num_hidden_layers
    if not 0 < density <= 1:
        raise SettingsError(f"density is {density!r}; give the share of weights that is kept, above 0 and at most 1.")
    if weight_std is None:
        stds = _by_layer("initializer_range", config.initializer_range, layers)
    else:
        stds = _by_layer("weight_std", weight_std, layers)
    shrunk = (2 * layers) ** -0.5 if config.depth_scaled_init and weight_std is None else 1.0
    return [_initial(config, layer, std, std * shrunk, density) for layer, std in enumerate(stds)]


def _by_layer(name: str, std: float | Sequence[float], layers: int) -> list[float]:
    stds = [float(value) for value in np.atleast_1d(np.asarray(std, dtype=float))]
    if len(stds) not in (1, layers):
        raise SettingsError(f"{len(stds)} standard deviations were given for {layers} layers; give one, or {layers}.")
    for value in stds:
        # With weights of zero there are no correlations to follow.
        if not 0 < value < np.inf:
            raise SettingsError(f"{name} is {value}; give standard deviations that are finite and above 0.")
    return stds * layers if len(stds) == 1 else stds


def _initial(config: DepthLMConfig, layer: int, std: float, writing_std: float, density: float) -> LayerGains:
    width, heads = config.hidden_size, config.num_attention_heads * (config.head_dim or 0)
    read, write = density * std**2, density * writing_std**2
    placement = config.norm_placement_of(layer)
    has_experts = layer in config.moe_layer_indices
    hidden = (config.moe_intermediate_size if has_experts else None) or config.intermediate_size
    shared = config.shared_expert_intermediate_size if has_experts else None
    head_norm = 1.0 if config.qk_norm else None
    output_norm = 1.0 if placement in ("peri", "output") else None
    sum_norm = 1.0 if placement == "post" else None
    return LayerGains(
        query=width * read,
        key=width * read,
        value=width * read,
        output=heads * write,
        mlp=MLPGains(width * read, width * read, hidden * write),
        router=width * std**2 if has_experts else None,
        shared=MLPGains(width * read, width * read, shared * write) if shared else None,
        query_norm=head_norm,
        key_norm=head_norm,
        attention_output_norm=output_norm,
        mlp_output_norm=output_norm,
        attention_sum_norm=sum_norm,
        mlp_sum_norm=sum_norm,
    )


def gains_of_model(model: DepthLMForCausalLM) -> list[LayerGains]:
    """The gains of the layers of a model. Biases are ignored."""
    return [_measured(layer) for layer in model.model.layers]


def _measured(layer: Any) -> LayerGains:
    attention, mlp = layer.self_attn, layer.mlp
    before, between = layer.input_layernorm, layer.post_attention_layernorm
    has_experts = hasattr(mlp, "experts")
    shared = mlp.shared_expert if has_experts else None
    return LayerGains(
        query=_gain(attention.q_proj.weight, before),
        key=_gain(attention.k_proj.weight, before),
        value=_gain(attention.v_proj.weight, before),
        output=_gain(attention.o_proj.weight),
        mlp=_experts(mlp.experts, between) if has_experts else _gated(mlp, between),
        router=_gain(mlp.gate.weight, between) if has_experts else None,
        shared=None if shared is None else _gated(shared, between),
        query_norm=_square(attention.q_norm),
        key_norm=_square(attention.k_norm),
        attention_output_norm=_square(layer.attention_output_layernorm),
        mlp_output_norm=_square(layer.mlp_output_layernorm),
        attention_sum_norm=_square(layer.attention_sum_layernorm),
        mlp_sum_norm=_square(layer.mlp_sum_layernorm),
    )


def _gated(mlp: Any, norm: Any) -> MLPGains:
    return MLPGains(_gain(mlp.gate_proj.weight, norm), _gain(mlp.up_proj.weight, norm), _gain(mlp.down_proj.weight))


def _experts(experts: Any, norm: Any) -> MLPGains:
    gate, up = experts.gate_up_proj.chunk(2, dim=-2)  # each [E, hidden, d]
    return MLPGains(_gain(gate, norm), _gain(up, norm), _gain(experts.down_proj))


def _gain(weight: Any, norm: Any = None) -> float:
    """The gain of a matrix [..., out, in] behind a norm: the mean over outputs of its rows' squared lengths."""
    acting: Tensor = weight.detach().double()
    if norm is not None:
        acting = acting * norm.weight.detach().double()
    return float(acting.square().sum(-1).mean())


def _square(norm: Any) -> float | None:
    """The mean square of a norm's weights; None without a norm."""
    weight: Tensor | None = getattr(norm, "weight", None)
    return None if weight is None else float(weight.detach().double().square().mean())
