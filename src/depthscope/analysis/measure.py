"""Carrying out an analysis: the batches, the baseline pass, the experiments that several scores share.

The outer loop is over batches of blocks, the inner ones over experiments, so that memory holds the hidden states of
one batch whatever the number of tokens. What the scores gather stays in their sums by block.
"""

from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from depthscope.analysis.budget import Budget
from depthscope.analysis.losses import Losses
from depthscope.console.progress import Progress
from depthscope.errors import AnalysisInterrupted, NonFiniteError
from depthscope.layers.lanes.lane import Lane, Step
from depthscope.layers.lanes.lanes import Lanes
from depthscope.layers.lanes.passes import LanePass
from depthscope.layers.stack import LayerStack
from depthscope.layers.tracing import PLACEHOLDER
from depthscope.processes import Processes
from depthscope.scores.base import (
    Array,
    Batch,
    Score,
    extent_of,
    head_work,
)
from depthscope.scores.usefulness import Usefulness
from depthscope.scores.work import shared_skip_work, shared_work
from depthscope.settings import Settings
from depthscope.text.blocks import Blocks

# The logits of a batch are by far its largest tensor; a batch holds as many blocks as keep them under this.
LOGITS_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
LARGEST_BATCH = 16


def total_work(stack: LayerStack, scores: Mapping[str, Score], settings: Settings) -> float:
    """What the whole analysis takes, in forward passes of one layer over one block."""
    extent = extent_of(stack, experiments=runs_experiments(scores), sublayers=settings.sublayers)
    each = sum(score.work() for score in scores.values())
    return (each + shared_skip_work(extent, scores, settings)) * settings.eval_blocks + shared_work(
        extent, scores, settings
    )


def runs_experiments(scores: Mapping[str, Score]) -> bool:
    """Whether any score runs the model with something changed."""
    return any(score.experiments for score in scores.values())


def measure(
    lanes: Lanes,
    scores: Mapping[str, Score],
    blocks: Blocks,
    settings: Settings,
    processes: Processes,
    shown: Progress,
    budget: Budget | None = None,
) -> tuple[dict[str, Array], list[str]]:
    """Fill every score's sums.

    With a budget only the first `budget.blocks` of them are measured; an interrupt then leaves those, if it may.

    Returns:
        The sums of the unchanged model's loss and number of predictions by block, and notes on the losses.
    """
    stack = lanes.stack
    parts = blocks[: settings.fit_blocks or 1], blocks[settings.fit_blocks :][: settings.eval_blocks]
    fitting, measured = (part.behind(PLACEHOLDER, stack.virtual_tokens) for part in parts)
    baseline = {name: np.zeros(settings.eval_blocks) for name in ("loss", "targets")}
    done = 0
    try:
        if isinstance(useful := scores.get("usefulness"), Usefulness):
            shown.at("fitting linear maps")
            fitted = measured if settings.fits_in_sample else fitting
            at_once = len(fitted) if stack.is_offloaded else _batch_size(lanes, {}, settings)
            useful.fit(lambda: _fit_batches(fitted, at_once, stack, processes, shown), processes.add_up)
        first = _experiments(scores.values(), np.arange(1))
        losses = Losses.of(lanes, settings, [each.lane.key for each in first if each.reading])
        size = _batch_size(lanes, scores, settings)
        whole = [range(settings.eval_blocks)]
        for part in budget.rounds(size, scores, baseline, shown) if budget else whole:
            for rows in _batches(part, size, losses, processes):
                batch = _measure_batch(lanes, scores, losses, measured, rows, shown)
                baseline["loss"][rows], baseline["targets"][rows] = batch.loss, batch.target_mask.sum(1).cpu().numpy()
                done += len(rows)
    except KeyboardInterrupt as interrupt:
        if budget is None or not budget.is_kept():
            raise AnalysisInterrupted(
                f"Interrupted while at {shown.stage}: {done} of {settings.eval_blocks} blocks had been measured."
            ) from interrupt
    for tables in (baseline, losses.tables, *(scores[name].sums for name in sorted(scores))):
        processes.add_up_tables(tables)
    return baseline, losses.notes()


def _measure_batch(
    lanes: Lanes, scores: Mapping[str, Score], losses: Losses, measured: Blocks, rows: list[int], shown: Progress
) -> Batch:
    """The baseline pass of some evaluation blocks with all experiments beside it, and what every score makes of it."""
    place = f"block {rows[0] + 1} of {len(measured)}: "
    batch = Batch.of(measured.select(torch.tensor(rows)), np.array(rows))
    experiments = _experiments(scores.values(), batch.rows)
    shown.at(place + ("baseline and experiments" if experiments else "baseline"))
    run = _run_baseline(lanes, scores, losses, experiments, batch, shown)
    readers = {experiment.lane: experiment.reading for experiment in experiments}
    for lane, loss in losses.of_lanes(run, batch):
        for score in readers[lane]:
            score.measure_loss(batch, lane, loss)
        shown.advance(len(loss) * losses.work)
    for name, score in scores.items():
        shown.at(place + name)
        score.measure(batch, shown.advance)
    return batch


