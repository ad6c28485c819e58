"""The history of a training under a fault: what is wrong is called by its name, and the training goes on."""

from pathlib import Path

import pytest

from depthscope.runs.history import History
from permissions import without_permission


class Run:
    """What the callbacks of one training have in common."""


LINES = '{"step": 1, "kind": "variance", "values": {}, "layers": {}}\n{"step": 9, "kind": "variance"}\n'


def test_a_history_that_cannot_be_read_is_left_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "layer_stats.jsonl"
    path.write_text(LINES)
    history = History(tmp_path)
    with without_permission(path):
        history.begin(3, Run())
    (said,) = caplog.messages
    assert said == f"{path} cannot be read: Permission denied. The training goes on without it."
    assert path.read_text() == LINES
