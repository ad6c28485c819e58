"""The variance of the residual stream if all weights were random: a prediction to compare with the measured variance.

    predict_variance(config, 256)           at initialisation, from the configuration alone
    predict_from_model(model, token_ids)    for random weights as large as those of a (trained) model
    decayed_std(0.02, rates, 0.1)           the size of weights that learn nothing, after AdamW with weight decay
    variance_theory(report, prediction)     measured and predicted variance in one figure

docs/theory.md has the derivation, its assumptions and tests of them.
"""

from typing import TYPE_CHECKING

from depthscope import lazily

if TYPE_CHECKING:
    from depthscope.theory.decay import decayed_std, equilibrium_std
    from depthscope.theory.figure import variance_theory
    from depthscope.theory.gains import LayerGains, MLPGains, gains_at_initialisation, gains_of_model
    from depthscope.theory.recursion import VariancePrediction, predict_from_model, predict_variance

# The module of each name, imported at first use: torch, transformers and plotly take seconds.
_HOME = {
    "LayerGains": "gains",
    "MLPGains": "gains",
    "VariancePrediction": "recursion",
    "decayed_std": "decay",
    "equilibrium_std": "decay",
    "gains_at_initialisation": "gains",
    "gains_of_model": "gains",
    "predict_from_model": "recursion",
    "predict_variance": "recursion",
    "variance_theory": "figure",
}

__all__ = [
    "LayerGains",
    "MLPGains",
    "VariancePrediction",
    "decayed_std",
    "equilibrium_std",
    "gains_at_initialisation",
    "gains_of_model",
    "predict_from_model",
    "predict_variance",
    "variance_theory",
]


__getattr__ = lazily(__name__, _HOME)
