"""Running sweeps: what is trained, skipped, recorded and shared out, on a sweep that trains in a second."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import Trainer, TrainingArguments, default_data_collator, set_seed
from typer.testing import CliRunner, Result

from commands import prepare
from depthscope.cli import app
from depthscope.errors import SweepError
from depthscope.models import DepthLMConfig, DepthLMForCausalLM
from depthscope.runs import layout
from depthscope.sweep import point as point_module
from depthscope.sweep.data import Sequences, open_corpus
from depthscope.sweep.grid import expand
from depthscope.sweep.runner import run_sweep, select
from depthscope.sweep.specification import load_sweep
from depthscope.sweep.workers import _receive, _send, _send_next, _Worker, costliest_first
from sweeps import reported, run, weights, write_sweep

POINTS = ["depth-L2-seed0", "depth-L3-seed0"]


def depthscope(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200", "NO_COLOR": "1"})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny sweep, run once in this process."""
    folder = tmp_path_factory.mktemp("finished")
    assert run(folder, folder / "out").statuses == dict.fromkeys(POINTS, "finished")
    return folder / "out"


@pytest.mark.quick
def test_a_point_leaves_its_configuration_model_log_history_scores_and_environment(finished: Path) -> None:
    folder = finished / "points" / POINTS[0]
    assert not list(folder.glob("checkpoint-*"))
    assert json.loads((folder / "point.json").read_text())["settings"] == {"num_hidden_layers": 2}
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [2, 4, 6, 8, 10, 12]
    assert log[-1]["loss"] < log[0]["loss"]
    stats = [json.loads(line) for line in (folder / "layer_stats.jsonl").read_text().splitlines()]
    assert [row["step"] for row in stats] == [2, 4, 6, 8, 10, 12]
    assert all(len(row["layers"]["variance"]) == 2 for row in stats)
    for name in ("layer_report.json", "untrained_report.json"):
        assert len(json.loads((folder / name).read_text())["layers"]) == 2
    environment = json.loads((folder / "environment.json").read_text())
    assert (environment["precision"], environment["attention"], environment["processes"]) == ("float32", "sdpa", 1)
    result = json.loads((folder / "result.json").read_text())
    assert result["status"] == "finished"
    assert result["loss"] < result["untrained_loss"]
    assert (folder / "model" / "modeling_depthlm.py").is_file()
    assert (folder / "model" / "tokenizer.json").is_file()


def test_two_identical_sweeps_give_identical_reports(finished: Path, tmp_path: Path) -> None:
    run(tmp_path, tmp_path / "out")
    again = reported(tmp_path / "out")
    assert {name for name, content in reported(finished).items() if content != again[name]} == set()
    for point in POINTS:
        assert weights(tmp_path / "out/points" / point / "model") == weights(finished / "points" / point / "model")


def test_the_sweep_trains_what_a_plain_trainer_trains(finished: Path, tmp_path: Path) -> None:
    corpus = open_corpus(finished, 16)
    ends = {"bos_token_id": corpus.tokenizer.bos_token_id, "eos_token_id": corpus.tokenizer.eos_token_id}
    config = DepthLMConfig(
        vocab_size=len(corpus.tokenizer),
        hidden_size=16,
        head_dim=8,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=32,
        initializer_range=0.1,
        num_hidden_layers=2,
        max_position_embeddings=16,
        **ends,
    )
    set_seed(0)
    model = DepthLMForCausalLM(config)
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=12,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=2,
        weight_decay=0.1,
        adam_beta2=0.95,
        train_sampling_strategy="sequential",
        seed=0,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    data = Sequences(corpus, 16, 48, seed=0)
    Trainer(model, arguments, train_dataset=data, data_collator=default_data_collator).train()
    swept = weights(finished / "points" / POINTS[0] / "model")
    assert {name: weight.tolist() for name, weight in model.state_dict().items()} == swept


