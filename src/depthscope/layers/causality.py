"""Whether a model is causal, asked of the model itself: later tokens are changed, and its earlier answers must stay.

A configuration does not tell: `is_causal`, `use_bidirectional_attention`, a mask or a model's own code may let a token
see what follows it, and the loss of predicting a token that is seen says nothing.
"""

from collections.abc import Callable, Iterable
from itertools import islice
from statistics import median

import torch
from torch import Tensor, nn

from depthscope.errors import BatchDependentError, NotCausalError

__all__ = ["coarsest_epsilon", "require_causal"]

# From which token on a row of the example is changed. Nothing of row 0 is: what happens to it is rounding, since
# experts compute the tokens of all rows together. From token 1 on, because then no window, prefix or block of tokens
# that see each other is too short to be noticed; from 7 on for models whose first token is special.
CHANGED_FROM = {1: 1, 2: 7}
# Differences are relative: of the logits at a token, beside their spread over the vocabulary.
EXACT = 1e-3
CLEARLY = 5  # times the rounding
DRAWS = 4
# Up to these, an answer that depends on the other texts of its batch is put down to rounding.
TOGETHER, TOGETHER_EPSILONS = 1e-2, 32
HALF_PRECISION = 1e-4  # machine epsilon
VOCABULARY_SAMPLE = 4096  # logits at each token are enough


def require_causal(
    name: str,
    ask: Callable[[Tensor], Tensor],
    example: Tensor,
    answer: Tensor,
    others: Iterable[Tensor],
    *,
    epsilon: float,
) -> float:
    """Refuse a model whose answers depend on what comes later, or on the other texts of a batch.

    It takes one forward pass where all is well, and a few more to tell a leak from rounding where something changed.

    Args:
        name: what the message calls the model.
        ask: the model: token ids [B, T] -> logits [B, T, V].
        example: ids [B, T] of a small example.
        answer: the logits that the model gave to it.
        others: examples of the same shape, as many as are asked for.
        epsilon: the machine epsilon of the coarsest dtype that the model computes in.

    Returns:
        By how much the logits of a text change with the other texts of its batch, relative to their spread.

    Raises:
        NotCausalError: later tokens change earlier logits.
        BatchDependentError: other texts of the batch change the logits, or nothing at all does.
    """
    draws = iter(others)
    seen = [_changes(ask, example, answer, next(draws))]
    if max(float(row.max()) for row in seen[0].values()) > EXACT:
        seen += [_changes(ask, example, answer, other) for other in islice(draws, DRAWS)]
    typical = median if epsilon > HALF_PRECISION else max
    rounding = typical([float(changes[0].max()) for changes in seen])
    leak = typical([_leak(changes, epsilon) for changes in seen])
    if leak > max(EXACT, CLEARLY * rounding):
        raise NotCausalError(
            f"{name} is not causal: when later tokens of a small example are changed, its logits at earlier tokens "
            f"change too, by {leak:.2g} of their spread (rounding: {rounding:.1g}). It sees the tokens that it should "
            "predict, as encoders, diffusion models and decoders with is_causal=False or bidirectional attention do, "
            "so its next-token loss means nothing. Give a causal language model, or mend the setting that lets it "
            "look ahead."
        )
    if rounding > max(TOGETHER, TOGETHER_EPSILONS * epsilon):
        raise BatchDependentError(_batch_dependent(name, rounding, float(_relative(answer, ask(example)).max())))
    return rounding


def coarsest_epsilon(model: nn.Module) -> float:
    """The machine epsilon of the coarsest dtype that a model computes in; 1 where it is quantised.

    A quantised model may round the activations of a whole batch by one scale.
    """
    packed = any("quantized" in type(module).__module__ for module in model.modules())
    dtypes = {weight.dtype for weight in model.parameters()}
    if packed or any(not dtype.is_floating_point or dtype.itemsize < 2 for dtype in dtypes):
        return 1.0
    return max((torch.finfo(dtype).eps for dtype in dtypes), default=torch.finfo(torch.float32).eps)


def _batch_dependent(name: str, change: float, again: float) -> str:
    if again > EXACT:
        return (
            f"{name} gives another answer each time: its logits change by {again:.2g} of their spread when it is asked "
            "the same again in evaluation mode. It draws random numbers or keeps something from call to call, so that "
            "losses with and without a layer cannot be compared. Give a model whose answer depends on the text alone."
        )
    return (
        f"The logits of {name} for one text change by {change:.2g} of their spread when the other texts of its batch "
        "are changed (experts that choose their tokens do that), so that its losses depend on what else is measured. "
        "Give a model whose answer depends on the text alone."
    )


def _changes(ask: Callable[[Tensor], Tensor], example: Tensor, answer: Tensor, other: Tensor) -> dict[int, Tensor]:
    """By row, how far the logits moved at the tokens before the changed ones (at all tokens of row 0)."""
    changed = example.clone()
    for row, start in CHANGED_FROM.items():
        changed[row, start:] = other[row, start:]
    moved = _relative(answer, ask(changed))
    return {0: moved[0]} | {row: moved[row, :start] for row, start in CHANGED_FROM.items()}


def _leak(changes: dict[int, Tensor], epsilon: float) -> float:
    """The largest change before changed tokens.

    In half precision, rounding may now and then let a token choose other experts. There, only what all rows show just
    before the changed tokens counts, which is where looking ahead must show.
    """
    tested = [changes[row] for row in CHANGED_FROM]
    if epsilon > HALF_PRECISION:
        return min(float(row[-1]) for row in tested)
    return max(float(row.max()) for row in tested)


def _relative(before: Tensor, after: Tensor) -> Tensor:
    """How far logits [B, T, V] moved, beside their spread over the vocabulary: [B, T].

    The spread is the median distance from the median: logits that stand for "never" (-1e9, say) do not widen it.
    """
    step = -(-before.shape[-1] // VOCABULARY_SAMPLE)
    one, other = (logits[..., ::step].float().cpu() for logits in (before, after))
    plain = torch.isfinite(one) & torch.isfinite(other)
    one, moved = one.where(plain, torch.nan), (one - other).where(plain, 0).abs().mean(-1)
    centred = (one - one.nanmedian(-1, keepdim=True).values).abs()
    spread = centred.nanmedian(-1).values
    spread = torch.where(spread > 0, spread, centred.nan_to_num(0).amax(-1))
    return moved / spread.nan_to_num(0).clamp_min(torch.finfo(torch.float32).tiny)
