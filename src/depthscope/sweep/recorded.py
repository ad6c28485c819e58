"""What the points in a folder were trained and measured with, and what of that a sweep asks otherwise now.

`point.json` says it setting by setting and not as a digest, so that a folder can be refused with what differs. Two of
the settings stand in no file, since the whole grid decides them: the size of the blocks, where `scoring.block_size` is
not given, and the longest sequence length, over which the order of the data is drawn.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.errors import StrictDataclassError
from pydantic import BaseModel, ConfigDict

from depthscope.errors import ReportError, SweepError
from depthscope.files import read_text
from depthscope.strict_json import parse
from depthscope.sweep.grid import ANY_VOCABULARY, Grid, Point, digest
from depthscope.sweep.specification import Data, Scoring, Specification, Tokenizer, Training

__all__ = ["Differences", "differences", "identity", "read_record", "settings_of"]

MAX_BYTES = 32 * 2**20
DAMAGED_POINT = "Choose another --out, or delete the folder {folder} to train the point anew."


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
        SweepError: it is missing or damaged; the message names it and ends with the remedy.
    """
    try:
        content = parse(read_text(path, MAX_BYTES), str(path))
    except ReportError as error:
        raise SweepError(f"{error} {remedy}") from error
    if not isinstance(content, dict):
        raise SweepError(f"{path} is damaged: it holds no settings by name. {remedy}")
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


def differences(out: Path, point: Point, specification: Specification, grid: Grid) -> Differences:
    """Compare what the folder of a sweep says of a point with what the sweep asks for; nothing where it says nothing.

    Raises:
        SweepError: the record of the point is damaged.
    """
    path = out / "points" / point.name / "point.json"
    if not path.is_file():
        return Differences()
    remedy = DAMAGED_POINT.format(folder=path.parent)
    now = settings_of(specification, grid.longest, grid.shortest)
    content = read_record(path, remedy)
    if "scoring" not in content:
        content |= _of_older(content, out, point, specification, grid)
    try:
        known = _Record.model_validate(content)
        names = {**known.model, **point.model}
        models = [_effective(each, names) for each in (known.point(), point)]
    except (StrictDataclassError, ValueError, TypeError) as error:  # ValueError: pydantic's too
        raise SweepError(f"{path} is damaged, or of another version of depthscope. {remedy}") from error
    before = known.model_dump(mode="json", include={"data", "tokenizer", "scoring", "training"})
    after = {**now, "training": point.training.model_dump(mode="json")}
    changed = {part: _changes(f"{part}.", before[part], after[part]) for part in before}
    trained = _changes("model.", *models) + changed["training"] + changed["data"] + changed["tokenizer"]
    if known.longest_sequence_length != grid.longest:
        lengths = f"{known.longest_sequence_length}, is now {grid.longest}"
        trained.append(f"the longest sequence_length, over which the order of the data is drawn, was {lengths}")
    return Differences(tuple(trained), tuple(changed["scoring"]))


def identity(point: Point, specification: Specification) -> str:
    """A digest of what the file says that decides what a point comes to; older versions kept it, and nothing else."""
    parts = (specification.data, specification.tokenizer, specification.scoring)
    return digest([point.identity, *(part.model_dump() for part in parts)])


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


def _of_older(content: Mapping[str, Any], out: Path, point: Point, specification: Specification, grid: Grid) -> Any:
    """What a record of an older version, which has a digest only, would say: out of the files of the whole sweep."""
    same = content.get("identity") == identity(point, specification)
    before = specification if same else _last_specification(out, point)
    try:
        index = read_record(out / "sweep.json", "")
        longest = max(each["training"]["sequence_length"] for each in index["points"])
        return settings_of(before, longest, index["block_size"])
    except (SweepError, KeyError, TypeError, ValueError):
        return settings_of(before, grid.longest, grid.shortest)  # without an index there is nothing to compare with


def _last_specification(out: Path, point: Point) -> Specification:
    path = out / "sweep.yaml"
    try:
        return Specification.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise SweepError(
            f"{point.name} was trained with other settings than the sweep has now, and {path}, which would say with "
            "which, cannot be read. Choose another --out."
        ) from error
