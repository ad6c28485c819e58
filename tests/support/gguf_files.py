"""transformers' models as GGUF files, written as llama.cpp's converter writes them: its names, its order of rows."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from torch import nn

ARCHITECTURES = {
    **{"llama": "llama", "mixtral": "llama", "qwen2": "qwen2", "qwen2_moe": "qwen2moe", "qwen3": "qwen3"},
    **{"qwen3_moe": "qwen3moe", "gemma2": "gemma2", "gemma3_text": "gemma3", "phi3": "phi3", "stablelm": "stablelm"},
    **{"starcoder2": "starcoder2", "nemotron": "nemotron", "falcon": "falcon", "bloom": "bloom", "gpt2": "gpt2"},
    **{"mamba": "mamba", "lfm2": "lfm2", "qwen3_5_text": "qwen35"},
}
# A setting's name in GGUF -> what configs call it.
SETTINGS = {
    "block_count": ("num_hidden_layers", "n_layer"),
    "context_length": ("max_position_embeddings", "n_positions", "seq_length"),
    "embedding_length": ("hidden_size", "n_embd"),
    "feed_forward_length": ("n_inner", "intermediate_size"),
    "attention.head_count": ("num_attention_heads", "n_head"),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.key_length": ("head_dim",),
    "attention.value_length": ("head_dim",),
    "attention.sliding_window": ("sliding_window",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "norm_epsilon", "layer_norm_epsilon", "norm_eps"),
    "vocab_size": ("vocab_size",),
    "expert_count": ("num_experts", "num_local_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "ssm.conv_kernel": ("conv_kernel",),
    "ssm.inner_size": ("intermediate_size",),
    "ssm.state_size": ("state_size",),
    "ssm.time_step_rank": ("time_step_rank",),
    "shortconv.l_cache": ("conv_L_cache",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
}
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = ["\u2581", "t", "h", "e", "a", "n", "th", "the", "\u2581the", "an", "\u2581a", "\u2581an"]


def write_gguf(
    path: Path,
    model: nn.Module,
    settings: Mapping[str, Any] | None = None,
    *,
    tensors: Mapping[str, np.ndarray | None] | None = None,
    kinds: Mapping[str, GGMLQuantizationType] | None = None,
    tokens: str | None = None,
    together: int = 0,
) -> Path:
    """Write a model as GGUF.

    Args:
        path: the file.
        model: one of `ARCHITECTURES`.
        settings: of the architecture, beside or instead of what the config says ("rope.freq_base": 1e6); None leaves
            one out. A name with a prefix of its own ("general.name") is taken as it is.
        tensors: further ones, or others in a tensor's place; None leaves one out.
        kinds: how some tensors are quantised.
        tokens: the kind of a small tokenizer: "llama" or "gpt2".
        together: how many tensors go into each part of a file that is split; the path of the first part is given back.
    """
    architecture = ARCHITECTURES[model.config.model_type]
    writer = GGUFWriter(str(path), architecture, split_max_tensors=together)
    for name, value in (_settings(model.config) | dict(settings or {})).items():
        if value is not None:
            _add_setting(writer, name if name.startswith(("general.", "split.")) else f"{architecture}.{name}", value)
    if tokens:
        _add_tokens(writer, tokens, model.config.vocab_size)
    for name, value in (dict(_tensors(model, architecture)) | dict(tensors or {})).items():
        if value is not None:
            _add_tensor(writer, name, value, (kinds or {}).get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return min(path.parent.glob(f"{path.stem}-00001-of-*.gguf")) if together else path


def _settings(config: Any) -> dict[str, Any]:
    found = {}
    for name, candidates in SETTINGS.items():
        value = next((getattr(config, field) for field in candidates if getattr(config, field, None) is not None), None)
        if value is not None:
            found[name] = value
    if config.model_type == "lfm2":
        kinds = config.layer_types
        found["attention.head_count_kv"] = [
            config.num_key_value_heads if kind == "full_attention" else 0 for kind in kinds
        ]
    if config.model_type == "qwen3_5_text":
        found |= {"ssm.conv_kernel": config.linear_conv_kernel_dim, "ssm.state_size": config.linear_key_head_dim}
        found |= {"ssm.group_count": config.linear_num_key_heads, "ssm.time_step_rank": config.linear_num_value_heads}
        found |= {"ssm.inner_size": config.linear_num_value_heads * config.linear_value_head_dim}
        found |= {
            "full_attention_interval": 2,
            "rope.dimension_sections": [*config.rope_parameters["mrope_section"], 0],
        }
    if config.model_type in ("lfm2", "mamba"):  # RMS norms under another name
        found["attention.layer_norm_rms_epsilon"] = found.pop("attention.layer_norm_epsilon")
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    if "rope_theta" in rope:
        found["rope.freq_base"] = float(rope["rope_theta"])
        width = found.get("attention.key_length") or config.hidden_size // config.num_attention_heads
        found["rope.dimension_count"] = int(width * (rope.get("partial_rotary_factor") or 1.0))
    return found


def _add_setting(writer: GGUFWriter, name: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    else:
        writer.add_array(name, value)


def _add_tokens(writer: GGUFWriter, kind: str, count: int) -> None:
    special = ["<unk>", "<s>", "</s>"]
    if kind == "llama":
        listed = (special + BYTES + WORDS + [f"<extra{index}>" for index in range(count)])[:count]
        writer.add_token_scores([-float(index) for index in range(count)])
        writer.add_token_types(([3] * 3 + [6] * 256 + [1] * count)[:count])
    else:
        letters = [chr(code) for code in range(33, 127)] + ["\u0120"]
        listed = (special + letters + ["th", "the", "\u0120the"] + [f"\u0120{index}" for index in range(count)])[:count]
        writer.add_token_merges(["t h", "th e", "\u0120 the"])
        writer.add_token_types(([3] * 3 + [1] * count)[:count])
    writer.add_tokenizer_model(kind)
    writer.add_token_list(listed)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def _tensors(model: nn.Module, architecture: str) -> Iterator[tuple[str, np.ndarray]]:
    config: Any = model.config
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    tied = getattr(config, "tie_word_embeddings", False)
    for full, tensor in model.state_dict().items():
        value, (name, suffix) = tensor.float().numpy(), _parted(full.replace(".dt_bias", ".dt_proj.bias"))
        if tied and name == "lm_head":
            continue
        if name.endswith("experts.down_proj"):
            suffix = ".weight"
        if name.endswith("experts.gate_up_proj"):
            gate, up = np.split(value, 2, axis=1)
            layer = name.split(".")[2]
            yield f"blk.{layer}.ffn_gate_exps.weight", gate
            yield f"blk.{layer}.ffn_up_exps.weight", up
            continue
        found = names.get_name(name) or names.get_name(name.removeprefix("transformer."))
        assert found is not None, full
        yield found + suffix, _as_llama_cpp(value, full, architecture, config)


def _parted(full: str) -> tuple[str, str]:
    name, dot, suffix = full.rpartition(".")
    return (name, dot + suffix) if suffix in ("weight", "bias") else (full, "")


def _as_llama_cpp(value: np.ndarray, name: str, architecture: str, config: Any) -> np.ndarray:
    """Undo what the architecture's converter does (conversion/*.py in llama.cpp)."""
    if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        return value.reshape(heads, 2, -1, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
    offset = architecture in ("gemma2", "gemma3", "nemotron", "qwen35") and "linear_attn" not in name
    if offset and name.endswith(("norm.weight", "layernorm.weight")):
        return value + 1
    if architecture == "gpt2" and value.ndim == 2 and "c_" in name:
        return value.T.copy()
    if architecture == "bloom" and "query_key_value" in name:
        split = value.reshape(config.n_head, 3, -1, *value.shape[1:])
        return split.swapaxes(0, 1).reshape(value.shape)
    if name.endswith("A_log"):
        return -np.exp(value)
    if name.endswith(("conv1d.weight", "conv.conv.weight")):
        return value.squeeze(1)
    if name.endswith("shared_expert_gate.weight"):
        return value.squeeze(0)
    return value


def _add_tensor(writer: GGUFWriter, name: str, value: np.ndarray, kind: GGMLQuantizationType | None) -> None:
    if kind is None:
        writer.add_tensor(name, np.ascontiguousarray(value, np.float32))
    else:
        writer.add_tensor(name, packed(value.shape, kind) if value.dtype != np.uint8 else value, raw_dtype=kind)


def packed(shape: tuple[int, ...], kind: GGMLQuantizationType, seed: int = 0) -> np.ndarray:
    """Random blocks of any type, all of whose scales are finite (gguf quantises only some types itself)."""
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    bytes_ = np.random.default_rng(seed).integers(0, 256, (*shape[:-1], shape[-1] // elements, size), np.uint8)
    # Any byte of an odd place may be the upper one of a float16: this keeps its exponent low.
    bytes_[..., 1::2] &= 0x2F
    return bytes_.reshape(*shape[:-1], -1)


def logits(model: nn.Module, length: int = 24) -> torch.Tensor:
    """The logits of some tokens."""
    with torch.no_grad():
        ids = torch.arange(length).unsqueeze(0) * 7 % model.config.vocab_size
        return model(ids, use_cache=False).logits