@pytest.mark.quick
def test_what_is_finished_is_not_touched_again(finished: Path) -> None:
    times = {path: path.stat().st_mtime_ns for path in (finished / "points").rglob("*")}
    outcome = run(finished.parent, finished)
    assert outcome.skipped == 2
    assert {path: path.stat().st_mtime_ns for path in (finished / "points").rglob("*")} == times


def test_micro_batches_train_the_same_model_to_rounding(finished: Path, tmp_path: Path) -> None:
    run(tmp_path, tmp_path / "out", only=("depth-L2",), training={"micro_batch_size": 2})
    one, two = (out / "points" / POINTS[0] / "model" for out in (finished, tmp_path / "out"))
    for name, weight in weights(one).items():
        torch.testing.assert_close(torch.tensor(weight), torch.tensor(weights(two)[name]), rtol=1e-3, atol=1e-4)


def test_a_diverging_point_is_recorded_and_the_others_are_finished(tmp_path: Path) -> None:
    grid = {"rate": {"num_hidden_layers": 2, "learning_rate": [1e30, 1e-2]}}
    outcome = run(tmp_path, tmp_path / "out", grid=grid)
    assert outcome.statuses == {"rate-lr1e_30-seed0": "diverged", "rate-lr0.01-seed0": "finished"}
    folder = tmp_path / "out/points/rate-lr1e_30-seed0"
    assert not (folder / "model").exists()
    assert not list(folder.glob("checkpoint-*"))
    assert json.loads((folder / "log.jsonl").read_text().splitlines()[-1])["loss"] is None
    assert "Diverged (losses" in (tmp_path / "out/report/tables.md").read_text()
    assert run(tmp_path, tmp_path / "out", grid=grid).skipped == 2


def test_a_point_that_fails_is_recorded_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    analyze = point_module.analyze_blocks

    def out_of_memory(model: DepthLMForCausalLM, *args: object, **kwargs: object) -> object:
        if model.config.num_hidden_layers == 2:
            raise RuntimeError("out of memory")
        return analyze(model, *args, **kwargs)

    monkeypatch.setattr(point_module, "analyze_blocks", out_of_memory)
    written = write_sweep(tmp_path)
    shown = depthscope("sweep", "run", written, "--out", tmp_path / "out", "--jobs", "1")
    assert shown.exit_code == 1
    assert shown.output.count("Failed: depth-L2-seed0. RuntimeError: out of memory.") == 1
    assert shown.output.count("depth-L2-seed0") == 2  # its progress, and once why it failed
    result = json.loads((tmp_path / "out/points/depth-L2-seed0/result.json").read_text())
    assert (result["status"], result["error"]) == ("failed", "RuntimeError: out of memory.")
    monkeypatch.undo()
    outcome = run(tmp_path, tmp_path / "out")
    assert (outcome.skipped, outcome.failed) == (1, [])


