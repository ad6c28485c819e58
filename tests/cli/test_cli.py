"""The command line as a person meets it: run as a program, its output read, its exit codes checked."""

import errno
import json
import os
import pty
import select
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel
from typer.testing import CliRunner

from commands import depthscope, started
from depthscope.cli import app
from depthscope.errors import CorpusError
from depthscope.text.sources import find_source
from models import tiny_llama
from tiny_tokenizer import SENTENCES, save_tokenizer

SIZES = ["--fit-blocks", "2", "--eval-blocks", "2", "--block-size", "16"]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny_llama(vocab_size=300).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(SENTENCES * 40))
    return path


@pytest.mark.quick
def test_a_model_is_analysed_shown_and_compared(model_folder: Path, text: Path, tmp_path: Path) -> None:
    out, html = tmp_path / "r.json", tmp_path / "r.html"
    run = depthscope("analyze", model_folder, "--text", text, *SIZES, "--out", out, "--html", html)
    assert run.returncode == 0, run.stderr
    report = json.loads(out.read_text())
    assert [row["layer"] for row in report["layers"]] == [0, 1, 2, 3]
    assert report["model"]["name"] == "tiny-llama"
    assert report["data"]["block_size"] == 16
    assert {"usefulness", "causal", "permutation", "jacobian", "variance"} <= report["scores"].keys()
    assert "Effective depth" in run.stdout
    assert html.stat().st_size > 1_000_000

    shown = depthscope("show", out, "--html", tmp_path / "again.html")
    assert shown.returncode == 0
    assert "Effective depth" in shown.stdout
    assert (tmp_path / "again.html").read_bytes() == html.read_bytes()

    held = depthscope("compare", out, out)
    assert held.returncode == 0
    assert "causal" in held.stdout


