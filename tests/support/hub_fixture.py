"""Fixtures with a Hub that runs, for tests with the real clients.

`hub` is a `LocalHub` that lasts for one test, with the user "ada", who may write in the organisation "lab", and this
process's clients pointed at it as ada (`hub.token` is her token, `hub.client` her HfApi). Inside the test
`huggingface_hub`, `transformers` and `datasets` work as against the real Hub, although conftest.py makes all other
tests offline: the offline flag, the endpoint and the cache are values that those libraries read at import, and
hub/clients.py sets each of them for the duration of the test. The cache is a fresh folder.

Another process takes the Hub from its environment alone:

    subprocess.run([sys.executable, "-c", code], env=hub.environment(hub.token, tmp_path / "home"), check=True)

Other users, other tokens: `hub.add_user("eve")`, `hub.add_token("ada", role="read")`, `hub.expire(token)`,
`hub.set_role("ada", "lab", "read")`; as somebody else: `hub.api(token)`, or `with hub.connected(token, home): ...`.
What goes wrong: `hub.faults` (hub/faults.py). What was sent: `hub.sent("commit")`. What is there:
`hub.repository("ada/net").files("step4")`.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from hub import LocalHub


@pytest.fixture
def hub() -> Iterator["LocalHub"]:
    """A fresh Hub, and this process connected to it as ada."""
    # Not at the top: only tests with a Hub pay for a web framework.
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    from hub import LocalHub

    with LocalHub() as running:
        running.token = running.add_user("ada", lab="write")
        with running.connected(running.token) as running.client:
            yield running
