"""Trained DepthLMs in another shape: fewer KV heads, experts, more layers.

Each function returns a new model in the dtype, on the device and in the mode of the given model, which is not changed.
"""

from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from depthscope.conversion.assemble import assemble, changed
from depthscope.conversion.forms import State, renamed
from depthscope.errors import ConversionError
from depthscope.models.configuration_depthlm import DepthLMConfig
from depthscope.models.modeling_depthlm import DepthLMForCausalLM
from depthscope.wording.messages import counted

__all__ = ["deepen", "to_gqa", "upcycle"]


def to_gqa(model: DepthLMForCausalLM, num_key_value_heads: int) -> DepthLMForCausalLM:
    """Change the number of key and value heads.

    Fewer heads: each is the mean of the heads that it replaces (Ainslie et al. 2023). This changes the function of the
    model, so train it afterwards. More heads: each is repeated, which does not change the function; pooling them again
    restores the model.

    Args:
        model: the model.
        num_key_value_heads: a divisor or a multiple of the present number; it must divide `num_attention_heads`.

    Raises:
        ConversionError: the number of heads is impossible.
    """
    config: Any = model.config
    heads, old, new = config.num_attention_heads, config.num_key_value_heads, num_key_value_heads
    possible = [n for n in range(1, heads + 1) if heads % n == 0 and (old % n == 0 or n % old == 0)]
    if new not in possible:
        raise ConversionError(f"{old} key and value heads can become {_options(possible)}, not {new}.")
    state = model.state_dict()
    for name, weight in state.items():
        if _is_of_kv_heads(name, config):
            state[name] = _regrouped(weight, old, new)
    return assemble(changed(config, num_key_value_heads=new), state, like=model)


def upcycle(
    model: DepthLMForCausalLM,
    num_experts: int,
    top_k: int,
    *,
    moe_layers: str | int | list[int] = "all",
    seed: int = 0,
) -> DepthLMForCausalLM:
    """Replace the MLPs of a dense model by experts that are copies of them (Komatsuzaki et al. 2023).

    The weights of a token's experts sum to 1, so at the start the output is unchanged for any choice of the routers.
    The routers are drawn from normal(0, `initializer_range`).

    Args:
        model: a dense DepthLM.
        num_experts: experts per layer.
        top_k: experts per token.
        moe_layers: which layers get experts, as in [`DepthLMConfig`].
        seed: seed of the routers.

    Raises:
        ConversionError: the model has experts already, or biases in its MLPs, which experts cannot have; or the numbers
            exclude each other.
    """
    config = model.config
    if config.num_experts is not None:
        raise ConversionError(f"This model has {config.num_experts} experts already; only a dense one can be upcycled.")
    if config.mlp_bias:
        raise ConversionError("This model's MLPs have biases, and experts have none.")
    sparse = _checked(
        config,
        num_experts=num_experts,
        num_experts_per_tok=top_k,
        moe_intermediate_size=config.intermediate_size,
        moe_layers=moe_layers,
        norm_topk_prob=True,
    )
    state = model.state_dict()
    generator = torch.Generator().manual_seed(seed)
    for layer in sparse.moe_layer_indices:
        prefix = f"model.layers.{layer}.mlp."
        gate, up, down = (state.pop(f"{prefix}{part}_proj.weight") for part in ("gate", "up", "down"))
        router = torch.randn(num_experts, config.hidden_size, generator=generator) * config.initializer_range
        state[prefix + "gate.weight"] = router.to(gate)
        state[prefix + "experts.gate_up_proj"] = torch.cat([gate, up]).expand(num_experts, -1, -1)
        state[prefix + "experts.down_proj"] = down.expand(num_experts, -1, -1)
    return assemble(sparse, state, like=model)


