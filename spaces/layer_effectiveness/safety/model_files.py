"""The files of a model: no other file is unpacked, downloaded or read."""

import re

from depthscope.loading.checkpoint import CONFIG, INDEX, WEIGHTS, is_pickle

__all__ = ["CONFIG", "GGUF", "INDEX", "TOKENIZER_FILES", "WEIGHTS", "is_model_file", "is_pickle", "is_weights"]

GGUF = ".gguf"
TOKENIZER_FILES = frozenset(
    (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "tokenizer.model",
        "spiece.model",
        "tekken.json",
    )
)
WEIGHTS_NAME = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors", re.ASCII)


def is_weights(name: str) -> bool:
    """Tell whether a file holds weights that may be read: safetensors under transformers' own names."""
    return WEIGHTS_NAME.fullmatch(name) is not None


def is_model_file(name: str) -> bool:
    """Tell whether a file, named without its folder, belongs to a model and may be read."""
    return name in (CONFIG, INDEX) or name in TOKENIZER_FILES or is_weights(name)
