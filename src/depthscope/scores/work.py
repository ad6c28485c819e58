"""The work of an analysis, in forward passes of one layer over one block: for progress, and for estimates beforehand.

It needs neither torch nor a model, so that it can be told of one that is not loaded.
"""

from collections.abc import Collection, Hashable
from dataclasses import dataclass
from itertools import combinations

from depthscope.settings import Settings

__all__ = [
    "Extent",
    "estimated_work",
    "estimates_losses",
    "forwards_from",
    "head_of_experiment",
    "jacobian_work",
    "own_work",
    "shared_skip_work",
    "shared_work",
    "skip_work",
    "swappable_pairs",
    "vectors_of_block",
]

# A backward pass with respect to the input costs about as much as a forward pass.
BACKWARD_WORK = 1.2
# Losses of experiments are estimated where that pays: from such a vocabulary on, from a head that costs as much as this
# many layers, and from so many blocks on, which tell how far off estimates are.
LEAST_VOCABULARY, LEAST_HEAD, LEAST_BLOCKS = 8192, 2.0, 8
# What an estimate takes, of the whole head.
ESTIMATED_HEAD = 1 / 5
# Scores that look at what skipping a layer does: to the loss, and to the updates of later layers.
OF_SKIPPED_LOSSES, OF_SKIPPED_UPDATES = frozenset({"skip"}), frozenset({"causal"})


@dataclass(frozen=True)
class Extent:
    """What the work of an analysis depends on: of a stack of layers, or of a model that is not loaded.

    Attributes:
        num_layers: decoder layers.
        width: features of the residual stream.
        head: what head and loss cost, in forward passes of one layer.
        layer_types: of each layer, as `LayerStack.layer_types`; only layers of equal type change places.
        resumable: whether an experiment may begin at any layer, as `LayerStack.resumable`.
        has_experts: whether there are routers and experts.
        vocabulary: logits of a token; 0 where that is not known.
        parts: of each layer, how many of attention and MLP are measured where `Settings.sublayers` asks for them; None
            for both of every layer.
    """

    num_layers: int
    width: int
    head: float
    layer_types: tuple[Hashable, ...]
    resumable: bool = True
    has_experts: bool = False
    vocabulary: int = 0
    parts: tuple[int, ...] | None = None


def estimates_losses(extent: Extent, settings: Settings) -> bool:
    """Whether the losses of experiments are estimated from some of the vocabulary, if the model's head allows it."""
    asked = not (settings.exact_losses or settings.paper_code) and settings.eval_blocks >= LEAST_BLOCKS
    return asked and extent.vocabulary >= LEAST_VOCABULARY and extent.head >= LEAST_HEAD


def head_of_experiment(extent: Extent, settings: Settings) -> float:
    """What head and loss of an experiment cost, in forward passes of one layer."""
    return extent.head * (ESTIMATED_HEAD if estimates_losses(extent, settings) else 1.0)


def estimated_work(extent: Extent, scores: Collection[str], settings: Settings) -> float:
    """What an analysis of all blocks takes, by the names of its scores."""
    each = sum(own_work(name, extent, settings) for name in scores)
    return (each + shared_skip_work(extent, scores, settings)) * settings.eval_blocks + shared_work(
        extent, scores, settings
    )


def shared_skip_work(extent: Extent, scores: Collection[str], settings: Settings) -> float:
    """What skipping every layer takes for one block, and every sublayer, where a score wants it."""
    losses, updates = bool(OF_SKIPPED_LOSSES.intersection(scores)), bool(OF_SKIPPED_UPDATES.intersection(scores))
    if not (losses or updates):
        return 0.0
    return sum(skip_work(extent, settings, losses=losses)) + _part_work(extent, settings, losses=losses)


def shared_work(extent: Extent, scores: Collection[str], settings: Settings) -> float:
    """The baseline of all blocks, and the pass over those that fit linear maps."""
    fit = settings.eval_blocks if settings.fits_in_sample else settings.fit_blocks
    fitting = fit * extent.num_layers if "usefulness" in scores else 0
    return (extent.num_layers + extent.head) * settings.eval_blocks + fitting


def own_work(name: str, extent: Extent, settings: Settings) -> float:
    """What one score takes for one block, beyond what the scores share."""
    layers = range(extent.num_layers)
    match name:
        case "usefulness":  # each layer: the layers after it, and the head
            return sum(skip_work(extent, settings, losses=True)) + _part_work(extent, settings, losses=True)
        case "permutation":  # each pair: the layers from the first of the two on, and the head
            share = settings.pairs if isinstance(settings.pairs, float) else 1.0
            pairs = swappable_pairs(extent, adjacent=settings.pairs == "adjacent")
            head = head_of_experiment(extent, settings)
            return share * sum(forwards_from(extent, first) + head for first, _ in pairs)
        case "jacobian":
            return sum(jacobian_work(extent, settings, layer) for layer in layers)
        case "attention_sparsity":  # one pass through the layers
            return float(extent.num_layers)
        case "expert_load":
            return float(extent.num_layers) if extent.has_experts else 0.0
    return 0.0


def skip_work(extent: Extent, settings: Settings, *, losses: bool) -> list[float]:
    """What a block without each layer takes: the layers after it, and the head where the loss is wanted."""
    head = head_of_experiment(extent, settings) if losses else 0.0
    return [forwards_from(extent, layer + 1) + head for layer in range(extent.num_layers)]


def _part_work(extent: Extent, settings: Settings, *, losses: bool) -> float:
    """What a block takes with each sublayer changed: the layer itself, those after it, and the head for the loss."""
    if not settings.sublayers:
        return 0.0
    parts = extent.parts or (2,) * extent.num_layers
    without = skip_work(extent, settings, losses=losses)
    return sum(count * (1 + work) for count, work in zip(parts, without, strict=True))


def jacobian_work(extent: Extent, settings: Settings, layer: int) -> float:
    """What one layer's Jacobian takes for one block: a forward pass, and a backward pass a vector."""
    before = 0 if extent.resumable else layer
    return before + 1 + BACKWARD_WORK * vectors_of_block(extent.width, settings)


def vectors_of_block(features: int, settings: Settings) -> int:
    """How many vectors the Jacobians of one block are multiplied with."""
    return features if settings.probes == "exact" else min(int(settings.probes), features)


def forwards_from(extent: Extent, index: int) -> int:
    """How many layers run in an experiment whose first layer to do work is `index`."""
    return extent.num_layers - index if extent.resumable else extent.num_layers - 1


def swappable_pairs(extent: Extent, *, adjacent: bool) -> list[tuple[int, int]]:
    """Pairs of layers i < j of equal kind, in order of i; with `adjacent` only neighbours."""
    pairs = combinations(range(extent.num_layers), 2)
    return [(i, j) for i, j in pairs if extent.layer_types[i] == extent.layer_types[j] and (j == i + 1 or not adjacent)]
