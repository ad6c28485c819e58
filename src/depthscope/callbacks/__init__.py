"""Callbacks for transformers' Trainer (and everything built on it) that show every layer while it trains."""

from depthscope.callbacks.effectiveness import EffectivenessCallback
from depthscope.callbacks.history import read_history
from depthscope.callbacks.sparsity import SparsityCallback
from depthscope.callbacks.variance import VarianceCallback

__all__ = ["EffectivenessCallback", "SparsityCallback", "VarianceCallback", "read_history"]
