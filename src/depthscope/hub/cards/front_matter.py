"""The metadata of a model card for the Hub, with every number in a model-index.

YAML quotes the texts. Where the Hub requires a name (the type of a data set or of a metric), the text is converted to a
name, and the full text is stored beside it.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from depthscope.hub.cards.data import DepthCardData, Evaluation
from depthscope.hub.cards.eval_results import TASK, TASK_NAME, accuracy_results, effectiveness_results
from depthscope.report.measures import GLOBAL_SCORES, shown_in

__all__ = ["INDEXED", "evaluation", "front_matter", "perplexity"]

UNNAMED = "unnamed"
# The scores of a report that go into the model-index.
INDEXED = shown_in("index", GLOBAL_SCORES)
LARGEST_LOSS = 230.0  # nats; the perplexity of a larger loss is beyond the largest number of a record


def front_matter(data: DepthCardData) -> ModelCardData:
    """The metadata of a card."""
    results = _distinguish([*_losses(data), *_scores(data), *_accuracies(data)])
    relation: dict[str, Any] = {"base_model_relation": data.base_model_relation} if data.base_model_relation else {}
    return ModelCardData(
        license=data.license,
        license_name=data.license_name,
        license_link=data.license_link,
        language=data.language or None,
        library_name="peft" if data.adapter else "transformers",
        pipeline_tag=TASK,
        tags=_tags(data),
        datasets=data.datasets or None,
        base_model=data.base_model,
        # Without results the Hub would take the name for a key that it does not know.
        model_name=data.title if results else None,
        eval_results=results or None,
        **relation,
    )


def _distinguish(results: list[EvalResult]) -> list[EvalResult]:
    """Give results with equal identifiers but different data set names their name as the configuration.

    huggingface_hub groups results on data sets of one type, configuration and split under the name of the first.
    """
    named: dict[tuple[Any, ...], str] = {}
    for result in results:
        if named.setdefault(result.unique_identifier, result.dataset_name) != result.dataset_name:
            result.dataset_config = result.dataset_name
    return results


def perplexity(loss: float) -> float | None:
    """exp(loss); None if it is too large."""
    return math.exp(loss) if loss < LARGEST_LOSS else None


def _tags(data: DepthCardData) -> list[str]:
    conditions = {
        "moe": data.num_experts is not None,
        "gqa": data.grouped_queries,
        "layernorm-scaling": data.fact("norm_scaling") == "depth",
    }
    return ["depthscope", "curse-of-depth", *(tag for tag, true in conditions.items() if true)]


def _losses(data: DepthCardData) -> Iterator[EvalResult]:
    measured = evaluation(data)
    if measured is None:
        return
    dataset = _dataset_of_text(data, measured.text, measured.split)
    arguments = _without_none({"tokens": measured.tokens})
    yield from effectiveness_results({"loss": short(measured.loss)}, **dataset, arguments=arguments)
    if (value := perplexity(measured.loss)) is not None:
        yield EvalResult(
            task_type=TASK,
            task_name=TASK_NAME,
            dataset_type=dataset["dataset"],
            dataset_name=dataset["dataset_name"],
            dataset_split=dataset["split"],
            metric_type="perplexity",
            metric_name="Perplexity",
            metric_value=short(value),
            metric_args=arguments or None,
        )


def evaluation(data: DepthCardData) -> Evaluation | None:
    """The loss of the model on the largest text that it was measured on, else the report's loss."""
    report = data.report
    loss = report.scores.get("loss") if report else None
    if data.evaluation is not None or report is None or loss is None:
        return data.evaluation
    return Evaluation(
        loss=loss,
        standard_error=report.scores.get("loss_se"),
        text=report.data["name"],
        tokens=report.data.get("tokens"),
        untrained_loss=data.untrained.scores.get("loss") if data.untrained else None,
    )


def _scores(data: DepthCardData) -> Iterator[EvalResult]:
    report = data.report
    if report is None:
        return
    text = report.data
    split = data.evaluation.split if data.evaluation and data.evaluation.text == text["name"] else None
    shared = {name: text.get(name) or None for name in ("tokens", "block_size", "bos", "fingerprint")}
    for name in INDEXED:
        value = report.scores.get(name)
        if value is not None:
            extra = {"threshold": report.settings.get("threshold")} if name == "usefulness" else {}
            dataset = _dataset_of_text(data, text["name"], split)
            yield from effectiveness_results({name: short(value)}, **dataset, arguments=_without_none(shared | extra))


def _accuracies(data: DepthCardData) -> Iterator[EvalResult]:
    for result in accuracy_results(data.accuracies):
        yield replace(
            result,
            dataset_type=as_name(result.dataset_type),
            dataset_name=result.dataset_name or UNNAMED,
            metric_type=as_name(result.metric_type),
            metric_name=result.metric_name or UNNAMED,
            metric_value=short(result.metric_value),
        )


def _dataset_of_text(data: DepthCardData, text: str, split: str | None) -> dict[str, Any]:
    """The data set of a text, by its id on the Hub or else by the text's name, with its name and split."""
    named = [dataset for dataset in data.datasets if text.startswith(dataset)]
    return {"dataset": named[0] if named else as_name(text), "dataset_name": text or UNNAMED, "split": split}


def _without_none(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if value is not None}


def short(value: float) -> float:
    """Round a number to six significant digits."""
    return float(f"{value:.6g}")


def as_name(text: str) -> str:
    """Convert a text to a name that the Hub allows: letters, digits, dots, dashes."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", text)[:96].strip("-.") or "text"
