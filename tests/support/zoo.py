"""Tiny random models of every decoder-only model type that transformers maps to a causal language model.

A configuration is shrunk by the names of its fields (`SIZES`), nested configurations included. What those rules cannot
know of a model type stands in `OVERRIDES`, with the reason beside it. Weights are random, and large enough for every
layer to matter.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

VOCAB_SIZE = 128
WEIGHT_STD = 0.2  # about 1 / sqrt(32): the library's 0.02 suits a hidden size of thousands, here layers would do little

# What fields are called, by the size they get.
NAMES_BY_SIZE: dict[int, str] = {
    VOCAB_SIZE: """
        vocab_size unpadded_vocab_size vocab_size_per_layer_input audio_vocab_size encoder_hash_byte_group_vocab
        max_position_embeddings n_positions n_ctx max_seq_len context_length model_max_length
    """,
    64: """
        intermediate_size intermediate_size_mlp dense_intermediate_size shared_intermediate_size ffn_hidden_size ffn_dim
        dff dim_ff d_inner mamba_d_ssm
    """,
    32: """
        hidden_size n_embd d_model embedding_dim word_embed_proj_dim lru_width dim_model_base hidden_size_global
        router_hidden_size adapter_in_dim adapter_out_dim adapter_input_size
    """,
    16: """
        moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size shared_experts_intermediate_size
        moe_shared_expert_intermediate_size hidden_size_per_layer_input block_multiple_of index_head_dim global_head_dim
        mamba_d_head mamba_head_dim mamba_headdim
        index_n_heads q_lora_rank kv_lora_rank o_lora_rank hc_lowrank laurel_rank adapter_rank gated_norm_rank
    """,
    8: """
        head_dim dim_head d_head kv_channels swa_head_dim v_head_dim qk_rope_head_dim qk_nope_head_dim rotary_dim
        query_pre_attn_scalar linear_head_dim linear_key_head_dim linear_value_head_dim
        state_size ssm_state_size mamba_d_state
    """,
    4: """
        num_attention_heads n_head n_heads attention_heads num_heads swa_num_attention_heads
        num_attention_heads_per_layer mamba_n_heads mamba_num_heads linear_num_value_heads linear_num_heads o_groups
        num_experts num_local_experts n_routed_experts moe_num_experts zero_expert_num
        time_step_rank mamba_dt_rank prompt_length
    """,
    2: """
        num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads linear_num_key_heads
        n_groups mamba_n_groups mamba_ngroups num_experts_per_tok num_experts_per_token moe_k moe_topk moe_top_k
        top_k_experts
    """,
    1: """
        n_group num_expert_group topk_group first_k_dense_replace num_dense_layers
        n_shared_experts num_shared_experts moe_num_shared_experts
    """,
}
# Shorter than the sequences of a test, so that windows, chunks, selections and blocks of layers come into play.
NAMES_BY_EXTENT: dict[int, str] = {
    8: """
        sliding_window sliding_window_size attention_window_size window_size local_attention attention_chunk_size
        local_attention_window_len keep_window_size rel_extent
    """,
    4: "index_topk chunk_size mamba_chunk_size block_size index_block_size",
    2: "index_topk_blocks n_layers_per_attn_res_block rescale_every",
}
SIZES: dict[str, int | float] = {
    **{
        name: size
        for table in (NAMES_BY_SIZE, NAMES_BY_EXTENT)
        for size, names in table.items()
        for name in names.split()
    },
    **dict.fromkeys(("initializer_range", "init_std"), WEIGHT_STD),
    **dict.fromkeys(("logit_scale", "logits_mup_width_multiplier"), 1.0),
}
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks", "depth")
SPECIAL_IDS = ("_token_id", "_token_index")


def cycling(*kinds: Any) -> Callable[[int], list[Any]]:
    """A list with one entry a layer that goes round `kinds`."""
    return lambda num_layers: [kinds[layer % len(kinds)] for layer in range(num_layers)]


MIXED_ROTATIONS = {"rope_type": "default", "rope_theta": 10000.0}
TINY_EARS = {"encoder_attention_heads": 4, "encoder_layers": 2, "encoder_ffn_dim": 32}
ROTATE_BY_PLACE = (
    "glm4v_text",
    "glm_ocr_text",
    "paddleocr_vl_text",
    "qwen2_vl_text",
    "qwen2_5_vl_text",
    "qwen2_5_omni_text",
)

# By the model type of a configuration, nested ones included. A function is given the number of layers.
OVERRIDES: dict[str, dict[str, Any]] = {
    # The layers of these hybrids are all of one kind by default.
    "bamba": {"attn_layer_indices": lambda num_layers: list(range(1, num_layers, 2))},
    "granitemoehybrid": {"layer_types": cycling("linear_attention", "full_attention")},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": cycling("conv", "full_attention")},
    "lfm2_moe": {"layer_types": cycling("conv", "full_attention")},
    "minimax_m3_vl_text": {
        "layer_types": cycling("full_attention", "minimax_m3_sparse"),
        "index_n_heads": 2,  # one for each head of keys and values
    },
    # They write the kinds of their layers in another form than a list as long as the stack.
    "flint": {"mlp_only_layers": [0]},
    "gpt_neo": {"attention_types": lambda num_layers: [[[kind], 1] for kind in cycling("global", "local")(num_layers)]},
    "nemotron_h": {"layers_block_type": cycling("linear_attention", "moe", "full_attention", "mlp")},
    # The last layer reuses the keys and values of the one before it, which must be of the same kind.
    "gemma3n_text": {
        "layer_types": cycling("sliding_attention"),
        "num_kv_shared_layers": lambda num_layers: min(1, num_layers - 1),
    },
    # One layer, as in the released model: the patches and the decoder are where the depth is.
    "blt_local_encoder": {"num_hidden_layers": 1},
    # Sizes that depend on one another.
    "deepseek_v4": {
        "head_dim": 16,  # an eighth of it is rotated, in pairs
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
    },
    "mamba2": {"head_dim": 16},  # num_heads * head_dim must be expand * hidden_size
    "zaya": {"num_experts_per_tok": 1},  # it refuses any other
    # Options that are names of no field, or that the defaults leave out though the model cannot do without them.
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}},
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "gemma4_text": {"global_head_dim": 16, "enable_moe_block": True},
    "gemma4_unified_text": {"global_head_dim": 16},
    "qwen4_exp_text": {
        "indexer_n_heads": 16,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    # Models that also see or hear: their rotations are split between time, height and width.
    **{name: {"rope_parameters": MIXED_ROTATIONS | {"mrope_section": [2, 1, 1]}} for name in ROTATE_BY_PLACE},
    "glm4v_moe_text": {"rope_parameters": MIXED_ROTATIONS | {"partial_rotary_factor": 1.0, "mrope_section": [2, 1, 1]}},
    "qwen2_vl_vision": {"embed_dim": 32},
    "qwen2_audio_encoder": TINY_EARS,
    "qwen2_5_omni_audio_encoder": TINY_EARS | {"output_dim": 32},
}

NOT_BUILT: dict[str, str] = {
    "gemma3n": "its vision tower is made by the timm package; the decoder is that of gemma3n_text, which is built",
    "gemma4_assistant": "a drafter: it takes another model's hidden states, keys and values, not token ids",
    "gemma4_unified_assistant": "a drafter: it takes another model's hidden states, keys and values, not token ids",
}
NO_PLAIN_STACK: dict[str, str] = {
    "blt": "a byte encoder, a transformer over patches of bytes and a byte decoder follow each other, beside a patcher",
    "hrm_text": "two stacks of layers take turns, so each layer is called several times in a forward pass",
    "mllama": "some layers attend to an image, and are left out where there is none",
}
NOT_CAUSAL = {
    "cpmant": "a prompt stands before the tokens, which all see each other",
    "xlnet": "every token sees every other",
}


def decoder_only_types() -> list[str]:
    """Sorted model types of the causal-LM mapping that only decode: no encoder, and not a masked language model."""
    others = {
        *modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        *modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        "bert-generation",
        "trocr",
        "depthlm",  # ours, which importing depthscope enters there
    }
    candidates = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - others
    return sorted(name for name in candidates if not has_encoder(CONFIG_MAPPING[name]))


def has_encoder(config_class: type[PreTrainedConfig]) -> bool:
    """Whether a fresh configuration says so; that of a built model may not, since a decoder resets it."""
    try:
        return config_class().is_encoder_decoder
    except StrictDataclassClassValidationError:  # the defaults of gemma4_assistant break its own rules
        return config_class.is_encoder_decoder


def tiny_model(model_type: str, *, num_layers: int = 4, seed: int = 0) -> PreTrainedModel:
    """Build a random model in float32 and eval mode, with eager attention; the same seed gives the same weights."""
    config = tiny_config(CONFIG_MAPPING[model_type], num_layers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
        wake_idle_matrices(model)
    return model.eval()


@torch.no_grad()
def wake_idle_matrices(model: PreTrainedModel) -> None:
    """Draw anew the matrices that start at or near zero, and would leave routers, gates or MLPs without effect."""
    for parameter in model.parameters():
        if parameter.ndim > 1 and parameter.square().mean().sqrt() < WEIGHT_STD / 5:
            parameter.normal_(0.0, WEIGHT_STD)
    biased = ("correction_bias", "expert_bias", "balancing_biases")
    for name, bias in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith(biased):  # without them the chosen experts are those with the largest logits
            bias.normal_(0.0, WEIGHT_STD)
    for name, table in model.named_buffers():
        if name.endswith("tid2eid"):  # from token to experts: a released model has them here, a new one zeros
            size = getattr(model.config, "num_local_experts", 0)
            table.copy_(torch.stack([torch.randperm(size)[: table.shape[1]] for _ in table]))


def tiny_config(config_class: type[PreTrainedConfig], num_layers: int) -> PreTrainedConfig:
    """The default configuration of a class with tiny sizes in place of its own."""
    default = config_class()
    names = [field.name for field in dataclasses.fields(config_class)]
    arguments = {name: value for name in names for value in tiny_values(default, name, num_layers)}
    if "kv_lora_rank" in arguments:  # latent attention makes keys and values for every head
        arguments["num_key_value_heads"] = arguments["num_attention_heads"]
    for name, value in OVERRIDES.get(config_class.model_type, {}).items():
        arguments[name] = value(num_layers) if callable(value) else value
    return config_class(**arguments)


def tiny_values(default: PreTrainedConfig, name: str, num_layers: int) -> Iterator[Any]:
    """The tiny value of a field, or nothing where the default can stay."""
    value = vars(default).get(name)
    if isinstance(value, PreTrainedConfig):
        yield tiny_config(type(value), num_layers)
    elif name in LAYER_COUNTS and value is not None:
        yield num_layers
    elif name.endswith(SPECIAL_IDS) and value is not None:
        yield [tiny_id(token) for token in value] if isinstance(value, list) else tiny_id(value)
    elif isinstance(value, list) and len(value) == getattr(default, "num_hidden_layers", None):
        yield cycling(*([SIZES[name]] if name in SIZES else dict.fromkeys(value)))(num_layers)
    elif name in SIZES and (value is None or type(value) in (int, float)):
        yield SIZES[name]


def tiny_id(token: int) -> int:
    """A token id within the vocabulary: one beyond it moves into the last quarter."""
    return token if token < VOCAB_SIZE else VOCAB_SIZE - 1 - token % (VOCAB_SIZE // 4)


def example_ids(model: PreTrainedModel, batch: int = 2, length: int = 12, seed: int = 0) -> Tensor:
    """Random plain token ids, [batch, length]: none that the configuration gives a meaning (image, padding, end)."""
    special = set(special_ids(model.config))
    plain = torch.tensor([token for token in range(VOCAB_SIZE) if token not in special])
    generator = torch.Generator().manual_seed(seed)
    return plain[torch.randint(len(plain), (batch, length), generator=generator)]


def special_ids(config: PreTrainedConfig) -> Iterator[int]:
    """The token ids that a configuration names, nested configurations included."""
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from special_ids(value)
        elif name.endswith(SPECIAL_IDS) and value is not None:
            yield from value if isinstance(value, list) else [value]
