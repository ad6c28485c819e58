"""Two processes measure what one does on the same data."""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

import distributed_run
from commands import side_by_side
from depthscope import LayerReport
from depthscope.callbacks import read_history
from distributed_run import RHYTHM, callbacks
from models import tiny_llama
from runs import Sentences, naive_variances, trainer


@dataclass(frozen=True)
class Trainings:
    folder: Path
    said: str


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Trainings:
    """What two processes wrote and said."""
    folder = tmp_path_factory.mktemp("two")
    both = side_by_side(2, distributed_run.__file__, folder)
    for done in both:
        assert done.returncode == 0, done.stderr[-3000:]
    return Trainings(folder, "".join(done.stderr for done in both))


def test_ddp_equals_one_process_on_the_same_data(tmp_path: Path, two: Trainings) -> None:
    trainer(tiny_llama(), tmp_path, callbacks(), **RHYTHM).train()
    one, both = read_history(tmp_path), read_history(two.folder / "ddp")
    assert [(row["step"], row["kind"], row.get("tokens")) for row in one] == [
        (row["step"], row["kind"], row.get("tokens")) for row in both
    ]
    assert len(one) == 6
    for alone, shared in zip(one, both, strict=True):
        for metric, column in alone["layers"].items():
            np.testing.assert_allclose(np.array(shared["layers"][metric], float), np.array(column, float), 1e-5, 1e-5)
    report = LayerReport.load(two.folder / "ddp" / "layer_reports" / "step-3.json")
    assert report.data["eval_blocks"] == 3


def test_where_an_analysis_fails_in_one_process_all_leave_it_and_go_on_training(two: Trainings) -> None:
    """Otherwise one trains on, while the other waits for its part of the analysis."""
    assert [row["step"] for row in read_history(two.folder / "failing")] == [3]
    for step, rank, reason in ((1, 1, "OutOfMemoryError: The device ran out"), (2, 0, "NonFiniteError: The model")):
        assert f"Step {step} was not analysed: Process {rank} of 2 failed, so all of them left: {reason}" in two.said
        assert f"Step {step} was not analysed: The" in two.said  # the process that failed


def test_fsdp_measures_the_shares_of_both_processes(two: Trainings) -> None:
    rows = read_history(two.folder / "fsdp")
    assert [(row["step"], row["kind"]) for row in rows] == [
        (3, "effectiveness"),
        (3, "variance"),
        (3, "sparsity"),
        (6, "effectiveness"),
        (6, "variance"),
        (6, "sparsity"),
    ]
    # The first step runs on the weights as they are at the start, where nothing has been averaged yet.
    model, data, seen = tiny_llama(), Sentences(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        total: list[list[torch.Tensor]] = []
        for rank in range(2):
            batch = [data[row] for row in range(4 * step + 2 * rank, 4 * step + 2 * rank + 2)]
            inputs = {name: torch.stack([row[name] for row in batch]) for name in batch[0]}
            states: list[tuple[torch.Tensor, torch.Tensor]] = []
            handles = [
                layer.register_forward_hook(
                    lambda m, a, o, states=states: states.append((a[0].detach().clone(), o.detach().clone()))
                )
                for layer in model.model.layers
            ]
            model.train()(**inputs).loss.backward()
            for handle in handles:
                handle.remove()
            seen.append((step, states, inputs["attention_mask"]))
            total.append([weight.grad.clone() for weight in model.parameters()])
            optimizer.zero_grad()
        for weight, first, second in zip(model.parameters(), *total, strict=True):
            weight.grad = (first + second) / 2
        optimizer.step()
        optimizer.zero_grad()
    for metric, expected in naive_variances(seen).items():
        np.testing.assert_allclose(rows[1]["layers"][metric], expected, rtol=1e-4, atol=1e-4)
    assert rows[1]["tokens"] == sum(int(mask.sum()) for _, _, mask in seen)


pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gloo under torchrun needs a POSIX system")