def test_weights_are_kept_at_early_steps_and_then_at_every_nth(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert layout.EARLY_STEPS == (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
    monkeypatch.setattr(layout, "EARLY_STEPS", (0, 1, 2, 4))
    run(tmp_path, tmp_path / "out", only=("depth-L2",), tracking={"publish_every": 3})
    folder = tmp_path / "out/points" / POINTS[0]
    assert {path.name for path in (folder / "steps").iterdir()} == {f"step-{step}" for step in (0, 1, 2, 4, 6, 9, 12)}
    assert weights(folder / "steps/step-12") == weights(folder / "model")
    assert weights(folder / "model") == weights(finished / "points" / POINTS[0] / "model")
    first = DepthLMForCausalLM.from_pretrained(folder / "steps/step-0")
    sweep = load_sweep(tmp_path / "tiny.yaml")
    grid = expand(sweep)
    made = point_module.PointRun(grid.points[0], sweep.specification, open_corpus(tmp_path / "out", 16), 16, tmp_path)
    for name, weight in made.model().state_dict().items():
        assert torch.equal(weight, first.state_dict()[name])


def test_only_takes_families_variants_points_and_patterns(tmp_path: Path) -> None:
    grid = {"depth": {"num_hidden_layers": [2, 3]}, "decay": {"num_hidden_layers": 3, "weight_decay": [0.1, 1.0]}}
    sweep = load_sweep(write_sweep(tmp_path, grid=grid, seeds=[0, 1]))
    every = expand(sweep)

    def names(*only: str) -> list[str]:
        return [point.name for point in select(sweep, every, only)]

    assert len(names()) == 6
    # Its point with the default weight decay is depth's too, and is trained once.
    assert names("decay") == ["depth-L3-seed0", "decay-wd1-seed0", "depth-L3-seed1", "decay-wd1-seed1"]
    assert names("depth-L2") == ["depth-L2-seed0", "depth-L2-seed1"]
    assert names("*-seed1", "depth-L2-seed0") == [
        "depth-L2-seed0",
        "depth-L2-seed1",
        "depth-L3-seed1",
        "decay-wd1-seed1",
    ]
    with pytest.raises(SweepError, match="--only width matches no point"):
        names("width")


def test_only_trains_that_alone_and_the_report_says_what_was_not_run(tmp_path: Path) -> None:
    shown = depthscope("sweep", "run", write_sweep(tmp_path), "--out", tmp_path / "out", "--only", "*-L3", "--jobs", 1)
    assert shown.exit_code == 0, shown.output
    assert [path.name for path in (tmp_path / "out/points").iterdir()] == ["depth-L3-seed0"]
    assert f"Open {(tmp_path / 'out/report/sweep.html').as_uri()} in a browser." in shown.output
    assert "1 of 2 points are finished" in " ".join(shown.output.split())


def test_a_dry_run_lists_the_points_and_writes_nothing(tmp_path: Path) -> None:
    shown = depthscope("sweep", "run", write_sweep(tmp_path), "--out", tmp_path / "out", "--dry-run")
    assert shown.exit_code == 0
    assert [line.split() for line in shown.output.splitlines()[1:3]] == [
        ["depth-L2-seed0", "2", "16", "16", "12", "768"],
        ["depth-L3-seed0", "3", "16", "16", "12", "768"],
    ]
    assert not (tmp_path / "out").exists()


def test_a_dry_run_in_a_narrow_terminal_cuts_nothing(tmp_path: Path) -> None:
    name = "a-family-with-a-very-long-name-that-says-all-that-there-is-to-say-about-it"
    written = write_sweep(tmp_path, grid={name: {"num_hidden_layers": [2, 3]}})
    shown = CliRunner().invoke(app, ["sweep", "run", str(written), "--dry-run"], env={"COLUMNS": "80"})
    assert "…" not in shown.output
    lines = shown.output.splitlines()
    assert lines[1].split()[1:] == ["2", "16", "16", "12", "768"]
    assert f"{name}-L2-seed0" in "".join(line.split()[0] for line in lines[1:])


def test_the_help_says_that_only_may_be_given_several_times() -> None:
    assert "--only A --only B" in " ".join(depthscope("sweep", "run", "--help").output.split())


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    shown = depthscope("sweep", "run", write_sweep(tmp_path), "--out", tmp_path / "file" / "out")
    assert shown.exit_code == 2
    assert "cannot be written" in shown.output
    assert "Traceback" not in shown.output


def test_a_folder_of_other_settings_is_refused_with_what_differs(finished: Path, tmp_path: Path) -> None:
    kept = (finished / "sweep.yaml").read_text()
    changed = write_sweep(finished.parent, training={"weight_decay": 0.2})
    shown = depthscope("sweep", "run", changed, "--out", finished)
    assert shown.exit_code == 2
    assert "weight_decay was 0.1, is now 0.2" in shown.output
    other = write_sweep(finished.parent, data={"epochs": 2}, tokenizer={"characters": 9_000_000})
    shown = depthscope("sweep", "run", other, "--out", finished)
    assert "data.epochs was 1.0, is now 2.0; tokenizer.characters was 5000000, is now 9000000" in shown.output
    assert (finished / "sweep.yaml").read_text() == kept


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished sweep's folder, beside a copy of its text."""
    shutil.copytree(finished.parent / "text", tmp_path / "text")
    return Path(shutil.copytree(finished, tmp_path / "out"))


def models(out: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in out.glob("points/*/model/model.safetensors")}


def measured(out: Path) -> list[dict[str, Any]]:
    return [json.loads((out / "points" / point / "result.json").read_text()) for point in POINTS]


def test_other_scoring_is_measured_anew_and_trains_nothing(copy: Path, tmp_path: Path) -> None:
    before, scoring = models(copy), {"eval_blocks": 3, "loss_tokens": 48, "scores": ["variance"]}
    outcome = run(tmp_path, copy, scoring=scoring)
    assert (outcome.skipped, outcome.failed) == (0, [])
    assert models(copy) == before
    run(tmp_path, tmp_path / "fresh", scoring=scoring)
    assert measured(copy) == measured(tmp_path / "fresh")
    # The held-out text is larger than that of the fresh sweep, so the reports are of another fingerprint.
    for point in POINTS:
        reports = [
            json.loads((out / "points" / point / "layer_report.json").read_text()) for out in (copy, tmp_path / "fresh")
        ]
        assert reports[0]["layers"] == reports[1]["layers"]
        assert "causal" not in reports[0]["scores"]
    assert run(tmp_path, copy, scoring=scoring).skipped == 2


def test_what_cannot_be_measured_anew_keeps_its_measurements(copy: Path, tmp_path: Path) -> None:
    before = measured(copy)
    with pytest.raises(SweepError, match=r"L2-seed0 was measured.*eval_blocks was 2, is now 1\), but --only leaves it"):
        run(tmp_path, copy, only=("depth-L3",), scoring={"eval_blocks": 1})
    with pytest.raises(SweepError, match=r"trained with other settings.*scoring.eval_blocks was 2, is now 1"):
        run(tmp_path, copy, scoring={"eval_blocks": 1}, tracking={"effectiveness_every": 6})
    shutil.rmtree(copy / "points" / POINTS[1] / "model")
    with pytest.raises(SweepError, match=r"L3-seed0 was measured.*its trained model is missing"):
        run(tmp_path, copy, scoring={"eval_blocks": 1})
    assert measured(copy) == before


def test_with_its_data_deleted_it_can_be_measured_on_more_text(copy: Path, tmp_path: Path) -> None:
    before, tokens = models(copy), (copy / "data" / "train.bin").read_bytes()
    with pytest.raises(SweepError, match="holds tokens of"):
        run(tmp_path, copy, scoring={"loss_tokens": 96})
    assert [result["status"] for result in measured(copy)] == ["finished", "finished"]
    shutil.rmtree(copy / "data")
    assert run(tmp_path, copy, scoring={"loss_tokens": 96}).failed == []
    assert (models(copy), (copy / "data" / "train.bin").read_bytes()) == (before, tokens)


def test_more_points_are_trained_beside_what_is_finished(copy: Path, tmp_path: Path) -> None:
    before = models(copy)
    outcome = run(tmp_path, copy, grid={"depth": {"num_hidden_layers": [2, 3]}, "one": {"num_hidden_layers": 1}})
    assert (outcome.skipped, len(outcome.statuses)) == (2, 3)
    assert before.items() <= models(copy).items()


def test_a_longer_sequence_would_be_another_order_and_is_refused(copy: Path, tmp_path: Path) -> None:
    grid = {"depth": {"num_hidden_layers": [2, 3]}, "length": {"num_hidden_layers": 2, "sequence_length": [16, 32]}}
    with pytest.raises(SweepError, match=r"the longest sequence_length, .*order.*, was 16, is now 32"):
        run(tmp_path, copy, grid=grid)


def test_a_shorter_sequence_makes_blocks_shorter_and_all_is_measured_anew(copy: Path, tmp_path: Path) -> None:
    grid = {"depth": {"num_hidden_layers": [2, 3]}, "length": {"num_hidden_layers": 2, "sequence_length": [16, 8]}}
    before = models(copy)
    assert run(tmp_path, copy, grid=grid).skipped == 0
    assert before.items() <= models(copy).items()
    sizes = [json.loads(path.read_text())["settings"]["block_size"] for path in copy.glob("points/*/layer_report.json")]
    assert sizes == [8, 8, 8]
    # With the size in the file it is that of the whole folder, whatever the grid.
    assert run(tmp_path, copy, grid=grid, scoring={"block_size": 8}).skipped == 3


@pytest.mark.parametrize("content", ["", '{"status": "fini', "[]", "\x00"])
@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("points/depth-L2-seed0/result.json", "Delete it and run again, which measures the trained model again."),
        ("points/depth-L2-seed0/point.json", "Choose another --out, or delete the folder"),
    ],
)
def test_a_damaged_file_is_named_with_what_to_do(copy: Path, name: str, remedy: str, content: str) -> None:
    (copy / name).write_text(content)
    shutil.rmtree(copy / "report")
    shown = depthscope("sweep", "run", write_sweep(copy.parent), "--out", copy)
    assert shown.exit_code == 1, shown.output
    assert f"{copy / name} is " in shown.output
    assert remedy in shown.output
    assert (copy / name).read_text() == content
    assert "Unreadable: depth-L2-seed0." in (copy / "report" / "tables.md").read_text()
    assert depthscope("sweep", "report", copy).exit_code == 1


