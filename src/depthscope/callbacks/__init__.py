"""Callbacks for transformers' Trainer (and everything built on it) that measure every layer during training."""

from depthscope.callbacks.effectiveness import EffectivenessCallback
from depthscope.callbacks.sparsity import SparsityCallback
from depthscope.callbacks.variance import VarianceCallback
from depthscope.runs.history import read_history

__all__ = ["EffectivenessCallback", "SparsityCallback", "VarianceCallback", "read_history"]
