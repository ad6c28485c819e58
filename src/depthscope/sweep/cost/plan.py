"""Estimating the cost of a sweep: parameters, training FLOPs, GPU hours, memory. It trains and downloads nothing.

Sizes are counted from the models, built on `meta`. GPU hours are training FLOPs divided by the GPU's peak and by an
assumed utilisation, which does not count the recomputation of checkpointing. The measurement of the trained models is
not included.
"""

import shlex
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from depthscope.errors import SettingsError
from depthscope.models import ModelSize, model_size
from depthscope.sweep.cost.gpus import Gpu, find_gpu
from depthscope.sweep.cost.memory import Memory, needed_memory
from depthscope.sweep.grid import Grid, Point
from depthscope.sweep.specification import Sweep, Tokenizer, Training
from depthscope.wording.numbers import format_count

__all__ = ["CostPlan", "PlannedPoint", "launcher", "plan", "print_plan"]

PAPER_VOCABULARY = 50_304
GPUS_A_NODE = 8
ROOM = 0.9  # the usable share of a GPU's memory; the rest is for libraries, buffers and fragmentation
HOUR = 3600


@dataclass(frozen=True)
class PlannedPoint:
    """The cost of one variant, per seed.

    Attributes:
        variant: its name.
        size: parameters, active parameters, and training FLOPs per token.
        sequence_length: T.
        tokens: training tokens, in whole steps.
        steps: optimiser steps.
        micro_batch: sequences in a forward pass on one GPU.
        gpus: GPUs that train it together.
        gpu_hours: hours of all these GPUs together.
        memory: memory on each GPU [bytes].
        fits: whether a tenth of the GPU's memory stays free.
    """

    variant: str
    size: ModelSize
    sequence_length: int
    tokens: int
    steps: int
    micro_batch: int
    gpus: int
    gpu_hours: float
    memory: Memory
    fits: bool

    @property
    def flops(self) -> int:
        """FLOPs of the whole training."""
        return self.size.training_flops_per_token * self.tokens


@dataclass(frozen=True)
class CostPlan:
    """The cost of a sweep.

    Attributes:
        name: the name of the sweep.
        points: one entry per variant.
        seeds: the number of seeds of each variant.
        gpu: the GPU model.
        utilisation: the reached share of its peak.
        command: the command that starts the sweep.
        notes: assumptions, and variants that do not fit.
    """

    name: str
    points: tuple[PlannedPoint, ...]
    seeds: int
    gpu: Gpu
    utilisation: float
    command: str
    notes: tuple[str, ...]

    @property
    def tokens(self) -> int:
        """Training tokens of all points and seeds."""
        return self.seeds * sum(point.tokens for point in self.points)

    @property
    def flops(self) -> int:
        """Training FLOPs of all points and seeds."""
        return self.seeds * sum(point.flops for point in self.points)

    @property
    def gpu_hours(self) -> float:
        """GPU hours of all points and seeds."""
        return self.seeds * sum(point.gpu_hours for point in self.points)

    def to_markdown(self) -> str:
        """The plan as a Markdown table, with the totals, the command and the notes."""
        rows = [COLUMNS, ["---"] + ["---:"] * (len(COLUMNS) - 1), *(_row(point) for point in self.points)]
        lines = [f"| {' | '.join(row)} |" for row in rows]
        return "\n\n".join(["\n".join(lines), *self.sentences()])

    def sentences(self) -> list[str]:
        """The totals, the command and the notes, as sentences."""
        models = len(self.points) * self.seeds
        total = (
            f"Total: {models} models, {_short(self.tokens)} tokens, {self.flops:.3g} FLOPs, {_hours(self.gpu_hours)} "
            f"GPU hours ({self.gpu.name} at {self.utilisation:.0%} of {self.gpu.peak / 1e12:.0f} TFLOP/s), without "
            "the measurements."
        )
        return [total, f"Run: `{self.command}`", *self.notes]


COLUMNS = [
    "point",
    "parameters",
    "active",
    "T",
    "tokens",
    "steps",
    "FLOPs per token",
    "FLOPs",
    "GPU hours",
    "GB per GPU",
    "weights",
    "gradients",
    "AdamW",
    "copies",
    "activations",
]
# The columns that fit a terminal of 80 characters.
NARROW = ["point", "parameters", "active", "T", "steps", "FLOPs", "GPU hours", "GB per GPU"]
BREAKDOWN = ["point", "GB per GPU", "weights", "gradients", "AdamW", "copies", "activations"]


def plan(sweep: Sweep, grid: Grid, *, gpu: str = "h100", gpus: int = 8, utilisation: float = 0.4) -> CostPlan:
    """Estimate the cost of a sweep.

    Args:
        sweep: the sweep.
        grid: its points.
        gpu: the GPU model, one of `depthscope.sweep.cost.gpus.GPUS`.
        gpus: GPUs per model with `training.fsdp`; other models use one GPU each.
        utilisation: share of the GPU's peak that training reaches, in (0, 1].

    Raises:
        SettingsError: the GPU is unknown, the utilisation is out of range, the GPUs cannot share a step evenly, or
            equal nodes cannot hold this number of GPUs.
    """
    kind = find_gpu(gpu)
    if not 0 < utilisation <= 1:
        raise SettingsError(f"utilisation is {utilisation}; give a share of the peak above 0 and at most 1.")
    if gpus < 1:
        raise SettingsError(f"gpus is {gpus}; give at least 1.")
    vocabulary, assumed = _vocabulary(sweep.specification.tokenizer)
    variants = {point.variant: point for point in grid.points}.values()
    points = tuple(_planned(point, vocabulary, kind, gpus, utilisation) for point in variants)
    shared = [point.training.fsdp for point in variants]
    notes = [assumed, *_notes(points, kind)]
    seeds = len(sweep.specification.seeds)
    return CostPlan(
        sweep.specification.name,
        points,
        seeds,
        kind,
        utilisation,
        _command(sweep, gpus if any(shared) else 1),
        tuple(filter(None, notes)),
    )


