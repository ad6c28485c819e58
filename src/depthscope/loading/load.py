"""Loading a model by name: the model in evaluation mode, its tokenizer, and the facts that a report states about it.

transformers does the loading (`AutoConfig`, `AutoModelForCausalLM`, `AutoTokenizer`). This module adds a message for
each cause of failure, and refuses a checkpoint that does not fit its config instead of adding random weights.
"""

import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoTokenizer,
    PretrainedConfig,
)

from depthscope.console.quiet import quiet
from depthscope.errors import ModelLoadError, SettingsError
from depthscope.files.atomic import is_access_error
from depthscope.layers.facts import model_facts, text_only_notes
from depthscope.loading.adapters import apply_adapter, apply_adapter_beside, require_adapter_weights
from depthscope.loading.attn_implementation import choose_attn_implementation, require_attn_implementation
from depthscope.loading.audit.audit import audit, require_all_weights
from depthscope.loading.audit.stored import FLOATS, StoredTensors
from depthscope.loading.checkpoint import ADAPTER_CONFIG, CONFIG, Checkpoint, find_checkpoint, require_weights
from depthscope.loading.devices import find_device, find_dtype
from depthscope.loading.failures import LOAD_FAILURES, load_errors
from depthscope.loading.gguf.audit import audit_gguf, complete_biases
from depthscope.loading.gguf.header import GgufHeader
from depthscope.loading.gguf.reading import reading_once
from depthscope.loading.gguf.settings import adopt_settings
from depthscope.loading.gguf.split import read_gguf
from depthscope.loading.loaded import LoadedModel
from depthscope.loading.offloading import places_of_weights
from depthscope.wording.messages import one_line

__all__ = ["LoadedModel", "load_model", "model_facts", "require_for_loading"]

TOKENIZER_FILES = frozenset(
    (
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
        "vocab.txt",
        "spiece.model",
        "tekken.json",
    )
)


NO_FOLDER = "no-adapter"  # the folder in which transformers looks for an adapter, and finds none


@dataclass(frozen=True)
class _Options:
    dtype: Any
    device: torch.device | None  # None: split over all devices
    trust_remote_code: bool
    token: str | None
    attn_implementation: str | None
    offload: bool | None = False  # None: where the weights do not fit


def load_model(
    name: str | PathLike[str],
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
    token: str | None = None,
    attn_implementation: str | None = None,
    base_model: str | None = None,
    offload: bool | None = False,
) -> LoadedModel:
    """Load a causal language model for analysis.

    Args:
        name: the id of a repository on the Hugging Face Hub, a folder, a .gguf file, or a PEFT adapter (a repository or
            folder with adapter_config.json; its base model is loaded and the adapter applied).
        revision: a branch, tag or commit of the repository.
        dtype: "float32", "bfloat16", "float16", or "auto": the checkpoint's own on an accelerator, float32 on a CPU.
        device: such as "cpu", "cuda", "cuda:1" or "mps"; None takes an accelerator if there is one; "auto" splits the
            model over all devices.
        trust_remote_code: whether code from the model's repository may run.
        token: a token of the Hub, for private and gated repositories.
        attn_implementation: "eager", "sdpa", "flash_attention_2", ...; None takes what the config names, or
            transformers' default where that does not run here.
        base_model: for an adapter whose base model has moved: its id, folder or .gguf file.
        offload: leave the weights of the layers in the checkpoint's files (for a CPU) or in main memory (for an
            accelerator), from where each layer fetches its own when it runs; None does so where they do not fit.

    Raises:
        ModelLoadError: the model cannot be loaded; the message says why and what to do.
        SettingsError: an unknown dtype or attention implementation, a base model without an adapter, or a revision of a
            model that is not on the Hub.
    """
    if not isinstance(name, (str, PathLike)):
        raise ModelLoadError(
            f"{type(name).__name__} is not the name of a model; give an id of the Hub, a folder or a .gguf file."
        )
    target = find_device(device)
    chosen_dtype = find_dtype(dtype, target)
    require_attn_implementation(attn_implementation, target, chosen_dtype)
    options = _Options(chosen_dtype, target, trust_remote_code, token, attn_implementation, offload)
    with quiet():
        checkpoint = find_checkpoint(str(name), revision=revision, token=token)
        if revision is not None and checkpoint.source != "hub":
            raise SettingsError(
                f"{checkpoint.name!r} is on this machine, but only a repository on the Hub has revisions. Leave out "
                f"revision ({revision!r}), or give the id of the repository."
            )
        if checkpoint.is_adapter:
            return _load_adapter(checkpoint, options, base_model)
        if base_model is not None:
            raise SettingsError(
                f"{checkpoint.name!r} is no adapter ({ADAPTER_CONFIG} without a model's weights), so it needs no "
                "base model; leave out base_model."
            )
        return _load_checkpoint(checkpoint, options)


