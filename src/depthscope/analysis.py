"""A model and blocks of tokens in, a `LayerReport` out: one pass over batches of blocks serves all the chosen scores.

The outer loop is over batches of blocks, the inner ones over experiments, so that memory holds the hidden states of
one batch whatever the number of tokens. Under `torchrun` each process takes its share of the blocks; the sums that the
scores keep by block are added up at the end, so that a report does not depend on the number of processes.
"""

import platform
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from depthscope.anatomy import Capture, LayerStack
from depthscope.corpus import Blocks, load_blocks
from depthscope.errors import CorpusError, NonFiniteError, OutOfMemoryError, SettingsError
from depthscope.loading import LoadedModel, load_model, model_facts
from depthscope.modes import evaluating
from depthscope.processes import Processes
from depthscope.progress import Progress, showing_progress
from depthscope.report import SCHEMA_VERSION, DataFacts, LayerReport, ModelFacts
from depthscope.scores import SCORES, Score
from depthscope.scores.base import Batch, SkippedRun, Values, block_losses, forwards_from, head_work, run_from
from depthscope.scores.jackknife import values_with_errors
from depthscope.scores.jacobian import Jacobian
from depthscope.scores.permutation import Permutation
from depthscope.scores.usefulness import Usefulness
from depthscope.scores.variance import token_variance
from depthscope.settings import Settings
from depthscope.tracing import input_embeddings, text_config

# The logits of a batch are by far its largest tensor; a batch holds as many blocks as keep them under this.
LOGITS_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
LARGEST_BATCH = 16


class AnalysisInterrupted(KeyboardInterrupt):
    """Ctrl-C during an analysis; the message says what had been done."""


def analyze(
    model: str | Path | nn.Module,
    tokenizer: Any = None,
    *,
    text: Any = None,
    dataset: Any = None,
    column: str | None = None,
    split: str | None = None,
    blocks: Blocks | Tensor | None = None,
    settings: Settings | None = None,
    revision: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    trust_remote_code: bool = False,
    progress: bool = True,
    **options: Any,
) -> LayerReport:
    """Measure how much every layer of a causal language model contributes.

    Args:
        model: a Hub id, a folder, a `.gguf` file, a PEFT adapter folder, or a loaded model.
        tokenizer: for a loaded model, the tokenizer that turns text into its ids; not needed with `blocks`.
        text: a text file, several, or a directory; by default the Python standard library's own source.
        dataset: a `datasets` name or object instead of `text`.
        column: the column of the dataset that holds the text; found by itself where that is clear.
        split: the split of the dataset.
        blocks: token ids [N, T] instead of text: the first `fit_blocks` fit linear maps, the next `eval_blocks`
            measure.
        settings: what to measure and how exactly; single `options` (see `Settings`) override it.
        revision: branch, tag or commit of a Hub id.
        dtype: "auto" (float32 on a CPU, else the checkpoint's), "float32", "bfloat16" or "float16".
        device: where to run; None chooses, "auto" splits a large model over all devices.
        trust_remote_code: run the code in the model's repository. Off unless you trust who wrote it.
        progress: show a progress bar on a terminal.
        **options: fields of `Settings`.

    Returns:
        The report. Losses are in nats, layers count from 0, standard errors (`..._se`) are over blocks.

    Raises:
        ModelLoadError: the model cannot be loaded.
        NoLayerStackError: it has no plain stack of decoder layers.
        CorpusError: the text is missing or too short.
        SettingsError: an option has a value that is not allowed.
        NonFiniteError: activations or losses are NaN or infinite.
        OutOfMemoryError: the device is too small; the message says what to lower.
    """
    chosen = _settings(settings, options)
    processes = Processes.here()
    if isinstance(model, nn.Module):
        loaded = LoadedModel(model, tokenizer, model_facts(model))
    else:
        where = str(processes.device) if device is None and processes.count > 1 else device
        loaded = load_model(
            str(model), revision=revision, dtype=dtype, device=where, trust_remote_code=trust_remote_code
        )
    if blocks is None:
        needed = chosen.fit_blocks + chosen.eval_blocks
        blocks = load_blocks(
            text,
            tokenizer or loaded.require_tokenizer(),
            num_blocks=needed,
            block_size=chosen.block_size,
            dataset=dataset,
            column=column,
            split=split,
        )
    elif not isinstance(blocks, Blocks):
        blocks = Blocks.from_ids(blocks)
    chosen = chosen.with_(block_size=blocks.input_ids.shape[1])
    report = analyze_blocks(loaded.model, blocks, chosen, facts=loaded.facts, processes=processes, progress=progress)
    # Through JSON and back: what is returned is, to the order of its keys, what a saved report gives when it is loaded.
    return LayerReport.from_json(report.model_copy(update={"notes": [*loaded.notes, *report.notes]}).to_json())


