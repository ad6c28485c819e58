"""The native architectures as sources: their settings and weights as those of a DepthLM."""

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedConfig

from depthscope.conversion.forms import OUTPUT_NORMS, SHARED_SETTINGS, State, renamed, without
from depthscope.errors import ConversionError

__all__ = ["SOURCES"]

Reading = tuple[dict[str, Any], State]


def _shared(config: PreTrainedConfig, *more: str, **others: Any) -> dict[str, Any]:
    """The settings with the same name on both sides; `head_dim` only if the source has one."""
    names = {*SHARED_SETTINGS, "head_dim", *more}
    return {name: getattr(config, name) for name in names if hasattr(config, name)} | others


def _llama(config: PreTrainedConfig, state: State) -> Reading:
    return _shared(config, "attention_bias", "mlp_bias"), state


def _mistral(config: PreTrainedConfig, state: State) -> Reading:
    return _shared(config, "sliding_window"), state


def _qwen2(config: PreTrainedConfig, state: State) -> Reading:
    return _shared(config, **_sliding(config), attention_bias=True), _with_output_biases(config, state)


def _qwen3(config: PreTrainedConfig, state: State) -> Reading:
    return _shared(config, "attention_bias", **_sliding(config), qk_norm="head"), state


def _olmo2(config: PreTrainedConfig, state: State) -> Reading:
    settings = _shared(config, "attention_bias", norm_placement="output", qk_norm="full")
    return settings, renamed(state, {theirs: ours for ours, theirs in OUTPUT_NORMS.items()})


def _mixtral(config: PreTrainedConfig, state: State) -> Reading:
    experts = _experts(config, config.intermediate_size, config.num_local_experts)
    return _shared(config, "sliding_window", **experts, norm_topk_prob=True), state


def _olmoe(config: PreTrainedConfig, state: State) -> Reading:
    if config.clip_qkv is not None:
        raise ConversionError(
            f"This OLMoE clips queries, keys and values (clip_qkv={config.clip_qkv}); DepthLM does not."
        )
    experts = _experts(config, config.intermediate_size, config.num_experts)
    return _shared(config, "attention_bias", "norm_topk_prob", **experts, qk_norm="full"), state


def _qwen3_moe(config: PreTrainedConfig, state: State) -> Reading:
    _refuse_sliding_experts(config)
    return _shared(config, "attention_bias", "norm_topk_prob", **_some_experts(config), qk_norm="head"), state


def _qwen2_moe(config: PreTrainedConfig, state: State) -> Reading:
    """Read only a gate of zeros, which weighs the shared expert by 1/2; a shared expert of zeros is left out."""
    _refuse_sliding_experts(config)
    gates = {name: gate for name, gate in state.items() if name.endswith("shared_expert_gate.weight")}
    if any(gate.any() for gate in gates.values()):
        raise ConversionError(
            "The shared expert of this Qwen2-MoE has a gate that depends on the token; DepthLM's has none."
        )
    state = without(state, gates)
    experts = {name: weight for name, weight in state.items() if ".shared_expert." in name}
    width = config.shared_expert_intermediate_size
    if not any(weight.any() for name, weight in experts.items() if name.endswith("down_proj.weight")):
        state, width = without(state, experts), None
    halved = {name: weight / 2 for name, weight in state.items() if name.endswith("shared_expert.down_proj.weight")}
    settings = _shared(
        config,
        "norm_topk_prob",
        **_some_experts(config),
        attention_bias=config.qkv_bias,
        shared_expert_intermediate_size=width,
    )
    return settings, _with_output_biases(config, state | halved) if config.qkv_bias else state | halved


def _sliding(config: PreTrainedConfig) -> dict[str, Any]:
    slides = "sliding_attention" in config.layer_types
    return {"sliding_window": config.sliding_window if slides else None, "layer_types": list(config.layer_types)}


def _refuse_sliding_experts(config: PreTrainedConfig) -> None:
    if config.use_sliding_window:
        raise ConversionError("This model has both sliding windows and experts, which is not supported yet.")


def _with_output_biases(config: PreTrainedConfig, state: State) -> State:
    """The output projections with biases of zero: DepthLM has biases in all four attention projections or in none."""
    biases = {
        name.replace(".weight", ".bias"): weight.new_zeros(config.hidden_size)
        for name, weight in state.items()
        if name.endswith("self_attn.o_proj.weight")
    }
    return state | biases


def _experts(config: PreTrainedConfig, width: int, number: int) -> dict[str, Any]:
    return {
        "num_experts": number,
        "moe_intermediate_size": width,
        "num_experts_per_tok": config.num_experts_per_tok,
        "router_aux_loss_coef": config.router_aux_loss_coef,
        "router_z_loss_coef": 0.0,  # none of them has this loss
        "output_router_logits": config.output_router_logits,
    }


def _some_experts(config: PreTrainedConfig) -> dict[str, Any]:
    layers = range(config.num_hidden_layers)
    chosen = [
        layer
        for layer in layers
        if layer not in config.mlp_only_layers and (layer + 1) % config.decoder_sparse_step == 0
    ]
    experts = _experts(config, config.moe_intermediate_size, config.num_experts)
    return {**experts, "moe_layers": "all" if len(chosen) == len(layers) else chosen}


SOURCES: dict[str, Callable[[PreTrainedConfig, State], Reading]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "olmo2": _olmo2,
    "mixtral": _mixtral,
    "olmoe": _olmoe,
    "qwen3_moe": _qwen3_moe,
    "qwen2_moe": _qwen2_moe,
}
