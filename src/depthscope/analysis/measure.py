"""Carrying out an analysis: the batches, the baseline pass, the experiments that several scores share.

The outer loop is over batches of blocks, the inner ones over experiments, so that memory holds the hidden states of
one batch whatever the number of tokens. What the scores gather stays in their sums by block.
"""

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from depthscope.console.progress import Progress
from depthscope.errors import AnalysisInterrupted, NonFiniteError
from depthscope.layers.stack import LayerStack
from depthscope.layers.tracing import PLACEHOLDER
from depthscope.processes import Processes
from depthscope.scores.base import (
    Array,
    Batch,
    Score,
    SkippedRun,
    block_losses,
    extent_of,
    head_work,
    run_from,
)
from depthscope.scores.usefulness import Usefulness
from depthscope.scores.work import shared_work, skip_work
from depthscope.settings import Settings
from depthscope.text.blocks import Blocks

# The logits of a batch are by far its largest tensor; a batch holds as many blocks as keep them under this.
LOGITS_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
LARGEST_BATCH = 16


def total_work(stack: LayerStack, scores: Mapping[str, Score], settings: Settings) -> float:
    """What the whole analysis takes, in forward passes of one layer over one block."""
    extent = extent_of(stack, experiments=runs_experiments(scores))
    each = sum(score.work() for score in scores.values())
    losses = any(score.skip_losses for score in scores.values())
    if losses or any(score.skip_updates for score in scores.values()):
        each += sum(skip_work(extent, losses=losses))
    return each * settings.eval_blocks + shared_work(extent, scores, settings)


def runs_experiments(scores: Mapping[str, Score]) -> bool:
    """Whether any score runs the model with something changed."""
    return any(score.experiments for score in scores.values())


def measure(
    stack: LayerStack,
    scores: Mapping[str, Score],
    blocks: Blocks,
    settings: Settings,
    processes: Processes,
    shown: Progress,
) -> dict[str, Array]:
    """Fill every score's sums; returns the sums of the unchanged model's loss and number of predictions by block."""
    size = settings.batch_size or _batch_size(stack, settings)
    parts = blocks[: settings.fit_blocks or 1], blocks[settings.fit_blocks :][: settings.eval_blocks]
    fitting, measured = (part.behind(PLACEHOLDER, stack.virtual_tokens) for part in parts)
    baseline = {name: np.zeros(settings.eval_blocks) for name in ("loss", "targets")}
    done = 0
    try:
        if isinstance(useful := scores.get("usefulness"), Usefulness):
            shown.at("fitting linear maps")
            fitted = measured if settings.fits_in_sample else fitting
            useful.fit(lambda: _fit_batches(fitted, size, stack, processes, shown), processes.add_up)
        for rows in _chunks(processes.share(range(settings.eval_blocks)), size):
            batch = _measure_batch(stack, scores, measured, rows, shown)
            baseline["loss"][rows], baseline["targets"][rows] = batch.loss, batch.target_mask.sum(1).cpu().numpy()
            done += len(rows)
    except KeyboardInterrupt as interrupt:
        raise AnalysisInterrupted(
            f"Interrupted while at {shown.stage}: {done} of {settings.eval_blocks} blocks had been measured."
        ) from interrupt
    for tables in (baseline, *(scores[name].sums for name in sorted(scores))):
        processes.add_up_tables(tables)
    return baseline


def _measure_batch(
    stack: LayerStack, scores: Mapping[str, Score], measured: Blocks, rows: list[int], shown: Progress
) -> Batch:
    """The baseline pass of some evaluation blocks, and what every score makes of them."""
    place = f"block {rows[0] + 1} of {len(measured)}: "
    shown.at(place + "baseline")
    batch = Batch.of(measured.select(torch.tensor(rows)), np.array(rows))
    _run_baseline(stack, scores, batch)
    shown.advance(len(rows) * (stack.num_layers + head_work(stack)))
    for name, score in scores.items():
        shown.at(place + name)
        score.measure(batch, shown.advance)
    shown.at(place + "skipping layers")
    _skip_layers(stack, list(scores.values()), batch, shown)
    return batch


def require_finite(stack: LayerStack) -> None:
    """Refuse a model with broken weights before any work is done."""
    if not torch.isfinite(stack.example_logits).all():
        raise NonFiniteError(_not_finite(stack, stack.example_ids))


def _batch_size(stack: LayerStack, settings: Settings) -> int:
    vocabulary = stack.example_logits.shape[-1]
    budget = LOGITS_BYTES.get(stack.device.type, LOGITS_BYTES["cpu"])
    return max(1, min(LARGEST_BATCH, budget // (settings.block_size * vocabulary * 4)))


def _chunks(rows: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _fit_batches(
    fitted: Blocks, size: int, stack: LayerStack, processes: Processes, shown: Progress
) -> Iterator[Blocks]:
    for rows in _chunks(processes.share(range(len(fitted))), size):
        yield fitted.select(torch.tensor(rows))
        shown.advance(len(rows) * stack.num_layers)


def _run_baseline(stack: LayerStack, scores: Mapping[str, Score], batch: Batch) -> None:
    """Run the unchanged model on a batch: scores observe it, and what experiments need is kept."""
    ids, mask = batch.blocks.input_ids, batch.blocks.attention_mask

    def on_layer(layer: int, before: Tensor, after: Tensor) -> None:
        for score in scores.values():
            score.observe(batch, layer, before, after)

    def on_part(layer: int, part: str, output: Tensor) -> None:
        for score in scores.values():
            score.observe_part(batch, layer, part, output)

    kept = runs_experiments(scores)
    parts = any(score.parts for score in scores.values())
    with (
        stack.observing(on_layer, on_part if parts else None),
        stack.capture(resid_pre=kept, resid_post=kept) as capture,
    ):
        logits = stack.logits(ids, mask)
    batch.loss = block_losses(logits, ids, batch.target_mask)
    if not np.isfinite(batch.loss).all():
        raise NonFiniteError(_not_finite(stack, ids, mask))
    batch.resid_pre, batch.resid_post = capture.resid_pre, capture.resid_post


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


def _skip_layers(stack: LayerStack, scores: list[Score], batch: Batch, shown: Progress) -> None:
    """Run the batch with each layer skipped in turn, once for all the scores that look at that."""
    updates, losses = any(score.skip_updates for score in scores), any(score.skip_losses for score in scores)
    if not (updates or losses):
        return
    last = stack.num_layers - 1
    for layer, work in enumerate(skip_work(extent_of(stack, experiments=True), losses=losses)):
        if layer not in stack.unskippable and (losses or layer < last):
            with (
                stack.skipping(layer),
                run_from(stack, layer, batch.resid_pre[layer]),
                stack.capture(resid_pre=updates, resid_post=updates, first=layer + 1) as capture,
            ):
                loss = _loss_or_nothing(stack, batch, losses)
            run = SkippedRun(layer, capture.resid_pre, capture.resid_post, loss)
            for score in scores:
                if score.skip_updates or score.skip_losses:
                    score.measure_skip(batch, run)
        shown.advance(len(batch.rows) * work)


def _loss_or_nothing(stack: LayerStack, batch: Batch, wanted: bool) -> Array | None:
    ids, mask = batch.blocks.input_ids, batch.blocks.attention_mask
    if wanted:
        return block_losses(stack.logits(ids, mask), ids, batch.target_mask)
    stack.run_through(stack.num_layers - 1, ids, mask)
    return None
