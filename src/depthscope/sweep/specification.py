"""The specification of a sweep: one YAML file with its models, data, training and measurements.

    name: laptop
    extends: smoke                  # a preset or another file; mappings are merged, `grid` and `seeds` are replaced
    model: {preset: dense-2m, num_hidden_layers: 8}
    data: {text: books/*.parquet}
    training: {tokens: 2_000_000, sequence_length: 128}
    grid:
      depth:                        # a family: the product of its lists
        num_hidden_layers: [4, 8, 16]
      decay:
        num_hidden_layers: 16
        weight_decay: [0, 0.1, 1.0]
    seeds: [0, 1]

`docs/sweeps.md` lists every setting. Settings that are not allowed are refused with their line, before anything runs.
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from depthscope.errors import SettingsError, SpecificationError
from depthscope.settings import Settings
from depthscope.sweep.extending import LONGEST_SWEEP_NAME, has_relative_paths, over, read_extended
from depthscope.sweep.yaml_source import Path_, YamlFile

__all__ = [
    "Data",
    "Scoring",
    "Specification",
    "Sweep",
    "Text",
    "Tokenizer",
    "Tracking",
    "Training",
    "load_sweep",
]

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
TRAINED_ENTRIES = 2048  # the default size of a trained tokenizer
# What the index of a sweep may hold (`depthscope.sweep.report.results` reads no more).
LONGEST_DESCRIPTION = 20_000
MOST_POINTS = 10_000
MOST_TOKENS = 2**63 - 1
LARGEST_SEED = 2**32 - 1  # the largest that numpy accepts
LONGEST_QUOTE = 60


class Part(BaseModel):
    """Base class of the parts of a sweep: immutable, without unknown settings."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _require_written_type(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse values that pydantic would convert to a number or a boolean: `no` to 0, "5" to 5, 1 to true."""
        annotation: Any = cls.model_fields[str(info.field_name)].annotation
        kinds = _kinds(annotation)
        for item in value if isinstance(value, list) else [value]:
            _refuse_other_kind(item, kinds)
        return value


@cache
def _kinds(annotation: Any) -> frozenset[Any]:
    """The types that a field is made of: int and None of `int | None`, int of `list[int]`."""
    parts = get_args(annotation)
    return frozenset().union(*map(_kinds, parts)) if parts else frozenset({annotation})


def _refuse_other_kind(value: Any, kinds: frozenset[Any]) -> None:
    takes_numbers = bool(kinds & {int, float})
    if isinstance(value, bool) and takes_numbers and bool not in kinds:
        raise ValueError(f"{str(value).lower()} (also written yes, no, on or off) is not a number; give a number")
    if bool in kinds and not isinstance(value, bool):
        raise ValueError(f"{_quote(value)} is neither true nor false; give one of them without quotes")
    if isinstance(value, str) and takes_numbers and str not in kinds and re.match(r"[-+.]?\d", value):
        raise ValueError(f"{_quote(value)} is a word, not a number; write a number without quotes")


