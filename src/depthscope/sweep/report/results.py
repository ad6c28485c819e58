"""Reading the results of a sweep from its folder: one record per point, in any state.

    load_results(DIR) -> SweepResults: its families, and for each point
        status      finished, diverged, failed; "unfinished" if it was started, "not run" if it was not, and
                    "unreadable" if one of its files is damaged, with the reason
        report      the scores of the trained model; `untrained`, those of the same model before training
        losses      training loss over tokens; `variances`, the variance per layer over tokens

Folders also come from strangers: names are checked before they become paths, files are read up to a bound, and one
damaged point does not affect the others.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from depthscope.errors import ReportError, SweepError
from depthscope.files.atomic import MISSING, is_access_error, read_text, reason
from depthscope.files.checksums import checksum
from depthscope.files.strict_json import parse
from depthscope.files.validation import MAX_FLOAT, MAX_INTEGER, UNPRINTABLE, first_problem
from depthscope.models.defaults import DEFAULTS
from depthscope.report.report import LayerReport
from depthscope.runs.finished_files import known_checksums, report_checksum
from depthscope.runs.layout import (
    ENVIRONMENT,
    FINISHED,
    HISTORY,
    LOG,
    NOT_RUN,
    POINT,
    RESULT,
    SWEEP_INDEX,
    TRAINED_REPORT,
    UNFINISHED,
    UNREADABLE,
    UNTRAINED_REPORT,
    point_folder,
)
from depthscope.runs.read import TrainingCurve, losses, read_sealed, variances
from depthscope.sweep.report.derived import Numbers, derive
from depthscope.sweep.specification import NAME_PATTERN
from depthscope.wording.messages import one_line

__all__ = ["Curve", "IndexedFamily", "PointResult", "SweepResults", "load_results"]

SCHEMA_VERSION = 1
MAX_INDEX_BYTES = 32 * 2**20
MAX_POINTS = 10_000
MAX_REASON = 300

Name = Annotated[str, Field(pattern=NAME_PATTERN, max_length=200)]
Words = Annotated[str, Field(max_length=20_000)]
Quantity = Annotated[float, Field(ge=-MAX_FLOAT, le=MAX_FLOAT)]
Count = Annotated[int, Field(ge=0, le=MAX_INTEGER)]
Validated = TypeVar("Validated", bound="_Loose")


class _Loose(BaseModel):
    """Base class of the content of files: known fields are checked, unknown ones ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class IndexedFamily(_Loose):
    """One entry of the grid: its variants in order, and the settings that take more than one value in it."""

    name: Name
    variants: list[Name] = Field(min_length=1)
    axes: list[Words]


class _Data(_Loose):
    name: Words
    fingerprint: Words
    vocab_size: int


class _Training(_Loose):
    tokens: int = Field(ge=1, le=MAX_INTEGER)
    batch_tokens: int = Field(ge=1, le=MAX_INTEGER)


class _Point(_Loose):
    point: Name
    variant: Name
    seed: int = Field(ge=-MAX_INTEGER, le=MAX_INTEGER)
    settings: dict[Words, JsonValue] = Field(max_length=100)
    model: dict[Words, JsonValue] = Field(max_length=200)
    training: dict[Words, JsonValue] = Field(max_length=200)


class _Index(_Loose):
    schema_version: Literal[1]
    name: Name
    description: Words = ""
    families: list[IndexedFamily] = Field(min_length=1, max_length=1000)
    points: list[_Point] = Field(min_length=1, max_length=MAX_POINTS)
    seeds: list[int] = Field(min_length=1)
    block_size: int
    data: _Data


class _Result(_Loose):
    point: Name
    status: Literal["finished", "diverged", "failed"]
    error: Words = ""
    loss: Quantity | None = None
    loss_se: Annotated[float, Field(ge=0, le=MAX_FLOAT)] | None = None  # not in results of older versions
    untrained_loss: Quantity | None = None
    parameters: Count | None = None
    active_parameters: Count | None = None
    flops: Quantity | None = None


