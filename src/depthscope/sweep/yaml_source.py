"""YAML with line numbers: plain data, and the file and line of each part.

Only plain data is read (no tags that build objects). Keys are words that occur once in a mapping. `&` and `*` are
refused, since they can make a small file endless; `extends:` serves for reuse. Mappings are merged key by key with
those of the extended file; everything else is replaced.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from depthscope.errors import SpecificationError
from depthscope.wording.messages import one_line

__all__ = ["Where", "YamlFile", "read_yaml"]

Path_ = tuple[str | int, ...]  # the keys and indices that lead to a part
MAX_BYTES = 2**20
TAGS = "tag:yaml.org,2002:"
MAPPING, SEQUENCE = f"{TAGS}map", f"{TAGS}seq"
KEYS = frozenset(f"{TAGS}{kind}" for kind in ("str", "int", "float", "bool", "null", "timestamp", "value"))


@dataclass(frozen=True)
class Where:
    """A line in a file; lines count from 1, as editors show them."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}"


@dataclass
class YamlFile:
    """The content of a file; `places` maps the path of a part to the line of its key."""

    content: dict[str, Any]
    places: dict[Path_, Where] = field(default_factory=dict)

    def where(self, path: Path_) -> Where | None:
        """The line of a part, or of the nearest part around it that is in the file."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.places:
                return self.places[path[:length]]
        return None

    def at(self, path: Path_) -> Any:
        """The value at a path; None if there is none."""
        value: Any = self.content
        for key in path:
            try:
                value = value[key]
            except (LookupError, TypeError):
                return None
        return value

    def without(self, paths: Iterable[Path_]) -> "YamlFile":
        """A copy without some settings; missing ones are ignored."""
        removed = set(paths)
        return YamlFile(_without(self.content, (), removed), _outside(self.places, removed))

    def extended_by(self, other: "YamlFile", replaced: frozenset[str] = frozenset()) -> "YamlFile":
        """Merge the content of `other` over this content; the top-level keys in `replaced` are replaced instead."""
        places = _outside(self.places, {*_leaves(other.content), *((key,) for key in replaced & set(other.content))})
        merged = _merge({key: v for key, v in self.content.items() if key not in replaced}, other.content)
        kept = {key: v for key, v in self.content.items() if key in replaced and key not in other.content}
        return YamlFile(kept | merged, places | other.places)


def read_yaml(path: Path, label: str | None = None) -> YamlFile:
    """Read one file.

    Raises:
        SpecificationError: the file is missing, not readable, not YAML, or not a mapping.
    """
    label = label or str(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise SpecificationError(f"{label} is larger than 1 MiB; a sweep file holds settings, not data.")
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise SpecificationError(f"{label}, line {line}: this is not UTF-8 text; save the file as UTF-8.") from error
    except OSError as error:
        raise SpecificationError(f"cannot read the sweep file {label}: {error.strerror}.") from error
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise SpecificationError(f"{label}, line {line}: this is not YAML: {error.problem}.") from error
    except yaml.YAMLError as error:
        raise SpecificationError(f"{label} is not YAML: {one_line(error)}") from error
    except RecursionError as error:
        raise SpecificationError(f"{label} nests too deeply; a sweep file has a few levels.") from error
    if not isinstance(node, yaml.MappingNode):
        raise SpecificationError(f"{label} holds no settings; a sweep file is a mapping, with `grid:` at least.")
    places: dict[Path_, Where] = {}
    _refuse_aliases(text, label)
    content = _plain(node, (), places, label)
    return YamlFile(content, places)


def _refuse_aliases(text: str, file: str) -> None:
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise SpecificationError(
                f"{file}, line {event.start_mark.line + 1}: *{event.anchor} refers to another part; write the part "
                "again, or use `extends`."
            )


def _plain(node: yaml.Node, path: Path_, places: dict[Path_, Where], file: str) -> Any:
    _refuse_tag(node, file)
    if isinstance(node, yaml.MappingNode):
        content: dict[str, Any] = {}
        for key_node, value_node in node.value:
            where = Where(file, key_node.start_mark.line + 1)
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key is None or key_node.tag not in KEYS:
                raise SpecificationError(f"{where}: keys are plain words here.")
            if key in content:
                raise SpecificationError(f"{where}: {key!r} occurs twice; keep one of them.")
            places[(*path, key)] = where
            content[key] = _plain(value_node, (*path, key), places, file)
        return content
    if isinstance(node, yaml.SequenceNode):
        items = []
        for index, item in enumerate(node.value):
            places[(*path, index)] = Where(file, item.start_mark.line + 1)
            items.append(_plain(item, (*path, index), places, file))
        return items
    return _scalar(node, file)


def _refuse_tag(node: yaml.Node, file: str) -> None:
    """Refuse a mapping or list with a tag; `_scalar` refuses scalars that are not plain."""
    if not isinstance(node, yaml.ScalarNode) and node.tag not in (MAPPING, SEQUENCE):
        tag = node.tag.replace(TAGS, "!!")
        raise SpecificationError(
            f"{Where(file, node.start_mark.line + 1)}: {tag} is not plain data; leave the tag out."
        )


def _scalar(node: yaml.Node, file: str) -> Any:
    where = Where(file, node.start_mark.line + 1)
    loader = yaml.SafeLoader("")
    try:
        value = loader.construct_object(node)
    except (yaml.YAMLError, ValueError, LookupError, AttributeError) as error:  # of a tag that does not fit
        raise SpecificationError(
            f"{where}: {node.value!r} is not plain data (a word, a number, true, false)."
        ) from error
    if isinstance(value, str) and node.style is None:
        return _number(value)
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise SpecificationError(
        f"{where}: {node.value!r} is read as a date or the like; put it in quotes if it is a word."
    )


def _number(text: str) -> Any:
    """Read 3e-3 and 2_000.5e6 as numbers, which YAML 1.1 reads as words."""
    try:
        return float(text) if text[:1] in "+-.0123456789" else text
    except ValueError:
        return text


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _leaves(content: Mapping[str, Any], path: Path_ = ()) -> Iterator[Path_]:
    """The paths of all values that are not mappings."""
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key)


def _without(content: Mapping[str, Any], path: Path_, removed: set[Path_]) -> dict[str, Any]:
    kept = {key: value for key, value in content.items() if (*path, key) not in removed}
    return {
        key: _without(value, (*path, key), removed) if isinstance(value, Mapping) else value
        for key, value in kept.items()
    }


def _outside(places: Mapping[Path_, Where], removed: set[Path_]) -> dict[Path_, Where]:
    """The places that are not in one of the removed parts."""
    return {
        path: where
        for path, where in places.items()
        if not any(path[:length] in removed for length in range(1, len(path) + 1))
    }
