"""What the layers of a model are made of: how a cut configuration is held against the layers that it is for."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

__all__ = ["LayerFacts", "differences", "facts_of", "kinds_that_differ", "new_name", "written_name"]

# Attributes that hold the number of the layer or a mode, under whatever name, and not what it computes.
NUMBERS = ("layer_idx", "layer_id", "layer_number", "layer_index", "block_idx", "training")

# Attributes that say which tokens a layer sees: short texts would not show that they changed.
KINDS = ("sliding", "window", "attention_type", "layer_type", "block_type", "chunk", "local", "rope")

LayerFacts = dict[str, Any]


def facts_of(layer: nn.Module) -> LayerFacts:
    """The classes, shapes and plain attributes of a layer's modules, by name."""
    facts: LayerFacts = {}
    for name, module in layer.named_modules():
        name = written_name(name)
        facts[f"{name} (class)"] = type(module).__name__
        for parameter, tensor in (*module._parameters.items(), *module._buffers.items()):
            facts[_joined(name, parameter)] = None if tensor is None else tuple(tensor.shape)
        for attribute, value in vars(module).items():
            if not attribute.startswith("_") and attribute not in NUMBERS and _is_plain(value):
                facts[_joined(name, attribute)] = list(value) if isinstance(value, tuple) else value
    return facts


def differences(wanted: Sequence[LayerFacts], built: Sequence[LayerFacts], kept: Sequence[int]) -> list[str]:
    """Where the layers that were built are made differently from those that they are for; names are new ones."""
    if len(wanted) != len(built):
        return [f"{len(built)} layers instead of {len(wanted)}"] * max(1, abs(len(wanted) - len(built)) * 1000)
    places = {layer: place for place, layer in enumerate(kept)}
    return [
        f"layer {place}: {name} is {its.get(name)!r}, not {ours.get(name)!r}"
        for place, (ours, its) in enumerate(zip(wanted, built, strict=True))
        for name in sorted(ours.keys() | its.keys())
        if not _is_same(ours.get(name), its.get(name), places)
    ]


def kinds_that_differ(found: Sequence[str]) -> list[str]:
    """Of the differences, those that long texts alone may show."""
    return [each for each in found if any(word in each.partition(" is ")[0] for word in KINDS)]


def written_name(name: str) -> str:
    """The name of a module or weight in a model as it was written, of which none is compiled."""
    return name.replace("_orig_mod.", "").removesuffix("_orig_mod").removesuffix(".")


def new_name(name: str, path: str, kept: Sequence[int]) -> str | None:
    """What a weight or module of a model is called after a cut; None of one in a layer that is cut.

    Args:
        name: its name before.
        path: the name of the list of layers.
        kept: the layers that are kept.
    """
    name = written_name(name)
    if not name.startswith(f"{path}."):
        return name
    number, _, rest = name.removeprefix(f"{path}.").partition(".")
    return f"{path}.{kept.index(int(number))}.{rest}" if int(number) in kept else None


def _is_same(ours: Any, its: Any, places: Mapping[int, int]) -> bool:
    """Whether two values are equal, or the second is the new number of the layer that the first names."""
    if ours == its and type(ours) is type(its):
        return True
    is_number = type(ours) is int and type(its) is int
    return is_number and places.get(ours) == its


def _joined(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(each) for each in value)
    return value is None or isinstance(value, bool | int | float | str | torch.dtype)
