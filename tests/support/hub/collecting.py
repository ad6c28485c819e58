"""`Collections`: named lists of models, datasets, Spaces and papers."""

import re
import secrets
from dataclasses import dataclass, field
from typing import Any

from hub.objects import now, written
from hub.refusal import Refusal

# The Hub's limits, in characters.
LONGEST_TITLE, LONGEST_DESCRIPTION, LONGEST_NOTE = 60, 150, 500
ITEMS_IN_A_LIST = 4
ITEM_KINDS = ("model", "dataset", "space", "paper", "collection")
PAPER = re.compile(r"\d{4}\.\d{4,5}")


@dataclass
class Collection:
    """A list of items, each with an id of its own."""

    namespace: str
    title: str
    description: str
    private: bool
    object_id: str = field(default_factory=lambda: secrets.token_hex(12))
    theme: str = "blue"
    position: int = 0
    items: list[dict[str, Any]] = field(default_factory=list)
    updated: str = field(default_factory=lambda: written(now()))

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        if not 0 < len(self.title) <= LONGEST_TITLE or len(self.description) > LONGEST_DESCRIPTION:
            limits = f"{LONGEST_TITLE} and {LONGEST_DESCRIPTION}"
            raise Refusal(400, f"A collection's title and description have at most {limits} characters")

    @property
    def slug(self) -> str:
        words = re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")
        return f"{self.namespace}/{words}-{self.object_id}"

    def as_json(self) -> dict[str, Any]:
        """The whole collection."""
        items = [{**item, "position": place} for place, item in enumerate(self.items)]
        return self.summary() | {"position": self.position, "items": items}

    def summary(self) -> dict[str, Any]:
        """What a list of collections shows: the first items, and no position, which the list gives."""
        return {
            "slug": self.slug,
            "title": self.title,
            "description": self.description,
            "owner": {"name": self.namespace, "type": "user", "fullname": self.namespace},
            "items": [{**item, "position": place} for place, item in enumerate(self.items[:ITEMS_IN_A_LIST])],
            "lastUpdated": self.updated,
            "gating": False,
            "private": self.private,
            "theme": self.theme,
            "upvotes": 0,
        }

    def add(self, kind: str, item_id: str, note: str | None, position: int | None = None) -> None:
        if kind not in ITEM_KINDS:
            raise Refusal(400, f"An item is one of {', '.join(ITEM_KINDS)}, not {kind!r}")
        if any((item["type"], item["id"]) == (kind, item_id) for item in self.items):
            raise Refusal(409, "Item already exists in collection")
        item = {"_id": secrets.token_hex(12), "type": kind, "id": item_id, "isLikedByUser": False}
        self.items.append(item | _note(note))
        self.updated = written(now())

    def find(self, object_id: str) -> dict[str, Any]:
        for item in self.items:
            if item["_id"] == object_id:
                return item
        raise Refusal(404, "Collection item not found")

    def change(self, object_id: str, note: str | None, position: int | None) -> None:
        item = self.find(object_id)
        item.update(_note(note))
        if position is not None:
            self.items.remove(item)
            self.items.insert(position, item)

    def remove(self, object_id: str) -> None:
        self.items.remove(self.find(object_id))


def _note(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    if len(text) > LONGEST_NOTE:
        raise Refusal(400, f"A note has at most {LONGEST_NOTE} characters")
    return {"note": {"text": text, "html": text}}


@dataclass
class Collections:
    """All collections, by the part of their slug that never changes."""

    by_object_id: dict[str, Collection] = field(default_factory=dict)

    def create(self, collection: Collection) -> Collection:
        for other in self.of(collection.namespace):
            if other.title == collection.title:
                raise Refusal(409, "A collection with this title already exists", slug=other.slug)
        self.by_object_id[collection.object_id] = collection
        return collection

    def of(self, namespace: str | None) -> list[Collection]:
        return [one for one in self.by_object_id.values() if namespace in (None, one.namespace)]

    def find(self, namespace: str, slug: str) -> Collection | None:
        """By slug; its words may be those of a former title."""
        collection = self.by_object_id.get(slug.rpartition("-")[2])
        return collection if collection and collection.namespace == namespace else None
