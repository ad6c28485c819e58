"""PEFT adapters: loading the base model that an adapter names, and applying the adapter."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from depthscope.errors import ModelLoadError
from depthscope.files.atomic import reason, require_opens
from depthscope.loading.added_tokens import fit_vocabulary
from depthscope.loading.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Checkpoint, find_relative_folder
from depthscope.loading.loaded import LoadedModel
from depthscope.wording.messages import counted, listed, one_line

__all__ = ["apply_adapter", "apply_adapter_beside", "require_adapter_weights"]

# The exceptions of PEFT for a config or weights that it cannot apply to a model.
ADAPTER_FAILURES = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    RuntimeError,
    ImportError,
    AssertionError,
)
GIVE_IT = "Give it with --base-model (in Python: base_model=)"
# Adapters of these types load further adapters from any place that their config names.
NESTED_KINDS = ("XLORA",)


def apply_adapter(
    checkpoint: Checkpoint, load_base: Callable[[str, str | None], LoadedModel], base_model: str | None = None
) -> tuple[nn.Module, LoadedModel, list[str]]:
    """Load the base model that the adapter names, and apply the adapter.

    Args:
        checkpoint: the adapter's files.
        load_base: loads a model, given its name and revision.
        base_model: the base model, instead of the one that the adapter names.

    Returns:
        The model with the adapter, in evaluation mode; the loaded base model; and notes for the report.

    Raises:
        ModelLoadError: PEFT, the base model or the adapter's weights are missing, or do not fit each other.
    """
    config = _adapter_config(checkpoint)
    notes: list[str] = []
    if base_model is not None:
        base = load_base(base_model, None)
    else:
        base, notes = _named_base(checkpoint, load_base)
    model = _apply(checkpoint, config, base.model, base.facts["name"])
    notes += [*_unknown_settings(checkpoint, config), *_require_all_weights(checkpoint, model, base.facts["name"])]
    return model, base, notes


def _named_base(
    checkpoint: Checkpoint, load_base: Callable[[str, str | None], LoadedModel]
) -> tuple[LoadedModel, list[str]]:
    """The base model that an adapter names, and a note if its path is relative to the adapter's folder."""
    settings = checkpoint.read_json(ADAPTER_CONFIG)
    name, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if not isinstance(name, str) or not name:
        raise ModelLoadError(
            f"The adapter {checkpoint.name!r} does not name its base model. {GIVE_IT}, or set base_model_name_or_path "
            f"in its {ADAPTER_CONFIG}."
        )
    try:
        return load_base(name, revision if isinstance(revision, str) else None), []
    except ModelLoadError as error:
        relative = find_relative_folder(name, Path(checkpoint.location)) if checkpoint.is_local else None
        if relative is None or Path(name).is_dir():
            raise ModelLoadError(
                f"The base model of the adapter {checkpoint.name!r} cannot be loaded: {error} (It is named by "
                f"base_model_name_or_path in {ADAPTER_CONFIG}. {GIVE_IT} if it has moved.)"
            ) from error
    return load_base(str(relative), None), [
        f"The base model {name!r} of the adapter was found relative to the adapter's folder, not to the current one."
    ]


def apply_adapter_beside(checkpoint: Checkpoint, model: nn.Module) -> tuple[nn.Module, list[str]]:
    """Apply an adapter to the model in the same folder; return the model in evaluation mode, and notes.

    Raises:
        ModelLoadError: as for [`apply_adapter`].
    """
    config = _adapter_config(checkpoint)
    model = _apply(checkpoint, config, model, checkpoint.name)
    return model, [*_unknown_settings(checkpoint, config), *_require_all_weights(checkpoint, model, checkpoint.name)]


def _adapter_config(checkpoint: Checkpoint) -> Any:
    require_adapter_weights(checkpoint)
    with _adapter_errors(checkpoint, f"{ADAPTER_CONFIG} is not valid"):
        from peft import PeftConfig

        return PeftConfig.from_pretrained(**_location_arguments(checkpoint))


