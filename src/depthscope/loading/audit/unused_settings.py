"""Settings in config.json that change the function of a model, but that the loaded model does not use.

A config class keeps an unknown setting as an attribute that nothing reads. No list of all harmless settings exists, so
only settings of known meaning are judged: multipliers, caps and switches (at a value that has an effect), rotary
positions, and other names of the class's own settings.
"""

import dataclasses
import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import transformers
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from depthscope.layers.facts import EXPERTS_PER_TOKEN
from depthscope.wording.messages import listed

__all__ = ["unused_settings", "unused_settings_notes"]

# Norms of queries and keys: some classes always have them, whatever the setting.
QK_NORM = ("use_qk_norm", "qk_norm", "qk_layernorm", "use_qk_layernorm")
QK_NORM_MODULE = re.compile(r"(^|\.)(q|k|qk|query|key)_(layer_?)?norm$")
# Settings that change the function without a tensor of their own -> the values that have no effect.
NOTHING: tuple[Any, ...] = (None, False, 0, "", [])
ONE = (None, 1)
ACTING: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale"), ONE),
    **dict.fromkeys(("lm_head_multiplier", "key_multiplier", "attention_out_multiplier", "scale_emb"), ONE),
    **dict.fromkeys(("attention_in_multiplier", "depth_multiplier", "width_multiplier", "rope_ratio"), ONE),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping", "router_logit_softcapping"), NOTHING),
    **dict.fromkeys(("attn_logit_cap", "logit_cap", "softcap", "clip_qkv", "scale_depth"), NOTHING),
    **dict.fromkeys(("alibi", "use_alibi", *QK_NORM), NOTHING),
    **dict.fromkeys(("use_logn_attn", "scale_embedding", "use_parallel_residual", "parallel_attn"), NOTHING),
    **dict.fromkeys(("rope_interleave", "rope_interleaved", "no_rope_layer_interval"), NOTHING),
}
# Names of one setting in several architectures: if config.json has only a name of another class, the value is lost.
SAME = (
    ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon", "layernorm_epsilon"),
    ("hidden_act", "hidden_activation", "activation_function", "activation"),
    ("routed_scaling_factor", "moe_router_topk_scaling_factor"),
    EXPERTS_PER_TOKEN,
)
# The number of earlier tokens that a token attends to; shorter texts are not affected.
SPANS = ("sliding_window", "attention_window", "attention_chunk_size")
# The keys of rotary positions and the values that have no effect; below, the keys that each type of scaling uses.
ROTARY_KEYS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("factor", "attention_factor"), ONE),
    **dict.fromkeys(("short_factor", "long_factor", "low_freq_factor", "high_freq_factor"), (None,)),
}
ROTARY_USES = {
    "default": set[str](),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "yarn": {"factor", "attention_factor"},
    "longrope": {"factor", "attention_factor", "short_factor", "long_factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
}


def unused_settings(name: str, settings: Mapping[str, Any], model: Any) -> str | None:
    """Why the model differs from its config.json, and what to do; None if no difference is found."""
    text = model.config.get_text_config(decoder=True)
    text_settings = _language_model_settings(settings, text)
    unused = [each for find in (_acting, _renamed, _rotary) for each in find(text_settings, text, model)]
    if not unused:
        return None
    return (
        f"config.json of {name!r} has settings that {type(model).__name__} does not use, and that change what a model "
        f"computes: {listed(unused)}. Give the model_type whose code knows them, or the names that "
        f"{type(text).__name__} has for them, or take them out if they are not meant (transformers "
        f"{transformers.__version__})."
    )


def unused_settings_notes(settings: Mapping[str, Any], model: Any) -> list[str]:
    """Notes on settings that the model does not use and that may not matter."""
    text = model.config.get_text_config(decoder=True)
    text_settings = _language_model_settings(settings, text)
    notes = [
        f"config.json says {key} = {value!r}, which {type(model).__name__} does not use: in texts of more tokens, each "
        "token attends to more positions than config.json says."
        for key in SPANS
        if isinstance(value := text_settings.get(key), int)
        and 0 < value < (getattr(text, "max_position_embeddings", None) or sys.maxsize)
        and text_settings.get("use_sliding_window") is not False
        and not _is_used(text, model, key)
    ]
    quantization = settings.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method is not None and method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        notes.append(
            f"config.json says that the model was quantised with {method!r}, which transformers does not know; its "
            "weights are stored in full and were taken as they are."
        )
    return notes


def _language_model_settings(settings: Mapping[str, Any], text: Any) -> Mapping[str, Any]:
    """The part of config.json that is about the language model."""
    parts = [settings, *(value for value in settings.values() if isinstance(value, dict))]
    return next((part for part in parts if part.get("model_type") == text.model_type), {})


def _acting(text_settings: Mapping[str, Any], text: Any, model: Any) -> Iterator[str]:
    for key, neutral in ACTING.items():
        if key not in text_settings or text_settings[key] in neutral or _is_used(text, model, key):
            continue
        if not (key in QK_NORM and any(QK_NORM_MODULE.search(name) for name, _ in model.named_modules())):
            yield f"{key} = {text_settings[key]!r}"


def _renamed(text_settings: Mapping[str, Any], text: Any, model: Any) -> Iterator[str]:
    fields = _fields(type(text))
    for names in SAME:
        own = [key for key in names if key in fields]
        if not own or any(key in text_settings for key in own):
            continue
        for key in names:
            value, used = text_settings.get(key), getattr(text, own[0], None)
            if key in text_settings and value != used and not _is_used(text, model, key):
                yield f"{key} = {value!r} (it is called {own[0]} there, and is {used!r})"


def _rotary(text_settings: Mapping[str, Any], text: Any, model: Any) -> Iterator[str]:
    """Settings of rotary positions that the model does not use."""
    final = getattr(text, "rope_parameters", None)
    if not isinstance(final, dict):
        return
    is_flat = "rope_type" in final  # otherwise one per type of layer
    entries = [final] if is_flat else [entry for entry in final.values() if isinstance(entry, dict)]
    ignored = set(getattr(text, "ignore_keys_at_rope_validation", None) or ())
    for entry in entries:
        kind = entry.get("rope_type", "default")
        for key, neutral in ROTARY_KEYS.items():
            unused = kind in ROTARY_USES and key not in ROTARY_USES[kind] and key not in ignored
            if unused and entry.get(key) not in neutral:
                yield f"{key} = {_short(entry[key])} in rope_parameters, where the type is {kind!r}"
    if is_flat:
        nested = [key for key, value in final.items() if isinstance(value, dict)]
        yield from (f"rope_parameters.{key}, as no layer is of this type" for key in nested)
    for where in ("rope_parameters", "rope_scaling"):
        stated: Any = text_settings.get(where)
        for each in [stated, *stated.values()] if isinstance(stated, dict) else ():
            yield from _lost(where, each, entries) if isinstance(each, dict) else ()
    yield from _lost("config.json", {"rope_theta": text_settings.get("rope_theta")}, entries)
    factor = text_settings.get("partial_rotary_factor")
    if factor not in ONE and not _mentions(model, "partial_rotary_factor"):
        yield f"partial_rotary_factor = {factor!r}"


def _lost(where: str, stated: Mapping[str, Any], entries: list[dict[str, Any]]) -> Iterator[str]:
    for key in ("rope_theta", *ROTARY_KEYS):
        value = stated.get(key)
        if value is not None and entries and all(entry.get(key) != value for entry in entries):
            yield f"{key} = {_short(value)} in {where}, where the model has {_short(entries[0].get(key))}"


def _short(value: Any) -> str:
    return repr(value) if not isinstance(value, list) else f"a list of {len(value)}"


def _is_used(text: Any, model: Any, key: str) -> bool:
    """Whether the config class has a setting, or the model's code reads it."""
    return key in _fields(type(text)) or _mentions(model, key)


def _fields(kind: Any) -> set[str]:
    own = {field.name for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set[str]()
    return own | set(getattr(kind, "attribute_map", {})) | set(inspect.signature(kind).parameters)


def _mentions(model: Any, key: str) -> bool:
    """Whether the source code of the model's class, or of a class that it inherits, contains the word."""
    names = {kind.__module__ for each in (model, model.config) for kind in type(each).__mro__}
    shared = ("transformers.", "torch.", "builtins")  # shared by all architectures
    for name in (name for name in names if name.startswith("transformers.models.") or not name.startswith(shared)):
        try:
            source = inspect.getsource(sys.modules[name])
        except (OSError, TypeError, KeyError):
            return True  # without the source, unknown
        if re.search(rf"\b{re.escape(key)}\b", source):
            return True
    return False
