"""Surgery: acting on what was measured. Layers are cut out of a model, and what remains is a model of the same class.

small = cut(model, [0, 1, 3])                   # layers 0, 1 and 3 of 4, by their numbers in the model
save_cut(model, [0, 1, 3], "small", tokenizer)  # a folder that every tool loads, proved before it appears
"""

from typing import TYPE_CHECKING

from depthscope import lazily

if TYPE_CHECKING:
    from depthscope.surgery.cutting import cut
    from depthscope.surgery.kept import original_layers
    from depthscope.surgery.plans.planning import plan_cut
    from depthscope.surgery.proof import Proof, prove
    from depthscope.surgery.pruning import prune
    from depthscope.surgery.save import save_cut

# Where each name lives, imported when first used: torch and transformers take seconds.
_HOME = {
    "Proof": "proof",
    "cut": "cutting",
    "original_layers": "kept",
    "plan_cut": "plans.planning",
    "prove": "proof",
    "prune": "pruning",
    "save_cut": "save",
}

__all__ = ["Proof", "cut", "original_layers", "plan_cut", "prove", "prune", "save_cut"]


__getattr__ = lazily(__name__, _HOME)
