"""Shows on a GPU that scores are those of the CPU, and times an analysis there against the released algorithms.

    python benchmarks/gpu.py              # equal scores, then times; some minutes on one GPU
    python benchmarks/gpu.py --only equal

The models have random weights: what is timed depends on their shapes alone, and nothing has to be fetched. The released
algorithms (`released.py`) spend the same time on every layer and pair, so a share of them is timed and scaled up.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, TrainerControl, TrainerState

import released
from depthscope import LayerReport, LayerStack, analyze
from depthscope.callbacks import VarianceCallback
from lanes import SMOLLM2

# Small models of several families, random weights large enough that layers matter.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {},
    "gemma2": {"head_dim": 16},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16},
    "mamba": {},
}
SMALL = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# name -> shape, blocks, tokens per block, blocks per batch
TIMED: dict[str, tuple[dict[str, int], int, int, int]] = {
    "134M (SmolLM2's shape)": (
        SMOLLM2,
        16,
        512,
        8,
    ),
    "1.2B (Llama 3.2's shape)": (
        {
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        },
        8,
        1024,
        4,
    ),
}
TOLERANCE = 2e-4  # relative to the largest value of a column: float32 on both sides, summed in another order
LAYERS_TIMED, PAIRS_TIMED = 4, 8
PAIRS = 0.25


def small_model(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SMALL, **FAMILIES[family])).eval()


def show_equal_scores(device: torch.device) -> bool:
    """Every score of small models on both devices; says how far they are apart."""
    print("| model | largest difference, relative to the column | of |\n| --- | --- | --- |")
    good = True
    for family in FAMILIES:
        model = small_model(family)
        ids = torch.randint(3, SMALL["vocab_size"], (12, 64), generator=torch.Generator().manual_seed(1))
        measure = partial(analyze, blocks=ids, fit_blocks=8, eval_blocks=4, probes=4, progress=False)
        sides = [measure(model.to(where)) for where in (torch.device("cpu"), device)]
        worst, name = max(_differences(*sides))
        good &= worst <= TOLERANCE
        print(f"| {family} | {worst:.1e}{'' if worst <= TOLERANCE else ' TOO FAR'} | {name} |", flush=True)
    return good


def _differences(one: LayerReport, other: LayerReport) -> list[tuple[float, str]]:
    """How far the values of each column and each global score are apart, relative to the largest."""
    names = [name for name in one.layers[0] if name not in ("layer", "kind") and not name.endswith("_se")]
    columns = {name: [[row[name] for row in side.layers] for side in (one, other)] for name in names}
    columns |= {name: [[side.scores[name]] for side in (one, other)] for name in one.scores if not name.endswith("_se")}
    found = []
    for name, sides in columns.items():
        a, b = (np.array([np.nan if value is None else value for value in side], dtype=float) for side in sides)
        if (np.isnan(a) != np.isnan(b)).any():
            found.append((float("inf"), name))
        elif not np.isnan(a).all():
            found.append((float(np.nanmax(np.abs(a - b)) / max(np.nanmax(np.abs(a)), 1e-12)), name))
    return found


def show_equal_callback(device: torch.device) -> bool:
    """What `VarianceCallback` makes of one training pass of a small model on both devices."""
    found = []
    for where in (torch.device("cpu"), device):
        model = small_model("llama").to(where).train()
        ids = torch.randint(3, SMALL["vocab_size"], (4, 64), generator=torch.Generator().manual_seed(1)).to(where)
        stack, callback = LayerStack(model), VarianceCallback(history=False)
        callback._stack = stack
        callback.attach(stack)
        callback.on_step_begin(None, TrainerState(), TrainerControl())
        model(ids, labels=ids, use_cache=False).loss.backward()
        callback.fetch()
        found.append(np.array((callback.window or {})["sums"]))
        callback.detach()
    worst = float((np.abs(found[0] - found[1]) / np.maximum(np.abs(found[0]).max(0), 1e-12)).max())
    print(
        f"| VarianceCallback on llama | {worst:.1e}{'' if worst <= TOLERANCE else ' TOO FAR'} | its sums |", flush=True
    )
    return worst <= TOLERANCE


class Timed:
    """One model of a real shape on the GPU, in bfloat16, and what its analysis takes."""

    def __init__(self, name: str, device: torch.device) -> None:
        shape, count, self.length, self.batch = TIMED[name]
        torch.manual_seed(0)
        config = AutoConfig.for_model("llama", **shape, max_position_embeddings=self.length)
        with device:
            self.model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        self.layers = LayerStack(self.model).layers
        self.name, self.count = name, len(self.layers)
        self.ids = torch.randint(shape["vocab_size"], (3 * count, self.length))
        self.evaluated = self.ids[2 * count :].to(device)
        self.fitting = self.ids[: 2 * count].to(device)
        self.blocks = count

    def run(self) -> None:
        """Print a row for each score that the released code has, as soon as it is timed."""
        some = [round(k) for k in np.linspace(0, self.count - 1, LAYERS_TIMED)]
        pairs = list(combinations(range(self.count), 2))
        swapped = [pairs[round(k)] for k in np.linspace(0, len(pairs) - 1, PAIRS_TIMED)]
        timed = (
            ("causal", released.causal, some, self.count),
            ("permutation", released.permutation, swapped, len(pairs)),
        )
        self._ours("variance")  # the first passes of a process are slow
        for score, algorithm, share, everything in timed:
            theirs = self._released(algorithm, share, everything)
            self._row(score, theirs, self._ours(score))
        self._row("skip", None, self._ours("skip"))
        self._row("usefulness", None, self._ours("usefulness"))
        self._row("variance, block influence", None, self._ours("variance,block_influence"))
        self._row(f"permutation, {PAIRS:.0%} of the pairs", None, self._ours("permutation", pairs=PAIRS))
        peak = torch.cuda.max_memory_allocated() / 2**30
        weights = sum(weight.numel() * weight.element_size() for weight in self.model.parameters()) / 2**30
        print(f"{self.name}: at most {peak:.1f} GiB on the card, weights {weights:.1f} GiB\n", flush=True)

    def _released(self, algorithm: Callable[..., object], share: list[Any], everything: int) -> float:
        with torch.autocast("cuda", torch.bfloat16):
            released.mean_loss(self.model, self.evaluated, self.batch)
            alone = seconds(lambda: released.mean_loss(self.model, self.evaluated, self.batch))
            spent = seconds(lambda: algorithm(self.model, self.layers, self.evaluated, self.batch, share))
        return alone + (spent - alone) * everything / len(share)

    def _ours(self, scores: str, **options: Any) -> float:
        settings = {"fit_blocks": 2 * self.blocks, "eval_blocks": self.blocks, "batch_size": self.batch, **options}
        return seconds(lambda: analyze(self.model, blocks=self.ids, scores=scores, progress=False, **settings))

    def _row(self, score: str, theirs: float | None, ours: float) -> None:
        other = ("", "") if theirs is None else (f"{theirs:.1f} s", f"{theirs / ours:.1f}x")
        tokens = self.evaluated.numel() / ours
        print(f"| {self.name} | {score} | {other[0]} | {ours:.1f} s | {other[1]} | {tokens:,.0f} |", flush=True)


def seconds(work: Callable[[], object]) -> float:
    """How long some work takes on the GPU, to its end."""
    torch.cuda.synchronize()
    begun = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("equal", "times"), help="this part alone")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("There is no CUDA device here.")
    device = torch.device("cuda")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.cuda.get_device_name()}\n")
    good = options.only == "times" or all([show_equal_scores(device), show_equal_callback(device)])
    if options.only != "equal":
        print("\n| model, bfloat16 | score | released | depthscope | ratio | evaluated tokens per second |")
        print("| --- | --- | --- | --- | --- | --- |")
        for name in TIMED:
            torch.cuda.reset_peak_memory_stats()
            Timed(name, device).run()
            torch.cuda.empty_cache()
    if not good:
        sys.exit("Scores on the GPU differ from those on the CPU.")


if __name__ == "__main__":
    main()
