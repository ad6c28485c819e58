"""A model and blocks of tokens in, a `LayerReport` out: one pass over batches of blocks serves all the chosen scores.

Under `torchrun` each process takes its share of the blocks; the sums that the scores keep by block are added up at the
end, so that a report does not depend on the number of processes.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from depthscope.analysis.assemble import assemble
from depthscope.analysis.budget import LEAST
from depthscope.analysis.growing import Measured, measure_growing
from depthscope.analysis.measure import measure, require_finite, runs_experiments, total_work
from depthscope.console.progress import Listener, showing_progress, showing_status
from depthscope.errors import CorpusError, SettingsError
from depthscope.layers.facts import model_facts, text_only_notes
from depthscope.layers.lanes.lanes import Lanes
from depthscope.layers.modes import evaluating
from depthscope.layers.offloaded import borrowing_weights, is_offloaded
from depthscope.layers.stack import LayerStack
from depthscope.layers.tracing import input_embeddings, text_config
from depthscope.loading import failures
from depthscope.loading.load import load_model, require_for_loading
from depthscope.loading.loaded import LoadedModel
from depthscope.processes import Processes
from depthscope.report.report import MAX_MAPPED_LAYERS, LayerReport
from depthscope.scores import SCORES
from depthscope.settings import Settings
from depthscope.text.blocks import Blocks, load_blocks
from depthscope.wording.messages import counted

__all__ = ["OnPartial", "analyze", "analyze_blocks", "memory_errors"]

OnPartial = Callable[[LayerReport], None]
SHORTEST = 1e-3  # seconds of a limit
SO_FAR = "These are the first blocks of an analysis that goes on."


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
    attn_implementation: str | None = None,
    base_model: str | None = None,
    offload: bool | None = None,
    progress: bool | Listener = True,
    on_partial: OnPartial | None = None,
    **options: Any,
) -> LayerReport:
    """Measure how much every layer of a causal language model contributes.

    Args:
        model: a Hub id, a folder, a `.gguf` file, a PEFT adapter folder, or a loaded model.
        tokenizer: for a loaded model, the tokenizer that turns text into its ids; with `blocks`, it only says which
            ids are special, and so do not count at the start of a block.
        text: a text file, several, or a directory; by default the Python standard library's own source.
        dataset: a `datasets` name or object instead of `text`.
        column: the column of the dataset that holds the text; found by itself where that is clear.
        split: the split of the dataset.
        blocks: `Blocks`, or token ids [N, T], instead of text: the first `fit_blocks` fit linear maps, the next
            `eval_blocks` (with a budget or a precision: as many of them as are there) measure. Ids are taken as they
            are; special tokens at the start of a block do not count.
        settings: what to measure and how exactly; single `options` (see `Settings`) override it.
        revision: branch, tag or commit of a Hub id.
        dtype: "auto" (float32 on a CPU, else the checkpoint's), "float32", "bfloat16" or "float16".
        device: where to run; None chooses, "auto" splits a large model over all devices.
        trust_remote_code: run the code in the model's repository. Off unless you trust who wrote it.
        attn_implementation: the implementation of attention to load a model with; None takes what its config names, or
            transformers' default where that does not run here.
        base_model: for an adapter whose base model has moved: its id, folder or .gguf file.
        offload: for a model that is larger than memory: the layers' weights stay in the checkpoint's files (on a CPU)
            or in main memory (with an accelerator), and each is read once for many experiments. None does so where
            the weights do not fit. What needs other layers' weights, the permutation score, is left out.
        progress: show a progress bar on a terminal, or a function that is told instead: what is being done, and the
            share of the work that is done.
        on_partial: a function that gets a report of the blocks so far after each round of blocks, and so before the
            whole one is returned; without what must know the number of blocks first (Jacobians, sampled pairs, maps
            that are fitted in sample). The blocks then come in rounds that grow, as with a budget.
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
        require_for_loading(revision, base_model, attn_implementation)
        loaded = LoadedModel(model, tokenizer, model_facts(model), text_only_notes(model))
    else:
        where = str(processes.device) if device is None and processes.count > 1 else device
        with showing_status(f"Loading {model}", visible=progress is True and processes.is_main):
            loaded = load_model(
                model,
                revision=revision,
                dtype=dtype,
                device=where,
                trust_remote_code=trust_remote_code,
                attn_implementation=attn_implementation,
                base_model=base_model,
                offload=offload,
            )
    if blocks is None:
        blocks = load_blocks(
            text,
            tokenizer or loaded.require_tokenizer(),
            num_blocks=chosen.fit_blocks + chosen.eval_blocks,
            fewest=chosen.fit_blocks + chosen.least_blocks,
            block_size=chosen.block_size,
            dataset=dataset,
            column=column,
            split=split,
            bos=chosen.bos,
        )
    else:
        blocks = Blocks.given(blocks, tokenizer or loaded.tokenizer)
    chosen = chosen.with_(block_size=blocks.input_ids.shape[1])
    report = analyze_blocks(
        loaded.model,
        blocks,
        chosen,
        facts=loaded.facts,
        processes=processes,
        progress=progress,
        on_partial=on_partial,
        keep_interrupted=True,
    )
    # Through JSON and back: what is returned is, to the order of its keys, what a saved report gives when it is loaded.
    return LayerReport.from_json(report.model_copy(update={"notes": [*loaded.notes, *report.notes]}).to_json())


def analyze_blocks(
    model: nn.Module,
    blocks: Blocks,
    settings: Settings,
    *,
    facts: dict[str, Any],
    processes: Processes | None = None,
    progress: bool | Listener = True,
    on_partial: OnPartial | None = None,
    time_limit: float | None = None,
    begin_small: bool = True,
    keep_interrupted: bool = False,
) -> LayerReport:
    """Measure a loaded model on blocks of tokens; see `analyze`.

    After `time_limit` seconds it is to end, with fewer blocks where not all fit (at least two); then the report has
    `budget` and says so, while a report of all blocks is as without a limit. `begin_small`: whether an analysis with a
    budget or a limit begins with single blocks, to learn how long they take. `keep_interrupted`: whether Ctrl-C ends
    one with a budget or a precision with what has been measured.
    """
    begun, processes = time.monotonic(), processes or Processes.here()
    with processes.together(), evaluating(model), torch.no_grad(), memory_errors(settings), ExitStack() as compiled:
        _require_blocks(model, blocks, settings)
        settings, left_out = _without_distant_weights(model, settings)
        # What is tried on a small example asks how the model's code works, so one layer's weights do for all.
        with borrowing_weights(model):
            stack = LayerStack(model)
            _require_positions(model, settings.block_size, stack.virtual_tokens)
            _require_maps(stack, settings)
            compiled.enter_context(stack.as_written())
            lanes = Lanes(stack)
            scores = {name: SCORES[name](stack, settings, settings.eval_blocks) for name in settings.scores}
            if stack.is_offloaded and runs_experiments(scores):
                lanes.prepare()
        if not stack.is_offloaded:
            require_finite(stack)
        total = total_work(stack, scores, settings) / processes.count
        listener = progress if callable(progress) else None
        with showing_progress(total, visible=bool(progress) and processes.is_main, listener=listener) as shown:
            limited = _limited(settings, time_limit)
            if not limited.is_bounded and on_partial is None:
                baseline, on_losses = measure(lanes, scores, blocks, settings, processes, shown)
                report = assemble(lanes, scores, baseline, blocks, settings, facts)
                return report.model_copy(update={"notes": [*left_out, *report.notes, *on_losses]})

            def reported(measured: Measured, *said: str) -> LayerReport:
                sums = measured.scores, measured.baseline
                as_asked = measured.settings.with_(budget=settings.budget)
                report = assemble(lanes, *sums, blocks, as_asked, facts)
                decided = settings.is_bounded or measured.budget.stopped == "time"
                budget = measured.budget.facts() if decided and measured.budget.stopped else None
                reached = measured.budget.notes() if budget is not None else []
                notes = [*left_out, *said, *reached, *measured.notes, *report.notes]
                return report.model_copy(update={"notes": notes, "budget": budget})

            measured = measure_growing(
                lanes,
                scores,
                blocks,
                limited,
                processes,
                shown,
                begun=begun,
                keep_interrupted=keep_interrupted and settings.is_bounded,
                begin_small=begin_small,
                on_partial=None if on_partial is None else lambda some: on_partial(reported(some, SO_FAR)),
            )
            return reported(measured)


def _settings(settings: Settings | None, options: dict[str, Any]) -> Settings:
    try:
        return (settings or Settings()).with_(**options)
    except TypeError as error:
        known = ", ".join(Settings.__dataclass_fields__)
        raise SettingsError(
            f"{', '.join(options)}: not all of these are options of an analysis; they are {known}."
        ) from error


def _limited(settings: Settings, seconds: float | None) -> Settings:
    """The settings with a limit as their budget, if they have no smaller one; a single block is measured anyway."""
    if seconds is None or settings.eval_blocks < LEAST:
        return settings
    seconds = max(seconds, SHORTEST)
    shorter = seconds if settings.budget is None else min(seconds, float(settings.budget))
    return settings.with_(eval_blocks=settings.eval_blocks, budget=shorter)


def _without_distant_weights(model: nn.Module, settings: Settings) -> tuple[Settings, list[str]]:
    """The settings without what needs the weights of several layers at a time, where they are not all in memory."""
    if "permutation" not in settings.scores or not is_offloaded(model):
        return settings, []
    others = [name for name in settings.scores if name != "permutation"]
    if not others:
        raise SettingsError(
            "The permutation score needs the weights of two layers at a time, and the layers' weights are outside of "
            "memory; choose other scores, or a machine that the model fits on."
        )
    note = "The permutation score was left out: the layers' weights were outside of memory, and it needs two at a time."
    return settings.with_(scores=tuple(others)), [note]


def _require_blocks(model: nn.Module, blocks: Blocks, settings: Settings) -> None:
    """Refuse blocks that are too few, too long for the model's positions, or hold ids that it does not know."""
    blocks.check_bos(str(settings.bos))
    needed = settings.fit_blocks + settings.least_blocks
    if len(blocks) < needed:
        were = "was" if len(blocks) == 1 else "were"
        measured, lower = f"eval_blocks={settings.eval_blocks}", "one of the two"
        if settings.is_bounded:
            measured, lower = "at least 2 to measure on", "fit_blocks"
        raise CorpusError(
            f"{counted(len(blocks), 'block')} {were} given, but fit_blocks={settings.fit_blocks} and "
            f"{measured} need {needed}. Give more blocks, or lower {lower}."
        )
    _require_positions(model, settings.block_size)
    if isinstance(size := getattr(input_embeddings(model), "num_embeddings", None), int):
        blocks.check_vocabulary(size)


def _require_maps(stack: LayerStack, settings: Settings) -> None:
    """Refuse maps of pairs of layers that no report holds, before they are measured."""
    maps = [name for name in ("causal", "permutation") if name in settings.scores]
    if maps and stack.num_layers > MAX_MAPPED_LAYERS:
        raise SettingsError(
            f"The model has {stack.num_layers:,} layers, and a report has room for pairs of at most "
            f"{MAX_MAPPED_LAYERS:,}: leave {' and '.join(maps)} out of the scores."
        )


def _require_positions(model: nn.Module, block_size: int, virtual: int = 0) -> None:
    """Refuse blocks that are longer than the model's positions, with the virtual tokens that stand before them."""
    positions = getattr(text_config(model), "max_position_embeddings", None)
    if isinstance(positions, int) and 0 < positions < block_size + virtual:
        verb = "stands" if virtual == 1 else "stand"
        before = f" and {counted(virtual, 'virtual token')} {verb} before the text" if virtual else ""
        raise SettingsError(
            f"block_size is {block_size}{before}, but the model has {positions} positions; lower block_size."
        )


def memory_errors(settings: Settings) -> AbstractContextManager[None]:
    """Say what to lower when the device runs out of memory."""
    size = settings.batch_size or "chosen by itself"
    return failures.memory_errors(
        f"batch_size (now {size}) or block_size ({settings.block_size})", "leave out the jacobian score"
    )
