"""`LfsStore`: the objects of large files, uploaded and downloaded through signed addresses on another host."""

import hashlib
import math
import secrets
from dataclasses import dataclass, field

from hub.refusal import Refusal


@dataclass
class Upload:
    """An upload that was allowed: of which object, to which repository, and the parts that came so far."""

    repo_key: str
    oid: str
    size: int
    parts: dict[int, bytes] = field(default_factory=dict)


class LfsStore:
    """Objects by their sha256. A repository may use only those that were uploaded to it.

    Uploads larger than `part_size` bytes come in parts of that size, as on the Hub, where it is gigabytes.
    """

    def __init__(self, part_size: int | None = None) -> None:
        self.part_size = part_size
        self.objects: dict[str, bytes] = {}
        self.owners: dict[str, set[str]] = {}
        self.uploads: dict[str, Upload] = {}
        self.downloads: dict[str, str] = {}

    def find(self, repo_key: str, oid: str) -> bytes | None:
        return self.objects[oid] if repo_key in self.owners.get(oid, ()) else None

    def allow_upload(self, repo_key: str, oid: str, size: int) -> str:
        """Sign an address for one upload."""
        signature = secrets.token_hex(16)
        self.uploads[signature] = Upload(repo_key, oid, size)
        return signature

    def number_of_parts(self, size: int) -> int:
        return math.ceil(size / self.part_size) if self.part_size else 1

    def receive(self, signature: str, content: bytes) -> None:
        """Keep an object whose size and hash are those announced."""
        upload = self.upload(signature)
        if len(content) != upload.size or hashlib.sha256(content).hexdigest() != upload.oid:
            raise Refusal(400, f"The object is not the one announced: {upload.size} bytes, sha256 {upload.oid}")
        self.keep(upload.repo_key, upload.oid, content)

    def keep(self, repo_key: str, oid: str, content: bytes) -> None:
        self.objects[oid] = content
        self.owners.setdefault(oid, set()).add(repo_key)

    def receive_part(self, signature: str, number: int, content: bytes) -> str:
        """Keep a part and give its etag."""
        self.upload(signature).parts[number] = content
        return hashlib.md5(content, usedforsecurity=False).hexdigest()

    def complete(self, signature: str, etags: dict[int, str]) -> None:
        """Put the parts together that the client names, each by the etag that it was given."""
        parts = self.upload(signature).parts
        kept = {number: hashlib.md5(part, usedforsecurity=False).hexdigest() for number, part in parts.items()}
        if etags != kept:
            raise Refusal(400, "The parts named are not those that were uploaded")
        self.receive(signature, b"".join(parts[number] for number in sorted(parts)))

    def upload(self, signature: str) -> Upload:
        if signature not in self.uploads:
            raise Refusal(403, "SignatureDoesNotMatch")
        return self.uploads[signature]

    def allow_download(self, oid: str) -> str:
        """Sign an address from which anybody who has it may download an object."""
        signature = secrets.token_hex(16)
        self.downloads[signature] = oid
        return signature

    def download(self, signature: str) -> bytes:
        if signature not in self.downloads:
            raise Refusal(403, "SignatureDoesNotMatch")
        return self.objects[self.downloads[signature]]
