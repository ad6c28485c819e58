"""What a sweep is: one YAML file that says which models are trained on what, and how they are measured.

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

`docs/sweeps.md` lists every setting. What is not allowed is refused with the line it stands in, before anything runs.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from depthscope.errors import SettingsError, SpecificationError
from depthscope.settings import Settings
from depthscope.sweep.yaml_lines import Path_, YamlFile, read_yaml

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
    "preset_names",
]

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
TRAINED_ENTRIES = 2048  # of a tokenizer, where the file does not say
REPLACED = frozenset({"grid", "seeds"})
MOST_EXTENDED = 8


class Part(BaseModel):
    """Base of the parts of a sweep: immutable, and nothing unknown in it."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Text(Part):
    """Where text comes from: files and folders, a dataset of the Hub, or (neither) Python's own standard library.

    Attributes:
        text: text, .jsonl, .json, .csv or .parquet files, or folders of text files; relative to the sweep's file;
            `*` may stand for parts of names.
        dataset: a dataset of the Hub, as `name` or `name:config`; it is streamed.
        column: the column that holds the text; found by itself where that is clear.
        split: the split of the dataset; "train" where there is one.
    """

    text: str | list[str] | None = None
    dataset: str | None = None
    column: str | None = None
    split: str | None = None

    @model_validator(mode="after")
    def _one_source(self) -> "Text":
        if self.text is not None and self.dataset is not None:
            raise ValueError("both `text` and `dataset` are given; give one of them")
        return self


class Data(Text):
    """What the models read.

    Attributes:
        held_out: the text that models are measured on; by default a twentieth of the documents of the training text,
            which are then not trained on.
        epochs: how often the training text may be read; more tokens than that are refused.
        name: what reports and model cards call the text; by default the name of the file, folder or dataset.
    """

    held_out: Text | None = None
    epochs: float = Field(default=1.0, gt=0)
    name: str | None = Field(default=None, min_length=1)


class Tokenizer(Part):
    """The tokenizer: one that exists, or a byte-level BPE that is trained on the training text and kept.

    Attributes:
        name: a Hub id or a folder; none trains one.
        vocab_size: entries of the tokenizer to train, 2048 by default; beside a name, the rows of the embedding, where
            that is padded beyond the tokenizer's entries.
        characters: how much of the training text it is trained on.
    """

    name: str | None = None
    vocab_size: int | None = Field(default=None, ge=257)
    characters: int = Field(default=5_000_000, ge=1)

    @property
    def trained_entries(self) -> int:
        """Entries of the tokenizer to train."""
        return TRAINED_ENTRIES if self.vocab_size is None else self.vocab_size

    def rows(self, entries: int) -> int:
        """Rows of the embedding of models whose tokenizer turned out to have so many entries."""
        return entries if self.name is None else max(entries, self.vocab_size or 0)


class Training(Part):
    """How each model is trained; Trainer does it, with AdamW.

    Attributes:
        tokens: how many tokens each model is trained on, rounded down to whole steps.
        sequence_length: tokens in a sequence, T.
        batch_tokens: tokens in an optimiser step, over all devices: the same for every sequence length.
        micro_batch_size: sequences in a forward pass on one device, which a step must be a multiple of; all of a step's
            where nothing is given.
        schedule: of the learning rate after the warm-up.
        warmup_steps: steps of linear warm-up.
        min_learning_rate: where the cosine ends, as a share of the peak; the linear schedule ends at 0.
        precision: "auto" is bfloat16 autocast where the hardware computes it faster, else float32.
        attention: "auto" is what is faster on the hardware at this size; else transformers' name of one.
        fsdp: shard weights, gradients and optimiser states over the processes of torchrun.
    """

    tokens: int = Field(default=2_000_000, ge=1)
    sequence_length: int = Field(default=128, ge=2)
    batch_tokens: int = Field(default=1024, ge=2)
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
    """What is kept while models train.

    Attributes:
        log_every: steps between two logs; a hundredth of the training by default.
        variance: track the variance of every layer.
        sparsity_every: steps between two measurements of sparsity; none by default.
        effectiveness_every: steps between two computations of the scores; none by default.
        checkpoint_every: steps between two checkpoints to go on from, rounded up to a multiple of `log_every`; a fifth
            of the training by default.
        publish_every: keep the weights at steps 0, 1, 2, 4, ..., 512 and then at every multiple of n, to be published;
            only the last ones by default.
    """

    log_every: int | None = Field(default=None, ge=1)
    variance: bool = True
    sparsity_every: int | None = Field(default=None, ge=1)
    effectiveness_every: int | None = Field(default=None, ge=1)
    checkpoint_every: int | None = Field(default=None, ge=1)
    publish_every: int | None = Field(default=None, ge=1)


