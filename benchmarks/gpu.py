"""Shows on a GPU that scores are those of the CPU, and times an analysis there against the released algorithms.

    python benchmarks/gpu.py              # equal scores, times, a 7B model; some minutes on one GPU
    python benchmarks/gpu.py --only equal
    python benchmarks/gpu.py --cpu        # the same code on the CPU at toy size, seconds: shows that it runs

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
from accelerate import dispatch_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

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
# What the same code is run with on a CPU.
TOY_SHAPE = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TOY_BLOCKS, TOY_LENGTH = 2, 32
SMALL = {
    **TOY_SHAPE,
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
# A model that is taken whole, then with its layers' weights in the host's memory: shape, blocks, tokens per block.
LARGE: tuple[dict[str, int], int, int] = (
    {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    8,
    512,
)
LARGE_SCORES = "variance,block_influence,skip,causal"
# What a card multiplies at most in a second, in bfloat16 without sparsity, by its maker's data sheet.
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}
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
    for family in FAMILIES if device.type == "cuda" else ["llama"]:
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
        callback.measure(True)
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
        if device.type == "cpu":
            shape, count, self.length, self.batch = TOY_SHAPE, TOY_BLOCKS, TOY_LENGTH, 1
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
        print(f"\n{self.name}: {memory(self.model)}\n", flush=True)

    def _released(self, algorithm: Callable[..., object], share: list[Any], everything: int) -> float:
        with torch.autocast(self.evaluated.device.type, torch.bfloat16):
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


def show_large(device: torch.device) -> bool:
    """A 7B model: seconds, share of the card's peak, memory; then the same with its layers' weights in host memory."""
    shape, count, length = (TOY_SHAPE, TOY_BLOCKS, TOY_LENGTH) if device.type == "cpu" else LARGE
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **shape, max_position_embeddings=length)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    size = sum(weight.numel() for weight in model.parameters())
    ids = torch.randint(shape["vocab_size"], (count, length))
    print(f"\n| {size / 1e9:.2g}B, bfloat16, {count} x {length} tokens | seconds | share of peak | memory |")
    print("| --- | --- | --- | --- |")
    reports = []
    for place in ("on the card", "layers in host memory"):
        if place != "on the card":
            offload(model, device)
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        run = partial(analyze, model, blocks=ids, scores=LARGE_SCORES, fit_blocks=0, eval_blocks=count, progress=False)
        taken = seconds(lambda run=run: reports.append(run()))  # type: ignore[misc]
        share = _share_of_peak(config, ids.numel(), taken, device)
        print(f"| {place} | {taken:.1f} s | {share} | {memory(model)} |", flush=True)
    worst, name = max(_differences(*reports))
    print(f"\nThe largest difference between the two, relative to its column: {worst:.1e} ({name})", flush=True)
    return worst <= TOLERANCE


def offload(model: PreTrainedModel, device: torch.device) -> None:
    """Keep the weights of the layers in the host's memory, as `analyze(..., offload=True)` does with a checkpoint."""
    names = {name.rsplit(".", 1)[0] for name, _ in model.named_parameters()}
    layers = {f"model.layers.{index}": "cpu" for index in range(model.config.num_hidden_layers)}
    places = {name: device for name in names if not name.startswith("model.layers.")}
    dispatch_model(model, {**layers, **places}, main_device=device, force_hooks=True)


def _share_of_peak(config: Any, tokens: int, taken: float, device: torch.device) -> str:
    """Floating-point operations of the layers in a second, of what the card can do."""
    if device.type == "cpu":
        return ""
    peak = next((peak for name, peak in PEAKS.items() if name in torch.cuda.get_device_name()), None)
    layers, width = config.num_hidden_layers, config.hidden_size
    of_layer = 4 * width**2 + 3 * width * config.intermediate_size
    runs = layers * (layers + 1) / 2  # the baseline, and the layers after each that is skipped
    head = (layers + 1) * width * config.vocab_size
    rate = 2 * tokens * (runs * of_layer + head) / taken
    return f"{rate / 1e12:.0f} TFLOP/s" + (f", {rate / peak:.0%}" if peak else "")


def memory(model: PreTrainedModel) -> str:
    """What was used of the card at most, beside the weights."""
    weights = sum(weight.numel() * weight.element_size() for weight in model.parameters()) / 2**30
    if not torch.cuda.is_available():
        return f"weights {weights:.1f} GiB"
    peak = torch.cuda.max_memory_allocated() / 2**30
    return f"at most {peak:.1f} GiB on the card, weights {weights:.1f} GiB"


def seconds(work: Callable[[], object]) -> float:
    """How long some work takes, on a GPU to its end."""
    _finish()
    begun = time.perf_counter()
    work()
    _finish()
    return time.perf_counter() - begun


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    """Run the parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("equal", "times", "large"), help="this part alone")
    parser.add_argument("--cpu", action="store_true", help="on the CPU, at toy size")
    options = parser.parse_args()
    if not (options.cpu or torch.cuda.is_available()):
        sys.exit("There is no CUDA device here; --cpu runs the same code on the CPU at toy size.")
    device = torch.device("cpu" if options.cpu else "cuda")
    name = "CPU, toy size" if options.cpu else torch.cuda.get_device_name()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {name}\n")
    good = True
    if options.only in (None, "equal"):
        good = all([show_equal_scores(device), show_equal_callback(device)])
    if options.only in (None, "times"):
        print("\n| model, bfloat16 | score | released | depthscope | ratio | evaluated tokens per second |")
        print("| --- | --- | --- | --- | --- | --- |")
        for model in list(TIMED)[:1] if options.cpu else TIMED:
            if not options.cpu:
                torch.cuda.reset_peak_memory_stats()
            Timed(model, device).run()
            if not options.cpu:
                torch.cuda.empty_cache()
    if options.only in (None, "large"):
        good &= show_large(device)
    if not good:
        sys.exit("Scores on the two devices, or places of the weights, differ.")


if __name__ == "__main__":
    main()
