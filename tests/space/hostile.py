"""Uploads that an honest visitor would not make: each builds its files in a folder, and names the kind of refusal."""

import json
import pickle
import shutil
import stat
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file

Build = Callable[[Path, Path], list[Path]]  # (an honest model's folder, an empty folder) -> what is uploaded


@dataclass(frozen=True)
class Case:
    """One upload: what it is, the kinds of refusal that are right, and how it is made."""

    name: str
    kinds: tuple[str, ...]
    build: Build


def honest(model: Path, _: Path) -> list[Path]:
    return sorted(path for path in model.iterdir() if path.name != "generation_config.json")


# Archives


def zipped(model: Path, target: Path, **more: bytes | str) -> list[Path]:
    """The honest model in an archive, with more entries."""
    with zipfile.ZipFile(target / "model.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in honest(model, target):
            archive.write(path, path.name)
        for name, content in more.items():
            archive.writestr(name, content)
    return [target / "model.zip"]


def entry(name: str, mode: int = 0, content: bytes = b"x") -> Build:
    def build(model: Path, target: Path) -> list[Path]:
        (path,) = zipped(model, target)
        with zipfile.ZipFile(path, "a") as archive:
            info = zipfile.ZipInfo("placeholder")
            info.filename = info.orig_filename = name
            info.create_system = 3
            info.external_attr = mode << 16
            archive.writestr(info, content)
        return [path]

    return build


def zip_bytes(change: Callable[[bytearray], Any]) -> Build:
    """An honest archive with its bytes changed."""

    def build(model: Path, target: Path) -> list[Path]:
        (path,) = zipped(model, target)
        data = bytearray(path.read_bytes())
        changed = change(data)
        path.write_bytes(data if changed is None else changed)
        return [path]

    return build


def bomb(name: str, size: int = 20 << 20) -> Build:
    def build(model: Path, target: Path) -> list[Path]:
        (path,) = zipped(model, target)
        with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive, archive.open(name, "w") as file:
            for _ in range(size >> 20):
                file.write(bytes(1 << 20))
        return [path]

    return build


def many_files(model: Path, target: Path) -> list[Path]:
    (path,) = zipped(model, target)
    with zipfile.ZipFile(path, "a") as archive:
        for index in range(10_000):
            archive.writestr(f"notes/{index}.txt", b"")
    return [path]


def nested_bomb(model: Path, target: Path) -> list[Path]:
    (inner,) = bomb("zeros.bin")(model, target)
    inner = inner.rename(target / "inner.zip")
    with zipfile.ZipFile(target / "outer.zip", "w") as archive:
        for index in range(10):
            archive.write(inner, f"{index}.zip")
    return [target / "outer.zip"]


def lying_size(data: bytearray) -> None:
    """Say in the central directory that the last entry is larger than it is."""
    place = data.rfind(b"PK\x01\x02")
    data[place + 24 : place + 28] = struct.pack("<I", struct.unpack("<I", data[place + 24 : place + 28])[0] + 5000)


def encrypted(data: bytearray) -> None:
    place = data.rfind(b"PK\x01\x02")
    data[place + 8] |= 1


def huge_directory(data: bytearray) -> None:
    """Speak of a central directory of 2 GiB."""
    data[-10:-6] = struct.pack("<I", 2**31)


def zip64_lie(data: bytearray) -> bytes:
    """Put the zip64 record of a huge directory before an end that speaks of a small one."""
    record = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 2**40, 2**40, 2**45, 0)
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, len(data) - 22, 1)
    return bytes(data[:-22]) + record + locator + bytes(data[-22:])


def unusual_packing(model: Path, target: Path) -> list[Path]:
    with zipfile.ZipFile(target / "model.zip", "w", zipfile.ZIP_LZMA) as archive:
        for path in honest(model, target):
            archive.write(path, path.name)
    return [target / "model.zip"]


def twice(model: Path, target: Path) -> list[Path]:
    return zipped(model, target, **{"CONFIG.json": "{}"})


def two_models(model: Path, target: Path) -> list[Path]:
    with zipfile.ZipFile(target / "model.zip", "w") as archive:
        for folder in ("one", "two"):
            for path in honest(model, target):
                archive.write(path, f"{folder}/{path.name}")
    return [target / "model.zip"]


def no_zip(model: Path, target: Path) -> list[Path]:
    (target / "model.zip").write_bytes(b"this is no archive" * 100)
    return [target / "model.zip"]


