"""Adapters that were trained after tokens were added: the base model gets the rows that the adapter was trained with.

Whoever trains such an adapter resizes the base model's embeddings first. The adapter holds the new size, in whole
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
    """Give a base model the rows of embeddings, and of the head, that an adapter was trained with.

    Args:
        adapter: what messages call the adapter.
        config: its PEFT config.
        shapes: of its stored tensors, by name.
        base: the model that it is going to be put on; changed.

    Raises:
        ModelLoadError: rows of added tokens are stored nowhere, so that the model cannot be had as it was.
    """
    tables = _tables(base, config)
    if "embedding" not in tables:
        return
    have = tables["embedding"][1].weight.shape[0]
    rows = {name: count for name, count in _stored_rows(tables, shapes) if count != have}
    single = _trained_rows(config, tables)
    beyond = {row for trained in single.values() for row in trained if row >= have}
    wanted = max([*rows.values(), *(row + 1 for row in beyond if not rows)], default=have)
    if wanted == have:
        return
    if len(set(rows.values())) > 1:
        raise ModelLoadError(
            f"The weights of the adapter {adapter!r} are of several sizes of the vocabulary "
            f"({', '.join(f'{name}: {count} rows' for name, count in sorted(rows.items()))}). Fetch the adapter again."
        )
    unknown = [
        name for name, _ in tables.values() if not _has_rows(name, shapes, single.get(name, set()), have, wanted)
    ]
    if wanted > have and unknown:
        raise ModelLoadError(
            f"The adapter {adapter!r} was trained with {wanted} tokens, its base model has {have}, and the rows of the "
            f"added ones are not in the adapter ({listed(unknown)}). Save it again with save_embedding_layers=True, or "
            "give the base model as it was resized, with --base-model (in Python: base_model=)."
        )
    base.resize_token_embeddings(wanted, mean_resizing=False)


def _tables(base: Any, config: Any) -> dict[str, Table]:
    """The embedding and the head, each with its name, where the model has them; a head that stays tied is none."""
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    names = {id(module): name for name, module in base.named_modules()}
    if embedding is None or not hasattr(embedding, "weight"):
        return {}
    found = {"embedding": (names[id(embedding)], embedding)}
    trained = getattr(config, "modules_to_save", None) or []
    # The copy of an embedding that is trained has a head of its own, which stays what the embedding was.
    parts = any(found["embedding"][0].endswith(name) for name in trained)
    tied = head is None or (head.weight is embedding.weight and not parts)
    if tied or getattr(config, "ensure_weight_tying", False):
        return found
    return found | {"head": (names[id(head)], head)}


def _stored_rows(tables: Mapping[str, Table], shapes: Mapping[str, list[int]]) -> Iterator[tuple[str, int]]:
    """The stored tensors that have one row (or column) a token, with how many that is."""
    for stored, shape in shapes.items():
        part = next((name for name, _ in tables.values() if stored.startswith(f"{PREFIX}{name}.")), None)
        if part is None:
            continue
        last = stored.removeprefix(f"{PREFIX}{part}.")
        if "lora_embedding_A" in last:
            yield stored, shape[-1]
        elif "lora_B" in last or (last.endswith("weight") and "lora" not in last):
            yield stored, shape[0]


def _trained_rows(config: Any, tables: Mapping[str, Table]) -> dict[str, set[int]]:
    """The tokens whose rows alone were trained, by the name of the table."""
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


def _has_rows(name: str, shapes: Mapping[str, list[int]], single: set[int], have: int, wanted: int) -> bool:
    """Whether the rows `have` to `wanted` of a table are stored, whole or one by one."""
    whole = any(
        stored.startswith(f"{PREFIX}{name}.")
        and stored.endswith("weight")
        and "lora" not in stored
        and shape[0] == wanted
        for stored, shape in shapes.items()
    )
    return whole or set(range(have, wanted)) <= single