@dataclass(frozen=True)
class Curve:
    """A quantity over training: its `values` at `tokens` tokens, one number or one per layer; None if not finite."""

    tokens: list[int] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class PointResult:
    """One trained model, or why there is none; see the module's docstring."""

    name: str
    variant: str
    seed: int
    settings: dict[str, Any]
    model: dict[str, Any]
    training: dict[str, Any]
    status: str
    reason: str = ""
    is_unread: bool = False  # whether a file could not be accessed, so that it may be intact
    result: _Result | None = None
    report: LayerReport | None = None
    untrained: LayerReport | None = None
    losses: Curve = Curve()
    variances: Curve = Curve()
    notes: list[str] = field(default_factory=list)  # damaged files of a finished point
    unread: list[str] = field(default_factory=list)  # files that could not be accessed and may be intact
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        """Whether it was trained and measured."""
        return self.status == FINISHED

    @property
    def tokens(self) -> int:
        """Training tokens, in whole steps."""
        return self.training["tokens"] // self.training["batch_tokens"] * self.training["batch_tokens"]

    def setting(self, name: str) -> Any:
        """The value of a setting of the model or the training, or its default."""
        if "expert" in name and name != "num_experts" and self.setting("num_experts") is None:
            return None  # a dense model has no experts
        for settings in (self.settings, self.model, self.training):
            if name in settings:
                return settings[name]
        if name == "num_key_value_heads":
            return self.setting("num_attention_heads")  # multi-head attention
        return DEFAULTS.get(name)

    @cached_property
    def numbers(self) -> Numbers:
        """Its derived numbers by name (`depthscope.sweep.report.derived`); {} if it is not finished."""
        if not self.finished or self.result is None:
            return {}
        sizes = {name: getattr(self.result, name) for name in ("parameters", "active_parameters", "flops")}
        losses = {name: getattr(self.result, name) for name in ("loss", "loss_se", "untrained_loss")}
        return derive({**sizes, "tokens": self.tokens, **losses}, self.report, self.untrained)


@dataclass(frozen=True)
class SweepResults:
    """A sweep, finished or not: points in the order of its index, families with their variants."""

    name: str
    description: str
    families: list[IndexedFamily]
    points: list[PointResult]
    seeds: list[int]
    block_size: int
    data: dict[str, Any]

    def of_variant(self, variant: str) -> list[PointResult]:
        """The points of a variant, one per seed."""
        return self._by_variant.get(variant, [])

    @cached_property
    def _by_variant(self) -> dict[str, list[PointResult]]:
        by_variant: dict[str, list[PointResult]] = {}
        for point in self.points:
            by_variant.setdefault(point.variant, []).append(point)
        return by_variant

    @property
    def is_damaged(self) -> bool:
        """Whether a file of a point is damaged or cannot be read."""
        return any(point.status == UNREADABLE or point.notes or point.unread for point in self.points)

    def with_status(self, status: str) -> list[PointResult]:
        """The points that have a status."""
        return [point for point in self.points if point.status == status]

    @property
    def thresholds(self) -> list[float]:
        """The thresholds of usefulness of the points; a sweep of this program has one."""
        values = {point.report.settings.get("threshold") for point in self.points if point.report is not None}
        return sorted(float(value) for value in values if isinstance(value, (int, float)))


def load_results(folder: str | os.PathLike[str]) -> SweepResults:
    """Read the results of a sweep.

    Args:
        folder: the folder that `depthscope sweep run` wrote, finished or not.

    Raises:
        SweepError: the folder is not that of a sweep, or its index is damaged.
    """
    root = Path(folder)
    index = _read_index(root)
    variants = {point.variant for point in index.points}
    for family in index.families:
        unknown = [variant for variant in family.variants if variant not in variants]
        if unknown:
            raise SweepError(
                f"{root / 'sweep.json'} is damaged: family {family.name} has the variant {unknown[0]}, which no point "
                "has. Run the sweep again: depthscope sweep run writes the index again."
            )
    return SweepResults(
        name=index.name,
        description=UNPRINTABLE.sub("\ufffd", index.description),
        families=index.families,
        points=[_read_point(point_folder(root, point.point), point) for point in index.points],
        seeds=index.seeds,
        block_size=index.block_size,
        data=index.data.model_dump(),
    )


def _read_index(root: Path) -> _Index:
    path = root / SWEEP_INDEX
    if not path.is_file():
        problem = "a folder without sweep.json" if root.is_dir() else "not a folder"
        raise SweepError(
            f"{root} is {problem}; expected the folder that depthscope sweep run wrote, with the list of points in "
            "sweep.json. Give that folder, or run the sweep first: depthscope sweep run FILE."
        )
    try:
        return _validated(_Index, parse(read_text(path, MAX_INDEX_BYTES), str(path)), str(path))
    except ReportError as error:
        if is_access_error(error):
            raise SweepError(str(error)) from error
        raise SweepError(
            f"{one_line(error)} Expected the index of a sweep; run the sweep again, which writes it again."
        ) from error


def _validated(kind: type[Validated], content: Any, source: str) -> Validated:
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise ReportError(f"{source} is not valid: {first_problem(error, 'the file')}") from error


