"""The layer-effectiveness scores, one file a score (or a family read off the same tensors), each over a `LayerStack`.

Every file opens with its formula, units and source. `SCORES` names them in the order in which they are reported.
"""

from depthscope.scores.base import Explanation, Score, effective_depth
from depthscope.scores.causal import Causal
from depthscope.scores.geometry import AngularDistance, BlockInfluence, Update
from depthscope.scores.jacobian import Jacobian
from depthscope.scores.permutation import Permutation
from depthscope.scores.skip import Skip
from depthscope.scores.sparsity import AttentionSparsity, ExpertLoad, WeightSparsity
from depthscope.scores.usefulness import Usefulness
from depthscope.scores.variance import Variance

__all__ = ["EXPLANATIONS", "SCORES", "Explanation", "Score", "effective_depth"]

SCORES: dict[str, type[Score]] = {
    score.explanation.name: score
    for score in (
        Variance,
        BlockInfluence,
        AngularDistance,
        Update,
        Skip,
        Causal,
        Usefulness,
        Permutation,
        Jacobian,
        WeightSparsity,
        AttentionSparsity,
        ExpertLoad,
    )
}

EFFECTIVE_DEPTH = Explanation(
    name="effective_depth",
    title="Effective depth",
    meaning="How many layers share the work, as 'x of L layers': L if leaving out any layer costs the same, 1 if one "
    "layer does everything. Derived from the skip ratio (leaving a layer out) and from the usefulness ratio "
    "(linearising it); needs no measurement of its own.",
    formula="(sum e_l)^2 / sum e_l^2,  e_l = max(loss ratio of layer l - 1, 0)",
    unit="layers",
    source="participation ratio",
)

EXPLANATIONS: dict[str, Explanation] = {
    EFFECTIVE_DEPTH.name: EFFECTIVE_DEPTH,
    **{name: score.explanation for name, score in SCORES.items()},
}