def require_for_loading(revision: Any, base_model: Any, attn_implementation: Any) -> None:
    """Refuse options of loading for a model that is already loaded.

    Raises:
        SettingsError: one of the options is given.
    """
    arguments = {"revision": revision, "base_model": base_model, "attn_implementation": attn_implementation}
    if named := [name for name, value in arguments.items() if value is not None]:
        raise SettingsError(
            f"The model is an object that is already loaded: leave out {' and '.join(named)}, or give the model's name."
        )


def _load_checkpoint(checkpoint: Checkpoint, options: _Options) -> LoadedModel:
    with ExitStack() as stack:
        gguf = None
        if checkpoint.gguf_file is not None:
            gguf = read_gguf(Path(checkpoint.gguf_file), checkpoint.name)
            checkpoint = replace(checkpoint, gguf_file=str(gguf.path))  # the first of several parts
            stack.enter_context(reading_once(gguf))
        return _load_files(checkpoint, options, gguf)


def _load_files(checkpoint: Checkpoint, options: _Options, gguf: GgufHeader | None) -> LoadedModel:
    settings = checkpoint.read_json(CONFIG)
    _require_config(checkpoint, settings, options.trust_remote_code)
    config, attention = _load_config(checkpoint, options)
    if gguf is not None:
        with load_errors(checkpoint, "config"):
            config = adopt_settings(config, gguf)
    _require_causal(checkpoint.name, config, options.trust_remote_code)
    files = require_weights(checkpoint, settings)
    has_adapter = ADAPTER_CONFIG in checkpoint.files
    if has_adapter:
        require_adapter_weights(checkpoint)
    model, notes, stored_dtype = _load_weights(checkpoint, config, options, settings, files, gguf)
    if has_adapter:
        model, more = apply_adapter_beside(checkpoint, model)
        notes = notes + more
    tokenizer, problem = _load_tokenizer(checkpoint, options)
    source = "adapter" if has_adapter else checkpoint.source
    facts = model_facts(model, name=checkpoint.name, source=source, revision=checkpoint.revision)
    notes = [*text_only_notes(model, config), *attention, *notes]
    return LoadedModel(model, tokenizer, facts, notes, problem, stored_dtype)


def _load_adapter(checkpoint: Checkpoint, options: _Options, base_model: str | None) -> LoadedModel:
    def load_base(name: str, revision: str | None) -> LoadedModel:
        base = find_checkpoint(name, revision=revision, token=options.token)
        if base.is_adapter:
            raise ModelLoadError(f"{name!r} is an adapter itself; give an adapter whose base is a whole model.")
        return _load_checkpoint(base, options)

    model, base, notes = apply_adapter(checkpoint, load_base, base_model)
    tokenizer, problem = base.tokenizer, base.tokenizer_problem
    if TOKENIZER_FILES & checkpoint.files:
        tokenizer, problem = _load_tokenizer(checkpoint, options)
        notes += _unknown_tokens(tokenizer, base.tokenizer, model)
    facts = model_facts(model, name=checkpoint.name, source="adapter", revision=checkpoint.revision)
    facts |= {"base_model": base.facts["name"], "base_revision": base.facts["revision"]}
    return LoadedModel(model, tokenizer, facts, base.notes + notes, problem, base.stored_dtype)


