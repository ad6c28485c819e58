"""The files of a model in a folder: weights as safetensors, configuration, tokenizer, code. No others are pushed.

The other files of a Trainer (optimizer, random states, training_args.bin) are pickled, large, and of no use to others.
"""

from fnmatch import fnmatch
from pathlib import Path

from depthscope.errors import HubError
from depthscope.loading.checkpoint import ADAPTER_CONFIG, CONFIG
from depthscope.runs.layout import checkpoints, published_steps

__all__ = ["find_steps", "has_weights", "model_files"]

FILES = (
    CONFIG,
    "generation_config.json",
    ADAPTER_CONFIG,
    "*.safetensors",
    "*.safetensors.index.json",
    "*.py",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
)
PICKLED = ("*.bin", "*.pt", "*.pth")


def model_files(folder: Path) -> dict[str, Path]:
    """The files of the model in a folder, by name.

    Raises:
        HubError: the folder holds no model, or its weights are pickled.
    """
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    files = {name: folder / name for name in names if any(fnmatch(name, pattern) for pattern in FILES)}
    if not has_weights(folder):
        pickled = [
            name for name in names if name.startswith("pytorch_model") and any(fnmatch(name, p) for p in PICKLED)
        ]
        why = f"its weights are pickled ({pickled[0]}); save them with safetensors" if pickled else "no *.safetensors"
        raise HubError(f"{str(folder)!r} holds no model that can be pushed: {why}. Save one with save_pretrained.")
    if not {CONFIG, ADAPTER_CONFIG} & files.keys():
        raise HubError(f"{str(folder)!r} has weights but no config.json: save the model with save_pretrained.")
    return files


def has_weights(folder: Path) -> bool:
    """Whether a folder holds weights as safetensors."""
    return any(folder.glob("*.safetensors"))


def find_steps(folder: Path) -> dict[int, Path]:
    """The checkpoints of a training, by step: in `steps` for a sweep, in `checkpoint-N` for a Trainer."""
    places = (*published_steps(folder).items(), *checkpoints(folder).items())
    return dict(sorted((step, path) for step, path in places if has_weights(path)))
