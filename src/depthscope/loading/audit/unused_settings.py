"""Settings in config.json that say something about what the model computes, and that the loaded model does not use.

A config class keeps what it does not know as an attribute that nothing reads. No list of all harmless settings can be
had, so that only those are judged whose meaning is known: multipliers, caps and switches (at a value at which they do
something), rotary positions, and other names of the class's own settings.
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

# Norms of queries and keys: some classes always have them, whatever they are told.
QK_NORM = ("use_qk_norm", "qk_norm", "qk_layernorm", "use_qk_layernorm")
QK_NORM_MODULE = re.compile(r"(^|\.)(q|k|qk|query|key)_(layer_?)?norm$")
# Settings that change the function and leave no tensor behind -> the values at which they do nothing.
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
# Names of one thing in several architectures: where only another name than the class's own is given, it is lost.
SAME = (
    ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon", "layernorm_epsilon"),
    ("hidden_act", "hidden_activation", "activation_function", "activation"),
    ("routed_scaling_factor", "moe_router_topk_scaling_factor"),
    EXPERTS_PER_TOKEN,
)
# How far a token sees; texts that are shorter are not concerned.
SPANS = ("sliding_window", "attention_window", "attention_chunk_size")
# The keys of rotary positions that each kind of scaling uses, and the values at which they do nothing.
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
    """Why the model computes something else than its config.json says, and what to do; None if nothing is known to."""
    text = model.config.get_text_config(decoder=True)
    given = _of_the_text(settings, text)
    found = [*_acting(given, text, model), *_renamed(given, text, model), *_rotary(given, text, model)]
    if not found:
        return None
    return (
        f"config.json of {name!r} has settings that {type(model).__name__} does not use, and that change what a model "
        f"computes: {listed(found)}. Give the model_type whose code knows them, or the names that "
        f"{type(text).__name__} has for them, or take them out if they are not meant (transformers "
        f"{transformers.__version__})."
    )


def unused_settings_notes(settings: Mapping[str, Any], model: Any) -> list[str]:
    """What a reader should know of settings that the model does not use, and that need not matter."""
    text = model.config.get_text_config(decoder=True)
    given = _of_the_text(settings, text)
    notes = [
        f"config.json says {key} = {value!r}, which {type(model).__name__} does not use: in texts of more tokens, each "
        "sees more than config.json says."
        for key in SPANS
        if isinstance(value := given.get(key), int)
        and 0 < value < (getattr(text, "max_position_embeddings", None) or sys.maxsize)
        and given.get("use_sliding_window") is not False
        and not _knows(text, model, key)
    ]
    quantization = settings.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method is not None and method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        notes.append(
            f"config.json says that the model was quantised with {method!r}, which transformers does not know; its "
            "weights are stored in full and were taken as they are."
        )
    return notes


def _of_the_text(settings: Mapping[str, Any], text: Any) -> Mapping[str, Any]:
    """The part of config.json that is about the language model."""
    parts = [settings, *(value for value in settings.values() if isinstance(value, dict))]
    return next((part for part in parts if part.get("model_type") == text.model_type), {})


def _acting(given: Mapping[str, Any], text: Any, model: Any) -> Iterator[str]:
    for key, neutral in ACTING.items():
        if key not in given or given[key] in neutral or _knows(text, model, key):
            continue
        if not (key in QK_NORM and any(QK_NORM_MODULE.search(name) for name, _ in model.named_modules())):
            yield f"{key} = {given[key]!r}"


def _renamed(given: Mapping[str, Any], text: Any, model: Any) -> Iterator[str]:
    fields = _fields(type(text))
    for names in SAME:
        own = [key for key in names if key in fields]
        if not own or any(key in given for key in own):
            continue
        for key in names:
            if key in given and given[key] != getattr(text, own[0], None) and not _knows(text, model, key):
                yield f"{key} = {given[key]!r} (it is called {own[0]} there, and is {getattr(text, own[0], None)!r})"


def _rotary(given: Mapping[str, Any], text: Any, model: Any) -> Iterator[str]:
    """Rotary positions that got lost between config.json and the model."""
    final = getattr(text, "rope_parameters", None)
    if not isinstance(final, dict):
        return
    is_flat = "rope_type" in final  # otherwise one for each type of layers
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
        yield from (f"rope_parameters.{key}, as there are no layers of this type" for key in nested)
    for where in ("rope_parameters", "rope_scaling"):
        said: Any = given.get(where)
        for one in [said, *said.values()] if isinstance(said, dict) else ():
            yield from _lost(where, one, entries) if isinstance(one, dict) else ()
    yield from _lost("config.json", {"rope_theta": given.get("rope_theta")}, entries)
    part = given.get("partial_rotary_factor")
    if part not in ONE and not _mentions(model, "partial_rotary_factor"):
        yield f"partial_rotary_factor = {part!r}"


def _lost(where: str, said: Mapping[str, Any], entries: list[dict[str, Any]]) -> Iterator[str]:
    for key in ("rope_theta", *ROTARY_KEYS):
        value = said.get(key)
        if value is not None and entries and all(entry.get(key) != value for entry in entries):
            yield f"{key} = {_short(value)} in {where}, where the model has {_short(entries[0].get(key))}"


def _short(value: Any) -> str:
    return repr(value) if not isinstance(value, list) else f"a list of {len(value)}"


def _knows(text: Any, model: Any, key: str) -> bool:
    """Whether the config class has a setting, or the model's code asks for it."""
    return key in _fields(type(text)) or _mentions(model, key)


def _fields(kind: Any) -> set[str]:
    own = {field.name for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set[str]()
    return own | set(getattr(kind, "attribute_map", {})) | set(inspect.signature(kind).parameters)


def _mentions(model: Any, key: str) -> bool:
    """Whether the text of the model's own code, or of what it inherits, has the word."""
    names = {kind.__module__ for one in (model, model.config) for kind in type(one).__mro__}
    shared = ("transformers.", "torch.", "builtins")  # what all architectures inherit
    for name in (name for name in names if name.startswith("transformers.models.") or not name.startswith(shared)):
        try:
            source = inspect.getsource(sys.modules[name])
        except (OSError, TypeError, KeyError):
            return True  # nobody can tell
        if re.search(rf"\b{re.escape(key)}\b", source):
            return True
    return False
