"""Passing the header that has been read to transformers and the package `gguf`, so that they do not read it again.

Both parse a header in Python, value by value, for the config, for the weights and for the tokenizer: with a vocabulary
of 262,144 tokens that takes longer than everything else. During one load, their readers are replaced for that one file
by readers that return the header of `header.py`; every other file is read as before. If a version of theirs has other
names, nothing is replaced: loading then takes longer and gives the same result.
"""

import functools
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from depthscope.loading.gguf.header import GgufHeader, GgufTensor

__all__ = ["reading_once"]

PLAIN = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "I8": "<i1", "I16": "<i2", "I32": "<i4", "I64": "<i8"}
CHUNK = 1 << 18  # elements unpacked together; as floats they fit into a processor's cache
PARSED: list[Any] = []  # the type of a field whose value needs no parsing

_lock = threading.Lock()
_counts: Counter[str] = Counter()
_headers_by_path: dict[str, GgufHeader] = {}
_replaced: list[tuple[Any, str, Any]] = []


@contextmanager
def reading_once(header: GgufHeader) -> Iterator[None]:
    """Make transformers use `header` instead of reading this file's header; everything is restored afterwards."""
    path = str(header.path)
    with _lock:
        if not _counts:
            _replace()
        _counts[path] += 1
        _headers_by_path[path] = header
    try:
        yield
    finally:
        with _lock:
            _counts[path] -= 1
            if not _counts[path]:
                del _counts[path], _headers_by_path[path]
            if not _counts:
                _restore()


class _Field(NamedTuple):
    """The attributes of a field of `gguf.GGUFReader` that transformers reads."""

    parts: list[Any]
    data: list[int]
    types: list[Any]


class _Tensor:
    """The attributes of a tensor of `gguf.GGUFReader` that transformers reads; its bytes are mapped on first use."""

    def __init__(self, stored: GgufTensor, kind: Any, mapped: Callable[[Path], np.ndarray]) -> None:
        self.name, self.tensor_type, self.shape = stored.name, kind, np.array(stored.shape[::-1], np.uint64)
        self._stored, self._mapped = stored, mapped

    @property
    def data(self) -> np.ndarray:
        stored = self._stored
        content = self._mapped(stored.path)[stored.start : stored.start + stored.length]
        if form := PLAIN.get(self.tensor_type.name):
            return content.view(form).reshape(stored.shape)
        return content.reshape(*stored.shape[:-1], -1)


class _Reader:
    """Replaces `gguf.GGUFReader`, with all attributes that transformers uses."""

    def __init__(self, header: GgufHeader) -> None:
        from gguf import GGMLQuantizationType

        mapped = functools.cache(lambda path: np.memmap(path, mode="r"))  # closed with this reader
        self.fields = {name: _Field([_unwrapped(value)], [0], PARSED) for name, value in header.metadata.items()}
        self.tensors = [_Tensor(stored, GGMLQuantizationType(stored.kind), mapped) for stored in header.tensors]


