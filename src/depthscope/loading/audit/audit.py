"""Comparing every tensor and every setting of a checkpoint with the model that was loaded from it.

A difference that changes the function is refused: codes read as weights, missing weights, weights that the model has no
place for, settings that it does not use. A difference that does not matter is noted. Only the headers of the files are
read, and the values of the few tensors where they decide.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from depthscope.errors import ModelLoadError
from depthscope.loading.audit.codes import unscaled_note, why_codes
from depthscope.loading.audit.leftovers import Leftovers
from depthscope.loading.audit.placement import Placement, place
from depthscope.loading.audit.stored import StoredTensor, StoredTensors
from depthscope.loading.audit.unused_settings import unused_settings, unused_settings_notes
from depthscope.loading.checkpoint import INDEX, WEIGHTS, Checkpoint
from depthscope.wording.messages import listed

__all__ = ["audit", "require_all_weights"]


def audit(
    checkpoint: Checkpoint, settings: Mapping[str, Any], stored: StoredTensors, model: Any, info: Mapping[str, Any]
) -> list[str]:
    """Refuse a model that is not the one in its files; return notes on tensors and settings that do not matter.

    Args:
        checkpoint: the files.
        settings: the content of config.json.
        stored: the tensors of the files that were read.
        model: the model that `from_pretrained` made from them.
        info: its loading info.

    Raises:
        ModelLoadError: the model would not compute the function of the checkpoint; the message says what to do.
    """
    placed = place(model, stored, set(info["unexpected_keys"]))
    if problem := why_codes(checkpoint, settings, model, placed):
        raise ModelLoadError(problem)
    require_all_weights(checkpoint.name, info, placed)
    _refuse_doubles(checkpoint.name, stored, placed)
    _refuse_untied(checkpoint.name, model, stored, placed)
    leftovers = Leftovers(model, stored, placed)
    if leftovers.harmful:
        raise ModelLoadError(_harmful(checkpoint.name, model, leftovers))
    if problem := unused_settings(checkpoint.name, settings, model):
        raise ModelLoadError(problem)
    notes = [unscaled_note(placed), _harmless(leftovers), _second_weights(checkpoint, stored)]
    return [note for note in notes if note is not None] + unused_settings_notes(settings, model)


def require_all_weights(name: str, info: Mapping[str, Any], placed: Placement | None = None) -> None:
    """Refuse a model with weights that transformers would fill with random numbers."""
    missing, mismatched = sorted(info["missing_keys"]), sorted(entry[0] for entry in info["mismatched_keys"])
    problems = [f"{len(missing)} are missing ({listed(missing)})"] if missing else []
    problems += [f"{len(mismatched)} have another shape ({listed(mismatched)})"] if mismatched else []
    if not problems:
        return
    others = sorted(tensor.name for tensor in placed.unplaced) if placed else []
    instead = f" There are {len(others)} others without a place ({listed(others)})." if others and missing else ""
    raise ModelLoadError(
        f"The weights of {name!r} do not fit its config: {' and '.join(problems)}.{instead} It would run with random "
        "numbers in their place; fetch or save the model again, config and weights together."
    )


def _refuse_doubles(name: str, stored: StoredTensors, placed: Placement) -> None:
    """Refuse a parameter that the files hold twice with different numbers: one of the two would be lost."""
    doubles = [
        (first, second)
        for parameter, tensors in placed.used.items()
        if parameter not in placed.converted
        for first, second in pairwise(tensors)
    ]
    doubles += [(tensor, stored.by_name[tensor.name]) for tensor in stored.tensors]
    for first, second in doubles:
        if first is not second and not stored.are_equal(first, second):
            raise ModelLoadError(
                f"{name!r} holds one weight twice with different numbers: {_place(first)}, {_place(second)}. Only one "
                "would be used; delete the wrong one, or save the model again."
            )


def _place(tensor: StoredTensor) -> str:
    return f"{tensor.name} in {tensor.path.name}"


def _refuse_untied(name: str, model: Any, stored: StoredTensors, placed: Placement) -> None:
    """Refuse two different weights that the config ties: transformers uses both, other tools only the first."""
    for target, source in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        stored_twice = [placed.used.get(each) for each in (source, target)]
        if all(stored_twice) and model.get_parameter(target) is not model.get_parameter(source):
            first, second = (tensors[0] for tensors in stored_twice if tensors)
            if not stored.are_equal(first, second):
                raise ModelLoadError(
                    f"config.json of {name!r} ties {source} and {target} (tie_word_embeddings), but the stored weights "
                    "differ. Set tie_word_embeddings to false to use the stored head, or save the model without "
                    f"{target}."
                )


def _harmful(name: str, model: Any, leftovers: Leftovers) -> str:
    groups = "; ".join(f"{len(names)} {description} ({listed(names)})" for description, names in leftovers.harmful)
    return (
        f"{name!r} holds weights that {type(model).__name__} has no place for with this config, and without them it "
        f"computes something else: {groups}. Correct config.json (model_type, number of layers, biases, norms), or, "
        "if the model does not need them, save it again with save_pretrained."
    )


def _harmless(leftovers: Leftovers) -> str | None:
    if not leftovers.harmless:
        return None
    groups = "; ".join(f"{description}: {len(names)} ({listed(names)})" for description, names in leftovers.harmless)
    return f"Left out of the checkpoint, without changing what the model computes: {groups}."


def _second_weights(checkpoint: Checkpoint, stored: StoredTensors) -> str | None:
    if WEIGHTS in stored.files and INDEX in checkpoint.files:
        return f"The weights were read from {WEIGHTS}; {INDEX} and its files beside it were not read."
    return None
