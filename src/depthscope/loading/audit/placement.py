"""Which parameter of a loaded model each stored tensor went to."""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from depthscope.loading.audit.stored import StoredTensor, StoredTensors

__all__ = ["Placement", "place"]


@dataclass(frozen=True)
class Placement:
    """Where the stored tensors went.

    `used`: the stored tensors of each parameter (several if they were merged, or if one scales another); `converted`:
    the parameters that were computed from their tensors; `unplaced`: the tensors that went to no parameter;
    `unexpected_names`: names that transformers reports as unexpected and that no stored tensor has.
    """

    state: dict[str, torch.Tensor]
    used: dict[str, list[StoredTensor]] = field(default_factory=lambda: defaultdict(list))
    converted: set[str] = field(default_factory=set)
    unplaced: list[StoredTensor] = field(default_factory=list)
    unexpected_names: list[str] = field(default_factory=list)


def place(model: Any, stored: StoredTensors, unexpected: set[str]) -> Placement:
    """Repeat by name what `from_pretrained` did with each stored tensor; it keeps no record of it.

    Args:
        model: the model that `from_pretrained` returned.
        stored: the tensors of its files.
        unexpected: the unexpected keys that transformers reports, after its own renaming.
    """
    # The merges, renamings and dequantisations that the stored names required.
    conversions = getattr(model, "_weight_conversions", None) or []
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    prefix = model.base_model_prefix
    placement = Placement(model.state_dict())
    explained = set()
    for tensor in stored:
        name, pattern = rename_source_key(tensor.name, renamings, converters, prefix, placement.state)
        if name not in placement.state and tensor.name in placement.state:
            name, pattern = rename_source_key(tensor.name, [], [], prefix, placement.state)
        if name not in placement.state:
            explained |= {name, tensor.name}
            placement.unplaced.append(tensor)
            continue
        placement.used[name].append(tensor)
        if pattern is not None:
            placement.converted.add(name)
    placement.unexpected_names.extend(sorted(unexpected - explained))
    return placement
