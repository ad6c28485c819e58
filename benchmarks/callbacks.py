"""Times what the callbacks add to a training step, and what collecting the same in the paper's way adds.

    python benchmarks/callbacks.py            # about half an hour on one core; --only 10M takes ten minutes
    python benchmarks/callbacks.py --quick    # a small model, one minute
    python benchmarks/callbacks.py --only 134M --rows 64 --length 1024    # enough for a GPU to have to do

A step is forward, backward and AdamW, in float32 on a CPU (bf16 autocast on a GPU), in one process. Every side trains
the same model on the same batch, in short alternating rounds. `VarianceCallback` measures every step and is fetched
once a round, as at a log. The paper's way, re-implemented from a description of its code: variances of the streams and
of what attention and MLP return by `torch.var`, norms by `torch.norm`, each of the five fetched by `.item()` in every
layer and pass.

The difference of two steps has all that a callback costs, and the noise of two steps; the time within its functions has
less of either.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, TrainerControl, TrainerState

from depthscope import LayerStack
from depthscope.callbacks import SparsityCallback, VarianceCallback
from paired import ratio, rounds

# name -> (hidden, MLP, heads, vocabulary, rows, tokens a row), 30 layers each
SHAPES = {
    "10M": (160, 432, 5, 4096, 8, 256),
    "134M": (576, 1536, 9, 49152, 2, 256),
    "1.2B": (1728, 4608, 27, 49152, 2, 1024),
    "quick": (64, 172, 4, 1024, 2, 64),
}
REPEATS = 5
OURS = ("_on_layer", "_on_part", "_end_pass", "fetch", "finish")  # what `VarianceCallback` does while a model trains
TARGETS = {"variance": 0.02, "variance, sublayers": 0.04, "sparsity, measured every 100th step": 0.05}


def build(
    shape: tuple[int, ...], device: torch.device, rows: int | None = None, length: int | None = None
) -> tuple[PreTrainedModel, Tensor]:
    hidden, mlp, heads, vocabulary, its_rows, its_length = shape
    rows, length = rows or its_rows, length or its_length
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_attention_heads=heads,
        num_hidden_layers=30,
        vocab_size=vocabulary,
        max_position_embeddings=length,
    )
    return LlamaForCausalLM(config).to(device).train(), torch.randint(vocabulary, (rows, length), device=device)


class Steps:
    """Some training steps of one model, with or without something that watches them."""

    def __init__(self, model: PreTrainedModel, ids: Tensor, count: int) -> None:
        self.model, self.ids, self.count = model, ids, count
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def _autocast(self) -> AbstractContextManager[None]:
        on_gpu = self.ids.device.type == "cuda"
        return torch.autocast("cuda", torch.bfloat16) if on_gpu else nullcontext()  # type: ignore[return-value]

    def plain(self, before: Callable[[], object] = lambda: None) -> None:
        """Steps that nothing watches; `before` is called before each."""
        for _ in range(self.count):
            before()
            with self._autocast():
                loss = self.model(self.ids, labels=self.ids, use_cache=False).loss
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def watched(self, stack: LayerStack, **options: bool) -> None:
        """Steps that `VarianceCallback` measures, fetched once."""
        callback = VarianceCallback(**options)
        state = TrainerState()
        callback._stack = stack
        callback.attach(stack)
        try:
            self.plain(partial(callback.on_step_begin, None, state, TrainerControl()))
            callback.fetch()
            callback.finish(callback.window or {})
            callback.window = None
        finally:
            callback.detach()

    def sparsity(self, stack: LayerStack) -> float:
        """Seconds of one measurement of weights and attention."""
        callback = SparsityCallback()
        callback._stack = stack
        callback.attach(stack)
        try:
            callback.measure(True)
            self.plain()
            callback._step = callback.every
            callback.fetch()
            begun = time.perf_counter()
            callback.finish(callback.window or {})
            return time.perf_counter() - begun
        finally:
            callback.detach()

    def the_papers_way(self, stack: LayerStack) -> None:
        """Steps in which every value is fetched at once."""
        found: dict[tuple[int, str], float] = {}
        handles = []
        for index, layer in enumerate(stack.layers):
            parts: dict[str, nn.Module | None] = {"out": layer}
            parts |= {part: stack.sublayer(index, part) for part in ("attention", "mlp")}
            for name, module in parts.items():
                if module is not None:
                    handles.append(module.register_forward_hook(partial(_fetch_each, found, index, name)))
        try:
            self.plain()
        finally:
            for handle in handles:
                handle.remove()


def seconds_within(owner: Any, names: Sequence[str], work: Callable[[], object]) -> float:
    """How long functions of `owner`, none of which calls another, run in `work`: the median of some times."""
    originals = {name: getattr(owner, name) for name in names}
    seconds: list[float] = []

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            result = function(*args, **kwargs)
            seconds[-1] += time.perf_counter() - begun
            return result

        return run

    try:
        for name, original in originals.items():
            setattr(owner, name, timed(original))
        for _ in range(REPEATS):
            seconds.append(0.0)
            work()
    finally:
        for name, original in originals.items():
            setattr(owner, name, original)
    return statistics.median(seconds)


@torch.no_grad()
def _fetch_each(
    found: dict[tuple[int, str], float], index: int, name: str, module: nn.Module, args: Any, out: Any
) -> None:
    values = (out[0] if isinstance(out, tuple) else out).detach().float()
    found[index, f"{name}_var"] = values.var(dim=-1).mean().item()
    if name != "out":
        found[index, f"{name}_norm"] = values.norm(dim=-1).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model only")
    parser.add_argument("--only", choices=("10M", "134M", "1.2B"), help="this model alone; 1.2B is for a GPU")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, help="rows of a batch (default: few, so that a CPU has enough to do)")
    parser.add_argument("--length", type=int, help="tokens of a row")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    table = Table("model", "side", "ms a step", "time / plain (95%)", "overhead", "target")
    for name in ["quick"] if options.quick else [options.only] if options.only else ["10M", "134M"]:
        model, ids = build(SHAPES[name], device, options.rows, options.length)
        count = 1 if name in ("134M", "1.2B") else 2
        steps, stack = Steps(model, ids, count), LayerStack(model)
        sides: dict[str, Callable[[], None]] = {
            "plain": steps.plain,
            "plain again": steps.plain,
            "variance": partial(steps.watched, stack, sublayers=False),
            "variance, sublayers": partial(steps.watched, stack),
            "the paper's way": partial(steps.the_papers_way, stack),
        }
        taken = rounds(sides, options.rounds)
        overheads = {}
        for side in sides:
            against = ratio(taken[side], taken["plain"])
            overheads[side] = against.middle - 1
            shown = f"{1000 * sorted(taken[side])[len(taken[side]) // 2] / count:.1f}"
            target = f"{TARGETS[side]:.0%}" if side in TARGETS else ""
            table.add_row(name, side, shown, str(against), f"{overheads[side]:+.1%}", target)
        once, rate = steps.sparsity(stack), SparsityCallback().every
        share = once * count / rate / sorted(taken["plain"])[len(taken["plain"]) // 2]
        name_of = f"sparsity, measured every {rate}th step"
        table.add_row(name, name_of, f"{1000 * once:.0f} once", "", f"{share:+.1%}", f"{TARGETS[name_of]:.0%}")
        times = overheads["the paper's way"] / max(overheads["variance, sublayers"], 1e-4)
        table.add_row(name, "the paper's overhead / ours with sublayers", "", f"{times:.1f}", "", "5")
        ours = seconds_within(VarianceCallback, OURS, sides["variance, sublayers"])
        theirs = seconds_within(sys.modules[__name__], ("_fetch_each",), sides["the paper's way"])
        spent = f"{1000 * theirs / count:.0f} and {1000 * ours / count:.0f}"
        table.add_row(name, "the same of the time within", spent, f"{theirs / ours:.1f}", "", "5")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
