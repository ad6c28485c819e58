"""Tiny DepthLMs of every kind, built in milliseconds, and the same network written out in plain tensor operations."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from depthscope.models import DepthLMConfig, DepthLMForCausalLM

# The vocabulary is even, because older releases of transformers split it evenly for tensor parallelism.
HIDDEN, LAYERS, VOCABULARY = 32, 4, 96


def tiny_config(**changes: object) -> DepthLMConfig:
    """A dense multi-head model, with `changes`; its weights are large enough that every layer matters."""
    return DepthLMConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": HIDDEN,
            "intermediate_size": 48,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "initializer_range": 0.2,
            "pad_token_id": 0,
            "bos_token_id": 1,
            **changes,
        }
    )


_MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

# Every way in which two DepthLMs can differ in what they compute, each under a name.
KINDS: dict[str, Callable[..., DepthLMConfig]] = {
    "dense": tiny_config,
    "gqa": partial(tiny_config, num_key_value_heads=2),
    "mqa": partial(tiny_config, num_key_value_heads=1),
    "qk_norm_head": partial(tiny_config, num_key_value_heads=2, qk_norm="head"),
    "qk_norm_full": partial(tiny_config, num_key_value_heads=2, qk_norm="full"),
    "sliding": partial(tiny_config, sliding_window=5, layer_types=["sliding_attention", "full_attention"] * 2),
    "moe": partial(tiny_config, **_MOE),
    "moe_shared": partial(
        tiny_config,
        **_MOE,
        shared_expert_intermediate_size=24,
        moe_layers=2,
        norm_topk_prob=True,
        num_key_value_heads=2,
    ),
    "peri": partial(tiny_config, norm_placement="peri"),
    "post": partial(tiny_config, norm_placement="post"),
    "mix": partial(tiny_config, norm_placement="mix"),
    "output": partial(tiny_config, norm_placement="output"),
    "scaled_pre": partial(tiny_config, norm_scaling="depth"),
    "scaled_peri": partial(tiny_config, norm_scaling="depth", norm_placement="peri"),
    "tied": partial(tiny_config, tie_word_embeddings=True),
}
MOE_KINDS = ("moe", "moe_shared")


def tiny_depthlm(kind: str = "dense", seed: int = 0, **changes: object) -> DepthLMForCausalLM:
    """A model of one of the KINDS in evaluation mode, with norm weights that differ from 1 and from one another."""
    torch.manual_seed(seed)
    model = DepthLMForCausalLM(KINDS[kind](**changes)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.add_(0.2 * torch.randn_like(weight))
    return model


def random_ids(rows: int, length: int, seed: int = 0) -> Tensor:
    """Token ids [rows, length], none of them a special one."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def expert_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers that have a router."""
    return [layer for layer in model.model.layers if hasattr(layer.mlp, "gate")]


def naive_logits(model: DepthLMForCausalLM, ids: Tensor) -> Tensor:
    """Logits [T, vocabulary] of one sequence [T], in float64, one token, head and expert at a time."""
    config = model.config
    weights = {name: weight.detach().double() for name, weight in model.state_dict().items()}
    stream = weights["model.embed_tokens.weight"][ids]
    for index in range(config.num_hidden_layers):
        layer = {
            name.split(".", 3)[3]: weight
            for name, weight in weights.items()
            if name.startswith(f"model.layers.{index}.")
        }
        stream = _naive_layer(config, layer, index, stream)
    return _rms_norm(config, stream, weights["model.norm.weight"]) @ weights["lm_head.weight"].T


def _naive_layer(config: DepthLMConfig, layer: dict[str, Tensor], index: int, stream: Tensor) -> Tensor:
    placement = config.norm_placement
    if placement == "mix":
        placement = "post" if index < config.num_hidden_layers // 4 else "pre"
    factor = 1 / math.sqrt(index + 1) if config.norm_scaling == "depth" else 1.0
    attention = partial(_naive_attention, config, layer, config.layer_types[index])
    has_experts = "mlp.gate.weight" in layer
    mlp = partial(_naive_experts, config, layer) if has_experts else partial(_gated_mlp, layer, "mlp")
    for sublayer, before, output, after in (
        (attention, "input_layernorm", "attention_output_layernorm", "attention_sum_layernorm"),
        (mlp, "post_attention_layernorm", "mlp_output_layernorm", "mlp_sum_layernorm"),
    ):
        written = stream
        if placement in ("pre", "peri"):
            written = _rms_norm(config, written, layer[f"{before}.weight"]) * factor
        written = sublayer(written)
        if placement in ("peri", "output"):
            written = _rms_norm(config, written, layer[f"{output}.weight"])
        stream = stream + written
        if placement == "post":
            stream = _rms_norm(config, stream, layer[f"{after}.weight"])
    return stream


