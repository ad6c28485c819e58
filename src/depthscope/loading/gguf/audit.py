"""Checks that a model loaded from a GGUF file is the one in the file: all tensors used, all relevant settings equal.

transformers silently leaves out tensors and settings that it has no place for. After loading, each tensor is looked up
among those of the model, and each setting of the architecture is compared with the model's. A difference that changes
the function is refused, one that cannot change it is ignored, and a note lists settings that are unknown here.
"""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from torch import nn
from transformers import PretrainedConfig

from depthscope.errors import ModelLoadError
from depthscope.loading.gguf.header import GgufHeader, GgufTensor
from depthscope.loading.gguf.rope import rope_differences
from depthscope.loading.gguf.settings import attention_scale, first_of, head_width, window_layers
from depthscope.wording.messages import listed

__all__ = ["audit_gguf", "complete_biases"]

# Settings that the shapes of the weights determine, that llama.cpp does not read, or that do not affect the function.
BY_SHAPE = frozenset(
    (
        *("vocab_size", "context_length", "embedding_length", "feed_forward_length", "tensor_data_layout"),
        *("expert_feed_forward_length", "expert_shared_feed_forward_length", "expert_shared_count"),
        *("use_parallel_residual", "pooling_type", "classifier.output_labels", "shortconv.l_cache"),
        *("ssm.conv_kernel", "ssm.inner_size", "ssm.state_size", "ssm.time_step_rank", "ssm.group_count"),
        *("embedding_length_per_layer_input", "full_attention_interval", "rope.scaling.finetuned"),
    )
)
# A setting -> its names in configs, and the values that mean that it has no effect.
SAME_IN_CONFIG: dict[str, tuple[tuple[str, ...], tuple[Any, ...]]] = {
    "attention.head_count": (("num_attention_heads", "n_head"), (0, None)),
    "attn_logit_softcapping": (("attn_logit_softcapping",), (0, None)),
    "final_logit_softcapping": (("final_logit_softcapping",), (0, None)),
    "expert_count": (("num_experts", "num_local_experts"), (0,)),
    "expert_used_count": (("num_experts_per_tok",), (0,)),
    "expert_weights_norm": (("norm_topk_prob",), ()),
    "expert_weights_scale": (("routed_scaling_factor",), (0, 1)),
    "expert_group_count": (("n_group",), (0, 1)),
    "expert_group_used_count": (("topk_group",), (0, 1)),
    "leading_dense_block_count": (("first_k_dense_replace",), (0,)),
    "logit_scale": (("logit_scale",), (0, 1)),
    "embedding_scale": (("embedding_multiplier",), (0, 1)),
    "residual_scale": (("residual_multiplier",), (0, 1)),
    "attention.clamp_kqv": (("clip_qkv",), (0, None)),
    "attention.shared_kv_layers": (("num_kv_shared_layers",), (0,)),
    "attention.key_length_swa": (("head_dim",), ()),
    "attention.value_length_swa": (("head_dim",), ()),
    "router_logit_softcapping": (("router_logit_softcapping",), (0, None)),
    "moe_every_n_layers": (("decoder_sparse_step",), (0, 1)),
    "interleave_moe_layer_step": (("interleave_moe_layer_step",), (0, 1)),
    "attention.output_scale": (("attention_output_scale",), (0, 1)),
    "ssm.dt_b_c_rms": (("use_dt_b_c_rms",), (False, 0)),
    "rope.scaling.yarn_log_multiplier": ((), (0,)),
    "rope.scaling.yarn_ext_factor": ((), (1, -1)),
    "rope.scaling.alpha": ((), (0, 1)),
    "swin_norm": (("swin_norm",), (False, 0)),
}
# Compared as frequencies.
ROPE_SETTINGS = frozenset(
    f"rope.{name}"
    for name in (
        *("freq_base", "freq_base_swa", "dimension_count", "dimension_count_swa", "scale_linear", "scaling.type"),
        *("scaling.factor", "scaling.attn_factor", "scaling.original_context_length", "scaling.yarn_attn_factor"),
        *("scaling.yarn_beta_fast", "scaling.yarn_beta_slow"),
    )
)
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
GATING = {1: "softmax", 2: "sigmoid"}
SOFTMAX_ROUTERS = ("mixtral", "qwen2_moe", "qwen3_moe", "qwen3_5_moe_text", "gpt_oss")
ALIBI_ALWAYS = {"bloom": 8.0}
# Architectures whose biases llama.cpp omits if the file has none.
OPTIONAL_BIASES = ("llama", "qwen2", "qwen2moe", "nemotron")
ADVICE = "Give the original model instead, or convert it again with a current llama.cpp."


