"""`EffectivenessCallback`: the layer-effectiveness scores at regular steps of a training.

Every `every` steps the chosen scores are computed on the same few blocks of tokens, as in `depthscope.analyze`: in
evaluation mode, without autocast, with the current weights. The result is a `LayerReport`, saved as
`layer_reports/step-<step>.json` in the output directory; its global numbers and its columns go into the next log of the
training (as `layers/<score>` and `layers/<score>/<layer>`) and into `layer_stats.jsonl`. `depthscope scores` explains
each score. Scores that `VarianceCallback` measures on the training text are called `blocks_<name>` here.

The training is not affected: random states, modes and gradients are restored.
"""

import logging
import random
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import ExportableState

from depthscope.analysis.analyze import analyze_blocks, memory_errors
from depthscope.analysis.measure import total_work
from depthscope.callbacks.trainer_access import announce, move_before_reporters, places_before, saved_attributes
from depthscope.callbacks.window import LOGGED, Measured, flat_names, is_over, numbered
from depthscope.errors import AnalysisError, CorpusError, OutOfMemoryError, ReportError, SettingsError
from depthscope.layers.facts import model_facts
from depthscope.layers.modes import evaluating
from depthscope.layers.stack import LayerStack
from depthscope.processes import Processes
from depthscope.report.report import LayerReport
from depthscope.runs.history import History
from depthscope.scores import SCORES
from depthscope.scores.base import head_work
from depthscope.settings import Settings
from depthscope.text.blocks import Blocks

__all__ = ["REPORTS", "EffectivenessCallback"]

logger = logging.getLogger(__name__)

REPORTS = "layer_reports"
# `VarianceCallback` logs the same measures on the training text under these names.
ON_BLOCKS = ("variance", "variance_growth", "attention_variance", "mlp_variance", "update_norm")
DEFAULT_SCORES = ("skip", "causal", "block_influence")


