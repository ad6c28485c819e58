"""What each setting of a configuration may mean for single layers, and its value for the layers that a cut keeps.

A list as long as the stack holds one value a layer; a list of rising numbers may hold the numbers of layers; a
dictionary may have them as keys; a number may count layers from the first or from the last one. A setting that can be
read in several ways has several values, the likeliest first: which of them is right is found by building the model.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from depthscope.surgery.rules import FROM_THE_END, FROM_THE_START, RULES, Settings

__all__ = ["COUNTS", "Readings", "read_settings"]

# What architectures call the number of layers.
COUNTS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "num_blocks")
NAMES_LAYERS = re.compile(r"layer|idx|indices|index|block|_ids$")
NAMES_KINDS = re.compile(r"type|pattern|kind")
OF_TOKENS = ("_token_id", "_token_ids", "_token_index")


@dataclass
class Readings:
    """The settings of the cut model in their likeliest reading, and for some of them the other values, by name."""

    settings: Settings
    others: dict[str, list[Any]] = field(default_factory=dict)


def read_settings(settings: Mapping[str, Any], count: str, kept: Sequence[int], num_layers: int) -> Readings:
    """Read the settings of a language model as those of its kept layers.

    Args:
        settings: those that the number of layers stands among.
        count: what the number of layers is called there, besides its usual names.
        kept: the layers to keep.
        num_layers: the number of layers, L.

    Raises:
        SurgeryError: a setting cannot be said of the kept layers; the message names it.
    """
    result: Settings = dict(settings)
    others: dict[str, list[Any]] = {}
    by_rule: Settings = {}
    for name, rule in RULES.items():
        if settings.get(name) is not None:
            by_rule |= rule(settings, kept, num_layers)
    for name, value in settings.items():
        if name in by_rule:
            continue
        if name in (count, *COUNTS) and value == num_layers:
            result[name] = len(kept)
            continue
        values = list(_values(name, value, kept, num_layers))
        if values:
            result[name] = values[0]
        if more := [each for each in [*values[1:], value] if each != result[name]]:
            others[name] = more
    return Readings({**result, **by_rule}, others)


def _values(name: str, value: Any, kept: Sequence[int], num_layers: int) -> list[Any]:
    """The values that a setting may have for the kept layers, the likeliest first; empty where it says nothing of them.

    A whole number stays as it is by default; only where the model that is built has other layers, it counted some.
    """
    if name.endswith(OF_TOKENS):
        return []
    if isinstance(value, list | tuple):
        return _of_list(name, list(value), kept, num_layers)
    if isinstance(value, Mapping):
        return _of_dictionary(name, value, kept, num_layers)
    if type(value) is int and 1 <= value <= num_layers:
        start = sum(layer < value for layer in kept)
        end = sum(layer >= num_layers - value for layer in kept)
        if name in FROM_THE_START:
            return [start]
        return [end] if name in FROM_THE_END else _different([value, start, end])
    return []


def _of_list(name: str, value: list[Any], kept: Sequence[int], num_layers: int) -> list[Any]:
    values = []
    if _are_layers(value, num_layers) and NAMES_LAYERS.search(name):
        values.append([place for place, layer in enumerate(kept) if layer in value])
    if len(value) == num_layers:
        values.append([value[layer] for layer in kept])
    elif value and NAMES_KINDS.search(name) and all(isinstance(each, str) for each in value):
        values += [value, [value[layer % len(value)] for layer in kept]]  # gone round until all layers have one
    return _different(values)


def _are_layers(value: Sequence[Any], num_layers: int) -> bool:
    """Whether a list may hold numbers of layers: whole, of the stack, rising."""
    whole = all(type(each) is int and 0 <= each < num_layers for each in value)
    return bool(value) and whole and all(one < other for one, other in pairwise(value))


def _of_dictionary(name: str, value: Mapping[Any, Any], kept: Sequence[int], num_layers: int) -> list[Any]:
    if not value or "layer" not in name:
        return []
    if not all(str(key).isdecimal() and int(key) < num_layers for key in value):
        return []
    places = {layer: place for place, layer in enumerate(kept)}
    return [{type(key)(places[int(key)]): each for key, each in value.items() if int(key) in places}]


def _different(values: list[Any]) -> list[Any]:
    """The values without repetitions, in their order."""
    return [value for place, value in enumerate(values) if value not in values[:place]]
