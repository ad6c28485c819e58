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
    """What became of the stored tensors.

    `used` has the stored tensors of each parameter (several where they were merged or where one was undone by another),
    `converted` the parameters that were computed from theirs, `left` the tensors that went nowhere and `lost` the
    names that transformers says went nowhere and that no stored tensor has.
    """

    state: dict[str, torch.Tensor]
    used: dict[str, list[StoredTensor]] = field(default_factory=lambda: defaultdict(list))
    converted: set[str] = field(default_factory=set)
    left: list[StoredTensor] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)


def place(model: Any, stored: StoredTensors, unexpected: set[str]) -> Placement:
    """Repeat by name what `from_pretrained` did with each stored tensor; it keeps no record of it.

    Args:
        model: as `from_pretrained` returned it.
        stored: the tensors of its files.
        unexpected: what transformers reports as unexpected keys, after its own renaming.
    """
    # Merges, renamings and what undoes quantisations, as far as any stored name asked for them.
    conversions = getattr(model, "_weight_conversions", None) or []
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    prefix = model.base_model_prefix
    found = Placement(model.state_dict())
    explained = set()
    for tensor in stored:
        name, pattern = rename_source_key(tensor.name, renamings, converters, prefix, found.state)
        if name not in found.state and tensor.name in found.state:
            name, pattern = rename_source_key(tensor.name, [], [], prefix, found.state)
        if name not in found.state:
            explained |= {name, tensor.name}
            found.left.append(tensor)
            continue
        found.used[name].append(tensor)
        if pattern is not None:
            found.converted.add(name)
    found.lost.extend(sorted(unexpected - explained))
    return found
