"""Conversion of a checkpoint into another checkpoint: `depthscope convert`.

Weights are converted in float32 and the result is compared with the source before anything is written. The folder
appears complete or not at all.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from depthscope.console.quiet import quiet
from depthscope.conversion.assemble import largest_logit_difference
from depthscope.conversion.forms import FORMS
from depthscope.conversion.native import to_depthlm, to_native
from depthscope.conversion.reshape import deepen, to_gqa, upcycle
from depthscope.errors import ConversionError, SettingsError
from depthscope.files.new_folder import new_folder
from depthscope.loading.devices import find_dtype
from depthscope.loading.load import load_model
from depthscope.report.report import MAX_LAYERS as MOST_LAYERS
from depthscope.wording.numeric import require_whole

__all__ = ["TargetShape", "convert", "convert_checkpoint"]

# Rounding in float32; the logits of a trained model are of the order of 10.
TOLERANCE = 1e-5
MOST_EXPERTS = 65_536  # or heads; each is a matrix at least


@dataclass(frozen=True)
class TargetShape:
    """The changes to the shape of a model; None changes nothing."""

    kv_heads: int | None = None
    experts: int | None = None
    top_k: int | None = None
    layers: int | None = None
    preserve_function: bool = False

    def __post_init__(self) -> None:
        for name in ("kv_heads", "experts", "top_k", "layers"):
            if (value := getattr(self, name)) is not None:
                require_whole(name, value, 1, most=MOST_LAYERS if name == "layers" else MOST_EXPERTS)
        if (self.experts is None) != (self.top_k is None):
            raise SettingsError("experts and top_k belong together: give both or neither.")
        if self.preserve_function and self.layers is None:
            raise SettingsError("preserve_function applies to added layers: give the number of layers too.")

    @property
    def is_changed(self) -> bool:
        """Whether anything is to be changed."""
        return any(value is not None for value in (self.kv_heads, self.experts, self.layers))


def convert(model: PreTrainedModel, to: str = "native", shape: TargetShape | None = None) -> PreTrainedModel:
    """A copy of `model` in another architecture, and in another shape if one is given.

    Args:
        model: a DepthLM, or a model that [`to_depthlm`] reads.
        to: "depthlm", "native", or the `model_type` of one native architecture.
        shape: the changes of shape, applied in the order KV heads, experts, layers.

    Raises:
        ConversionError: an exact conversion, or the shape, is impossible.
    """
    shape = shape or TargetShape()
    if to not in ("depthlm", "native", *(form.model_type for form in FORMS)):
        known = ", ".join(form.model_type for form in FORMS)
        raise ConversionError(f"{to!r} is not a target of conversion; choose from depthlm, native, {known}.")
    depthlm = to_depthlm(model)
    if shape.kv_heads is not None:
        depthlm = to_gqa(depthlm, shape.kv_heads)
    if shape.experts is not None and shape.top_k is not None:
        depthlm = upcycle(depthlm, shape.experts, shape.top_k)
    if shape.layers is not None:
        depthlm = deepen(depthlm, shape.layers, preserve_function=shape.preserve_function)
    return depthlm if to == "depthlm" else to_native(depthlm, None if to == "native" else to)


def convert_checkpoint(
    name: str,
    out: Path,
    *,
    to: str = "native",
    shape: TargetShape | None = None,
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    base_model: str | None = None,
    stage: Callable[[str], None] = lambda doing: None,
) -> list[str]:
    """Convert a checkpoint and its tokenizer into a new folder.

    Args:
        name: a Hub id, a folder, a .gguf file or a PEFT adapter, as for [`load_model`].
        out: the folder to write; it must not exist.
        to: as for [`convert`].
        shape: as for [`convert`].
        dtype: dtype of the written weights; "auto" is the checkpoint's own if that is exact, otherwise float32.
        revision: a branch, tag or commit of the repository.
        trust_remote_code: whether code from the model's repository may run.
        attn_implementation: as for [`load_model`].
        base_model: as for [`load_model`].
        stage: called with the name of each stage, for progress.

    Returns:
        A summary, in lines of text.

    Raises:
        ConversionError: an exact conversion, or the shape, is impossible; or `out` cannot be written.
        ModelLoadError: the checkpoint cannot be loaded.
    """
    shape = shape or TargetShape()
    requested = find_dtype(dtype, torch.device("cpu")) if dtype != "auto" else None
    _require_new(out)
    stage("Loading")
    loaded = load_model(
        name,
        revision=revision,
        dtype="float32",
        device="cpu",
        trust_remote_code=trust_remote_code,
        attn_implementation=attn_implementation,
        base_model=base_model,
    )
    source = _without_adapter(loaded.model)
    stage("Converting")
    with quiet():
        result = convert(source, to, shape)
    stage("Comparing")
    lines = [*loaded.notes, f"{type(source).__name__} -> {type(result).__name__}", _compare(source, result, shape)]
    lines += _cast(result, requested, loaded.stored_dtype or torch.float32)
    stage("Writing")
    with new_folder(out, ConversionError) as folder, quiet():
        result.save_pretrained(folder)
        if loaded.tokenizer is not None:
            loaded.tokenizer.save_pretrained(folder)
    if loaded.tokenizer is None:
        lines.append(f"Without a tokenizer: {loaded.tokenizer_problem}")
    return [*lines, f"Written: {out}"]


def _without_adapter(model: Any) -> Any:
    """The model itself; an adapter on it is merged into its weights."""
    if not hasattr(model, "get_base_model"):
        return model
    if not hasattr(model, "merge_and_unload"):
        peft_type = getattr(model.active_peft_config.peft_type, "value", "unknown")
        raise ConversionError(
            f"An adapter of the type {peft_type} cannot be merged into the weights of its base model (virtual tokens, "
            "prefixes and prompts in the attention are not weights of the base model), so it cannot be converted. "
            "Convert the base model alone."
        )
    return model.merge_and_unload()


def _compare(source: PreTrainedModel, result: PreTrainedModel, shape: TargetShape) -> str:
    """Compare the logits before and after; refuse a conversion that should be exact and is not."""
    difference = largest_logit_difference(source, result)
    measured = f"largest difference between the logits, on 64 random tokens in float32: {difference:.1e}"
    repeated = shape.kv_heads is None or shape.kv_heads >= (source.config.num_key_value_heads or 0)
    if not repeated or (shape.layers is not None and not shape.preserve_function):
        return f"The new model computes another function and needs training ({measured})."
    if not difference <= TOLERANCE * max(1.0, _largest_logit(source)):
        raise ConversionError(
            f"The conversion is not exact ({measured}); nothing was written. Please report this model."
        )
    return f"The new model computes the same function ({measured})."


def _largest_logit(model: PreTrainedModel) -> float:
    ids = torch.arange(min(64, model.config.vocab_size))[None]
    with torch.no_grad():
        return model(ids, use_cache=False).logits.abs().max().item()


def _cast(model: PreTrainedModel, requested: torch.dtype | None, stored: torch.dtype) -> list[str]:
    """Cast the weights to the dtype to be written; return a note if they are rounded or kept in float32."""
    dtype = requested or stored
    exact = all(torch.equal(weight.to(dtype).float(), weight) for weight in model.state_dict().values())
    if not exact and requested is None:
        return [f"The weights are written in float32, because {_short(stored)} would round the new ones."]
    model.to(dtype)  # type: ignore[arg-type]
    if not exact:
        return [f"The weights are rounded to {_short(dtype)}; float32 would keep them exact."]
    return []


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _require_new(out: Path) -> None:
    if out.exists():
        raise ConversionError(f"{out} exists already; give the name of a new folder.")
    if not out.absolute().parent.is_dir():
        raise ConversionError(f"The folder {out.absolute().parent} does not exist; create it, or choose another.")
