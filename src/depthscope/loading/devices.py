"""The device and the dtype of a model."""

import os
from typing import Any

import torch

from depthscope.errors import ModelLoadError, SettingsError

__all__ = ["device_arguments", "find_device", "find_dtype"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def find_device(device: str | torch.device | None) -> torch.device | None:
    """The device to load on: an accelerator by default, else the CPU; None for "auto", which uses all devices.

    Raises:
        ModelLoadError: this machine has no such device.
    """
    if device == "auto":
        return None
    if device is None:
        if torch.cuda.is_available():  # under torchrun, each process has its own
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        target = torch.device(device)
        torch.empty(1, device=target)
    except (RuntimeError, AssertionError, NotImplementedError, ValueError, ImportError) as error:
        raise ModelLoadError(f"This machine has no device {str(device)!r}; choose from {_devices()}.") from error
    if target.type == "meta":
        raise ModelLoadError(
            f"The device 'meta' holds no weights, so no model can run on it; choose from {_devices()}."
        )
    return target


def find_dtype(dtype: str | torch.dtype, device: torch.device | None) -> Any:
    """The dtype to load in; "auto" keeps the checkpoint's on an accelerator only, as CPUs are slow in half precision.

    Raises:
        SettingsError: the dtype is unknown.
    """
    if dtype == "auto":
        on_cpu = device.type == "cpu" if device is not None else not torch.cuda.is_available()
        return torch.float32 if on_cpu else "auto"
    if dtype in DTYPES.values():
        return dtype
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise SettingsError(f"The dtype {str(dtype)!r} is not one of auto, {', '.join(DTYPES)}.")
    return DTYPES[dtype]


def device_arguments(device: torch.device | None) -> dict[str, Any]:
    """The arguments of `from_pretrained` that choose the device."""
    if device is None:
        return {"device_map": "auto"}
    # Directly to the accelerator, without a complete copy in main memory first.
    return {} if device.type == "cpu" else {"device_map": {"": device}}


def _devices() -> str:
    names = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    return ", ".join([*names, "mps"] if torch.backends.mps.is_available() else names)
