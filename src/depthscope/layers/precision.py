"""Activations with more digits, where a computation needs them."""

import torch
from torch import Tensor

__all__ = ["precise", "wide"]


def precise(hidden: Tensor) -> Tensor:
    """The same numbers in float64, on a device that has it."""
    return hidden.cpu().double() if hidden.device.type == "mps" else hidden.double()


def wide(hidden: Tensor) -> Tensor:
    """The same numbers in at least float32: half precision is too coarse for norms and variances."""
    return hidden if hidden.dtype in (torch.float32, torch.float64) else hidden.float()
