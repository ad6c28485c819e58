"""What "auto" means for precision and attention: what is faster on the hardware at hand, by rules that were measured.

The rules (docs/speed.md has the numbers) and not a stop-watch decide, so that the same sweep on the same machine is the
same sweep every time.
"""

from typing import Any

import torch

__all__ = ["choose_attention", "choose_precision"]

# On a CPU, up to here the matrix of all probabilities is faster than the fused attention, in bfloat16.
EAGER_LENGTH = 256


def choose_precision(wanted: str) -> str:
    """The precision of training: "float32" or "bfloat16" autocast."""
    if wanted != "auto":
        return wanted
    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    if torch.backends.mps.is_available():
        return "float32"
    return "bfloat16" if _cpu_computes_bfloat16() else "float32"


def choose_attention(wanted: str, precision: str, sequence_length: int) -> str:
    """The attention implementation of training, by transformers' name for it."""
    if wanted != "auto":
        return wanted
    on_cpu = not torch.cuda.is_available() and not torch.backends.mps.is_available()
    return "eager" if on_cpu and precision == "bfloat16" and sequence_length <= EAGER_LENGTH else "sdpa"


def _cpu_computes_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 matrices itself, instead of by way of float32."""
    checks: tuple[Any, ...] = (torch.cpu._is_avx512_bf16_supported, torch.cpu._is_amx_tile_supported)
    return any(check() for check in checks)
