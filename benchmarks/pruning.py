"""Criteria for cutting layers, each with nothing in the gaps, other weights before them, and maps over them.

    python benchmarks/pruning.py                              # SmolLM2-135M, 4, 7 and 10 of 30: hours on one core
    python benchmarks/pruning.py --layers 7 --by angular,greedy,repaired --fit-blocks 32 --test-blocks 8
    python benchmarks/pruning.py --tiny                       # a toy model on random tokens, seconds

Layers are chosen, and repairs fitted, on --calibration; the table is on test texts. Excess is the loss beyond the whole
model's, nats per token, with its standard error, paired by block.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from depthscope import Blocks, LayerStack, Settings
from depthscope.console.progress import Progress
from depthscope.layers.lanes.lanes import Lanes
from depthscope.layers.modes import evaluating
from depthscope.loading.load import load_model
from depthscope.processes import Processes
from depthscope.report.cut_plan import CutPlan
from depthscope.surgery import plan_cut
from depthscope.surgery.plans.choosing import CRITERIA
from depthscope.surgery.plans.gaps import Cut
from depthscope.surgery.plans.maps import Calibration
from depthscope.surgery.plans.planning import RIDGE, batch_size_of
from depthscope.surgery.plans.trials import Losses, losses_of
from depthscope.text.blocks import load_blocks
from smollm2 import gguf_path

DATA = Path(__file__).parents[2] / "shared" / "data"
CHOOSE, HELD_OUT = 8, 1  # blocks that decide, and that the plan's own losses are of
WAYS = ("cut", "weights", "map")


@dataclass(frozen=True)
class Subject:
    """A model, what it is calibrated on, and the texts that it is tested on."""

    model: nn.Module
    calibration: Blocks
    fit_blocks: int
    tests: dict[str, Blocks]


def measured(subject: Subject, plan: CutPlan, count: int) -> dict[str, Losses]:
    """The losses after removing `count` layers, in each way, on each test text."""
    processes, shown = Processes.here(), Progress(0.0, None)
    with evaluating(subject.model), torch.no_grad():
        stack = LayerStack(subject.model)
        size = batch_size_of(subject.calibration)
        fits = Calibration(stack, subject.calibration[: subject.fit_blocks], size, RIDGE, processes)
        removed = plan.removed(count)
        trials = {
            "cut": Cut(frozenset(removed)).replacements(),
            "weights": fits.repaired(removed, "weights").replacements(),
            "map": fits.repaired(removed).replacements(),
        }
        lanes = Lanes(stack)
        settings = Settings(scores=("skip",), fit_blocks=0, block_size=subject.calibration.input_ids.shape[1])
        return {
            name: losses_of(lanes, trials, blocks, settings, processes, shown) for name, blocks in subject.tests.items()
        }


def smollm2(options: argparse.Namespace) -> Subject:
    """SmolLM2-135M, WikiText-2 and a book."""
    loaded = load_model(options.model or str(gguf_path()))
    texts = {"WikiText-2 test": DATA / "wikitext2" / "test.txt"}
    if options.test:
        texts |= {path.stem: path for path in options.test}

    def blocks(path: Path, count: int) -> Blocks:
        return load_blocks([path], loaded.require_tokenizer(), num_blocks=count, block_size=options.block_size)

    calibration = blocks(options.calibration, options.fit_blocks + CHOOSE + HELD_OUT)
    tests = {name: blocks(path, options.test_blocks) for name, path in texts.items()}
    return Subject(loaded.model, calibration, options.fit_blocks, tests)


def tiny() -> Subject:
    """A toy, to see that it runs."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 128}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=6, initializer_range=0.2, **sizes)).eval()
    ids = torch.randint(128, (8 + CHOOSE + HELD_OUT + 4, 32))
    return Subject(model, Blocks.from_ids(ids[:-4]), 8, {"random tokens": Blocks.from_ids(ids[-4:])})


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a name, a folder or a .gguf file (default: SmolLM2-135M)")
    parser.add_argument("--layers", default="4,7,10", help="how many to remove")
    parser.add_argument("--by", default=",".join(CRITERIA))
    parser.add_argument("--calibration", type=Path, default=DATA / "wikitext2" / "validation.txt")
    parser.add_argument("--test", type=Path, action="append", help="another text to test on")
    parser.add_argument("--fit-blocks", type=int, default=64)
    parser.add_argument("--test-blocks", type=int, default=64)
    parser.add_argument("--block-size", type=int, default=256)
    parser.add_argument("--candidates", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tiny", action="store_true", help="a toy size, to see that it runs")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    subject = tiny() if options.tiny else smollm2(options)
    counts = [1, 2] if options.tiny else [int(count) for count in options.layers.split(",")]
    table = Table("by", "removed", "text", "whole", *(f"excess, {way}" for way in WAYS), "seconds", "layers")
    for by in options.by.split(","):
        start = time.process_time()
        plan = plan_cut(
            subject.model,
            subject.calibration,
            layers=max(counts),
            by=by,
            fit_blocks=subject.fit_blocks,
            choose_blocks=CHOOSE,
            eval_blocks=HELD_OUT,
            candidates=options.candidates,
            progress=False,
        )
        seconds = time.process_time() - start
        for count in counts:
            for text, losses in measured(subject, plan, count).items():
                whole = losses.model.sum() / losses.predictions.sum()
                excess = [f"{losses.of(way) - whole:.3f} ± {losses.error(way):.3f}" for way in WAYS]
                layers = ",".join(map(str, plan.removed(count)))
                table.add_row(by, str(count), text, f"{whole:.3f}", *excess, f"{seconds:.0f}", layers)
                print(by, count, text, f"{whole:.3f}", *excess, f"{seconds:.0f} s", layers, sep=" | ", flush=True)
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
