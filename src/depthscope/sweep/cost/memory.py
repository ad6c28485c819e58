"""An estimate of the GPU memory for training a point. A tenth of the memory should stay free.

Weights, gradients and the two moments of AdamW are float32, 16 bytes per parameter; FSDP shards them. Activations are
counted as in Korthikanti et al. (arXiv 2205.05198, section 4.1): every tensor that an operation stores for its backward
pass. For a DepthLM, one token in a dense layer of width d with H query heads and K key and value heads of h features,
and an MLP of width I, needs in bytes with bfloat16 autocast

    16 d           inputs and outputs of the two norms, float32
    10 d           inputs of the projections of queries, keys, values, gate and up, one copy each
    4 h (H + K)    queries, keys, values, and the output of attention
    8 I            gate, its activation, up, and their product

Under FSDP weights and residual stream are bfloat16, without copies: 16 d instead of 26 d. Each of the k experts of a
token stores its input, its output and 4 I, in the dtype of its weights, which autocast does not change. Fused attention
stores no matrix of probabilities; "eager" attention stores 6 H T bytes. With checkpointing each layer stores its input,
and one layer at a time the rest. The loss needs 10 bytes per entry of the vocabulary: log-probabilities, their
gradient, and the gradient of the logits.
"""

from dataclasses import dataclass

from depthscope.models import DepthLMConfig
from depthscope.models.sizes import layer_sizes
from depthscope.sweep.specification import Training

__all__ = ["Memory", "activation_bytes", "needed_memory"]

FLOAT32, BFLOAT16 = 4, 2


@dataclass(frozen=True)
class Memory:
    """The peak memory of one GPU in bytes, by use.

    Attributes:
        weights: weights in float32.
        gradients: gradients in float32.
        optimizer: the two moments of AdamW in float32.
        copies: weights in the precision of the matrix products: of all matrices, or with FSDP those gathered at one
            time (embedding and head, a layer, and the next), with their gradients.
        activations: the tensors for the backward pass of one micro-batch, and its loss.
    """

    weights: float
    gradients: float
    optimizer: float
    copies: float
    activations: float

    @property
    def total(self) -> float:
        """The sum of all uses."""
        return self.weights + self.gradients + self.optimizer + self.copies + self.activations


def needed_memory(config: DepthLMConfig, training: Training, gpus: int, sequences: int) -> Memory:
    """The memory on each of `gpus` GPUs, for micro-batches of `sequences` sequences."""
    sizes = layer_sizes(config)
    kinds = ((sizes.dense.total, sizes.dense_layers), (sizes.moe.total, sizes.moe_layers))
    rest = sizes.rest.total
    total = rest + sum(each * layers for each, layers in kinds)
    share = total / gpus if training.fsdp else float(total)
    size = _product_bytes(training)
    if training.fsdp:
        copies = size * (2 * rest + 3 * max(each for each, _ in kinds))
    elif size == FLOAT32:
        copies = 0
    else:
        copies = size * (total - config.vocab_size * config.hidden_size - _expert_parameters(config))
    tokens = sequences * training.sequence_length
    return Memory(
        FLOAT32 * share,
        FLOAT32 * share,
        2 * FLOAT32 * share,
        float(copies),
        tokens * (activation_bytes(config, training) + (8 + size) * config.vocab_size),
    )


def activation_bytes(config: DepthLMConfig, training: Training) -> float:
    """The bytes that all layers and the last norm store per token of a micro-batch."""
    moe = len(config.moe_layer_indices)
    counts = ((False, config.num_hidden_layers - moe), (True, moe))
    kinds = [(_layer_bytes(config, training, has_experts), layers) for has_experts, layers in counts if layers]
    width, size = config.hidden_size, _product_bytes(training)
    stream = FLOAT32 if not training.fsdp else size
    if training.gradient_checkpointing:
        stored = config.num_hidden_layers * stream * width + max(each for each, _ in kinds)
    else:
        stored = sum(each * layers for each, layers in kinds)
    return stored + (8 + size) * width


def _layer_bytes(config: DepthLMConfig, training: Training, has_experts: bool) -> float:
    width, heads, head_dim = config.hidden_size, config.num_attention_heads, config.head_dim
    kv_heads, size = config.num_key_value_heads, _product_bytes(training)
    assert kv_heads is not None
    assert head_dim is not None
    norms = 4 if config.norm_placement == "peri" else 2
    shared = config.shared_expert_intermediate_size if has_experts else None
    # With FSDP all weights are in the precision of the products, so a common input is stored once.
    projections = 3 + (1 if has_experts else 2) + (2 if shared is not None else 0)
    entering = projections if size == BFLOAT16 and not training.fsdp else 2
    stored = (norms * (FLOAT32 + (size if training.fsdp else FLOAT32)) + entering * size) * width
    stored += 2 * size * head_dim * (heads + kv_heads)
    if training.attention == "eager":
        # Probabilities in float32 and in the precision of the products, and keys and values for every head.
        stored += (FLOAT32 + BFLOAT16) * heads * training.sequence_length + 2 * size * head_dim * (heads - kv_heads)
    if not has_experts:
        return stored + 4 * size * config.intermediate_size
    expert = config.moe_intermediate_size
    assert expert is not None
    item = size if training.fsdp else FLOAT32
    stored += item * config.num_experts_per_tok * (2 * width + 4 * expert)
    return stored if shared is None else stored + 4 * size * shared


def _product_bytes(training: Training) -> int:
    """The bytes of a number in matrix products; "auto" is bfloat16 on every known GPU."""
    return FLOAT32 if training.precision == "float32" else BFLOAT16


def _expert_parameters(config: DepthLMConfig) -> int:
    if config.num_experts is None or config.moe_intermediate_size is None:
        return 0
    per_expert = 3 * config.hidden_size * config.moe_intermediate_size
    return len(config.moe_layer_indices) * config.num_experts * per_expert
