"""From the folder of a model to the record that its card is made from.

    a point of a sweep          point.json, result.json, environment.json, the two reports, log.jsonl,
                                layer_stats.jsonl, model/, and sweep.json and sweep.yaml two folders up
    a Trainer's output folder   trainer_state.json (its own, or that of its last checkpoint), layer_stats.jsonl
    a saved model's folder      config.json, *.safetensors

Each file is optional, and any folder may have a layer_report.json. They are read as JSON, JSON lines and YAML up to a
bound, never unpickled: training_args.bin is not opened. NaN and Infinity, which transformers and PEFT write, count as
null.
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

MOST_POINTS = 100  # of a curve; more cannot be told apart
DRAWN = {
    "layer",
    "kind",
    "attention_variance",
    "mlp_variance",
    *(column for name in LAYER_COLUMNS for column in (name, f"{name}_se")),
}
HELD_OUT = "held-out"
# TrainingArguments' words for what the card says in others.
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
# What point.json says of the training in the words of the card.
OF_POINT = (
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
    """Read what a folder says of its model; what is missing there is missing in the record.

    Args:
        folder: a point of a sweep, the output folder of a Trainer, or the folder of a saved model.
        repo_id: where the model is published.
        license: an identifier of the Hub; the card says that none was chosen where there is none.
        language: codes of languages.
        datasets: data sets of the Hub that it was trained on; by default the one that the sweep names.
        base_model: the model on the Hub that it derives from; by default the one that an adapter names.
        base_model_relation: adapter, finetune, merge or quantized.
        native_repo: repository of the same model in an architecture that transformers brings.
        revisions: branches with checkpoints of the training.
        reports_dataset: data set with the reports of the sweep.
        collection: slug of the collection that holds all of it.
        training_args: how it was trained, as an object or as the JSON of one.
        accuracies: of downstream tasks; by default those that the report has.

    Raises:
        SettingsError: there is no such folder, or one of the values is not one that the Hub takes.
        ReportError: a file in the folder is damaged; the message names it.
    """
    root = Path(folder).resolve()  # of `.` and `p1` too, the sweep's folder is two up
    if not root.is_dir():
        raise SettingsError(f"There is no folder {str(folder)!r}: give the folder of a trained model.")
    model = root / MODEL if (root / MODEL).is_dir() else root
    adapter = read_object(model / ADAPTER_CONFIG)
    if base_model is None and (named := _repository(adapter.get("base_model_name_or_path"), model)):
        base_model, base_model_relation = named, base_model_relation or "adapter"
    report, untrained = _report(root / TRAINED_REPORT), _report(root / UNTRAINED_REPORT)
    result = read_object(root / RESULT)
    given: Row = {
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
    found = _of_point(root, report, result) if (root / POINT).is_file() else _of_trainer(root)
    training = _of_arguments(training_args) | found.pop("training")
    if datasets is None:
        datasets = found.pop("datasets", [])
    found.pop("datasets", None)
    return DepthCardData.checked(**given, **found, datasets=list(datasets), training=rounded(training))


# ------------------------------------------------------------------------------------------------- a point of a sweep


def _of_point(root: Path, report: LayerReport | None, result: Row) -> Row:
    point, environment = read_object(root / POINT), read_object(root / ENVIRONMENT)
    sweep = root.parent.parent
    index, specification = read_object(sweep / SWEEP_INDEX), _yaml(sweep / SWEEP_FILE)
    settings, text = _mapping(point, "training"), _mapping(index, "data").get("name")
    batch = settings.get("batch_tokens")
    steps = settings["tokens"] // batch if batch and settings.get("tokens") else None
    training: Row = {name: settings[name] for name in OF_POINT if settings.get(name) is not None}
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
        "evaluation": _of_result(result, report, text, _mapping(specification, "scoring")),
        "losses": _losses(curve, batch),
        "variances": _variances(root, batch),
        "versions": {str(name): str(value) for name, value in _mapping(environment, "versions").items()},
    }


def _of_result(result: Row, report: LayerReport | None, text: Any, scoring: Row) -> Evaluation | None:
    """The loss over the held-out text, which is more than what the scores are measured on."""
    if not isinstance(result.get("loss"), (int, float)):
        return None
    size = report.data.get("block_size") if report else None
    wanted = scoring.get("loss_tokens")
    return Evaluation(
        loss=rounded(float(result["loss"])),
        text=report.data["name"] if report else str(text or "the sweep's text, held out"),
        split=HELD_OUT,
        tokens=max(1, wanted // size) * size if size and isinstance(wanted, int) else None,
        untrained_loss=rounded(result.get("untrained_loss")),
    )


# ------------------------------------------------------------------------------------------------ a Trainer's folder


def _of_trainer(root: Path) -> Row:
    state = read_object(_state(root))
    rows = [row for row in state.get("log_history") or [] if isinstance(row, dict)]
    training: Row = {"steps": state.get("global_step") or None, "tokens": state.get("num_input_tokens_seen") or None}
    if isinstance(epoch := state.get("epoch"), (int, float)):
        training["epochs"] = float(epoch)
    # The last, even if it is no number: an earlier loss is not that of the model in the folder.
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
    """The state of a Trainer: that of the run where it was saved, else that of its last checkpoint."""
    places = [root, *reversed(checkpoints(root).values())]
    return next((file for place in places if (file := place / TRAINER_STATE).is_file()), root / TRAINER_STATE)


def _of_arguments(arguments: "TrainingArguments | Mapping[str, Any] | None") -> Row:
    """TrainingArguments in the words of the card."""
    if arguments is None:
        return {}
    given = dict(arguments) if isinstance(arguments, Mapping) else arguments.to_dict()
    found = {word: given[name] for name, word in ARGUMENTS.items() if given.get(name) is not None}
    found |= {name: str(found[name]) for name in ("schedule", "optimizer") if name in found}
    if (found.get("steps") or 0) <= 0:  # -1: as many as the epochs have
        found.pop("steps", None)
    else:
        found.pop("epochs", None)
    if isinstance(warmup := found.get("warmup_steps"), float):  # a share of all steps
        found["warmup_steps"] = int(warmup) if warmup.is_integer() else None
    found["precision"] = next((name for name in ("bf16", "fp16") if given.get(name)), "float32")
    # One process: how many there were, the arguments do not say.
    if isinstance(size := given.get("per_device_train_batch_size"), int) and not isinstance(arguments, Mapping):
        found["batch_sequences"] = size * arguments.gradient_accumulation_steps * arguments.world_size
    return found


# ------------------------------------------------------------------------------------------------------------ courses


def _losses(curve: TrainingCurve, batch_tokens: int | None) -> card.LossCurve | None:
    kept = _thinned([*zip(curve.steps, curve.values, strict=True)])
    return card.LossCurve(**_at(kept, batch_tokens), values=rounded([loss for _, loss in kept])) if kept else None


def _loss(value: Any) -> float | None:
    """A loss as a card holds it, None for what is no number or, in a run that diverges, beyond all bounds."""
    number = finite_number(value, MAX_FLOAT)
    return None if number is None else rounded(float(number))


def _variances(root: Path, batch_tokens: int | None) -> VarianceCurves | None:
    curve = variances(root)
    kept = _thinned([(step, column) for step, column in zip(curve.steps, curve.values, strict=True) if column])
    return VarianceCurves(**_at(kept, batch_tokens), values=rounded([column for _, column in kept])) if kept else None


def _at(points: list[tuple[int, Any]], batch_tokens: int | None) -> Row:
    unit = "tokens" if batch_tokens else "steps"
    return {"unit": unit, "at": [step * (batch_tokens or 1) for step, _ in points]}


def _thinned(points: list[tuple[int, Any]]) -> list[tuple[int, Any]]:
    """At most `MOST_POINTS` of a course, evenly spread, with the first and the last."""
    if len(points) <= MOST_POINTS:
        return points
    return [points[round(i * (len(points) - 1) / (MOST_POINTS - 1))] for i in range(MOST_POINTS)]


# -------------------------------------------------------------------------------------------------------------- files


def _report(path: Path) -> LayerReport | None:
    """A report without what a card does not show: its pairs of layers, and further columns."""
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
    found = content.get(name)
    return found if isinstance(found, dict) else {}


def _repository(name: Any, beside: Path | None = None) -> str | None:
    """A name where it can be one of the Hub's, else None: a folder, also one that is there from the folder `beside`."""
    if not isinstance(name, str) or not name or Path(name).exists():
        return None
    if beside is not None and find_relative_folder(name, beside) is not None:
        return None
    return None if why_no_repository(name) else name


def _parameters(model: Path, report: LayerReport | None) -> int | None:
    """The number of parameters: as the report counted them, else by the headers of the weights."""
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
            raise ReportError(f"{str(path)!r} is not a whole safetensors file.") from error
        for shape in shapes:
            count = 1
            for size in shape:
                count *= size
            total += count
    return total
