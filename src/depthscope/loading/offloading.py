"""Where the weights of a model go: onto its device, or, if they are too large for that, where its layers fetch them.

transformers and accelerate do the offloading; here it is decided whether, and which parts are layers.
"""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch
from torch import nn

from depthscope.errors import ModelLoadError
from depthscope.loading.audit.stored import StoredTensors
from depthscope.loading.checkpoint import ADAPTER_CONFIG, CONFIG, Checkpoint
from depthscope.loading.devices import device_arguments

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

__all__ = ["free_memory", "places_of_weights"]

CGROUP = Path("/sys/fs/cgroup")
# Of version 2 and 1: the limit, what is used of it, and how much of that is kept of files.
CGROUPS = (
    ("memory.max", "memory.current", "memory.stat", "file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "cache"),
)
SHARE_FOR_WEIGHTS = 0.85  # of free memory


def places_of_weights(
    checkpoint: Checkpoint,
    stored: StoredTensors,
    build: Callable[[], nn.Module],
    dtype: Any,
    device: torch.device | None,
    offload: bool | None,
) -> tuple[dict[str, Any], TemporaryDirectory[str] | None]:
    """The arguments of `from_pretrained` that say where weights go, and a folder for those outside of memory.

    Args:
        checkpoint: what is loaded.
        stored: its tensors.
        build: builds the model, without weights.
        dtype: that it is loaded in, "auto" for that of its tensors.
        device: that it runs on; None splits it over all devices.
        offload: whether the weights of its layers stay outside of memory; None where they do not fit.

    Raises:
        ModelLoadError: they cannot stay outside.
    """
    whole = checkpoint.gguf_file is None and ADAPTER_CONFIG not in checkpoint.files
    whole = whole and "quantization_config" not in checkpoint.read_json(CONFIG)
    if offload and not (whole and device is not None):
        raise ModelLoadError(
            f"The weights of {checkpoint.name!r} cannot stay outside of memory: that takes whole weights in "
            "safetensors (no GGUF file, no adapter, no quantization) and one device. Leave out offload."
        )
    if device is None or not whole or offload is False:
        return device_arguments(device), None
    if offload is None:
        width = (stored.main_dtype if dtype == "auto" else dtype) or torch.float32
        if sum(tensor.size for tensor in stored) * width.itemsize < SHARE_FOR_WEIGHTS * free_memory(device):
            return device_arguments(device), None
    with torch.device("meta"):
        empty = build()
    folder = TemporaryDirectory(prefix="depthscope-offload-")
    return _offloading_arguments(empty, device, folder.name), folder


def free_memory(device: torch.device) -> int:
    """How many bytes can still be had on a device: what is free, within what this process may take."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = [psutil.virtual_memory().available]
    for most, used, stat, cache in CGROUPS:
        with suppress(OSError, ValueError, KeyError):  # of a container (Linux); "max" where it has no limit
            parts = dict(line.split() for line in (CGROUP / stat).read_text().splitlines())
            left = int((CGROUP / most).read_text()) - int((CGROUP / used).read_text())
            free.append(left + int(parts[cache]))  # what is kept of files gives way
    if resource is not None:
        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit != resource.RLIM_INFINITY:
            free.append(limit - psutil.Process().memory_info().vms)
    return max(0, min(free))


def _offloading_arguments(model: nn.Module, device: torch.device, folder: str) -> dict[str, Any]:
    """The arguments of `from_pretrained` that leave the layers' weights where they are, and load all others.

    For a CPU they stay in the checkpoint's own files, for an accelerator in main memory.

    Args:
        model: the model without weights, on `meta`.
        device: what it runs on.
        folder: an empty folder, for weights that are not in the files as the model has them.

    Raises:
        ModelLoadError: the model does not say which of its parts are layers.
    """
    layers = set(getattr(model, "_no_split_modules", None) or ())
    away = "disk" if device.type == "cpu" else "cpu"
    here = str(device)  # safetensors takes "cpu", not a device of that name
    places: dict[str, str] = {}

    def place(module: nn.Module, path: str) -> None:
        for name, child in module.named_children():
            where = f"{path}{name}"
            if type(child).__name__ in layers and isinstance(module, nn.ModuleList):
                places[where] = away
            elif any(type(part).__name__ in layers for part in child.modules()):
                place(child, f"{where}.")
            else:
                places[where] = here
        places.update({f"{path}{name}": here for name, _ in module.named_parameters(recurse=False)})

    place(model, "")
    if away not in places.values():
        raise ModelLoadError(
            f"{type(model).__name__} does not say which of its parts are layers (`_no_split_modules`), so their "
            "weights cannot stay outside of memory; analyse it without offload, on a machine that it fits on."
        )
    return {"device_map": places, "offload_folder": folder}
