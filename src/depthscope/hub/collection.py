"""A collection that holds a sweep together: the paper, the models, the data set, the Space."""

from dataclasses import dataclass
from functools import partial
from typing import Literal

from huggingface_hub import Collection, HfApi
from huggingface_hub.errors import HfHubHTTPError

from depthscope.errors import SettingsError
from depthscope.hub.retry import Patience

__all__ = ["LONGEST_TITLE", "PAPER", "CollectionPlan", "Item", "publish_collection"]

PAPER = "2603.15389"
LONGEST_TITLE = 59  # characters; the Hub takes fewer than 60
DESCRIPTION = "Models of a depthscope sweep, with what each of their layers contributes."


@dataclass(frozen=True)
class Item:
    """What a collection lists."""

    kind: Literal["paper", "model", "dataset", "space"]
    item_id: str


@dataclass(frozen=True)
class CollectionPlan:
    """A collection by its owner and title, and what it is to list, in order."""

    namespace: str
    title: str
    items: tuple[Item, ...]

    def __post_init__(self) -> None:
        if not 0 < len(self.title) <= LONGEST_TITLE:
            raise SettingsError(
                f"The collection's title has {len(self.title)} characters; the Hub takes 1 to {LONGEST_TITLE}."
            )


def publish_collection(
    api: HfApi, plan: CollectionPlan, patience: Patience, *, private: bool = False
) -> tuple[str, list[str]]:
    """Make the collection if there is none of its title, and add what it lacks; nothing is taken out.

    Returns its slug, and the items that the Hub does not know.

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
    for found in api.list_collections(owner=plan.namespace):
        if found.title == plan.title:
            return api.get_collection(found.slug)  # the list shows the first items of each only
    return api.create_collection(
        plan.title, namespace=plan.namespace, description=DESCRIPTION, private=private, exists_ok=True
    )


def _add(api: HfApi, slug: str, item: Item) -> bool:
    """Add an item; False where the Hub has no such thing, as a paper that nobody has asked for yet."""
    try:
        api.add_collection_item(slug, item.item_id, item_type=item.kind, exists_ok=True)
    except HfHubHTTPError as error:
        if error.response.status_code == 404 and item.kind in ("paper", "space"):
            return False
        raise
    return True