def deepen(model: DepthLMForCausalLM, num_layers: int, *, preserve_function: bool = False) -> DepthLMForCausalLM:
    """Add layers on top by stacking copies of the present layers: layer l of the result is a copy of layer l mod L.

    Args:
        model: the model, of L layers.
        num_layers: layers of the result, more than L.
        preserve_function: let the added layers start as the identity, so that the result computes the same as `model`.
            Their output projections (or output norms, if `norm_placement` has them) are set to zero.

    Raises:
        ConversionError: the model has as many layers already; or its function cannot be preserved, because a Post-LN
            layer that adds nothing still normalises the residual stream.
    """
    config: Any = model.config
    old = config.num_hidden_layers
    if num_layers <= old:
        raise ConversionError(f"This model has {counted(old, 'layer')}; deepen needs more than that, not {num_layers}.")
    if preserve_function and config.norm_placement == "post":
        raise ConversionError(
            "Post-LN layers normalise the residual stream even if they add nothing to it, so none can be the identity."
        )
    deeper = changed(
        config,
        num_hidden_layers=num_layers,
        layer_types=[config.layer_types[layer % old] for layer in range(num_layers)],
        moe_layers=_repeated_moe_layers(config, num_layers),
        mix_post_layers=config.mix_post_layers,
        kept_layers=_numbered_on(config.kept_layers, num_layers),
    )
    state = {name: weight for name, weight in model.state_dict().items() if not name.startswith("model.layers.")}
    for layer in range(num_layers):
        weights = _layer_state(model, layer % old)
        if layer >= old:
            weights = _fitted(weights, deeper, layer)
            if preserve_function:
                weights = _silenced(weights)
        state |= {f"model.layers.{layer}.{name}": weight for name, weight in weights.items()}
    return assemble(deeper, state, like=model)


def _options(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:-1])) + f" or {numbers[-1]}" if len(numbers) > 1 else str(numbers[0])


def _checked(config: DepthLMConfig, **changes: Any) -> DepthLMConfig:
    try:
        return changed(config, **changes)
    except (StrictDataclassError, ValueError) as error:
        raise ConversionError(str(error.__cause__ or error)) from error


def _is_of_kv_heads(name: str, config: DepthLMConfig) -> bool:
    return ".k_proj." in name or ".v_proj." in name or (".k_norm." in name and config.qk_norm == "full")


def _regrouped(weight: Tensor, old: int, new: int) -> Tensor:
    """The rows of `old` heads as rows of `new` heads: pooled by their mean (in float64), or repeated."""
    by_head = weight.reshape(old, -1, *weight.shape[1:])
    if new > old:
        by_head = by_head.repeat_interleave(new // old, dim=0)
    elif new < old:
        by_head = by_head.reshape(new, old // new, *by_head.shape[1:]).double().mean(1).to(weight.dtype)
    return by_head.reshape(-1, *weight.shape[1:])


def _repeated_moe_layers(config: DepthLMConfig, num_layers: int) -> str | int | list[int]:
    if config.num_experts is None or config.moe_layers == "all":
        return "all"
    return [layer for layer in range(num_layers) if layer % config.num_hidden_layers in config.moe_layer_indices]


def _numbered_on(kept: list[int] | None, num_layers: int) -> list[int] | None:
    """The numbers of a cut model's layers, and those that follow them for the added ones."""
    return None if kept is None else [*kept, *range(kept[-1] + 1, kept[-1] + 1 + num_layers - len(kept))]


def _layer_state(model: DepthLMForCausalLM, layer: int) -> State:
    return model.model.layers[layer].state_dict()


def _fitted(weights: State, config: DepthLMConfig, layer: int) -> State:
    """A layer's weights at its new position: in Mix-LN, a Post-LN layer's norms become those of a Pre-LN layer."""
    if config.norm_placement != "mix" or config.norm_placement_of(layer) == "post":
        return weights
    return renamed(
        weights, {"attention_sum_layernorm": "input_layernorm", "mlp_sum_layernorm": "post_attention_layernorm"}
    )


def _silenced(weights: State) -> State:
    """A layer's weights with zeros in the output projections or output norms."""
    # Zeros before an output norm would also work, but the norm's derivative there is as large as 1 / sqrt(eps).
    norms = ("attention_output_layernorm.weight", "mlp_output_layernorm.weight")
    projections = ("o_proj.weight", "o_proj.bias", "down_proj.weight", "down_proj.bias", "experts.down_proj")
    written = norms if norms[0] in weights else projections
    return {name: torch.zeros_like(weight) if name.endswith(written) else weight for name, weight in weights.items()}