class EffectivenessCallback(TrainerCallback, ExportableState):
    """Computes layer-effectiveness scores while a model trains.

        Trainer(..., callbacks=[EffectivenessCallback(blocks, scores="skip,usefulness", every=500)])

    Args:
        blocks: token ids [N, T] of text that the model is not trained on; no score includes special tokens of the
            Trainer's tokenizer at the start of a block, such as BOS. `depthscope.load_blocks` makes `Blocks` from text.
            The result of `Blocks.to_dict`, which a checkpoint stores, works too.
        scores: as for `depthscope.analyze`.
        every: optimiser steps between analyses, if the time budget allows them.
        max_overhead: the share of the training time (0.05 is 5%) that all analyses together may take; an analysis that
            would exceed it, estimated from a forward pass and from the last analysis, is postponed. One that takes
            longer than it was estimated has the time that is left as its budget: it ends with the blocks that it has
            measured by then, at least two, and its report says so. None: no limit.
        fit_blocks: the number of blocks that fit the linear maps of the usefulness score; by default half of them with
            that score, and none without it. The other blocks are used for the measurement.
        log: "layers" logs every layer; "summary" logs the first, the last and the quartiles over layers; "none" logs
            only global numbers.
        history: whether to append to `layer_stats.jsonl`.
        **options: further fields of `depthscope.Settings`.

    Raises:
        NoLayerStackError: (when training begins) the model has no plain stack of decoder layers.
        SettingsError: an argument is not allowed, or (when training begins) `bos` does not match the blocks.
    """

    def __init__(
        self,
        blocks: Tensor | Blocks | list[list[int]] | Mapping[str, Any],
        scores: str | Iterable[str] = DEFAULT_SCORES,
        every: int = 500,
        max_overhead: float | None = 0.05,
        fit_blocks: int | None = None,
        log: str = "layers",
        history: bool = True,
        **options: Any,
    ) -> None:
        if not isinstance(every, int) or every < 1:
            raise SettingsError(f"every is {every!r}; give a number of steps, at least 1.")
        if max_overhead is not None and not max_overhead > 0:
            raise SettingsError(f"max_overhead is {max_overhead!r}; give a share of the time above 0, or None.")
        if log not in LOGGED:
            raise SettingsError(f"log is {log!r}; choose one of {', '.join(LOGGED)}.")
        if isinstance(blocks, Mapping):
            blocks = _from_dict(blocks)
        self.blocks = Blocks.given(blocks)
        self._as_ids = not isinstance(blocks, Blocks)  # then the tokenizer decides which ids are special
        self.settings = _settings(self.blocks, scores, fit_blocks, options)
        self.every = every
        self.max_overhead = max_overhead
        self.log = log
        self.history = history
        self.spent = 0.0  # seconds in analyses
        self.trained = 0.0  # seconds in everything else
        self.waiting: dict[str, float] = {}  # the values for the next log
        self.cost: float | None = None  # seconds per analysis
        self._is_timed = False  # whether the cost is that of an analysis, and no estimate
        self._since = time.perf_counter()
        self._file: History | None = None
        self._over = False
        self._run: Any = None  # the state of the training that is measured
        self._before = 0  # callbacks of this class before this one
        self._unsaved: list[int] = []  # steps whose reports could not be written

    def state(self) -> dict[str, Any]:
        """The state of this callback for a checkpoint."""
        options = {**self.settings.to_dict(), "in_sample": self.settings.in_sample}
        for name in ("scores", "eval_blocks", "block_size", "fit_blocks"):
            del options[name]
        args = {
            # Ids stay ids until a tokenizer decides which of them are special.
            "blocks": self.blocks.to_dict()
            if self.blocks.special_ids or not self._as_ids
            else self.blocks.to_dict()["ids"],
            "scores": list(self.settings.scores),
            "every": self.every,
            "max_overhead": self.max_overhead,
            "fit_blocks": self.settings.fit_blocks,
            "log": self.log,
            "history": self.history,
            **options,
        }
        attributes = {"spent": self.spent, "trained": self.trained, "waiting": self.waiting, "cost": self.cost}
        return {"args": args, "attributes": attributes}

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move before the reporters."""
        move_before_reporters(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Refuse a model without layers at once, and resume from a checkpoint."""
        move_before_reporters(self)
        self._run, self._before, self._unsaved = state, places_before(self), []
        LayerStack(model)
        if self._as_ids and (tokenizer := _tokenizer(kwargs.get("processing_class"))) is not None:
            self.blocks = Blocks.given(self.blocks.input_ids, tokenizer)
        self.blocks.check_bos(str(self.settings.bos))
        self._over = is_over(state)
        if state.global_step and "late" not in kwargs:
            self._restore(saved_attributes(state, self))
        if state.is_world_process_zero:
            with suppress(OSError):
                _drop_later_reports(Path(args.output_dir, REPORTS), state.global_step)
            if self.history:
                self._file = History(args.output_dir)
                self._file.begin(state.global_step, run=state)
        self._since = time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin at this step if the training has already begun."""
        if self._run is not state:
            announce(state, self)
            self.on_train_begin(args, state, control, **kwargs, late=True)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Analyse the model every `every` steps within the time budget."""
        now = time.perf_counter()
        self.trained += now - self._since
        self._since = now
        if state.global_step % self.every == 0 and not self._over:
            with _restoring_random_states(model):
                try:
                    if self._affordable(model):
                        self._analyse(model, Path(args.output_dir), state)
                except AnalysisError as error:  # an error of the analysis must not end the training
                    if isinstance(error, OutOfMemoryError) and _is_sharded(model):
                        raise  # all processes are in the middle of a common pass
                    logger.warning("Step %d was not analysed: %s", state.global_step, error)
            self._since = time.perf_counter()
            self.spent += self._since - now

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add the values since the last log to this log."""
        if logs is None or "loss" not in logs or not self.waiting:
            return
        logs.update(self.waiting)
        if state.log_history:
            state.log_history[-1].update(self.waiting)
        self.waiting = {}

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the history, and warn of missing reports."""
        if self._file is not None:
            self._file.close()
        if self._unsaved:
            steps = ", ".join(map(str, self._unsaved))
            logger.warning("The reports of steps %s are missing, since they could not be written.", steps)
        self._file, self._run, self._unsaved = None, None, []

    def _restore(self, saved: dict[str, Any]) -> None:
        """Restore the state from a checkpoint, if it is valid."""
        if not saved:
            return
        spent: Any
        trained: Any
        cost: Any
        waiting: Any
        spent, trained, cost, waiting = (saved.get(name) for name in ("spent", "trained", "cost", "waiting"))
        seconds = [spent, trained, 0 if cost is None else cost]
        values = [*waiting.values()] if isinstance(waiting, dict) else [None]
        if not all(isinstance(value, int | float) for value in (*seconds, *values)) or not np.isfinite(seconds).all():
            logger.warning("%s cannot restore its state from the checkpoint, which is damaged.", type(self).__name__)
            return
        self.spent, self.trained, self.cost, self.waiting = float(spent), float(trained), cost, dict(waiting)

    def _affordable(self, model: nn.Module) -> bool:
        """Whether an analysis now would stay within the time budget; the main process decides for all."""
        if self.max_overhead is None:
            return True
        if self.cost is None:
            with _processes(model).together(), memory_errors(self.settings):
                cost = _estimate(model, self.blocks, self.settings)
            self.cost = cost  # set in all processes or in none
        fits = self.spent + self.cost <= self.max_overhead * self.trained
        return _processes(model).agreed(fits)

    def _analyse(self, model: nn.Module, folder: Path, state: Any) -> None:
        begun, measured_share = time.perf_counter(), 1.0
        try:
            report = analyze_blocks(
                model,
                self.blocks,
                self.settings,
                facts=model_facts(model),
                processes=_processes(model),
                progress=False,
                time_limit=self._time_left(),
                begin_small=not self._is_timed,
            )
            if report.budget is not None and report.budget["stopped"] == "time":
                measured_share = report.data["eval_blocks"] / self.settings.eval_blocks
            self._is_timed = True
        finally:
            # Of all blocks, also where the time was up before.
            self.cost = (time.perf_counter() - begun) / measured_share
        measured = numbered(_measured(report), self._before)
        self.waiting = flat_names(measured, self.log)
        if state.is_world_process_zero:
            self._save(report, folder / REPORTS, state.global_step)
        if self._file is not None:
            row = {"step": state.global_step, "epoch": state.epoch, "kind": "effectiveness"}
            self._file.append({**row, "values": measured.values, "layers": measured.layers})

    def _time_left(self) -> float | None:
        """What is left of the training time's share, in seconds, and at least what was expected; None: no limit."""
        if self.max_overhead is None:
            return None
        return max(self.max_overhead * self.trained - self.spent, self.cost or 0.0)

    def _save(self, report: LayerReport, folder: Path, step: int) -> None:
        """Write a report; if that fails, the training goes on, with one warning now and one at its end."""
        number = f".{self._before + 1}" if self._before else ""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            report.save(folder / f"step-{step}{number}.json")
        except (OSError, ReportError) as error:
            if not self._unsaved:
                logger.warning("The report of step %d is not saved: %s", step, error)
            self._unsaved.append(step)