def _unknown_tokens(tokenizer: Any, base_tokenizer: Any, model: Any) -> list[str]:
    """A note on added tokens of an adapter whose rows are not stored with it."""
    rows = getattr(model.get_input_embeddings(), "num_embeddings", None)
    known = 0 if base_tokenizer is None else len(base_tokenizer)
    if tokenizer is None or rows is None or len(tokenizer) <= max(rows, known):
        return []
    return [
        f"The adapter's tokenizer has {len(tokenizer)} tokens but the model has rows for {rows}: the rows of added "
        "tokens are not stored with the adapter, so text with such a token is refused, and none is ever predicted."
    ]


# The config


def _require_config(checkpoint: Checkpoint, settings: Mapping[str, Any], trust_remote_code: bool) -> None:
    """Refuse a folder or repository without a config, or with a config that transformers has no code for."""
    if checkpoint.gguf_file:
        return
    if CONFIG not in checkpoint.files:
        raise ModelLoadError(_no_config(checkpoint))
    kind, own_code = settings.get("model_type"), settings.get("auto_map")
    if isinstance(kind, str) and kind in CONFIG_MAPPING:
        return
    if own_code and not trust_remote_code:
        raise ModelLoadError(_needs_code(checkpoint.name))
    if not own_code and kind is None:
        raise ModelLoadError(
            f"config.json of {checkpoint.name!r} names no model_type, so it is not the config of a transformers model. "
            "Give a model saved with save_pretrained."
        )
    if not own_code:
        raise ModelLoadError(
            f"{checkpoint.name!r} is of type {kind!r}, which transformers {transformers.__version__} does not know. "
            "Update it (pip install --upgrade transformers), or check model_type in config.json."
        )


def _no_config(checkpoint: Checkpoint) -> str:
    ggufs = sorted(file for file in checkpoint.files if file.lower().endswith(".gguf"))
    if ggufs:
        advice = "Give the path of one" if checkpoint.is_local else "Download one and give its path"
        return f"{checkpoint.name!r} has no config.json, but GGUF files: {', '.join(ggufs)}. {advice}, not the folder."
    inner = checkpoint.inner_models()
    hint = f" Did you mean {inner[-1]!r}?" if inner else ""
    return (
        f"{checkpoint.name!r} has no config.json, so it is not a model's folder. Give a folder written by "
        f"save_pretrained, a .gguf file or the id of a repository on the Hugging Face Hub.{hint}"
    )


def _needs_code(name: str) -> str:
    return (
        f"{name!r} runs only with code from its own repository, which is not run by default. Read that code, "
        "and if you trust it, pass --trust-remote-code (in Python: trust_remote_code=True)."
    )


def _load_config(checkpoint: Checkpoint, options: _Options) -> tuple[PretrainedConfig, list[str]]:
    """The config of the model, and notes on its attention implementation."""
    with load_errors(checkpoint, "config"):
        config = AutoConfig.from_pretrained(**checkpoint.where, trust_remote_code=options.trust_remote_code)
    config = getattr(config, "thinker_config", None) or config  # of a model that speaks: the part that writes the text
    attention = choose_attn_implementation(
        config,
        options.attn_implementation,
        options.device,
        options.dtype,
        trust_remote_code=options.trust_remote_code,
    )
    return config, attention


def _require_causal(name: str, config: PretrainedConfig, trust_remote_code: bool) -> None:
    kind, model_type = type(config), config.model_type
    if getattr(config, "is_encoder_decoder", False):
        description = "an encoder-decoder model"
    elif kind in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        description = "an encoder, which sees the tokens that it should predict"
    elif kind in MODEL_FOR_CAUSAL_LM_MAPPING or kind in MODEL_FOR_MULTIMODAL_LM_MAPPING:
        return
    elif "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        if trust_remote_code:
            return
        raise ModelLoadError(_needs_code(name))
    else:
        description = "a model that transformers has no causal language model for"
    raise ModelLoadError(
        f"{name!r} ({model_type}) is {description}. Only decoder-only causal language models can be analysed; "
        "give one of those."
    )


def _auto_class(config: PretrainedConfig) -> Any:
    """The class that loads a language model of this config; multimodal models have their own class."""
    kind = type(config)
    is_multimodal = kind in MODEL_FOR_MULTIMODAL_LM_MAPPING and kind not in MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForMultimodalLM if is_multimodal else AutoModelForCausalLM


# The weights