def analyze_blocks(
    model: nn.Module,
    blocks: Blocks,
    settings: Settings,
    *,
    facts: dict[str, Any],
    processes: Processes | None = None,
    progress: bool = True,
) -> LayerReport:
    """Measure a loaded model on blocks of tokens; see `analyze`."""
    processes = processes or Processes.here()
    _require_blocks(model, blocks, settings)
    with evaluating(model), torch.no_grad(), _memory_errors(settings):
        stack = LayerStack(model)
        _require_finite(stack)
        scores = {name: SCORES[name](stack, settings, settings.eval_blocks) for name in settings.scores}
        total = _work(stack, scores, settings) / processes.count
        with showing_progress(total, visible=progress and processes.is_main) as shown:
            baseline = _measure(stack, scores, blocks, settings, processes, shown)
    return _report(stack, scores, baseline, blocks, settings, facts)


def _settings(settings: Settings | None, options: dict[str, Any]) -> Settings:
    try:
        return (settings or Settings()).with_(**options)
    except TypeError as error:
        known = ", ".join(Settings.__dataclass_fields__)
        raise SettingsError(
            f"{', '.join(options)}: not all of these are options of an analysis; they are {known}."
        ) from error


def _require_blocks(model: nn.Module, blocks: Blocks, settings: Settings) -> None:
    """Refuse blocks that are too few, too long for the model's positions, or hold ids that it does not know."""
    needed = settings.fit_blocks + settings.eval_blocks
    if len(blocks) < needed:
        raise CorpusError(
            f"{len(blocks)} blocks were given, but fit_blocks={settings.fit_blocks} and "
            f"eval_blocks={settings.eval_blocks} need {needed}. Give more blocks, or lower one of the two."
        )
    positions = getattr(text_config(model), "max_position_embeddings", None)
    if isinstance(positions, int) and 0 < positions < settings.block_size:
        raise SettingsError(
            f"block_size is {settings.block_size}, but the model has {positions} positions; lower block_size."
        )
    if isinstance(size := getattr(input_embeddings(model), "num_embeddings", None), int):
        blocks.check_vocabulary(size)


def _work(stack: LayerStack, scores: dict[str, Score], settings: Settings) -> float:
    """What the whole analysis takes, in forward passes of one layer over one block."""
    head = head_work(stack)
    each = stack.num_layers + head + sum(score.work() for score in scores.values())
    if any(score.skip_updates or score.skip_losses for score in scores.values()):
        with_head = head if any(score.skip_losses for score in scores.values()) else 0.0
        each += sum(forwards_from(stack, layer + 1) + with_head for layer in range(stack.num_layers))
    fit = settings.eval_blocks if settings.in_sample else settings.fit_blocks
    return each * settings.eval_blocks + (fit * stack.num_layers if "usefulness" in scores else 0)


def _measure(
    stack: LayerStack,
    scores: dict[str, Score],
    blocks: Blocks,
    settings: Settings,
    processes: Processes,
    shown: Progress,
) -> dict[str, np.ndarray]:
    """Fill every score's sums; returns the sums of the unchanged model's loss and number of predictions by block."""
    first = settings.fit_blocks
    measured = blocks[first : first + settings.eval_blocks]
    size = settings.batch_size or _batch_size(stack, settings)
    baseline = {name: np.zeros(settings.eval_blocks) for name in ("loss", "targets")}
    done = 0
    try:
        useful = scores.get("usefulness")
        if isinstance(useful, Usefulness):
            shown.at("fitting linear maps")
            fitted = measured if settings.in_sample else blocks[:first]
            useful.fit(lambda: _fit_batches(fitted, size, stack, processes, shown), processes.add_up)
        for rows in _chunks(processes.share(range(settings.eval_blocks)), size):
            place = f"block {rows[0] + 1} of {settings.eval_blocks}: "
            shown.at(place + "baseline")
            batch = _baseline(stack, measured.select(torch.tensor(rows)), np.array(rows), "variance" in scores)
            baseline["loss"][rows], baseline["targets"][rows] = batch.loss, batch.target_mask.sum(1).cpu().numpy()
            shown.advance(len(rows) * (stack.num_layers + head_work(stack)))
            for name, score in scores.items():
                shown.at(place + name)
                score.measure(batch, shown.advance)
            shown.at(place + "skipping layers")
            _skip_layers(stack, list(scores.values()), batch, shown)
            done += len(rows)
    except KeyboardInterrupt as interrupt:
        raise AnalysisInterrupted(
            f"Interrupted while at {shown.stage}: {done} of {settings.eval_blocks} blocks had been measured."
        ) from interrupt
    for table in (*baseline.values(), *(table for score in scores.values() for table in _tables(score))):
        processes.add_up_array(table)
    return baseline


