"""`LayerReport`, the record that an analysis writes and everything else reads, and its JSON.

    schema_version, created     the schema (1) and when the analysis was made (ISO 8601)
    model, data                 the model that was analysed, and the text
    settings, versions, notes   how it was measured, with which versions, and remarks
    scores                      global values by name; `<name>_se` is the standard error of `<name>`
    layers                      one row per layer, layers counted from 0
    pairs                       L x L matrices by name, null where undefined; `causal[s][l]`: layer s skipped, seen at l
    budget                      what a budget of time or a precision came to, where one was given
    downstream                  accuracies on downstream tasks, where they were measured

Standard errors are over blocks of tokens; losses are in nats. Reports also come from strangers, so reading one checks
all its fields against bounds: see `LayerReport.load`.
"""

import os
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, field_validator, model_validator
from typing_extensions import NotRequired, TypedDict

from depthscope.errors import ReportError
from depthscope.files.atomic import read_text, write_atomically
from depthscope.files.strict_json import canonical, encode, parse
from depthscope.files.validation import cleaned, first_value
from depthscope.report.accuracy import Accuracy
from depthscope.report.measures import GLOBAL_SCORES, LAYER_SCORES, format_score, in_order
from depthscope.report.summary import summarize
from depthscope.wording.markdown import inline
from depthscope.wording.numbers import format_with_error

if TYPE_CHECKING:
    import datasets
    import pandas as pd

__all__ = [
    "SCHEMA_VERSION",
    "BudgetFacts",
    "DataFacts",
    "LayerReport",
    "Matrix",
    "ModelFacts",
    "NearIdentity",
    "Stopped",
]

SCHEMA_VERSION: Final = 1
MAX_BYTES = 256 * 2**20
MAX_DEPTH = 8  # nesting of lists and mappings
MAX_LAYERS = 10_000
MAX_MAPPED_LAYERS = 1600  # four square matrices with numbers of 25 bytes fit into MAX_BYTES

# A layer is near the identity if skipping it multiplies the loss by less than this.
NEAR_SKIP_RATIO = 1.02
# The criterion without skip ratios: 1 - cosine of the layer's input and output.
NEAR_BLOCK_INFLUENCE = 0.05

Matrix: TypeAlias = list[list[float | None]]
Row: TypeAlias = dict[str, Any]


class ModelFacts(TypedDict):
    """The model that was analysed; further keys are allowed."""

    __pydantic_config__ = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)  # type: ignore[misc]

    name: str
    revision: NotRequired[str | None]
    source: NotRequired[str]
    model_type: NotRequired[str]
    architecture: NotRequired[str]
    num_layers: int
    hidden_size: NotRequired[int | None]
    num_parameters: NotRequired[int | None]
    vocab_size: NotRequired[int | None]
    num_attention_heads: NotRequired[int | None]
    num_key_value_heads: NotRequired[int | None]
    num_experts: NotRequired[int | None]
    num_experts_per_tok: NotRequired[int | None]
    dtype: NotRequired[str]


class DataFacts(TypedDict):
    """The text that the model was analysed on; further keys are allowed."""

    __pydantic_config__ = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)  # type: ignore[misc]

    name: str
    fingerprint: str
    fit_blocks: NotRequired[int]
    eval_blocks: NotRequired[int]
    block_size: NotRequired[int]
    tokens: NotRequired[int]
    bos: NotRequired[list[int]]  # the special tokens at the start of every block, which no score includes; [] for none


# Why no more blocks were measured: the time was spent, the precision reached, the blocks of `eval_blocks` or of the
# text used up, or Ctrl-C.
Stopped: TypeAlias = Literal["time", "precision", "blocks", "text", "interrupt"]


class BudgetFacts(TypedDict):
    """What was reached where a budget decided how many blocks were measured; that number is `data.eval_blocks`."""

    __pydantic_config__ = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)  # type: ignore[misc]

    seconds: Annotated[float, Field(ge=0)]  # of the analysis, without loading
    stopped: Stopped
    most_blocks: int  # that were allowed, and that the text held
    precision: Annotated[float, Field(ge=0)] | None  # the largest relative standard error of a layer's loss ratio