def _rms_norm(config: DepthLMConfig, values: Tensor, weight: Tensor) -> Tensor:
    return values / torch.sqrt((values**2).mean(-1, keepdim=True) + config.rms_norm_eps) * weight


def _naive_attention(config: DepthLMConfig, layer: dict[str, Tensor], kind: str, values: Tensor) -> Tensor:
    length, width = len(values), config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    query, key, value = (values @ layer[f"self_attn.{name}_proj.weight"].T for name in ("q", "k", "v"))
    if config.qk_norm == "full":
        query = _rms_norm(config, query, layer["self_attn.q_norm.weight"])
        key = _rms_norm(config, key, layer["self_attn.k_norm.weight"])
    written = torch.zeros_like(query)
    for head in range(heads):
        kv_head = head * kv_heads // heads
        q = query[:, head * width : (head + 1) * width]
        k = key[:, kv_head * width : (kv_head + 1) * width]
        v = value[:, kv_head * width : (kv_head + 1) * width]
        if config.qk_norm == "head":
            q = _rms_norm(config, q, layer["self_attn.q_norm.weight"])
            k = _rms_norm(config, k, layer["self_attn.k_norm.weight"])
        q, k = _rotated(config, q), _rotated(config, k)
        for here in range(length):
            first = max(0, here - config.sliding_window + 1) if kind == "sliding_attention" else 0
            seen = range(first, here + 1)
            scores = torch.stack([q[here] @ k[there] / math.sqrt(width) for there in seen])
            shares = torch.exp(scores) / torch.exp(scores).sum()
            written[here, head * width : (head + 1) * width] = sum(
                share * v[there] for share, there in zip(shares, seen, strict=True)
            )
    return written @ layer["self_attn.o_proj.weight"].T


def _rotated(config: DepthLMConfig, values: Tensor) -> Tensor:
    """Turn feature i and feature i + width / 2 of the token at position p by the angle p * theta ** (-2 i / width)."""
    half = values.shape[-1] // 2
    turned = torch.empty_like(values)
    for position in range(len(values)):
        for i in range(half):
            angle = position * config.rope_parameters["rope_theta"] ** (-i / half)
            first, second = values[position, i], values[position, i + half]
            turned[position, i] = first * math.cos(angle) - second * math.sin(angle)
            turned[position, i + half] = second * math.cos(angle) + first * math.sin(angle)
    return turned


def _gated_mlp(layer: dict[str, Tensor], name: str, values: Tensor) -> Tensor:
    gate, up, down = (layer[f"{name}.{part}_proj.weight"] for part in ("gate", "up", "down"))
    return _swiglu(values, gate, up, down)


def _swiglu(values: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    opening = values @ gate.T
    return (opening / (1 + torch.exp(-opening)) * (values @ up.T)) @ down.T


def _naive_experts(config: DepthLMConfig, layer: dict[str, Tensor], values: Tensor) -> Tensor:
    written = torch.zeros_like(values)
    for token, value in enumerate(values):
        odds = torch.exp(layer["mlp.gate.weight"] @ value)
        shares = (odds / odds.sum()).tolist()
        chosen = sorted(range(config.num_experts), key=lambda expert: -shares[expert])[: config.num_experts_per_tok]
        total = sum(shares[expert] for expert in chosen) if config.norm_topk_prob else 1.0
        for expert in chosen:
            gate, up = layer["mlp.experts.gate_up_proj"][expert].chunk(2)
            down = layer["mlp.experts.down_proj"][expert]
            written[token] += shares[expert] / total * _swiglu(value, gate, up, down)
        if config.shared_expert_intermediate_size is not None:
            written[token] += _gated_mlp(layer, "mlp.shared_expert", value)
    return written
