"""A sweep so small that it trains in a second, as a file, and what it leaves on the disk."""

import random
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file

from depthscope.sweep.report.page import write_report
from depthscope.sweep.runner import Outcome, run_sweep
from depthscope.sweep.specification import load_sweep

REPORT = ("results.csv", "results.parquet", "layers.parquet", "tables.md", "sweep.html")
TINY: dict[str, Any] = {
    "name": "tiny",
    "model": {
        "hidden_size": 16,
        "head_dim": 8,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 32,
        "initializer_range": 0.1,
    },
    "data": {"text": "text"},
    "tokenizer": {"vocab_size": 280},
    "training": {
        "tokens": 768,
        "sequence_length": 16,
        "batch_tokens": 64,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "precision": "float32",
    },
    "tracking": {"log_every": 2, "checkpoint_every": 4},
    "scoring": {"scores": ["variance", "skip", "causal"], "eval_blocks": 2, "loss_tokens": 64},
    "grid": {"depth": {"num_hidden_layers": [2, 3]}},
}


def write_text(folder: Path, documents: int = 80) -> None:
    """Documents of made-up words, the same every time."""
    chance = random.Random(5)
    words = ["".join(chance.choices("aeilnorst", k=chance.randint(2, 7))) for _ in range(40)]
    (folder / "text").mkdir(parents=True, exist_ok=True)
    for index in range(documents):
        (folder / "text" / f"{index:03}.txt").write_text(" ".join(chance.choices(words, k=60)) + "\n")


def write_sweep(folder: Path, **parts: Any) -> Path:
    """The tiny sweep as a file beside its text; a part that is a mapping is merged, `grid` is replaced."""
    content = {key: dict(value) if isinstance(value, dict) else value for key, value in TINY.items()}
    for key, value in parts.items():
        merged = isinstance(value, dict) and key != "grid"
        content[key] = {**content.get(key, {}), **value} if merged else value
    if not (folder / "text").is_dir():
        write_text(folder)
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def run(folder: Path, out: Path, *, only: tuple[str, ...] = (), jobs: int = 1, **parts: Any) -> Outcome:
    """Run the tiny sweep and write its report."""
    outcome = run_sweep(load_sweep(write_sweep(folder, **parts)), out, only=only, jobs=jobs, progress=False)
    write_report(out)
    return outcome


def reported(out: Path) -> dict[str, bytes]:
    """Every file of the report."""
    return {name: (out / "report" / name).read_bytes() for name in REPORT}


def weights(folder: Path) -> dict[str, Any]:
    """The weights in a saved model, as lists that can be compared."""
    return {name: tensor.tolist() for name, tensor in load_file(folder / "model.safetensors").items()}