def _quote(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST_QUOTE else text[: LONGEST_QUOTE - 3] + "..."


class Text(Part):
    """The source of a text: files and folders, a dataset of the Hub, or by default Python's standard library.

    Attributes:
        text: text, .jsonl, .json, .csv or .parquet files, or folders of text files; relative to the sweep file; `*`
            may stand for parts of names.
        dataset: a dataset of the Hub, as `name` or `name:config`; it is streamed.
        column: the column that holds the text; detected if it is clear.
        split: the split of the dataset; "train" if it exists.
    """

    text: str | list[str] | None = None
    dataset: str | None = None
    column: str | None = None
    split: str | None = None

    @field_validator("text", mode="before")
    @classmethod
    def _some_file(cls, value: Any) -> Any:
        if value in ("", []) or (isinstance(value, list) and "" in value):
            raise ValueError("a name of a file is missing; give one file or folder, or a list of them")
        return value

    @model_validator(mode="after")
    def _one_source(self) -> "Text":
        if self.text is not None and self.dataset is not None:
            raise ValueError("both `text` and `dataset` are given; give one of them")
        return self


class Data(Text):
    """The data of the models.

    Attributes:
        held_out: the text that models are measured on; by default a twentieth of the documents of the training text,
            which are then not trained on.
        epochs: how often the training text may be read; a training that needs more tokens is refused.
        name: the name of the text in reports and model cards; by default that of the file, folder or dataset.
    """

    held_out: Text | None = None
    epochs: float = Field(default=1.0, gt=0)
    name: str | None = Field(default=None, min_length=1, max_length=LONGEST_DESCRIPTION)


class Tokenizer(Part):
    """The tokenizer: an existing one, or a byte-level BPE that is trained on the training text and saved.

    Attributes:
        name: a Hub id or a folder; without it, a tokenizer is trained.
        vocab_size: entries of the tokenizer to train, 2048 by default; with a name, the rows of the embedding, if it is
            padded beyond the tokenizer's entries.
        characters: the number of characters of the training text that it is trained on.
    """

    name: str | None = None
    vocab_size: int | None = Field(default=None, ge=257)
    characters: int = Field(default=5_000_000, ge=1)

    @property
    def trained_entries(self) -> int:
        """The number of entries of the tokenizer to train."""
        return TRAINED_ENTRIES if self.vocab_size is None else self.vocab_size

    def rows(self, entries: int) -> int:
        """The rows of the embedding for a tokenizer with `entries` entries."""
        return entries if self.name is None else max(entries, self.vocab_size or 0)


class Training(Part):
    """How each model is trained by transformers' Trainer with AdamW.

    Attributes:
        tokens: training tokens per model, rounded down to whole steps.
        sequence_length: tokens in a sequence, T.
        batch_tokens: tokens in an optimiser step over all devices, the same for every sequence length.
        micro_batch_size: sequences in a forward pass on one device, of which a step must be a multiple; by default all
            sequences of a step.
        schedule: the schedule of the learning rate after the warm-up.
        warmup_steps: steps of linear warm-up.
        min_learning_rate: the end of the cosine schedule as a share of the peak; the linear schedule ends at 0.
        precision: "auto" is bfloat16 autocast if the hardware computes it faster, else float32.
        attention: "auto" chooses the faster one on the hardware at this size; else transformers' name of one.
        fsdp: shard weights, gradients and optimiser states over the processes of torchrun.
    """

    tokens: int = Field(default=2_000_000, ge=1, le=MOST_TOKENS)
    sequence_length: int = Field(default=128, ge=2)
    batch_tokens: int = Field(default=1024, ge=2, le=MOST_TOKENS)
    micro_batch_size: int | None = Field(default=None, ge=1)
    learning_rate: float = Field(default=3e-3, gt=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = Field(default=100, ge=0)
    min_learning_rate: float = Field(default=0.1, ge=0, le=1)
    weight_decay: float = Field(default=0.1, ge=0)
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    adam_beta2: float = Field(default=0.95, ge=0, lt=1)
    adam_epsilon: float = Field(default=1e-8, gt=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    attention: str = "auto"
    gradient_checkpointing: bool = False
    compile: bool = False
    fsdp: bool = False

    @model_validator(mode="after")
    def _whole_batches(self) -> "Training":
        if self.batch_tokens % self.sequence_length:
            raise ValueError(
                f"batch_tokens ({self.batch_tokens}) is not a multiple of sequence_length ({self.sequence_length}): "
                "an optimiser step takes whole sequences"
            )
        if self.tokens < self.batch_tokens:
            raise ValueError(
                f"tokens ({self.tokens}) is less than one optimiser step, batch_tokens={self.batch_tokens}"
            )
        if self.micro_batch_size is not None and self.sequences % min(self.micro_batch_size, self.sequences):
            raise ValueError(
                f"an optimiser step has {self.sequences} sequences (batch_tokens / sequence_length), which is not a "
                f"multiple of micro_batch_size ({self.micro_batch_size})"
            )
        return self

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return self.tokens // self.batch_tokens

    @property
    def sequences(self) -> int:
        """Sequences in an optimiser step."""
        return self.batch_tokens // self.sequence_length


class Tracking(Part):
    """The measurements and checkpoints during training.

    Attributes:
        log_every: steps between logs; by default a hundredth of the training.
        variance: whether to track the variance per layer.
        sparsity_every: steps between measurements of sparsity; by default none.
        effectiveness_every: steps between computations of the scores; by default none.
        checkpoint_every: steps between checkpoints to resume from, rounded up to a multiple of `log_every`; by default
            a fifth of the training.
        publish_every: keep the weights at steps 0, 1, 2, 4, ..., 512 and then at every multiple of this number, for
            publishing; by default only the last weights.
    """

    log_every: int | None = Field(default=None, ge=1)
    variance: bool = True
    sparsity_every: int | None = Field(default=None, ge=1)
    effectiveness_every: int | None = Field(default=None, ge=1)
    checkpoint_every: int | None = Field(default=None, ge=1)
    publish_every: int | None = Field(default=None, ge=1)


class Scoring(Part):
    """How each trained model is measured on held-out text: the fields of `depthscope.Settings`, and these.

    Attributes:
        block_size: tokens in a block; by default the shortest sequence length of the sweep, for which every model is
            trained.
        loss_tokens: tokens that the held-out loss is measured on.
        untrained: whether to measure each model also before training, as a control.
    """

    scores: tuple[str, ...] | str = (
        "variance",
        "block_influence",
        "update",
        "skip",
        "causal",
        "usefulness",
        "permutation",
        "jacobian",
    )
    fit_blocks: int = Field(default=64, ge=0)
    eval_blocks: int = Field(default=16, ge=1)
    block_size: int | None = Field(default=None, ge=2)
    threshold: float = Field(default=1.1, gt=0)
    pairs: str | float = "all"
    probes: int | str = 16
    seed: int = Field(default=0, ge=0, le=LARGEST_SEED)
    loss_tokens: int = Field(default=32_768, ge=2)
    untrained: bool = True

    @field_validator("scores", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _allowed(self) -> "Scoring":
        try:
            self.settings(self.block_size or 2)
        except SettingsError as error:
            raise ValueError(str(error).rstrip(".")) from error
        return self

    def settings(self, block_size: int) -> Settings:
        """The settings of the analysis, with blocks of `block_size` tokens if the file sets no size."""
        fields = self.model_dump(exclude={"loss_tokens", "untrained", "block_size"})
        settings = Settings(**fields, block_size=self.block_size or block_size)
        return settings if "usefulness" in settings.scores else settings.with_(fit_blocks=0)


class Specification(Part):
    """The content of a sweep's file; see the parts for their settings.

    Attributes:
        name: the name of the sweep and of its folder.
        description: its subject; the report repeats it.
        model: `preset`, a named shape of DepthLM, and fields of `DepthLMConfig` that override it.
        shape: fields of the model for the points of the grid without a preset; the shape of an extended file is moved
            here if the file that extends it has presets in its grid.
        grid: families of models by name. In each, every setting of the model or the training has one value or a list;
            the family is the product of the lists. `points` is a list of such settings for families that are no
            product.
        seeds: seeds of the initialisation and of the order of the data; every point is trained with each of them.
        relative_to: the folder of relative paths; by default the folder of the file.
    """

    name: str = Field(pattern=NAME_PATTERN, max_length=LONGEST_SWEEP_NAME)
    description: str = Field(default="", max_length=LONGEST_DESCRIPTION)
    model: dict[str, Any] = Field(default_factory=dict)
    shape: dict[str, Any] = Field(default_factory=dict)
    data: Data = Data()
    tokenizer: Tokenizer = Tokenizer()
    training: Training = Training()
    tracking: Tracking = Tracking()
    scoring: Scoring = Scoring()
    grid: dict[str, dict[str, Any]]
    seeds: list[int] = [0]
    relative_to: str | None = None

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: list[int]) -> list[int]:
        if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0 or max(seeds) > LARGEST_SEED:
            raise ValueError(f"give at least one seed, each once, none negative, none above {LARGEST_SEED:,}")
        return seeds


@dataclass(frozen=True)
class Sweep:
    """A specification, its file, and the line of each part."""

    specification: Specification
    file: YamlFile
    folder: Path  # the folder of relative paths
    source: str = ""  # the file or preset that it was read from
    files: tuple[Path, ...] = ()  # that file and those that it extends

    def error(self, path: Path_, message: str) -> SpecificationError:
        """An error that names the line of a part."""
        return SpecificationError(self.locate(path, message))

    def locate(self, path: Path_, message: str) -> str:
        """Add the line of a part to a message."""
        where = self.file.where(path)
        return f"{where}: {message}" if where else message


def load_sweep(source: str | Path, changes: Mapping[str, Any] | None = None) -> Sweep:
    """Read a sweep: a YAML file, or the name of a preset.

    Args:
        source: the path of a file, or a name of `preset_names()`.
        changes: settings that override the file's, as nested mappings.

    Raises:
        SpecificationError: the file is not valid; the message names the line and what is allowed there.
    """
    file, folder, files = read_extended(str(source))
    if changes:
        file = over(file, YamlFile(dict(changes)))
    if has_relative_paths(file, folder):
        file.content["relative_to"] = str(folder)  # so that the settings are valid in any folder
    try:
        specification = Specification.model_validate(file.content)
    except ValidationError as error:
        raise SpecificationError(_explain(error, file)) from error
    sweep = Sweep(specification, file, folder, str(source), files)
    _refuse_options_without_source(sweep)
    return sweep


def _refuse_options_without_source(sweep: Sweep) -> None:
    data = sweep.specification.data
    for path, text in ((("data",), data), (("data", "held_out"), data.held_out)):
        if text is None or text.dataset is not None:
            continue
        if text.split is not None:
            raise sweep.error((*path, "split"), "only a dataset has splits; give a `dataset`, or leave `split` out.")
        if text.column is not None and text.text is None:
            raise sweep.error(
                (*path, "column"), "`column` needs a table; give its file as `text`, or a `dataset`, or leave it out."
            )


# Error messages


def _explain(error: ValidationError, file: YamlFile) -> str:
    """The message of the first problem, with its line."""
    problem = error.errors()[0]
    path = tuple(step for step in problem["loc"] if step not in ("str", "list[str]", "int", "float", "tuple[str, ...]"))
    where = file.where(path)
    name = ".".join(str(step) for step in path)
    match problem["type"]:
        case "extra_forbidden":
            allowed = _allowed(path[:-1])
            near = difflib.get_close_matches(str(path[-1]), allowed, n=1)
            guess = f"did you mean {near[0]!r}? Allowed" if near else "allowed"
            message = f"there is no setting {name!r}; {guess}: {', '.join(allowed)}."
        case "missing":
            message = f"{name!r} is missing."
        case _ if problem["input"] is None:
            message = f"{name} is empty; give it a value, or leave it out."
        case "model_type" | "dict_type":
            message = f"{name} is {_quote(problem['input'])}; give settings, each with its name and a colon."
        case "value_error":
            message = f"{problem['ctx']['error']}."
            message = f"{name}: {message}" if path and len(path) > 1 else message
        case "literal_error":
            message = f"{name} is {_quote(problem['input'])}; give {problem['ctx']['expected']}."
        case "string_type":
            message = f"{name} is {_quote(problem['input'])}; a word is expected. Put a number in quotes."
        case _:
            message = f"{name} is {_quote(problem['input'])}; {problem['msg'][:1].lower()}{problem['msg'][1:]}."
    more = len(error.errors()) - 1
    also = f" (and {more} more {'problem' if more == 1 else 'problems'})" if more else ""
    return (f"{where}: " if where else "") + message + also


@cache
def _allowed(path: Path_) -> list[str]:
    kind: Any = Specification
    for step in path:
        kind = {
            "data": Data,
            "held_out": Text,
            "tokenizer": Tokenizer,
            "training": Training,
            "tracking": Tracking,
            "scoring": Scoring,
        }[str(step)]
    return [*kind.model_fields, *(["extends"] if kind is Specification else [])]
