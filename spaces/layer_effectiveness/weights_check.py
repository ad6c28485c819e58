"""Looking at safetensors and GGUF files before anything loads them: headers bounded and held against the file's length.

Both formats begin with a header that says what lies where; a lying one could make a reader allocate or read without
bound.
"""

import io
import json
import math
import struct
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

from limits import Limits
from problems import Problem

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
        Problem: it is no safetensors file, is cut off, or its header does not describe it.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > size - 8 or length < 2:
            raise Problem("broken_weights", f"{path.name} {_what_else(start)}")
        if length > limits.max_header_bytes:
            raise _huge_header(path, limits)
        header = _parsed(file.read(length), path)
    ends = [
        _tensor_end(path, name, entry, size - 8 - length) for name, entry in header.items() if name != "__metadata__"
    ]
    if len(ends) > MOST_TENSORS:
        raise Problem("broken_weights", f"{path.name} lists {len(ends):,} tensors; at most {MOST_TENSORS:,} are taken.")
    spans = sorted((begin, end) for begin, end, _ in ends)
    place = 0
    for begin, end in spans:
        if begin != place:
            raise Problem("broken_weights", f"The tensors in {path.name} overlap or leave gaps. Save the model again.")
        place = end
    if place != size - 8 - length:
        raise Problem(
            "broken_weights",
            f"{path.name} is cut off or padded: its header speaks of {place:,} bytes of weights, and "
            f"{size - 8 - length:,} are there. Upload it again.",
        )
    return sum(count for _, _, count in ends)


def _what_else(start: bytes) -> str:
    """Say what a file is that begins with these bytes and is no safetensors file."""
    if start[:2] == b"PK" or start[:1] == b"\x80":
        return (
            "is a pickle with another name. Loading one can run code that is hidden in it; save the model with "
            "save_pretrained, which writes safetensors."
        )
    if start.startswith(b"version "):
        return "is a pointer that Git LFS left in the file's place. Fetch the file itself (git lfs pull)."
    return "is not a safetensors file, or it is cut off. Save the model again with save_pretrained."


def _huge_header(path: Path, limits: Limits) -> Problem:
    return Problem(
        "broken_weights",
        f"The header of {path.name} is larger than {limits.max_header_bytes / 2**20:g} MiB, which no real model's is.",
    )


def _parsed(data: bytes, path: Path) -> dict[str, Any]:
    try:
        header = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Problem("broken_weights", f"The header of {path.name} cannot be read. Save the model again.") from error
    if not isinstance(header, dict):
        raise Problem("broken_weights", f"The header of {path.name} is no list of tensors. Save the model again.")
    return header


def _tensor_end(path: Path, name: str, entry: Any, available: int) -> tuple[int, int, int]:
    """The begin, the end and the number of elements of one tensor."""
    what = f"The tensor {name[:60]!a} in {path.name}"
    if not isinstance(entry, dict):
        raise Problem("broken_weights", f"{what} is not described. Save the model again.")
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


# GGUF: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

# Type of a value -> how it is packed; 8 is a string and 9 an array.
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
# Type of a tensor -> elements in a block, bytes of a block.
BLOCKS = {
    **{0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 36)},
    **{10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292), 16: (256, 66)},
    **{17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82), 23: (256, 136)},
    **{24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2), 34: (256, 54)},
    **{35: (256, 66), 39: (32, 17)},
}
MOST_KEYS = 10_000
MOST_ITEMS = 2_000_000
KEPT_ITEMS = 64  # of an array; longer ones are vocabularies