def test_a_result_that_was_damaged_and_deleted_is_measured_anew(copy: Path, tmp_path: Path) -> None:
    before, trained = measured(copy), models(copy)
    (copy / "points" / POINTS[0] / "result.json").unlink()
    assert run(tmp_path, copy).skipped == 1
    assert (measured(copy), models(copy)) == (before, trained)


def test_the_error_of_the_held_out_loss_is_that_of_its_own_blocks(finished: Path) -> None:
    from depthscope.sweep.report.results import load_results

    rows = open_corpus(finished, 16).held_out_blocks(4, 16).input_ids
    for point, result in zip(load_results(finished).points, measured(finished), strict=True):
        model = DepthLMForCausalLM.from_pretrained(finished / "points" / point.name / "model").eval()
        with torch.no_grad():
            losses = torch.stack([model(row[None], labels=row[None]).loss for row in rows]).double()
        assert result["loss"] == pytest.approx(float(losses.mean()), rel=1e-5)
        assert result["loss_se"] == pytest.approx(float(losses.std() / 2), rel=1e-4)
        assert point.numbers["loss_se"] == result["loss_se"]


def test_a_folder_where_a_sweep_is_running_is_refused(finished: Path) -> None:
    from filelock import FileLock

    with FileLock(finished / ".lock"):
        shown = depthscope("sweep", "run", write_sweep(finished.parent), "--out", finished)
    assert shown.exit_code == 2
    assert "another process is running a sweep" in shown.output


