"""The defaults of `DepthLMConfig` as a table, for code that must not import torch or transformers.

Settings without a default, such as `head_dim`, are not listed. A test compares the table with the class.
"""

__all__ = ["DEFAULTS"]

DEFAULTS: dict[str, str | int | float | bool] = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "num_experts_per_tok": 8,
    "moe_layers": "all",
    "norm_topk_prob": False,
    "router_aux_loss_coef": 0.01,
    "router_z_loss_coef": 0.001,
    "norm_placement": "pre",
    "norm_scaling": "none",
    "depth_scaled_init": False,
}
