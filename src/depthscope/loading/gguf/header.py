"""The header of a GGUF file: its metadata, and the position of each tensor.

A header may come from a stranger, so every count and length in it is checked against the file. Format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import functools
import math
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from depthscope.errors import ModelLoadError
from depthscope.wording.messages import one_line

__all__ = ["MAGIC", "GgufHeader", "GgufTensor", "read_header"]

MAGIC = b"GGUF"
VERSIONS = (2, 3)
# The type of a value -> its numpy dtype; strings and arrays are the other two types.
SCALARS = {
    **{0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?"},
    **{10: "<u8", 11: "<i8", 12: "<f8"},
}
STRING, ARRAY = 8, 9
UINT32 = 4
MOST_KEYS = 10_000
MOST_TENSORS = 100_000
MOST_ITEMS = 4_000_000  # of one array; ten times the largest vocabularies and merge tables
MOST_DIMENSIONS = 8
LONGEST_NAME = 1_000  # bytes
USUAL_ALIGNMENT = 32
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file: name, shape in PyTorch's order, GGML type, and the position of its bytes."""

    name: str
    shape: tuple[int, ...]
    kind: int
    path: Path
    start: int
    length: int

    @property
    def count(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class GgufHeader:
    """The header of a GGUF file: `metadata` by name (arrays as lists), and the tensors in the file's order."""

    path: Path
    name: str  # the file's name in messages
    metadata: dict[str, Any]
    tensors: tuple[GgufTensor, ...]

    @property
    def architecture(self) -> str | None:
        """llama.cpp's name of the architecture."""
        named = self.metadata.get("general.architecture")
        return named if isinstance(named, str) else None

    def of_architecture(self, key: str) -> Any:
        """A setting of the architecture, or None; the file has "llama.rope.freq_base" for "rope.freq_base"."""
        return self.metadata.get(f"{self.architecture}.{key}")


def read_header(path: Path, name: str | None = None, *, most_bytes: int | None = None) -> GgufHeader:
    """Read the header of one GGUF file and check it against the file.

    Args:
        path: the file.
        name: its name in messages; the path by default.
        most_bytes: the largest size of the header.

    Raises:
        ModelLoadError: the file is not GGUF, of an unsupported version, cut off or garbled, or the package `gguf`,
            which defines the types of tensors, is missing.
    """
    name = str(path) if name is None else name
    with path.open("rb") as file:
        if file.read(4) != MAGIC:
            raise ModelLoadError(
                f"{name!r} is not a GGUF file: it does not start with the letters GGUF. It may be damaged, or a "
                "pointer that Git LFS left in its place; fetch it again."
            )
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _HeaderReader(content, path, name, most_bytes).header()


class _HeaderReader:
    """Reads a header from the current position in a file."""

    def __init__(self, content: mmap.mmap, path: Path, name: str, most_bytes: int | None) -> None:
        self.content, self.path, self.name = content, path, name
        self.size = len(content)
        self.end = self.size if most_bytes is None else min(self.size, most_bytes)
        self.place = len(MAGIC)

    def header(self) -> GgufHeader:
        try:
            return self._header()
        except (struct.error, UnicodeDecodeError, OverflowError) as error:
            if self.end < self.size and self.place + 8 > self.end:
                raise ModelLoadError(
                    f"The header of {self.name!r} is larger than {self.end / 2**20:g} MiB, more than a model needs."
                ) from error
            raise self._damaged("its header cannot be read to its end") from error

    def _header(self) -> GgufHeader:
        version = self._number(_U32)
        if version not in VERSIONS:
            big = version & 0xFFFF == 0
            form = "written for big-endian machines" if big else f"of GGUF version {version}"
            raise ModelLoadError(
                f"{self.name!r} is {form}; little-endian files of versions 2 and 3 are read. Convert the model again."
            )
        tensors, keys = self._number(_U64), self._number(_U64)
        if tensors > MOST_TENSORS or keys > MOST_KEYS:
            raise self._damaged(f"it claims {tensors:,} tensors and {keys:,} keys")
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = self._name()
            if key in metadata:
                raise self._damaged(f"it states {key[:60]!r} twice")
            metadata[key] = self._value(self._number(_U32))
        alignment = metadata.get("general.alignment", USUAL_ALIGNMENT)
        if type(alignment) is not int or not 0 < alignment <= 1 << 16 or alignment & (alignment - 1):
            raise self._damaged("its alignment is no power of two")
        entries = [self._entry() for _ in range(tensors)]
        start = -(-self.place // alignment) * alignment
        header = GgufHeader(self.path, self.name, metadata, self._placed(entries, start))
        layers = header.of_architecture("block_count")
        if isinstance(layers, int) and layers > metadata.get("split.tensors.count", len(entries)):
            raise self._damaged(f"it states {layers:,} layers and holds {len(entries):,} tensors")
        return header

    def _placed(self, entries: list[tuple[str, tuple[int, ...], int, int]], start: int) -> tuple[GgufTensor, ...]:
        blocks = _block_sizes(self.name)
        if unknown := next((entry for entry in entries if entry[2] not in blocks), None):
            raise ModelLoadError(
                f"The tensor {unknown[0][:60]!r} in {self.name!r} has the GGML type {unknown[2]}, which the installed "
                "package `gguf` does not unpack. Update it (pip install --upgrade gguf), or convert the model again."
            )
        placed = []
        for name, shape, kind, offset in entries:
            elements, size = blocks[kind]
            if shape and shape[-1] % elements:
                raise self._damaged(f"the rows of the tensor {name[:60]!r} are not whole blocks")
            length = math.prod(shape) // elements * size
            if start + offset + length > self.size:
                raise self._damaged(f"it ends before its tensor {name[:60]!r}; if it was cut up, join the pieces")
            placed.append(GgufTensor(name, shape, kind, self.path, start + offset, length))
        names = {tensor.name for tensor in placed}
        if len(names) < len(placed) or sum(tensor.length for tensor in placed) > self.size:
            raise self._damaged("its tensors overlap")
        return tuple(placed)

    def _entry(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, GGML type and offset of one tensor."""
        name, dimensions = self._name(), self._number(_U32)
        if dimensions > MOST_DIMENSIONS:
            raise self._damaged(f"the tensor {name[:60]!r} has {dimensions} dimensions")
        shape = tuple(self._number(_U64) for _ in range(dimensions))
        return name, shape[::-1], self._number(_U32), self._number(_U64)

    def _value(self, kind: int, depth: int = 0) -> Any:
        if kind == STRING:
            return self._strings(1)[0]
        if kind in SCALARS:
            return self._scalars(SCALARS[kind], 1)[0]
        if kind != ARRAY or depth > 2:
            raise self._damaged(f"it holds a value of the unknown type {kind}")
        inner, count = self._number(_U32), self._number(_U64)
        if count > MOST_ITEMS:
            raise self._damaged(f"it holds a list of {count:,} items")
        if inner == STRING:
            return self._strings(count)
        if inner in SCALARS:
            return self._scalars(SCALARS[inner], count)
        return [self._value(inner, depth + 1) for _ in range(count)]

    def _scalars(self, form: str, count: int) -> list[Any]:
        length = np.dtype(form).itemsize * count
        return np.frombuffer(self._bytes(length), form).tolist()

    def _strings(self, count: int) -> list[str]:
        # One loop with local names: a vocabulary has hundreds of thousands of entries.
        content, unpack, place = self.content, _U64.unpack_from, self.place
        found = []
        for _ in range(count):
            start = place + 8
            place = start + unpack(content, place)[0]
            found.append(content[start:place])
        if place > self.end:
            self.place = self.end
            raise struct.error("a string ends after the header")
        self.place = place
        return [text.decode() for text in found]

    def _name(self) -> str:
        (length,) = _U64.unpack_from(self.content, self.place)
        if length > LONGEST_NAME:
            raise self._damaged("a name in it is too long")
        return self._strings(1)[0]

    def _number(self, form: struct.Struct) -> int:
        return form.unpack(self._bytes(form.size))[0]

    def _bytes(self, length: int) -> bytes:
        start, self.place = self.place, self.place + length
        if self.place > self.end:
            raise struct.error("a value ends after the header")
        return self.content[start : self.place]

    def _damaged(self, problem: str) -> ModelLoadError:
        return ModelLoadError(
            f"{self.name!r} is damaged: its header or its weights end early or are garbled ({problem}). Fetch it again."
        )


def _block_sizes(name: str) -> dict[int, tuple[int, int]]:
    """The elements and the bytes of a block, for each GGML type that the package `gguf` unpacks."""
    try:
        import gguf
    except ImportError as error:
        raise ModelLoadError(
            f"Reading {name!r} needs the package `gguf` ({one_line(error)}) Install it: pip install gguf."
        ) from error
    sizes = gguf.GGML_QUANT_SIZES
    return {int(kind): size for kind, size in sizes.items() if _unpacks(gguf.dequantize, kind, size[1])}


@functools.lru_cache(256)
def _unpacks(dequantize: Callable[..., np.ndarray], kind: int, size: int) -> bool:
    try:
        dequantize(np.zeros((1, size), np.uint8), kind)
    except NotImplementedError:  # a type other than F32, F16 and those stored in blocks
        return False
    return True