@dataclass(frozen=True)
class NearIdentity:
    """The layers near the identity, the criterion in words ("skipping the layer raises ...") and its score."""

    layers: tuple[int, ...]
    criterion: str
    score: str


class LayerReport(BaseModel):
    """How much each layer of one model contributes on one text; see the module's docstring for the fields.

    A report is frozen and has no further fields at the top level; `model`, `data`, `settings`, `versions`, `scores` and
    the rows of `layers` may have further keys. Control characters in texts are replaced when a report is created.

    Raises:
        pydantic.ValidationError: a field is missing, of the wrong type or shape, not finite, or beyond its bound.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    schema_version: Literal[1] = SCHEMA_VERSION
    created: str
    model: ModelFacts
    data: DataFacts
    settings: dict[str, JsonValue]
    versions: dict[str, str | None]
    notes: list[str] = Field(default_factory=list)
    scores: dict[str, float | None]
    layers: list[dict[str, JsonValue]]
    pairs: dict[str, Matrix] = Field(default_factory=dict)
    budget: BudgetFacts | None = None
    downstream: list[Accuracy] = Field(default_factory=list)

    # ------------------------------------------------------------------------------------------------- validation

    @model_validator(mode="before")
    @classmethod
    def _bound_and_clean(cls, values: Any) -> Any:
        return cleaned(values, "report", max_depth=MAX_DEPTH) if isinstance(values, dict) else values

    @field_validator("created")
    @classmethod
    def _is_a_time(cls, value: str) -> str:
        try:
            datetime.fromisoformat(value.replace("Z", "+00:00"))
        except ValueError as error:
            raise ValueError("expected a date and time as in 2026-11-23T13:00:00+00:00") from error
        return value

    @field_validator("scores")
    @classmethod
    def _errors_are_not_negative(cls, values: dict[str, float | None]) -> dict[str, float | None]:
        for name, value in values.items():
            if name.endswith("_se") and value is not None and value < 0:
                raise ValueError(f"{name} is a standard error and cannot be negative")
        return values

    @field_validator("layers")
    @classmethod
    def _rows_are_layers(cls, rows: list[Row]) -> list[Row]:
        return [_checked_row(row, index) for index, row in enumerate(rows)]

    @model_validator(mode="after")
    def _shapes_agree(self) -> "LayerReport":
        num_layers = self.model["num_layers"]
        if not 1 <= num_layers <= MAX_LAYERS:
            raise ValueError(f"model.num_layers is {num_layers}, expected 1 to {MAX_LAYERS}")
        if len(self.layers) != num_layers:
            raise ValueError(f"layers has {len(self.layers)} rows, expected model.num_layers = {num_layers}")
        for name, matrix in self.pairs.items():
            if len(matrix) != num_layers or any(len(row) != num_layers for row in matrix):
                raise ValueError(f"pairs.{name} is not a {num_layers} x {num_layers} matrix")
        return self

    # ------------------------------------------------------------------------------------------------------- JSON

    def to_json(self) -> str:
        """Write the report as JSON; equal content gives equal bytes."""
        content: Row = {
            "schema_version": self.schema_version,
            "created": self.created,
            "model": canonical(self.model, list(ModelFacts.__annotations__)),
            "data": canonical(self.data, list(DataFacts.__annotations__)),
            "settings": canonical(self.settings),
            "versions": canonical(self.versions, ["depthscope", "torch", "transformers", "python"]),
            "notes": self.notes,
            "scores": canonical(self.scores, _with_errors(GLOBAL_SCORES)),
            "layers": [canonical(row, ["layer", "kind", *_with_errors(LAYER_SCORES)]) for row in self.layers],
            "pairs": canonical(self.pairs, _with_errors(["causal", "permutation"])),
        }
        # Without them the bytes equal those of a report without the fields.
        if self.budget is not None:
            content["budget"] = canonical(self.budget, list(BudgetFacts.__annotations__))
        if self.downstream:
            content["downstream"] = [row.model_dump() for row in self.downstream]
        return encode(content) + "\n"

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the report to a JSON file, completely or not at all.

        Raises:
            ReportError: the file cannot be written; the message says why.
        """
        return write_atomically(path, self.to_json())

    @classmethod
    def from_json(cls, text: str) -> "LayerReport":
        """Read a report from JSON text.

        Raises:
            ReportError: the text is not JSON, has another schema version, or is not a valid report; the message names
                the field.
        """
        return cls._from_json(text, "the text")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "LayerReport":
        """Read a report from a JSON file of at most 256 MiB, and check all its content.

        Raises:
            ReportError: the file is missing, too large or not text, or its content is refused as by `from_json`.
        """
        return cls._from_json(read_text(path, MAX_BYTES), repr(os.fspath(path)))

    @classmethod
    def _from_json(cls, text: str, source: str) -> "LayerReport":
        content = parse(text, source)
        if not isinstance(content, dict) or "schema_version" not in content:
            raise ReportError(f"{source} is JSON but not a report: it has no schema_version. Give a file from --out.")
        _check_version(content["schema_version"], source)
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise ReportError(f"{source} is not a valid report: {first_value(error)}.") from error

    # ---------------------------------------------------------------------------------------------------- reading

    def column(self, name: str) -> list[float | None]:
        """One score per layer; None where it is undefined or was not computed."""
        values = [row.get(name) for row in self.layers]
        return [float(value) if isinstance(value, (int, float)) else None for value in values]

    def has(self, name: str) -> bool:
        """Whether at least one layer has the score `name`."""
        return any(value is not None for value in self.column(name))

    @property
    def layer_scores(self) -> list[str]:
        """The scores that at least one layer has, without their standard errors, in the order of `measures.yaml`."""
        names = {name for row in self.layers for name, value in row.items() if isinstance(value, (int, float))}
        return in_order({name for name in names - {"layer"} if not name.endswith("_se")}, LAYER_SCORES)

    @property
    def global_scores(self) -> list[str]:
        """The global scores that have a value, without their standard errors, in the order of `measures.yaml`."""
        names = {name for name, value in self.scores.items() if value is not None}
        return in_order({name for name in names if name in GLOBAL_SCORES or not name.endswith("_se")}, GLOBAL_SCORES)

    def near_identity(self) -> NearIdentity | None:
        """The layers near the identity, by the skip ratio or else by block influence; None without both scores."""
        if self.has("skip_ratio"):
            share = f"{NEAR_SKIP_RATIO - 1:.0%}"
            return NearIdentity(
                tuple(i for i, r in enumerate(self.column("skip_ratio")) if r is not None and r < NEAR_SKIP_RATIO),
                f"skipping the layer raises the loss by less than {share}",
                "skip_ratio",
            )
        if self.has("block_influence"):
            values = self.column("block_influence")
            return NearIdentity(
                tuple(i for i, b in enumerate(values) if b is not None and b < NEAR_BLOCK_INFLUENCE),
                f"1 − cosine of the layer's input and output is below {NEAR_BLOCK_INFLUENCE:g}",
                "block_influence",
            )
        return None

    def ranked(self, name: str) -> list[tuple[int, float]]:
        """Pairs of layer and value of one score, lowest value first, without layers that have no value."""
        pairs = [(layer, value) for layer, value in enumerate(self.column(name)) if value is not None]
        return sorted(pairs, key=lambda pair: (pair[1], pair[0]))

    def summary(self) -> str:
        """A summary of the report in a few lines, from the scores that it has."""
        return summarize(self)

    # ------------------------------------------------------------------------------------------------ other forms

    def to_frame(self) -> "pd.DataFrame":
        """The layers as a pandas frame, one row per layer; an undefined value is NaN."""
        import pandas as pd  # takes half a second, so only this method imports it

        names = {name for row in self.layers for name in row}
        columns = ["layer", *(["kind"] if "kind" in names else [])]
        scores = [name for name in _with_errors(LAYER_SCORES) if name in names]
        columns += scores + sorted(names - {*columns, *scores})
        frame = pd.DataFrame({name: [row.get(name) for row in self.layers] for name in columns})
        for name in scores:
            frame[name] = frame[name].astype("float64")
        return frame

    def to_dataset(self) -> "datasets.Dataset":
        """The layers as a `datasets.Dataset`, one row per layer, with the model and the text in every row.

        Every score has a column, null where it was not computed, so that reports can be concatenated.
        """
        import datasets  # imports pandas, pyarrow and torch

        columns = self.table()
        features = datasets.Features({name: datasets.Value(kind) for name, (kind, _) in columns.items()})
        return datasets.Dataset.from_dict({name: values for name, (_, values) in columns.items()}, features=features)

    def table(self) -> dict[str, tuple[str, list[Any]]]:
        """The columns of `to_dataset` without `datasets`: for each its Arrow type and its values."""
        rows = len(self.layers)
        text: dict[str, list[Any]] = {
            "model": [self.model["name"]] * rows,
            "revision": [self.model.get("revision")] * rows,
            "data": [self.data["name"]] * rows,
            "fingerprint": [self.data["fingerprint"]] * rows,
            "kind": [row.get("kind") for row in self.layers],
        }
        counts = {"num_layers": [rows] * rows, "layer": list(range(rows))}
        numbers = {name: self.column(name) for name in _with_errors(LAYER_SCORES)}
        parts: dict[str, Mapping[str, list[Any]]] = {"string": text, "int64": counts, "float64": numbers}
        return {name: (kind, values) for kind, part in parts.items() for name, values in part.items()}

    def to_markdown(self) -> str:
        """The global scores and the layers as two Markdown tables."""
        lines = ["| score | value | meaning |", "| --- | ---: | --- |"]
        for name in self.global_scores:
            term = GLOBAL_SCORES.get(name)
            value = format_with_error(self.scores[name], self.scores.get(f"{name}_se"))
            phrase = " ".join(filter(None, (term.phrase, f"({term.unit})" if term.unit else ""))) if term else ""
            lines.append(f"| {inline(term.label if term else name)} | {value} | {inline(phrase)} |")
        names = [name for name in self.layer_scores if name in LAYER_SCORES]
        labels = [LAYER_SCORES[name].label for name in names]
        lines += ["", f"| {' | '.join(['layer', *labels])} |", f"| {' | '.join(['---:'] * (len(names) + 1))} |"]
        columns = {name: self.column(name) for name in names}
        for layer in range(len(self.layers)):
            cells = [str(layer), *(format_score(name, values[layer]) for name, values in columns.items())]
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines) + "\n"


