"""Timing one thing against another on a machine whose speed drifts: short alternating rounds, compared in pairs."""

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Ratio:
    """How long one side takes relative to another: the median over rounds, and its 95% bootstrap interval."""

    middle: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.middle:.3f} ({self.low:.3f} to {self.high:.3f})"


def rounds(sides: Mapping[str, Callable[[], object]], count: int, seed: int = 0) -> dict[str, list[float]]:
    """Seconds that each side takes in each of `count` rounds; the order within a round is drawn anew.

    Each side runs once before, unmeasured.
    """
    order = list(sides)
    chance = random.Random(seed)
    for side in order:
        sides[side]()
    taken: dict[str, list[float]] = {side: [] for side in order}
    for _ in range(count):
        chance.shuffle(order)
        for side in order:
            _wait()
            begun = time.perf_counter()
            sides[side]()
            _wait()
            taken[side].append(time.perf_counter() - begun)
    return taken


def ratio(above: list[float], below: list[float], seed: int = 0) -> Ratio:
    """The ratio of two sides, pair by pair, since both of a pair met the machine in the same state."""
    pairs = [one / other for one, other in zip(above, below, strict=True)]
    chance = random.Random(seed)
    drawn = sorted(statistics.median(chance.choices(pairs, k=len(pairs))) for _ in range(2000))
    return Ratio(statistics.median(pairs), drawn[50], drawn[-51])


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
