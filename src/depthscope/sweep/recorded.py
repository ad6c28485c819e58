"""Comparing the recorded settings of the points in a folder with those of a sweep.

`point.json` holds the settings themselves, not a digest, so that a refusal can name the differences. The whole grid
determines two settings that are in no sweep file: the size of the blocks, if `scoring.block_size` is not set, and the
longest sequence length, over which the order of the data is drawn.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from pydantic import BaseModel, ConfigDict

from depthscope.errors import ReportError, SweepError
from depthscope.files.atomic import is_access_error, read_text
from depthscope.files.checksums import is_whole
from depthscope.files.strict_json import parse
from depthscope.runs.layout import POINT, point_folder
from depthscope.sweep.grid import ANY_VOCABULARY, Grid, Point
from depthscope.sweep.specification import Data, Scoring, Specification, Tokenizer, Training

__all__ = ["Differences", "Tokens", "differences", "read_record", "require_readable", "settings_of"]

MAX_BYTES = 32 * 2**20
DAMAGED_POINT = "Choose another --out, or delete the folder {folder} to train the point again."


class Tokens(BaseModel):
    """The fingerprints of the tokens that a point is trained and measured on; None if unknown."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    train: str | None
    train_and_held_out: str


class _Record(BaseModel):
    """The content of a `point.json`; settings that a later version added have their defaults."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    variant: str
    seed: int
    model: dict[str, Any]
    training: Training
    data: Data
    tokenizer: Tokenizer
    scoring: Scoring
    longest_sequence_length: int
    tokens: Tokens | None = None  # not in records of older versions

    def point(self) -> Point:
        return Point(self.variant, self.seed, self.model, self.training, {})


@dataclass(frozen=True)
class Differences:
    """The differences between a sweep and the settings that a point was trained and measured with, in words."""

    trained: tuple[str, ...] = ()
    measured: tuple[str, ...] = ()


def read_record(path: Path, remedy: str) -> dict[str, Any]:
    """Read a JSON file of a run.

    Args:
        path: the file.
        remedy: what to do if it is damaged, as a sentence.

    Raises:
        SweepError: the file is missing or damaged (the message ends with the remedy), or cannot be read.
    """
    try:
        content = parse(read_text(path, MAX_BYTES), str(path))
    except ReportError as error:
        # A file that cannot be accessed may be intact, so the remedy, which may delete it, is left out.
        raise SweepError(str(error) if is_access_error(error) else f"{error} {remedy}") from error
    if not isinstance(content, dict):
        raise SweepError(f"{path} is damaged: it is not a JSON object. {remedy}")
    if not is_whole(content):
        raise SweepError(f"{path} is damaged: it does not match its checksum. {remedy}")
    return content


def settings_of(specification: Specification, longest: int, block_size: int) -> dict[str, Any]:
    """The settings in `point.json` that determine the result of a point, beside its model and training.

    Args:
        specification: the sweep's specification.
        longest: the longest sequence length of its grid.
        block_size: tokens in a block if the file does not set it.
    """
    settings = specification.scoring.settings(block_size)
    names = ("scores", "fit_blocks", "block_size")
    scoring = specification.scoring.model_copy(update={name: getattr(settings, name) for name in names})
    return {
        "longest_sequence_length": longest,
        "data": specification.data.model_dump(mode="json"),
        "tokenizer": specification.tokenizer.model_dump(mode="json"),
        "scoring": scoring.model_dump(mode="json"),
    }


def differences(
    out: Path, point: Point, specification: Specification, grid: Grid, tokens: Tokens | None = None
) -> Differences:
    """Compare the recorded settings of a point with those of the sweep; no differences without a record.

    Args:
        out: the folder of the sweep.
        point: the point.
        specification: the sweep's specification.
        grid: its points.
        tokens: the fingerprints of the tokens on the disk; None if they are unknown.

    Raises:
        SweepError: the record of the point is damaged.
    """
    record = _load(out, point)
    if record is None:
        return Differences()
    now = settings_of(specification, grid.longest, grid.shortest)
    names = {**record.model, **point.model}
    models = [_effective(each, names) for each in (record.point(), point)]
    before = record.model_dump(mode="json", include={"data", "tokenizer", "scoring", "training"})
    after = {**now, "training": point.training.model_dump(mode="json")}
    changed = {part: _changes(f"{part}.", before[part], after[part]) for part in before}
    trained = _changes("model.", *models) + changed["training"] + changed["data"] + changed["tokenizer"]
    measured = changed["scoring"]
    if record.longest_sequence_length != grid.longest:
        lengths = f"{record.longest_sequence_length}, is now {grid.longest}"
        trained.append(f"the longest sequence_length, over which the order of the data is drawn, was {lengths}")
    if record.tokens is not None and tokens is not None and record.tokens != tokens:
        if record.tokens.train is not None and record.tokens.train == tokens.train:
            measured.append("the held-out text has changed")
        else:
            trained.append(
                f"the text has changed, the fingerprint of its tokens was {record.tokens.train_and_held_out}, is now "
                f"{tokens.train_and_held_out}"
            )
    return Differences(tuple(trained), tuple(measured))


def require_readable(out: Path, point: Point) -> None:
    """Refuse a damaged record of a point, if there is one.

    Raises:
        SweepError: the record is damaged; the message names it and says what to do.
    """
    _load(out, point)


def _load(out: Path, point: Point) -> _Record | None:
    path = point_folder(out, point.name) / POINT
    if os.path.lexists(path.parent) and not path.parent.is_dir():
        raise SweepError(f"{path.parent} is not the folder of a point. Choose another --out, or move it away.")
    if not os.path.lexists(path):
        return None
    remedy = DAMAGED_POINT.format(folder=path.parent)
    content = read_record(path, remedy)
    try:
        record = _Record.model_validate(content)
        _effective(record.point(), record.model)
    except (StrictDataclassError, ValueError, TypeError) as error:  # ValueError: pydantic's too
        raise SweepError(f"{path} is damaged, or of another version of depthscope. {remedy}") from error
    return record


def _effective(point: Point, names: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the model from its configuration, where a default is the same whether it is written or not."""
    config = point.config(ANY_VOCABULARY)
    return {name: getattr(config, name, None) for name in names}


def _changes(prefix: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    return [
        f"{prefix}{name} was {before.get(name)}, is now {after.get(name)}"
        for name in {**before, **after}
        if before.get(name) != after.get(name)
    ]
