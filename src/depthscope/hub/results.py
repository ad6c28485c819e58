"""Measured scores as results of the Hub: what `huggingface_hub.metadata_update` writes into a card's model-index.

A result is told apart from another by everything but its value, so that measuring again with `overwrite=True` replaces
a number instead of adding one. That is why standard errors, which change with the value, are left out here.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index

from depthscope.downstream.record import Accuracy
from depthscope.glossary import GLOBAL_SCORES, Term

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
        scores: numbers by name; lists, standard errors, and what is None or not finite are left out.
        dataset: the data set that the text came from, by its id on the Hub.
        dataset_name: what people call it.
        config: its configuration.
        split: its split.
        arguments: how it was measured, for example the number of tokens.
    """
    return [
        EvalResult(
            task_type=TASK,
            task_name=TASK_NAME,
            dataset_type=dataset,
            dataset_name=dataset_name or dataset,
            dataset_config=config,
            dataset_split=split,
            metric_type=name,
            metric_name=_called(term),
            metric_value=float(scores[name]),
            metric_args=dict(arguments) if arguments else None,
        )
        for name, term in GLOBAL_SCORES.items()
        if not name.endswith("_se") and _is_number(scores.get(name))
    ]


def accuracy_results(accuracies: Iterable[Accuracy]) -> list[EvalResult]:
    """Accuracies on downstream tasks as results of the Hub; the data set is called as lm-eval calls the task."""
    return [
        EvalResult(
            task_type=TASK,
            task_name=TASK_NAME,
            dataset_type=row.task,
            dataset_name=row.task,
            metric_type=row.metric,
            metric_name=row.metric,
            metric_value=row.value,
            metric_args={"num_few_shot": row.shots} if row.shots is not None else None,
        )
        for row in accuracies
    ]


def model_index(model_name: str, results: list[EvalResult]) -> dict[str, Any]:
    """The metadata with these results, as `metadata_update(repo_id, metadata, overwrite=True)` takes it."""
    return {"model-index": eval_results_to_model_index(model_name, results)}


def _called(term: Term) -> str:
    unit = f" ({term.unit})" if term.unit else ""
    return f"{term.label[:1].upper()}{term.label[1:]}{unit}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
