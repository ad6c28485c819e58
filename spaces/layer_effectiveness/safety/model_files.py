"""Which files a model is made of: nothing else is unpacked, downloaded or read."""

import re

__all__ = ["GGUF", "JSON_FILES", "TOKENIZER_FILES", "is_model_file", "is_pickle", "is_weights"]

GGUF = ".gguf"
JSON_FILES = frozenset(("config.json", "model.safetensors.index.json"))
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
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors", re.ASCII)
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# What a Trainer leaves beside the weights.
NOT_WEIGHTS = re.compile(r"training_args|optimizer|scheduler|scaler|rng_state|trainer_state")


def is_weights(name: str) -> bool:
    """Tell whether a file holds weights that may be read: safetensors under transformers' own names."""
    return WEIGHTS.fullmatch(name) is not None


def is_model_file(name: str) -> bool:
    """Tell whether a file, named without its folder, belongs to a model and may be read."""
    return name in JSON_FILES or name in TOKENIZER_FILES or is_weights(name)


def is_pickle(name: str) -> bool:
    """Tell whether a file holds weights in a form that can run code."""
    return name.lower().endswith(PICKLES) and not NOT_WEIGHTS.search(name)
