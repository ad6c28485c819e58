"""The rotary frequencies of a GGUF file: written into a config, and compared with those of the loaded model.

llama.cpp defines the meaning of the settings (`ggml_rope_ext`; `rope.*` in llama-model.cpp):

    theta_i = base^(-2 i / n) / factors_i                        i = 0 ... n / 2 - 1
    linear:   theta_i / factor
    yarn:     theta_i (1 - r_i) / factor + theta_i r_i,          r_i falls from 1 to 0 between two dimensions
    cosines and sines are multiplied by attn_factor, with yarn also by 1 + 0.1 ln(factor)

A scaling without a type is linear. Layers with a sliding window have their own base and no factors.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PretrainedConfig

from depthscope.loading.gguf.header import GgufHeader, GgufTensor

__all__ = ["adopt_rope", "rope_differences"]

USUAL_BASE = 10_000.0
# Llama 3's parameters, from which llama.cpp's converter computes the tensor of factors.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3_CONTEXT = 8192
PLAIN_KINDS = {"default", "linear", "dynamic", "yarn", "longrope", "llama3"}
MOST_DIMENSIONS = 1 << 16
FREQUENCIES = "inv_freq"


@dataclass(frozen=True)
class Rope:
    """The rotary embedding of one type of layer."""

    base: float
    count: int  # rotated dimensions of a head
    kind: str = "none"  # "none", "linear", "yarn" or "longrope"
    factor: float = 1.0
    context: int = 0  # the context length before the scaling
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention: float = 1.0  # the factor of cosines and sines
    short: np.ndarray | None = None  # [count / 2]
    long: np.ndarray | None = None

    def frequencies(self) -> np.ndarray:
        """The frequencies within the original context, [count / 2]."""
        theta = self.base ** (-np.arange(0, self.count, 2) / self.count)
        if self.short is not None:
            theta = theta / self.short
        if self.kind == "linear":
            return theta / self.factor
        if self.kind != "yarn":
            return theta
        low = max(0, math.floor(self._dimension(self.beta_fast)))
        high = min(self.count - 1, math.ceil(self._dimension(self.beta_slow)))
        ramp = 1 - np.clip((np.arange(self.count // 2) - low) / max(0.001, high - low), 0, 1)
        return theta * (1 - ramp) / self.factor + theta * ramp

    def _dimension(self, turns: float) -> float:
        """The dimension that makes `turns` rotations within the original context."""
        return self.count * math.log(self.context / (turns * 2 * math.pi)) / (2 * math.log(self.base))


def stored_rope(header: GgufHeader, width: int) -> Rope:
    """The file's rotary embedding of layers without a window; `width` is the width of a head."""
    setting = header.of_architecture
    kind = setting("rope.scaling.type") or "linear"
    factor = setting("rope.scaling.factor") or setting("rope.scale_linear") or 1.0
    kind = "none" if kind == "linear" and factor == 1 else kind
    attention = (setting("rope.scaling.attn_factor") or 1.0) * (setting("rope.scaling.yarn_attn_factor") or 1.0)
    if kind == "yarn":
        attention *= 1 + 0.1 * math.log(factor)
    count = setting("rope.dimension_count") or width
    if not 0 < count <= MOST_DIMENSIONS:
        raise ValueError(f"rope.dimension_count is {count}")
    tensors = {tensor.name: tensor for tensor in header.tensors}
    short = tensors.get("rope_factors_short.weight") or tensors.get("rope_freqs.weight")
    return Rope(
        base=setting("rope.freq_base") or USUAL_BASE,
        count=count,
        kind=kind,
        factor=factor,
        context=setting("rope.scaling.original_context_length") or setting("context_length") or 0,
        beta_fast=setting("rope.scaling.yarn_beta_fast") or 32.0,
        beta_slow=setting("rope.scaling.yarn_beta_slow") or 1.0,
        attention=attention,
        short=_factors(short),
        long=_factors(tensors.get("rope_factors_long.weight")),
    )


def stored_window_rope(header: GgufHeader, width: int) -> Rope:
    """The file's rotary embedding of layers with a sliding window."""
    own = header.of_architecture("rope.freq_base_swa")
    usual = USUAL_BASE if header.architecture == "gemma3" else header.of_architecture("rope.freq_base")
    return Rope(own or usual or USUAL_BASE, header.of_architecture("rope.dimension_count_swa") or width)


def adopt_rope(config: PretrainedConfig, header: GgufHeader, width: int) -> None:
    """Write the file's rotary embedding into the config where transformers drops it."""
    current = getattr(config, "rope_parameters", None)
    if not isinstance(current, dict) or not current:
        return
    rope = stored_rope(header, width)
    nested = [key for key in current if isinstance(current[key], dict)]
    kinds = {part.get("rope_type", "default") for part in ([current[key] for key in nested] or [current])}
    if not kinds <= PLAIN_KINDS:
        return
    if not nested:
        config.rope_parameters = _parameters(rope, current, width)
        context = config.rope_parameters.get("original_max_position_embeddings")
        if context is not None and hasattr(config, "original_max_position_embeddings"):
            config.original_max_position_embeddings = context  # Phi-3 reads this field first
        return
    windowed = stored_window_rope(header, width)
    chosen = {key: windowed if "sliding" in key else rope for key in nested}
    config.rope_parameters = {key: _parameters(chosen[key], current[key], width) for key in nested}


