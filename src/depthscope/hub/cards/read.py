"""Reading the data of a model card from the model's folder.

    a point of a sweep          point.json, result.json, environment.json, the two reports, log.jsonl,
                                layer_stats.jsonl, model/, and sweep.json and sweep.yaml two folders up
    a Trainer's output folder   trainer_state.json (its own, or that of its last checkpoint), layer_stats.jsonl
    a saved model's folder      config.json, *.safetensors

Each file is optional, and any folder may have a layer_report.json. JSON, JSON lines and YAML are read up to a bound;
nothing is unpickled, so training_args.bin is not opened. NaN and Infinity, which transformers and PEFT write, are read
as null.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from safetensors import SafetensorError, safe_open

from depthscope.errors import ReportError, SettingsError
from depthscope.files.atomic import read_text, reason, require_opens
from depthscope.files.validation import MAX_BYTES, MAX_FLOAT, read_object
from depthscope.hub.cards import data as card
from depthscope.hub.cards.data import LAYER_COLUMNS, DepthCardData, Evaluation, Relation, VarianceCurves, rounded
from depthscope.hub.errors import why_no_repository
from depthscope.loading.checkpoint import ADAPTER_CONFIG, CONFIG, find_relative_folder
from depthscope.report.accuracy import Accuracy
from depthscope.report.report import LayerReport
from depthscope.runs.layout import (
    ENVIRONMENT,
    LOG,
    MODEL,
    POINT,
    RESULT,
    SWEEP_FILE,
    SWEEP_INDEX,
    TRAINED_REPORT,
    TRAINER_STATE,
    UNTRAINED_REPORT,
    checkpoints,
)
from depthscope.runs.read import TrainingCurve, losses, losses_of, variances
from depthscope.wording.scalars import finite_number

if TYPE_CHECKING:
    from transformers import TrainingArguments

__all__ = ["read_card_data"]

MOST_POINTS = 100  # of a curve; more would overlap
DRAWN = {
    "layer",
    "kind",
    "attention_variance",
    "mlp_variance",
    *(column for name in LAYER_COLUMNS for column in (name, f"{name}_se")),
}
HELD_OUT = "held-out"
# The names in TrainingArguments -> the card's names.
ARGUMENTS = {
    "max_steps": "steps",
    "num_train_epochs": "epochs",
    "learning_rate": "learning_rate",
    "lr_scheduler_type": "schedule",
    "warmup_steps": "warmup_steps",
    "weight_decay": "weight_decay",
    "adam_beta1": "adam_beta1",
    "adam_beta2": "adam_beta2",
    "adam_epsilon": "adam_epsilon",
    "max_grad_norm": "max_grad_norm",
    "gradient_checkpointing": "gradient_checkpointing",
    "seed": "seed",
    "optim": "optimizer",
}
# Settings in point.json with the same names on the card.
POINT_SETTINGS = (
    "sequence_length",
    "batch_tokens",
    "learning_rate",
    "schedule",
    "warmup_steps",
    "min_learning_rate",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "gradient_checkpointing",
)
Row = dict[str, Any]


def read_card_data(
    folder: str | os.PathLike[str],
    *,
    repo_id: str,
    license: str | None = None,
    language: Sequence[str] = (),
    datasets: Sequence[str] | None = None,
    base_model: str | None = None,
    base_model_relation: Relation | None = None,
    native_repo: str | None = None,
    revisions: Sequence[str] = (),
    reports_dataset: str | None = None,
    collection: str | None = None,
    training_args: "TrainingArguments | Mapping[str, Any] | None" = None,
    accuracies: Sequence[Accuracy] | None = None,
) -> DepthCardData:
    """Read the data of a model's card from its folder; missing files are missing in the record.

    Args:
        folder: a point of a sweep, the output folder of a Trainer, or the folder of a saved model.
        repo_id: where the model is published.
        license: the Hub's identifier; without one the card says that no licence was chosen.
        language: language codes.
        datasets: data sets of the Hub that it was trained on; by default the one that the sweep names.
        base_model: the model on the Hub that it derives from; by default the one that an adapter names.
        base_model_relation: adapter, finetune, merge or quantized.
        native_repo: repository of the same model in an architecture of transformers.
        revisions: branches with checkpoints of the training.
        reports_dataset: data set with the reports of the sweep.
        collection: slug of the collection of the sweep.
        training_args: the TrainingArguments, as an object or as its JSON.
        accuracies: accuracies on downstream tasks; by default those in the report.

    Raises:
        SettingsError: there is no such folder, or the Hub does not accept a value.
        ReportError: a file in the folder is damaged; the message names it.
    """
    root = Path(folder).resolve()  # so that the sweep's folder is two levels up
    if not root.is_dir():
        raise SettingsError(f"There is no folder {str(folder)!r}: give the folder of a trained model.")
    model = root / MODEL if (root / MODEL).is_dir() else root
    adapter = read_object(model / ADAPTER_CONFIG)
    if base_model is None and (named := _repository(adapter.get("base_model_name_or_path"), model)):
        base_model, base_model_relation = named, base_model_relation or "adapter"
    report, untrained = _report(root / TRAINED_REPORT), _report(root / UNTRAINED_REPORT)
    result = read_object(root / RESULT)
    values: Row = {
        "repo_id": repo_id,
        "license": license,
        "language": list(language),
        "base_model": base_model,
        "base_model_relation": base_model_relation,
        "native_repo": native_repo,
        "revisions": list(revisions),
        "reports_dataset": reports_dataset,
        "collection": collection,
        "accuracies": list((report.downstream if report else []) if accuracies is None else accuracies),
        "config": rounded(read_object(model / CONFIG)),
        "adapter": bool(adapter),
        "tokenizer": (model / "tokenizer_config.json").is_file(),
        "parameters": result.get("parameters") or _parameters(model, report),
        "active_parameters": result.get("active_parameters"),
        "report": report,
        "untrained": untrained,
    }
    facts = _point_facts(root, report, result) if (root / POINT).is_file() else _trainer_facts(root)
    training = _argument_facts(training_args) | facts.pop("training")
    if datasets is None:
        datasets = facts.pop("datasets", [])
    facts.pop("datasets", None)
    return DepthCardData.checked(**values, **facts, datasets=list(datasets), training=rounded(training))


# ------------------------------------------------------------------------------------------------- a point of a sweep


def _point_facts(root: Path, report: LayerReport | None, result: Row) -> Row:
    point, environment = read_object(root / POINT), read_object(root / ENVIRONMENT)
    sweep = root.parent.parent
    index, specification = read_object(sweep / SWEEP_INDEX), _yaml(sweep / SWEEP_FILE)
    settings, text = _mapping(point, "training"), _mapping(index, "data").get("name")
    batch = settings.get("batch_tokens")
    steps = settings["tokens"] // batch if batch and settings.get("tokens") else None
    training: Row = {name: settings[name] for name in POINT_SETTINGS if settings.get(name) is not None}
    training |= {
        "text": text,
        "steps": steps,
        "tokens": steps * batch if steps else None,
        "batch_sequences": batch // settings["sequence_length"] if batch and settings.get("sequence_length") else None,
        "optimizer": "AdamW",
        "seed": point.get("seed"),
        "flops": result.get("flops"),
        **{name: environment.get(name) for name in ("precision", "attention", "processor", "processes", "seconds")},
    }
    dataset = _repository(str(_mapping(specification, "data").get("dataset") or "").partition(":")[0])
    curve = losses(root)
    if curve.unread:
        raise ReportError(f"{str(root / LOG)!r} has a line that is not JSON; it is damaged.")
    return {
        "sweep": {
            "name": index.get("name") or sweep.name,
            "description": index.get("description") or "",
            "point": point.get("point") or root.name,
            "varied": rounded(_mapping(point, "settings")),
        },
        "training": training,
        "datasets": [dataset] if dataset else [],
        "evaluation": _evaluation(result, report, text, _mapping(specification, "scoring")),
        "losses": _losses(curve, batch),
        "variances": _variances(root, batch),
        "versions": {str(name): str(value) for name, value in _mapping(environment, "versions").items()},
    }


def _evaluation(result: Row, report: LayerReport | None, text: Any, scoring: Row) -> Evaluation | None:
    """The loss on the held-out text, which is longer than the text of the scores."""
    if not isinstance(result.get("loss"), (int, float)):
        return None
    size = report.data.get("block_size") if report else None
    loss_tokens = scoring.get("loss_tokens")
    return Evaluation(
        loss=rounded(float(result["loss"])),
        text=report.data["name"] if report else str(text or "the sweep's held-out text"),
        split=HELD_OUT,
        tokens=max(1, loss_tokens // size) * size if size and isinstance(loss_tokens, int) else None,
        untrained_loss=rounded(result.get("untrained_loss")),
    )


# ------------------------------------------------------------------------------------------------ a Trainer's folder


def _trainer_facts(root: Path) -> Row:
    state = read_object(_state(root))
    rows = [row for row in state.get("log_history") or [] if isinstance(row, dict)]
    training: Row = {"steps": state.get("global_step") or None, "tokens": state.get("num_input_tokens_seen") or None}
    if isinstance(epoch := state.get("epoch"), (int, float)):
        training["epochs"] = float(epoch)
    # The last, even if it is not a number: an earlier loss belongs to an earlier model.
    measured = [row["eval_loss"] for row in rows if "eval_loss" in row]
    evaluation = None
    if measured and (loss := _loss(measured[-1])) is not None:
        evaluation = Evaluation(loss=loss, text="the evaluation set of the training run", split="evaluation")
    return {
        "training": {name: value for name, value in training.items() if value is not None},
        "evaluation": evaluation,
        "losses": _losses(losses_of(rows), None),
        "variances": _variances(root, None),
    }


def _state(root: Path) -> Path:
    """The file of a Trainer's state: the run's, or else that of its last checkpoint."""
    places = [root, *reversed(checkpoints(root).values())]
    return next((file for place in places if (file := place / TRAINER_STATE).is_file()), root / TRAINER_STATE)


def _argument_facts(arguments: "TrainingArguments | Mapping[str, Any] | None") -> Row:
    """The TrainingArguments with the card's names."""
    if arguments is None:
        return {}
    values = dict(arguments) if isinstance(arguments, Mapping) else arguments.to_dict()
    facts = {word: values[name] for name, word in ARGUMENTS.items() if values.get(name) is not None}
    facts |= {name: str(facts[name]) for name in ("schedule", "optimizer") if name in facts}
    if (facts.get("steps") or 0) <= 0:  # -1: the epochs decide
        facts.pop("steps", None)
    else:
        facts.pop("epochs", None)
    if isinstance(warmup := facts.get("warmup_steps"), float):  # a share of all steps
        facts["warmup_steps"] = int(warmup) if warmup.is_integer() else None
    facts["precision"] = next((name for name in ("bf16", "fp16") if values.get(name)), "float32")
    # The JSON does not contain the number of processes.
    if isinstance(size := values.get("per_device_train_batch_size"), int) and not isinstance(arguments, Mapping):
        facts["batch_sequences"] = size * arguments.gradient_accumulation_steps * arguments.world_size
    return facts


