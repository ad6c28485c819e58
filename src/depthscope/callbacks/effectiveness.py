"""`EffectivenessCallback`: the layer-effectiveness scores, now and then while a model trains.

Every n-th step the chosen scores are computed on the same few blocks of tokens, as `depthscope.analyze` does it: in
evaluation mode, without autocast, on the weights as they are. What comes out is a `LayerReport`, saved as
`layer_reports/step-<step>.json` in the output directory; its single numbers and its columns by layer go into the next
log of training (as `layers/<score>` and `layers/<score>/<layer>`) and into `layer_stats.jsonl`. `depthscope scores`
explains each score. Those that `VarianceCallback` measures on the training text are called `blocks_<name>` here.

The training itself does not notice: random states, modes and gradients are as they were before.
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
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import ExportableState

from depthscope.analysis.analyze import analyze_blocks, memory_errors
from depthscope.analysis.measure import total_work
from depthscope.callbacks.trainer_access import announce, place, places_before, saved_attributes
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
# The names under which `VarianceCallback` logs something else: the same measure on the training text.
ON_BLOCKS = ("variance", "variance_growth", "attention_variance", "mlp_variance", "update_norm")
DEFAULT_SCORES = ("skip", "causal", "block_influence")


class EffectivenessCallback(TrainerCallback, ExportableState):
    """Computes layer-effectiveness scores while a model trains.

        Trainer(..., callbacks=[EffectivenessCallback(blocks, scores="skip,usefulness", every=500)])

    Args:
        blocks: token ids [N, T], of text that the model is not trained on; special tokens of the Trainer's tokenizer at
            the start of a block, such as BOS, do not count. `depthscope.load_blocks` makes `Blocks` out of text. Also
            what `Blocks.to_dict` gives, as a checkpoint keeps it.
        scores: as for `depthscope.analyze`.
        every: compute them every n-th optimiser step, where the time allows it.
        max_overhead: share of the training time (0.05 is 5%) that all analyses together may take; one that would take
            more, as estimated from a forward pass and from the last analysis, waits for a later step. None: no limit.
        fit_blocks: of the blocks, how many fit the linear maps of the usefulness score; half of them by default where
            that is among the scores, none otherwise. The others measure.
        log: "layers" logs every layer, "summary" the first, the last and the quartiles over layers, "none" only single
            numbers.
        history: append to `layer_stats.jsonl`.
        **options: further fields of `depthscope.Settings`.

    Raises:
        NoLayerStackError: (when training begins) the model has no plain stack of decoder layers.
        SettingsError: an argument is not allowed, or (when training begins) `bos` is not as the blocks are.
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
        self._as_ids = not isinstance(blocks, Blocks)  # then the tokenizer says which of them are special
        self.settings = _settings(self.blocks, scores, fit_blocks, options)
        self.every = every
        self.max_overhead = max_overhead
        self.log = log
        self.history = history
        self.spent = 0.0  # seconds in analyses
        self.trained = 0.0  # seconds in everything else
        self.waiting: dict[str, float] = {}  # what the next log will bring
        self.cost: float | None = None  # seconds that an analysis takes
        self._since = time.perf_counter()
        self._file: History | None = None
        self._over = False
        self._run: Any = None  # the state of the training that is measured
        self._before = 0  # callbacks of this class before this one
        self._unsaved: list[int] = []  # steps whose reports could not be written

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of this callback."""
        options = {**self.settings.to_dict(), "in_sample": self.settings.in_sample}
        for name in ("scores", "eval_blocks", "block_size", "fit_blocks"):
            del options[name]
        args = {
            # Ids of which nothing is known yet stay ids: a tokenizer will say which of them are special.
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
        kept = {"spent": self.spent, "trained": self.trained, "waiting": self.waiting, "cost": self.cost}
        return {"args": args, "attributes": kept}

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the place before the reporters."""
        place(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Refuse a model without layers now and not after hours, and go on where a checkpoint left off."""
        place(self)
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
        """Begin here where the training had begun before this callback came."""
        if self._run is not state:
            announce(state, self)
            self.on_train_begin(args, state, control, **kwargs, late=True)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Analyse every n-th step that the budget allows."""
        now = time.perf_counter()
        self.trained += now - self._since
        self._since = now
        if state.global_step % self.every == 0 and not self._over:
            with _unnoticed(model):
                try:
                    if self._affordable(model):
                        self._analyse(model, Path(args.output_dir), state)
                except AnalysisError as error:  # a model that diverges must not end its training here
                    if isinstance(error, OutOfMemoryError) and _is_sharded(model):
                        raise  # in the middle of a pass that all processes make together
                    logger.warning("Step %d was not analysed: %s", state.global_step, error)
            self._since = time.perf_counter()
            self.spent += self._since - now

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Put what was measured since the last log into this one."""
        if logs is None or "loss" not in logs or not self.waiting:
            return
        logs.update(self.waiting)
        if state.log_history:
            state.log_history[-1].update(self.waiting)
        self.waiting = {}

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let go of the file, and say what is missing."""
        if self._file is not None:
            self._file.close()
        if self._unsaved:
            steps = ", ".join(map(str, self._unsaved))
            logger.warning("The reports of steps %s are missing: they could not be written.", steps)
        self._file, self._run, self._unsaved = None, None, []

    def _restore(self, saved: dict[str, Any]) -> None:
        """Go on with what a checkpoint has kept, as far as it is what this callback keeps."""
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
            logger.warning("%s does not go on with what the checkpoint has kept: it is damaged.", type(self).__name__)
            return
        self.spent, self.trained, self.cost, self.waiting = float(spent), float(trained), cost, dict(waiting)

    def _affordable(self, model: nn.Module) -> bool:
        """Whether an analysis now stays within the budget; the main process decides for all."""
        if self.max_overhead is None:
            return True
        if self.cost is None:
            with _processes(model).together(), memory_errors(self.settings):
                cost = _estimate(model, self.blocks, self.settings)
            self.cost = cost  # in all processes or in none
        fits = self.spent + self.cost <= self.max_overhead * self.trained
        return _agreed(fits, next(model.parameters()).device)

    def _analyse(self, model: nn.Module, folder: Path, state: Any) -> None:
        begun = time.perf_counter()
        try:
            report = analyze_blocks(
                model,
                self.blocks,
                self.settings,
                facts=model_facts(model),
                processes=_processes(model),
                progress=False,
            )
        finally:
            self.cost = time.perf_counter() - begun
        measured = numbered(_measured(report), self._before)
        self.waiting = flat_names(measured, self.log)
        if state.is_world_process_zero:
            self._save(report, folder / REPORTS, state.global_step)
        if self._file is not None:
            row = {"step": state.global_step, "epoch": state.epoch, "kind": "effectiveness"}
            self._file.append({**row, "values": measured.values, "layers": measured.layers})

    def _save(self, report: LayerReport, folder: Path, step: int) -> None:
        """Write a report; where that cannot be done, the training goes on, and is told once now and once at its end."""
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
            "Blocks as a mapping are what Blocks.to_dict gives, with ids at least; these have the keys "
            f"{', '.join(map(repr, content)) or 'none'}."
        ) from error


