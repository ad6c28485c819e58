"""What the variance of the residual stream would be if all weights were random: predicted, to be held against measured.

    predict_variance(config, 256)           at initialisation, from the configuration alone
    predict_from_model(model, token_ids)    random weights of the sizes that a (trained) model's weights have
    decayed_std(0.02, rates, 0.1)           how large AdamW with weight decay leaves weights that learn nothing
    variance_theory(report, prediction)     both in one figure

The steps, their assumptions and how well they hold stand in docs/theory.md.
"""

from typing import TYPE_CHECKING

from depthscope import lazily

if TYPE_CHECKING:
    from depthscope.theory.decay import decayed_std, equilibrium_std
    from depthscope.theory.figure import variance_theory
    from depthscope.theory.gains import LayerGains, MLPGains, gains_at_initialisation, gains_of_model
    from depthscope.theory.recursion import VariancePrediction, predict_from_model, predict_variance

# Where each name lives, imported when first used: torch, transformers and plotly take seconds.
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
