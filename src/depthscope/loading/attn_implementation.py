"""Which implementation of attention a model is loaded with: the user's choice, the config's, or another that runs here.

All of them compute the same function, to rounding, so one that is not installed is no reason not to measure a model.
"""

from collections.abc import Iterator
from typing import Any

import torch
import transformers.utils
from transformers import AttentionInterface, PretrainedConfig

from depthscope.errors import ModelLoadError, SettingsError

__all__ = ["choose_attn_implementation", "require_attn_implementation"]

EAGER, FLEX, FLASH, PAGED = "eager", "flex_attention", "flash_attention_", "paged|"


def require_attn_implementation(name: str | None, device: torch.device | None, dtype: Any) -> None:
    """Refuse what is no implementation of attention, or none that runs here.

    Raises:
        SettingsError: there is no such implementation.
        ModelLoadError: it does not run on this machine or this device.
    """
    if name is None:
        return
    if name not in _known():
        raise SettingsError(f"{name!r} is no implementation of attention; there is {', '.join(_known())}.")
    if reason := _obstacle(name, device, dtype):
        raise ModelLoadError(f"The attention {name!r} {reason}. Take one of {', '.join(_running(device, dtype))}.")


def choose_attn_implementation(
    config: PretrainedConfig, asked: str | None, device: torch.device | None, dtype: Any, *, trust_remote_code: bool
) -> list[str]:
    """Write into a config with which attention its model is to be made.

    Args:
        config: of the model, with those of its parts; changed.
        asked: what the user wants; None takes what the config names, or another one where that does not run here.
        device: where the model goes; None if it is split over several.
        dtype: what it is loaded in; "auto" is the checkpoint's own.
        trust_remote_code: whether a kernel that the config names may be fetched and run.

    Returns:
        Notes: what the config names and why it was not taken.

    Raises:
        ModelLoadError: the config names something that is no implementation.
    """
    if asked is not None:
        config._attn_implementation = asked
        return []
    reasons: dict[str, str] = {}
    for part in _with_parts(config):
        name = getattr(part, "_attn_implementation", None)
        if not isinstance(name, str) or ("/" in name and trust_remote_code):
            continue
        if "/" in name:
            reasons[name] = "is code from a repository of its own, which is not run unless you trust it"
        elif reason := _obstacle(name, device, dtype):
            reasons[name] = reason
        elif name not in _known():
            raise ModelLoadError(
                f"config.json names {name!r}, which is no implementation of attention. Choose one with "
                f"--attn-implementation (in Python: attn_implementation=): {', '.join(_running(device, dtype))}."
            )
        if name in reasons:
            part._attn_implementation = None
    return [
        f"The config names the attention {name!r}, which {reason}; transformers' default was taken instead, which "
        "computes the same, to rounding."
        for name, reason in reasons.items()
    ]


def _known() -> list[str]:
    return [EAGER, *sorted(name for name in AttentionInterface().valid_keys() if not name.startswith(PAGED))]


def _running(device: torch.device | None, dtype: Any) -> list[str]:
    return [name for name in _known() if not _obstacle(name, device, dtype)]


def _obstacle(name: str, device: torch.device | None, dtype: Any) -> str | None:
    """Why an implementation does not run here; None if it does."""
    on_cpu = device.type == "cpu" if device is not None else not torch.cuda.is_available()
    if name.startswith(PAGED):
        return "is for serving many requests at a time and not for a plain forward pass"
    if name.startswith(FLASH):
        installed = getattr(transformers.utils, f"is_flash_attn_{name.removeprefix(FLASH)}_available", None)
        if on_cpu:
            return "does not run on a CPU"
        if dtype is torch.float32:
            return "computes in half precision only"
        return None if installed is not None and installed() else "is not installed"
    if name == FLEX and on_cpu:
        return "has no derivatives on a CPU"
    return None


def _with_parts(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """A config, and those of a model's parts (text, vision, ...)."""
    yield config
    for name in getattr(config, "sub_configs", {}):
        part: Any = getattr(config, name, None)
        if isinstance(part, PretrainedConfig):
            yield from _with_parts(part)
