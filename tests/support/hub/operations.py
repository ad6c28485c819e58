"""The name of what a request asks for: faults are set and requests are found by it."""

import re

_KIND = r"/api/(?:model|dataset|space)s"
_REPO = rf"{_KIND}/[^/]+/[^/]+"
_COLLECTION = r"/api/collections/[^/]+/[^/]+"
_OPERATIONS = (
    ("whoami", "GET", r"/api/whoami-v2"),
    ("create", "POST", r"/api/repos/create"),
    ("delete", "DELETE", r"/api/repos/delete"),
    ("move", "POST", r"/api/repos/move"),
    ("validate-yaml", "POST", r"/api/validate-yaml"),
    ("collections", "GET", r"/api/collections"),
    ("collection-create", "POST", r"/api/collections"),
    ("collection", "GET", _COLLECTION),
    ("collection-update", "PATCH", _COLLECTION),
    ("collection-delete", "DELETE", _COLLECTION),
    ("item-add", "POST", _COLLECTION + "/items"),
    ("item-update", "PATCH", _COLLECTION + "/items/[^/]+"),
    ("item-delete", "DELETE", _COLLECTION + "/items/[^/]+"),
    ("list", "GET", _KIND),
    ("info", "GET", _REPO + r"(?:/revision/[^/]+)?"),
    ("settings", "PUT", _REPO + "/settings"),
    ("preupload", "POST", _REPO + "/preupload/[^/]+"),
    ("commit", "POST", _REPO + "/commit/[^/]+"),
    ("tree", "GET", _REPO + "/tree/.+"),
    ("paths-info", "POST", _REPO + "/paths-info/[^/]+"),
    ("refs", "GET", _REPO + "/refs"),
    ("commits", "GET", _REPO + "/commits/[^/]+"),
    ("branch", "POST", _REPO + "/branch/[^/]+"),
    ("branch-delete", "DELETE", _REPO + "/branch/[^/]+"),
    ("tag", "POST", _REPO + "/tag/[^/]+"),
    ("tag-delete", "DELETE", _REPO + "/tag/[^/]+"),
    ("super-squash", "POST", _REPO + "/super-squash/[^/]+"),
    ("lfs-batch", "POST", r".*\.git/info/lfs/objects/batch"),
    ("lfs-verify", "POST", r".*\.git/info/lfs/objects/verify"),
    ("lfs-upload", "PUT", r"/lfs/uploads/.+"),
    ("lfs-complete", "POST", r"/lfs/uploads/.+"),
    ("lfs-download", "GET|HEAD", r"/lfs/downloads/.+"),
    ("head", "HEAD", r"/.+/resolve/[^/]+/.+"),
    ("download", "GET", r"/.+/resolve/[^/]+/.+"),
)
_PATTERNS = tuple((name, re.compile(method), re.compile(path)) for name, method, path in _OPERATIONS)


def operation_of(method: str, path: str) -> str:
    """The operation's name, by the path as it was sent (quoted); "other" for what a Hub answers 404."""
    for name, methods, pattern in _PATTERNS:
        if methods.fullmatch(method) and pattern.fullmatch(path):
            return name
    return "other"
