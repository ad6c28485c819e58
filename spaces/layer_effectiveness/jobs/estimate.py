"""An estimate of the time of an analysis, from the model's config and the speed of the machine, before loading.

depthscope gives the work in forward passes of one layer over one block (docs/speed.md); a pass takes two floating-point
operations per weight and token. The measured times of jobs correct the speed.
"""

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from depthscope import Settings
from depthscope.scores.work import Extent, estimated_work
from jobs.tasks import stages
from safety.config import Sizes, require_sane_numbers
from safety.limits import Limits

__all__ = ["Estimator", "Shape", "in_words", "shape_of", "work"]

STARTING_SECONDS = 4.0
LOADING_BYTES_A_SECOND = 400e6
DOWNLOAD_BYTES_A_SECOND = 60e6
EFFICIENCY = 0.45  # of a large product of matrices, for everything that a layer does
SHAPE_OF_TRIAL = (512, 1024, 1024)
USUAL_LAYERS, USUAL_WIDTH = 24, 1024


@dataclass(frozen=True)
class Shape:
    """The shape that sets the time: layers, features, active weights per layer, entries of the vocabulary."""

    layers: int
    width: int
    layer_weights: float
    vocabulary: int
    has_experts: bool = False

    @property
    def extent(self) -> Extent:
        """The shape in the class that counts the work."""
        head = self.vocabulary * self.width / max(self.layer_weights, 1.0)
        size = (self.layers, self.width, head)
        types = ("",) * self.layers
        return Extent(*size, layer_types=types, has_experts=self.has_experts, vocabulary=self.vocabulary)


def shape_of(config: Mapping[str, Any], parameters: float | None, limits: Limits) -> Shape:
    """Read a model's shape from its config (or a GGUF file's metadata); missing values are guessed.

    Raises:
        Problem: a number in the config is absurd.
    """
    sizes: Sizes = require_sane_numbers(dict(config), "config.json", limits)
    layers = sizes.first("num_hidden_layers", "n_layer", "n_layers", "num_layers", "block_count") or USUAL_LAYERS
    width = sizes.first("hidden_size", "n_embd", "d_model", "embedding_length", "n_embed") or USUAL_WIDTH
    vocabulary = sizes.first("vocab_size") or 50_000
    if parameters is None:
        parameters = 12.0 * layers * width**2 + vocabulary * width
    in_layers = max(parameters - vocabulary * width, 0.2 * parameters)
    experts = sizes.first("num_experts", "num_local_experts", "n_routed_experts", "expert_count")
    chosen = sizes.first("num_experts_per_tok", "expert_used_count", "moe_topk", "top_k")
    if experts and chosen and experts > chosen:  # most weights of such a layer are its experts'
        in_layers *= 0.1 + 0.9 * chosen / experts
    return Shape(layers, width, in_layers / layers, vocabulary, has_experts=bool(experts))


def work(shape: Shape, settings: Settings) -> dict[str, float]:
    """The work of each stage, in forward passes of one layer over one block."""
    return {name: estimated_work(shape.extent, scores, settings) for name, scores in stages(settings).items()}


class Estimator:
    """Converts work into seconds; finished jobs correct the factor."""

    def __init__(self) -> None:
        self._correction = 1.0
        self._lock = threading.Lock()

    def seconds(
        self, shape: Shape, settings: Settings, *, download_bytes: float = 0.0, weight_bytes: float = 0.0
    ) -> float:
        """Estimate the time of a job, from its start to its result."""
        starting = STARTING_SECONDS + download_bytes / DOWNLOAD_BYTES_A_SECOND + weight_bytes / LOADING_BYTES_A_SECOND
        return starting + self._correction * self._measuring(shape, settings)

    def learn(self, shape: Shape, settings: Settings, took: float) -> None:
        """Correct the speed by the measured time of a measurement of at least a few seconds."""
        expected = self._measuring(shape, settings)
        if took < 2.0 or expected < 0.5:
            return
        with self._lock:
            self._correction = 0.5 * self._correction + 0.5 * min(10.0, max(0.1, took / expected))

    @staticmethod
    def _measuring(shape: Shape, settings: Settings) -> float:
        passes = sum(work(shape, settings).values())
        return passes * 2 * shape.layer_weights * settings.block_size / (EFFICIENCY * operations_a_second())


@cache
def operations_a_second() -> float:
    """Floating-point operations per second of this machine, measured with a few matrix products."""
    rows, inner, columns = SHAPE_OF_TRIAL
    left, right = np.ones((rows, inner), np.float32), np.ones((inner, columns), np.float32)
    best = 1.0
    for _ in range(4):
        begun = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - begun)
    return 2 * rows * inner * columns / best


def in_words(seconds: float) -> str:
    """A time in words."""
    if seconds < 50:
        return f"{max(5, round(seconds / 5) * 5)} seconds"
    if seconds < 90:
        return "a minute"
    return f"{round(seconds / 60)} minutes"
