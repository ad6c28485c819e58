"""Measured scores as evaluation results of the Hub, which `huggingface_hub.metadata_update` writes to a model-index.

The Hub identifies a result by everything but its value, so that measuring again with `overwrite=True` replaces a number
instead of adding one. Therefore standard errors, which change with the value, are left out here.
"""

import math
import reprlib
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index

from depthscope.errors import SettingsError
from depthscope.report.accuracy import Accuracy
from depthscope.report.measures import GLOBAL_SCORES, Term
from depthscope.wording.scalars import finite_number, plain_scalars

__all__ = ["accuracy_results", "effectiveness_results", "model_index"]

TASK, TASK_NAME = "text-generation", "Text Generation"


def effectiveness_results(
    scores: Mapping[str, Any],
    *,
    dataset: str,
    dataset_name: str | None = None,
    config: str | None = None,
    split: str | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> list[EvalResult]:
    """The global scores of a report (`report.scores`) or of the measurement `layer_effectiveness` as results.

    Args:
        scores: numbers of Python, NumPy or PyTorch by name; lists, standard errors, None and numbers that are not
            finite are left out.
        dataset: the id on the Hub of the text's data set.
        dataset_name: its name for people.
        config: its configuration.
        split: its split.
        arguments: the settings of the measurement, such as the number of tokens; plain texts and numbers.

    Raises:
        SettingsError: a score is not a number, or the Hub's metadata cannot hold an argument.
    """
    numbers = {name: _number(name, scores.get(name)) for name in GLOBAL_SCORES if not name.endswith("_se")}
    written = {name: _argument(name, plain_scalars(value)) for name, value in (arguments or {}).items()}
    return [
        EvalResult(
            task_type=TASK,
            task_name=TASK_NAME,
            dataset_type=dataset,
            dataset_name=dataset_name or dataset,
            dataset_config=config,
            dataset_split=split,
            metric_type=name,
            metric_name=_metric_name(GLOBAL_SCORES[name]),
            metric_value=number,
            metric_args=written or None,
        )
        for name, number in numbers.items()
        if number is not None
    ]


def accuracy_results(accuracies: Iterable[Accuracy]) -> list[EvalResult]:
    """Accuracies on downstream tasks as results of the Hub; the data set has lm-eval's name of the task."""
    return [
        EvalResult(
            task_type=TASK,
            task_name=TASK_NAME,
            dataset_type=row.task,
            dataset_name=row.task,
            metric_type=row.metric,
            metric_name=row.metric,
            metric_value=float(row.value),
            metric_args={"num_few_shot": row.shots} if row.shots is not None else None,
        )
        for row in accuracies
    ]


def model_index(model_name: str, results: list[EvalResult]) -> dict[str, Any]:
    """The metadata of these results for `metadata_update(repo_id, metadata, overwrite=True)`."""
    return {"model-index": eval_results_to_model_index(model_name, results)}


def _metric_name(term: Term) -> str:
    unit = f" ({term.unit})" if term.unit else ""
    return f"{term.label[:1].upper()}{term.label[1:]}{unit}"


def _number(name: str, value: Any) -> float | None:
    """A score as a Python number; None if it is missing, or has one value per layer."""
    value = plain_scalars(value)
    if value is None or isinstance(value, list) or getattr(value, "shape", None):
        return None
    if isinstance(value, bool) or not isinstance(value, Real):
        raise SettingsError(
            f"The score {name!r} is {reprlib.repr(value)}, expected a number; convert it, or leave it out."
        )
    return float(value) if math.isfinite(value) else None


def _argument(name: str, value: Any) -> Any:
    """Check that YAML and the Hub can store a value and all its parts unchanged."""
    if isinstance(value, (list, dict)):
        for part in [*value, *value.values()] if isinstance(value, dict) else value:
            _argument(name, part)
    elif value is not None and not isinstance(value, (str, int)) and finite_number(value) is None:
        raise SettingsError(
            f"The argument {name!r} holds {reprlib.repr(value)}, expected a text, a finite number, true or false, or "
            "lists and objects of such; convert it, or leave it out."
        )
    return value
