"""The Gaussian expectations in the variance of a stack of random layers.

The output of a random matrix applied to a vector is Gaussian over the matrix, and two vectors of correlation r give two
Gaussians of correlation r. The next second moments and correlations are then expectations over a few normal numbers:

    gated MLP        act(g) u: Gauss-Hermite quadrature, and the coefficients of `act` in Hermite polynomials
    softmax          averages with Gaussian logits: `E[p_j p_k]` by its dependence on the keys' correlation
    router           squared weights of the top k of E experts: draws from a fixed seed

Everything is float64 numpy.
"""

import math
from functools import lru_cache
from typing import TypeAlias

import numpy as np
import torch
from transformers.activations import ACT2FN

__all__ = ["Array", "averaged_correlation", "correlation", "gated_correlation", "gated_second_moment", "router_moments"]

Array: TypeAlias = np.ndarray

NODES = 96  # of the quadrature: the relative error of the second moment of silu is below 3e-4 at any variance
ORDERS = 24  # Hermite polynomials; they give the second moment of silu up to 1e-3
DRAWS = 4096  # samples of the router's logits: an error below 1%
SOFTMAX_DRAWS = 1024  # samples of a head's logits: an error below 1%
OVERLAPS = np.linspace(0.0, 1.0, 9)  # correlations at which the overlap of two tokens' experts is drawn
LARGEST_LOGIT_VARIANCE = 300.0  # above it the softmax is a maximum, and exp would overflow


def correlation(moments: Array) -> Array:
    """Second moments between positions [..., T, T] -> correlations [..., T, T], 1 on the diagonal."""
    root = np.sqrt(np.diagonal(moments, axis1=-2, axis2=-1))
    found: Array = moments / (root[..., :, None] * root[..., None, :])
    return np.clip(found, -1.0, 1.0)


# ------------------------------------------------------------------------------------------------------ gated MLP


