"""Values and their standard errors over blocks, by the delete-one jackknife.

With `f` the function from totals over n blocks to a value and `f_(-b)` its value when block b is left out,

    se^2 = (n - 1) / n * sum over b of (f_(-b) - mean of f_(-b))^2.

It serves means, ratios of sums, absolute values and norms alike. One block tells no error: NaN. Rows of the sums may be
groups of consecutive blocks, which are left out together.
"""

from collections.abc import Callable, Mapping
from dataclasses import fields

import numpy as np

from depthscope.scores.base import Array, Sums, Values

__all__ = ["jackknife", "values_with_errors"]


def values_with_errors(finish: Callable[[Sums], Values], tables: Mapping[str, Array]) -> tuple[Values, Values]:
    """The values from all blocks, and their standard errors.

    Args:
        finish: totals over blocks -> values.
        tables: sums, one row [...] a block (or group of blocks), the same number of rows in each.
    """
    totals = {name: table.sum(0) for name, table in tables.items()}
    values = finish(totals)
    (count,) = {len(table) for table in tables.values()}
    left_out = range(count) if count > 1 else ()  # without its only block nothing is left to finish
    without = [finish({name: totals[name] - table[block] for name, table in tables.items()}) for block in left_out]
    errors = Values()
    for part in fields(Values):
        for key, value in getattr(values, part.name).items():
            getattr(errors, part.name)[key] = jackknife([getattr(each, part.name)[key] for each in without], value)
    return values, errors


def jackknife(without: list[Array | float], value: Array | float) -> Array:
    """The standard error of a value from what it is without each block; NaN from fewer than two."""
    if len(without) < 2:
        return np.full(np.shape(value), np.nan)
    each, count = np.array(without, dtype=float), len(without)
    return np.sqrt((count - 1) / count * np.square(each - each.mean(0)).sum(0))
