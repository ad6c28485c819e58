"""Named shapes of DepthLM: the paper's (arXiv 2603.15389) and small ones that train on a laptop.

`docs/presets.md` lists their parameters and FLOPs, counted from the models themselves.
"""

from typing import Any

_PAPER: dict[str, Any] = {
    "vocab_size": 50304,
    "max_position_embeddings": 4096,
    "num_hidden_layers": 16,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
}
_PAPER_MOE: dict[str, Any] = {**_PAPER, "router_aux_loss_coef": 0.01, "router_z_loss_coef": 0.001}
_SMALL: dict[str, Any] = {"max_position_embeddings": 2048}

PRESETS: dict[str, dict[str, Any]] = {
    # The depth sweep is this shape at 12, 16, 24 and 32 layers: from_preset("dense-1b", num_hidden_layers=32).
    "dense-1b": {**_PAPER, "hidden_size": 2048, "num_attention_heads": 16, "intermediate_size": 8192},
    # The released file has 4608, the width before SwiGLU halves it.
    "dense-400m": {**_PAPER, "hidden_size": 1536, "num_attention_heads": 12, "intermediate_size": 2304},
    "moe-7b-1b": {
        **_PAPER_MOE,
        "hidden_size": 2048,
        "num_attention_heads": 16,
        "intermediate_size": 1024,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 1024,
    },
    "moe-2b-400m": {
        **_PAPER_MOE,
        "hidden_size": 768,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1536,
        "shared_expert_intermediate_size": 1536,
    },
    # Depth, long context, groups of two heads and experts; the weight decay (0.3) is set in the training.
    "recipe": {
        **_PAPER_MOE,
        "hidden_size": 1120,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "num_hidden_layers": 32,
        "intermediate_size": 1120,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 1120,
    },
    "dense-2m": {
        **_SMALL,
        "vocab_size": 4096,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "num_hidden_layers": 6,
        "intermediate_size": 352,
    },
    "dense-10m": {
        **_SMALL,
        "vocab_size": 8192,
        "hidden_size": 256,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "num_hidden_layers": 8,
        "intermediate_size": 704,
    },
    "dense-30m": {
        **_SMALL,
        "vocab_size": 8192,
        "hidden_size": 384,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "num_hidden_layers": 16,
        "intermediate_size": 1024,
    },
    "moe-4m": {
        **_SMALL,
        "vocab_size": 4096,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "num_hidden_layers": 6,
        "intermediate_size": 352,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 144,
    },
    "moe-30m": {
        **_SMALL,
        "vocab_size": 8192,
        "hidden_size": 256,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "num_hidden_layers": 8,
        "intermediate_size": 704,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 256,
    },
}

__all__ = ["PRESETS"]
