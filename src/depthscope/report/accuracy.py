"""`Downstream`, the accuracies of one model on downstream tasks, and its JSON.

    schema_version, created     the schema (1) and when it was measured (ISO 8601)
    model                       what was evaluated: the facts that a report states about it
    accuracies                  one row per task and metric
    settings, versions, notes   how it was measured, with which versions, and remarks

Values and standard errors are shares between 0 and 1, not per cent.
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from depthscope.errors import ReportError, SettingsError
from depthscope.files.atomic import read_text, write_atomically
from depthscope.files.strict_json import canonical, encode, parse
from depthscope.files.validation import first_problem
from depthscope.wording.scalars import plain_scalars

if TYPE_CHECKING:
    from depthscope.report.report import LayerReport

__all__ = ["ACC", "ACC_NORM", "Accuracy", "Downstream", "mean_accuracy"]

SCHEMA_VERSION: Final = 1
MAX_BYTES = 16 * 2**20
# lm-eval's names: the likeliest answer is right; the same with each log-likelihood divided by the answer's length.
ACC, ACC_NORM = "acc", "acc_norm"

Text: TypeAlias = Annotated[str, Field(max_length=500)]
Count: TypeAlias = Annotated[int, Field(ge=0, le=2**63 - 1)]
Number: TypeAlias = Annotated[float, Field(ge=-1e100, le=1e100)]


class Accuracy(BaseModel):
    """One metric of one task.

    Attributes:
        task: lm-eval's name of the task.
        metric: lm-eval's name of the metric; `acc` and `acc_norm` for multiple choice.
        value: the metric, a share between 0 and 1 for accuracies.
        stderr: its standard error over documents; None for a single document.
        chance: the expected value of guessing, the mean over documents of 1 / number of answers; None for free answers.
        n: documents.
        shots: solved examples before each question.
        documents: the source of the questions: a data set, its configuration and split, or a file.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    task: Text
    metric: Text
    value: Number
    stderr: Annotated[float, Field(ge=0, le=1e100)] | None = None
    chance: Annotated[float, Field(ge=0, le=1)] | None = None
    n: Count | None = None
    shots: Count | None = None
    documents: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, values: Any) -> Any:
        return plain_scalars(values)


def mean_accuracy(accuracies: Sequence[Accuracy], metric: str = ACC) -> tuple[float, float | None] | None:
    """The unweighted mean over tasks and its standard error, with tasks as independent; None without tasks.

    Args:
        accuracies: one row per task and metric.
        metric: `acc`, or `acc_norm`, for which `acc` is taken where a task has no `acc_norm`.
    """
    metrics = (metric, ACC) if metric == ACC_NORM else (metric,)
    by_task: dict[str, Accuracy] = {}
    for name in reversed(metrics):
        by_task |= {row.task: row for row in accuracies if row.metric == name}
    rows = list(by_task.values())
    if not rows:
        return None
    errors = [row.stderr for row in rows if row.stderr is not None]
    error = math.sqrt(sum(error**2 for error in errors)) / len(rows) if len(errors) == len(rows) else None
    return sum(row.value for row in rows) / len(rows), error


class Downstream(BaseModel):
    """The accuracies of one model on downstream tasks; see the module's docstring for the fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    schema_version: Literal[1] = SCHEMA_VERSION
    created: Text
    model: dict[str, JsonValue]
    accuracies: list[Accuracy]
    settings: dict[str, JsonValue] = Field(default_factory=dict)
    versions: dict[str, str | None] = Field(default_factory=dict)
    notes: list[str] = Field(default_factory=list)

    def mean(self, metric: str = ACC) -> tuple[float, float | None] | None:
        """The mean over tasks and its standard error; see `mean_accuracy`."""
        return mean_accuracy(self.accuracies, metric)

    def added_to(self, report: "LayerReport") -> "LayerReport":
        """A copy of a report with these accuracies added; those of the same tasks are replaced.

        Raises:
            SettingsError: the report is of a model with another number of layers, size or architecture.
        """
        facts: dict[str, Any] = {**report.model}
        differing = {
            name: (facts[name], self.model[name])
            for name in ("num_layers", "hidden_size", "num_parameters", "model_type")
            if None not in (facts.get(name), self.model.get(name)) and facts[name] != self.model[name]
        }
        if differing:
            name, (theirs, ours) = next(iter(differing.items()))
            raise SettingsError(
                f"The report is of {report.model['name']!r} with {name} {theirs}, but {self.model.get('name')!r} with "
                f"{ours} was evaluated. Give the report of the same model."
            )
        tasks = {row.task for row in self.accuracies}
        kept = [row for row in report.downstream if row.task not in tasks]
        versions = {**report.versions, "lm-eval": self.versions.get("lm-eval")}
        return report.model_copy(update={"downstream": [*kept, *self.accuracies], "versions": versions})

    def to_json(self) -> str:
        """Write the record as JSON: the same content gives the same bytes."""
        content: dict[str, Any] = {
            "schema_version": self.schema_version,
            "created": self.created,
            "model": canonical(self.model, ["name", "revision", "source"]),
            "accuracies": [row.model_dump() for row in self.accuracies],
            "settings": canonical(self.settings),
            "versions": canonical(self.versions, ["depthscope", "lm-eval"]),
            "notes": self.notes,
        }
        return encode(content) + "\n"

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the record to a JSON file, completely or not at all.

        Raises:
            ReportError: the file cannot be written.
        """
        return write_atomically(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Downstream":
        """Read a record from a JSON file of at most 16 MiB.

        Raises:
            ReportError: the file is missing, too large, not JSON or no such record; the message names the field.
        """
        source = repr(os.fspath(path))
        content = parse(read_text(path, MAX_BYTES), source)
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise ReportError(
                f"{source} is not a record of downstream accuracies: {first_problem(error, 'the file')}. Give a "
                "file written by depthscope evaluate --out."
            ) from error
