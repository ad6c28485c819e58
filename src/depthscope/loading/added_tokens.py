"""Adapters that were trained after tokens were added: the base model gets the same number of rows.

The training of such an adapter resizes the base model's embeddings first. The adapter holds the new size, in complete
embeddings, in low-rank updates of them or in single trained rows, and fits no base model of another size.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from depthscope.errors import ModelLoadError
from depthscope.wording.messages import listed

__all__ = ["fit_vocabulary"]

PREFIX = "base_model.model."
Table = tuple[str, Any]  # a module with a row per token, and its name


def fit_vocabulary(adapter: str, config: Any, shapes: Mapping[str, list[int]], base: Any) -> None:
    """Resize a base model's embeddings and head to the vocabulary that an adapter was trained with.

    Args:
        adapter: the adapter's name in messages.
        config: its PEFT config.
        shapes: the shapes of its stored tensors, by name.
        base: its base model; changed in place.

    Raises:
        ModelLoadError: the rows of added tokens are stored nowhere, so the model cannot be restored.
    """
    tables = _tables(base, config)
    if "embedding" not in tables:
        return
    size = tables["embedding"][1].weight.shape[0]
    rows = {name: count for name, count in _stored_rows(tables, shapes) if count != size}
    trained_rows = _trained_rows(config, tables)
    beyond = {row for trained in trained_rows.values() for row in trained if row >= size}
    new_size = max([*rows.values(), *(row + 1 for row in beyond if not rows)], default=size)
    if new_size == size:
        return
    if len(set(rows.values())) > 1:
        raise ModelLoadError(
            f"The weights of the adapter {adapter!r} belong to vocabularies of different sizes "
            f"({', '.join(f'{name}: {count} rows' for name, count in sorted(rows.items()))}). Fetch the adapter again."
        )
    unknown = [
        name
        for name, _ in tables.values()
        if not _has_rows(name, shapes, trained_rows.get(name, set()), size, new_size)
    ]
    if new_size > size and unknown:
        raise ModelLoadError(
            f"The adapter {adapter!r} was trained with {new_size} tokens and its base model has {size}, but it "
            f"lacks the rows of the added tokens ({listed(unknown)}). Save it again with save_embedding_layers=True, "
            "or give the resized base model with --base-model (in Python: base_model=)."
        )
    base.resize_token_embeddings(new_size, mean_resizing=False)


def _tables(base: Any, config: Any) -> dict[str, Table]:
    """The embedding and the head with their names, if the model has them; a tied head does not count."""
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    names = {id(module): name for name, module in base.named_modules()}
    if embedding is None or not hasattr(embedding, "weight"):
        return {}
    tables = {"embedding": (names[id(embedding)], embedding)}
    trained = getattr(config, "modules_to_save", None) or []
    # A trained copy of an embedding is separate from the head, which keeps the original embedding.
    is_copied = any(tables["embedding"][0].endswith(name) for name in trained)
    tied = head is None or (head.weight is embedding.weight and not is_copied)
    if tied or getattr(config, "ensure_weight_tying", False):
        return tables
    return tables | {"head": (names[id(head)], head)}


def _stored_rows(tables: Mapping[str, Table], shapes: Mapping[str, list[int]]) -> Iterator[tuple[str, int]]:
    """The stored tensors with one row (or column) per token, and their number of tokens."""
    for stored, shape in shapes.items():
        table = next((name for name, _ in tables.values() if stored.startswith(f"{PREFIX}{name}.")), None)
        if table is None:
            continue
        last = stored.removeprefix(f"{PREFIX}{table}.")
        if "lora_embedding_A" in last:
            yield stored, shape[-1]
        elif "lora_B" in last or (last.endswith("weight") and "lora" not in last):
            yield stored, shape[0]


def _trained_rows(config: Any, tables: Mapping[str, Table]) -> dict[str, set[int]]:
    """The tokens whose single rows were trained, by the name of the table."""
    indices = getattr(config, "trainable_token_indices", None) or getattr(config, "token_indices", None)
    if not indices:
        return {}
    if not isinstance(indices, dict):
        indices = {"": indices}  # of the embedding
    by_name = {}
    for role, (name, _) in tables.items():
        chosen = [rows for end, rows in indices.items() if (name.endswith(end) if end else role == "embedding")]
        by_name[name] = {row for rows in chosen for row in rows}
    return by_name


def _has_rows(name: str, shapes: Mapping[str, list[int]], trained_rows: set[int], size: int, new_size: int) -> bool:
    """Whether the rows `size` to `new_size` of a table are stored, in one tensor or as single rows."""
    is_stored = any(
        stored.startswith(f"{PREFIX}{name}.")
        and stored.endswith("weight")
        and "lora" not in stored
        and shape[0] == new_size
        for stored, shape in shapes.items()
    )
    return is_stored or set(range(size, new_size)) <= trained_rows
