"""What the scores of attention and MLP share: the experiments, what counts as a value, and what a report says of them.

A part of a layer is left out by setting what it returns to zero; the rest of the layer runs, on what is then given to
it. `depthscope.layers.lanes.sublayers` tries for which parts that means what it says.
"""

from collections.abc import Iterable

import numpy as np

from depthscope.layers.lanes.lane import Lane
from depthscope.layers.lanes.sublayers import Part, WithPart, sublayers_of, zeros
from depthscope.layers.stack import LayerStack
from depthscope.layers.tracing import PARTS
from depthscope.wording.messages import ranges

__all__ = ["by_part", "named", "part_of", "parts_of", "sublayer_notes", "without_lanes"]

NAMES = {"attention": "attention", "mlp": "MLP"}


def parts_of(stack: LayerStack, wanted: bool) -> list[Part]:
    """The parts that have scores of their own: none unless they are asked for."""
    return sublayers_of(stack).usable if wanted else []


def without_lanes(stack: LayerStack, wanted: bool, *, logits: bool = False, watched: bool = False) -> Iterable[Lane]:
    """A lane for each part, which is left out in it, with what is wanted of it."""
    return [
        Lane(
            ("skip", part.layer, part.name),
            {part.layer: WithPart(part.module, zeros)},
            logits=logits,
            watched=watched,
        )
        for part in parts_of(stack, wanted)
    ]


def part_of(lane: Lane) -> str:
    """Of an experiment with a part, the part's name and an underscore; else nothing."""
    return f"{lane.key[2]}_" if isinstance(lane.key, tuple) and len(lane.key) > 2 else ""


def by_part(stack: LayerStack, wanted: bool, name: str, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The numbers of attention and MLP per layer, [L] each: what `values` has of those that are measured, else NaN."""
    found = {}
    for part in PARTS if wanted else ():
        measured = [each.layer for each in parts_of(stack, wanted) if each.name == part]
        column = np.full(stack.num_layers, np.nan)
        if part in values:
            column[measured] = values[part][measured]
        found[f"{part}_{name}"] = column
    return found


def named(parts: Iterable[Part]) -> str:
    """Write parts by layer: "attention of layers 0 and 1, MLP of layer 3"."""
    listed = list(parts)
    found = [(name, [part.layer for part in listed if part.name == name]) for name in PARTS]
    return ", ".join(f"{NAMES[name]} of {_layers(layers)}" for name, layers in found if layers)


def sublayer_notes(stack: LayerStack) -> list[str]:
    """What a reader must know of the parts of this model."""
    parts, notes = sublayers_of(stack), []

    def places(by_name: dict[str, list[int]]) -> str:
        return ", ".join(f"the {NAMES[name]} of {_layers(by_name[name])}" for name in PARTS if name in by_name)

    if parts.missing:
        notes.append(
            f"sublayers: {places(parts.missing)}: there is no such module, or it could not be told apart from the rest "
            "of the layer; those scores are empty."
        )
    if parts.cutting:
        notes.append(
            f"sublayers: {places(parts.cutting)}: the residual stream passes through what it returns, so that leaving "
            "it out would cut the stream; those scores are empty."
        )
    if parts.failing:
        notes.append(
            f"sublayers: {places(parts.failing)}: the layer does not run without what it returns, or does not use it; "
            "those scores are empty."
        )
    if parts.parallel:
        notes.append(
            f"sublayers: attention and MLP are parallel in {_layers(parts.parallel)}: both read the layer's input, and "
            "neither sees what the other returns."
        )
    return notes


def _layers(layers: list[int]) -> str:
    """Write layers with ranges: "layer 3", "layers 0-3, 5"."""
    return f"layer{'s' if len(layers) > 1 else ''} {ranges(layers)}"