def _tables(score: Score) -> Iterable[np.ndarray]:
    return (score.sums[name] for name in sorted(score.sums))


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


def _baseline(stack: LayerStack, blocks: Blocks, rows: np.ndarray, sublayers: bool) -> Batch:
    """Run the unchanged model on a batch and keep what all scores read."""
    tokens = blocks.token_mask
    # A prediction counts where it is made at a token that counts, of a token that is there.
    targets = tokens[:, :-1] & (tokens[:, 1:] if blocks.attention_mask is None else blocks.attention_mask[:, 1:].bool())
    with stack.capturing(sublayers=token_variance if sublayers else False) as capture:
        logits = stack.logits(blocks.input_ids, blocks.attention_mask)
    loss = block_losses(logits, blocks.input_ids, targets)
    if not np.isfinite(loss).all():
        raise NonFiniteError(_not_finite(capture))
    return Batch(rows, blocks, tokens, targets, capture.inputs, capture.outputs, capture.attention, capture.mlp, loss)


def _require_finite(stack: LayerStack) -> None:
    """Refuse a model with broken weights before any work is done."""
    if not torch.isfinite(stack.example_logits).all():
        with stack.capturing() as capture:
            stack.logits(stack.example_ids)
        raise NonFiniteError(_not_finite(capture))


def _not_finite(capture: Capture) -> str:
    places = [(0, "the embeddings", capture.inputs.get(0))]
    places += [(layer, f"the output of layer {layer}", hidden) for layer, hidden in sorted(capture.outputs.items())]
    where = next((name for _, name, hidden in places if not _finite(hidden)), "the logits")
    return (
        f"The model cannot be scored: {where} are not finite (NaN or infinity). Check its weights, or use a wider "
        "dtype: float32 or bfloat16."
    )


def _finite(hidden: Tensor | None) -> bool:
    return hidden is None or bool(torch.isfinite(hidden).all())


def _skip_layers(stack: LayerStack, scores: list[Score], batch: Batch, shown: Progress) -> None:
    """Run the batch with each layer skipped in turn, once for all the scores that look at that."""
    updates, losses = any(score.skip_updates for score in scores), any(score.skip_losses for score in scores)
    if not (updates or losses):
        return
    last = stack.num_layers - 1
    for layer in range(stack.num_layers):
        if layer not in stack.unskippable and (losses or layer < last):
            with (
                stack.skipping(layer),
                run_from(stack, layer, batch.inputs[layer]),
                stack.capturing(inputs=updates, outputs=updates, first=layer + 1) as capture,
            ):
                loss = _loss_or_nothing(stack, batch, losses)
            run = SkippedRun(layer, capture.inputs, capture.outputs, loss)
            for score in scores:
                if score.skip_updates or score.skip_losses:
                    score.measure_skip(batch, run)
        shown.advance(len(batch.rows) * (forwards_from(stack, layer + 1) + (head_work(stack) if losses else 0)))


def _loss_or_nothing(stack: LayerStack, batch: Batch, wanted: bool) -> np.ndarray | None:
    ids, mask = batch.blocks.input_ids, batch.blocks.attention_mask
    if wanted:
        return block_losses(stack.logits(ids, mask), ids, batch.target_mask)
    stack.run_through(stack.num_layers - 1, ids, mask)
    return None


def _report(
    stack: LayerStack,
    scores: dict[str, Score],
    baseline: dict[str, np.ndarray],
    blocks: Blocks,
    settings: Settings,
    facts: dict[str, Any],
) -> LayerReport:
    """Turn the sums into the report."""
    pairs: dict[str, Any] = {}
    loss, loss_error = values_with_errors(
        lambda sums: Values(scores={"loss": float(sums["loss"] / sums["targets"])}), baseline
    )
    singles = {"loss": _number(loss.scores["loss"]), "loss_se": _number(loss_error.scores["loss"])}
    rows: list[dict[str, Any]] = [{"layer": layer, "kind": kind} for layer, kind in enumerate(stack.kind_names)]
    for score in scores.values():
        values, errors = values_with_errors(score.finish, score.sums)
        for name, value in values.scores.items():
            singles |= {name: _number(value), f"{name}_se": _number(errors.scores[name])}
        for name, column in values.layers.items():
            for row, value, error in zip(rows, column, errors.layers[name], strict=True):
                row |= {name: _number(value), f"{name}_se": _number(error)}
        for name, matrix in values.pairs.items():
            pairs |= {name: _matrix(matrix), f"{name}_se": _matrix(errors.pairs[name])}
    singles |= _estimation_errors(scores)
    return LayerReport(
        schema_version=SCHEMA_VERSION,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        model=cast("ModelFacts", {**facts, "num_layers": stack.num_layers}),
        data=_data_facts(blocks, settings),
        settings=settings.to_dict(),
        versions=_versions(),
        notes=_notes(stack, scores, blocks, settings),
        scores=singles,
        layers=rows,
        pairs=pairs,
    )