# ------------------------------------------------------------------------------------------------------------- curves


def _losses(curve: TrainingCurve, batch_tokens: int | None) -> card.LossCurve | None:
    points = _thinned([*zip(curve.steps, curve.values, strict=True)])
    values = rounded([loss for _, loss in points])
    return card.LossCurve(**_positions(points, batch_tokens), values=values) if points else None


def _loss(value: Any) -> float | None:
    """A loss for the card; None if it is not a number or too large, as in a run that diverges."""
    number = finite_number(value, MAX_FLOAT)
    return None if number is None else rounded(float(number))


def _variances(root: Path, batch_tokens: int | None) -> VarianceCurves | None:
    curve = variances(root)
    points = _thinned([(step, column) for step, column in zip(curve.steps, curve.values, strict=True) if column])
    values = rounded([column for _, column in points])
    return VarianceCurves(**_positions(points, batch_tokens), values=values) if points else None


def _positions(points: list[tuple[int, Any]], batch_tokens: int | None) -> Row:
    unit = "tokens" if batch_tokens else "steps"
    return {"unit": unit, "at": [step * (batch_tokens or 1) for step, _ in points]}


def _thinned(points: list[tuple[int, Any]]) -> list[tuple[int, Any]]:
    """At most `MOST_POINTS` points of a curve, evenly spread, with the first and the last."""
    if len(points) <= MOST_POINTS:
        return points
    return [points[round(i * (len(points) - 1) / (MOST_POINTS - 1))] for i in range(MOST_POINTS)]


