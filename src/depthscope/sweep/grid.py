"""Expanding the families of a grid to points: one model each, with all its settings, a name and a seed.

A family is the product of its lists. Points with equal settings, also in different families, are trained once; each
family names its points.
"""

import difflib
import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from pydantic import ValidationError
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from depthscope.models import PRESETS, DepthLMConfig, model_size
from depthscope.sweep.specification import MOST_POINTS, NAME_PATTERN, Sweep, Training
from depthscope.sweep.yaml_source import Path_
from depthscope.wording.messages import one_line

__all__ = ["Family", "Grid", "Point", "expand"]

# Short names of settings that are varied often; other settings keep their own name.
SHORT = {
    "num_hidden_layers": "L",
    "weight_decay": "wd",
    "sequence_length": "T",
    "num_key_value_heads": "kv",
    "num_experts": "E",
    "num_experts_per_tok": "k",
    "hidden_size": "d",
    "learning_rate": "lr",
    "initializer_range": "std",
    "norm_placement": "",
    "norm_scaling": "scaling-",
    "tokens": "tokens",
    "preset": "",
}
LONGEST_NAME = 100
ANY_VOCABULARY = 512  # for a configuration before the tokenizer is known
# Settings that the tokenizer and the sequence length determine.
DECIDED = frozenset({"vocab_size", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"})
# Settings that change no model: those of every transformers model, of generation, and unused ones.
NO_SETTING = frozenset({*PreTrainedConfig.__dataclass_fields__, "use_cache", "pretraining_tp", "output_router_logits"})
OF_MODEL = tuple(name for name in DepthLMConfig.__dataclass_fields__ if name not in NO_SETTING | DECIDED)
MOST_LAYERS = 10_000
MOST_FAMILIES = 1000  # `depthscope.sweep.report.results` reads no more


@dataclass(frozen=True)
class Point:
    """One model to train.

    Attributes:
        name: the name of its folder: variant and seed.
        variant: the name without the seed.
        seed: the seed of the initialisation and of the order of the data.
        model: the fields of its `DepthLMConfig`, without those that the data determine, such as `vocab_size`.
        training: the settings of its training.
        varied: its settings in the grid; the columns of the tables.
    """

    variant: str
    seed: int
    model: dict[str, Any]
    training: Training
    varied: dict[str, Any]

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.variant}-seed{self.seed}"

    def config(self, vocab_size: int, **tokens: Any) -> DepthLMConfig:
        """The configuration of its model for a vocabulary of this size."""
        fields = {"max_position_embeddings": self.training.sequence_length, **self.model, "vocab_size": vocab_size}
        return DepthLMConfig(**fields, **tokens)

    def flops(self, vocab_size: int) -> int:
        """Floating-point operations of its whole training, for a vocabulary of this size."""
        training = self.training
        size = model_size(self.config(vocab_size), training.sequence_length)
        return size.training_flops_per_token * training.steps * training.batch_tokens

    @cached_property
    def identity(self) -> str:
        """A digest of everything that determines the result, except data and tokenizer.

        It covers the configuration, not the file, so a default counts the same whether it is written or not.
        """
        config = self.config(vocab_size=ANY_VOCABULARY).to_dict()
        del config["transformers_version"]
        return digest({"model": config, "training": self.training.model_dump(), "seed": self.seed})


@dataclass(frozen=True)
class Family:
    """One entry of the grid: its variants in order, and the settings that vary in it."""

    name: str
    variants: tuple[str, ...]
    axes: tuple[str, ...]  # settings that take more than one value here


@dataclass(frozen=True)
class Grid:
    """All points of a sweep, in the order in which they are trained, and the families that they belong to."""

    points: tuple[Point, ...]
    families: tuple[Family, ...]

    @property
    def longest(self) -> int:
        """The longest sequence length."""
        return max(point.training.sequence_length for point in self.points)

    @property
    def shortest(self) -> int:
        """The shortest sequence length."""
        return min(point.training.sequence_length for point in self.points)


@dataclass
class _Entry:
    """One variant while the grid is read."""

    name: str
    explicit: bool
    path: Path_
    settings: dict[str, Any] = field(default_factory=dict)


def digest(value: Any) -> str:
    """The first 16 hex digits of the SHA-256 over a value as canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def expand(sweep: Sweep) -> Grid:
    """Turn the grid of a sweep into points, and check each of them.

    Raises:
        SpecificationError: an empty grid or list, an unknown setting, two points with one name, a model that cannot be
            built, sequence lengths that do not fit together, too many points.
    """
    grid = sweep.specification.grid
    if not grid:
        raise sweep.error(
            ("grid",), "the grid is empty; give at least one family, such as depth: {num_hidden_layers: [4, 8]}."
        )
    if len(grid) > MOST_FAMILIES:
        raise sweep.error(("grid",), f"the grid has {len(grid):,} families; give at most {MOST_FAMILIES:,}.")
    by_identity: dict[str, Point] = {}
    names: set[str] = set()
    families = []
    for name in grid:
        entries = list(_entries(sweep, name))
        variants = []
        for entry in entries:
            point = _point(sweep, entry)
            existing = by_identity.get(point.identity)
            if existing is None:
                if point.variant.casefold() in names:  # some file systems take "A" and "a" for the same folder
                    raise sweep.error(
                        entry.path,
                        f"two points with other settings have the name {point.variant!r}; give each its own `name`.",
                    )
                names.add(point.variant.casefold())
                by_identity[point.identity] = existing = point
                _check_count(sweep, entry.path, len(by_identity))
            elif entry.explicit and existing.variant != point.variant:
                raise sweep.error(
                    entry.path,
                    f"the points {existing.variant!r} and {point.variant!r} have the same settings; name one of them.",
                )
            if existing.variant in variants:
                raise sweep.error(
                    entry.path,
                    f"two points of family {name!r} have the same settings ({existing.variant!r}); leave one out.",
                )
            variants.append(existing.variant)
        axes = tuple(key for key in _keys(entries) if len({repr(entry.settings.get(key)) for entry in entries}) > 1)
        families.append(Family(name, tuple(variants), axes))
    points = tuple(
        Point(point.variant, seed, point.model, point.training, point.varied)
        for seed in sweep.specification.seeds
        for point in by_identity.values()
    )
    grid_points = Grid(points, tuple(families))
    _check_lengths(sweep, grid_points)
    return grid_points


def _check_count(sweep: Sweep, path: Path_, variants: int) -> None:
    seeds = len(sweep.specification.seeds)
    if variants * seeds > MOST_POINTS:
        times = "" if seeds == 1 else f" with {seeds:,} seeds"
        raise sweep.error(path, f"{variants:,} models{times} are too many; a sweep has at most {MOST_POINTS:,} points.")


def _entries(sweep: Sweep, family: str) -> Iterator[_Entry]:
    """The variants of one family."""
    path: Path_ = ("grid", family)
    settings = dict(sweep.specification.grid[family])
    if not _is_name(family):
        raise sweep.error(path, f"{family!r} is not a valid name of a family; use letters, digits, '.', '_' and '-'.")
    if not settings:
        raise sweep.error(path, f"family {family!r} is empty; give a setting with a list of values.")
    listed = settings.pop("points", [{}])
    if not isinstance(listed, list) or not listed or not all(isinstance(point, dict) for point in listed):
        raise sweep.error((*path, "points"), "`points` is a list of settings, such as - {num_hidden_layers: 4}.")
    for index, point in enumerate(listed):
        where = (*path, "points", index) if listed != [{}] else path
        both = set(point) & set(settings)
        if both:
            raise sweep.error(where, f"{', '.join(sorted(both))} is set both in the point and in its family.")
        own = dict(point)
        explicit_name = own.pop("name", None)
        if explicit_name is not None and not (isinstance(explicit_name, str) and _is_name(explicit_name)):
            hint = "" if isinstance(explicit_name, str) else " Put a number in quotes."
            raise sweep.error(
                where, f"{explicit_name!r} is not a valid name of a point; use letters, digits, '.', '_' and '-'.{hint}"
            )
        for chosen in _products(sweep, where, {**settings, **own}, path):
            many = [key for key, value in {**settings, **own}.items() if isinstance(value, list) and len(value) > 1]
            suffix = _label(chosen, many if explicit_name else [*many, *[key for key in own if key not in many]])
            name = "-".join(filter(None, [family if explicit_name is None else explicit_name, suffix]))
            yield _Entry(name[:LONGEST_NAME], explicit_name is not None, where, chosen)


def _products(sweep: Sweep, where: Path_, settings: dict[str, Any], family: Path_) -> Iterator[dict[str, Any]]:
    values = []
    for key, value in settings.items():
        listed = value if isinstance(value, list) else [value]
        if not listed:
            raise sweep.error((*where, key), f"{key} has an empty list; give at least one value.")
        if len({repr(item) for item in listed}) < len(listed):
            raise sweep.error((*where, key), f"{key} has a value twice: {listed}.")
        values.append(listed)
        _owner(sweep, (*where, key) if sweep.file.where((*where, key)) else (*family, key), key)
    _check_count(sweep, where, math.prod(map(len, values)))  # before a product of millions is built
    for combination in itertools.product(*values):
        yield dict(zip(settings, combination, strict=True))


def _owner(sweep: Sweep, path: Path_, key: str) -> str:
    """Whether a setting belongs to the "model" or to the "training"."""
    if key in DECIDED:
        raise sweep.error(path, f"{key} follows from the tokenizer and the sequence length; leave it out.")
    if key == "preset" or key in OF_MODEL:
        return "model"
    if key in Training.model_fields:
        return "training"
    settings = [*Training.model_fields, "preset", *OF_MODEL]
    near = difflib.get_close_matches(key, settings, n=3)
    guess = f" did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise sweep.error(
        path, f"{key!r} is not a setting of DepthLMConfig or of `training`;{guess or ' see docs/sweeps.md.'}"
    )


def _point(sweep: Sweep, entry: _Entry) -> Point:
    model, training = _settings(sweep, entry)
    try:
        point = Point(entry.name, 0, model, Training.model_validate(training), entry.settings)
    except ValidationError as error:
        problem = error.errors()[0]
        reason = str(problem.get("ctx", {}).get("error", problem["msg"]))
        named = "".join(f"{step}: " for step in problem["loc"])
        where = _line_of(sweep, entry, named + reason, "training")
        raise sweep.error(where, f"point {entry.name}: {named}{reason}.") from error
    attentions = ["auto", "eager", *(name for name in ALL_ATTENTION_FUNCTIONS.valid_keys() if "|" not in name)]
    if point.training.attention not in attentions:
        where = _line_of(sweep, entry, "attention", "training")
        raise sweep.error(where, f"there is no attention {point.training.attention!r}; give {', '.join(attentions)}.")
    try:
        _check_sizes(model)  # before a list of a billion layers is made
        config = point.config(vocab_size=ANY_VOCABULARY)
        if "rope_parameters" in model:
            _check_rope(config)
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:  # KeyError: of the rotary embedding
        reason = _reason(error)
        where = _line_of(sweep, entry, reason, "model")
        raise sweep.error(where, f"point {entry.name}: the model cannot be built: {reason}") from error
    return point


def _settings(sweep: Sweep, entry: _Entry) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of a point's model and of its training: those of the file, overridden by those of the grid."""
    specification = sweep.specification
    for part in ("model", "shape"):
        for key in getattr(specification, part):
            if _owner(sweep, (part, key), key) == "training":
                raise sweep.error((part, key), f"{key} is a setting of `training`, not of `{part}`; put it there.")
    own = {key: value for key, value in entry.settings.items() if _owner(sweep, entry.path, key) == "model"}
    shape = {} if own.get("preset") is not None else specification.shape
    fields = {**shape, **specification.model, **own}
    preset = fields.pop("preset", None)
    if preset is not None and preset not in list(PRESETS):
        raise sweep.error(
            entry.path if "preset" in entry.settings else ("model", "preset"),
            f"there is no preset {preset!r}; the presets are: {', '.join(PRESETS)}.",
        )
    of_preset = {key: value for key, value in PRESETS.get(preset, {}).items() if key not in DECIDED}
    model = {key: _as_declared(key, value) for key, value in (of_preset | fields).items()}
    training = {key: value for key, value in entry.settings.items() if key not in own}
    return model, {**specification.training.model_dump(), **training}


def _as_declared(key: str, value: Any) -> Any:
    """Convert a whole number to a float where the strict configuration requires one."""
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if is_whole and DepthLMConfig.__dataclass_fields__[key].type is float else value


def _check_sizes(model: dict[str, Any]) -> None:
    """Refuse sizes that the configuration accepts but that no model can be built or trained with."""
    layers = model.get("num_hidden_layers")
    if isinstance(layers, int) and layers > MOST_LAYERS:
        raise ValueError(f"num_hidden_layers is {layers:,}; give at most {MOST_LAYERS:,}.")
    for key, value in model.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{key} is {value}; give a finite number.")
    eps, std = model.get("rms_norm_eps"), model.get("initializer_range")
    if isinstance(eps, float) and eps <= 0:
        raise ValueError(f"rms_norm_eps is {eps:g}; give a number above 0, such as 1e-6.")
    if isinstance(std, float) and std < 0:
        raise ValueError(f"initializer_range is {std:g}; give a standard deviation of 0 or more.")


def _check_rope(config: DepthLMConfig) -> None:
    """Build the rotary embedding, since the configuration does not check all its parameters."""
    parameters = config.rope_parameters or {}
    kinds = ["default", *ROPE_INIT_FUNCTIONS]
    if parameters.get("rope_type", "default") not in kinds:
        raise ValueError(
            f"rope_parameters: there is no rope_type {parameters['rope_type']!r}; choose from {', '.join(kinds)}."
        )
    try:
        frequencies = LlamaRotaryEmbedding(config=config).inv_freq
    except (LookupError, ArithmeticError, ValueError, TypeError) as error:
        raise ValueError(f"rope_parameters: no rotary embedding can be built from them ({one_line(error)})") from error
    if not frequencies.isfinite().all():
        raise ValueError("rope_parameters give frequencies that are not finite; is rope_theta above 0?")


def _line_of(sweep: Sweep, entry: _Entry, reason: str, part: str) -> Path_:
    """The path of the setting that a message names first: in the grid, or else in `part`."""
    parts = {key: name for name in ("shape", part) for key in sweep.file.content.get(name, {})}
    named = [word for word in re.findall(r"\w+", reason) if word in parts or word in entry.settings]
    if not named or named[0] not in entry.settings:
        return (parts[named[0]], named[0]) if named else entry.path
    return (*entry.path, named[0])


def _reason(error: Exception) -> str:
    """The last line of an error of `@strict`, with the field that its first line names."""
    cause = error.__cause__ or error
    text = str(cause.args[0] if isinstance(cause, KeyError) and cause.args else cause)  # a KeyError quotes its own
    reason = text.strip().splitlines()[-1].strip()
    field_named = re.search(r"for field '(\w+)'", str(error))
    return f"{field_named[1]}: {reason}" if field_named and field_named[1] not in reason else reason


def _check_lengths(sweep: Sweep, grid: Grid) -> None:
    block_size = sweep.specification.scoring.block_size
    if block_size is not None and block_size > grid.shortest:
        raise sweep.error(
            ("scoring", "block_size"),
            f"scoring.block_size is {block_size:,}, but the shortest sequence_length is {grid.shortest:,}; "
            "give at most that.",
        )
    for point in grid.points:
        if grid.longest % point.training.sequence_length:
            raise sweep.error(
                ("grid",),
                f"sequence lengths must divide the longest of them, so that all models read the same tokens in the "
                f"same order, but {grid.longest} is not a multiple of {point.training.sequence_length}.",
            )


def _keys(entries: Iterable[_Entry]) -> list[str]:
    return list(dict.fromkeys(key for entry in entries for key in entry.settings))


def _label(settings: dict[str, Any], keys: Iterable[str]) -> str:
    """The part of a point's name that distinguishes it in its family."""
    return "-".join(_word(key, settings[key]) for key in dict.fromkeys(keys))


def _word(key: str, value: Any) -> str:
    if isinstance(value, float):
        value = f"{value:g}"
    text = f"{SHORT.get(key, key + '-')}{value}"
    return "".join(char if char.isalnum() or char in "._-" else "_" for char in text)


def _is_name(text: str) -> bool:
    return re.match(NAME_PATTERN, text) is not None and len(text) <= LONGEST_NAME