def _from_dict(content: Mapping[str, Any]) -> Blocks:
    try:
        return Blocks.from_ids(**content)
    except TypeError as error:
        raise CorpusError(
            "A mapping of blocks must come from Blocks.to_dict and contain ids; this one has the keys "
            f"{', '.join(map(repr, content)) or 'none'}."
        ) from error


def _tokenizer(processing_class: Any) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a Trainer: its processing class, or a part of it."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    return tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else None


def _settings(blocks: Blocks, scores: Any, fit_blocks: int | None, options: dict[str, Any]) -> Settings:
    names = scores if isinstance(scores, str) else tuple(scores)
    chosen = Settings(scores=names).scores
    if fit_blocks is None:
        fit_blocks = len(blocks) // 2 if "usefulness" in chosen else 0
    length = blocks.input_ids.shape[1]
    try:
        return Settings(
            scores=chosen, fit_blocks=fit_blocks, eval_blocks=len(blocks) - fit_blocks, block_size=length, **options
        )
    except TypeError as error:
        raise SettingsError(f"{', '.join(options)}: some of these are not options of an analysis.") from error


def _measured(report: LayerReport) -> Measured:
    """The numbers of a report, without its standard errors."""

    def named(name: str) -> str:
        return f"blocks_{name}" if name in ON_BLOCKS or name.startswith("variance_") else name

    def number(value: Any) -> float:
        return float("nan") if value is None else float(value)

    values = {named(name): number(value) for name, value in report.scores.items() if not name.endswith("_se")}
    columns = [name for name in report.layers[0] if name not in ("layer", "kind") and not name.endswith("_se")]
    return Measured(values, {named(name): [number(row.get(name)) for row in report.layers] for name in columns})


def _estimate(model: nn.Module, blocks: Blocks, settings: Settings) -> float:
    """Estimate the seconds of an analysis from the time of a forward pass over one block."""
    with evaluating(model), torch.no_grad():
        stack = LayerStack(model)
        scores = {name: SCORES[name](stack, settings, settings.eval_blocks) for name in settings.scores}
        work = total_work(stack, scores, settings)
        times = []
        for _ in range(2):  # the first one warms up
            begun = time.perf_counter()
            stack.logits(blocks.input_ids[:1]).sum().item()
            times.append(time.perf_counter() - begun)
    return times[-1] * work / (stack.num_layers + head_work(stack))


def _processes(model: nn.Module) -> Processes:
    """The processes that share the blocks; with a sharded model, each process measures all blocks."""
    return Processes(0, 1, next(model.parameters()).device, in_step=True) if _is_sharded(model) else Processes.here()


def _is_sharded(model: nn.Module) -> bool:
    """Whether a pass through the model needs all processes, so that they cannot share the blocks."""
    return any(
        hasattr(weight, "device_mesh") or type(module).__name__.startswith(("FSDP", "FullySharded"))
        for module in model.modules()
        for weight in module.parameters(recurse=False)
    )


def _drop_later_reports(folder: Path, step: int) -> None:
    """Remove the reports of later steps, which a resumed run will repeat."""
    for path in folder.glob("step-*.json"):
        number = path.stem.removeprefix("step-").partition(".")[0]
        if number.isdigit() and int(number) > step:
            path.unlink()


@contextmanager
def _restoring_random_states(model: nn.Module) -> Iterator[None]:
    """Restore random states afterwards; the analysis itself keeps modes and gradients."""
    states = random.getstate(), np.random.get_state()
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    try:
        with (
            torch.random.fork_rng(devices=devices),
            torch.autocast(next(model.parameters()).device.type, enabled=False),
        ):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
