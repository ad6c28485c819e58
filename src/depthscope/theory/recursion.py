"""The variance of the residual stream after each layer, predicted from the sizes of the weights.

With independent random weights, the output of a sublayer is uncorrelated with the residual stream, so that second
moments add up. `k_ij` is the second moment between the residual streams at positions i and j, the mean over features;
the variance is the mean of `k_ii`. A Pre-LN layer adds two terms to each `k_ij`:

    k <- k + output * value * (the correlations of k after averaging by attention)
    k <- k + down * E[(act(g) u)^2] * (the correlations of k after the gated product)

`gains` has the factors, `moments` the two functions of correlations; docs/theory.md has the derivation. Correlations
between positions matter because attention averages: independent values cancel, and shared values do not.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from depthscope.conversion.native import to_depthlm
from depthscope.conversion.sources import SOURCES
from depthscope.errors import SettingsError
from depthscope.layers.modes import evaluating
from depthscope.layers.stack import LayerStack
from depthscope.models.configuration_depthlm import DepthLMConfig
from depthscope.models.modeling_depthlm import DepthLMForCausalLM
from depthscope.theory.gains import LayerGains, MLPGains, gains_at_initialisation, gains_of_model
from depthscope.theory.moments import (
    OVERLAPS,
    Array,
    averaged_correlation,
    correlation,
    gated_correlation,
    gated_second_moment,
    router_moments,
)

__all__ = ["VariancePrediction", "predict_from_model", "predict_variance"]

Tokens: TypeAlias = int | np.integer | Sequence[Sequence[int]] | np.ndarray | Tensor


@dataclass(frozen=True, eq=False)
class VariancePrediction:
    """The prediction for random weights: arrays [L], named like the columns of a report.

    Attributes:
        variance: variance of the residual stream after each layer.
        attention_variance: variance of the output of the layer's attention, before any norm that follows it.
        mlp_variance: variance of the output of its MLP or experts, before any norm that follows it.
        position_correlation: after each layer, the mean correlation between the residual streams of two positions.
        input_variance: variance of the residual stream before layer 0.
        sequence_length: T.
    """

    variance: Array
    attention_variance: Array
    mlp_variance: Array
    position_correlation: Array
    input_variance: float
    sequence_length: int


def predict_variance(
    config: PreTrainedConfig,
    tokens: Tokens,
    *,
    density: float = 1.0,
    weight_std: float | Sequence[float] | None = None,
    attention_density: float = 1.0,
) -> VariancePrediction:
    """Predict the variance after each layer of a freshly initialised model, in squared activation units.

    Args:
        config: a `DepthLMConfig`, or the configuration of an architecture that `to_depthlm` reads.
        tokens: the sequence length, if all tokens differ; or token ids [B, T], if repetitions are to be included.
        density: the share of the weights that a random mask keeps, in (0, 1]; the others are zero.
        weight_std: standard deviation of the layers' matrices, one or one per layer, instead of the configuration's;
            for example that after weight decay (`decayed_std`). Embeddings keep their own.
        attention_density: the share of the visible positions that attention does not mask, in (0, 1].

    Raises:
        SettingsError: a density or a standard deviation outside its range, tokens that are neither a length nor ids, or
            a configuration of another architecture.
    """
    if not 0 < attention_density <= 1:
        raise SettingsError(
            f"attention_density is {attention_density!r}; give the share of unmasked positions, above 0, at most 1."
        )
    settings = _as_depthlm(config)
    gains = gains_at_initialisation(settings, density, weight_std)
    start = settings.initializer_range**2 * _repetitions(tokens)
    return _predict(settings, gains, start, attention_density)


@torch.no_grad()
def predict_from_model(model: PreTrainedModel, token_ids: Tensor) -> VariancePrediction:
    """Predict the variance for random weights that are as large as those of this model.

    The prediction starts from the model's own embeddings of the tokens and uses only the sizes of each layer's matrices
    and norm weights. A difference from the measured variance is due to learnt directions that fit one another.

    Args:
        model: a DepthLM, or a model that `to_depthlm` reads; trained or untrained.
        token_ids: the text of the measurement, [B, T]; each sequence needs T x T numbers.

    Raises:
        ConversionError: the model is of another architecture.
    """
    depthlm = model if isinstance(model, DepthLMForCausalLM) else to_depthlm(model)
    with evaluating(depthlm):
        stack = LayerStack(depthlm)
        with stack.capture(resid_post=False) as seen:
            stack.run_through(0, token_ids)
    hidden = seen.resid_pre[0].double().cpu().numpy()  # [B, T, d]
    start = hidden @ hidden.swapaxes(-1, -2) / hidden.shape[-1]
    return _predict(depthlm.config, gains_of_model(depthlm), start)


def _as_depthlm(config: PreTrainedConfig) -> DepthLMConfig:
    """Convert a configuration to DepthLM's. Qwen2-MoE is refused: its shared expert needs the weights."""
    if isinstance(config, DepthLMConfig):
        return config
    if config.model_type not in SOURCES or config.model_type == "qwen2_moe":
        known = ", ".join(name for name in SOURCES if name != "qwen2_moe")
        raise SettingsError(f"There is no theory for {config.model_type!r}; give a configuration of depthlm, {known}.")
    settings, _ = SOURCES[config.model_type](config, {})
    return DepthLMConfig(**settings)