# -------------------------------------------------------------------------------------------------------------- files


def _report(path: Path) -> LayerReport | None:
    """A report without the pairs of layers and the columns that a card does not show."""
    if not path.is_file():
        return None
    content = rounded(LayerReport.load(path).model_dump(exclude={"pairs"}))
    rows = [{name: value for name, value in row.items() if name in DRAWN} for row in content["layers"]]
    return LayerReport.model_validate(content | {"layers": rows})


def _yaml(path: Path) -> Row:
    if not path.is_file():
        return {}
    try:
        content = yaml.safe_load(read_text(path, MAX_BYTES))
    except yaml.YAMLError as error:
        raise ReportError(f"{str(path)!r} is not YAML; it is damaged.") from error
    return content if isinstance(content, dict) else {}


def _mapping(content: Row, name: str) -> Row:
    value = content.get(name)
    return value if isinstance(value, dict) else {}


def _repository(name: Any, beside: Path | None = None) -> str | None:
    """A name that can be a repository of the Hub; None for a folder, also for one relative to the folder `beside`."""
    if not isinstance(name, str) or not name or Path(name).exists():
        return None
    if beside is not None and find_relative_folder(name, beside) is not None:
        return None
    return None if why_no_repository(name) else name


def _parameters(model: Path, report: LayerReport | None) -> int | None:
    """The number of parameters, from the report or else from the headers of the weights."""
    if report is not None and report.model.get("num_parameters"):
        return report.model.get("num_parameters")
    files = sorted(model.glob("*.safetensors"))
    if not files:
        return None
    total = 0
    for path in files:
        try:
            require_opens(path)
            with safe_open(path, framework="numpy") as weights:
                shapes = [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118
        except OSError as error:
            raise ReportError(f"{str(path)!r} cannot be read: {reason(error)}.") from error
        except SafetensorError as error:
            raise ReportError(f"{str(path)!r} is not a complete safetensors file.") from error
        for shape in shapes:
            count = 1
            for size in shape:
                count *= size
            total += count
    return total