def gguf_facts(path: Path, limits: Limits) -> tuple[int, dict[str, Any]]:
    """Check a GGUF file's header against the file; gives its number of parameters and its scalar metadata.

    Raises:
        Problem: it is no GGUF file, is cut off, or its header does not describe it.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = io.BytesIO(file.read(limits.max_header_bytes))
    try:
        return _gguf_header(head, path, size)
    except (struct.error, UnicodeDecodeError) as error:
        if size > limits.max_header_bytes:
            raise _huge_header(path, limits) from error
        raise Problem(
            "broken_weights", f"{path.name} is cut off, or its header is garbled. Upload it again."
        ) from error


def _gguf_header(head: BinaryIO, path: Path, size: int) -> tuple[int, dict[str, Any]]:
    magic = head.read(4)
    if magic != b"GGUF":
        raise Problem("broken_weights", f"{path.name} is not a GGUF file: it does not begin with the letters GGUF.")
    version, tensors, keys = _unpack(head, "<I"), _unpack(head, "<Q"), _unpack(head, "<Q")
    if version not in (2, 3):
        raise Problem("broken_weights", f"{path.name} is of GGUF version {version}; versions 2 and 3 are read.")
    if tensors > MOST_TENSORS or keys > MOST_KEYS:
        raise Problem("broken_weights", f"{path.name} speaks of {tensors:,} tensors and {keys:,} keys; it is garbled.")
    metadata = {_string(head): _value(head, path, 0) for _ in range(keys)}
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= 1 << 16:
        raise Problem("broken_weights", f"{path.name} has an impossible alignment. Convert the model again.")
    infos = [_gguf_tensor(head, path) for _ in range(tensors)]
    start = -(-head.tell() // alignment) * alignment
    if any(start + offset + length > size for offset, length, _ in infos):
        raise Problem(
            "broken_weights", f"{path.name} is cut off: it ends before the last of its weights. Upload it again."
        )
    if sum(length for _, length, _ in infos) > size:
        raise Problem("broken_weights", f"The tensors in {path.name} overlap. Convert the model again.")
    return sum(count for _, _, count in infos), metadata


def _gguf_tensor(head: BinaryIO, path: Path) -> tuple[int, int, int]:
    """The offset, the length in bytes and the number of elements of one tensor."""
    name = _string(head)
    dimensions = _unpack(head, "<I")
    if dimensions > MOST_DIMENSIONS:
        raise Problem("broken_weights", f"The tensor {name[:60]!a} in {path.name} has {dimensions} dimensions.")
    shape = [_unpack(head, "<Q") for _ in range(dimensions)]
    kind, offset = _unpack(head, "<I"), _unpack(head, "<Q")
    if kind not in BLOCKS:
        raise Problem("broken_weights", f"The tensor {name[:60]!a} in {path.name} is of the unknown type {kind}.")
    elements, block = BLOCKS[kind]
    count = math.prod(shape)
    return offset, count // elements * block, count


def _unpack(head: BinaryIO, form: str) -> Any:
    return struct.unpack(form, head.read(struct.calcsize(form)))[0]


def _string(head: BinaryIO) -> str:
    length = _unpack(head, "<Q")
    data = head.read(length) if length <= MOST_ITEMS else b""
    if len(data) != length:
        raise struct.error("a string ends after the file")
    return data.decode("utf-8", errors="replace")


def _value(head: BinaryIO, path: Path, depth: int) -> Any:
    return _typed(head, path, _unpack(head, "<I"), depth)


def _typed(head: BinaryIO, path: Path, kind: int, depth: int) -> Any:
    if kind == STRING:
        return _string(head)
    if kind == ARRAY and depth < 2:
        inner, length = _unpack(head, "<I"), _unpack(head, "<Q")
        if length > MOST_ITEMS:
            raise Problem("broken_weights", f"{path.name} holds a list of {length:,} items; it is garbled.")
        if inner in SCALARS:
            width = struct.calcsize(SCALARS[inner])
            data = head.read(width * length)
            if len(data) != width * length:
                raise struct.error("an array ends after the file")
            return [item for (item,) in struct.iter_unpack(SCALARS[inner], data[: width * KEPT_ITEMS])]
        kept = []
        for index in range(length):
            item = _typed(head, path, inner, depth + 1)
            if index < KEPT_ITEMS:
                kept.append(item)
        return kept
    if kind not in SCALARS:
        raise Problem("broken_weights", f"{path.name} holds a value of the unknown type {kind}; it is garbled.")
    return _unpack(head, SCALARS[kind])
