"""A Hugging Face Hub on the loopback interface, faithful enough for the real clients to push to and load from.

`LocalHub` (server.py) is all that a test needs; the fixture `hub` in hub_fixture.py makes one and points clients at it.
By file: objects (what a commit holds, with git's ids), repositories (branches, tags, history), commits (what the client
sends), storage (LFS objects), accounts (users, organisations, tokens), collecting (collections), cards (front matter),
faults (what goes wrong on purpose), request_log (what was sent), wire (faults and log around the app), routes_* (the
HTTP interface). It has no Xet storage, no pull requests and no .gitignore; nobody requests access to a gated
repository, a test adds them to its `readers`.
"""

from hub.server import LocalHub

__all__ = ["LocalHub"]