def _unwrapped(value: Any) -> Any:
    """A value in the form in which transformers reads a field: a list of one item is that item."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _replace() -> None:
    """Install the replacements: all of them, or none if the installed versions lack one of the names."""
    try:
        import gguf
        from transformers import modeling_gguf_pytorch_utils as older
        from transformers.integrations.gguf import reader as newer
        from transformers.quantizers import quantizer_gguf

        replacements: list[tuple[Any, str, Any]] = [
            (gguf, "GGUFReader", _reader(gguf.GGUFReader)),
            (gguf, "dequantize", _dequantize(gguf.dequantize)),
            (gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map)),
            (older, "_gguf_parse_value", _parse_value(older._gguf_parse_value)),
            (older, "get_gguf_hf_weights_map", _weights_map(older.get_gguf_hf_weights_map)),
            (older, "TENSOR_PROCESSORS", older.TENSOR_PROCESSORS | {"llama": _mixtral_processor(older)}),
            (newer, "_read_metadata", _read_metadata(newer._read_metadata)),
            (newer, "_read_tensor_table", _read_tensor_table(newer._read_tensor_table)),
            (quantizer_gguf, "load_gguf_state_dict", _load_state_dict(newer)),
            *((place, name, getattr(place, name) | more) for place, name, more in _further_kinds(newer)),
        ]
    except (ImportError, AttributeError):
        return
    for place, name, replacement in replacements:
        _replaced.append((place, name, getattr(place, name)))
        setattr(place, name, replacement)


def _restore() -> None:
    while _replaced:
        place, name, original = _replaced.pop()
        setattr(place, name, original)


def _reader(original: Any) -> Any:
    def reader(path: Any, *arguments: Any, **options: Any) -> Any:
        header = _headers_by_path.get(str(path))
        return original(path, *arguments, **options) if header is None else _Reader(header)

    return reader


def _parse_value(original: Any) -> Any:
    def parse_value(value: Any, types: Any) -> Any:
        return value if types is PARSED else original(value, types)

    return parse_value


def _dequantize(original: Any) -> Any:
    """The package unpacks 16 rows at a time, however short; arranging the blocks in longer rows is much faster."""
    from gguf import GGML_QUANT_SIZES

    def dequantize(data: np.ndarray, kind: Any) -> np.ndarray:
        elements, size = GGML_QUANT_SIZES[kind]
        if elements == 1:
            return original(data, kind)
        blocks, together = data.reshape(-1, size), CHUNK // elements
        unpacked = np.empty((len(blocks), elements), np.float32)
        for place in range(0, len(blocks), together):
            row = blocks[place : place + together].reshape(1, -1)
            unpacked[place : place + together] = original(row, kind).reshape(-1, elements)
        return unpacked.reshape(*data.shape[:-1], data.shape[-1] // size * elements)

    return dequantize


def _read_metadata(original: Any) -> Any:
    def read_metadata(content: Any, path: str, string_arrays: Any = ()) -> tuple[dict[str, Any], Any, int]:
        header = _headers_by_path.get(str(path))
        if header is None:
            return original(content, path, string_arrays)
        metadata = {
            name: len(value) if _is_strings(value) and name not in string_arrays else value
            for name, value in header.metadata.items()
        }
        return metadata, header, 0

    return read_metadata


def _is_strings(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], str)


def _read_tensor_table(original: Any) -> Any:
    def read_tensor_table(content: Any, tensors: Any, place: int) -> tuple[list[tuple[Any, ...]], int]:
        if not isinstance(tensors, GgufHeader):
            return original(content, tensors, place)
        # These positions count from the start of the file; the reader's count from the start of the data.
        return [(stored.name, stored.shape, stored.kind, stored.start) for stored in tensors.tensors], 0

    return read_tensor_table


def _load_state_dict(newer: Any) -> Any:
    """The newer reader expects all tensors in one file; here each is read from the part that holds it."""

    def load_state_dict(header: Any) -> dict[str, Any]:
        current = _headers_by_path.get(str(header.path))
        if current is None:
            return newer.load_gguf_state_dict(header)
        mapped = functools.cache(lambda path: np.memmap(path, mode="r"))
        tensors = {}
        for stored in current.tensors:
            rows = math.prod(stored.shape[:-1])
            is_packed = stored.kind in newer.GGML_BLOCK and rows
            shape = (*stored.shape[:-1], stored.length // rows) if is_packed else stored.shape
            content = mapped(stored.path)[stored.start : stored.start + stored.length]
            tensors[stored.name] = newer.LazyGgufTensor(content, stored.kind, shape)
        return tensors

    return load_state_dict


# Features that the readers lack


def _weights_map(original: Any) -> Any:
    """llama.cpp calls Mixtral a Llama with experts, but transformers looks for an architecture named Mixtral."""

    def weights_map(model: Any, processor: Any, model_type: str | None = None, *others: Any, **named: Any) -> Any:
        is_mixtral = model_type is None and model.config.model_type == "mixtral"
        return original(model, processor, "llama" if is_mixtral else model_type, *others, **named)

    return weights_map


def _mixtral_processor(older: Any) -> Any:
    """Llama's order of rows in queries and keys, with experts combined as in Qwen's models."""

    class MixtralTensorProcessor(older.Qwen2MoeTensorProcessor, older.LlamaTensorProcessor):
        def process(self, weights: Any, name: str, **options: Any) -> Any:
            if "_exps." in name:
                return older.Qwen2MoeTensorProcessor.process(self, weights, name, **options)
            if not name.endswith((".weight", ".bias")):
                return older.GGUFTensor(weights, name, {})
            return older.LlamaTensorProcessor.process(self, weights, name, **options)

    return MixtralTensorProcessor


def _further_kinds(newer: Any) -> list[tuple[Any, str, dict[int, Any]]]:
    """The newer of transformers' two readers knows fewer types of tensors than the package `gguf`."""
    from gguf import GGML_QUANT_SIZES
    from transformers.integrations.gguf import dequant, gguf_conversion_mapping, utils

    kinds = {int(kind): size for kind, size in GGML_QUANT_SIZES.items() if size[0] > 1}
    sizes = {kind: size for kind, size in kinds.items() if kind not in dequant.GGML_BLOCK}
    unpack = {kind: _unpack(kind) for kind in sizes}
    places = (dequant, newer, gguf_conversion_mapping, utils)
    return [(place, "GGML_BLOCK", sizes) for place in places] + [(dequant, "_DEQUANT", unpack)]


def _unpack(kind: int) -> Any:
    def unpack(blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        import gguf

        unpacked = gguf.dequantize(blocks.cpu().numpy(), gguf.GGMLQuantizationType(kind))
        return torch.from_numpy(unpacked).to(blocks.device, dtype)

    return unpack
