"""A training that is killed and goes on: its history is that of a training that was never interrupted."""

import contextlib
import json
import multiprocessing
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
from transformers.trainer_utils import get_last_checkpoint

from depthscope.callbacks import EffectivenessCallback, SparsityCallback, VarianceCallback, read_history
from depthscope.runs.history import History
from depthscope.runs.layout import HISTORY
from models import random_blocks, tiny_llama
from runs import trainer

STEPS = 24
# Logs, checkpoints and the ends of epochs (16 steps) fall on different steps.
RHYTHM = {"max_steps": STEPS, "logging_steps": 5, "save_strategy": "steps", "save_steps": 3, "save_total_limit": 3}


def callbacks() -> list[Any]:
    blocks = random_blocks(2, 12)
    return [
        VarianceCallback(moments_every=4),
        SparsityCallback(every=4),
        EffectivenessCallback(blocks, scores="skip,block_influence", every=6, max_overhead=None),
    ]


def train(folder: Path, resume: str | None = None, **changes: Any) -> None:
    run = trainer(tiny_llama(), folder, callbacks(), **{**RHYTHM, **changes})
    run.train(resume_from_checkpoint=resume)


def last_whole_checkpoint(folder: Path) -> str | None:
    """The last checkpoint whose last file is whole; a person would take the one before a broken one too."""
    found = get_last_checkpoint(str(folder)) if folder.exists() else None
    while found is not None:
        with contextlib.suppress(OSError, ValueError):
            json.loads(Path(found, "trainer_state.json").read_text())
            return found
        Path(found).rename(Path(found).with_name(f"broken-{random.random()}"))
        found = get_last_checkpoint(str(folder))
    return None


def child(folder: Path, die_at: int | None) -> None:
    """Train; where `die_at` is given, die in the middle of writing that line of the history."""
    if die_at is not None:
        original, lines = History.append, iter(range(10**6))

        def append(self: History, row: dict[str, Any]) -> None:
            if next(lines) == die_at:
                line = json.dumps(row)
                with open(self.path, "a") as file:
                    file.write(line[: len(line) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            original(self, row)

        History.append = append  # type: ignore[method-assign]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        train(folder, last_whole_checkpoint(folder))


def same(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> bool:
    return [(row["step"], row["kind"]) for row in one] == [(row["step"], row["kind"]) for row in other] and one == other


def by_kind(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: (row["step"], row["kind"]))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    train(folder)
    rows = read_history(folder)
    assert [row["step"] for row in rows if row["kind"] == "variance"] == [5, 10, 15, 20, 24]
    assert [row["step"] for row in rows if row["kind"] == "effectiveness"] == [6, 12, 18, 24]
    assert [("attention_first" in row["layers"]) for row in rows if row["kind"] == "sparsity"] == [True] * 5
    return rows


def test_going_on_from_any_checkpoint_gives_the_same_history(
    uninterrupted: list[dict[str, Any]], tmp_path: Path
) -> None:
    train(tmp_path, save_total_limit=None)
    # From the last one, in the middle of an epoch, the Trainer takes a step beyond the end, which is not recorded.
    for step in (3, 12, 21, STEPS):
        train(tmp_path, str(tmp_path / f"checkpoint-{step}"), save_total_limit=None)
        assert same(read_history(tmp_path), uninterrupted)
        reports = sorted(int(path.stem.removeprefix("step-")) for path in (tmp_path / "layer_reports").iterdir())
        assert reports == [6, 12, 18, 24]


def test_restored_callbacks_go_on_too(uninterrupted: list[dict[str, Any]], tmp_path: Path) -> None:
    """The Trainer can make new callbacks out of what a checkpoint keeps of the old ones."""
    train(tmp_path, save_total_limit=None)
    train(tmp_path, str(tmp_path / "checkpoint-12"), restore_callback_states_from_checkpoint=True)
    # They stand in another order then, and so do their rows of one step.
    assert same(by_kind(read_history(tmp_path)), by_kind(uninterrupted))


def test_checkpoints_that_an_evaluation_brings_about(tmp_path: Path) -> None:
    settings = {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "best", "metric_for_best_model": "loss"}
    settings["load_best_model_at_end"] = True

    def run(folder: Path, resume: str | None = None) -> None:
        from transformers import Trainer

        from runs import Sentences, arguments

        rhythm = {**RHYTHM, **settings, "save_total_limit": None}
        Trainer(
            tiny_llama(),
            arguments(folder, **rhythm),
            train_dataset=Sentences(),
            eval_dataset=Sentences(rows=8),
            callbacks=callbacks(),
        ).train(resume_from_checkpoint=resume)

    run(tmp_path)
    whole = read_history(tmp_path)
    steps = sorted(int(path.name.rpartition("-")[2]) for path in tmp_path.glob("checkpoint-*"))
    for step in steps[-2:]:
        run(tmp_path, str(tmp_path / f"checkpoint-{step}"))
        assert same(read_history(tmp_path), whole)


def test_a_training_from_the_start_keeps_the_earlier_history_aside(tmp_path: Path) -> None:
    train(tmp_path)
    earlier = (tmp_path / HISTORY).read_text()
    train(tmp_path)
    assert (tmp_path / HISTORY).read_text() == earlier
    assert (tmp_path / "layer_stats.previous.jsonl").read_text() == earlier


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the trainings are forked, so that each starts at once")
def test_killed_twenty_times_the_history_is_whole(uninterrupted: list[dict[str, Any]], tmp_path: Path) -> None:
    chance = random.Random(7)
    context = multiprocessing.get_context("fork")
    kills = 0
    for attempt in range(60):
        # Every third is killed in the middle of a line, the others at any moment.
        half_a_line = chance.randrange(3) if attempt % 3 == 0 and kills < 20 else None
        process = context.Process(target=child, args=(tmp_path, half_a_line))
        process.start()
        if half_a_line is None and kills < 20:
            process.join(timeout=chance.uniform(0.05, 0.9))
            process.kill()
        process.join(timeout=120)
        kills += process.exitcode == -signal.SIGKILL
        if process.exitcode == 0:
            if kills >= 20:
                break
            # It finished before it was killed: begin anew from an early checkpoint.
            for path in sorted(tmp_path.glob("checkpoint-*"))[1:]:
                path.rename(path.with_name(f"gone-{attempt}-{path.name}"))
    assert kills >= 20
    assert same(read_history(tmp_path), uninterrupted)
