"""Reading a GGUF file that llama.cpp split into parts: they lie in one folder, and their names have numbers.

model-00001-of-00003.gguf     the metadata, and the first tensors
model-00002-of-00003.gguf     further tensors, with their own header
"""

import re
from dataclasses import replace
from pathlib import Path

from depthscope.errors import ModelLoadError
from depthscope.loading.gguf.header import GgufHeader, read_header
from depthscope.wording.messages import listed

__all__ = ["cut_into_pieces", "parts_beside", "read_gguf"]

PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<end>\.gguf)", re.IGNORECASE)
# model.gguf.part1, model.gguf.part1of2, model.gguf-split-a: pieces without headers, made by `split` or a script.
PIECE = re.compile(r"(?P<whole>.+\.gguf)[-._]?(?:(?:part|split|chunk|piece)[-._]?\w*|\d+)", re.IGNORECASE)


def read_gguf(path: Path, name: str) -> GgufHeader:
    """Read the header of a GGUF file; if the file is one part of several, the headers of all parts.

    Raises:
        ModelLoadError: the file is damaged, or parts are missing or do not belong together.
    """
    header = read_header(path, name)
    count = header.metadata.get("split.count")
    if not isinstance(count, int) or count < 2:
        return header
    number = header.metadata.get("split.no")
    number = number + 1 if isinstance(number, int) else 1
    problem = f"{name!r} is part {number} of {count} of a GGUF file that was split"
    match = PART.fullmatch(path.name)
    if match is None or (int(match["number"]), int(match["count"])) != (number, count):
        raise ModelLoadError(
            f"{problem}, but its name does not say so, so the other parts cannot be found. Name the parts as llama.cpp "
            f"does (NAME-{number:05}-of-{count:05}.gguf), in one folder, {_or_merge('NAME', '.gguf', count)}."
        )
    names = _part_names(match)
    if absent := [part for part in names if not path.with_name(part).is_file()]:
        raise ModelLoadError(
            f"{problem}, but not all parts are beside it; missing: {listed(absent)}. Put all parts into one folder, "
            f"{_or_merge(match['stem'], match['end'], count)}."
        )
    return _join([header if part == path.name else read_header(path.with_name(part)) for part in names], name)


def parts_beside(path: Path) -> list[Path]:
    """The other parts of a split GGUF file that exist beside it."""
    match = PART.fullmatch(path.name)
    parts = [path.with_name(name) for name in _part_names(match)] if match else []
    return [part for part in parts if part.name != path.name and part.is_file()]


def cut_into_pieces(name: str) -> str | None:
    """If a file's name is that of a piece of a GGUF file: what to do; else None."""
    match = PIECE.fullmatch(name)
    if match is None:
        return None
    return (
        f"{name!r} is a piece of a GGUF file that was cut up. First join all pieces in order, such as: "
        f"cat {match['whole']}?* > {match['whole']}"
    )


def _part_names(match: re.Match[str]) -> list[str]:
    """The names of all parts, from the name of one."""
    return [
        f"{match['stem']}-{index:05}-of-{match['count']}{match['end']}" for index in range(1, int(match["count"]) + 1)
    ]


def _join(parts: list[GgufHeader], name: str) -> GgufHeader:
    first = parts[0]
    tensors = tuple(tensor for part in parts for tensor in part.tensors)
    stated = [(part.metadata.get("split.no"), part.metadata.get("split.count")) for part in parts]
    total = first.metadata.get("split.tensors.count", len(tensors))
    is_whole = stated == [(index, len(parts)) for index in range(len(parts))] and total == len(tensors)
    if not is_whole or len({tensor.name for tensor in tensors}) < len(tensors):
        raise ModelLoadError(
            f"The {len(parts)} parts beside {name!r} do not belong together: their headers state other numbers "
            "or other tensors. Fetch all of them again."
        )
    metadata = {key: value for key, value in first.metadata.items() if not key.startswith("split.")}
    return replace(first, name=name, metadata=metadata, tensors=tensors)


def _or_merge(stem: str, end: str, count: int) -> str:
    return f"or merge them: llama-gguf-split --merge {stem}-00001-of-{count:05}{end} {stem}{end}"
