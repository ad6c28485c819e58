"""A model without some of its layers, as modules in their places: gaps that are passed over, or repaired."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import nn

from depthscope.layers.stand_ins import PassThrough

__all__ = ["Cut", "Repair", "gaps_of", "standing_in"]

Repair: TypeAlias = Mapping[int, nn.Module]


def gaps_of(removed: Iterable[int]) -> Iterator[range]:
    """The runs of consecutive layers among those that are removed, in rising order."""
    layers = sorted(removed)
    start = 0
    for place, layer in enumerate(layers):
        if place + 1 == len(layers) or layers[place + 1] != layer + 1:
            yield range(layers[start], layer + 1)
            start = place + 1


@dataclass(frozen=True)
class Cut:
    """Some layers removed, and what stands in the gaps.

    Attributes:
        removed: the layers.
        repairs: by gap, what stands in the places of which layers to repair it: an affine map in the first place of the
            gap, or the layer before the gap with other weights; a gap without a repair is passed over.
    """

    removed: frozenset[int] = frozenset()
    repairs: Mapping[range, Repair] = field(default_factory=dict)

    @property
    def gaps(self) -> list[range]:
        """The runs of consecutive removed layers."""
        return list(gaps_of(self.removed))

    def gap_with(self, layer: int) -> range:
        """The gap that a layer would be in, were it removed too."""
        return next(gap for gap in gaps_of(self.removed | {layer}) if layer in gap)

    def replacements(self) -> dict[int, nn.Module]:
        """What stands in the places of layers, as `LayerStack.replacing` takes it."""
        found: dict[int, nn.Module] = {}
        for gap in self.gaps:
            found |= standing_in(gap, self.repairs.get(gap, {}))
        return found

    def and_without(self, gap: range, repair: Repair | None = None) -> "Cut":
        """The same without the layers of a gap, which may hold smaller gaps, and with a repair of it."""
        others = {each: by for each, by in self.repairs.items() if each.start not in gap}
        return Cut(self.removed | set(gap), {**others, gap: repair} if repair else others)


def standing_in(gap: range, repair: Repair) -> dict[int, nn.Module]:
    """Nothing in the places of a gap, but for its repair."""
    return {**{layer: PassThrough() for layer in gap}, **repair}