def print_plan(plan: CostPlan, console: Console) -> None:
    """Print a plan as two tables: the costs, and the parts of the memory."""
    cells = {point.variant: dict(zip(COLUMNS, _row(point), strict=True)) for point in plan.points}
    for columns in (NARROW, BREAKDOWN):
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        for name in columns:
            table.add_column(name, justify="left" if name == "point" else "right", overflow="fold")
        for row in cells.values():
            table.add_row(*(Text(row[name]) for name in columns))
        console.print(table)
        console.print()
    for sentence in plan.sentences():
        console.print(Text(sentence), soft_wrap=True)


def _planned(point: Point, vocabulary: int, gpu: Gpu, gpus: int, utilisation: float) -> PlannedPoint:
    training = point.training
    gpus = gpus if training.fsdp else 1
    config = point.config(vocabulary)
    size = model_size(config, training.sequence_length)
    tokens = training.steps * training.batch_tokens
    micro = _micro_batch(point.variant, training, gpus)
    memory = needed_memory(config, training, gpus, micro)
    return PlannedPoint(
        point.variant,
        size,
        training.sequence_length,
        tokens,
        training.steps,
        micro,
        gpus,
        size.training_flops_per_token * tokens / (gpu.peak * utilisation) / HOUR,
        memory,
        memory.total <= ROOM * gpu.memory,
    )


def _micro_batch(variant: str, training: Training, gpus: int) -> int:
    """Sequences in a forward pass of one GPU, as the runner distributes them."""
    share = training.sequences // gpus
    micro = min(training.micro_batch_size or share, share)
    if training.sequences % gpus or share % micro:
        batches = "" if training.micro_batch_size is None else f" in micro-batches of {training.micro_batch_size}"
        raise SettingsError(
            f"{variant}: an optimiser step has {training.sequences} sequences, which {gpus} GPUs cannot share "
            f"evenly{batches}; give a number of GPUs that divides it."
        )
    return micro


def _vocabulary(tokenizer: Tokenizer) -> tuple[int, str]:
    """The size of the vocabulary, and the assumption about it; a named tokenizer is not downloaded."""
    if tokenizer.name is None:
        return tokenizer.trained_entries, ""
    if tokenizer.vocab_size is not None:
        return tokenizer.vocab_size, f"{tokenizer.name} is assumed to have {tokenizer.vocab_size:,} entries."
    return PAPER_VOCABULARY, (
        f"{tokenizer.name} is assumed to have {PAPER_VOCABULARY:,} entries, like the paper's; set `vocab_size` for "
        "the exact number."
    )


def _notes(points: tuple[PlannedPoint, ...], gpu: Gpu) -> list[str]:
    too_large = [point.variant for point in points if not point.fits]
    notes = []
    if any(point.gpus > 1 for point in points):
        notes.append(f"FSDP shards weights, gradients and AdamW's moments over {max(p.gpus for p in points)} GPUs.")
    if too_large:
        notes.append(
            f"Too large for {ROOM:.0%} of {gpu.memory / 1e9:.0f} GB: {', '.join(too_large)}. Use more GPUs with "
            "`fsdp: true`, a smaller `micro_batch_size`, or `gradient_checkpointing: true`."
        )
    return notes


def _command(sweep: Sweep, gpus: int) -> str:
    return f"{launcher(gpus)}depthscope sweep run {_source(sweep)}"


def launcher(gpus: int) -> str:
    """The part before `depthscope` of a command that `gpus` GPUs run together; empty for one GPU.

    Raises:
        SettingsError: equal nodes cannot hold this number of GPUs.
    """
    if gpus == 1:
        return ""
    a_node = _gpus_a_node(gpus)
    if a_node == gpus:
        return f"torchrun --nproc-per-node {gpus} -m "
    if a_node == 1:
        # The neighbouring numbers are even, so equal nodes can hold them.
        raise SettingsError(
            f"gpus is {gpus}, which equal nodes of 2 to {GPUS_A_NODE} GPUs cannot hold: give {gpus - 1} or {gpus + 1}."
        )
    return (
        f"torchrun --nnodes {gpus // a_node} --nproc-per-node {a_node} --rdzv-backend c10d "
        "--rdzv-endpoint HOST:29500 -m "
    )


def _gpus_a_node(gpus: int) -> int:
    """The largest number of GPUs per node, at most 8, for equal nodes."""
    return next(n for n in range(min(gpus, GPUS_A_NODE), 0, -1) if gpus % n == 0)


def _source(sweep: Sweep) -> str:
    """The source of the sweep, quoted for a shell."""
    return shlex.quote(sweep.source or sweep.specification.name)


def _row(point: PlannedPoint) -> list[str]:
    memory = point.memory
    parts = (memory.total, memory.weights, memory.gradients, memory.optimizer, memory.copies, memory.activations)
    return [
        point.variant,
        _short(point.size.total),
        _short(point.size.active),
        f"{point.sequence_length:,}",
        _short(point.tokens),
        f"{point.steps:,}",
        f"{point.size.training_flops_per_token:.3g}",
        f"{point.flops:.3g}",
        _hours(point.gpu_hours),
        *(f"{part / 1e9:.3g}" for part in parts),
    ]


def _short(number: int) -> str:
    """Write a count without a space, since columns are narrow: 1.28B, 475M, 97k."""
    return format_count(number, gap="")


def _hours(hours: float) -> str:
    if hours < 0.01:
        return "<0.01"
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.2g}"
