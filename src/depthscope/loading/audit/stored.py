"""The tensors in the safetensors files of a checkpoint: names, types and shapes from the headers; values on request."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import parse_local_safetensors_file_metadata
from huggingface_hub.errors import SafetensorsParsingError
from safetensors import safe_open

from depthscope.loading.checkpoint import Checkpoint

__all__ = ["FLOATS", "StoredTensor", "StoredTensors"]

# safetensors' names of the types whose numbers are weights; all others hold codes or counts.
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MOST_READ = 2**26  # elements; larger tensors are not read
ROWS = 4096


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file; `dtype` is safetensors' name of the type, such as "BF16" or "F8_E4M3"."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path

    @property
    def size(self) -> int:
        """The number of elements."""
        return int(torch.Size(self.shape).numel())


class StoredTensors:
    """The tensors of one or several files, in reading order; of two with one name, the later replaces the earlier.

    Raises:
        ModelLoadError: (on creation) a file cannot be fetched.
    """

    def __init__(self, checkpoint: Checkpoint, files: list[str]) -> None:
        self.files = files
        self.tensors = list(_headers(checkpoint, files))
        self.by_name = {tensor.name: tensor for tensor in self.tensors}
        self._open: dict[Path, Any] = {}

    def __iter__(self) -> Iterator[StoredTensor]:
        return iter(self.by_name.values())

    @property
    def main_dtype(self) -> torch.dtype | None:
        """The floating-point type of most elements; None if there is none."""
        counts: Counter[str] = Counter()
        for tensor in self:
            counts[tensor.dtype] += tensor.size
        return next((FLOATS[name] for name, _ in counts.most_common() if name in FLOATS), None)

    def read(self, tensor: StoredTensor) -> torch.Tensor | None:
        """The values, in float32 (float64 for float64); None for a tensor that is too large to be read."""
        if tensor.size > MOST_READ:
            return None
        values = self._file(tensor.path).get_tensor(tensor.name)
        return values if values.dtype == torch.float64 else values.float()

    def are_equal(self, one: StoredTensor, other: StoredTensor) -> bool:
        """Whether two tensors hold the same numbers, whatever their types."""
        if one.shape != other.shape:
            return False
        if not one.shape:
            return bool(torch.equal(self._rows(one, None), self._rows(other, None)))
        parts = (slice(start, start + ROWS) for start in range(0, one.shape[0], ROWS))
        return all(torch.equal(self._rows(one, part), self._rows(other, part)) for part in parts)

    def _rows(self, tensor: StoredTensor, part: slice | None) -> torch.Tensor:
        file = self._file(tensor.path)
        rows = file.get_tensor(tensor.name) if part is None else file.get_slice(tensor.name)[part]
        return rows.double()

    def _file(self, path: Path) -> Any:
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt")
        return self._open[path]


def _headers(checkpoint: Checkpoint, files: list[str]) -> Iterator[StoredTensor]:
    for file in files:
        path = checkpoint.fetch(file)
        if path is not None:
            yield from _header(path)


def _header(path: Path) -> Iterator[StoredTensor]:
    try:
        entries = parse_local_safetensors_file_metadata(path).tensors
    except SafetensorsParsingError:  # too long for the Hub's client, or damaged; reading tensor by tensor is slow
        with safe_open(path, framework="pt") as opened:
            for name in list(opened.keys()):
                part = opened.get_slice(name)
                yield StoredTensor(name, part.get_dtype(), tuple(part.get_shape()), path)
        return
    for name, entry in entries.items():
        yield StoredTensor(name, entry.dtype, tuple(entry.shape), path)