def _parameters(rope: Rope, current: dict[str, Any], width: int) -> dict[str, Any]:
    kept = {key: value for key, value in current.items() if key.startswith("mrope") or key == "partial_rotary_factor"}
    parameters = {**kept, "rope_type": "default", "rope_theta": rope.base}
    if rope.count != width or "partial_rotary_factor" in kept:
        parameters["partial_rotary_factor"] = rope.count / width
    if rope.short is not None:
        return parameters | _factor_parameters(rope)
    if rope.kind == "linear":
        return parameters | {"rope_type": "linear", "factor": rope.factor}
    if rope.kind == "yarn":
        yarn = {
            "factor": rope.factor,
            "original_max_position_embeddings": rope.context,
            "attention_factor": rope.attention,
        }
        return parameters | {"rope_type": "yarn", **yarn, "beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
    return parameters


def _factor_parameters(rope: Rope) -> dict[str, Any]:
    """The parameters of a scaling that is stored as one factor per frequency."""
    assert rope.short is not None
    if rope.long is None and np.array_equal(rope.short, np.ones_like(rope.short)):
        return {}
    if rope.long is None and (llama3 := _as_llama3(rope)):
        return llama3
    long = rope.short if rope.long is None else rope.long
    return {
        "rope_type": "longrope",
        "short_factor": rope.short.tolist(),
        "long_factor": long.tolist(),
        "factor": 1.0,
        "attention_factor": rope.attention,
        "original_max_position_embeddings": rope.context,
    }


def _as_llama3(rope: Rope) -> dict[str, Any] | None:
    """Llama 3's scaling, if the factors come from it: more tools know it than a list of factors."""
    assert rope.short is not None
    factor = float(rope.short.max())
    lengths = 2 * math.pi * rope.base ** (np.arange(0, rope.count, 2) / rope.count)
    low, high = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
    share = np.clip((LLAMA3_CONTEXT / lengths - low) / (high - low), 0, 1)
    if not np.allclose(rope.short, 1 / ((1 - share) / factor + share), rtol=1e-4):
        return None
    return {"rope_type": "llama3", "factor": factor, **LLAMA3, "original_max_position_embeddings": LLAMA3_CONTEXT}


def rope_differences(model: nn.Module, header: GgufHeader, width: int) -> list[str]:
    """The differences between the rotary embeddings of the loaded model and of the file, in words."""
    rope, windowed = stored_rope(header, width), stored_window_rope(header, width)
    differences = []
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if not name.endswith(FREQUENCIES) or "original" in name:
                continue
            prefix = name.removesuffix(FREQUENCIES)
            expected = windowed if "sliding" in prefix else rope
            scaling = getattr(module, f"{prefix}attention_scaling", 1.0)
            if not _same(buffer, expected.frequencies()):
                differences.append(_describe(header, expected, "the frequencies of its rotary embedding"))
            elif not np.isclose(float(scaling), expected.attention, rtol=1e-5):
                differences.append(f"the rotary embedding's factor {scaling:g} (in the file {expected.attention:g})")
            elif expected.long is not None and not _same_long(module, expected.long):
                differences.append(_describe(header, expected, "the long factors of its rotary embedding"))
    return sorted(set(differences))


def _same(buffer: torch.Tensor, expected: np.ndarray) -> bool:
    own = buffer.double().cpu().numpy()
    return own.shape == expected.shape and np.allclose(own, expected, rtol=2e-5, atol=1e-12)


def _same_long(module: nn.Module, expected: np.ndarray) -> bool:
    parameters = getattr(getattr(module, "config", None), "rope_parameters", None) or {}
    own = np.array(parameters.get("long_factor", ()))
    return own.shape == expected.shape and np.allclose(own, expected, rtol=2e-5, atol=1e-12)


def _describe(header: GgufHeader, rope: Rope, quantity: str) -> str:
    stated = {
        key.partition(".")[2]: value
        for key, value in header.metadata.items()
        if key.startswith(f"{header.architecture}.rope.") and not isinstance(value, list)
    }
    settings = ", ".join(
        f"{key} {value:.6g}" if isinstance(value, float) else f"{key} {value}" for key, value in stated.items()
    )
    tensors = "" if rope.short is None else " and a tensor of factors"
    return f"{quantity} (the file states {settings or 'none'}{tensors})"


def _factors(stored: GgufTensor | None) -> np.ndarray | None:
    if stored is None or stored.kind != 0:  # every converter writes float32
        return None
    with stored.path.open("rb") as file:
        file.seek(stored.start)
        return np.frombuffer(file.read(stored.length), "<f4").astype(np.float64)
