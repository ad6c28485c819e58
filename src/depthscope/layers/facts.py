"""What the report states about a model: its shape, size and dtype, read off its config and its parameters."""

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from depthscope.layers.compiled import written
from depthscope.wording.messages import listed

__all__ = ["EXPERTS", "EXPERTS_PER_TOKEN", "model_facts", "text_only_notes", "whole_number"]

# The names that architectures give to the same thing, the usual one first.
EXPERTS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
    "num_moe_experts",
    "ffn_num_experts",
)
EXPERTS_PER_TOKEN = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "top_k_experts",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "experts_per_token",
    "num_selected_experts",
)


def model_facts(
    model: nn.Module, name: str | None = None, *, source: str = "object", revision: str | None = None
) -> dict[str, Any]:
    """The report's `model` section; what a model does not say of itself is None.

    Parameters are counted once each, also where they are tied or shared; an adapter's are counted too.

    Args:
        model: any causal language model, wrapped by PEFT or not.
        name: what the report calls it (by default, what its config or its class is called).
        source: where it came from: "hub", "folder", "gguf", "adapter" or "object".
        revision: the commit, if it came from the Hub.
    """
    unwrap: Any = getattr(model, "get_base_model", None)
    inner = written(unwrap() if unwrap is not None else model)
    config: Any = getattr(inner, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    return {
        "name": _shown_name(name or _read(config, "_name_or_path") or type(inner).__name__),
        "revision": revision,
        "source": source,
        "model_type": _read(config, "model_type") or "unknown",
        "architecture": type(inner).__name__,
        "num_layers": whole_number(text, "num_hidden_layers"),
        "hidden_size": whole_number(text, "hidden_size"),
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "vocab_size": whole_number(text, "vocab_size"),
        "num_attention_heads": whole_number(text, "num_attention_heads"),
        "num_key_value_heads": whole_number(text, "num_key_value_heads"),
        "num_experts": whole_number(text, *EXPERTS),
        "num_experts_per_tok": whole_number(text, *EXPERTS_PER_TOKEN),
        "tied_embeddings": bool(_read(text, "tie_word_embeddings")),
        "quantization": _quantization(config),
        "dtype": _dtype(model),
    }


# The parts of a model's config that are about its text; what else has a config of its own sees, hears or draws.
TEXT_CONFIGS = frozenset(
    (
        "text_config",
        "decoder",
        "decoder_config",
        "encoder_config",
        "global_config",
        "patcher_config",
        "attn_config",
        "ffn_config",
        "depth_decoder_config",
    )
)


def text_only_notes(model: nn.Module, config: Any = None) -> list[str]:
    """Say of a model that takes images or sound too that it is measured on text alone; nothing of other models.

    Args:
        model: any causal language model, wrapped by PEFT or not.
        config: that of the checkpoint, where the model was made of a part of it.
    """
    unwrap: Any = getattr(model, "get_base_model", None)
    config = config or getattr(unwrap() if unwrap is not None else model, "config", None)
    parts = [name for name in getattr(config, "sub_configs", {}) if name not in TEXT_CONFIGS]
    senses = [name.removesuffix("_config") for name in parts if _read(config, name) is not None]
    if not senses:
        return []
    return [
        f"A {config.model_type} model takes more than text ({listed(senses)}): what was measured is its language "
        "model, on text alone."
    ]


def _shown_name(name: str) -> str:
    """A Hub id as it is; of a path only its last part, since reports are shared and folders are the user's own."""
    return Path(name).resolve().name if Path(name).exists() else name


def _read(config: Any, name: str) -> Any:
    """One entry of a config; None too where the config refuses to give one value for all layers."""
    try:
        return getattr(config, name, None)
    except (ValueError, RuntimeError, LookupError, TypeError):
        return None


def whole_number(config: Any, *names: str) -> int | None:
    """The first of some entries of a config that is a whole number, None if none is."""
    for name in names:
        value = _read(config, name)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


def _quantization(config: Any) -> str | None:
    settings = _read(config, "quantization_config")
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    return str(getattr(method, "value", method)) if method else None


def _dtype(model: nn.Module) -> str:
    """The dtype that most parameters have, without "torch."."""
    counts: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        counts[parameter.dtype] += parameter.numel()
    return str(counts.most_common(1)[0][0]).removeprefix("torch.") if counts else "none"
