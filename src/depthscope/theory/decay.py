"""The size of weights whose gradients are noise, under AdamW: weight decay balances the random walk of the updates.

One step is `w <- (1 - lr * wd) w - lr * u`. Adam divides a gradient by its own size. Momentum spreads a gradient over
steps; summed over them, it moves a weight by `lr * u` with u of root mean square 1. If gradients are independent of one
another and of the weight, the mean square m of the weights follows

    m <- (1 - lr * wd)^2 m + lr^2,    which settles at    m = lr / (wd * (2 - lr * wd)) ~ lr / (2 wd)

(Kosson et al. 2023, arXiv 2305.17212, "rotational equilibrium"; van Laarhoven 2017, arXiv 1706.05350, for SGD). It
is reached in about `1 / (2 lr wd)` steps. A gradient with a constant direction moves a weight further than this.
"""

import math
from collections.abc import Iterable

from depthscope.errors import SettingsError

__all__ = ["decayed_std", "equilibrium_std"]


def equilibrium_std(learning_rate: float, weight_decay: float) -> float:
    """The root mean square of a weight after many random AdamW steps: about `sqrt(lr / (2 wd))`.

    Raises:
        SettingsError: there is no equilibrium, because there is no decay or `lr * wd` is 2 or more.
    """
    shrink = learning_rate * weight_decay
    if not (learning_rate > 0 and 0 < shrink < 2):
        raise SettingsError(
            f"learning_rate={learning_rate!r} and weight_decay={weight_decay!r} have no equilibrium: give two positive "
            "numbers with a product below 2, or use decayed_std, which needs no equilibrium."
        )
    return (learning_rate / (weight_decay * (2 - shrink))) ** 0.5


def decayed_std(initial_std: float, learning_rates: Iterable[float], weight_decay: float) -> float:
    """The root mean square of a weight after random AdamW steps with these learning rates, starting at `initial_std`.

    Raises:
        SettingsError: one of the numbers is negative or not finite.
    """
    _require_size("initial_std", initial_std)
    _require_size("weight_decay", weight_decay)
    square = initial_std**2
    for step, rate in enumerate(learning_rates):
        _require_size(f"learning_rates[{step}]", rate)
        square = (1 - rate * weight_decay) ** 2 * square + rate**2
    return square**0.5


def _require_size(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise SettingsError(f"{name} is {value}; give a finite number of at least 0.")