def _read_point(folder: Path, point: _Point) -> PointResult:
    """The record of a point; problems with its files become its status."""
    fixed: dict[str, Any] = {
        "name": point.point,
        "variant": point.variant,
        "seed": point.seed,
        "settings": point.settings,
        "model": point.model,
        "training": point.training,
    }
    try:
        if os.path.lexists(folder) and not folder.is_dir():
            raise ReportError(f"{folder.name} is not the folder of a point.")
        if os.path.lexists(folder / POINT):
            _validated(_Point, read_sealed(folder / POINT, MAX_INDEX_BYTES), POINT)
        training = _validated(_Training, point.training, f"training of {point.point}")
        has_result = os.path.lexists(folder / RESULT)
        notes: list[str] = []
        unread: list[str] = []
        sums = _checksums(folder, notes, unread) if has_result else {}
        curves = _read_curves(folder, training.batch_tokens, sums, notes, unread)
        if not has_result:
            status = UNFINISHED if folder.is_dir() else NOT_RUN
            return PointResult(**fixed, status=status, **curves)
        result = _validated(_Result, read_sealed(folder / RESULT, MAX_INDEX_BYTES), RESULT)
        if result.point != point.point:
            raise ReportError(f"result.json belongs to another point, {result.point}")
        if result.status != FINISHED:
            return PointResult(**fixed, status=result.status, reason=_short(result.error), result=result, **curves)
        return PointResult(**fixed, status=FINISHED, result=result, **_read_reports(folder, sums), **curves)
    except (ReportError, OSError) as error:
        message = f"{folder} cannot be read: {reason(error)}." if isinstance(error, OSError) else str(error)
        return PointResult(
            **fixed,
            status=UNREADABLE,
            reason=_short(message.replace(str(folder) + os.sep, "").replace(str(folder), folder.name)),
            is_unread=is_access_error(error),
        )


def _checksums(folder: Path, notes: list[str], unread: list[str]) -> dict[str, str]:
    """The checksums of the files of a point."""
    try:
        return known_checksums(folder) or {}
    except ReportError as error:
        _note(error, "The other files cannot be checked", notes, unread)
        return {}


def _note(error: ReportError, consequence: str, notes: list[str], unread: list[str]) -> None:
    """Add an error and its consequence to `notes` (damaged) or `unread` (may be intact)."""
    (unread if is_access_error(error) else notes).append(f"{one_line(error)} {consequence}")


def _read_reports(folder: Path, sums: Mapping[str, str]) -> dict[str, Any]:
    loaded: dict[str, LayerReport | None] = {}
    for key, name in (("report", TRAINED_REPORT), ("untrained", UNTRAINED_REPORT)):
        if name == UNTRAINED_REPORT and name not in sums and not (folder / name).is_file():
            loaded[key] = None
            continue
        loaded[key] = report = LayerReport.load(folder / name)
        if sums.get(name) not in (None, report_checksum(report)):
            raise ReportError(f"{name} does not match its checksum.")
    return loaded


def _read_curves(
    folder: Path, batch_tokens: int, sums: Mapping[str, str], notes: list[str], unread: list[str]
) -> dict[str, Any]:
    """Losses, variances and environment, each empty if its file is missing, and notes on damaged files."""
    environment: dict[str, Any] = {}
    try:
        if os.path.lexists(folder / ENVIRONMENT):
            environment = read_sealed(folder / ENVIRONMENT, MAX_INDEX_BYTES)
    except ReportError as error:
        _note(error, "Its hardware and versions are unknown", notes, unread)
    curves: dict[str, Any] = {}
    lost = {}
    for kind, name, read in (("losses", LOG, losses), ("variances", HISTORY, variances)):
        logged = TrainingCurve()
        try:
            logged = read(folder)
        except ReportError as error:
            _note(error, f"{kind.capitalize()} are not drawn", notes, unread)
        curves[kind] = Curve([step * batch_tokens for step in logged.steps], logged.values)
        lost[name] = logged.unread
    for name, lines in lost.items():
        if lines:
            notes.append(f"{name} is damaged: some lines cannot be read and are not drawn")
        elif name in sums and _is_other(folder / name, sums[name]):
            notes.append(f"{name} is damaged: its curve may be wrong")
    return {
        **curves,
        "environment": environment,
        "notes": [_short(note.replace(str(folder) + os.sep, "")) for note in notes],
        "unread": [_short(note.replace(str(folder) + os.sep, "")) for note in unread],
    }


def _is_other(path: Path, expected: str) -> bool:
    try:
        return checksum(path) != expected
    except MISSING:
        return True
    except OSError:  # noted where the file is read
        return False


def _short(text: str) -> str:
    clean = UNPRINTABLE.sub("\ufffd", " ".join(text.split()))
    return clean if len(clean) <= MAX_REASON else clean[: MAX_REASON - 1] + "…"