@pytest.mark.parametrize("unread", [False, True])
def test_a_worker_whose_parent_is_gone_ends_and_calls_no_point_failed(unread: bool) -> None:
    ours, theirs = multiprocessing.Pipe()
    if unread:
        theirs.send("a message that nobody reads")
    ours.close()
    with pytest.raises(SystemExit):  # which run_point, unlike an Exception, does not record
        _send(theirs, ("at", "training", 1, 2, None))
    assert _receive(theirs) is None


@pytest.mark.parametrize("error", [BrokenPipeError, ConnectionResetError, ConnectionAbortedError])
def test_a_point_can_be_given_to_a_worker_that_has_died(error: type[OSError]) -> None:
    class Dead:
        def send(self, point: object) -> None:
            raise error

    point: Any = object()
    worker = _Worker(0, None, cast(Any, Dead()))
    _send_next(worker, deque([point]))
    assert worker.point is point  # its loss is found out when it should answer


def test_workers_take_the_costliest_point_of_a_seed_first(tmp_path: Path) -> None:
    sweep = load_sweep(write_sweep(tmp_path, grid={"depth": {"num_hidden_layers": [2, 4, 3]}}, seeds=[0, 1]))
    ordered = costliest_first(expand(sweep).points, vocab_size=300)
    assert [(point.seed, point.model["num_hidden_layers"]) for point in ordered] == [
        (seed, layers) for seed in (0, 1) for layers in (4, 3, 2)
    ]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL needs a POSIX system")
