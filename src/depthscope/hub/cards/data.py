"""`DepthCardData`, the data of a model card, and its JSON.

    repo_id, license, ...       where the model is published, and its owner's choices
    sweep, training             how it was trained
    config, parameters          its architecture
    report, untrained           the scores of its layers, and those of the same model before training
    evaluation, accuracies      losses and downstream accuracies, each with the data it was measured on
    losses, variances           the curves of its training

Every part but `repo_id` may be missing. Texts come from files of strangers: control characters are replaced, and
fields that the Hub parses (names of repositories, licence, languages) are checked here. A record holds only what a card
shows, with eight significant digits, so it is small enough to be stored beside the card.
"""

import math
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from depthscope.errors import ReportError, SettingsError
from depthscope.files.atomic import read_text, write_atomically
from depthscope.files.strict_json import encode, parse
from depthscope.files.validation import MAX_FLOAT, MAX_INTEGER, cleaned, first_problem
from depthscope.hub.errors import why_no_repository
from depthscope.report.accuracy import Accuracy
from depthscope.report.measures import shown_in
from depthscope.report.report import LayerReport
from depthscope.wording.scalars import plain_scalars

__all__ = [
    "LAYER_COLUMNS",
    "DepthCardData",
    "Evaluation",
    "LossCurve",
    "Relation",
    "SweepFacts",
    "TrainingFacts",
    "VarianceCurves",
    "rounded",
]

MAX_BYTES = 32 * 2**20
MAX_DEPTH = 12
DIGITS = 8  # significant digits, two more than a card shows, so that rounding twice changes nothing
LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,95}")
LANGUAGE = re.compile(r"[a-z]{2,3}|code|multilingual")
REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,99}")
LINK = re.compile(r"https?://[A-Za-z0-9._~:/?#@!$&*+,;=%-]{1,500}|[A-Za-z0-9][A-Za-z0-9._/-]{0,99}")
COLLECTION = re.compile(r"[\w.-]{1,96}/[\w.-]{1,200}", re.ASCII)

# The columns of a card's table of layers; errors and parts of the variance are only drawn.
LAYER_COLUMNS = shown_in("card")

Relation = Literal["adapter", "finetune", "merge", "quantized"]


def _matching(pattern: re.Pattern[str], what: str) -> AfterValidator:
    def check(value: str) -> str:
        if not pattern.fullmatch(value):
            raise ValueError(f"{value!r} is not {what}")
        return value

    return AfterValidator(check)


def _repository(value: str) -> str:
    if why := why_no_repository(value):
        raise ValueError(why)
    return value


Repository = Annotated[str, AfterValidator(_repository)]
License = Annotated[str, _matching(LICENSE, "an identifier of a licence, such as apache-2.0, mit or other")]
Language = Annotated[str, _matching(LANGUAGE, "a language code of two or three letters, code, or multilingual")]
Revision = Annotated[str, _matching(REVISION, "the name of a branch")]
Link = Annotated[str, _matching(LINK, "an address that begins with https://, or a file of the repository")]
Collection = Annotated[str, _matching(COLLECTION, "the slug of a collection, as in namespace/title-0123456789")]
Quantity = Annotated[float, Field(ge=-MAX_FLOAT, le=MAX_FLOAT)]
Count = Annotated[int, Field(ge=0, le=MAX_INTEGER)]


class _Part(BaseModel):
    """Base class of the parts of a record: immutable, without unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, values: Any) -> Any:
        return plain_scalars(values)


class SweepFacts(_Part):
    """The sweep that the model belongs to; `varied` holds the settings of its point."""

    name: str
    description: str = ""
    point: str
    varied: dict[str, JsonValue] = Field(default_factory=dict)


class TrainingFacts(_Part):
    """How the model was trained; None for what is unknown.

    Attributes:
        text: the training text.
        batch_tokens: tokens per optimiser step; `batch_sequences`: sequences per optimiser step.
        min_learning_rate: the final learning rate as a share of the peak.
        seconds: the duration of the training, on `processes` processes of `processor`.
    """

    text: str | None = None
    tokens: Count | None = None
    steps: Count | None = None
    epochs: Quantity | None = None
    sequence_length: Count | None = None
    batch_tokens: Count | None = None
    batch_sequences: Count | None = None
    optimizer: str | None = None
    learning_rate: Quantity | None = None
    schedule: str | None = None
    warmup_steps: Count | None = None
    min_learning_rate: Quantity | None = None
    weight_decay: Quantity | None = None
    adam_beta1: Quantity | None = None
    adam_beta2: Quantity | None = None
    adam_epsilon: Quantity | None = None
    max_grad_norm: Quantity | None = None
    precision: str | None = None
    attention: str | None = None
    gradient_checkpointing: bool | None = None
    seed: int | None = None
    processor: str | None = None
    processes: Count | None = None
    seconds: Quantity | None = None
    flops: Quantity | None = None


class Evaluation(_Part):
    """A mean next-token loss in nats, and the text that it was measured on; `split` is the Hub's name of the split."""

    loss: Quantity
    standard_error: Quantity | None = None
    text: str
    split: str | None = None
    tokens: Count | None = None
    untrained_loss: Quantity | None = None


class LossCurve(_Part):
    """Training losses [nats per token] at numbers of tokens or optimiser steps; null if not finite."""

    unit: Literal["tokens", "steps"]
    at: list[Count]
    values: list[Quantity | None]


class VarianceCurves(_Part):
    """The variance per layer at numbers of tokens or optimiser steps: values[i][layer]."""

    unit: Literal["tokens", "steps"]
    at: list[Count]
    values: list[list[Quantity | None]]