def cut_zip(data: bytearray) -> bytes:
    return bytes(data[: len(data) // 2])


def link_beside(model: Path, target: Path) -> list[Path]:
    (target / "model.safetensors").symlink_to("/etc/passwd")
    return [*[path for path in honest(model, target) if path.name != "model.safetensors"], target / "model.safetensors"]


def device(model: Path, target: Path) -> list[Path]:
    (target / "config.json").symlink_to("/dev/zero")
    return [target / "config.json", *[path for path in honest(model, target) if path.name != "config.json"]]


# Files of the model


def changed(name: str, change: Callable[[Path], Any]) -> Build:
    """The honest files, one of them changed."""

    def build(model: Path, target: Path) -> list[Path]:
        for path in honest(model, target):
            shutil.copy(path, target / path.name)
        change(target / name)
        return sorted(target.iterdir())

    return build


def written(name: str, content: bytes | str) -> Build:
    data = content.encode() if isinstance(content, str) else content
    return changed(name, lambda path: path.write_bytes(data))


def config(**changes: Any) -> Build:
    def change(path: Path) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return changed("config.json", change)


def without(*names: str) -> Build:
    def build(model: Path, target: Path) -> list[Path]:
        return [path for path in honest(model, target) if path.name not in names]

    return build


def header(change: Callable[[dict[str, Any]], Any]) -> Build:
    """The honest weights with another header over the same bytes."""

    def rewrite(path: Path) -> None:
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        content = json.loads(data[8 : 8 + length])
        content.pop("__metadata__", None)
        change(content)
        packed = json.dumps(content).encode()
        path.write_bytes(len(packed).to_bytes(8, "little") + packed + data[8 + length :])

    return changed("model.safetensors", rewrite)


def first(content: dict[str, Any], **changes: Any) -> None:
    content[sorted(content)[0]].update(changes)


def not_a_number(path: Path) -> None:
    weights = load_file(path)
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})


def fewer_weights(path: Path) -> None:
    weights = load_file(path)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, path, metadata={"format": "pt"})


def pickled(path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (Path("/tmp/depthscope-space-was-here"),))

    path.write_bytes(pickle.dumps(Evil()))


def torch_file(path: Path) -> None:
    torch.save({"weight": torch.zeros(3)}, path)


def only_pickles(model: Path, target: Path) -> list[Path]:
    torch.save({"weight": torch.zeros(3)}, target / "pytorch_model.bin")
    return [*without("model.safetensors")(model, target), target / "pytorch_model.bin"]


def index_elsewhere(model: Path, target: Path) -> list[Path]:
    (target / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model.norm.weight": "../../../../etc/passwd"}})
    )
    return [*honest(model, target), target / "model.safetensors.index.json"]


def expanding_tokenizer(path: Path) -> None:
    """Each character becomes 10^12 of them."""
    content = json.loads(path.read_text())
    replace = [{"type": "Replace", "pattern": {"Regex": "."}, "content": "e" * 1_000_000}] * 2
    content["normalizer"] = {"type": "Sequence", "normalizers": replace}
    path.write_text(json.dumps(content))


def wordy_tokenizer(path: Path) -> None:
    """Each character becomes 40 tokens."""
    content = json.loads(path.read_text())
    content["normalizer"] = {"type": "Replace", "pattern": {"Regex": "."}, "content": "~^`|{" * 8}
    path.write_text(json.dumps(content))


# GGUF


