"""benchmarks/peers.py at toy size: depthscope and plain hooks compute the same vectors; a table has what they cost."""

import pytest

import peers


def test_depthscope_and_plain_hooks_compute_the_same_vectors(capsys: pytest.CaptureFixture[str]) -> None:
    peers.main(["--tiny", "--rounds", "1"])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("|")][2:]
    measured = {(row[0], row[1]): row[2:] for row in rows}
    assert set(measured) == {(vector, tool) for vector in peers.VECTORS for tool in peers.OURS}
    for (vector, tool), columns in measured.items():
        if (vector, tool) == ("skip", "plain hooks, no head"):
            assert columns[0].startswith("no: losses take the head")
        else:
            assert float(columns[-1]) < 1e-4, (vector, tool)  # from float64
            assert float(columns[0].removesuffix(" s")) >= 0
