"""The weights with which a layer acts: active adapters merged in, parametrizations and masks applied.

The parameters of a layer are not always its weights. PEFT keeps an adapter's beside the base's, and a fresh adapter
changes nothing; `torch.nn.utils` keeps what a weight is made of (parametrizations, pruning masks, weight norms). What
acts is computed by their own code, on copies of one module's parameters at a time: the model stays as it is, to a bit.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

__all__ = ["NoWeightsError", "acting_weights", "adapters_in"]

MERGE_FAILURES = (NotImplementedError, ValueError, RuntimeError, AttributeError, TypeError, LookupError)
PACKED = ("weight", "qweight", "weight_packed")  # names of buffers that quantised modules keep codes in


class NoWeightsError(Exception):
    """A layer acts with weights that cannot be had: codes of a quantisation, or an adapter that cannot be merged."""


@torch.no_grad()
def acting_weights(layer: nn.Module) -> Iterator[Tensor]:
    """Every weight with which a layer acts, of any number of dimensions, one after the other.

    Raises:
        NoWeightsError: they cannot be had.
    """
    yield from _of_module(layer, set())


def adapters_in(model: nn.Module) -> tuple[list[str], list[str]]:
    """The names of the adapters that act in a model, and of those that it has and that do not."""
    owners = [module for module in model.modules() if _is_adapted(module) or _is_replaced(module)]
    known = {str(name) for owner in owners for name in _names_in(owner)}
    acting = {str(name) for owner in owners if not owner.disable_adapters for name in _acting_names(owner)} & known
    return sorted(acting), sorted(known - acting)


def _of_module(module: nn.Module, seen: set[int]) -> Iterator[Tensor]:
    if id(module) in seen:
        return
    seen.add(id(module))
    if _is_adapted(module):
        with _merged(module) as base:
            # The copies are gone afterwards, and others may get their identities: they are not remembered.
            yield from _of_module(base, set())
        return
    if _is_replaced(module):
        yield from _of_module(_acting_module(module), seen)
        return
    yield from _own_weights(module, seen)
    for name, child in module.named_children():
        if name != "parametrizations":
            yield from _of_module(child, seen)


def _own_weights(module: nn.Module, seen: set[int]) -> Iterator[Tensor]:
    """What a module itself acts with, its children left out."""
    made = dict(_made(module))
    yield from made.values()
    for name, weight in module._parameters.items():
        part_of = name.removesuffix("_orig").removesuffix("_g").removesuffix("_v")
        if weight is None or part_of in made or id(weight) in seen:
            continue
        seen.add(id(weight))
        if weight.dim() > 1 and (not weight.is_floating_point() or weight.element_size() < 2):
            raise NoWeightsError(f"{type(module).__name__} holds codes of type {weight.dtype}")
        yield weight
    for name in PACKED:
        codes = module._buffers.get(name)
        if codes is not None and codes.dim() > 1 and not codes.is_floating_point():
            raise NoWeightsError(f"{type(module).__name__} holds codes of type {codes.dtype}")


def _made(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weights that a module makes of its parameters, by name."""
    if parametrize.is_parametrized(module):
        for name in module.parametrizations:  # type: ignore[union-attr]
            yield name, getattr(module, name)
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, prune.BasePruningMethod):
            yield hook._tensor_name, hook.apply_mask(module)
        elif isinstance(hook, WeightNorm):
            yield hook.name, hook.compute_weight(module)
        elif isinstance(hook, SpectralNorm):
            yield hook.name, hook.compute_weight(module, do_power_iteration=False)


# ---------------------------------------------------------------------------------------------------------------- PEFT


def _peft(part: str) -> Any:
    """A part of PEFT, where a model can have come from it."""
    return sys.modules.get(f"peft.{part}")


def _is_adapted(module: nn.Module) -> bool:
    peft = _peft("tuners.tuners_utils")
    return peft is not None and isinstance(module, peft.BaseTunerLayer) and hasattr(module, "base_layer")


def _is_replaced(module: nn.Module) -> bool:
    peft = _peft("utils.other")
    return peft is not None and isinstance(module, peft.ModulesToSaveWrapper)


def _names_in(owner: Any) -> list[str]:
    return list(owner.modules_to_save) if _is_replaced(owner) else list(owner._get_available_adapters())


def _acting_names(owner: Any) -> list[str]:
    return list(getattr(owner, "merged_adapters", None) or owner.active_adapters)


def _acting_module(wrapper: Any) -> nn.Module:
    """The trained copy of a module that stands in for it, or itself."""
    for name in () if wrapper.disable_adapters else wrapper.active_adapters:
        if name in wrapper.modules_to_save:
            return wrapper.modules_to_save[name]
    return wrapper.original_module


@contextmanager
def _merged(tuner: Any) -> Iterator[nn.Module]:
    """The module inside an adapter's, with the adapter merged into copies of its parameters."""
    chain = [tuner]  # of several parameters of one module each has its own
    while _is_adapted(chain[-1].base_layer):
        chain.append(chain[-1].base_layer)
    base: nn.Module = tuner.get_base_layer()
    owners = [module for module in base.modules() if module._parameters]
    kept = [dict(owner._parameters) for owner in owners]
    merged = [list(each.merged_adapters) for each in chain]
    caches = [dict(getattr(each, "_caches", {})) for each in chain]
    try:
        for owner in owners:
            owner._parameters.update({name: _copied(weight) for name, weight in owner._parameters.items()})
        _merge(chain)
        yield base
    finally:
        for owner, parameters in zip(owners, kept, strict=True):
            owner._parameters.update(parameters)
        for each, names, cache in zip(chain, merged, caches, strict=True):
            each.merged_adapters[:] = names
            if hasattr(each, "_caches"):
                each._caches.clear()
                each._caches.update(cache)


def _merge(chain: list[Any]) -> None:
    """Merge what acts in the next forward pass: nothing more where something is merged, nothing where it is off."""
    for each in reversed(chain):
        try:
            if each.disable_adapters and each.merged:
                each.unmerge()
            elif not each.disable_adapters and not each.merged:
                each.merge()
        except MERGE_FAILURES as error:
            raise NoWeightsError(f"{type(each).__name__} cannot be merged ({error})") from error


def _copied(weight: nn.Parameter | None) -> nn.Parameter | None:
    """A copy in at least float32, so that what an adapter adds is not rounded away."""
    if weight is None or weight.device.type == "meta" or not weight.is_floating_point() or weight.element_size() < 2:
        return weight
    return nn.Parameter(weight.detach().to(torch.promote_types(weight.dtype, torch.float32), copy=True), False)
