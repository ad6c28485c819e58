"""A model and names of tasks in, a `Downstream` out: the accuracies that lm-eval measures."""

import logging
import platform
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from depthscope.console.progress import showing_status
from depthscope.console.quiet import quiet
from depthscope.downstream.tasks import Selection, load_tasks, require_lm_eval, select
from depthscope.errors import AnalysisError, SettingsError
from depthscope.layers.facts import model_facts, text_only_notes
from depthscope.layers.modes import evaluating
from depthscope.loading.failures import memory_errors
from depthscope.loading.load import load_model, require_for_loading
from depthscope.loading.loaded import LoadedModel
from depthscope.processes import Processes
from depthscope.report.accuracy import Accuracy, Downstream
from depthscope.wording.messages import one_line
from depthscope.wording.numeric import require_whole

__all__ = ["evaluate"]

PACKAGES = ("depthscope", "lm-eval", "datasets", "torch", "transformers")
# Numbers in lm-eval's results that are not metrics.
NOT_METRICS = ("sample_len",)


def evaluate(
    model: str | Path | nn.Module,
    tokenizer: Any = None,
    *,
    tasks: str | Sequence[str] = "paper",
    data: str | Path | None = None,
    limit: int | None = None,
    shots: int | None = None,
    batch_size: int = 8,
    revision: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    base_model: str | None = None,
    progress: bool = True,
) -> Downstream:
    """Measure the accuracy of a causal language model on downstream tasks, as lm-eval defines them.

    Args:
        model: a Hub id, a folder, a `.gguf` file, a PEFT adapter folder, or a loaded model.
        tokenizer: for a loaded model, its tokenizer.
        tasks: names of lm-eval's tasks, or of a group such as `paper`, separated by commas or as a list.
        data: a folder with the documents as `<task>.jsonl`, so that nothing is downloaded; None reads the Hub.
        limit: the number of documents per task, the first ones; None uses all.
        shots: solved examples before each question; None uses the task's own number, which is 0 for those of `paper`.
        batch_size: answers per forward pass; except for rounding, accuracies do not depend on it.
        revision: branch, tag or commit of a Hub id.
        dtype: "auto" (float32 on a CPU, else the checkpoint's), "float32", "bfloat16" or "float16".
        device: where to run; None chooses, "auto" splits a large model over all devices.
        trust_remote_code: run the code in the model's repository. Off unless you trust who wrote it.
        attn_implementation: as for [`load_model`].
        base_model: as for [`load_model`].
        progress: show a progress bar on a terminal.

    Raises:
        ModelLoadError: the model or its tokenizer cannot be loaded.
        SettingsError: an unknown task, or an option with a value that is not allowed.
        CorpusError: documents that cannot be read.
        OutOfMemoryError: the device is too small; the message says what to lower.
        AnalysisError: lm-eval cannot run a task.
        DepthscopeError: lm-eval is not installed.
    """
    _require_counts(limit, shots, batch_size)
    require_lm_eval()
    selection = select(tasks, data)
    with showing_status("Reading the tasks", visible=progress), _silent(), _random_state_kept():
        loaded_tasks = load_tasks(selection)
    if isinstance(model, nn.Module):
        require_for_loading(revision, base_model, attn_implementation)
        loaded = LoadedModel(model, tokenizer, model_facts(model), text_only_notes(model))
    else:
        with showing_status(f"Loading {model}", visible=progress):
            loaded = load_model(
                model,
                revision=revision,
                dtype=dtype,
                device=device,
                trust_remote_code=trust_remote_code,
                attn_implementation=attn_implementation,
                base_model=base_model,
            )
        loaded.tokenizer = tokenizer or loaded.tokenizer
    loaded.require_tokenizer()
    return _run(loaded, loaded_tasks, selection, limit, shots, batch_size, progress)


