"""One point of a sweep: train a model with transformers' Trainer, measure it, write the result.

`depthscope.runs.layout` names its files. A file that exists and is intact is finished: an interrupted point resumes
from its last checkpoint or measurement. Damaged files are made again, with a note.
"""

import json
import math
import os
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from depthscope.analysis.analyze import analyze_blocks
from depthscope.callbacks import EffectivenessCallback, SparsityCallback, VarianceCallback
from depthscope.console.quiet import quiet
from depthscope.errors import NonFiniteError, ReportError, SweepError
from depthscope.files.atomic import is_access_error, write_atomically
from depthscope.files.checksums import checksum, checksums, damaged_file, sealed
from depthscope.layers.facts import model_facts
from depthscope.layers.modes import evaluating
from depthscope.models import DepthLMConfig, DepthLMForCausalLM, model_size
from depthscope.processes import Processes
from depthscope.report.report import LayerReport
from depthscope.runs.finished_files import keep_checksums, known_checksums, report_checksum
from depthscope.runs.layout import (
    DIVERGED,
    ENVIRONMENT,
    FAILED,
    FINISHED,
    HISTORY,
    LOG,
    MODEL,
    POINT,
    RESULT,
    TRAINED_REPORT,
    UNREADABLE,
    UNTRAINED_REPORT,
    checkpoint_folder,
    is_published,
    point_folder,
    step_folder,
)
from depthscope.scores.base import Values, block_losses, values_with_errors
from depthscope.settings import Settings
from depthscope.sweep.checkpoints import mark_complete, remove_checkpoints, unreadable_file, usable_checkpoint
from depthscope.sweep.cost.hardware import choose_attention, choose_precision
from depthscope.sweep.data import Corpus, Sequences
from depthscope.sweep.grid import Point
from depthscope.sweep.recorded import read_record, settings_of
from depthscope.sweep.specification import Specification
from depthscope.sweep.trainer_fields import trainer_fields
from depthscope.wording.messages import one_line

__all__ = ["PointRun", "ReportProgress", "forget_measurements", "recorded_status", "run_point", "status_if_done"]

PACKAGES = ("depthscope", "transformers", "torch", "accelerate", "datasets", "tokenizers", "numpy")

# Receives the progress: the stage, the work done and all work (in steps), and the last loss.
ReportProgress = Callable[[str, int, int, float | None], None]


