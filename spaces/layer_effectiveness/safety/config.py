"""Reading an untrusted config.json and tokenizer files, with limits, and without fields that name code or other places.

The numbers are checked before a model is built from them, because building it could take hours or all memory.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safety.limits import Limits
from safety.model_files import CONFIG, INDEX
from safety.problems import Problem, too_long

__all__ = ["Sizes", "clean_config", "clean_tokenizer", "read_object", "require_sane_numbers"]

# Fields that name code, or files and places elsewhere.
UNSAFE_FIELDS = frozenset(
    (
        "auto_map",
        "custom_pipelines",
        "transformers_weights",
        "_name_or_path",
        "name_or_path",
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_internal",
        "_attn_implementation_autoset",
        "experts_implementation",
        "_experts_implementation",
        "trust_remote_code",
        "fast_tokenizer_files",
    )
)
MOST_LEVELS = 32
MOST_FIELDS = 200_000
LARGEST_NUMBER = 2**40
MOST_EXPERTS = 65_536  # in all layers together
LAYER_FIELDS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks", "block_count")
# Limits for models of the sizes that a Space accepts, by a word in the field's name.
LARGEST = {
    "hidden_size": 65_536,
    "n_embd": 65_536,
    "n_embed": 65_536,
    "d_model": 65_536,
    "embedding_length": 65_536,
    "embedding_size": 65_536,
    "intermediate_size": 1_048_576,
    "n_inner": 1_048_576,
    "ffn_dim": 1_048_576,
    "feed_forward_length": 1_048_576,
    "vocab_size": 4_194_304,
    "head_dim": 8_192,
    "num_attention_heads": 4_096,
    "n_head": 4_096,
    "head_count": 4_096,
    "num_key_value_heads": 4_096,
    "num_experts": 4_096,
    "num_local_experts": 4_096,
    "n_routed_experts": 4_096,
    "expert_count": 4_096,
    "max_position_embeddings": 67_108_864,
    "n_positions": 67_108_864,
    "n_ctx": 67_108_864,
    "context_length": 67_108_864,
}


class Sizes(dict[str, int]):
    """The numbers of a config, by the last part of their names."""

    def first(self, *names: str) -> int | None:
        """The first of the fields that exists."""
        return next((self[name] for name in names if name in self), None)


def clean_config(path: Path, limits: Limits) -> dict[str, Any]:
    """Check config.json, write it back without fields that name code or other places, and return its content.

    Raises:
        Problem: it is not a JSON object, or a number in it is absurd.
    """
    content = read_object(path, limits.max_json_bytes, "broken_config")
    cleaned = _without_unsafe(content)
    require_sane_numbers(cleaned, path.name, limits)
    if isinstance(quantization := cleaned.get("quantization_config"), dict):
        method = ascii(str(quantization.get("quant_method"))[:40])
        raise Problem(
            "broken_config",
            f"The model is quantised ({method}), which this Space cannot load. Give the original model, "
            "or a GGUF file.",
        )
    path.write_text(json.dumps(cleaned), encoding="utf-8")
    return cleaned


def clean_tokenizer(folder: Path, limits: Limits) -> None:
    """Check the sizes of a tokenizer's files, and remove settings that name code or other files.

    Raises:
        Problem: a file is too large or not JSON.
    """
    for path in sorted(folder.iterdir()):
        if path.name == "tokenizer_config.json":
            content = read_object(path, limits.max_tokenizer_bytes, "broken_tokenizer")
            named = {key for key in content if key.endswith(("_file", "_files"))}
            kept = {key: value for key, value in _without_unsafe(content).items() if key not in named}
            path.write_text(json.dumps(kept), encoding="utf-8")
        elif path.suffix == ".json" and path.name not in (CONFIG, INDEX):
            read_object(path, limits.max_tokenizer_bytes, "broken_tokenizer")
        elif path.suffix in (".txt", ".model") and path.stat().st_size > limits.max_tokenizer_bytes:
            raise too_long("broken_tokenizer", path.name, limits.max_tokenizer_bytes)


def read_object(path: Path, most_bytes: int, kind: Any) -> dict[str, Any]:
    """Read a JSON object of at most `most_bytes` bytes.

    Raises:
        Problem: (of the given `kind`) the file is too large, not JSON, nested too deeply, or not an object.
    """
    if path.stat().st_size > most_bytes:
        raise too_long(kind, path.name, most_bytes)
    try:
        content = json.loads(path.read_bytes())
    except RecursionError as error:
        raise Problem(kind, f"{path.name} is nested too deeply.") from error
    except ValueError as error:  # bad JSON, bad UTF-8, a number of too many digits
        raise Problem(kind, f"{path.name} is not valid JSON ({str(error)[:120]}). Save the model again.") from error
    if not isinstance(content, dict):
        raise Problem(kind, f"{path.name} holds a JSON {type(content).__name__}, not an object. Save the model again.")
    return content


def require_sane_numbers(content: dict[str, Any], name: str, limits: Limits) -> Sizes:
    """Refuse a config with numbers beyond those of any accepted model; return the numbers.

    Raises:
        Problem: a number is absurd, or the config is nested too deeply or too long.
    """
    sizes = Sizes()
    for count, (field, value, level) in enumerate(_numbers(content, "", 0)):
        if count > MOST_FIELDS or level > MOST_LEVELS:
            raise Problem("broken_config", f"{name} is nested too deeply or too long for the config of a model.")
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        largest = limits.max_layers if field in LAYER_FIELDS else LARGEST.get(field, LARGEST_NUMBER)
        if abs(value) > largest or (value < 0 and (field in LARGEST or field in LAYER_FIELDS)):
            raise Problem(
                "broken_config",
                f"{field} in {name} is {_words(value)}, but this Space accepts at most {largest:,}. Repair the config, "
                "or analyse the model on your own machine: pip install depthscope.",
            )
        sizes.setdefault(field, value)
    experts = sizes.first("num_experts", "num_local_experts", "n_routed_experts", "expert_count") or 1
    if experts * (sizes.first(*LAYER_FIELDS) or 1) > MOST_EXPERTS:
        raise Problem("broken_config", f"{name} describes more than {MOST_EXPERTS:,} experts, the limit of this Space.")
    return sizes


def _numbers(value: Any, field: str, level: int) -> Iterator[tuple[str, Any, int]]:
    yield field, value, level
    if level > MOST_LEVELS:
        return
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _numbers(item, str(key).rsplit(".", 1)[-1], level + 1)
    elif isinstance(value, list):
        for item in value:
            yield from _numbers(item, field, level + 1)


def _without_unsafe(value: Any, level: int = 0) -> Any:
    if level > MOST_LEVELS:
        return value  # refused when the numbers are checked
    if isinstance(value, dict):
        return {key: _without_unsafe(item, level + 1) for key, item in value.items() if key not in UNSAFE_FIELDS}
    if isinstance(value, list):
        return [_without_unsafe(item, level + 1) for item in value]
    return value


def _words(value: int) -> str:
    return f"{value:,}" if abs(value) < 10**18 else f"a number of {value.bit_length():,} bits"
