"""Callbacks under faults from outside: histories that cannot be written, damaged checkpoints, coming and going."""

import json
import logging
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback

from depthscope.callbacks import EffectivenessCallback, SparsityCallback, VarianceCallback, read_history
from depthscope.runs.history import History
from depthscope.runs.layout import HISTORY
from models import random_blocks, tiny_llama
from runs import trainer

needs_posix = pytest.mark.skipif(sys.platform == "win32", reason="the fault is one of a POSIX system")


class At(TrainerCallback):
    """Does something at the beginning of a step."""

    def __init__(self, step: int, does: Callable[[], None]) -> None:
        self.step, self.does = step, does

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.does()


def effectiveness(**options: Any) -> EffectivenessCallback:
    settings = {"scores": "block_influence", "every": 4, "max_overhead": None, **options}
    return EffectivenessCallback(random_blocks(2, 12), **settings)


def hooks_on(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@needs_posix
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no device that is always full")
def test_a_full_disk_does_not_end_the_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    full = Path("/dev/full")
    callback = VarianceCallback()
    run = trainer(
        tiny_llama(), tmp_path, [callback, At(0, lambda: (tmp_path / HISTORY).symlink_to(full))], logging_steps=2
    )
    with caplog.at_level(logging.WARNING):
        run.train()
    assert run.state.global_step == 8
    assert "layers/variance/3" in run.state.log_history[3]
    assert caplog.text.count("No space left on device") == 1
    assert "lacks 4 lines, of steps 2 to 8" in caplog.text


def test_reports_that_cannot_be_written_do_not_end_the_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "layer_reports").write_text("a file where a folder belongs")
    with caplog.at_level(logging.WARNING):
        trainer(tiny_llama(), tmp_path, [effectiveness()]).train()
    assert [row["step"] for row in read_history(tmp_path)] == [4, 8]
    assert caplog.text.count("is not saved") == 1
    assert "The reports of steps 4, 8 are missing" in caplog.text


def test_lines_wait_for_a_folder_that_is_gone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, aside = tmp_path / "run", tmp_path / "aside"
    callbacks = [At(3, lambda: folder.rename(aside)), At(7, lambda: aside.rename(folder)), VarianceCallback()]
    with caplog.at_level(logging.WARNING):
        trainer(tiny_llama(), folder, callbacks, logging_steps=2).train()
    assert [row["step"] for row in read_history(folder)] == [2, 4, 6, 8]
    assert caplog.text.count("The training goes on without it") == 1
    assert "lacks" not in caplog.text


def test_a_folder_that_stays_away_is_told_at_the_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "run"
    with caplog.at_level(logging.WARNING):
        trainer(
            tiny_llama(), folder, [VarianceCallback(), At(3, lambda: shutil.rmtree(folder))], logging_steps=2
        ).train()
    assert "lacks 3 lines, of steps 4 to 8" in caplog.text


@needs_posix
def test_a_line_that_a_full_disk_cut_off_is_taken_back(tmp_path: Path) -> None:
    import resource

    history = History(tmp_path)
    row = {"kind": "variance", "values": {}, "layers": {"variance": [1.0] * 50}}
    history.append({"step": 1, **row})
    size = history.path.stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 40, hard))
    try:
        history.append({"step": 2, **row})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert history.path.stat().st_size == size
    history.append({"step": 3, **row})
    assert [found["step"] for found in read_history(tmp_path)] == [1, 2, 3]


def test_a_line_that_is_not_whole_is_skipped_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = [json.dumps({"step": step, "kind": "variance", "values": {}, "layers": {}}) for step in (1, 2, 3, 4)]
    (tmp_path / HISTORY).write_text("\n".join([lines[0], lines[1][:20], "[1]", lines[2]]) + "\n" + lines[3][:9])
    with caplog.at_level(logging.WARNING):
        assert [row["step"] for row in read_history(tmp_path)] == [1, 3]
    assert "skipped incomplete line 2, 3." in caplog.text
    # What comes after a line that was cut off begins a line of its own.
    History(tmp_path).append(json.loads(lines[3]))
    assert [row["step"] for row in read_history(tmp_path)] == [1, 3, 4]


