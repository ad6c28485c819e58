"""Layers whose arithmetic depends on their number: said by the weights where the configuration has no setting for it.

Each rewrite takes the weights of the kept layers under their new names and changes them so that each layer computes at
its new number what it computed at the old one. The logits of the cut model prove it.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["REWRITES", "Rewrite", "Weights"]

Weights = dict[str, Tensor]
# (weights by their new names, "model.layers", the settings of the whole language model, the kept layers) -> weights
Rewrite = Callable[[Weights, str, Any, Sequence[int]], Weights]


def _diffllama(weights: Weights, path: str, config: Any, kept: Sequence[int]) -> Weights:
    """DiffLlama has lambda = exp(q1 k1) - exp(q2 k2) + c_l, and multiplies the normed output by 1 - c_l.

    c_l = 0.8 - 0.6 exp(-0.3 l) rises with l, so what a smaller number lacks can be added to the first term.
    """
    changed: Weights = {}
    for place, layer in enumerate(kept):
        before, now = (0.8 - 0.6 * math.exp(-0.3 * number) for number in (layer, place))
        names = [f"{path}.{place}.self_attn.lambda_{name}" for name in ("q1", "k1")]
        query, key = (weights[name].double() for name in names)
        wanted = (query @ key).exp().add(before - now).log()
        if not key.any():
            key = torch.ones_like(key)
        moved = query + (wanted - query @ key) / (key @ key) * key
        changed |= {names[0]: moved.to(weights[names[0]]), names[1]: key.to(weights[names[1]])}
        output = f"{path}.{place}.self_attn.o_proj.weight"
        changed[output] = weights[output] * ((1 - before) / (1 - now))
    return weights | changed


def _gpt2(weights: Weights, path: str, config: Any, kept: Sequence[int]) -> Weights:
    """GPT-2 with scale_attn_by_inverse_layer_idx divides attention scores by l + 1: the queries take the difference."""
    if not config.scale_attn_by_inverse_layer_idx:
        return weights
    changed: Weights = {}
    for place, layer in enumerate(kept):
        for name in (f"{path}.{place}.attn.c_attn.{part}" for part in ("weight", "bias")):
            width = weights[name].shape[-1] // 3  # queries, keys, values
            factors = torch.ones(3 * width, dtype=weights[name].dtype, device=weights[name].device)
            factors[:width] = (place + 1) / (layer + 1)
            changed[name] = weights[name] * factors
    return weights | changed


def _zamba2(weights: Weights, path: str, config: Any, kept: Sequence[int]) -> Weights:
    """Each shared block of Zamba 2 holds one adapter for each of its places, counted over the hybrid layers."""
    hybrid = [layer for layer, kind in enumerate(config.layers_block_type) if kind == "hybrid"]
    numbers = {str(hybrid.index(layer)): str(n) for n, layer in enumerate(x for x in kept if x in hybrid)}
    blocks = zamba2_blocks(config.num_mem_blocks, config.layers_block_type, kept)
    places = [place for place, layer in enumerate(kept) if layer in hybrid]
    changed: Weights = {}
    for name, weight in weights.items():
        before, found, rest = name.partition("adapter_list.")
        if not found:
            changed[name] = weight
            continue
        number, _, rest = rest.partition(".")
        place = int(name.removeprefix(f"{path}.").partition(".")[0])
        if number in numbers and int(numbers[number]) % blocks == places.index(place) % blocks:
            changed[f"{before}{found}{numbers[number]}.{rest}"] = weight
    return changed


def zamba2_blocks(blocks: int, kinds: Sequence[str], kept: Sequence[int]) -> int:
    """How many shared blocks Zamba 2's kept hybrid layers take turns with: as many as before, or one each."""
    hybrid = [layer for layer, kind in enumerate(kinds) if kind == "hybrid"]
    turns = [hybrid.index(layer) % blocks for layer in kept if layer in hybrid]
    return blocks if turns == [place % blocks for place in range(len(turns))] else len(turns)


def _zaya(weights: Weights, path: str, config: Any, kept: Sequence[int]) -> Weights:
    """ZAYA's routers add the state of the layer before, times a scale: none where that layer was cut."""
    changed = dict(weights)
    for place, layer in enumerate(kept):
        name = f"{path}.{place}.mlp.gate.router_states_scale"
        if place == 0:
            changed.pop(name, None)
        elif kept[place - 1] != layer - 1:
            changed[name] = torch.zeros_like(weights[name])
    return changed


# By the model type of the language model.
REWRITES: dict[str, Rewrite] = {
    "diffllama": _diffllama,
    "gpt2": _gpt2,
    "zamba2": _zamba2,
    "zaya": _zaya,
}