def _checked_row(row: Row, index: int) -> Row:
    """Check one row of `layers`: its index, its type, and its scores, which must be numbers (made floats) or null."""
    if row.get("layer") != index or isinstance(row["layer"], bool):
        raise ValueError(f"[{index}].layer is {reprlib.repr(row.get('layer'))}, expected {index}")
    if not isinstance(row.get("kind", ""), str):
        raise ValueError(f"[{index}].kind is {reprlib.repr(row['kind'])}, expected a text")
    numbers = {name: row[name] for name in _with_errors(LAYER_SCORES) if row.get(name) is not None}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"[{index}].{name} is {reprlib.repr(value)}, expected a number or null")
        if name.endswith("_se") and value < 0:
            raise ValueError(f"[{index}].{name} is a standard error and cannot be negative")
    return row | {name: float(value) for name, value in numbers.items()}


def _check_version(version: Any, source: str) -> None:
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ReportError(f"{source} has the unknown schema {reprlib.repr(version)}; this depthscope reads schema 1.")
    if version > SCHEMA_VERSION:
        raise ReportError(
            f"{source} was written by a newer depthscope: schema {reprlib.repr(version)}, this one reads "
            f"{SCHEMA_VERSION}; upgrade with pip install --upgrade depthscope."
        )


def _with_errors(names: Sequence[str] | Mapping[str, Any]) -> list[str]:
    return [column for name in names for column in (name, f"{name}_se")]