def _load_weights(
    checkpoint: Checkpoint,
    config: PretrainedConfig,
    options: _Options,
    settings: Mapping[str, Any],
    files: list[str],
    gguf: GgufHeader | None,
) -> tuple[nn.Module, list[str], torch.dtype | None]:
    extra = getattr(type(config), "extra_files", ())  # further files of weights that a config class names
    files = [*files, *(file for file in extra if file in checkpoint.files)]
    config_dtype = next((dtype for dtype in FLOATS.values() if dtype == config.dtype), None)
    with load_errors(checkpoint, "weights"):
        dtype, stored = options.dtype, StoredTensors(checkpoint, files)
        if dtype == "auto" and config_dtype is None and files:  # transformers takes the dtype of the first tensor
            dtype = stored.main_dtype or dtype
        places, folder = places_of_weights(
            checkpoint,
            stored,
            lambda: _auto_class(config).from_config(config, trust_remote_code=options.trust_remote_code),
            dtype,
            options.device,
            options.offload,
        )
        loaded: Any = _auto_class(config).from_pretrained(
            **checkpoint.where,
            **places,
            **_plain_weights(checkpoint),
            **_no_adapter(checkpoint),
            config=config,
            dtype=dtype,
            use_safetensors=True,
            weights_only=True,
            trust_remote_code=options.trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that our own message names them
        )
    model, info = loaded
    if folder is not None:
        weakref.finalize(model, folder.cleanup)
    if gguf is not None:
        complete_biases(model, info, gguf)
        require_all_weights(checkpoint.name, info)
        with load_errors(checkpoint, "weights"):
            return model.eval(), audit_gguf(model, gguf, info["unexpected_keys"]), None
    notes = audit(checkpoint, settings, stored, model, info)
    if folder is not None:
        notes.append(
            "The layers' weights stayed outside of the device's memory; each layer fetched its own when it ran."
        )
    stored_dtype = stored.main_dtype
    is_rounded = config_dtype and stored_dtype and torch.promote_types(config_dtype, stored_dtype) != config_dtype
    if options.dtype == "auto" and config_dtype and stored_dtype and is_rounded:
        names = _short(stored_dtype), _short(config_dtype)
        notes.append(f"The weights are stored as {names[0]} and were rounded to {names[1]}, as config.json says.")
    return model.eval(), notes, config_dtype or stored_dtype


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _plain_weights(checkpoint: Checkpoint) -> dict[str, Any]:
    """Unpack a GGUF file's weights, even where transformers would fetch kernels for packed weights."""
    if checkpoint.gguf_file is None or not hasattr(transformers, "GgufConfig"):
        return {}
    return {"quantization_config": transformers.GgufConfig(dequantize=True)}


def _no_adapter(checkpoint: Checkpoint) -> dict[str, Any]:
    """Keep transformers from loading an adapter beside the weights, whose loading report would replace the weights'."""
    return {"adapter_kwargs": {"subfolder": NO_FOLDER}} if ADAPTER_CONFIG in checkpoint.files else {}


# The tokenizer


def _load_tokenizer(checkpoint: Checkpoint, options: _Options) -> tuple[Any, str | None]:
    """The tokenizer and None, or None and why there is none; blocks of ids need no tokenizer."""
    name = checkpoint.name
    problem: Exception
    if not checkpoint.gguf_file and not TOKENIZER_FILES & checkpoint.files:
        return None, f"{name!r} has no tokenizer (no tokenizer.json or the like), and text needs one. Add its files."
    if "auto_map" in checkpoint.read_json("tokenizer_config.json") and not options.trust_remote_code:
        return None, f"The tokenizer of {_needs_code(name)}"
    try:
        return AutoTokenizer.from_pretrained(**checkpoint.where, trust_remote_code=options.trust_remote_code), None
    except LOAD_FAILURES as error:
        problem = error
    except Exception as error:  # the Rust library raises bare `Exception`s; all others are raised again
        if type(error) is not Exception:
            raise
        problem = error
    cause = f"{type(problem).__name__}: {one_line(problem)}"
    remedy = "Check the permissions of its files." if is_access_error(problem) else "Fetch its files again."
    return None, f"The tokenizer of {name!r} cannot be read ({cause}) {remedy}"
