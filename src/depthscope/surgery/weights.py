"""The weights of a cut model: those of the kept layers under their new numbers, and all that lies outside of them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from depthscope.errors import SurgeryError
from depthscope.surgery.rewrites import REWRITES
from depthscope.surgery.structure import new_name
from depthscope.wording.messages import listed

__all__ = ["cut_weights"]


def cut_weights(
    weights: Mapping[str, Tensor],
    places: Mapping[str, Tensor],
    path: str,
    kept: Sequence[int],
    num_layers: int,
    config: Any,
) -> dict[str, Tensor]:
    """Copies of a model's weights by the names that the cut model has for them.

    Args:
        weights: all weights of the model.
        places: the weights of the cut model, whose values do not matter.
        path: the name of the list of layers.
        kept: the layers to keep.
        num_layers: the number of layers, L.
        config: the configuration of the language model before the cut.

    Raises:
        SurgeryError: a weight has no place in the cut model, or a place has no weight; the message names them.
    """
    rewrite = REWRITES.get(config.model_type)
    renamed = ((new_name(name, path, kept), weight) for name, weight in weights.items())
    named = {name: weight for name, weight in renamed if name is not None}
    if rewrite is not None:
        named = rewrite(named, path, config, kept)
    _require_places(named.keys(), places.keys())
    copies: dict[tuple[Any, ...], Tensor] = {}
    return {
        name: _copied(_fitted(name, named.get(name), place, kept, num_layers), copies) for name, place in places.items()
    }


def _require_places(names: Any, places: Any) -> None:
    missing = sorted(name for name in places - names if not name.endswith("bias"))
    unplaced = sorted(names - places)
    if missing or unplaced:
        problems = [f"{listed(unplaced)} would have no place" if unplaced else ""]
        problems += [f"{listed(missing)} would have no values" if missing else ""]
        raise SurgeryError(
            f"The configuration cannot describe the kept layers: {' and '.join(p for p in problems if p)} in the cut "
            "model (names as in the cut model). Keep other layers."
        )


def _fitted(name: str, weight: Tensor | None, place: Tensor, kept: Sequence[int], num_layers: int) -> Tensor:
    """A weight with the shape of its place: of one that holds a block for each layer, the blocks of the kept ones."""
    if weight is None:
        # A bias that a class has in its last layer only, say: zeros do what none does, and the logits show it.
        return torch.zeros(place.shape, dtype=place.dtype)
    if weight.shape == place.shape:
        return weight
    axes = [axis for axis, (old, new) in enumerate(zip(weight.shape, place.shape, strict=False)) if old != new]
    if weight.dim() == place.dim() and len(axes) == 1:
        old, new = weight.shape[axes[0]], place.shape[axes[0]]
        if old % num_layers == 0 and old // num_layers * len(kept) == new:
            blocks = weight.unflatten(axes[0], (num_layers, old // num_layers))
            chosen = torch.tensor(list(kept), device=weight.device)
            return blocks.index_select(axes[0], chosen).flatten(axes[0], axes[0] + 1)
    raise SurgeryError(
        f"{name} has the shape {tuple(weight.shape)} and would have to have {tuple(place.shape)} in the cut model; "
        "how it depends on the layers is not known. Keep other layers, or cut this model by hand."
    )


def _copied(weight: Tensor, copies: dict[tuple[Any, ...], Tensor]) -> Tensor:
    """A copy; weights that are one (tied, or of a shared module) have one."""
    key = (weight.data_ptr(), weight.device, weight.shape, weight.stride(), weight.dtype)
    if weight.numel() == 0 or key not in copies:
        copies[key] = weight.detach().clone()
    return copies[key]
