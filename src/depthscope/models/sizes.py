"""How large a model is and what it costs to train, counted from the model itself (built on `meta`: no memory)."""

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

__all__ = ["ModelSize", "model_size"]

_EXPERT_WEIGHTS = ("experts.gate_up_proj", "experts.down_proj")


@dataclass(frozen=True)
class ModelSize:
    """Numbers of parameters, and floating-point operations.

    `active` parameters are those that one token meets: all but the experts that its routers do not choose.
    `training_flops_per_token` are those of forward and backward, a multiplication and an addition counted as two: 6 for
    each active parameter of a matrix product (the input embedding is none), and 12 for each feature of each head and
    each position that a token attends to, on average over a sequence of `sequence_length` tokens. The backward pass
    counts twice the forward pass; what checkpointing computes again does not count.
    """

    total: int
    active: int
    training_flops_per_token: int
    sequence_length: int


def model_size(config: PreTrainedConfig, sequence_length: int | None = None) -> ModelSize:
    """Count the parameters and training FLOPs of the model that `config` describes.

    Takes a [`DepthLMConfig`] or the configuration of a model with the same attention and experts (Llama, OLMoE, ...).

    Args:
        config: what to build.
        sequence_length: tokens in a training sequence; `max_position_embeddings` by default.
    """
    length = sequence_length or config.max_position_embeddings
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    total = active = multiplied = 0
    embedding = model.get_input_embeddings().weight
    for name, parameter in model.named_parameters():
        used = parameter.numel()
        if name.endswith(_EXPERT_WEIGHTS):
            used = used * config.num_experts_per_tok // parameter.shape[0]
        total += parameter.numel()
        active += used
        # A tied embedding is multiplied once, as the head.
        if parameter.dim() > 1 and (parameter is not embedding or config.tie_word_embeddings):
            multiplied += used
    return ModelSize(total, active, round(6 * multiplied + _attention_flops(config, length)), length)


def _attention_flops(config: PreTrainedConfig, length: int) -> float:
    """Training FLOPs a token of the products of queries and keys, and of probabilities and values."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    attended = sum(_mean_attended(length, config.sliding_window if "sliding" in kind else None) for kind in kinds)
    return 12 * config.num_attention_heads * head_dim * attended


def _mean_attended(length: int, window: int | None) -> float:
    """The number of positions that a token attends to, itself included, on average over a causal sequence."""
    if window is None or window >= length:
        return (length + 1) / 2
    return (window * (window + 1) / 2 + (length - window) * window) / length