def _repetitions(tokens: Tokens) -> Array:
    """1 where two positions have the same token, else 0, [B, T, T]: embeddings of other tokens are uncorrelated."""
    try:
        ids = np.asarray(tokens)
    except ValueError as error:
        raise SettingsError("Token ids are a matrix [B, T], but rows of different lengths were given.") from error
    if not ids.size:
        raise SettingsError("tokens holds no token; give a sequence length of at least 1, or token ids [B, T].")
    if ids.dtype.kind not in "iu":
        raise SettingsError(f"tokens is of type {ids.dtype}; give whole numbers: a length, or token ids [B, T].")
    if ids.ndim == 0:
        return _all_different(int(ids))
    if ids.ndim != 2:
        raise SettingsError(f"Token ids are a matrix [B, T], but {ids.ndim} dimensions were given.")
    return (ids[:, :, None] == ids[:, None, :]).astype(float)


def _all_different(length: int) -> Array:
    if length < 1:
        raise SettingsError(f"tokens is {length}; give a sequence length of at least 1, or token ids [B, T].")
    return np.eye(length)[None]


# ------------------------------------------------------------------------------------------------------ recursion


def _predict(
    config: DepthLMConfig, gains: Sequence[LayerGains], start: Array, attention_density: float = 1.0
) -> VariancePrediction:
    """Follow the second moments [B, T, T] from before layer 0 through all layers."""
    moments = start
    rows: dict[str, list[float]] = {"variance": [], "attention": [], "mlp": [], "correlation": []}
    for layer, gain in enumerate(gains):
        written = _attention(config, layer, gain, moments, attention_density)
        rows["attention"].append(_mean_square(written))
        moments = _added(config, moments, written, gain.attention_output_norm, gain.attention_sum_norm)
        written = _mlp(config, layer, gain, moments)
        rows["mlp"].append(_mean_square(written))
        moments = _added(config, moments, written, gain.mlp_output_norm, gain.mlp_sum_norm)
        rows["variance"].append(_mean_square(moments))
        rows["correlation"].append(_mean_correlation(moments))
    return VariancePrediction(
        variance=np.array(rows["variance"]),
        attention_variance=np.array(rows["attention"]),
        mlp_variance=np.array(rows["mlp"]),
        position_correlation=np.array(rows["correlation"]),
        input_variance=_mean_square(start),
        sequence_length=start.shape[-1],
    )


def _attention(config: DepthLMConfig, layer: int, gain: LayerGains, moments: Array, density: float) -> Array:
    """Second moments [B, T, T] of the output of attention.

    Heads that share keys and values need no extra term: the output projection adds them with independent weights.
    """
    scale = _input_scale(config, layer, moments)
    queries = gain.query * scale if gain.query_norm is None else gain.query_norm
    keys = gain.key * scale if gain.key_norm is None else gain.key_norm
    slides = config.layer_types is not None and config.layer_types[layer] == "sliding_attention"
    window = config.sliding_window if slides else None
    mixed = averaged_correlation(correlation(moments), queries * keys, config.head_dim or 1, window, density)
    return gain.output * gain.value * scale * mixed


def _mlp(config: DepthLMConfig, layer: int, gain: LayerGains, moments: Array) -> Array:
    """Second moments [B, T, T] of the output of the MLP, or of the chosen experts and the shared expert."""
    scale, correlations = _input_scale(config, layer, moments), correlation(moments)
    written = _gated(config, gain.mlp, scale, correlations)
    if gain.router is not None:
        # Experts are independent, so second moments use their squared weights, and two tokens share their common
        # experts.
        square, overlaps = router_moments(
            config.num_experts or 1, config.num_experts_per_tok, gain.router * scale, config.norm_topk_prob
        )
        written = written * square * np.interp(correlations, OVERLAPS, overlaps)
    if gain.shared is not None:
        written = written + _gated(config, gain.shared, scale, correlations)
    return written


def _gated(config: DepthLMConfig, gain: MLPGains, scale: float, correlations: Array) -> Array:
    gate = float(gain.gate * scale)
    size = gain.down * gated_second_moment(config.hidden_act, gate, gain.up * scale)
    return size * gated_correlation(config.hidden_act, gate, correlations)


def _input_scale(config: DepthLMConfig, layer: int, moments: Array) -> float:
    """The mean square of a sublayer's input: about 1 after a norm, times LayerNorm Scaling's squared factor."""
    if config.norm_placement_of(layer) in ("pre", "peri"):
        return config.norm_factor_of(layer) ** 2 * _mean_square(_normalised(config, moments))
    return _mean_square(moments)


def _added(
    config: DepthLMConfig, moments: Array, written: Array, output_norm: float | None, sum_norm: float | None
) -> Array:
    """The second moments of the residual stream after adding a sublayer's output, with the norms of the placement."""
    if output_norm is not None:
        written = output_norm * _normalised(config, written)
    moments = moments + written
    return moments if sum_norm is None else sum_norm * _normalised(config, moments)


def _normalised(config: DepthLMConfig, moments: Array) -> Array:
    """The second moments of vectors after an RMSNorm with weights of 1."""
    root = np.sqrt(np.diagonal(moments, axis1=-2, axis2=-1) + config.rms_norm_eps)
    return np.asarray(moments / (root[..., :, None] * root[..., None, :]))


def _mean_square(moments: Array) -> float:
    return float(np.diagonal(moments, axis1=-2, axis2=-1).mean())


def _mean_correlation(moments: Array) -> float:
    """The mean correlation between different positions."""
    size = moments.shape[-1]
    found: Any = (correlation(moments).sum((-2, -1)) - size) / max(size * (size - 1), 1)
    return float(found.mean())
