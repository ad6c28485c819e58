"""Quantised codes that would be read as weights: float8, integers and packed bits without their scales."""

import re
from collections.abc import Mapping
from typing import Any

import torch
import transformers

from depthscope.loading.audit.placement import Placement
from depthscope.loading.audit.stored import FLOATS, StoredTensor
from depthscope.loading.checkpoint import Checkpoint
from depthscope.wording.messages import counted, listed

__all__ = ["is_runtime_scale", "is_scale", "unscaled_note", "why_codes"]

# The ends of the names of tensors that belong to codes: scales, zero points, tables, the order of rows.
SCALE = re.compile(
    r"scale|zero|absmax|amax|quant|g_idx|codebook|SCB|bitmask|qweight|packed|qdata|W_q|_blocks$|_codes$", re.IGNORECASE
)
# Scales of activations, keys and values that special hardware rounds while a model runs; never scales of weights.
RUNTIME = re.compile(r"(^|[._])(input|activation|output|[qkv]|kv|kv_cache|prob)_(scale|amax|zero_point|global_scale)$")
# Modules of these packages do not decode codes by themselves.
PLAIN_MODULES = ("torch.nn.", "transformers.models.", "transformers.pytorch_utils")
OTHER_SETTINGS = ("compression_config", "quantization", "quant_config", "quantize_config")  # of other libraries
# The files in which other libraries describe their quantisation.
OTHER_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json", "recipe.yaml")
# Weights that were scaled to a type's range come near its largest value; a quarter of it allows for rounded scales.
PART_OF_RANGE = 4


def is_scale(tensor: StoredTensor) -> bool:
    """Whether a tensor's name says that it belongs to the codes of another tensor."""
    return bool(SCALE.search(_end(tensor.name)))


def is_runtime_scale(name: str) -> bool:
    """Whether a tensor's name says that it scales only activations or the cache, on special hardware."""
    return bool(RUNTIME.search(name))


def why_codes(checkpoint: Checkpoint, settings: Mapping[str, Any], model: Any, placed: Placement) -> str | None:
    """Why the model would run on codes instead of weights, and what to do; None if it would not."""
    dropped = [tensor for name, tensors in placed.used.items() for tensor in _dropped(model, name, tensors, placed)]
    scales = [tensor for tensor in placed.unplaced if is_scale(tensor) and not is_runtime_scale(tensor.name)]
    # Packed codes have other names and shapes than the weights, so the weights are missing.
    packed = [
        tensor
        for tensor in placed.unplaced
        if tensor.dtype not in FLOATS and is_scale(tensor) and not is_runtime_scale(tensor.name)
    ]
    codes = dropped or packed
    if not codes:
        return None
    kinds = ", ".join(sorted({tensor.dtype for tensor in codes}))
    left_out = f" {len(scales)} scales were left out ({listed(_names(scales))})." if dropped and scales else ""
    return (
        f"{checkpoint.name!r} holds codes of a quantisation instead of weights, and they would be taken for the "
        f"weights: {len(codes)} tensors of type {kinds} ({listed(_names(codes))}).{left_out} "
        f"{_reason(checkpoint, settings)} Give the model that it was made from, or one that was dequantised."
    )


def unscaled_note(placed: Placement) -> str | None:
    """A note on float8 weights that are stored without scales; None if there are none."""
    unscaled = [
        tensor
        for name, tensors in placed.used.items()
        for tensor in tensors
        if tensor.dtype.startswith("F8")
        if placed.state[name].dtype in FLOATS.values() and not any(map(is_scale, tensors))
    ]
    if not unscaled:
        return None
    return (
        f"{counted(len(unscaled), 'weight')} {'is' if len(unscaled) == 1 else 'are'} stored as float8 without scales "
        f"({listed(_names(unscaled))}) and taken as stored: the values lie far inside the type's range."
    )


def _dropped(model: Any, name: str, tensors: list[StoredTensor], placed: Placement) -> list[StoredTensor]:
    """The codes among the tensors of one parameter that nothing decodes."""
    codes = [tensor for tensor in tensors if tensor.dtype not in FLOATS and not is_scale(tensor)]
    if not codes:
        return []
    value = placed.state[name]
    if value.dtype not in FLOATS.values():
        return codes if _is_plain_weight(model, name, placed) else []
    if any(map(is_scale, tensors)):
        return []
    if all(tensor.dtype.startswith("F8") for tensor in codes) and not any(map(is_scale, placed.unplaced)):
        return codes if _fills_its_range(value, codes) else []
    return codes


def _is_plain_weight(model: Any, name: str, placed: Placement) -> bool:
    """Whether a parameter that is not floating-point belongs to a module that multiplies with it directly."""
    module, _, parameter = name.rpartition(".")
    owner = model.get_submodule(module)
    if parameter not in owner._parameters or not type(owner).__module__.startswith(PLAIN_MODULES):
        return False
    # compressed-tensors leaves the class as it is, gives the module the scales and wraps its forward.
    siblings = {*owner._parameters, *owner._buffers} - {parameter}
    return not any(map(is_scale, (tensor for other in siblings for tensor in placed.used.get(f"{module}.{other}", []))))


def _fills_its_range(value: torch.Tensor, codes: list[StoredTensor]) -> bool:
    """Whether float8 numbers come so near the largest of their type that they must have been scaled."""
    if value.device.type == "meta":
        return True
    largest = torch.finfo(torch.float8_e5m2 if "E5M2" in codes[0].dtype else torch.float8_e4m3fn).max
    return not float(value.abs().max()) < largest / PART_OF_RANGE


def _reason(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> str:
    text = settings.get("text_config")
    quantization = settings.get("quantization_config") or (isinstance(text, dict) and text.get("quantization_config"))
    if isinstance(quantization, dict):
        return (
            f"config.json says that they were quantised with {quantization.get('quant_method')!r}, and transformers "
            f"{transformers.__version__} cannot undo it with the tensors in the files."
        )
    for name in OTHER_SETTINGS:
        if settings.get(name):
            return f"config.json describes them as {name!r}, which transformers does not read."
    for name in OTHER_FILES:
        if name in checkpoint.files:
            return f"{name} describes them, which transformers does not read: config.json has no quantization_config."
    return "config.json has no quantization_config, so nothing says how to decode them."


def _end(name: str) -> str:
    """The last part of a name; bitsandbytes writes `weight.absmax` and `weight.quant_state.bitsandbytes__nf4`."""
    return name.rpartition(".weight.")[2] if ".weight." in name else name.rpartition(".")[2]


def _names(tensors: list[StoredTensor]) -> list[str]:
    return sorted(tensor.name for tensor in tensors)