def _tokenizer(processing_class: Any) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a Trainer: what it calls its processing class, or a part of that."""
    found = getattr(processing_class, "tokenizer", processing_class)
    return found if isinstance(found, PreTrainedTokenizerBase) else None


def _settings(blocks: Blocks, scores: Any, fit_blocks: int | None, options: dict[str, Any]) -> Settings:
    names = scores if isinstance(scores, str) else tuple(scores)
    wanted = Settings(scores=names).scores
    if fit_blocks is None:
        fit_blocks = len(blocks) // 2 if "usefulness" in wanted else 0
    length = blocks.input_ids.shape[1]
    try:
        return Settings(
            scores=wanted, fit_blocks=fit_blocks, eval_blocks=len(blocks) - fit_blocks, block_size=length, **options
        )
    except TypeError as error:
        raise SettingsError(f"{', '.join(options)}: not all of these are options of an analysis.") from error


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
    """Seconds that an analysis will take, from the time of a forward pass over one block."""
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


def _agreed(fits: bool, device: torch.device) -> bool:
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return fits
    answer = torch.tensor(float(fits), device=device)
    dist.broadcast(answer, 0)
    return bool(answer.item())


def _processes(model: nn.Module) -> Processes:
    """The processes that share the blocks; of a sharded model each measures all of them."""
    return Processes(0, 1, next(model.parameters()).device) if _is_sharded(model) else Processes.here()


def _is_sharded(model: nn.Module) -> bool:
    """Whether a pass through the model takes all processes together, so that they cannot share the blocks."""
    return any(
        hasattr(weight, "device_mesh") or type(module).__name__.startswith(("FSDP", "FullySharded"))
        for module in model.modules()
        for weight in module.parameters(recurse=False)
    )


def _drop_later_reports(folder: Path, step: int) -> None:
    """Remove the reports of steps that a run which goes on from a checkpoint will take again."""
    for path in folder.glob("step-*.json"):
        number = path.stem.removeprefix("step-").partition(".")[0]
        if number.isdigit() and int(number) > step:
            path.unlink()


@contextmanager
def _unnoticed(model: nn.Module) -> Iterator[None]:
    """Leave random states as they were; modes and gradients are left alone by the analysis itself."""
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
