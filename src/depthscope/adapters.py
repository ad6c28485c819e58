"""PEFT adapters: the base model that an adapter names, with the adapter on it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from torch import nn

from depthscope.checkpoints import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Checkpoint
from depthscope.errors import ModelLoadError
from depthscope.messages import listed, one_line

if TYPE_CHECKING:
    from depthscope.loading import LoadedModel

__all__ = ["apply_adapter", "require_adapter_weights"]

# What PEFT raises for a config or weights that it cannot put on a model.
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
# These load further adapters, from wherever their config says.
NESTED_KINDS = ("XLORA",)


def apply_adapter(
    checkpoint: Checkpoint, load_base: Callable[[str, str | None], "LoadedModel"]
) -> tuple[nn.Module, "LoadedModel", list[str]]:
    """Load the base model that the adapter names and put the adapter on it.

    Args:
        checkpoint: the adapter's files.
        load_base: loads a model, given its name and revision.

    Returns:
        The model with the adapter, in evaluation mode; the base model as it was loaded; and notes for the report.

    Raises:
        ModelLoadError: PEFT, the base model or the adapter's weights are missing, or do not fit one another.
    """
    settings = checkpoint.read_json(ADAPTER_CONFIG)
    require_adapter_weights(checkpoint)
    with _adapter_errors(checkpoint, f"{ADAPTER_CONFIG} is not valid"):
        from peft import PeftConfig

        config = PeftConfig.from_pretrained(**_where(checkpoint))
    name, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if not isinstance(name, str) or not name:
        raise ModelLoadError(
            f"The adapter {checkpoint.name!r} does not name its base model. Set base_model_name_or_path in its "
            f"{ADAPTER_CONFIG}."
        )
    try:
        base = load_base(name, revision if isinstance(revision, str) else None)
    except ModelLoadError as error:
        raise ModelLoadError(
            f"The base model of the adapter {checkpoint.name!r} cannot be loaded: {error} (It is named by "
            f"base_model_name_or_path in {ADAPTER_CONFIG}.)"
        ) from error
    model = _put_on(checkpoint, config, base)
    return model, base, _require_all_weights(checkpoint, model, base.facts["name"])


def require_adapter_weights(checkpoint: Checkpoint) -> None:
    """Refuse an adapter without PEFT, of a kind that loads others, or whose weights are absent, pickled or damaged."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ModelLoadError(
            f"{checkpoint.name!r} is an adapter, which needs the package `peft`: pip install peft."
        ) from error
    if str(checkpoint.read_json(ADAPTER_CONFIG).get("peft_type")).upper() in NESTED_KINDS:
        raise ModelLoadError(
            f"{checkpoint.name!r} is an adapter made of other adapters (X-LoRA); give one that is not."
        )
    if ADAPTER_WEIGHTS in checkpoint.files:
        _stored_keys(checkpoint)
        return
    if "adapter_model.bin" in checkpoint.files:
        raise ModelLoadError(
            f"The adapter {checkpoint.name!r} holds its weights as a pickle only (adapter_model.bin), and loading a "
            f"pickle can run code that is hidden in it; {ADAPTER_WEIGHTS} is needed. If you trust where it comes "
            "from, load it with PEFT once and save it again with save_pretrained."
        )
    raise ModelLoadError(
        f"The adapter {checkpoint.name!r} has no weights: {ADAPTER_WEIGHTS} was expected. Fetch it again."
    )


def _stored_keys(checkpoint: Checkpoint) -> set[str]:
    path = checkpoint.fetch(ADAPTER_WEIGHTS)
    try:
        with safe_open(path, framework="pt") as file:
            return set(file.keys())
    except (SafetensorError, OSError) as error:
        raise ModelLoadError(
            f"{ADAPTER_WEIGHTS} of {checkpoint.name!r} is damaged ({one_line(error)}) Fetch the file again."
        ) from error


def _put_on(checkpoint: Checkpoint, config: Any, base: "LoadedModel") -> nn.Module:
    from peft import PeftModel

    with _adapter_errors(checkpoint, f"it does not fit its base model {base.facts['name']!r}"):
        model = PeftModel.from_pretrained(base.model, checkpoint.location, config=config, **_hub_arguments(checkpoint))
    return model.eval()


def _require_all_weights(checkpoint: Checkpoint, model: Any, base: str) -> list[str]:
    """Refuse an adapter that lacks weights, which PEFT would run with fresh ones; note weights that have no place."""
    from peft import get_peft_model_state_dict

    stored, expected = _stored_keys(checkpoint), set(get_peft_model_state_dict(model, save_embedding_layers=False))
    if not expected <= stored:
        # PEFT renames the weights of older adapters, so its own word counts.
        result = model.load_adapter(checkpoint.location, model.active_adapter, **_hub_arguments(checkpoint))
        if missing := result.missing_keys:
            raise ModelLoadError(
                f"The adapter {checkpoint.name!r} does not fit its base model {base!r}: {len(missing)} of its weights "
                f"are missing ({listed(missing)}). Check base_model_name_or_path, or fetch the adapter again."
            )
        return []
    homeless = stored - expected - set(model.state_dict())  # whole embeddings may be stored too
    return [f"{len(homeless)} weights of the adapter have no place in its base model {base!r}."] if homeless else []


def _where(checkpoint: Checkpoint) -> dict[str, Any]:
    return {"pretrained_model_name_or_path": checkpoint.location, **_hub_arguments(checkpoint)}


def _hub_arguments(checkpoint: Checkpoint) -> dict[str, Any]:
    return {} if checkpoint.is_local else {"revision": checkpoint.revision, "token": checkpoint.token}


@contextmanager
def _adapter_errors(checkpoint: Checkpoint, what: str) -> Iterator[None]:
    try:
        yield
    except ADAPTER_FAILURES as error:
        raise ModelLoadError(
            f"The adapter {checkpoint.name!r} cannot be loaded: {what} ({type(error).__name__}: {one_line(error)}) "
            "Check that adapter and base model belong together."
        ) from error
