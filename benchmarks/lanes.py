"""All experiments in one pass over the layers, beside each in a pass of its own: equal scores, times, ratios.

    python benchmarks/lanes.py                # on the CPU, one thread: some minutes
    python benchmarks/lanes.py --device cuda  # on a GPU
    python benchmarks/lanes.py --tiny         # the same code at toy size, seconds

All ways are of this build, in alternation in one process; `benchmarks/paired.py` compares commands of two builds. The
models have random weights: the time depends on their shapes alone. Seconds are of the processor on a CPU, of the clock
on a GPU; the median of --rounds.
"""

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Any, get_args

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from depthscope import LayerReport, analyze
from depthscope.analysis import analyze as analysis
from depthscope.layers.lanes.lanes import Lanes, Way

SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}
NARROW = {
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
EXPERIMENTS = "skip,causal,usefulness"
# name -> shape, blocks, tokens per block, scores
TIMED: dict[str, tuple[dict[str, int], int, int, str]] = {
    "12 layers of width 128": (NARROW, 1, 16, EXPERIMENTS),
    "12 layers of width 128, with swaps": (NARROW, 1, 16, f"{EXPERIMENTS},permutation"),
    "SmolLM2's shape": (SMOLLM2, 1, 16, EXPERIMENTS),
    "SmolLM2's shape, longer": (SMOLLM2, 4, 128, EXPERIMENTS),
}
WAYS: tuple[Way, ...] = get_args(Way)


@contextmanager
def running(way: Way) -> Iterator[None]:
    """Have analyses run their experiments in one way."""
    chosen = analysis.Lanes
    analysis.Lanes = partial(Lanes, way=way)  # type: ignore[misc]
    try:
        yield
    finally:
        analysis.Lanes = chosen  # type: ignore[misc]


def seconds(device: torch.device, measure: Any, way: Way) -> tuple[float, LayerReport]:
    """What an analysis takes, and its report."""
    on_gpu = device.type == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time
    if on_gpu:
        torch.cuda.synchronize()
    begun = clock()
    with running(way):
        report = measure()
    if on_gpu:
        torch.cuda.synchronize()
    return clock() - begun, report


def difference(one: LayerReport, other: LayerReport) -> float:
    """The largest relative difference of the values by layer."""
    pairs = [(a[name], b[name]) for a, b in zip(one.layers, other.layers, strict=True) for name in a]
    numbers = [(a, b) for a, b in pairs if isinstance(a, float) and isinstance(b, float)]
    return max(abs(a - b) / max(abs(a), abs(b), 1e-6) for a, b in numbers)


def main() -> None:
    """Print a row for each model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="a toy size, to see that it runs")
    given = parser.parse_args()
    device = torch.device(given.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    else:
        print(torch.cuda.get_device_name(device))
    timed = {"toy": ({**NARROW, "num_hidden_layers": 3}, 1, 8, f"{EXPERIMENTS},permutation")} if given.tiny else TIMED
    columns = [
        "model",
        "blocks, tokens",
        *(f"{way}, seconds" for way in WAYS),
        "batched, of alone",
        "largest difference",
    ]
    print("| " + " | ".join(columns) + " |")
    print("| --- " * len(columns) + "|")
    for name, (shape, count, length, scores) in timed.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **shape)).eval().to(device)
        ids = torch.randint(shape["vocab_size"], (2 * count, length))
        settings = {"blocks": ids, "fit_blocks": count, "eval_blocks": count, "scores": scores, "progress": False}
        measure = partial(analyze, model, **settings)
        taken: dict[Way, list[float]] = {way: [] for way in WAYS}
        reports = {way: seconds(device, measure, way)[1] for way in WAYS}  # not counted: the first are slow
        for _ in range(given.rounds):
            for way in WAYS:
                taken[way].append(seconds(device, measure, way)[0])
        each = {way: median(values) for way, values in taken.items()}
        row = [name, f"{count} x {length}", *(f"{each[way]:.2f}" for way in WAYS)]
        row += [f"{each['batched'] / each['alone']:.2f}", f"{difference(reports['batched'], reports['alone']):.1e}"]
        print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