@dataclass
class _Experiment:
    """A lane, with the scores that want its losses and those that watch its residual stream."""

    lane: Lane
    reading: list[Score]
    watching: list[Score]


def _experiments(scores: Iterable[Score], rows: Array) -> list[_Experiment]:
    """What the scores want to be run on some blocks, each experiment once."""
    wanted: dict[Hashable, _Experiment] = {}
    for score in scores:
        for lane in score.lanes(rows):
            one = wanted.setdefault(lane.key, _Experiment(lane, [], []))
            one.lane = replace(lane, logits=lane.logits or one.lane.logits, watched=lane.watched or one.lane.watched)
            one.reading += [score] * lane.logits
            one.watching += [score] * lane.watched
    return list(wanted.values())


def require_finite(stack: LayerStack) -> None:
    """Refuse a model with broken weights before any work is done."""
    if not torch.isfinite(stack.example_logits).all():
        raise NonFiniteError(_not_finite(stack, stack.example_ids))


def _batch_size(lanes: Lanes, scores: Mapping[str, Score], settings: Settings) -> int:
    if settings.batch_size:
        return settings.batch_size
    stack = lanes.stack
    budget = LOGITS_BYTES.get(stack.device.type, LOGITS_BYTES["cpu"])
    size = min(LARGEST_BATCH, budget // (settings.block_size * stack.vocabulary * 4))
    if stack.is_offloaded:  # all lanes in one pass, so that each layer's weights are read once
        count = len(_experiments(scores.values(), np.arange(1)))
        size = min(size, lanes.limits.state_bytes // (max(1, count) * settings.block_size * stack.width * 4))
    return max(1, size)


def _batches(part: range, size: int, losses: Losses, processes: Processes) -> Iterator[list[int]]:
    """The rows of each batch; where losses are estimated, the first block comes alone and tells how."""
    rows = processes.share(part)
    if losses.is_estimated and 0 in part:
        if 0 in rows:
            yield [0]
            rows.remove(0)
        losses.agree(processes)
    yield from _chunks(rows, size)


def _chunks(rows: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _fit_batches(
    fitted: Blocks, size: int, stack: LayerStack, processes: Processes, shown: Progress
) -> Iterator[Blocks]:
    for rows in _chunks(processes.share(range(len(fitted))), size):
        yield fitted.select(torch.tensor(rows))
        shown.advance(len(rows) * stack.num_layers)


def _run_baseline(
    lanes: Lanes,
    scores: Mapping[str, Score],
    losses: Losses,
    experiments: list[_Experiment],
    batch: Batch,
    shown: Progress,
) -> LanePass:
    """Run the unchanged model on a batch, and experiments beside it; scores observe both."""
    stack, ids, mask = lanes.stack, batch.blocks.input_ids, batch.blocks.attention_mask
    watching = {score.name: score for experiment in experiments for score in experiment.watching}

    def on_layer(layer: int, before: Tensor, after: Tensor) -> None:
        for score in scores.values():
            score.observe(batch, layer, before, after)

    def on_part(layer: int, part: str, output: Tensor) -> None:
        for score in scores.values():
            score.observe_part(batch, layer, part, output)

    def on_step(step: Step) -> None:
        for score in watching.values():
            score.measure_step(batch, step)

    kept, parts = (any(getattr(score, name) for score in scores.values()) for name in ("states", "parts"))
    run = lanes.over(ids, mask, [each.lane for each in experiments], observe=on_step, tick=shown.advance)
    with (
        stack.observing(on_layer, on_part if parts else None),
        stack.capture(resid_pre=kept, resid_post=False) as capture,
        run.beside(),
    ):
        logits = stack.logits(ids, mask)
    losses.of_model(batch, logits)
    if not np.isfinite(batch.loss).all():
        raise NonFiniteError(_not_finite(stack, ids, mask))
    batch.resid_pre = capture.resid_pre
    shown.advance(len(ids) * (stack.num_layers + head_work(stack)))
    return run


def _not_finite(stack: LayerStack, ids: Tensor, mask: Tensor | None = None) -> str:
    """Say where NaN or infinity first came up."""
    found: dict[int, tuple[bool, bool]] = {}
    with stack.observing(lambda layer, *streams: found.update({layer: tuple(map(_finite, streams))})):
        stack.logits(ids, mask)
    places = [("the embeddings are", found[0][0])]
    places += [(f"the output of layer {layer} is", after) for layer, (_, after) in sorted(found.items())]
    where = next((name for name, finite in places if not finite), "the logits are")
    return (
        f"The model cannot be scored: {where} not finite (NaN or infinity). Check its weights, or use a wider "
        "dtype: float32 or bfloat16."
    )


def _finite(hidden: Tensor) -> bool:
    return bool(torch.isfinite(hidden).all())
