"""The request for a recipe: depth, width, a budget and constraints."""

import math
from dataclasses import dataclass

from depthscope.errors import SettingsError
from depthscope.models.configuration_depthlm import NORM_SCALINGS
from depthscope.sweep.cost.gpus import Gpu, find_gpu
from depthscope.sweep.cost.plan import HOUR, launcher
from depthscope.wording.numeric import require_number, require_whole

__all__ = ["BUDGETS", "GB", "Request", "power_of_two"]

BUDGETS = ("tokens", "flops", "gpu_hours")
MOST = 1e40  # the largest budget or memory; far more than exists
SHORTEST = 16  # tokens in a sequence
NARROWEST = 16
GB = 1e9
# The lowest and the highest allowed value of each whole number; the limit on layers is that of reports and sweeps.
WHOLE = {
    "layers": (1, 10_000),
    "width": (NARROWEST, 2**20),
    "gpus": (1, 10**6),
    "heads": (1, 2**20),
    "head_multiple": (1, 2**20),
    "max_length": (SHORTEST, 2**31 - 1),
    "vocab_size": (257, 2**31 - 1),
}
OPTIONAL = ("heads", "max_length")


@dataclass(frozen=True, kw_only=True)
class Request:
    """The request; `depthscope.recipe` explains the fields.

    Raises:
        SettingsError: a value is out of range, or there is not exactly one budget.
    """

    layers: int
    width: int
    tokens: float | None = None
    flops: float | None = None
    gpu_hours: float | None = None
    gpu: str = "h100"
    gpus: int = 1
    utilisation: float = 0.4
    memory: float | None = None
    heads: int | None = None
    head_multiple: int = 1
    dense: bool = False
    max_length: int | None = None
    vocab_size: int = 50304
    norm_scaling: str = "none"
    depth_scaled_init: bool = False

    def __post_init__(self) -> None:
        self._check_ranges()
        # Refuse an unknown GPU and an impossible number of GPUs before anything is built.
        find_gpu(self.gpu)
        launcher(self.gpus)
        budgets = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(budgets) != 1:
            problem = f"{' and '.join(budgets)} are given" if budgets else "none is given"
            raise SettingsError(
                f"A recipe needs one budget: tokens, flops or gpu_hours ({problem}). The paper's models were trained "
                "on 5e9 tokens."
            )
        if self.heads is not None and self.width % self.heads:
            raise SettingsError(
                f"heads is {self.heads}, which does not divide the width, {self.width}: give one of "
                f"{self._divisors()}, or leave heads out and it is chosen for you."
            )
        if self.heads is not None and (self.width // self.heads) % 2:
            raise SettingsError(
                f"heads is {self.heads}, which makes heads of {self.width // self.heads} features; rotary embeddings "
                f"need an even number: give one of {self._divisors()}."
            )
        if self.heads is not None and self.heads % self.head_multiple:
            raise SettingsError(
                f"heads is {self.heads}, which is not a multiple of head_multiple, {self.head_multiple}: change one."
            )
        if self.norm_scaling not in NORM_SCALINGS:
            raise SettingsError(f"norm_scaling is {self.norm_scaling!r}; give {' or '.join(map(repr, NORM_SCALINGS))}.")

    @property
    def longest(self) -> int | None:
        """The longest power of two within `max_length`."""
        return None if self.max_length is None else power_of_two(self.max_length)

    @property
    def kind(self) -> Gpu:
        """The type of GPU."""
        return find_gpu(self.gpu)

    @property
    def flops_an_hour(self) -> float:
        """Floating-point operations that one GPU does in an hour of training."""
        return HOUR * self.kind.peak * self.utilisation

    def _check_ranges(self) -> None:
        for name, (least, most) in WHOLE.items():
            if (value := getattr(self, name)) is not None or name not in OPTIONAL:
                require_whole(name, value, least, most=most)
        for name in (*BUDGETS, "memory"):
            if (value := getattr(self, name)) is not None:
                require_number(name, value, f"a finite number more than 0, at most {MOST:g}", above=0, below=2 * MOST)
        share = "a share of the peak, more than 0, at most 1"
        require_number("utilisation", self.utilisation, share, above=0, below=math.nextafter(1, 2))

    def _divisors(self) -> str:
        """The numbers of heads that divide the width into an even number of features each, at most 16 of them."""
        divisors = [n for n in range(1, self.width // 2 + 1) if self.width % n == 0 and (self.width // n) % 2 == 0]
        return ", ".join(map(str, divisors[-16:])) or "an even width"


def power_of_two(number: float) -> int:
    """The largest power of two that is at most `number`; 0 if `number` is below 1."""
    return 0 if number < 1 else 2 ** (int(number).bit_length() - 1)
