"""Times training through a sweep against the same Trainer call without depthscope, and what "auto" chooses on a CPU.

    python benchmarks/sweep.py            # five to twenty minutes on one core, by the processor
    python benchmarks/sweep.py --quick    # a third of that, with wider intervals

Training: the model and settings of the preset `smoke` at 8 layers, in steps of 1,024 tokens. On one side a point of a
sweep without tracking, with all that its run adds to the Trainer; on the other a Trainer that is given the same model,
data and arguments. A round is some steps of each, checkpoints and saving left out on both sides, in an order that is
drawn anew. A sweep that tracks the variance stands beside them.

Choices: forward, backward and AdamW at hidden 64 with sequences of 128, 256 and 512, in float32 and bfloat16 with eager
and fused attention; what `depthscope.sweep.cost.hardware` chooses is marked, and how far it is from the fastest.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PrinterCallback, Trainer, TrainingArguments, default_data_collator, set_seed

from depthscope.console.quiet import quiet
from depthscope.models import DepthLMConfig, DepthLMForCausalLM
from depthscope.sweep.cost.hardware import choose_attention, choose_precision
from depthscope.sweep.data import Corpus, Sequences, prepare_corpus
from depthscope.sweep.grid import expand
from depthscope.sweep.point import PointRun, _Watch
from depthscope.sweep.specification import load_sweep
from paired import ratio, rounds

TARGET = 1.03
HIDDEN, TOKENS = 64, 1024


class Trainings:
    """The same training through a sweep and without one."""

    def __init__(self, folder: Path, layers: int, steps: int) -> None:
        changes = {
            "training": {"tokens": steps * TOKENS, "batch_tokens": TOKENS},
            "grid": {"depth": {"num_hidden_layers": layers}},
        }
        untracked = load_sweep("smoke", {**changes, "tracking": {"variance": False}})
        tracked = load_sweep("smoke", changes)
        grid = expand(untracked)
        corpus = prepare_corpus(untracked, grid, folder)
        point = grid.points[0]
        self.folder, self.corpus, self.steps = folder, corpus, steps
        self.untracked = PointRun(point, untracked.specification, corpus, grid.shortest, folder)
        self.tracked = PointRun(point, tracked.specification, corpus, grid.shortest, folder)

    def swept(self, run: PointRun) -> None:
        """What a sweep does with a point, up to the trained model."""
        trainer = run.trainer()
        trainer.args.save_strategy = "no"
        trainer.add_callback(_Watch(run, trainer))
        with quiet():
            trainer.train()

    def plain(self) -> None:
        """The Trainer call that a person would write."""
        set_seed(0)
        config = self.untracked.config()
        config._attn_implementation = choose_attention("auto", choose_precision("auto"), 128)
        arguments = TrainingArguments(
            str(self.folder / "plain"),
            max_steps=self.steps,
            per_device_train_batch_size=8,
            learning_rate=3e-3,
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": 0.1},
            warmup_steps=min(50, self.steps),
            weight_decay=0.1,
            adam_beta2=0.95,
            bf16=choose_precision("auto") == "bfloat16",
            use_cpu=not torch.cuda.is_available(),
            train_sampling_strategy="sequential",
            logging_steps=max(1, self.steps // 100),
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        data = _data(self.corpus, self.steps)
        trainer = Trainer(
            DepthLMForCausalLM(config), arguments, train_dataset=data, data_collator=default_data_collator
        )
        trainer.remove_callback(PrinterCallback)
        with quiet():
            trainer.train()


def _data(corpus: Corpus, steps: int) -> Sequences:
    return Sequences(corpus, 128, 8 * steps, seed=0)


class Step:
    """One training step at some precision, attention and sequence length, on the same number of tokens."""

    def __init__(self, precision: str, attention: str, length: int, layers: int = 4) -> None:
        torch.manual_seed(0)
        config = DepthLMConfig(
            vocab_size=2048,
            hidden_size=HIDDEN,
            head_dim=16,
            num_attention_heads=4,
            intermediate_size=172,
            num_hidden_layers=layers,
            max_position_embeddings=length,
        )
        config._attn_implementation = attention
        self.precision = precision
        self.model = DepthLMForCausalLM(config).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.ids = torch.randint(2048, (TOKENS // length, length))

    def __call__(self) -> None:
        """Two steps."""
        autocast: AbstractContextManager[Any] = nullcontext()
        if self.precision == "bfloat16":
            autocast = torch.autocast("cpu", torch.bfloat16)
        for _ in range(2):
            with autocast:
                loss = self.model(self.ids, labels=self.ids, use_cache=False).loss
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()


def training_table(count: int, steps: int) -> Table:
    table = Table("training", "ms a step", "time / plain (95%)", "target", title=f"{count} rounds of {steps} steps")
    with tempfile.TemporaryDirectory() as folder:
        trainings = Trainings(Path(folder), 8, steps)
        sides: dict[str, Callable[[], object]] = {
            "plain Trainer": trainings.plain,
            "plain Trainer again": trainings.plain,
            "sweep, tracking off": partial(trainings.swept, trainings.untracked),
            "sweep, variance tracked": partial(trainings.swept, trainings.tracked),
        }
        taken = rounds(sides, count)
    for side in sides:
        shown = f"{1000 * statistics.median(taken[side]) / steps:.1f}"
        target = f"{TARGET}" if side == "sweep, tracking off" else ""
        table.add_row(side, shown, str(ratio(taken[side], taken["plain Trainer"])), target)
    return table


def choices_table(count: int) -> Table:
    table = Table("T", "float32 eager", "float32 sdpa", "bfloat16 eager", "bfloat16 sdpa", "auto", "auto / fastest")
    for length in (128, 256, 512):
        kinds = [(precision, attention) for precision in ("float32", "bfloat16") for attention in ("eager", "sdpa")]
        taken = rounds({" ".join(kind): Step(*kind, length) for kind in kinds}, count)
        middle = {name: statistics.median(times) for name, times in taken.items()}
        precision = choose_precision("auto")
        chosen = f"{precision} {choose_attention('auto', precision, length)}"
        fastest = min(middle, key=lambda name: middle[name])
        shown = [f"{1000 * middle[' '.join(kind)] / 2:.1f}" for kind in kinds]
        table.add_row(str(length), *shown, chosen, str(ratio(taken[chosen], taken[fastest])))
    table.title = f"ms a training step of {TOKENS} tokens, 4 layers, hidden {HIDDEN}"
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console = Console(width=120)
    if not torch.cuda.is_available():
        console.print(choices_table(10 if options.quick else 40))
    console.print(training_table(8 if options.quick else 25, 40))


if __name__ == "__main__":
    main()
