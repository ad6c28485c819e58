"""How precisely the layers are ranked: by their loss ratios, of skip and usefulness, with standard errors over blocks.

The precision is the largest relative standard error of all layers' loss ratios: a standard error divided by its ratio.
"""

from collections.abc import Iterator, Mapping

import numpy as np

from depthscope.scores.base import Array, Score, ratio, values_with_errors
from depthscope.wording.units import format_share

__all__ = ["RANKING", "precision_of", "ranking_in_words"]

# The scores whose loss ratios rank the layers, and what they do to a layer.
RANKING = {"skip": "skip", "usefulness": "linearise"}
NAMED = 3  # layers at each end of the ranking


def precision_of(scores: Mapping[str, Score]) -> float | None:
    """The largest relative standard error of a layer's loss ratio; None where no ratio has one."""
    relative = [ratio(errors, values) for _, values, errors in _ratios(scores)]
    known = np.concatenate([np.zeros(0), *(each[np.isfinite(each)] for each in relative)])
    return float(known.max()) if known.size else None


def ranking_in_words(scores: Mapping[str, Score], blocks: int) -> str:
    """One line: the layers at both ends of the ranking on so many blocks, and how precise it is."""
    for name, values, _ in _ratios(scores):
        order = [int(layer) for layer in np.argsort(values) if np.isfinite(values[layer])]
        count = min(NAMED, len(order) // 2)
        if count:
            most, least = (", ".join(map(str, layers)) for layers in (order[: -count - 1 : -1], order[:count]))
            precision = precision_of(scores)
            within = f"; relative standard errors up to {format_share(precision)}" if precision is not None else ""
            return f"{blocks} blocks: costliest to {RANKING[name]} {most}; cheapest {least}{within}"
    return f"{blocks} blocks"


def _ratios(scores: Mapping[str, Score]) -> Iterator[tuple[str, Array, Array]]:
    """Every column of loss ratios, [L], and its standard errors, with the name of its score."""
    for name in RANKING:
        if name in scores and scores[name].sums:
            values, errors = values_with_errors(scores[name].finish, scores[name].sums)
            for column, each in values.layers.items():
                if column.endswith("_ratio"):
                    yield name, each, errors.layers[column]
