"""The meaning of "auto" for precision and attention: the faster choice on this hardware, by fixed rules.

The rules follow measurements (docs/speed.md has the numbers). A sweep measures nothing itself, so that it is the same
every time on the same machine.
"""

from typing import Any

import torch

__all__ = ["choose_attention", "choose_precision"]

# On a CPU in bfloat16, eager attention is faster than fused attention up to this length.
EAGER_LENGTH = 256


def choose_precision(setting: str) -> str:
    """The precision of training: "float32" or "bfloat16" autocast."""
    if setting != "auto":
        return setting
    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    if torch.backends.mps.is_available():
        return "float32"
    return "bfloat16" if _cpu_computes_bfloat16() else "float32"


def choose_attention(setting: str, precision: str, sequence_length: int) -> str:
    """Transformers' name of the attention implementation of training."""
    if setting != "auto":
        return setting
    on_cpu = not torch.cuda.is_available() and not torch.backends.mps.is_available()
    return "eager" if on_cpu and precision == "bfloat16" and sequence_length <= EAGER_LENGTH else "sdpa"


def _cpu_computes_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 matrices directly, without converting them to float32."""
    checks: tuple[Any, ...] = (torch.cpu._is_avx512_bf16_supported, torch.cpu._is_amx_tile_supported)
    return any(check() for check in checks)