def _data_facts(blocks: Blocks, settings: Settings) -> DataFacts:
    measured = blocks[settings.fit_blocks : settings.fit_blocks + settings.eval_blocks]
    facts = {
        "name": blocks.name,
        "fingerprint": blocks.fingerprint,
        "fit_blocks": settings.fit_blocks,
        "eval_blocks": settings.eval_blocks,
        "block_size": settings.block_size,
        "tokens": int(measured.token_mask.sum()),
    }
    return cast("DataFacts", facts)


def _estimation_errors(scores: dict[str, Score]) -> dict[str, float | None]:
    """The errors that come from estimating: sampled pairs, random probes."""
    found: dict[str, float | None] = {}
    swaps, jacobian = scores.get("permutation"), scores.get("jacobian")
    if isinstance(swaps, Permutation) and isinstance(swaps.settings.pairs, float):
        found["permutation_sampling_se"] = _number(swaps.sampling_error())
    if isinstance(jacobian, Jacobian) and jacobian.settings.probes != "exact":
        found["jacobian_probe_se"] = _number(jacobian.probe_error())
    return found


def _notes(stack: LayerStack, scores: dict[str, Score], blocks: Blocks, settings: Settings) -> list[str]:
    """What a reader of the report must know."""
    notes = []
    if settings.paper_code and "usefulness" in scores:
        notes.append(
            "paper_code: usefulness is what the paper's released code computes (linear map applied un-transposed, "
            "fitted on the evaluation text), not what the paper defines."
        )
    elif settings.in_sample and "usefulness" in scores:
        notes.append("in_sample: the linear maps were fitted on the evaluation text itself.")
    notes += _fit_notes(stack, scores.get("usefulness"), settings)
    for layer, reason in stack.unskippable.items():
        notes.append(f"Layer {layer} cannot be skipped or replaced in this model ({reason}); its scores are empty.")
    if not stack.resumable:
        notes.append(
            "Later layers of this model read what earlier ones left behind; every experiment ran from the start."
        )
    if settings.eval_blocks == 1:
        notes.append("One evaluation block tells no standard error; raise eval_blocks.")
    return notes


def _fit_notes(stack: LayerStack, score: Score | None, settings: Settings) -> list[str]:
    if not isinstance(score, Usefulness):
        return []
    notes = []
    tokens = (settings.eval_blocks if settings.in_sample else settings.fit_blocks) * settings.block_size
    if tokens <= 2 * stack.width:
        notes.append(
            f"The linear maps have {stack.width} inputs and were fitted on {tokens} tokens only: usefulness ratios are "
            "too high. Raise fit_blocks."
        )
    if score.undetermined:
        layers = ", ".join(map(str, score.undetermined))
        notes.append(
            f"The fitting text does not determine the linear map of layer {layers} (too few distinct inputs); the one "
            "of least norm was taken. Raise fit_blocks."
        )
    return notes


def _versions() -> dict[str, str | None]:
    names = ("depthscope", "torch", "transformers")
    return {**{name: version(name) for name in names}, "python": platform.python_version()}


def _number(value: Any) -> float | None:
    number = float(value)
    return number if np.isfinite(number) else None


def _matrix(values: np.ndarray) -> list[list[float | None]]:
    return [[_number(value) for value in row] for row in values]


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is about memory; PyTorch has no class of its own for a processor's."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return "allocate memory" in str(error) or "not enough memory" in str(error)


@contextmanager
def _memory_errors(settings: Settings) -> Iterator[None]:
    """Say what to lower when the device runs out of memory."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        lower = [f"batch_size (now {settings.batch_size or 'chosen by itself'})", f"block_size ({settings.block_size})"]
        raise OutOfMemoryError(
            f"The device ran out of memory. Lower {' or '.join(lower)}, use a narrower dtype (bfloat16), split the "
            'model over devices with device="auto", or leave out the jacobian score.'
        ) from error
