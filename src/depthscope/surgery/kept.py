"""The layers that a cut keeps: checked, and remembered by their numbers in the first model of all."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from depthscope.errors import SettingsError
from depthscope.wording.messages import ranges
from depthscope.wording.numeric import require_whole

__all__ = ["KEPT_LAYERS", "composed", "original_layers", "require_kept"]

KEPT_LAYERS = "kept_layers"  # the name in config.json


def require_kept(kept: Iterable[int], num_layers: int) -> tuple[int, ...]:
    """The layers to keep, as whole numbers in rising order: at least one of the model's layers, and not all.

    Raises:
        SettingsError: they are something else; the message names what was given.
    """
    if isinstance(kept, str | bytes) or not isinstance(kept, Iterable):
        raise SettingsError(f"kept is {kept!r}; give the numbers of the layers to keep, such as [0, 1, 3].")
    whole = tuple(require_whole("a layer of kept", layer, least=0) for layer in kept)
    last = num_layers - 1
    if not whole:
        raise SettingsError("kept names no layer; a model needs at least one. Give the numbers of the layers to keep.")
    if outside := [layer for layer in whole if layer > last]:
        raise SettingsError(f"kept names layer {outside[0]}, but this model has layers 0 to {last}.")
    for one, other in pairwise(whole):
        if one == other:
            raise SettingsError(f"kept names layer {one} twice; name each layer once.")
        if one > other:
            raise SettingsError(
                f"kept names layer {other} after layer {one}; give them in rising order: a cut does not move layers."
            )
    if len(whole) == num_layers:
        raise SettingsError(f"kept names all layers ({ranges(whole)}), so there is nothing to cut; leave some out.")
    return whole


def original_layers(config: Any) -> tuple[int, ...] | None:
    """The numbers that a cut model's layers had before the first cut; None for a model that was never cut."""
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    kept = vars(text).get(KEPT_LAYERS)
    return tuple(kept) if isinstance(kept, Sequence) and not isinstance(kept, str) else None


def composed(config: Any, kept: Sequence[int], num_layers: int) -> list[int]:
    """The original numbers of the kept layers of a model, which may have been cut before."""
    before = original_layers(config)
    # A list of another length was written by something else, or layers were added since.
    return [before[layer] for layer in kept] if before is not None and len(before) == num_layers else list(kept)