@dataclass
class PointRun:
    """Trains and measures one point; `run` does the remaining work."""

    point: Point
    specification: Specification
    corpus: Corpus
    block_size: int  # of the measurements
    out: Path
    report: ReportProgress = lambda stage, done, total, loss: None
    note: Callable[[str], None] = lambda line: None  # called with a message about damaged files

    @property
    def folder(self) -> Path:
        """The folder of the point."""
        return point_folder(self.out, self.point.name)

    def run(self) -> str:
        """Do the remaining work, and return the status."""
        done = status_if_done(self.folder)
        if done is not None:
            return done
        processes = Processes.here()
        if processes.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / RESULT).unlink(missing_ok=True)  # of a failure
            self._write(POINT, self._facts() | self._decided())
            self._drop_damaged_model()
        _wait(processes)
        status = FINISHED
        if not (self.folder / MODEL).is_dir():
            status = self._train(processes)
        result: dict[str, Any] = {"status": status}
        if status == FINISHED:
            result = self._measure(processes)
        if processes.is_main:
            remove_checkpoints(self.folder)
            self._write(RESULT, {**self._facts(), **result})
        _wait(processes)
        return result["status"]

    # Training

    def _train(self, processes: Processes) -> str:
        started = time.perf_counter()
        trainer = self.trainer()
        watch = _Watch(self, trainer)
        trainer.add_callback(watch)
        last = usable_checkpoint(self.folder, processes, self._note)
        if processes.is_main and last is not None and (last / HISTORY).is_file():
            write_atomically(self.folder / HISTORY, (last / HISTORY).read_bytes())
        with quiet():
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
        if processes.is_main:
            lines = [json.dumps(_finite(row), sort_keys=True) for row in trainer.state.log_history if "loss" in row]
            write_atomically(self.folder / LOG, "".join(line + "\n" for line in lines))
            self._environment(trainer.args, trainer.model, time.perf_counter() - started)
            written = [name for name in (LOG, HISTORY) if (self.folder / name).is_file()]
            keep_checksums(self.folder, {name: checksum(self.folder / name) for name in written})
        if watch.diverged_at is None:
            save_model(trainer, self.folder / MODEL, processes, self._keep_model_checksums)
        _wait(processes)
        return FINISHED if watch.diverged_at is None else DIVERGED

    def trainer(self) -> Trainer:
        """The Trainer of this point, ready to train."""
        training = self.point.training
        arguments = self.arguments()
        trainer = Trainer(
            self.model(),
            arguments,
            train_dataset=Sequences(
                self.corpus, training.sequence_length, training.steps * training.sequences, self.point.seed
            ),
            data_collator=default_data_collator,  # every sequence is full; there is nothing to pad
            processing_class=self.corpus.tokenizer,
            callbacks=self._callbacks(),
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def model(self) -> DepthLMForCausalLM:
        """The untrained model of the point's seed."""
        training = self.point.training
        config = self.config()
        precision = choose_precision(training.precision)
        config._attn_implementation = choose_attention(training.attention, precision, training.sequence_length)
        set_seed(self.point.seed)
        return DepthLMForCausalLM(config)

    def config(self) -> DepthLMConfig:
        """The configuration of the model, for the sweep's tokenizer."""
        tokenizer = self.corpus.tokenizer
        # No pad token, since its embedding would be zero. If it were the end-of-text token too, such a token at the
        # start of a sequence would keep the residual stream at zero in every layer, where a norm multiplies gradients
        # by 1 / sqrt(eps).
        rows = self.specification.tokenizer.rows(len(tokenizer))
        return self.point.config(rows, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)

    def arguments(self) -> TrainingArguments:
        """The settings as arguments of the Trainer."""
        training, tracking = self.point.training, self.specification.tracking
        steps = training.steps
        log_every = tracking.log_every or max(1, steps // 100)
        # A checkpoint lacks the losses since the last log, so checkpoints are only saved at logs.
        save_every = _next_multiple(tracking.checkpoint_every or math.ceil(steps / 5), log_every)
        return TrainingArguments(
            output_dir=str(self.folder),
            **trainer_fields(training, int(os.environ.get("WORLD_SIZE", "1"))),
            bf16=choose_precision(training.precision) == "bfloat16",
            torch_compile=training.compile,
            use_cpu=not (torch.cuda.is_available() or torch.backends.mps.is_available()),
            seed=self.point.seed,
            train_sampling_strategy="sequential",
            logging_steps=log_every,
            logging_nan_inf_filter=False,
            save_steps=save_every,
            save_total_limit=2,
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        )

    def _callbacks(self) -> list[TrainerCallback]:
        tracking = self.specification.tracking
        callbacks: list[TrainerCallback] = []
        if tracking.variance:
            callbacks.append(VarianceCallback(log="none"))
        if tracking.sparsity_every:
            callbacks.append(SparsityCallback(every=tracking.sparsity_every, log="none"))
        if tracking.effectiveness_every:
            settings = self._settings()
            blocks = self._blocks(settings)
            every = tracking.effectiveness_every
            callbacks.append(
                EffectivenessCallback(
                    blocks,
                    settings.scores,
                    every,
                    max_overhead=None,
                    fit_blocks=settings.fit_blocks,
                    log="none",
                    threshold=settings.threshold,
                    pairs=settings.pairs,
                    probes=settings.probes,
                    seed=settings.seed,
                )
            )
        return callbacks

    # Files of an earlier run

    def _drop_damaged_model(self) -> None:
        """Remove a damaged trained model, so that it is trained again."""
        folder = self.folder / MODEL
        if not folder.is_dir():
            return
        try:
            sums = known_checksums(self.folder) or {}
        except ReportError as error:
            if is_access_error(error):
                raise
            sums = {}
            self._note(f"{str(error).rstrip('.')}, so its files cannot be checked")
        sums = {name.removeprefix(f"{MODEL}/"): value for name, value in sums.items() if "/" in name}
        # First the files that the scores depend on.
        damaged = damaged_file(folder, dict(sorted(sums.items(), key=lambda item: not _is_needed(item[0]))))
        damaged = damaged or unreadable_file(folder)
        if damaged is None:
            return
        if not _is_needed(damaged):
            self._note(
                f"{MODEL}/{damaged} is damaged, which the scores do not need; replace it before the model is used"
            )
            return
        shutil.rmtree(folder)
        self._note(f"the trained model is damaged ({MODEL}/{damaged}), and is trained again")

    def _keep_model_checksums(self, part: Path) -> None:
        keep_checksums(self.folder, {f"{MODEL}/{name}": value for name, value in checksums(part).items()})

    def _has_report(self, name: str) -> bool:
        """Whether there is an intact report."""
        if not (self.folder / name).is_file():
            return False
        try:
            report = LayerReport.load(self.folder / name)
            sums = (known_checksums(self.folder) or {}).get(name)
            if sums in (None, report_checksum(report)):
                return True
        except ReportError as error:  # of the report or of the checksums; without these the report cannot be checked
            if is_access_error(error):
                raise
        self._note(f"{name} is damaged and is measured again")
        return False

    def _note(self, line: str) -> None:
        self.note(f"{self.point.name}: {line}")

    # Measuring

    def _measure(self, processes: Processes) -> dict[str, Any]:
        result: dict[str, Any] = {"status": FINISHED}
        size = model_size(self.config(), self.point.training.sequence_length)
        result |= {"parameters": size.total, "active_parameters": size.active}
        result["flops"] = self.point.flops(self.config().vocab_size)
        if self.specification.scoring.untrained:
            self.report("untrained", 0, 0, None)
            before, _ = self._score(self._control(), UNTRAINED_REPORT, processes)
            result["untrained_loss"] = before if math.isfinite(before) else None
        self.report("measuring", 0, 0, None)
        with quiet():
            model = DepthLMForCausalLM.from_pretrained(self.folder / MODEL, dtype=torch.float32)
        try:
            result["loss"], result["loss_se"] = self._score(model, TRAINED_REPORT, processes)
        except NonFiniteError:
            return {"status": DIVERGED}
        return result if math.isfinite(result["loss"]) else {"status": DIVERGED}

    def _control(self) -> DepthLMForCausalLM:
        model = self.model()
        model.set_attn_implementation("sdpa")
        return model

    def _score(self, model: DepthLMForCausalLM, name: str, processes: Processes) -> tuple[float, float | None]:
        """Write the report of a model if it is missing, and return its held-out loss in nats and its error."""
        model.to(processes.device)  # type: ignore[arg-type]
        settings = self._settings()
        blocks = self._blocks(settings)
        if not self._has_report(name):
            facts = model_facts(model) | {"name": self.point.name, "source": "sweep"}
            report = analyze_blocks(model, blocks, settings, facts=facts, processes=processes, progress=False)
            if processes.is_main:
                keep_checksums(self.folder, {name: report_checksum(report)})
                report.save(self.folder / name)
        count = max(1, self.specification.scoring.loss_tokens // settings.block_size)
        rows = self.corpus.held_out_blocks(count, settings.block_size).input_ids
        return held_out_loss(model, rows, processes)

    def _settings(self) -> Settings:
        return self.specification.scoring.settings(self.block_size)

    def _blocks(self, settings: Settings) -> Any:
        return self.corpus.held_out_blocks(settings.fit_blocks + settings.eval_blocks, settings.block_size)

    def record_failure(self, error: str) -> None:
        """Record that the point failed; the next run tries it again."""
        self._write(RESULT, {**self._facts(), "status": FAILED, "error": error})

    # Records

    def _facts(self) -> dict[str, Any]:
        point = self.point
        return {
            "point": point.name,
            "variant": point.variant,
            "seed": point.seed,
            "settings": point.varied,
            "model": point.model,
            "training": point.training.model_dump(),
        }

    def _decided(self) -> dict[str, Any]:
        settings = settings_of(self.specification, self.corpus.span, self.block_size)
        return settings | {"tokens": self.corpus.tokens.model_dump()}

    def _write(self, name: str, content: dict[str, Any]) -> None:
        write_atomically(self.folder / name, json.dumps(sealed(content), indent=1) + "\n")

    def _environment(self, arguments: TrainingArguments, model: Any, seconds: float) -> None:
        self._write(
            ENVIRONMENT,
            {
                "versions": {name: version(name) for name in PACKAGES},
                "python": platform.python_version(),
                "processor": _processor(),
                "processes": arguments.world_size,
                "threads": torch.get_num_threads(),
                "precision": "bfloat16" if arguments.bf16 else "float32",
                "attention": model.config._attn_implementation,
                "seconds": round(seconds, 1),
            },
        )


def run_point(
    point: Point,
    specification: Specification,
    corpus: Corpus,
    block_size: int,
    out: Path,
    report: ReportProgress,
    note: Callable[[str], None],
) -> str:
    """Run one point, and record a failure instead of raising it, so that the other points continue."""
    run = PointRun(point, specification, corpus, block_size, out, report, note)
    try:
        return run.run()
    except Exception as error:
        if Processes.here().count > 1:
            raise  # the other processes wait for this one
        cause = f"{type(error).__name__}: {one_line(error)}"
        try:
            run.folder.mkdir(parents=True, exist_ok=True)
            run.record_failure(cause)
        except (OSError, ReportError) as unrecorded:  # the other points may still be writable
            note(f"{point.name}: {cause} ({one_line(unrecorded)})")
        return FAILED


def status_if_done(folder: Path) -> str | None:
    """The status of the point in a folder if it needs no other run: finished, diverged or unreadable; else None."""
    try:
        status = recorded_status(folder)
    except SweepError:
        return UNREADABLE
    return None if status == FAILED else status


def recorded_status(folder: Path) -> str | None:
    """The status in the result of the point in a folder; None without a result.

    Raises:
        SweepError: the result is damaged; the message names it and says what to do.
    """
    path = folder / RESULT
    if not os.path.lexists(path):
        return None
    remedy = "Delete it and run again, which measures the trained model again."
    status = read_record(path, remedy).get("status")
    if status not in (FINISHED, DIVERGED, FAILED):
        raise SweepError(f"{path} is damaged: it has no status. {remedy}")
    return str(status)


def forget_measurements(folder: Path) -> None:
    """Remove the measurements of a point; its trained model is kept."""
    for name in (RESULT, TRAINED_REPORT, UNTRAINED_REPORT):  # the result first: without it, the point is not finished
        (folder / name).unlink(missing_ok=True)


@torch.no_grad()
def held_out_loss(
    model: DepthLMForCausalLM, rows: Tensor, processes: Processes, batch: int = 8
) -> tuple[float, float | None]:
    """The mean loss [nats per token] over blocks [N, T], in the model's own precision; each process computes a share.

    Returns:
        The loss, and its standard error over the blocks (`depthscope.scores.base`); None for one block.
    """
    losses = torch.zeros(len(rows), dtype=torch.float64)  # [N] summed over the tokens of a block
    with processes.together(), evaluating(model):
        for first in processes.share(range(0, len(rows), batch)):
            ids = rows[first : first + batch].to(processes.device)
            logits = model(ids, use_cache=False).logits
            batch_losses = block_losses(logits, ids, torch.ones_like(ids[:, 1:], dtype=torch.bool))
            losses[first : first + batch] = torch.from_numpy(batch_losses)
    processes.add_up(losses)
    tables = {"loss": losses.numpy(), "targets": np.full(len(rows), rows.shape[1] - 1.0)}
    value, error = values_with_errors(lambda sums: Values(scores={"loss": sums["loss"] / sums["targets"]}), tables)
    spread = float(error.scores["loss"])
    return float(value.scores["loss"]), spread if math.isfinite(spread) else None


def save_model(
    trainer: Trainer, folder: Path, processes: Processes, before_rename: Callable[[Path], None] = lambda part: None
) -> None:
    """Save a model, its tokenizer and code, completely or not at all; every process takes part.

    Args:
        trainer: the Trainer of the model.
        folder: the folder to write.
        processes: the processes that train it.
        before_rename: called in the main process with the complete temporary folder, before it is renamed.
    """
    part = folder.with_name(f".{folder.name}.part")
    if processes.is_main:
        shutil.rmtree(part, ignore_errors=True)
        part.parent.mkdir(parents=True, exist_ok=True)
    _wait(processes)
    with quiet():
        trainer.save_model(str(part))
    if processes.is_main:
        (part / "training_args.bin").unlink(missing_ok=True)  # a pickle; point.json holds the same settings
        before_rename(part)
        os.replace(part, folder)
    _wait(processes)


class _Watch(TrainerCallback):
    """Reports the progress, saves published steps, marks complete checkpoints, and stops a training that diverges."""

    def __init__(self, run: PointRun, trainer: Trainer) -> None:
        self._run, self._trainer = run, trainer
        self._every = run.specification.tracking.publish_every
        self.diverged_at: int | None = None
        self._loss: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._publish(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._run.report("training", state.global_step, state.max_steps, self._loss)
        self._publish(state)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self._loss = (logs or {}).get("loss", self._loss)
        if self._loss is not None and not math.isfinite(self._loss) and self.diverged_at is None:
            self.diverged_at = state.global_step
            control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _wait(Processes.here())  # each process writes its part
        # A run resumed from weights that are not finite would log nothing that shows it.
        if state.is_world_process_zero and self.diverged_at is None:
            checkpoint = checkpoint_folder(self._run.folder, state.global_step)
            history = self._run.folder / HISTORY
            if history.is_file():
                shutil.copyfile(history, checkpoint / HISTORY)
            mark_complete(checkpoint)

    def _publish(self, state: Any) -> None:
        step = state.global_step
        if self._every is None or not is_published(step, self._every):
            return
        folder = step_folder(self._run.folder, step)
        if not folder.is_dir():
            save_model(self._trainer, folder, Processes.here())


def _is_needed(name: str) -> bool:
    """Whether the scores of a model depend on this file."""
    return ".safetensors" in name or name in ("config.json", "generation_config.json")


def _next_multiple(number: int, of: int) -> int:
    return -(-number // of) * of


def _wait(processes: Processes) -> None:
    if processes.count > 1:
        torch.distributed.barrier()


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the log for JSON, without the layers, which are in layer_stats.jsonl."""
    numbers = {name: value for name, value in row.items() if not name.startswith("layers/")}
    return {name: value if math.isfinite(value) else None for name, value in numbers.items()}


def _processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
