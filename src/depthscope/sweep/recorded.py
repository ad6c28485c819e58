"""What the points in a folder were trained and measured with, and what of that a sweep asks otherwise now.

`point.json` says it setting by setting and not as a digest, so that a folder can be refused with what differs. Two of
the settings stand in no file, since the whole grid decides them: the size of the blocks, where `scoring.block_size` is
not given, and the longest sequence length, over which the order of the data is drawn.
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
DAMAGED_POINT = "Choose another --out, or delete the folder {folder} to train the point anew."


class Tokens(BaseModel):
    """The fingerprints of the tokens that a point is trained and measured on; None where they are not known."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    train: str | None
    train_and_held_out: str


class _Record(BaseModel):
    """What is read of a `point.json`; settings that a later version added have their defaults."""

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
    """What a sweep asks otherwise than a point was trained and measured with, in words."""

    trained: tuple[str, ...] = ()
    measured: tuple[str, ...] = ()


def read_record(path: Path, remedy: str) -> dict[str, Any]:
    """Read a JSON file that a run has left.

    Args:
        path: the file.
        remedy: what to do where it is damaged, as a sentence.

    Raises:
        SweepError: it is missing or damaged, and the message names it and ends with the remedy; or it cannot be read.
    """
    try:
        content = parse(read_text(path, MAX_BYTES), str(path))
    except ReportError as error:
        # What only cannot be read is not to be deleted.
        raise SweepError(str(error) if is_access_error(error) else f"{error} {remedy}") from error
    if not isinstance(content, dict):
        raise SweepError(f"{path} is damaged: it holds no settings by name. {remedy}")
    if not is_whole(content):
        raise SweepError(f"{path} is damaged: it is not what was written. {remedy}")
    return content


def settings_of(specification: Specification, longest: int, block_size: int) -> dict[str, Any]:
    """The settings that decide what a point comes to, beside its model and training, as `point.json` keeps them.

    Args:
        specification: of the sweep.
        longest: the longest sequence length of its grid.
        block_size: tokens in a block where the file does not say.
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
    """Compare what the folder of a sweep says of a point with what the sweep asks for; nothing where it says nothing.

    Args:
        out: the folder of the sweep.
        point: the point.
        specification: what is asked for now.
        grid: its points.
        tokens: the text as it is on the disk; not compared where it is not known yet.

    Raises:
        SweepError: the record of the point is damaged.
    """
    known = _known(out, point)
    if known is None:
        return Differences()
    now = settings_of(specification, grid.longest, grid.shortest)
    names = {**known.model, **point.model}
    models = [_effective(each, names) for each in (known.point(), point)]
    before = known.model_dump(mode="json", include={"data", "tokenizer", "scoring", "training"})
    after = {**now, "training": point.training.model_dump(mode="json")}
    changed = {part: _changes(f"{part}.", before[part], after[part]) for part in before}
    trained = _changes("model.", *models) + changed["training"] + changed["data"] + changed["tokenizer"]
    measured = changed["scoring"]
    if known.longest_sequence_length != grid.longest:
        lengths = f"{known.longest_sequence_length}, is now {grid.longest}"
        trained.append(f"the longest sequence_length, over which the order of the data is drawn, was {lengths}")
    if known.tokens is not None and tokens is not None and known.tokens != tokens:
        if known.tokens.train is not None and known.tokens.train == tokens.train:
            measured.append("the held-out text has changed")
        else:
            trained.append(
                f"the text has changed, the fingerprint of its tokens was {known.tokens.train_and_held_out}, is now "
                f"{tokens.train_and_held_out}"
            )
    return Differences(tuple(trained), tuple(measured))


def require_readable(out: Path, point: Point) -> None:
    """Refuse the record of a point that is damaged, where there is one.

    Raises:
        SweepError: naming it, and what to do.
    """
    _known(out, point)


def _known(out: Path, point: Point) -> _Record | None:
    path = point_folder(out, point.name) / POINT
    if os.path.lexists(path.parent) and not path.parent.is_dir():
        raise SweepError(f"{path.parent} is not the folder of a point. Choose another --out, or move it away.")
    if not os.path.lexists(path):
        return None
    remedy = DAMAGED_POINT.format(folder=path.parent)
    content = read_record(path, remedy)
    try:
        known = _Record.model_validate(content)
        _effective(known.point(), known.model)
    except (StrictDataclassError, ValueError, TypeError) as error:  # ValueError: pydantic's too
        raise SweepError(f"{path} is damaged, or of another version of depthscope. {remedy}") from error
    return known


def _effective(point: Point, names: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the model as its configuration has them: a default is the same whether it is written or not."""
    config = point.config(ANY_VOCABULARY)
    return {name: getattr(config, name, None) for name in names}


def _changes(prefix: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    return [
        f"{prefix}{name} was {before.get(name)}, is now {after.get(name)}"
        for name in {**before, **after}
        if before.get(name) != after.get(name)
    ]