def complete_biases(model: nn.Module, info: dict[str, Any], header: GgufHeader) -> None:
    """Set biases to zero that transformers' class has and no layer in the file has."""
    if header.architecture not in OPTIONAL_BIASES:
        return
    missing = set(info["missing_keys"])
    for name, module in model.named_modules():
        key = f"{name}.bias"
        if key not in missing or not isinstance(module, nn.Linear):
            continue
        end = name.rsplit(".", 1)[-1]
        if all(f"{other}.bias" in missing for other, _ in model.named_modules() if other.endswith(f".{end}")):
            nn.init.zeros_(module.bias)
            info["missing_keys"].remove(key)


def audit_gguf(model: nn.Module, header: GgufHeader, unexpected: Iterable[str] = ()) -> list[str]:
    """Compare a loaded model with the file; return notes for the report.

    Args:
        model: the loaded model.
        header: the header of the file.
        unexpected: tensors that transformers reports as left out.

    Raises:
        ModelLoadError: tensors of the file that change the function were left out, or settings differ.
    """
    name = header.name
    unused = sorted({tensor.name for tensor in _unused(model, header) if not _is_neutral(tensor)} | set(unexpected))
    if unused:
        raise ModelLoadError(
            f"transformers' {type(model).__name__} has no place for {len(unused)} of the tensors in {name!r} "
            f"({listed(unused)}), so it would not be the stored model. {ADVICE}"
        )
    different, unknown = _settings(model, header)
    if different:
        raise ModelLoadError(
            f"transformers would load {name!r} with other settings than the file states: {'; '.join(different)}. "
            f"It would not be the stored model. {ADVICE}"
        )
    if unknown:
        return [
            f"{len(unknown)} of the GGUF file's settings are not known here and were not compared: {listed(unknown)}."
        ]
    return []


# The tensors


def _unused(model: nn.Module, header: GgufHeader) -> list[GgufTensor]:
    """The tensors of the file that the model does not use; the newer reader of transformers reports them itself."""
    from transformers import modeling_gguf_pytorch_utils as older
    from transformers.integrations.gguf import is_gguf_arch_supported

    architecture = header.architecture or ""
    if is_gguf_arch_supported(architecture):
        return []
    processor = older.TENSOR_PROCESSORS.get(architecture, older.TensorProcessor)(config={})
    used = set(older.get_gguf_hf_weights_map(model, processor))
    return [
        tensor
        for tensor in header.tensors
        if tensor.name not in used
        and not (tensor.name.endswith("_exps.weight") and tensor.name.removesuffix(".weight") in used)
        and tensor.name not in ROPE_TENSORS
    ]


def _is_neutral(tensor: GgufTensor) -> bool:
    """Whether leaving this tensor out changes nothing: it is a bias of zeros, or a scale of ones."""
    neutral = {"bias": 0.0, "scale": 1.0}.get(tensor.name.rsplit(".", 1)[-1])
    if neutral is None or tensor.kind not in (0, 1):
        return False
    with tensor.path.open("rb") as file:
        file.seek(tensor.start)
        return bool((np.frombuffer(file.read(tensor.length), ("<f4", "<f2")[tensor.kind]) == neutral).all())


# The settings


def _settings(model: nn.Module, header: GgufHeader) -> tuple[list[str], list[str]]:
    """The differences in words, and the names of settings that are unknown here."""
    config: Any = model.config
    config = config.get_text_config(decoder=True)
    compared: dict[str, Callable[[Any], str | None]] = {
        "block_count": lambda value: _differs(value - _extra_layers(header), config.num_hidden_layers),
        "nextn_predict_layers": lambda value: _differs(value, _extra_layers(header)),
        "attention.head_count_kv": lambda value: _heads(value, config),
        "attention.key_length": lambda value: _width(value, config, header),
        "attention.value_length": lambda value: _width(value, config, header),
        "attention.layer_norm_rms_epsilon": lambda value: _epsilons(value, model),
        "attention.layer_norm_epsilon": lambda value: _epsilons(value, model),
        "attention.sliding_window": lambda value: _window(value, config, header),
        "attention.causal": lambda value: None if value else "a model that sees later tokens",
        "attention.max_alibi_bias": lambda value: _differs(value, ALIBI_ALWAYS.get(config.model_type, 0.0)),
        "attention.scale": lambda value: None,  # compared below, stated or not
        "attention.sliding_window_pattern": lambda value: None,
        "rope.dimension_sections": lambda value: _sections(value, config),
        "expert_gating_func": lambda value: _gating(value, config),
    }
    different, unknown = [], []
    for key, value in header.metadata.items():
        prefix, _, name = key.partition(".")
        if prefix != header.architecture or name in BY_SHAPE or name in ROPE_SETTINGS:
            continue
        if name in compared:
            problem = compared[name](value)
        elif name in SAME_IN_CONFIG:
            problem = _in_config(value, config, *SAME_IN_CONFIG[name])
        else:
            unknown.append(key)
            continue
        if problem is not None:
            different.append(f"{key} is {_short(value)}, and the model has {problem}")
    different += _windows(config, header) + _scales(model, header)
    width = head_width(header)
    return different + ([] if not width else rope_differences(model, header, width)), unknown