class DepthCardData(_Part):
    """The data of the card of one model; see the module's docstring.

    Attributes:
        name: the model's name for people; by default the last part of `repo_id`.
        license: the Hub's identifier; "other" needs `license_name` and `license_link`.
        datasets: data sets of the Hub that it was trained on.
        base_model: the model that it derives from; `base_model_relation`: how it derives from it.
        native_repo: the repository of the same model in an architecture of transformers.
        revisions: branches with checkpoints of the training.
        reports_dataset: the data set with the reports of the sweep; `collection`: the collection of the sweep.
        config: the model's config.json.
        adapter: whether the repository holds a PEFT adapter instead of a complete model.
        tokenizer: whether the repository holds a tokenizer.
        parameters: the number of parameters; `active_parameters`: those that process one token.
        versions: the versions of the packages that trained it.
    """

    repo_id: Repository
    name: str = ""
    license: License | None = None
    license_name: str | None = None
    license_link: Link | None = None
    language: list[Language] = Field(default_factory=list)
    datasets: list[Repository] = Field(default_factory=list)
    base_model: Repository | None = None
    base_model_relation: Relation | None = None
    native_repo: Repository | None = None
    revisions: list[Revision] = Field(default_factory=list)
    reports_dataset: Repository | None = None
    collection: Collection | None = None
    sweep: SweepFacts | None = None
    training: TrainingFacts = TrainingFacts()
    config: dict[str, JsonValue] = Field(default_factory=dict)
    adapter: bool = False
    tokenizer: bool = False
    parameters: Count | None = None
    active_parameters: Count | None = None
    report: LayerReport | None = None
    untrained: LayerReport | None = None
    evaluation: Evaluation | None = None
    accuracies: list[Accuracy] = Field(default_factory=list)
    losses: LossCurve | None = None
    variances: VarianceCurves | None = None
    versions: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _clean(cls, values: Any) -> Any:
        return cleaned(_dumped(plain_scalars(values)), "the record", max_depth=MAX_DEPTH, numbers=False)

    @model_validator(mode="after")
    def _relation_has_a_base(self) -> "DepthCardData":
        if self.base_model_relation is not None and self.base_model is None:
            raise ValueError("base_model_relation needs base_model, which is not given")
        return self

    @property
    def title(self) -> str:
        """The model's name for people."""
        return self.name if self.name.strip() else self.repo_id.rpartition("/")[2]

    def fact(self, name: str) -> Any:
        """One fact of the architecture, from the config or else from the report; None if neither has it."""
        value = self.config.get(name)
        return self.report.model.get(name) if value is None and self.report is not None else value

    def whole(self, name: str) -> int | None:
        """A fact that is a whole number above 0; None if it is not."""
        value = self.fact(name)
        return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None

    @property
    def architecture(self) -> str | None:
        """The name of the model's class."""
        names = self.config.get("architectures")
        first = names[0] if isinstance(names, list) and names else self.fact("architecture")
        return first if isinstance(first, str) else None

    @property
    def num_layers(self) -> int | None:
        """The number of layers."""
        return self.whole("num_hidden_layers") or (len(self.report.layers) if self.report else None)

    @property
    def num_experts(self) -> int | None:
        """The number of experts, None for a dense model."""
        return self.whole("num_experts") or self.whole("num_local_experts")

    @property
    def grouped_queries(self) -> bool:
        """Whether several query heads share one key and value head."""
        heads, shared = self.whole("num_attention_heads"), self.whole("num_key_value_heads")
        return heads is not None and shared is not None and shared < heads

    @property
    def is_depthlm(self) -> bool:
        """Whether it is a DepthLM."""
        return self.config.get("model_type") == "depthlm"

    @property
    def has_code(self) -> bool:
        """Whether its repository holds the code of the model."""
        return bool(self.config.get("auto_map"))

    def to_json(self) -> str:
        """The record as JSON; equal content gives equal bytes."""
        content = self.model_dump(mode="json", exclude_defaults=True)
        return encode(content) + "\n"

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the record to a JSON file, completely or not at all.

        Raises:
            ReportError: the file cannot be written.
        """
        return write_atomically(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "DepthCardData":
        """Read a record from a JSON file.

        Raises:
            ReportError: the file is missing, too large, not JSON or not a record; the message names the field.
        """
        content = parse(read_text(path, MAX_BYTES), repr(os.fspath(path)))
        if not isinstance(content, dict):
            raise ReportError(f"{os.fspath(path)!r} is not the record of a model card: it is not a JSON object.")
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise ReportError(
                f"{os.fspath(path)!r} is not the record of a model card: {first_problem(error)}."
            ) from error

    @classmethod
    def checked(cls, **values: Any) -> "DepthCardData":
        """Create a record from values that a user gives.

        Raises:
            SettingsError: a value is not allowed; the message names its field.
        """
        try:
            return cls(**values)
        except ValidationError as error:
            raise SettingsError(f"The model card cannot be made: {first_problem(error)}.") from error


def rounded(value: Any) -> Any:
    """Round the numbers of a JSON-like value to eight significant digits; numbers that are not finite become null."""
    value = plain_scalars(value)
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    return value


def _dumped(value: Any) -> Any:
    """Convert the parts of a record that are objects to dictionaries."""
    if isinstance(value, dict):
        return {key: _dumped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_dumped(item) for item in value]
    return value.model_dump() if isinstance(value, (_Part, Accuracy)) else value