def _on_nodes(activation: str, variance: float) -> tuple[Array, Array, Array]:
    """Nodes and weights of the quadrature over a standard normal x, and `act(sqrt(variance) x)` there, each [NODES]."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(NODES)
    values = ACT2FN[activation](torch.from_numpy(nodes * variance**0.5)).double().numpy()
    return nodes, weights / weights.sum(), values


@lru_cache(maxsize=256)
def _hermite_powers(activation: str, variance: float) -> tuple[float, ...]:
    """The coefficients of r^0, r^1, ... in `E[act(g) act(g')]`, where r is the correlation of g and g'.

    With `act(sqrt(variance) x) = sum_k c_k He_k(x) / sqrt(k!)` they are the `c_k^2` (Mehler's formula).
    """
    nodes, weights, values = _on_nodes(activation, variance)
    basis = np.zeros((ORDERS, NODES))  # normalised, so that neither factorials nor high powers appear
    basis[0], basis[1] = 1.0, nodes
    for k in range(2, ORDERS):
        basis[k] = (nodes * basis[k - 1] - np.sqrt(k - 1) * basis[k - 2]) / np.sqrt(k)
    return tuple(np.square((basis * values * weights).sum(-1)))


@lru_cache(maxsize=256)
def _activation_square(activation: str, variance: float) -> float:
    _, weights, values = _on_nodes(activation, variance)
    return float((values**2 * weights).sum())


def gated_second_moment(activation: str, gate: float, up: float) -> float:
    """`E[(act(g) u)^2]` for independent g and u, normal with variances `gate` and `up`."""
    return _activation_square(activation, gate) * up


def gated_correlation(activation: str, gate: float, correlations: Array) -> Array:
    """The correlation of `act(g) u` at two inputs, elementwise in their own r: `r E[act(g) act(g')] / E[act(g)^2]`."""
    powers = _hermite_powers(activation, gate)
    return correlations * np.polynomial.polynomial.polyval(correlations, powers) / sum(powers)


# -------------------------------------------------------------------------------------------------------- softmax


def averaged_correlation(
    correlations: Array, logit_variance: float, head_dim: int, window: int | None = None, density: float = 1.0
) -> Array:
    """Second moments between positions of the output of causal attention with random weights, on unit vectors.

    Position i averages over the positions j that it sees with weights p_ij, the softmax of normal logits. The logits of
    (i, j) and (i', j') have covariance `logit_variance * r_ii' * r_jj'`, so that for many positions

        E[p_ij p_i'j'] ~ exp(logit_variance * r_ii' * r_jj') = 1 + t(r_ii') t(r_jj') (exp(logit_variance) - 1)

    up to a factor that makes them sum to 1, with `t(r) = expm1(logit_variance r) / expm1(logit_variance)`; the second
    form is exact where either r is 0 or 1. In it all sums over j and j' are two-dimensional running sums, so that T
    positions cost T^2. `exp(logit_variance)` is the weight of one key twice, relative to two different keys, for many
    positions; `_same_key` gives it for few positions.

    Args:
        correlations: between the inputs at the positions, r [..., T, T].
        logit_variance: of query times key over the square root of the head size.
        head_dim: the head size; in small heads the lengths of the queries vary.
        window: positions that a position sees, itself included; None for all before it.
        density: the share of these positions that is not masked, drawn at random for each position; a position always
            sees itself.
    """
    size = correlations.shape[-1]
    scale = min(max(logit_variance, 1e-12), LARGEST_LOGIT_VARIANCE)
    seen = np.minimum(np.arange(1, size + 1), window or size)  # [T]
    same = _same_key(scale, head_dim, 1 + density * (seen - 1))  # [T]
    share = np.expm1(scale * correlations) / np.expm1(scale)  # t [..., T, T]
    more = share * (np.sqrt(same[:, None] * same) - 1)
    above = _over_seen(correlations, window) + more * _over_seen(share * correlations, window)
    below = seen[:, None] * seen + more * _over_seen(share, window)
    if density < 1:
        # A position keeps a share `density` of its keys, and `density^2` of its pairs of different keys.
        kept = np.diag((1 / density - 1) * same * seen)
        above, below = above + kept, below + kept
    mixed: Array = above / below
    return mixed


def _same_key(logit_variance: float, head_dim: int, seen: Array) -> Array:
    """`E[p_j^2] / E[p_j p_k]` of a softmax over n independent logits, for each (also fractional) n in `seen` [T]."""
    chance = np.random.default_rng(0)
    length = math.ceil(seen.max())
    if length < 2:
        return np.ones_like(seen, dtype=float)
    size = np.sqrt(logit_variance * chance.chisquare(head_dim, (SOFTMAX_DRAWS, 1)) / head_dim)  # of the query
    logits = size * chance.standard_normal((SOFTMAX_DRAWS, length))
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    counts = np.arange(1, length + 1)
    concentration = (np.square(weights).cumsum(-1) / np.square(weights.cumsum(-1))).mean(0)  # E[sum_j p_j^2], [T]
    # The weights of one position sum to 1: n E[p_j^2] + n (n - 1) E[p_j p_k] = 1.
    same = concentration * (counts - 1) / np.maximum(1 - concentration, 1e-9)
    found: Array = np.interp(seen, counts[1:], same[1:])
    return found


def _over_seen(values: Array, window: int | None) -> Array:
    """The sum of `values` [..., T, T] over all j <= i and j' <= i' within the window, for every i and i'."""
    pad = [(0, 0)] * (values.ndim - 2) + [(1, 0), (1, 0)]
    running = np.pad(values.cumsum(-1).cumsum(-2), pad)
    end = np.arange(1, values.shape[-1] + 1)
    start = np.maximum(end - window, 0) if window is not None else np.zeros_like(end)
    rows = np.take(running, end, axis=-2) - np.take(running, start, axis=-2)
    total: Array = np.take(rows, end, axis=-1) - np.take(rows, start, axis=-1)
    return total


# --------------------------------------------------------------------------------------------------------- router


@lru_cache(maxsize=64)
def router_moments(experts: int, top_k: int, logit_variance: float, normalised: bool) -> tuple[float, Array]:
    """The effect of a router with random weights on second moments.

    Args:
        experts: E.
        top_k: experts per token.
        logit_variance: of the router's logits.
        normalised: whether the weights of a token's experts are made to sum to 1.

    Returns:
        `E[sum_e w_e^2]` over a token's experts, and at each correlation of `OVERLAPS` the `E[sum_e w_e w'_e]` of two
        tokens, relative to it.
    """
    chance = np.random.default_rng(0)
    one, other = chance.standard_normal((2, DRAWS, experts))
    weights = _routed(one * logit_variance**0.5, top_k, normalised)  # [DRAWS, E]
    square = np.square(weights).sum(-1).mean()
    overlaps = []
    for r in OVERLAPS:
        partner = _routed((r * one + (1 - r**2) ** 0.5 * other) * logit_variance**0.5, top_k, normalised)
        overlaps.append((weights * partner).sum(-1).mean() / square)
    return float(square), np.array(overlaps)


def _routed(logits: Array, top_k: int, normalised: bool) -> Array:
    """The weights [draws, E] that a softmax router gives: zero for all but the top k."""
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    if top_k < weights.shape[-1]:
        last = np.partition(weights, -top_k, axis=-1)[:, -top_k, None]
        weights = np.where(weights >= last, weights, 0.0)
    if normalised:
        weights /= weights.sum(-1, keepdims=True)
    return weights