class Scoring(Part):
    """How each trained model is measured, on held-out text; the fields of `depthscope.Settings`, and these.

    Attributes:
        block_size: tokens in a block; the shortest sequence length of the sweep by default, so that every model has
            been trained for it.
        loss_tokens: tokens that the held-out loss is measured on.
        untrained: measure each model before its training too, as a control.
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
    seed: int = Field(default=0, ge=0)
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
        """The settings of the analysis, for blocks of this size where the file says nothing else."""
        fields = self.model_dump(exclude={"loss_tokens", "untrained", "block_size"})
        settings = Settings(**fields, block_size=self.block_size or block_size)
        return settings if "usefulness" in settings.scores else settings.with_(fit_blocks=0)


class Specification(Part):
    """A whole sweep, as its file says it; see the parts for their settings.

    Attributes:
        name: what the sweep is called, and its folder.
        description: what it is about; the report repeats it.
        model: `preset`, a named shape of DepthLM, and fields of `DepthLMConfig` over it.
        grid: families of models by name. In each, every setting of the model or the training may have one value or a
            list; the family is the product of the lists. `points` is a list of such settings, for what is no product.
        seeds: of the initialisation and of the order of the data; every point is trained with each.
    """

    name: str = Field(pattern=NAME_PATTERN)
    description: str = ""
    model: dict[str, Any] = Field(default_factory=dict)
    data: Data = Data()
    tokenizer: Tokenizer = Tokenizer()
    training: Training = Training()
    tracking: Tracking = Tracking()
    scoring: Scoring = Scoring()
    grid: dict[str, dict[str, Any]]
    seeds: list[int] = [0]

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: list[int]) -> list[int]:
        if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
            raise ValueError("give at least one seed, each once, none negative")
        return seeds


@dataclass(frozen=True)
class Sweep:
    """A specification, the file it comes from and where in it everything stands."""

    specification: Specification
    file: YamlFile
    folder: Path  # what relative paths are relative to

    def error(self, path: Path_, message: str) -> SpecificationError:
        """An error that names the line of a part."""
        where = self.file.where(path)
        return SpecificationError(f"{where}: {message}" if where else message)


def _presets() -> Path:
    return Path(str(files("depthscope.sweep"))) / "presets"


def preset_names() -> list[str]:
    """The sweeps that come with depthscope."""
    return sorted(path.stem for path in _presets().glob("*.yaml"))


def load_sweep(source: str | Path, changes: Mapping[str, Any] | None = None) -> Sweep:
    """Read a sweep: a YAML file, or the name of a preset.

    Args:
        source: the path of a file, or a name of `preset_names()`.
        changes: settings over those of the file, as nested mappings.

    Raises:
        SpecificationError: naming the line and what is allowed there.
    """
    path, shown = _find(str(source), Path.cwd(), None)
    file = _read_extended(path, shown)
    if changes:
        file = file.extended_by(YamlFile(dict(changes)), REPLACED)
    try:
        specification = Specification.model_validate(file.content)
    except ValidationError as error:
        raise SpecificationError(_explain(error, file)) from error
    return Sweep(specification, file, path.parent)


def _find(name: str, folder: Path, from_: str | None) -> tuple[Path, str]:
    if name in preset_names():
        return _presets() / f"{name}.yaml", f"preset {name}"
    path = folder / name
    if not path.is_file():
        near = difflib.get_close_matches(name, preset_names(), n=1)
        hint = f" Did you mean the preset {near[0]!r}?" if near else f" The presets are: {', '.join(preset_names())}."
        raise SpecificationError(f"{from_ + ': ' if from_ else ''}there is no sweep file or preset {name!r}.{hint}")
    return path.resolve(), name


def _read_extended(path: Path, shown: str) -> YamlFile:
    """A file over what it extends, and that over what it extends."""
    chain: list[YamlFile] = []
    seen: set[Path] = set()
    while True:
        if path in seen or len(chain) == MOST_EXTENDED:
            raise SpecificationError(
                f"{shown}: `extends` goes round in a circle, or deeper than {MOST_EXTENDED} files."
            )
        seen.add(path)
        file = read_yaml(path, shown)
        chain.append(file)
        if "extends" not in file.content:
            break
        base = file.content.pop("extends")
        where = str(file.where(("extends",)) or shown)
        if not isinstance(base, str):
            raise SpecificationError(f"{where}: `extends` takes the name of a preset or a file.")
        path, shown = _find(base, path.parent, where)
    merged = chain.pop()
    while chain:
        merged = merged.extended_by(chain.pop(), REPLACED)
    return merged


def _explain(error: ValidationError, file: YamlFile) -> str:
    """The first thing that is wrong, in words, with its line."""
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
        case "value_error":
            message = f"{problem['ctx']['error']}."
            message = f"{name}: {message}" if path and len(path) > 1 else message
        case "literal_error":
            message = f"{name} is {problem['input']!r}; give {problem['ctx']['expected']}."
        case _:
            message = f"{name} is {problem['input']!r}; {problem['msg'][:1].lower()}{problem['msg'][1:]}."
    more = len(error.errors()) - 1
    also = f" ({more} more {'is' if more == 1 else 'are'} wrong after it.)" if more else ""
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
