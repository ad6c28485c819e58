"""A collection of a sweep: the paper, the models, the data set, the Space."""

from dataclasses import dataclass
from functools import partial
from typing import Literal

from huggingface_hub import Collection, HfApi
from huggingface_hub.errors import HfHubHTTPError

from depthscope.errors import SettingsError
from depthscope.hub.retry import Patience

__all__ = ["LONGEST_TITLE", "PAPER", "CollectionPlan", "Item", "publish_collection"]

PAPER = "2603.15389"
LONGEST_TITLE = 59  # characters; the Hub allows fewer than 60
DESCRIPTION = "Models of a depthscope sweep, with the contribution of each layer."


@dataclass(frozen=True)
class Item:
    """One entry of a collection."""

    kind: Literal["paper", "model", "dataset", "space"]
    item_id: str


@dataclass(frozen=True)
class CollectionPlan:
    """A collection: its owner, its title, and its entries in order."""

    namespace: str
    title: str
    items: tuple[Item, ...]

    def __post_init__(self) -> None:
        if not 0 < len(self.title) <= LONGEST_TITLE:
            raise SettingsError(
                f"The collection's title has {len(self.title)} characters; the Hub allows 1 to {LONGEST_TITLE}."
            )


def publish_collection(
    api: HfApi, plan: CollectionPlan, patience: Patience, *, private: bool = False
) -> tuple[str, list[str]]:
    """Create the collection if none has its title, and add missing entries; no entry is removed.

    Returns its slug, and the entries that the Hub does not know.

    Raises:
        HubError: the Hub refused or did not answer.
    """
    called = f"the collection {plan.title!r}"
    collection = patience.carry_out(f"open {called}", lambda: _open(api, plan, private))
    present = {(item.item_type, item.item_id) for item in collection.items}
    unknown = []
    for item in plan.items:
        if (item.kind, item.item_id) in present:
            continue
        known = patience.carry_out(f"add {item.item_id} to {called}", partial(_add, api, collection.slug, item))
        if not known:
            unknown.append(f"{item.kind} {item.item_id}")
    return collection.slug, unknown


def _open(api: HfApi, plan: CollectionPlan, private: bool) -> Collection:
    for existing in api.list_collections(owner=plan.namespace):
        if existing.title == plan.title:
            return api.get_collection(existing.slug)  # the list holds only the first entries of each
    return api.create_collection(
        plan.title, namespace=plan.namespace, description=DESCRIPTION, private=private, exists_ok=True
    )


def _add(api: HfApi, slug: str, item: Item) -> bool:
    """Add an entry; False if the Hub does not have it, such as a paper that it has not indexed yet."""
    try:
        api.add_collection_item(slug, item.item_id, item_type=item.kind, exists_ok=True)
    except HfHubHTTPError as error:
        if error.response.status_code == 404 and item.kind in ("paper", "space"):
            return False
        raise
    return True