def test_the_released_codes_way_is_named_in_the_report(model_folder: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    run = depthscope(
        "analyze",
        model_folder,
        "--text",
        text,
        *SIZES,
        "--scores",
        "usefulness",
        "--paper-code",
        "--out",
        out,
        "--quiet",
    )
    assert run.returncode == 0, run.stderr
    report = json.loads(out.read_text())
    assert report["settings"]["paper_code"] is True
    assert any("released code" in note for note in report["notes"])
    assert set(report["pairs"]) == set()


@pytest.mark.quick
def test_every_score_is_explained() -> None:
    run = depthscope("scores")
    assert run.returncode == 0
    for title in ("Variance", "Usefulness", "Causal", "Permutation", "Jacobian", "Effective depth"):
        assert title.lower() in run.stdout.lower()


def test_help_names_the_options() -> None:
    run = depthscope("analyze", "--help")
    for option in ("--text", "--dataset", "--fit-blocks", "--scores", "--paper-code", "--trust-remote-code", "--html"):
        assert option in run.stdout


def refused(run: subprocess.CompletedProcess[str], *parts: str) -> None:
    """One message on standard error, exit code 2, no traceback."""
    assert run.returncode == 2, run.stdout + run.stderr
    said = " ".join(run.stderr.split())
    assert "Traceback" not in said
    assert said.count("Error") >= 1
    for part in parts:
        assert part in said, said


def test_an_empty_text_is_refused(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    refused(depthscope("analyze", model_folder, "--text", tmp_path / "empty.txt", *SIZES), "empty.txt")


def test_a_text_shorter_than_asked_is_refused_with_the_numbers(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Too short.")
    run = depthscope("analyze", model_folder, "--text", tmp_path / "short.txt", *SIZES)
    refused(run, "64", "short.txt")


@pytest.mark.parametrize("blank", ["", "  "])
def test_a_blank_path_of_a_text_is_refused_and_not_the_folder_that_one_is_in(blank: str) -> None:
    run = CliRunner().invoke(app, ["analyze", "model", "--text", blank])
    assert run.exit_code == 2
    assert "is blank; give a file or a folder" in " ".join(run.output.replace("│", " ").split())
    with pytest.raises(CorpusError, match="the path of a text file"):
        find_source(blank)


def test_a_missing_text_is_refused(model_folder: Path) -> None:
    refused(depthscope("analyze", model_folder, "--text", "no-such-file.txt", *SIZES), "no-such-file.txt")


def test_nan_weights_are_refused(model_folder: Path, text: Path, tmp_path: Path) -> None:
    model = tiny_llama(vocab_size=300)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    save_tokenizer(tmp_path / "nan")
    refused(depthscope("analyze", tmp_path / "nan", "--text", text, *SIZES), "the output of layer 1 is not finite")


def test_an_encoder_only_model_is_refused(text: Path, tmp_path: Path) -> None:
    config = BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=300
    )
    BertModel(config).save_pretrained(tmp_path / "bert")
    save_tokenizer(tmp_path / "bert")
    refused(depthscope("analyze", tmp_path / "bert", "--text", text, *SIZES), "causal language model")


def test_a_folder_without_weights_is_refused(model_folder: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((model_folder / "config.json").read_bytes())
    refused(depthscope("analyze", tmp_path, "--text", text, *SIZES), "weights")


def test_a_folder_with_pickled_weights_only_is_refused(model_folder: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((model_folder / "config.json").read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    refused(depthscope("analyze", tmp_path, "--text", text, *SIZES), "pickle", "safetensors")


def test_a_wrong_id_is_refused(text: Path) -> None:
    refused(depthscope("analyze", "nobody/no such model", "--text", text, *SIZES), "nobody/no such model")


def test_no_network_is_said(text: Path) -> None:
    run = depthscope(
        "analyze", "nobody/model", "--text", text, *SIZES, HF_HUB_OFFLINE="0", HF_ENDPOINT="http://127.0.0.1:9"
    )
    refused(run, "nobody/model")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--scores", "depth"], ["unknown score 'depth'"]),
        (["--pairs", "many"], ["pairs is 'many'"]),
        (["--probes", "0"], ["probes is 0"]),
        (["--block-size", "100000"], ["100,000"]),
        (["--dtype", "float8"], ["float8"]),
        (["--device", "tpu"], ["tpu"]),
        (["--out", "no/such/folder/r.json"], ["no/such/folder", "does not exist"]),
        (["--dataset", "wikitext"], ["--text and --dataset"]),
    ],
)
def test_a_bad_option_is_refused(model_folder: Path, text: Path, options: list[str], parts: list[str]) -> None:
    refused(depthscope("analyze", model_folder, "--text", text, *SIZES, *options), *parts)


def test_a_full_disk_loses_no_measurement(model_folder: Path, text: Path, tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    run = depthscope(
        "analyze", model_folder, "--text", text, *SIZES, "--scores", "skip", "--out", "/dev/full", TMPDIR=str(tmp_path)
    )
    refused(run, "no space is left", "measurements are safe")
    (saved,) = tmp_path.glob("depthscope-*/report.json")
    assert json.loads(saved.read_text())["scores"]["skip_ratio"] > 0
    assert "Effective depth" in run.stdout


def test_a_damaged_report_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text('{"schema_version": 1')
    refused(depthscope("show", tmp_path / "r.json"), "r.json")
    refused(depthscope("compare", tmp_path / "r.json"), "at least two")


def test_ctrl_c_ends_with_one_message_and_no_file(model_folder: Path, text: Path, tmp_path: Path) -> None:
    """In a terminal, while the progress bar runs."""
    out = tmp_path / "r.json"
    sizes = ["--fit-blocks", "2", "--eval-blocks", "60", "--block-size", "16", "--probes", "exact", "--batch-size", "1"]
    controller, terminal = pty.openpty()
    words = ["-m", "depthscope", "analyze", model_folder, "--text", text, *sizes, "--out", out]
    process = started(*words, output=Path(os.ttyname(terminal)), session=True)
    said = _read_until(controller, "of 60", 120)
    assert "left" in said
    os.close(terminal)
    os.killpg(process.pid, signal.SIGINT)
    said += _read_until(controller, None, 60)
    assert process.wait(60) == 130
    assert "blocks had been measured" in said
    assert "Nothing was written" in said
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_ends_a_run_with_a_budget_with_what_was_measured(model_folder: Path, text: Path, tmp_path: Path) -> None:
    """In a terminal, once the ranking so far stands below the progress bar."""
    out = tmp_path / "r.json"
    sizes = ["--fit-blocks", "0", "--eval-blocks", "60", "--block-size", "16", "--probes", "exact", "--batch-size", "1"]
    chosen = ["--scores", "skip,jacobian", "--budget", "1h", "--out", out]
    controller, terminal = pty.openpty()
    words = ["-m", "depthscope", "analyze", model_folder, "--text", text, *sizes, *chosen]
    process = started(*words, output=Path(os.ttyname(terminal)), session=True)
    _read_until(controller, "costliest to skip", 120)
    os.close(terminal)
    os.killpg(process.pid, signal.SIGINT)
    said = _read_until(controller, None, 60)
    assert process.wait(60) == 0
    assert "budget: a budget of 60 minutes" in said
    report = json.loads(out.read_text())
    assert report["budget"]["stopped"] == "interrupt"
    assert report["settings"]["scores"] == ["skip"]
    assert 2 <= report["data"]["eval_blocks"] <= 60
    assert report["scores"]["skip_ratio_se"] > 0


def _read_until(controller: int, wanted: str | None, seconds: float) -> str:
    """Read a terminal until a text appears, or to the end."""
    said, deadline = "", time.monotonic() + seconds
    while time.monotonic() < deadline and (wanted is None or wanted not in said):
        ready, _, _ = select.select([controller], [], [], 1)
        if ready:
            try:
                part = os.read(controller, 4096)
            except OSError as error:
                if error.errno == errno.EIO:  # how Linux tells the end of a terminal
                    break
                raise
            if not part:
                break
            said += part.decode(errors="replace")
    assert wanted is None or wanted in said, said
    return said
