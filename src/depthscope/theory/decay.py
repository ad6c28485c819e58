"""How large AdamW leaves weights whose gradients are noise: weight decay against the random walk of the updates.

One step is `w <- (1 - lr * wd) w - lr * u`. Adam divides a gradient by its own size, and over the steps that momentum
spreads it, each gradient moves a weight by `lr * u` with u of root mean square 1. Where gradients are independent of
one another and of the weight, the mean square m of the weights follows

    m <- (1 - lr * wd)^2 m + lr^2,    which settles at    m = lr / (wd * (2 - lr * wd)) ~ lr / (2 wd)

(Kosson et al. 2023, arXiv 2305.17212, "rotational equilibrium"; van Laarhoven 2017, arXiv 1706.05350, for SGD). It gets
there in about `1 / (2 lr wd)` steps. A gradient that keeps its direction moves a weight further than this.
"""

import math
from collections.abc import Iterable

from depthscope.errors import SettingsError

__all__ = ["decayed_std", "equilibrium_std"]


def equilibrium_std(learning_rate: float, weight_decay: float) -> float:
    """The root mean square of a weight that AdamW has moved at random for long: about `sqrt(lr / (2 wd))`.

    Raises:
        SettingsError: without decay there is no equilibrium, and with `lr * wd` of 2 or more none is reached.
    """
    shrink = learning_rate * weight_decay
    if not (learning_rate > 0 and 0 < shrink < 2):
        raise SettingsError(
            f"learning_rate={learning_rate!r} and weight_decay={weight_decay!r} have no equilibrium: give two positive "
            "numbers with a product below 2, or use decayed_std, which needs no equilibrium."
        )
    return (learning_rate / (weight_decay * (2 - shrink))) ** 0.5


def decayed_std(initial_std: float, learning_rates: Iterable[float], weight_decay: float) -> float:
    """The root mean square of a weight after AdamW steps with these learning rates, from one of `initial_std`.

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
