"""Checks of safetensors and GGUF files before they are loaded: the size of the header, and the offsets in it.

Both formats begin with a header with the offsets of the weights; a false header could make a reader allocate or read
without limit.
"""

import json
import math
from pathlib import Path
from typing import Any, TypeGuard

from depthscope.errors import ModelLoadError
from depthscope.loading.gguf.header import read_header
from safety.limits import Limits
from safety.problems import Problem

__all__ = ["count_safetensors", "gguf_facts"]

ELEMENT_BITS = {
    **{"BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F4": 4},
    **{"I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32},
    **{"I64": 64, "U64": 64, "F64": 64, "C64": 64},
}
MOST_TENSORS = 100_000
MOST_DIMENSIONS = 8
LARGEST_DIMENSION = 2**40


def count_safetensors(path: Path, limits: Limits) -> int:
    """Check a safetensors file's header against the file and count its parameters.

    Raises:
        Problem: the file is not safetensors, is cut off, or does not match its header.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > size - 8 or length < 2:
            raise Problem("broken_weights", f"{path.name} {_describe_other_format(start)}")
        if length > limits.max_header_bytes:
            raise _huge_header(path, limits)
        header = _parsed(file.read(length), path)
    ends = [
        _tensor_end(path, name, entry, size - 8 - length) for name, entry in header.items() if name != "__metadata__"
    ]
    if len(ends) > MOST_TENSORS:
        raise Problem("broken_weights", f"{path.name} lists {len(ends):,} tensors; the limit is {MOST_TENSORS:,}.")
    spans = sorted((begin, end) for begin, end, _ in ends)
    place = 0
    for begin, end in spans:
        if begin != place:
            raise Problem("broken_weights", f"The tensors in {path.name} overlap or leave gaps. Save the model again.")
        place = end
    if place != size - 8 - length:
        raise Problem(
            "broken_weights",
            f"{path.name} is cut off or padded: its header describes {place:,} bytes of weights, but "
            f"the file has {size - 8 - length:,}. Upload it again.",
        )
    return sum(count for _, _, count in ends)


def _describe_other_format(start: bytes) -> str:
    """Describe a file that is not safetensors, from its first bytes."""
    if start[:2] == b"PK" or start[:1] == b"\x80":
        return (
            "is a pickle with another name. Loading a pickle can run hidden code; save the model with "
            "save_pretrained, which writes safetensors."
        )
    if start.startswith(b"version "):
        return "is a pointer of Git LFS instead of the file. Fetch the file itself (git lfs pull)."
    return "is not a safetensors file, or it is cut off. Save the model again with save_pretrained."


def _huge_header(path: Path, limits: Limits) -> Problem:
    return Problem(
        "broken_weights",
        f"The header of {path.name} is larger than {limits.max_header_bytes / 2**20:g} MiB, more than a model needs.",
    )


def _parsed(data: bytes, path: Path) -> dict[str, Any]:
    try:
        header = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Problem("broken_weights", f"The header of {path.name} cannot be read. Save the model again.") from error
    if not isinstance(header, dict):
        raise Problem("broken_weights", f"The header of {path.name} is not a list of tensors. Save the model again.")
    return header


def _tensor_end(path: Path, name: str, entry: Any, available: int) -> tuple[int, int, int]:
    """The begin, the end and the number of elements of one tensor."""
    what = f"The tensor {name[:60]!a} in {path.name}"
    if not isinstance(entry, dict):
        raise Problem("broken_weights", f"{what} has no valid description. Save the model again.")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in ELEMENT_BITS:
        raise Problem("broken_weights", f"{what} is of the unknown type {str(dtype)[:20]!a}. Save it as float32.")
    if not _are_sizes(shape) or len(shape) > MOST_DIMENSIONS:
        raise Problem("broken_weights", f"{what} has an impossible shape. Save the model again.")
    if not _are_sizes(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= available:
        raise Problem("broken_weights", f"{what} lies outside the file, which may be cut off. Upload it again.")
    count = math.prod(shape)
    if count * ELEMENT_BITS[dtype] != 8 * (offsets[1] - offsets[0]):
        raise Problem("broken_weights", f"{what} has another size than its shape and type say. Save the model again.")
    return offsets[0], offsets[1], count


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < LARGEST_DIMENSION for item in value)


KEPT_ITEMS = 64  # of a list in the metadata; longer ones are vocabularies


def gguf_facts(path: Path, limits: Limits) -> tuple[int, dict[str, Any]]:
    """Check a GGUF file's header against the file; return its number of parameters and metadata (lists are cut).

    Raises:
        Problem: the file is not GGUF, is cut off, does not match its header, or is one part of several.
    """
    try:
        header = read_header(path, path.name, most_bytes=limits.max_header_bytes)
    except ModelLoadError as error:
        raise Problem("broken_weights", str(error)) from error
    if header.metadata.get("split.count", 0) not in (0, 1):
        raise Problem(
            "broken_weights",
            f"{path.name} is one part of a GGUF file that was split. Merge the parts first (llama-gguf-split --merge "
            "FIRST_PART WHOLE) and upload the whole.",
        )
    metadata = {key: value[:KEPT_ITEMS] if isinstance(value, list) else value for key, value in header.metadata.items()}
    return sum(tensor.count for tensor in header.tensors), metadata
