"""The attention implementation of a model: the user's choice, the config's, or another that this machine runs.

All implementations compute the same function up to rounding, so another one replaces one that is not installed.
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
    """Refuse an unknown attention implementation, or one that does not run here.

    Raises:
        SettingsError: there is no such implementation.
        ModelLoadError: it does not run on this machine or this device.
    """
    if name is None:
        return
    if name not in _implementations():
        raise SettingsError(
            f"{name!r} is not an attention implementation; choose from {', '.join(_implementations())}."
        )
    if reason := _obstacle(name, device, dtype):
        raise ModelLoadError(
            f"The attention implementation {name!r} {reason}. Choose from {', '.join(_available(device, dtype))}."
        )


def choose_attn_implementation(
    config: PretrainedConfig, requested: str | None, device: torch.device | None, dtype: Any, *, trust_remote_code: bool
) -> list[str]:
    """Set the attention implementation in a model's config.

    Args:
        config: the model's config, with the configs of its parts; changed in place.
        requested: the user's choice; None takes the config's, or another one if that does not run here.
        device: the model's device; None if it is split over several.
        dtype: the model's dtype; "auto" is the checkpoint's own.
        trust_remote_code: whether a kernel that the config names may be fetched and run.

    Returns:
        Notes on implementations that the config names and why they were not used.

    Raises:
        ModelLoadError: the config names an unknown implementation.
    """
    if requested is not None:
        config._attn_implementation = requested
        return []
    reasons: dict[str, str] = {}
    for part in _with_parts(config):
        name = getattr(part, "_attn_implementation", None)
        if not isinstance(name, str) or ("/" in name and trust_remote_code):
            continue
        if "/" in name:
            reasons[name] = "is code from another repository and is not run unless you trust it"
        elif reason := _obstacle(name, device, dtype):
            reasons[name] = reason
        elif name not in _implementations():
            raise ModelLoadError(
                f"config.json names {name!r}, which is not an attention implementation. Choose one with "
                f"--attn-implementation (in Python: attn_implementation=): {', '.join(_available(device, dtype))}."
            )
        if name in reasons:
            part._attn_implementation = None
    return [
        f"The config names the attention implementation {name!r}, which {reason}. transformers' default was used "
        "instead; it computes the same up to rounding."
        for name, reason in reasons.items()
    ]


def _implementations() -> list[str]:
    return [EAGER, *sorted(name for name in AttentionInterface().valid_keys() if not name.startswith(PAGED))]


def _available(device: torch.device | None, dtype: Any) -> list[str]:
    return [name for name in _implementations() if not _obstacle(name, device, dtype)]


def _obstacle(name: str, device: torch.device | None, dtype: Any) -> str | None:
    """Why an implementation does not run here; None if it runs."""
    on_cpu = device.type == "cpu" if device is not None else not torch.cuda.is_available()
    if name.startswith(PAGED):
        return "serves many requests at a time and cannot do a plain forward pass"
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
    """A config, and the configs of the model's parts (text, vision, ...)."""
    yield config
    for name in getattr(config, "sub_configs", {}):
        part: Any = getattr(config, name, None)
        if isinstance(part, PretrainedConfig):
            yield from _with_parts(part)