def require_adapter_weights(checkpoint: Checkpoint) -> None:
    """Refuse an adapter without PEFT, of a type that loads others, or whose weights are missing, pickled or damaged."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ModelLoadError(
            f"{checkpoint.name!r} is an adapter, which needs the package `peft`: pip install peft."
        ) from error
    if str(checkpoint.read_json(ADAPTER_CONFIG).get("peft_type")).upper() in NESTED_KINDS:
        raise ModelLoadError(
            f"{checkpoint.name!r} is an adapter that combines other adapters (X-LoRA); give a single adapter."
        )
    if ADAPTER_WEIGHTS in checkpoint.files:
        _stored_keys(checkpoint)
        return
    if "adapter_model.bin" in checkpoint.files:
        raise ModelLoadError(
            f"The adapter {checkpoint.name!r} holds its weights only as a pickle (adapter_model.bin), and loading a "
            f"pickle can run hidden code; {ADAPTER_WEIGHTS} is needed. If you trust its source, load it with PEFT once "
            "and save it again with save_pretrained."
        )
    raise ModelLoadError(
        f"The adapter {checkpoint.name!r} has no weights: {ADAPTER_WEIGHTS} was expected. Fetch it again."
    )


def _stored_keys(checkpoint: Checkpoint) -> set[str]:
    path = checkpoint.fetch(ADAPTER_WEIGHTS)
    try:
        if path is not None:
            require_opens(path)
        with safe_open(path, framework="pt") as file:
            return set(file.keys())
    except OSError as error:
        raise ModelLoadError(f"{ADAPTER_WEIGHTS} of {checkpoint.name!r} cannot be read: {reason(error)}.") from error
    except SafetensorError as error:
        raise ModelLoadError(
            f"{ADAPTER_WEIGHTS} of {checkpoint.name!r} is damaged ({one_line(error)}) Fetch the file again."
        ) from error


def _stored_shapes(checkpoint: Checkpoint) -> dict[str, list[int]]:
    with safe_open(checkpoint.fetch(ADAPTER_WEIGHTS), framework="pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (it is no dictionary)


def _unknown_settings(checkpoint: Checkpoint, config: Any) -> list[str]:
    """A note on settings with an effect that an older PEFT silently ignores."""
    settings = checkpoint.read_json(ADAPTER_CONFIG)
    unknown = sorted(name for name, value in settings.items() if value and not hasattr(config, name))
    if not unknown:
        return []
    return [
        f"{ADAPTER_CONFIG} of {checkpoint.name!r} has settings that the installed PEFT does not know and ignored: "
        f"{listed(unknown)}. If they change what the adapter does, update PEFT (pip install --upgrade peft)."
    ]


def _apply(checkpoint: Checkpoint, config: Any, base: nn.Module, name: str) -> nn.Module:
    from peft import PeftModel

    with _adapter_errors(checkpoint, f"it does not fit its base model {name!r}"):
        fit_vocabulary(checkpoint.name, config, _stored_shapes(checkpoint), base)
        model = PeftModel.from_pretrained(base, checkpoint.location, config=config, **_hub_arguments(checkpoint))
    return model.eval()


def _require_all_weights(checkpoint: Checkpoint, model: Any, base: str) -> list[str]:
    """Refuse an adapter that lacks weights, which PEFT would initialise, or that has weights without a place."""
    from peft import get_peft_model_state_dict

    stored, expected = _stored_keys(checkpoint), set(get_peft_model_state_dict(model, save_embedding_layers=False))
    unplaced = stored - expected - set(model.state_dict())  # complete embeddings may be stored too
    if not expected <= stored:
        # PEFT renames the weights of older adapters, so its own list decides.
        result = model.load_adapter(checkpoint.location, model.active_adapter, **_hub_arguments(checkpoint))
        if missing := result.missing_keys:
            raise ModelLoadError(
                f"The adapter {checkpoint.name!r} does not fit its base model {base!r}: {len(missing)} of its weights "
                f"are missing ({listed(missing)}). Check base_model_name_or_path, or fetch the adapter again."
            )
        unplaced = set(result.unexpected_keys)
    unplaced = unplaced - _repeated(checkpoint, unplaced, stored - unplaced)
    if not unplaced:
        return []
    if not _are_untrained(checkpoint, unplaced):
        raise ModelLoadError(
            f"The adapter {checkpoint.name!r} does not fit its base model {base!r}: {len(unplaced)} of its weights "
            f"have no place there ({listed(sorted(unplaced))}), and they change its function. Check "
            "base_model_name_or_path and target_modules."
        )
    return [
        f"{counted(len(unplaced), 'weight')} of the adapter {'has' if len(unplaced) == 1 else 'have'} no place in its "
        f"base model {base!r}; they belong to an untrained adapter, which adds nothing."
    ]


def _repeated(checkpoint: Checkpoint, names: set[str], others: set[str]) -> set[str]:
    """The weights that are stored again under another name: PEFT writes embeddings and tied heads twice."""
    names = {name for name in names if "lora_" not in name}
    if not names:
        return set()
    with safe_open(checkpoint.fetch(ADAPTER_WEIGHTS), framework="pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in names | others}
        return {
            name
            for name in names
            for other in others
            if shapes[name] == shapes[other]
            and name.rpartition(".")[2] == other.rpartition(".")[2]
            and torch.equal(file.get_tensor(name), file.get_tensor(other))
        }


def _are_untrained(checkpoint: Checkpoint, names: set[str]) -> bool:
    """Whether weights without a place belong to LoRA pairs whose second matrix is zero, as before training."""
    last = [name for name in names if "lora_B" in name or "lora_embedding_B" in name]
    if not last or not all("lora_" in name for name in names) or not names <= _stored_keys(checkpoint):
        return False
    with safe_open(checkpoint.fetch(ADAPTER_WEIGHTS), framework="pt") as file:
        return not any(file.get_tensor(name).any() for name in last)


def _location_arguments(checkpoint: Checkpoint) -> dict[str, Any]:
    return {"pretrained_model_name_or_path": checkpoint.location, **_hub_arguments(checkpoint)}


def _hub_arguments(checkpoint: Checkpoint) -> dict[str, Any]:
    return {} if checkpoint.is_local else {"revision": checkpoint.revision, "token": checkpoint.token}


@contextmanager
def _adapter_errors(checkpoint: Checkpoint, problem: str) -> Iterator[None]:
    try:
        yield
    except ADAPTER_FAILURES as error:
        raise ModelLoadError(
            f"The adapter {checkpoint.name!r} cannot be loaded: {problem} ({type(error).__name__}: {one_line(error)}) "
            "Check that adapter and base model belong together."
        ) from error
