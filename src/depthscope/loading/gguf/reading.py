"""transformers and the package `gguf` are given the header that has been read, instead of each reading it anew.

Both parse a header in Python, value by value, and do so for the config, for the weights and for the tokenizer: with a
vocabulary of 262,144 tokens that takes longer than everything else. Here their readers are replaced for the time of one
load, for that one file, by ones that hand out what `gguf_header` has read; every other file is read as before. Where
a version of theirs has other names, nothing is replaced: loading then takes longer and gives the same.
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

from depthscope.loading.gguf.header import GgufHeader, StoredTensor

__all__ = ["reading_once"]

PLAIN = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "I8": "<i1", "I16": "<i2", "I32": "<i4", "I64": "<i8"}
CHUNK = 1 << 18  # elements that are unpacked together: as floats they fit into a processor's cache
KNOWN: list[Any] = []  # the type of a field whose value needs no parsing

_lock = threading.Lock()
_headers: Counter[str] = Counter()
_known: dict[str, GgufHeader] = {}
_replaced: list[tuple[Any, str, Any]] = []


@contextmanager
def reading_once(header: GgufHeader) -> Iterator[None]:
    """Inside, whatever reads this file's header in transformers gets `header`; everything is as before afterwards."""
    path = str(header.path)
    with _lock:
        if not _headers:
            _replace()
        _headers[path] += 1
        _known[path] = header
    try:
        yield
    finally:
        with _lock:
            _headers[path] -= 1
            if not _headers[path]:
                del _headers[path], _known[path]
            if not _headers:
                _restore()


class _Field(NamedTuple):
    """What transformers looks at in a field of `gguf.GGUFReader`."""

    parts: list[Any]
    data: list[int]
    types: list[Any]


class _Tensor:
    """What transformers looks at in a tensor of `gguf.GGUFReader`; its bytes are mapped when they are asked for."""

    def __init__(self, stored: StoredTensor, kind: Any, mapped: Callable[[Path], np.ndarray]) -> None:
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
    """Stands in for `gguf.GGUFReader`, with everything that transformers asks of one."""

    def __init__(self, header: GgufHeader) -> None:
        from gguf import GGMLQuantizationType

        mapped = functools.cache(lambda path: np.memmap(path, mode="r"))  # closed when this reader is gone
        self.fields = {name: _Field([_unwrapped(value)], [0], KNOWN) for name, value in header.metadata.items()}
        self.tensors = [_Tensor(stored, GGMLQuantizationType(stored.kind), mapped) for stored in header.tensors]


def _unwrapped(value: Any) -> Any:
    """A value as transformers makes it of a field: a list of one item is that item."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _replace() -> None:
    """Put the replacements in place: all of them, or none where one has no place in the versions that are here."""
    try:
        import gguf
        from transformers import modeling_gguf_pytorch_utils as older
        from transformers.integrations.gguf import reader as newer
        from transformers.quantizers import quantizer_gguf

        wanted: list[tuple[Any, str, Any]] = [
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
    for place, name, replacement in wanted:
        _replaced.append((place, name, getattr(place, name)))
        setattr(place, name, replacement)


def _restore() -> None:
    while _replaced:
        place, name, original = _replaced.pop()
        setattr(place, name, original)


def _reader(original: Any) -> Any:
    def reader(path: Any, *arguments: Any, **options: Any) -> Any:
        header = _known.get(str(path))
        return original(path, *arguments, **options) if header is None else _Reader(header)

    return reader


def _parse_value(original: Any) -> Any:
    def parse_value(value: Any, types: Any) -> Any:
        return value if types is KNOWN else original(value, types)

    return parse_value


def _dequantize(original: Any) -> Any:
    """The package unpacks 16 rows at a time, however short: the same blocks in longer rows are unpacked much faster."""
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
        header = _known.get(str(path))
        if header is None:
            return original(content, path, string_arrays)
        asked = {
            name: len(value) if _is_strings(value) and name not in string_arrays else value
            for name, value in header.metadata.items()
        }
        return asked, header, 0

    return read_metadata


def _is_strings(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], str)


def _read_tensor_table(original: Any) -> Any:
    def read_tensor_table(content: Any, tensors: Any, place: int) -> tuple[list[tuple[Any, ...]], int]:
        if not isinstance(tensors, GgufHeader):
            return original(content, tensors, place)
        # Counted from the start of the file, where the reader counts from the start of the data.
        return [(stored.name, stored.shape, stored.kind, stored.start) for stored in tensors.tensors], 0

    return read_tensor_table


def _load_state_dict(newer: Any) -> Any:
    """The newer reader looks for all tensors in one file; here each is where the header says, in whichever part."""

    def load_state_dict(header: Any) -> dict[str, Any]:
        known = _known.get(str(header.path))
        if known is None:
            return newer.load_gguf_state_dict(header)
        mapped = functools.cache(lambda path: np.memmap(path, mode="r"))
        found = {}
        for stored in known.tensors:
            rows = math.prod(stored.shape[:-1])
            is_packed = stored.kind in newer.GGML_BLOCK and rows
            shape = (*stored.shape[:-1], stored.length // rows) if is_packed else stored.shape
            content = mapped(stored.path)[stored.start : stored.start + stored.length]
            found[stored.name] = newer.LazyGgufTensor(content, stored.kind, shape)
        return found

    return load_state_dict


# What the readers lack


def _weights_map(original: Any) -> Any:
    """llama.cpp calls Mixtral a Llama with experts, and transformers looks for an architecture of its name."""

    def weights_map(model: Any, processor: Any, model_type: str | None = None, *others: Any, **named: Any) -> Any:
        is_mixtral = model_type is None and model.config.model_type == "mixtral"
        return original(model, processor, "llama" if is_mixtral else model_type, *others, **named)

    return weights_map


def _mixtral_processor(older: Any) -> Any:
    """Llama's order of rows in queries and keys, and experts put together as those of Qwen's models are."""

    class MixtralTensorProcessor(older.Qwen2MoeTensorProcessor, older.LlamaTensorProcessor):
        def process(self, weights: Any, name: str, **options: Any) -> Any:
            if "_exps." in name:
                return older.Qwen2MoeTensorProcessor.process(self, weights, name, **options)
            if not name.endswith((".weight", ".bias")):
                return older.GGUFTensor(weights, name, {})
            return older.LlamaTensorProcessor.process(self, weights, name, **options)

    return MixtralTensorProcessor


def _further_kinds(newer: Any) -> list[tuple[Any, str, dict[int, Any]]]:
    """The newer of transformers' two readers knows fewer types of tensors than the package does, which unpacks them."""
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