def _run(
    loaded: LoadedModel,
    tasks: Mapping[str, Any],
    selection: Selection,
    limit: int | None,
    shots: int | None,
    batch_size: int,
    progress: bool,
) -> Downstream:
    from lm_eval import evaluate as run

    from depthscope.downstream.harness import HarnessModel  # its base class is lm-eval's

    terminal = sys.stderr
    with evaluating(loaded.model), torch.no_grad(), _run_errors(batch_size), _silent(), _random_state_kept():
        _set_shots(tasks, shots)
        harness = HarnessModel(loaded, batch_size=batch_size, progress=progress, terminal=terminal)
        # Not simple_evaluate: it lists the packages of the machine, which takes seconds, and seeds every generator.
        results = run(harness, {"tasks": dict(tasks)}, limit=limit)
    if results is None:
        raise AnalysisError("lm-eval gave no results; run depthscope evaluate in one process, without torchrun.")
    return Downstream(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        model=loaded.facts,
        accuracies=[row for name in results["results"] for row in _rows(results, name, selection)],
        settings={"limit": limit, "batch_size": batch_size, "tasks": _definitions(results)},
        versions={**{name: version(name) for name in PACKAGES}, "python": platform.python_version()},
        notes=[*loaded.notes, *selection.notes, *_notes(harness.truncated, harness.questions, limit)],
    )


def _rows(results: Mapping[str, Any], task: str, selection: Selection) -> Iterator[Accuracy]:
    """The metrics of one task: lm-eval names them `metric,filter`, and their errors `metric_stderr,filter`."""
    values, config = results["results"][task], results["configs"].get(task, {})
    for key, value in values.items():
        metric, _, chosen = key.partition(",")
        if metric in NOT_METRICS or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        error = values.get(f"{metric}_stderr,{chosen}")
        yield Accuracy(
            task=task,
            metric=metric if chosen in ("", "none") else f"{metric} ({chosen})",
            value=float(value),
            stderr=float(error) if isinstance(error, (int, float)) else None,
            chance=_chance(results["samples"].get(task, []), config),
            n=int(values["sample_len"]),
            shots=int(results["n-shot"].get(task) or 0),
            documents=_documents(config, selection.files.get(task)),
        )


def _chance(samples: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> float | None:
    """The accuracy of guessing: the mean of 1 / number of answers; each answer is one request of a document."""
    if config.get("output_type") != "multiple_choice" or not samples:
        return None
    return sum(1 / len(sample["arguments"]) for sample in samples) / len(samples)


def _documents(config: Mapping[str, Any], file: Path | None) -> str | None:
    if file is not None:
        return file.name
    split = config.get("test_split") or config.get("validation_split")
    return ", ".join(filter(None, (config.get("dataset_path"), config.get("dataset_name"), split))) or None


def _definitions(results: Mapping[str, Any]) -> dict[str, Any]:
    """lm-eval's version of each task: results of different versions are not comparable."""
    return {task: {"version": str(number)} for task, number in results["versions"].items()}


def _notes(truncated: int, questions: int, limit: int | None) -> Iterator[str]:
    if limit is not None:
        first = "document of each task was" if limit == 1 else f"{limit} documents of each task were"
        yield f"Only the first {first} evaluated; the accuracies are estimates."
    if truncated:
        yield (
            f"{truncated} of {questions} questions with an answer have more tokens than the model has positions; their "
            "beginning was cut."
        )


def _set_shots(tasks: Mapping[str, Any], shots: int | None) -> None:
    """Set the number of solved examples like lm-eval's own command: a task with a fixed 0 keeps 0."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    for task in tasks.values():
        own = task.get_config("num_fewshot")
        task.set_config(key="num_fewshot", value=(own or 0) if shots is None or own == 0 else shots)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)


def _require_counts(limit: int | None, shots: int | None, batch_size: int) -> None:
    for name, value, least in (("limit", limit, 1), ("shots", shots, 0), ("batch_size", batch_size, 1)):
        if value is not None or name == "batch_size":
            require_whole(name, value, least)
    if Processes.here().count > 1:
        raise SettingsError("Downstream tasks need a single process; start depthscope evaluate without torchrun.")


@contextmanager
def _silent() -> Iterator[None]:
    """Keep log lines and progress bars, also those of lm-eval, off the terminal."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    try:
        logger.setLevel(logging.CRITICAL)
        with quiet():
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """Restore the state of Python's random numbers, so that an evaluation does not change a running training."""
    state = random.getstate()
    try:
        yield
    finally:
        random.setstate(state)


@contextmanager
def _run_errors(batch_size: int) -> Iterator[None]:
    try:
        with memory_errors(f"the batch size (now {batch_size})"):
            yield
    except (ValueError, LookupError, AssertionError) as error:
        if isinstance(error, SettingsError):
            raise
        raise AnalysisError(f"lm-eval cannot run these tasks: {one_line(error)}") from error
