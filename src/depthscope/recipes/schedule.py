"""The training: the number of tokens, sequence length, batch size, learning rate and weight decay."""

import math
from collections.abc import Callable

from depthscope.errors import SettingsError
from depthscope.recipes.request import SHORTEST, Request, power_of_two
from depthscope.recipes.shape import Chosen

__all__ = [
    "PLAIN_DECAY",
    "PLAIN_LENGTH",
    "choose_batch",
    "choose_decay",
    "choose_learning_rate",
    "choose_length",
    "choose_warmup",
    "micro_batches",
]

PLAIN_LENGTH, PLAIN_DECAY = 1024, 0.1  # of the paper's depth sweep
LENGTH = 4096
PAPER_LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
PAPER_TOKENS = 5e9
BATCH = 256 * PLAIN_LENGTH
FEWEST_STEPS = 1000
FEWEST_SEQUENCES = 8
# Four sequences of 4,096 tokens, as in the released configuration of the recipe's model.
MICRO_TOKENS = 4 * LENGTH
# The paper's width and learning rate, and the best rate of our own study (docs/study.md). Between them log(rate) is
# linear in log(width); the slope is -0.83, a little less than the 1 / width of arXiv 2203.03466.
WIDE, WIDE_RATE = 1024, 1e-3
NARROW, NARROW_RATE = 64, 1e-2
WARMUP = 1000
SHALLOW, DEEP = 16, 32  # the depths at which the paper varied the decay
DEEP_DECAY = 0.3


def choose_length(request: Request, tokens_at: Callable[[int], float]) -> Chosen[int]:
    """The paper's 4,096 tokens, or fewer if `max_length` or the budget requires it.

    Args:
        request: the request.
        tokens_at: gives the number of tokens that the budget allows at a sequence length.

    Raises:
        SettingsError: the budget is too small for the shortest sequences.
    """
    cap = request.longest or LENGTH
    length = min(LENGTH, cap)
    while power_of_two(tokens_at(length) / (FEWEST_STEPS * FEWEST_SEQUENCES)) < length:
        length //= 2
        if length < SHORTEST:
            least = FEWEST_STEPS * FEWEST_SEQUENCES * SHORTEST
            raise SettingsError(
                f"The budget allows {tokens_at(SHORTEST):,.0f} tokens, but a training needs at least {least:,} "
                f"({FEWEST_STEPS:,} steps of {FEWEST_SEQUENCES} sequences of {SHORTEST} tokens)."
            )
    if length == LENGTH:
        why = "long sequences, up to 4,096: 8,192 gained nothing"
    elif length == cap:
        why = f"the longest power of two within max_length, {request.max_length:,}"
    else:
        why = f"longer sequences would leave fewer than {FEWEST_STEPS:,} steps of {FEWEST_SEQUENCES} sequences"
    return Chosen(length, why, length in PAPER_LENGTHS)


def choose_batch(request: Request, tokens: int, length: int) -> Chosen[int]:
    """Tokens per optimiser step: the paper's number, or fewer if the training would have too few steps.

    Raises:
        SettingsError: there are more GPUs than sequences.
    """
    target = min(BATCH, power_of_two(tokens / FEWEST_STEPS))
    sequences = target // length
    if request.gpus > sequences:
        raise SettingsError(
            f"gpus is {request.gpus}, but a step has {sequences} sequences of {length:,} tokens: give {sequences} or "
            "fewer, or a smaller max_length."
        )
    batch = sequences // request.gpus * request.gpus * length
    if target == BATCH:
        why = "as many tokens as 256 sequences of 1,024, as in the paper"
    else:
        why = f"fewer than the paper's {BATCH:,}, so that there are {FEWEST_STEPS:,} steps"
    if batch < target:
        why += f"; a multiple of {request.gpus} sequences, one for each GPU"
    return Chosen(batch, why, batch == BATCH)


def micro_batches(request: Request, batch: int, length: int) -> list[int]:
    """Possible micro-batches in sequences, largest first: divisors of a GPU's share with at most 16,384 tokens."""
    share = batch // length // request.gpus
    most = max(1, MICRO_TOKENS // length)
    return [n for n in range(min(share, most), 0, -1) if share % n == 0]


def choose_learning_rate(width: int) -> Chosen[float]:
    """The paper's learning rate at its widths; higher for narrow models, up to the best of our small models."""
    if width >= WIDE:
        why = "as in the depth sweep" if width == 2048 else "as in the depth sweep, at width 2,048"
        return Chosen(WIDE_RATE, why, width == 2048)
    share = math.log(WIDE / max(width, NARROW)) / math.log(WIDE / NARROW)
    rate = float(f"{WIDE_RATE * (NARROW_RATE / WIDE_RATE) ** share:.2g}")
    return Chosen(rate, "narrow models need more: 1e-2 at width 64 (ours), 1e-3 from 1,024 on (paper)", False)


def choose_warmup(steps: int) -> Chosen[int]:
    """The paper's number of warm-up steps, but at most a tenth of the training."""
    if steps // 10 >= WARMUP:
        return Chosen(WARMUP, "as in the paper", True)
    return Chosen(steps // 10, "a tenth of the training, which is shorter than the paper's", False)


def choose_decay(layers: int, rate: float, steps: int) -> Chosen[float]:
    """0.1 for shallow and 0.3 for deep models: the best value at the nearest depth at which the paper varied it."""
    deep = layers >= (SHALLOW + DEEP) / 2
    decay, nearest = (DEEP_DECAY, DEEP) if deep else (PLAIN_DECAY, SHALLOW)
    best = "0.1, 0.3, 0.6 and 1 at 32 layers and T = 4,096" if deep else "0, 0.01, 0.1, 1 and 3 at 16 layers"
    why = f"the best of {best}"
    if layers != nearest:
        why += ", the nearest depth that the paper tested"
    if not deep:
        why += " (0.3 was tested at 32 layers only)"
    # The number of steps in which decay removes a weight's old value, at the peak of the learning rate.
    time = 1 / (rate * decay)
    why += f"; time scale of the decay: {time:,.0f} steps, {time / steps:.0%} of the training"
    return Chosen(decay, why, layers == nearest)
