"""Merging a sweep's file with the files and presets that it extends: `extends:` in sweep files.

Mappings are merged setting by setting; `grid` and `seeds` are replaced. Paths are relative to the file that contains
them. A setting that an extending file makes void is left out, such as the text below its dataset and the shape below
its preset.
"""

import difflib
import os
import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from depthscope.errors import SpecificationError
from depthscope.sweep.yaml_source import Path_, Where, YamlFile, read_yaml

__all__ = ["LONGEST_SWEEP_NAME", "has_relative_paths", "over", "preset_names", "read_extended"]

REPLACED = frozenset({"grid", "seeds"})
MOST_EXTENDED = 8
LONGEST_SWEEP_NAME = 200  # `depthscope.sweep.report.results` reads no more
# The fields of a model that a preset determines, whether it sets them or leaves their defaults.
SHAPE = frozenset(
    {
        "hidden_size",
        "head_dim",
        "num_attention_heads",
        "num_key_value_heads",
        "num_hidden_layers",
        "intermediate_size",
        "layer_types",
        "mix_post_layers",
        "num_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
        "moe_layers",
        "router_aux_loss_coef",
        "router_z_loss_coef",
        "initializer_range",
        "tie_word_embeddings",
    }
)


def _presets() -> Path:
    return Path(str(files("depthscope.sweep"))) / "presets"


def preset_names() -> list[str]:
    """The sweeps that come with depthscope."""
    return sorted(path.stem for path in _presets().glob("*.yaml"))


def read_extended(source: str) -> tuple[YamlFile, Path, tuple[Path, ...]]:
    """Read a file or a preset, merged with all that it extends.

    Args:
        source: the path of a file, or a name of `preset_names()`.

    Returns:
        The content without `extends`, the folder of its relative paths, and the files that were read.

    Raises:
        SpecificationError: a file is not valid; the message names the line.
    """
    return _read_chain(*_find(source, Path.cwd(), None))


def _find(name: str, folder: Path, from_: str | None, beside: str = "") -> tuple[Path, str]:
    """The file of a sweep and its name in messages; `beside` is the name of the file that extends it."""
    if name in preset_names():
        return _presets() / f"{name}.yaml", f"preset {name}"
    path = folder / name
    if not path.is_file():
        near = difflib.get_close_matches(name, preset_names(), n=1)
        hint = f" Did you mean the preset {near[0]!r}?" if near else f" The presets are: {', '.join(preset_names())}."
        raise SpecificationError(f"{from_ + ': ' if from_ else ''}there is no sweep file or preset {name!r}.{hint}")
    return path.resolve(), os.path.join(os.path.dirname(beside), name)


def _read_chain(path: Path, label: str) -> tuple[YamlFile, Path, tuple[Path, ...]]:
    """A file merged with all that it extends; the folder of its relative paths; and all files that were read."""
    chain: list[YamlFile] = []
    read: list[Path] = []
    top, where = path, label
    while True:
        if path in read or len(chain) == MOST_EXTENDED:
            raise SpecificationError(
                f"{where}: `extends` forms a circle or is deeper than {MOST_EXTENDED} files, at {label}."
            )
        read.append(path)
        file = read_yaml(path, label)
        folder = _folder(file, path)
        chain.append(file)
        if len(chain) == 1:
            first = folder
        else:
            _count_from(first, file, folder)
        if "extends" not in file.content:
            break
        base = file.content.pop("extends")
        where = str(file.where(("extends",)) or label)
        if not isinstance(base, str):
            raise SpecificationError(f"{where}: `extends` takes the name of a preset or a file.")
        if path == top:
            file.content.setdefault("name", _name_of(path))
        path, label = _find(base, path.parent, where, label)
    merged = chain.pop()
    while chain:
        merged = over(merged, chain.pop())
    return merged, first, tuple(read)


def _name_of(path: Path) -> str:
    """The default name of a sweep: the name of its file, in the allowed characters."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).lstrip("._-")[:LONGEST_SWEEP_NAME] or "sweep"


def _folder(file: YamlFile, path: Path) -> Path:
    """The folder that the paths in a file are relative to."""
    relative_to = file.at(("relative_to",))
    return (path.parent / relative_to).resolve() if isinstance(relative_to, str) else path.parent


def _count_from(top: Path, file: YamlFile, folder: Path) -> None:
    """Make the paths in an extended file relative to the folder of the file that extends it."""
    file.content.pop("relative_to", None)
    if folder == top:
        return
    for part in (("data",), ("data", "held_out")):
        text = file.at((*part, "text"))
        if isinstance(text, str):
            file.at(part)["text"] = _relative_path(top, folder, text)
        elif isinstance(text, list):
            file.at(part)["text"] = [_relative_path(top, folder, each) for each in text]
    name = file.at(("tokenizer", "name"))
    if isinstance(name, str) and (folder / name).is_dir():
        file.at(("tokenizer",))["name"] = _relative_path(top, folder, name)


def _relative_path(top: Path, folder: Path, path: Any) -> Any:
    if not isinstance(path, str) or not _is_relative(path):
        return path
    return os.path.relpath(folder / path, top)


def _is_relative(path: Any) -> bool:
    return isinstance(path, str) and path != "" and not path.startswith("~") and not Path(path).is_absolute()


def has_relative_paths(file: YamlFile, folder: Path) -> bool:
    """Whether the content holds paths that are relative to a folder."""
    texts = [file.at((*part, "text")) for part in (("data",), ("data", "held_out"))]
    named = file.at(("tokenizer", "name"))
    paths = [path for text in texts for path in (text if isinstance(text, list) else [text])]
    return any(map(_is_relative, paths)) or (_is_relative(named) and (folder / named).is_dir())


def over(below: YamlFile, above: YamlFile) -> YamlFile:
    """Merge a file over one that it extends, without the settings it makes void: another text, the shape of a preset.

    A preset in its grid applies to some points only; the shape below it is kept for the others.
    """
    void = set(_void_sources(above))
    if above.at(("model", "preset")) is not None:
        void |= {("shape",), *(("model", key) for key in SHAPE)}
    below = below.without(void)
    model = below.at(("model",))
    if _names_presets(above.at(("grid",))) and isinstance(model, Mapping):
        shape = {key: value for key, value in model.items() if key in SHAPE}
        places: dict[Path_, Where] = {("shape", key): where for key in shape if (where := below.where(("model", key)))}
        moved = YamlFile({"shape": shape}, places)
        below = below.without(("model", key) for key in shape).extended_by(moved if shape else YamlFile({}))
    return below.extended_by(above, REPLACED)


def _void_sources(above: YamlFile) -> list[Path_]:
    """The settings that a source of text makes void: files replace a dataset with its options, and vice versa."""
    return [
        (*part, key)
        for part in (("data",), ("data", "held_out"))
        for own, others in (("text", ("dataset", "split", "column")), ("dataset", ("text", "column")))
        if above.at((*part, own)) is not None
        for key in others
    ]


def _names_presets(grid: Any) -> bool:
    families = [family for family in _values(grid) if isinstance(family, Mapping)]
    points = [point for family in families for point in _values(family.get("points"))]
    return any(isinstance(settings, Mapping) and "preset" in settings for settings in (*families, *points))


def _values(part: Any) -> list[Any]:
    """The values of a mapping or a list."""
    return list(part.values()) if isinstance(part, Mapping) else part if isinstance(part, list) else []