def change_states(checkpoint: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = checkpoint / "trainer_state.json"
    state = json.loads(path.read_text())
    change(state["stateful_callbacks"])
    path.write_text(json.dumps(state))


ODD: list[Any] = [
    [],
    "window",
    {"sums": 3},
    {"sums": [[1.0]], "largest": [0.0], "not_finite": [None]},
    {"experts": {"7": [1.0] * 12}, "losses": [0, 0, 0]},
    {"experts": {"0": ["many"]}, "losses": [0, 0, 0]},
    {"experts": {}, "losses": None},
]


def test_odd_states_in_a_checkpoint_are_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def run(resume: str | None = None) -> None:
        callbacks = [VarianceCallback(), SparsityCallback(), effectiveness()]
        rhythm = {"max_steps": 4, "logging_steps": 4, "save_strategy": "steps", "save_steps": 3}
        trainer(tiny_llama(), tmp_path, callbacks, **rhythm).train(resume_from_checkpoint=resume)

    run()
    for odd in ODD:

        def damage(states: dict[str, Any], odd: Any = odd) -> None:
            for name in ("VarianceCallback", "SparsityCallback"):
                states[name]["attributes"]["window"] = odd
            states["EffectivenessCallback"]["attributes"] = {"spent": odd, "waiting": odd}

        change_states(tmp_path / "checkpoint-3", damage)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            run(str(tmp_path / "checkpoint-3"))
        for name in ("VarianceCallback", "SparsityCallback", "EffectivenessCallback"):
            assert f"{name} cannot" in caplog.text, odd
        assert [(row["step"], row["kind"]) for row in read_history(tmp_path)] == [
            (4, "effectiveness"), (4, "variance"), (4, "sparsity"),
        ]  # fmt: skip


def test_two_of_one_class_keep_apart(tmp_path: Path) -> None:
    def both() -> list[TrainerCallback]:
        return [
            effectiveness(scores="skip"),
            effectiveness(scores="skip,block_influence", every=2),
            VarianceCallback(sublayers=False),
            VarianceCallback(sublayers=False, every=2),
        ]

    rhythm = {"save_strategy": "steps", "save_steps": 3}
    callbacks = both()
    run = trainer(tiny_llama(), tmp_path, callbacks, **rhythm)
    run.train()
    reports = {path.name: json.loads(path.read_text()) for path in (tmp_path / "layer_reports").iterdir()}
    second = {f"step-{step}.2.json" for step in (2, 4, 6, 8)}
    assert reports.keys() == {"step-4.json", "step-8.json"} | second
    assert "block_influence" in reports["step-4.2.json"]["layers"][0]
    assert "block_influence" not in reports["step-4.json"]["layers"][0]
    logged = run.state.log_history[0]
    assert {"layers/skip_ratio/0", "layers/skip_ratio_2/0", "layers/variance_2/0"} <= logged.keys()
    assert logged["layers/variance/0"] != logged["layers/variance_2/0"]
    whole = read_history(tmp_path)
    again = both()
    trainer(tiny_llama(), tmp_path, again, **rhythm).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert read_history(tmp_path) == whole


@pytest.mark.parametrize("kind", [VarianceCallback, SparsityCallback, effectiveness], ids=lambda kind: kind.__name__)
def test_a_callback_that_is_added_during_a_training_measures_from_then_on(kind: Any, tmp_path: Path) -> None:
    model = tiny_llama()
    before = hooks_on(model)
    late = kind()
    run = trainer(model, tmp_path, [VarianceCallback(log="none")], logging_steps=2, save_strategy="steps", save_steps=5)
    run.add_callback(At(3, lambda: run.add_callback(late)))
    run.train()
    kept = json.loads((tmp_path / "checkpoint-5" / "trainer_state.json").read_text())["stateful_callbacks"]
    assert type(late).__name__ in kept
    kinds = {VarianceCallback: "variance", SparsityCallback: "sparsity"}
    steps = [row["step"] for row in read_history(tmp_path) if row["kind"] == kinds.get(kind, "effectiveness")]
    if kind is VarianceCallback:
        assert steps == [2, 4, 4, 6, 6, 8, 8]
        assert any(name.startswith("layers/variance_2/") for name in run.state.log_history[-2])
    else:
        assert steps == ([4, 6, 8] if kind is SparsityCallback else [4, 8])
    assert hooks_on(model) == before


@pytest.mark.parametrize("kind", [VarianceCallback, SparsityCallback], ids=lambda kind: kind.__name__)
def test_a_callback_that_is_removed_during_a_training_leaves_nothing_behind(kind: Any, tmp_path: Path) -> None:
    model, seen = tiny_llama(), []
    before = hooks_on(model)
    callback = kind()
    run = trainer(model, tmp_path, [callback], logging_steps=4)
    run.add_callback(At(5, lambda: run.remove_callback(callback)))
    run.add_callback(At(7, lambda: seen.append(hooks_on(model))))
    run.train()
    assert seen == [before]
    assert [row["step"] for row in read_history(tmp_path)] == [4, 6]  # what the last steps came to is kept
    assert "layers/variance/0" not in run.state.log_history[-2]


def test_a_removed_callback_may_be_at_work_elsewhere(tmp_path: Path) -> None:
    """Removed from one Trainer before it trained; its training for another is no business of the first."""
    callback, first, second = VarianceCallback(), tiny_llama(), tiny_llama()
    one = trainer(first, tmp_path / "one", [callback])
    one.remove_callback(callback)
    other: Trainer = trainer(second, tmp_path / "two", [callback, At(3, lambda: one.train())])
    other.train()
    assert [row["step"] for row in read_history(tmp_path / "two")] == [4, 8]
    assert not (tmp_path / "one" / HISTORY).exists()