def gguf_file(change: Callable[[bytearray], Any] | None = None, **numbers: int) -> Build:
    def build(model: Path, target: Path) -> list[Path]:
        path = target / "model.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_block_count(numbers.get("block_count", 2))
        writer.add_context_length(64)
        writer.add_embedding_length(numbers.get("embedding_length", 32))
        writer.add_feed_forward_length(64)
        writer.add_head_count(4)
        if "split.count" in numbers:
            writer.add_uint16("split.count", numbers["split.count"])
        writer.add_tensor("token_embd.weight", np.zeros((64, 32), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        if change is not None:
            data = bytearray(path.read_bytes())
            new = change(data)
            path.write_bytes(data if new is None else new)
        return [path]

    return build


def many_tensors(data: bytearray) -> None:
    data[8:16] = struct.pack("<Q", 2**60)


def many_keys(data: bytearray) -> None:
    data[16:24] = struct.pack("<Q", 2**60)


def long_key(data: bytearray) -> None:
    data[24:32] = struct.pack("<Q", 2**62)


def half(data: bytearray) -> bytes:
    return bytes(data[: len(data) // 2])


def no_gguf(model: Path, target: Path) -> list[Path]:
    (target / "model.gguf").write_bytes(b"\x80\x04" + bytes(1000))
    return [target / "model.gguf"]


def nothing(model: Path, target: Path) -> list[Path]:
    return []


def lone_file(model: Path, target: Path) -> list[Path]:
    return [model / "config.json"]


def mixed(model: Path, target: Path) -> list[Path]:
    return [*zipped(model, target), *gguf_file()(model, target)]


UPLOAD, CONFIG, WEIGHTS, TOKENIZER = ("upload",), ("broken_config",), ("broken_weights",), ("broken_tokenizer",)
CASES = [
    Case("a bomb of zeros under a model's name", UPLOAD, bomb("model-00001-of-00002.safetensors")),
    Case("a bomb of zeros under another name", UPLOAD, bomb("readme.bin")),
    Case("more than may be unpacked", ("too_large", "upload"), bomb("notes.txt", 80 << 20)),
    Case("archives in an archive", (*UPLOAD, *CONFIG), nested_bomb),
    Case("10,000 files", UPLOAD, many_files),
    Case("a path with ..", UPLOAD, entry("../../evil.txt")),
    Case("a path with .. inside", UPLOAD, entry("a/../../evil.txt")),
    Case("an absolute path", UPLOAD, entry("/etc/cron.d/evil")),
    Case("a Windows path", UPLOAD, entry("..\\..\\evil.txt")),
    Case("a drive letter", UPLOAD, entry("C:evil.txt")),
    Case("a null byte in a name", UPLOAD, entry("config.json\x00.txt")),
    Case("a line break in a name", UPLOAD, entry("a\nb.txt")),
    Case("a very long name", UPLOAD, entry("x" * 5000)),
    Case("folders 100 deep", UPLOAD, entry("a/" * 100 + "x")),
    Case("a symbolic link", UPLOAD, entry("vocab.json", stat.S_IFLNK | 0o777, b"/etc/passwd")),
    Case("a device file", UPLOAD, entry("vocab.json", stat.S_IFCHR | 0o666)),
    Case("a pipe", UPLOAD, entry("vocab.json", stat.S_IFIFO | 0o666)),
    Case("two files of one name", UPLOAD, twice),
    Case("a password", UPLOAD, zip_bytes(encrypted)),
    Case("an unusual packing", UPLOAD, unusual_packing),
    Case("an entry that lies about its size", UPLOAD, zip_bytes(lying_size)),
    Case("a huge central directory", UPLOAD, zip_bytes(huge_directory)),
    Case("a huge zip64 directory", UPLOAD, zip_bytes(zip64_lie)),
    Case("half an archive", UPLOAD, zip_bytes(cut_zip)),
    Case("no archive", UPLOAD, no_zip),
    Case("two models", UPLOAD, two_models),
    Case("a link instead of weights", UPLOAD, link_beside),
    Case("a device instead of a config", UPLOAD, device),
    Case("nothing", UPLOAD, nothing),
    Case("one file alone", UPLOAD, lone_file),
    Case("a zip and a GGUF file", UPLOAD, mixed),
    Case("pickles only", ("no_safetensors",), only_pickles),
    Case("no weights", ("no_safetensors",), without("model.safetensors")),
    Case("no config", CONFIG, without("config.json")),
    Case("a pickle renamed to safetensors", WEIGHTS, changed("model.safetensors", pickled)),
    Case("a PyTorch file renamed to safetensors", WEIGHTS, changed("model.safetensors", torch_file)),
    Case("a Git LFS pointer", WEIGHTS, written("model.safetensors", "version https://git-lfs.github.com/spec/v1\n")),
    Case("an empty weights file", WEIGHTS, written("model.safetensors", b"")),
    Case("a header of 2^63 bytes", WEIGHTS, written("model.safetensors", struct.pack("<Q", 2**63) + b"{}")),
    Case("a header that is no JSON", WEIGHTS, written("model.safetensors", struct.pack("<Q", 8) + b"{broken}")),
    Case(
        "a header nested 100,000 deep",
        WEIGHTS,
        written("model.safetensors", struct.pack("<Q", 200_000) + b"[" * 100_000 + b"]" * 100_000),
    ),
    Case("a header that is a list", WEIGHTS, written("model.safetensors", struct.pack("<Q", 2) + b"[]")),
    Case("an unknown type", WEIGHTS, header(lambda content: first(content, dtype="F99"))),
    Case("the wrong type", WEIGHTS, header(lambda content: first(content, dtype="F64"))),
    Case("a negative size", WEIGHTS, header(lambda content: first(content, shape=[-1, 4]))),
    Case("an immense shape", WEIGHTS, header(lambda content: first(content, shape=[2**39, 2**39]))),
    Case("offsets beyond the file", WEIGHTS, header(lambda content: first(content, data_offsets=[0, 2**38]))),
    Case(
        "offsets that overlap",
        WEIGHTS,
        header(lambda content: [e.update(data_offsets=[0, 0], shape=[0]) for e in content.values()]),
    ),
    Case(
        "weights cut off",
        WEIGHTS,
        changed("model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-100])),
    ),
    Case(
        "weights with more behind",
        WEIGHTS,
        changed("model.safetensors", lambda path: path.write_bytes(path.read_bytes() + bytes(9))),
    ),
    Case("weights that are NaN", ("not_finite",), changed("model.safetensors", not_a_number)),
    Case("weights that are missing", WEIGHTS, changed("model.safetensors", fewer_weights)),
    Case("an index that names other places", WEIGHTS, index_elsewhere),
    Case("a config that is no JSON", CONFIG, written("config.json", "{'model_type': llama}")),
    Case("a config of null bytes", CONFIG, written("config.json", bytes(1000))),
    Case("a config that is a list", CONFIG, written("config.json", "[1, 2]")),
    Case("a config nested 100,000 deep", CONFIG, written("config.json", '{"a":' * 100_000 + "1" + "}" * 100_000)),
    Case("a config of 10 MB", CONFIG, written("config.json", '{"a": "' + "x" * 10_000_000 + '"}')),
    Case(
        "a config with a number of 5,000 digits", CONFIG, written("config.json", '{"hidden_size": ' + "9" * 5000 + "}")
    ),
    Case("a billion layers", CONFIG, config(num_hidden_layers=10**9)),
    Case("a hidden size of a billion", CONFIG, config(hidden_size=10**9)),
    Case("a vocabulary of 2^40", CONFIG, config(vocab_size=2**40)),
    Case("a negative number of layers", CONFIG, config(num_hidden_layers=-4)),
    Case("zero heads", (*CONFIG, *WEIGHTS), config(num_attention_heads=0)),
    Case("a layer's width that is a text", (*CONFIG, *WEIGHTS), config(hidden_size="wide")),
    Case("a config of a larger model", CONFIG, config(hidden_size=2048, intermediate_size=8192)),
    Case("an unknown architecture", ("unknown_architecture",), config(model_type="skynet", architectures=["SkyNet"])),
    Case(
        "code of its own",
        ("unknown_architecture",),
        config(model_type="mine", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}),
    ),
    Case("no architecture", ("unknown_architecture",), written("config.json", "{}")),
    Case("an encoder-decoder", ("not_causal",), written("config.json", '{"model_type": "t5"}')),
    Case("an encoder", ("not_causal",), written("config.json", '{"model_type": "bert"}')),
    Case("a quantised model", CONFIG, config(quantization_config={"quant_method": "gptq", "bits": 4})),
    Case("no tokenizer", TOKENIZER, without("tokenizer.json", "tokenizer_config.json")),
    Case("a tokenizer that is no JSON", TOKENIZER, written("tokenizer.json", "{")),
    Case(
        "a tokenizer nested 100,000 deep", TOKENIZER, written("tokenizer.json", '{"a":' * 100_000 + "1" + "}" * 100_000)
    ),
    Case(
        "a tokenizer without bound",
        (*TOKENIZER, "out_of_memory", "timed_out"),
        changed("tokenizer.json", expanding_tokenizer),
    ),
    Case("a tokenizer of many tokens", (*TOKENIZER, "text"), changed("tokenizer.json", wordy_tokenizer)),
    Case("no GGUF file", WEIGHTS, no_gguf),
    Case("a GGUF file of 2^60 tensors", WEIGHTS, gguf_file(many_tensors)),
    Case("a GGUF file of 2^60 keys", WEIGHTS, gguf_file(many_keys)),
    Case("a GGUF key of 2^62 bytes", WEIGHTS, gguf_file(long_key)),
    Case("half a GGUF file", WEIGHTS, gguf_file(half)),
    Case("a GGUF file of a billion layers", WEIGHTS, gguf_file(block_count=10**9)),
    Case("a GGUF file without most weights", (*WEIGHTS, *CONFIG), gguf_file()),
    Case("one part of a GGUF file", WEIGHTS, gguf_file(**{"split.count": 2})),
]