def test_workers_give_what_one_process_gives_and_a_killed_one_costs_one_point(tmp_path: Path) -> None:
    grid = {"depth": {"num_hidden_layers": [2, 3, 4]}}
    sweep = load_sweep(write_sweep(tmp_path, grid=grid))
    prepare()
    before = set(multiprocessing.active_children())
    out = tmp_path / "out"

    def kill_one() -> None:
        while not list(out.glob("points/*/point.json")):
            time.sleep(0.005)
        os.kill(next(iter(set(multiprocessing.active_children()) - before)).pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    outcome = run_sweep(sweep, out, jobs=2, progress=False)
    killer.join()
    assert sorted(outcome.statuses.values()) == ["failed", "finished", "finished"]
    result = json.loads((out / "points" / outcome.failed[0] / "result.json").read_text())
    assert "ended by signal 9 (SIGKILL)" in result["error"]
    assert run(tmp_path, out, grid=grid, jobs=1).skipped == 2
    run(tmp_path, tmp_path / "alone", grid=grid)
    assert reported(out) == reported(tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="gloo under torchrun needs a POSIX system")
def test_two_processes_of_torchrun_train_what_one_trains_to_rounding(finished: Path, tmp_path: Path) -> None:
    write_sweep(tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command += ["depthscope", "sweep", "run", "tiny.yaml", "--out", "out"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Tables and page") == 1
    for point in POINTS:
        one, two = finished / "points" / point, tmp_path / "out/points" / point
        assert json.loads((two / "environment.json").read_text())["processes"] == 2
        alone, shared = (json.loads((folder / "result.json").read_text()) for folder in (one, two))
        assert shared["loss"] == pytest.approx(alone["loss"], rel=1e-4)
        assert shared["untrained_loss"] == pytest.approx(alone["untrained_loss"], rel=1e-5)
        reports = [json.loads((folder / "layer_report.json").read_text()) for folder in (one, two)]
        first, second = ([row["variance"] for row in report["layers"]] for report in reports)
        assert second == pytest.approx(first, rel=1e-3)
        losses = [[json.loads(line)["loss"] for line in (f / "log.jsonl").read_text().splitlines()] for f in (one, two)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_processes_that_cannot_share_a_step_evenly_are_refused(tmp_path: Path) -> None:
    from depthscope.sweep.runner import _require_even_shares

    points = list(expand(load_sweep(write_sweep(tmp_path))).points)
    _require_even_shares(points, 1)
    _require_even_shares(points, 4)
    for processes in (3, 8):
        with pytest.raises(SweepError, match=f"4 sequences, which {processes} processes cannot share evenly"):
            _require_even_shares(points, processes)
    micro = list(expand(load_sweep(write_sweep(tmp_path, training={"batch_tokens": 96, "micro_batch_size": 2}))).points)
    with pytest.raises(SweepError, match="in micro-batches of 2"):
        _require_even_shares(micro, 2)