def _differs(stated: Any, actual: Any) -> str | None:
    """The model's value as text, if it differs from the value in the file."""
    if isinstance(stated, list) and stated and not isinstance(actual, list):
        stated = stated[0] if len(set(stated)) == 1 else stated
    if isinstance(stated, int | float) and isinstance(actual, int | float):
        return None if np.isclose(stated, actual, rtol=1e-5, atol=0) else _short(actual)
    return None if stated == actual else _short(actual)


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)[:60]


def _in_config(value: Any, config: PretrainedConfig, names: tuple[str, ...], neutral: tuple[Any, ...]) -> str | None:
    actual = first_of(config, names)
    if value in neutral and (actual is None or actual in neutral):
        return None
    return _differs(value, actual)


def _extra_layers(header: GgufHeader) -> int:
    """The number of layers for further tokens, which only Qwen 3.5 counts as layers; transformers leaves them out."""
    extra = header.of_architecture("nextn_predict_layers") or 0
    return extra if str(header.architecture).startswith("qwen35") else 0


def _heads(value: Any, config: PretrainedConfig) -> str | None:
    actual = first_of(config, ("num_key_value_heads", "num_kv_heads"))
    if config.model_type == "falcon" and getattr(config, "multi_query", False):
        actual = 1
    if isinstance(value, list) and config.model_type == "lfm2":
        kinds = ["full_attention" if heads else "conv" for heads in value]
        return None if kinds == config.layer_types and max(value) == actual else _short(config.layer_types)
    return _differs(value, getattr(config, "num_attention_heads", 0) if actual is None else actual)


def _width(value: Any, config: PretrainedConfig, header: GgufHeader) -> str | None:
    if header.architecture == "gemma4":
        return _differs(value, getattr(config, "global_head_dim", None) or config.head_dim)
    return _differs(value, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _epsilons(value: float, model: nn.Module) -> str | None:
    for module in model.modules():
        actual = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if type(module).__name__.endswith("Norm") and isinstance(actual, float):
            problem = _differs(value, actual)
            if problem is not None:
                return problem
    return None


def _sections(value: list[int], config: PretrainedConfig) -> str | None:
    actual = (getattr(config, "rope_parameters", None) or {}).get("mrope_section") or []
    return _differs([size for size in value if size], list(actual))


def _gating(value: int, config: PretrainedConfig) -> str | None:
    actual = getattr(config, "scoring_func", None) or ("softmax" if config.model_type in SOFTMAX_ROUTERS else None)
    return None if not value or GATING.get(value) == actual else f"{actual} scores"


def _window(value: Any, config: PretrainedConfig, header: GgufHeader) -> str | None:
    kinds = getattr(config, "layer_types", None)
    windowed = kinds is None or "sliding_attention" in kinds
    actual = (getattr(config, "sliding_window", None) if windowed else None) or 0
    length = header.of_architecture("context_length") or 0
    return None if not actual and value >= length > 0 else _differs(value, actual)


def _windows(config: PretrainedConfig, header: GgufHeader) -> list[str]:
    """A difference in which layers attend within a window."""
    actual = getattr(config, "layer_types", None)
    expected = window_layers(header, config.num_hidden_layers)
    if (
        expected is None
        or actual is None
        or "sliding_attention" not in {*actual, "sliding_attention" if any(expected) else ""}
    ):
        return []
    windowed = [kind == "sliding_attention" for kind in actual]
    return [] if windowed == expected else ["other layers attend within a window"]


def _scales(model: nn.Module, header: GgufHeader) -> list[str]:
    expected = attention_scale(header)
    if expected is None or header.architecture == "gemma4":
        return []
    scalings = {getattr(module, "scaling", None) for module in model.modules()}
    actual = sorted(scale for scale in scalings if isinstance(scale, float))
    return [
        f"queries and keys are scaled by {scale:.6g} and not by {expected:.6g}"
        for scale in actual
        if not np.isclose(scale, expected)
    ]
