"""The command line under faults from outside: no room to write, odd terminals, absurd numbers, empty names."""

import io
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import pytest
from typer.testing import CliRunner

from depthscope import cli
from depthscope.cli import app
from depthscope.cli.analysis import deliver
from depthscope.errors import ReportError, SettingsError
from depthscope.report.report import LayerReport
from depthscope.settings import Settings
from models import tiny_llama
from permissions import without_permission
from reports import sample_report
from tiny_tokenizer import save_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny_llama(vocab_size=300).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture
def report(tmp_path: Path) -> Path:
    return sample_report(num_layers=4).save(tmp_path / "r.json")


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """The system lets no file grow beyond so many bytes, as it does on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def refused(arguments: list[object], *parts: str) -> str:
    run = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert run.exit_code == 2, run.output
    assert not isinstance(run.exception, Exception), run.exception
    said = " ".join(re.sub("[│╭╮╰╯─]", " ", run.stderr).split())
    for part in parts:
        assert part in said, said
    return said


# No permission


@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "."],
)
def test_a_model_that_may_not_be_read_is_not_called_damaged(model: Path, tmp_path: Path, name: str) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The layers of a model pass on a stream.\n" * 20)
    sizes = ["--fit-blocks", "1", "--eval-blocks", "1", "--block-size", "8", "--scores", "variance"]
    commands: list[list[object]] = [["analyze", model, "--text", text, *sizes]]
    if not name.startswith("tokenizer"):  # which the other does without
        commands += [["push", model, "--to", "me/it", "--dry-run", "--out", tmp_path / "out"]]
    with without_permission(model / name):
        for command in commands:
            said = refused(command, "ermission denied")
            for claim in ("damaged", "not valid", "not a whole", "etch", "o such file"):
                assert claim not in said, said


@pytest.mark.parametrize("mode", [0, 0o644, 0o311])
def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path, mode: int) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "layer_stats.jsonl").touch()
    with without_permission(folder, mode):
        refused(["analyze", folder], "'", "ermission denied")
        refused(["analyze", tmp_path, "--text", folder], "'")
        if mode != 0o311:  # then its files may be opened by their names
            refused(["show", folder], str(folder), "ermission denied")
            refused(["sweep", "report", folder], str(folder), "ermission denied")


# No room


@pytest.mark.parametrize("size", [1000, 30_000])
def test_a_conversion_without_room_leaves_nothing(model: Path, tmp_path: Path, size: int) -> None:
    with room_for(size):
        refused(["convert", model, tmp_path / "out", "--to", "depthlm"], "cannot write", "out", "choose a path")
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_without_room_for_all_its_files_changes_none(tmp_path: Path) -> None:
    recipe = ["recipe", "--layers", "4", "--width", "64", "--tokens", "2e6", "--vocab-size", "300", "--out"]
    with room_for(1000):
        refused([*recipe, tmp_path / "new"], "cannot write", "new")
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    before = {"config.json": "before", "recipe.md": "why"}
    for name, content in before.items():
        (tmp_path / "old" / name).write_text(content)
    with room_for(1000):
        refused([*recipe, tmp_path / "old"], "cannot write", "old")
    assert {path.name: path.read_text() for path in (tmp_path / "old").iterdir()} == before


def test_pages_and_a_space_without_room_leave_nothing(report: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with room_for(1000):
        refused(["show", report, "--html", tmp_path / "out" / "p.html"], "cannot write", "p.html", str(report))
        refused(["compare", report, report, "--html", tmp_path / "out" / "p.html"], "cannot write", "p.html")
        refused(["push-space", "--to", "me/mine", "--dry-run", tmp_path / "out" / "space"], "cannot write", "space")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_standard_output_without_room_ends_with_one_message(report: Path) -> None:
    with open("/dev/full", "w") as full:
        run = subprocess.run(
            [sys.executable, "-m", "depthscope", "show", report],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    assert run.returncode == 2
    assert "Error: cannot write the standard output: no space is left" in run.stderr
    assert len(run.stderr.strip().splitlines()) == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_measurements_that_cannot_be_printed_are_saved_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = sample_report(num_layers=4)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for out in (tmp_path / "r.json", None):
        full = open("/dev/full", "w")  # noqa: SIM115 - closing it fails
        with (
            redirect_stdout(full),
            pytest.raises(ReportError, match=r"standard output: no space .* are safe in") as caught,
        ):
            deliver(measured, out, None, quiet=False)
        with pytest.raises(OSError, match="space"):
            full.close()
        saved = Path(str(caught.value).rpartition(" ")[2].rstrip("."))
        assert LayerReport.load(saved) == measured


# Odd terminals


@pytest.mark.parametrize(
    ("columns", "width"), [("0", 80), ("-3", 80), ("", 80), ("²", 80), ("9" * 5000, 80), ("1", 40)]
)
def test_a_terminal_of_no_width_shows_what_one_of_a_usual_width_does(report: Path, columns: str, width: int) -> None:
    commands = [["show", report], ["compare", report, report], ["scores"]]
    if columns == "0":
        commands += [["presets"], ["sweep", "presets"]]
    for arguments in commands:
        odd, usual = (
            CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": value, "LINES": "0"})
            for value in (columns, str(width))
        )
        assert odd.exit_code == 0, odd.output
        assert odd.stdout == usual.stdout
        assert len(odd.stdout) > 200


def test_a_terminal_of_absurd_width_costs_nothing(report: Path) -> None:
    run = CliRunner().invoke(app, ["show", str(report)], env={"COLUMNS": "1000000000"})
    assert run.exit_code == 0
    assert max(map(len, run.stdout.splitlines())) <= 1000


def test_help_is_shown_on_a_terminal_of_no_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "0")
    monkeypatch.setattr(sys, "argv", ["depthscope", "show", "--help"])
    with redirect_stdout(io.StringIO()) as said, pytest.raises(SystemExit):
        cli.main()
    assert "--html" in said.getvalue()


# Absurd numbers


ABSURD = ["-1", "100000000000", str(2**64), "1" * 5000, "1e3", "nan", "x"]


@pytest.mark.parametrize("value", ABSURD)
def test_absurd_numbers_are_refused_before_the_model_is_looked_for(value: str) -> None:
    for command, options in {
        "analyze": ["--fit-blocks", "--eval-blocks", "--block-size", "--batch-size", "--probes", "--seed"],
        "sparsity": ["--blocks", "--block-size", "--seed"],
        "evaluate": ["--limit", "--shots", "--batch-size"],
    }.items():
        for option in options:
            if value == "100000000000" and option == "--seed":
                continue  # a seed like any other
            said = refused([command, "no/such-model", option, value])
            assert option.strip("-") in said.replace("_", "-"), said
            assert "no/such-model" not in said
    for option in ("--kv-heads", "--experts", "--top-k", "--layers"):
        refused(["convert", "no/such-model", "out", option, value])
    refused(["space", "--port", value if value != "100000000000" else "65536"], "--port")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-1", "1e400", "x"])
def test_numbers_that_are_not_finite_are_refused_before_the_model_is_looked_for(value: str) -> None:
    for option in ("--threshold", "--ridge", "--pairs", "--budget", "--precision"):
        said = refused(["analyze", "no/such-model", option, value], option.strip("-"))
        assert "no/such-model" not in said


@pytest.mark.parametrize(
    "name", ["fit_blocks", "eval_blocks", "block_size", "probes", "seed", "threshold", "ridge", "pairs"]
)
@pytest.mark.parametrize("value", [None, [], {}, True, 10**400, float("inf"), 2.5j])
def test_a_setting_that_is_no_number_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(SettingsError, match=rf"^{name} is "):
        Settings(**{name: value})


def test_the_largest_seed_is_one_that_a_report_holds() -> None:
    assert Settings(seed=2**63 - 1).seed == 2**63 - 1
    with pytest.raises(SettingsError, match=r"seed is .* at most 9,223,372,036,854,775,807"):
        Settings(seed=2**63)


# Empty names and texts


@pytest.mark.parametrize(
    "line",
    [
        ["show", ""],
        ["show", "r.json", "--html", ""],
        ["compare", "r.json", " "],
        ["analyze", "m", "--text", ""],
        ["analyze", "m", "--out", ""],
        ["evaluate", "m", "--data", ""],
        ["push", "", "--to", "me"],
        ["push", "r.json", "--to", "me", "--dry-run", "--out", ""],
        ["sweep", "report", ""],
        ["recipe", "--layers", "2", "--width", "64", "--tokens", "2e6", "--out", ""],
        ["push-space", "--to", "me/mine", "--dry-run", " "],
    ],
)
def test_an_empty_path_is_not_the_current_folder(
    line: list[str], report: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(report.parent)
    refused(list(line), "is blank; give a file or a folder")
    assert os.listdir() == ["r.json"]


@pytest.mark.parametrize("content", ["", " \n\t \n" * 400, "\ufeff", "\u3000\u00a0 \n" * 400])
def test_a_text_of_blanks_is_refused_and_never_replaced(model: Path, tmp_path: Path, content: str) -> None:
    text = tmp_path / "blank.txt"
    text.write_text(content)
    sizes = ["--fit-blocks", "1", "--eval-blocks", "1", "--block-size", "16"]
    said = refused(["analyze", model, "--text", text, *sizes], "blank.txt")
    assert "has only blanks" in said or "holds no text" in said


def test_a_model_on_this_machine_has_no_revisions(model: Path, tmp_path: Path) -> None:
    for command in (["analyze", model], ["sparsity", model], ["convert", model, tmp_path / "out"]):
        refused([*command, "--revision", "v1"], "on this machine", "'v1'")
