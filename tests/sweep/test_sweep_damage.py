"""What a sweep makes of damage from outside: files that were cut, overwritten or deleted between two runs."""

import contextlib
import io
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from depthscope.cli import app
from depthscope.errors import SweepError
from depthscope.files.atomic import _new_file, remove_leftovers
from depthscope.report.accuracy import Accuracy
from depthscope.report.report import LayerReport
from depthscope.runs.finished_files import report_checksum
from depthscope.sweep import point as point_module
from depthscope.sweep import token_stream
from depthscope.sweep.data import open_corpus, prepare_corpus
from depthscope.sweep.grid import expand
from depthscope.sweep.report.page import write_report
from depthscope.sweep.report.results import load_results
from depthscope.sweep.report.words import status_lines
from depthscope.sweep.runner import run_sweep
from depthscope.sweep.specification import load_sweep
from depthscope.sweep.token_stream import TokenStream
from permissions import without_permission
from sweeps import reported, weights, write_sweep

POINT = "depth-L2-seed0"


def depthscope(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200", "NO_COLOR": "1"})


def run_command(folder: Path, out: Path) -> list[object]:
    return ["sweep", "run", folder / "tiny.yaml", "--out", out, "--only", "depth-L2", "--jobs", "1"]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def zeroed(path: Path) -> None:
    path.write_bytes(b"\0" * path.stat().st_size)


def flipped(path: Path) -> None:
    """One bit in the middle, which no format notices."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0\0")


def gone(path: Path) -> None:
    path.unlink()


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


def nothing_in_it(path: Path) -> None:
    path.write_text("{}")


Damage = Callable[[Path], None]


# -------------------------------------------------------------------------------------------------------- the tokens


@pytest.fixture(scope="module")
def tokenized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sweep whose text is tokenized, and of which nothing is trained."""
    folder = tmp_path_factory.mktemp("tokenized")
    sweep = load_sweep(write_sweep(folder))
    prepare_corpus(sweep, expand(sweep), folder / "out")
    return folder


@pytest.mark.parametrize(
    ("name", "damages"),
    [
        ("train.bin", (cut, emptied, zeroed, flipped, longer, gone, folder_instead)),
        ("held_out.bin", (cut, emptied, flipped, gone)),
        ("tokenizer/tokenizer.json", (cut, flipped, gone)),
        ("tokenizer/tokenizer_config.json", (cut, flipped, gone)),
        ("data.json", (cut, emptied, zeroed, flipped, gone, folder_instead)),
    ],
)
def test_a_sweep_trains_nothing_on_damaged_tokens_and_says_which_file_and_what_to_do(
    tokenized: Path, tmp_path: Path, name: str, damages: tuple[Damage, ...]
) -> None:
    for index, damage in enumerate(damages):
        out = Path(shutil.copytree(tokenized / "out", tmp_path / str(index)))
        damage(out / "data" / name)
        shown = depthscope("sweep", "run", tokenized / "tiny.yaml", "--out", out, "--jobs", "1")
        assert shown.exit_code == 2, (damage, shown.output)
        assert Path(name).parts[0] in shown.output
        assert f"Delete the folder {out / 'data'} to tokenize the text again" in shown.output
        assert "Traceback" not in shown.output
        assert list((out / "points").glob("*")) == []


@pytest.mark.parametrize("change", [{"dtype": "uint32"}, {"dtype": "object"}, {"needed": 3}, {"name": None}])
def test_a_record_of_the_tokens_that_somebody_changed_is_refused(
    tokenized: Path, tmp_path: Path, change: dict[str, object]
) -> None:
    shutil.copytree(tokenized / "out", tmp_path / "out")
    record = tmp_path / "out" / "data" / "data.json"
    content = json.loads(record.read_text()) | change
    for kept in (content, {key: value for key, value in content.items() if key != "check"}):  # as of an older version
        record.write_text(json.dumps(kept))
        with pytest.raises(SweepError, match=r"Delete the folder .*/out/data"):
            open_corpus(tmp_path / "out", 16)


def test_tokens_of_an_older_version_are_read_and_their_damage_is_found(tokenized: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(tokenized / "out", tmp_path / "out"))
    record = out / "data" / "data.json"
    content = json.loads(record.read_text())
    record.write_text(
        json.dumps({k: v for k, v in content.items() if k not in ("check", "train_fingerprint", "tokenizer")})
    )
    sweep = load_sweep(tokenized / "tiny.yaml")
    assert prepare_corpus(sweep, expand(sweep), out).fingerprint == content["fingerprint"]
    flipped(out / "data" / "held_out.bin")
    with pytest.raises(SweepError, match=r"train\.bin or held_out\.bin is damaged"):
        prepare_corpus(sweep, expand(sweep), out)


@pytest.mark.parametrize("damage", [cut, flipped, gone])
@pytest.mark.parametrize("name", ["train.bin", "tokenizer/tokenizer.json", "state.json", "the text"])
def test_tokenizing_does_not_go_on_from_what_is_damaged_or_of_a_text_that_has_changed(
    tokenized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, damage: Damage
) -> None:
    monkeypatch.setattr(token_stream, "BATCH_CHARACTERS", 1000)
    append, calls = TokenStream._append, iter(range(100))

    def dying(*args: object) -> None:
        append(*args)  # type: ignore[arg-type]
        if next(calls) == 2:
            raise KeyboardInterrupt

    sweep = load_sweep(write_sweep(tmp_path, training={"tokens": 6000}))
    said: list[str] = []
    monkeypatch.setattr(TokenStream, "_append", dying)
    with pytest.raises(KeyboardInterrupt):
        prepare_corpus(sweep, expand(sweep), tmp_path / "out")
    monkeypatch.setattr(TokenStream, "_append", append)
    damage(tmp_path / "text" / "000.txt" if name == "the text" else tmp_path / "out" / "data.part" / name)
    prepare_corpus(sweep, expand(sweep), tmp_path / "out", said.append)
    prepare_corpus(sweep, expand(sweep), tmp_path / "whole")
    for file in ("train.bin", "held_out.bin", "data.json", "tokenizer/tokenizer.json"):
        assert (tmp_path / "out/data" / file).read_bytes() == (tmp_path / "whole/data" / file).read_bytes()
    assert name == "state.json" or [line for line in said if "so tokenizing starts again" in line]


def test_a_point_is_not_gone_on_with_on_other_tokens(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    interrupt(10, tmp_path, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "data")
    changed = tmp_path / "text" / "000.txt"
    changed.write_text("other words than " + changed.read_text())
    shown = depthscope("sweep", "run", tmp_path / "tiny.yaml", "--out", tmp_path / "out", "--jobs", "1")
    assert shown.exit_code == 2
    assert "the text has changed, the fingerprint of its tokens was" in shown.output
    assert "delete its folder to train it again" in shown.output


# ------------------------------------------------------------------------------------------ checkpoints and models


def interrupt(at: int, folder: Path, out: Path) -> None:
    """Run the first point of a sweep, and interrupt it after a step."""
    end = point_module._Watch.on_step_end

    def interrupted(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        end(self, args, state, control, **kwargs)
        if state.global_step == at:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(point_module._Watch, "on_step_end", interrupted)
        with pytest.raises(KeyboardInterrupt):
            go_on(folder, out)


def go_on(folder: Path, out: Path) -> str:
    """Run what is left of the first point, and return what was said."""
    sweep = load_sweep(folder / "tiny.yaml")
    with contextlib.redirect_stderr(io.StringIO()) as said:
        run_sweep(sweep, out, only=("depth-L2",), jobs=1)
    return said.getvalue()


@pytest.fixture(scope="module")
def undisturbed(tokenized: Path) -> Path:
    """The folder of a sweep of one point that nothing happened to, with its report."""
    out = Path(shutil.copytree(tokenized / "out", tokenized / "undisturbed"))
    go_on(tokenized, out)
    write_report(out)
    return out


@pytest.fixture(scope="module")
def interrupted(tokenized: Path) -> Path:
    """The same, interrupted at step 10, with checkpoints of steps 4 and 8."""
    out = Path(shutil.copytree(tokenized / "out", tokenized / "interrupted"))
    interrupt(10, tokenized, out)
    found = {path.name for path in (out / "points" / POINT).glob("checkpoint-*")}
    assert found == {"checkpoint-4", "checkpoint-8"}
    return out


def assert_as_undisturbed(out: Path, undisturbed: Path) -> None:
    """Compare all that a report is made of."""
    here, there = (folder / "points" / POINT for folder in (out, undisturbed))
    for name in ("result.json", "log.jsonl", "layer_stats.jsonl"):
        assert (here / name).read_bytes() == (there / name).read_bytes(), name
    for name in ("layer_report.json", "untrained_report.json"):
        assert report_checksum(LayerReport.load(here / name)) == report_checksum(
            LayerReport.load(there / name).model_copy(update={"created": LayerReport.load(here / name).created})
        )
    assert weights(here / "model") == weights(there / "model")
    assert list(here.glob("checkpoint-*")) == []


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", cut),
        ("model.safetensors", flipped),
        ("optimizer.pt", emptied),
        ("optimizer.pt", flipped),
        ("scheduler.pt", zeroed),
        ("rng_state.pth", flipped),
        ("trainer_state.json", gone),
        ("complete", zeroed),
    ],
)
def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before_and_nothing_else(
    tokenized: Path, undisturbed: Path, interrupted: Path, tmp_path: Path, name: str, damage: Damage
) -> None:
    out = Path(shutil.copytree(interrupted, tmp_path / "out"))
    damage(out / "points" / POINT / "checkpoint-8" / name)
    said = go_on(tokenized, out)
    assert f"{POINT}: checkpoint-8 is damaged ({name}); the training resumes from checkpoint-4" in said
    assert_as_undisturbed(out, undisturbed)


def test_the_history_of_a_training_goes_on_from_the_checkpoint_too(
    tokenized: Path, undisturbed: Path, interrupted: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(interrupted, tmp_path / "out"))
    flipped(out / "points" / POINT / "layer_stats.jsonl")
    go_on(tokenized, out)
    assert_as_undisturbed(out, undisturbed)


def test_where_every_checkpoint_is_damaged_the_training_begins_anew(
    tokenized: Path, undisturbed: Path, interrupted: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(interrupted, tmp_path / "out"))
    for step, name in ((4, "optimizer.pt"), (8, "trainer_state.json")):
        emptied(out / "points" / POINT / f"checkpoint-{step}" / name)
    assert "checkpoint-4 is damaged (optimizer.pt); the training starts again" in go_on(tokenized, out)
    assert_as_undisturbed(out, undisturbed)


@pytest.mark.parametrize("damages", [{}, {"optimizer.pt": cut}, {"scheduler.pt": gone}, {"model.safetensors": cut}])
def test_checkpoints_of_an_older_version_are_gone_on_from_where_they_can_be_read(
    tokenized: Path, undisturbed: Path, interrupted: Path, tmp_path: Path, damages: dict[str, Damage]
) -> None:
    out = Path(shutil.copytree(interrupted, tmp_path / "out"))
    for checkpoint in (out / "points" / POINT).glob("checkpoint-*"):
        emptied(checkpoint / "complete")  # it was an empty file
    for name, damage in damages.items():
        damage(out / "points" / POINT / "checkpoint-8" / name)
    said = go_on(tokenized, out)
    assert ("checkpoint-8 is damaged" in said) == bool(damages)
    assert "starts again" not in said
    assert_as_undisturbed(out, undisturbed)


@pytest.mark.parametrize(
    ("name", "damage"),
    [("model.safetensors", cut), ("model.safetensors", flipped), ("config.json", gone)],
)
def test_a_damaged_model_is_trained_again_when_it_is_measured(
    tokenized: Path, undisturbed: Path, tmp_path: Path, name: str, damage: Damage
) -> None:
    out = Path(shutil.copytree(undisturbed, tmp_path / "out"))
    point_module.forget_measurements(out / "points" / POINT)
    damage(out / "points" / POINT / "model" / name)
    said = go_on(tokenized, out)
    assert f"{POINT}: the trained model is damaged (model/{name}), and is trained again" in said
    assert_as_undisturbed(out, undisturbed)


def test_a_model_that_is_damaged_before_it_is_measured_is_made_from_the_last_checkpoint(
    tokenized: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copytree(tokenized / "out", tmp_path / "out"))
    with monkeypatch.context() as patched:
        patched.setattr(point_module.PointRun, "_measure", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            go_on(tokenized, out)
    cut(out / "points" / POINT / "model" / "model.safetensors")
    steps: list[int] = []
    end = point_module._Watch.on_step_end

    def counted(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        steps.append(state.global_step)
        end(self, args, state, control, **kwargs)

    monkeypatch.setattr(point_module._Watch, "on_step_end", counted)
    assert "the trained model is damaged" in go_on(tokenized, out)
    assert steps == []
    assert_as_undisturbed(out, undisturbed)


@pytest.mark.parametrize("damage", [cut, flipped])
def test_a_report_that_was_damaged_before_the_point_was_finished_is_measured_anew(
    tokenized: Path, undisturbed: Path, tmp_path: Path, damage: Damage
) -> None:
    out = Path(shutil.copytree(undisturbed, tmp_path / "out"))
    (out / "points" / POINT / "result.json").unlink()
    damage(out / "points" / POINT / "untrained_report.json")
    assert "untrained_report.json is damaged and is measured again" in go_on(tokenized, out)
    assert_as_undisturbed(out, undisturbed)


@pytest.mark.parametrize("name", ["train.bin", "held_out.bin", "tokenizer/tokenizer.json", "data.json", "."])
def test_tokens_that_may_not_be_read_are_not_called_damaged(tokenized: Path, tmp_path: Path, name: str) -> None:
    out = Path(shutil.copytree(tokenized / "out", tmp_path / "out"))
    with without_permission(out / "data" / name):
        shown = depthscope(*run_command(tokenized, out))
    assert shown.exit_code == 2, shown.output
    assert "permission denied" in shown.output
    assert "damaged" not in shown.output
    assert "Delete" not in shown.output


def test_tokenizing_that_may_not_be_read_is_not_begun_anew(tokenized: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(tokenized / "out" / "data", out / "data.part")
    with without_permission(out / "data.part" / "data.json"):
        assert "permission denied" in depthscope(*run_command(tokenized, out)).output
    assert (out / "data.part" / "train.bin").is_file()


@pytest.mark.parametrize("name", ["checkpoint-8/model.safetensors", "checkpoint-8/complete", "checkpoint-8"])
def test_a_checkpoint_that_may_not_be_read_is_kept_and_gone_on_from_once_it_may(
    tokenized: Path, undisturbed: Path, interrupted: Path, tmp_path: Path, name: str
) -> None:
    out = Path(shutil.copytree(interrupted, tmp_path / "out"))
    with without_permission(out / "points" / POINT / name):
        shown = depthscope(*run_command(tokenized, out))
    assert shown.exit_code == 1, shown.output
    assert f"{name} cannot be read" in shown.output or f"{name}/complete cannot be read" in shown.output
    assert "damaged" not in shown.output
    assert {"checkpoint-4", "checkpoint-8"} <= {path.name for path in (out / "points" / POINT).iterdir()}
    assert "damaged" not in go_on(tokenized, out)
    assert_as_undisturbed(out, undisturbed)


@pytest.mark.parametrize(
    "name", ["model/model.safetensors", "model/config.json", "model", "checksums.json", "layer_report.json"]
)
def test_what_is_finished_and_may_not_be_read_is_kept(
    tokenized: Path, undisturbed: Path, tmp_path: Path, name: str
) -> None:
    out = Path(shutil.copytree(undisturbed, tmp_path / "out"))
    point = out / "points" / POINT
    (point / "result.json").unlink()
    before = {path: path.read_bytes() for path in point.rglob("*") if path.is_file() and path.name != "point.json"}
    with without_permission(point / name):
        shown = depthscope(*run_command(tokenized, out))
    assert shown.exit_code == 1, shown.output
    assert "damaged" not in shown.output
    assert {path: path.read_bytes() for path in before} == before


def test_a_point_that_can_neither_run_nor_be_recorded_costs_the_others_nothing(
    tokenized: Path, interrupted: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(interrupted, tmp_path / "out"))
    with without_permission(out / "points" / POINT, 0o555):
        shown = depthscope(*run_command(tokenized, out))
    assert shown.exit_code == 1, shown.output
    assert "permission denied" in shown.output
    assert f"{POINT}: failed (1 of 1)" in shown.output


# ----------------------------------------------------------------------------------------- results and reports


@pytest.mark.parametrize(
    ("name", "damages"),
    [
        ("result.json", (cut, flipped, zeroed, emptied, nothing_in_it)),
        ("point.json", (cut, flipped, emptied, nothing_in_it)),
        ("layer_report.json", (cut, flipped, gone, folder_instead)),
        ("untrained_report.json", (cut, flipped, gone)),
    ],
)
def test_a_point_that_cannot_be_read_is_named_the_rest_is_reported_and_the_exit_code_says_so(
    tokenized: Path, undisturbed: Path, tmp_path: Path, name: str, damages: tuple[Damage, ...]
) -> None:
    for index, damage in enumerate(damages):
        out = Path(shutil.copytree(undisturbed, tmp_path / str(index)))
        damage(out / "points" / POINT / name)
        results = load_results(out)
        assert results.is_damaged
        assert (results.points[0].status, name in results.points[0].reason) == ("unreadable", True)
    before = {path: path.stat().st_mtime_ns for path in (out / "points").rglob("*")}
    for command in (run_command(tokenized, out), ["sweep", "report", out]):
        shutil.rmtree(out / "report")
        shown = depthscope(*command)
        assert shown.exit_code == 1, shown.output
        assert f"Unreadable: {POINT}. " in shown.output
        assert f"Unreadable: {POINT}. " in (out / "report" / "sweep.html").read_text()
    assert {path: path.stat().st_mtime_ns for path in (out / "points").rglob("*")} == before


@pytest.mark.parametrize(
    ("name", "damages"),
    [
        ("log.jsonl", (cut, flipped, gone)),
        ("environment.json", (cut, flipped)),
        ("checksums.json", (cut, flipped)),
        ("layer_stats.jsonl", (emptied, flipped, gone, cut)),
    ],
)
def test_damage_beside_the_scores_is_noted_and_the_scores_are_shown(
    undisturbed: Path, tmp_path: Path, name: str, damages: tuple[Damage, ...]
) -> None:
    whole = load_results(undisturbed)
    for index, damage in enumerate(damages):
        out = Path(shutil.copytree(undisturbed, tmp_path / str(index)))
        damage(out / "points" / POINT / name)
        results = load_results(out)
        assert results.is_damaged
        assert [f"Damaged: {POINT}. {name} " in line for line in status_lines(results)] == [False, False, True]
        assert results.points[0].numbers == whole.points[0].numbers
    assert not whole.is_damaged


@pytest.mark.parametrize("name", ["log.jsonl", "layer_stats.jsonl", "environment.json", "checksums.json"])
def test_what_may_not_be_read_beside_the_scores_is_no_reason_to_delete_anything(undisturbed: Path, name: str) -> None:
    whole = load_results(undisturbed)
    with without_permission(undisturbed / "points" / POINT / name):
        results = load_results(undisturbed)
    assert results.is_damaged
    assert results.points[0].numbers == whole.points[0].numbers
    assert f"Not read: {POINT}. " in status_lines(results)[-1]
    assert "elete" not in status_lines(results)[-1]


@pytest.mark.parametrize("name", ["result.json", "layer_report.json", "."])
def test_a_point_that_may_not_be_read_is_named_and_not_to_be_deleted(undisturbed: Path, name: str) -> None:
    with without_permission(undisturbed / "points" / POINT / name):
        results = load_results(undisturbed)
    assert [point.status for point in results.points] == ["unreadable", "not run"]
    line = next(line for line in status_lines(results) if line.startswith(f"Unreadable: {POINT}. "))
    assert "permission denied" in line
    assert "elete" not in line


def test_damage_beside_the_scores_is_on_the_page_and_in_the_exit_code(
    tokenized: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(undisturbed, tmp_path / "out"))
    cut(out / "points" / POINT / "layer_stats.jsonl")
    for command in (run_command(tokenized, out), ["sweep", "report", out]):
        shutil.rmtree(out / "report")
        shown = depthscope(*command)
        assert shown.exit_code == 1, shown.output
        assert f"Damaged: {POINT}. layer_stats.jsonl is " in shown.output
        assert f"Damaged: {POINT}. layer_stats.jsonl is " in (out / "report" / "sweep.html").read_text()


def test_a_file_in_the_place_of_a_point_is_named(tokenized: Path, undisturbed: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(undisturbed, tmp_path / "out"))
    shutil.rmtree(out / "points" / POINT)
    (out / "points" / POINT).write_text("")
    shown = depthscope(*run_command(tokenized, out))
    assert shown.exit_code == 1, shown.output
    assert f"{out / 'points' / POINT} is not the folder of a point." in shown.output
    assert f"Unreadable: {POINT}. " in (out / "report" / "tables.md").read_text()


def test_accuracies_that_are_added_to_a_report_are_no_damage(undisturbed: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(undisturbed, tmp_path / "out"))
    path = out / "points" / POINT / "layer_report.json"
    report = LayerReport.load(path)
    row = Accuracy(task="a", metric="acc", value=0.5, n=3, shots=0)
    report.model_copy(update={"downstream": [row], "versions": {**report.versions, "lm-eval": "1"}}).save(path)
    assert not load_results(out).is_damaged


def test_temporary_files_of_killed_writers_are_removed_and_those_of_others_stay(
    tokenized: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(undisturbed, tmp_path / "out"))
    places = (out, out / "data", out / "points" / POINT, out / "report")
    for place in places:
        (place / ".depthscope-0123456789ab.tmp").write_text("half a pa")
    descriptor, at_work = _new_file(out / "report")
    try:
        write_report(out)
        assert {path.name for path in (out / "report").glob(".*")} == {at_work.name}
    finally:
        os.close(descriptor)
    remove_leftovers(out / "report")
    go_on(tokenized, out)
    assert [path for place in places for path in place.glob(".*.tmp")] == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the writer is forked, and killed")
def test_a_report_that_is_killed_leaves_nothing_after_the_next_one(undisturbed: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(undisturbed, tmp_path / "out"))
    for _ in range(2):
        pid = os.fork()
        if pid == 0:
            os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
            write_report(out)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        assert len(list((out / "report").glob(".*.tmp"))) == 1  # and they do not pile up
    write_report(out)
    assert sorted(path.name for path in (out / "report").iterdir()) == sorted(reported(undisturbed))
