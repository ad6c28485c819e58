"""The native architectures: which DepthLMs each can express, and their configuration and weights for it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from depthscope.models.configuration_depthlm import DepthLMConfig

__all__ = ["FORMS", "OUTPUT_NORMS", "SHARED_SETTINGS", "Form", "State", "output_biases", "renamed", "without"]

State = dict[str, Tensor]

# Settings with the same name in all of them.
SHARED_SETTINGS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "rope_parameters",
    "attention_dropout",
)
# DepthLM's names of the norms after the sublayers -> OLMo 2's.
OUTPUT_NORMS = {
    "attention_output_layernorm": "post_attention_layernorm",
    "mlp_output_layernorm": "post_feedforward_layernorm",
}
# Qwen2-MoE always has a shared expert; a model without one gets this width of zeros.
_EMPTY_SHARED_WIDTH = 64


@dataclass(frozen=True)
class Form:
    """A native architecture: which DepthLMs it can express, and its configuration and weights for one of them."""

    model_type: str
    title: str
    settings: Callable[[DepthLMConfig], dict[str, Any]]
    weights: Callable[[State, DepthLMConfig], State] = lambda state, config: state
    norm_placement: str = "pre"
    qk_norm: str | None = None
    experts: str = "none"  # which layers have them: "none", "all" or "some"
    sliding: str = "none"  # which layers may have a sliding window: "none", "all" or "some"
    biases: str = "none"  # of the attention: "none", "qkvo", or "qkv"
    mlp_biases: bool = False
    head_dim: bool = True  # whether it need not be hidden_size / num_attention_heads
    shared_expert: bool = False
    raw_routing: bool = True  # whether the weights of a token's experts may sum to less than 1

    def lacks(self, config: DepthLMConfig, state: State) -> list[str]:
        """The traits of a model that this architecture cannot express; empty if it can express all."""
        layers = config.num_hidden_layers
        with_experts, sliding = len(config.moe_layer_indices), (config.layer_types or []).count("sliding_attention")
        usual_head = config.head_dim == config.hidden_size / config.num_attention_heads
        checks = [
            (config.norm_placement != self.norm_placement, f"norm_placement={config.norm_placement!r}"),
            (config.qk_norm != self.qk_norm, f"qk_norm={config.qk_norm!r}"),
            (sliding > 0 and self.sliding == "none", "a sliding window"),
            (0 < sliding < layers and self.sliding == "all", "a sliding window in some layers only"),
            (config.attention_bias and not self._holds_biases(state), "biases in these attention projections"),
            (config.mlp_bias and not self.mlp_biases, "biases in the MLP"),
            (not usual_head and not self.head_dim, f"heads of width {config.head_dim}"),
        ]
        if with_experts:
            checks += [
                (self.experts == "none", "experts"),
                (self.experts == "all" and with_experts < layers, "experts in some layers only"),
                (config.shared_expert_intermediate_size is not None and not self.shared_expert, "a shared expert"),
                (not config.norm_topk_prob and not self.raw_routing, "norm_topk_prob=False"),
            ]
        else:
            checks.append((self.experts != "none", "a dense MLP in every layer"))
        return [trait for missing, trait in checks if missing]

    def _holds_biases(self, state: State) -> bool:
        if self.biases == "qkv":
            return not any(bias.any() for bias in output_biases(state).values())
        return self.biases == "qkvo"


def output_biases(state: State) -> State:
    """The biases of the output projections of the attention."""
    return {name: bias for name, bias in state.items() if name.endswith("self_attn.o_proj.bias")}


def without(state: State, unwanted: State) -> State:
    """`state` without the entries of `unwanted`."""
    return {name: weight for name, weight in state.items() if name not in unwanted}


def renamed(state: State, names: dict[str, str]) -> State:
    """`state` with the parts of its names replaced according to `names`."""
    return {".".join(names.get(part, part) for part in name.split(".")): weight for name, weight in state.items()}


def _shared(config: DepthLMConfig, *more: str, **others: Any) -> dict[str, Any]:
    return {name: getattr(config, name) for name in (*SHARED_SETTINGS, *more)} | others


def _some_sliding(config: DepthLMConfig) -> dict[str, Any]:
    return {
        "use_sliding_window": config.sliding_window is not None,
        "sliding_window": config.sliding_window,
        "layer_types": list(config.layer_types or []),
    }


def _routing(config: DepthLMConfig) -> dict[str, Any]:
    names = ("num_experts_per_tok", "router_aux_loss_coef", "output_router_logits")
    return {name: getattr(config, name) for name in names}


def _qwen_moe(config: DepthLMConfig, **others: Any) -> dict[str, Any]:
    dense = sorted(set(range(config.num_hidden_layers)) - set(config.moe_layer_indices))
    names = ("num_experts", "moe_intermediate_size", "norm_topk_prob")
    return _shared(config, *names, **_routing(config), decoder_sparse_step=1, mlp_only_layers=dense, **others)


def _qwen2_weights(state: State, config: DepthLMConfig) -> State:
    """Remove the biases of the output projection, and add biases of zero to other projections without biases."""
    state = without(state, output_biases(state))
    for name in [name for name in state if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))]:
        state.setdefault(name.replace(".weight", ".bias"), state[name].new_zeros(state[name].shape[0]))
    return state


def _qwen2_moe_weights(state: State, config: DepthLMConfig) -> State:
    """Add a gate of zeros, which weighs the shared expert by sigmoid(0) = 1/2, and double its output to compensate."""
    state = without(state, output_biases(state))
    for layer in config.moe_layer_indices:
        prefix = f"model.layers.{layer}.mlp."
        like = state[prefix + "gate.weight"]
        state[prefix + "shared_expert_gate.weight"] = like.new_zeros(1, config.hidden_size)
        if config.shared_expert_intermediate_size is None:
            for part, shape in _shared_expert_shapes(_EMPTY_SHARED_WIDTH, config.hidden_size).items():
                state[f"{prefix}shared_expert.{part}.weight"] = like.new_zeros(shape)
        else:
            state[prefix + "shared_expert.down_proj.weight"] = state[prefix + "shared_expert.down_proj.weight"] * 2
    return state


def _shared_expert_shapes(width: int, hidden: int) -> dict[str, tuple[int, int]]:
    return {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}


# The simplest and most widely supported first: a model gets the first form that can express it.
FORMS = (
    Form(
        "llama",
        "Llama",
        lambda config: _shared(config, "head_dim", "attention_bias", "mlp_bias"),
        biases="qkvo",
        mlp_biases=True,
    ),
    Form("mistral", "Mistral", lambda config: _shared(config, "head_dim", "sliding_window"), sliding="all"),
    Form(
        "qwen2",
        "Qwen2",
        lambda config: _shared(config, **_some_sliding(config)),
        _qwen2_weights,
        sliding="some",
        biases="qkv",
        head_dim=False,
    ),
    Form(
        "qwen3",
        "Qwen3",
        lambda config: _shared(config, "head_dim", "attention_bias", **_some_sliding(config)),
        qk_norm="head",
        sliding="some",
        biases="qkvo",
    ),
    Form(
        "olmo2",
        "OLMo 2",
        lambda config: _shared(config, "attention_bias"),
        lambda state, config: renamed(state, OUTPUT_NORMS),
        norm_placement="output",
        qk_norm="full",
        biases="qkvo",
        head_dim=False,
    ),
    Form(
        "mixtral",
        "Mixtral",
        lambda config: _shared(
            config,
            "head_dim",
            "sliding_window",
            **_routing(config),
            intermediate_size=config.moe_intermediate_size,
            num_local_experts=config.num_experts,
        ),
        experts="all",
        sliding="all",
        raw_routing=False,
    ),
    Form(
        "olmoe",
        "OLMoE",
        lambda config: _shared(
            config,
            "num_experts",
            "norm_topk_prob",
            "attention_bias",
            **_routing(config),
            intermediate_size=config.moe_intermediate_size,
        ),
        qk_norm="full",
        experts="all",
        biases="qkvo",
        head_dim=False,
    ),
    Form(
        "qwen3_moe",
        "Qwen3-MoE",
        lambda config: _qwen_moe(config, head_dim=config.head_dim, attention_bias=config.attention_bias),
        qk_norm="head",
        experts="some",
        biases="qkvo",
    ),
    Form(
        "qwen2_moe",
        "Qwen2-MoE",
        lambda config: _qwen_moe(
            config,
            qkv_bias=config.attention_bias,
            shared_expert_intermediate_size=config.shared_expert_intermediate_size or _EMPTY_SHARED_WIDTH,
        ),
        _qwen2_moe_weights,
        experts="some",
        biases="qkv",
        head_dim=False,
        shared_expert=True,
    ),
)


def exactly_scaled(weight: Tensor, factor: float) -> Tensor | None:
    """`weight * factor` in the weight's dtype; None if a dtype of low precision would round it."""
    exact = weight.double() * factor
    scaled = exact.to(weight.dtype)
    if weight.dtype in (torch.float32, torch.float64) or torch.equal(scaled.double(), exact):
        return scaled
    return None
