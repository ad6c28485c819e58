"""`depthscope prune`: a table, a plan, and a smaller model that plain transformers loads."""

import re
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

from depthscope.cli import app
from depthscope.report.cut_plan import CutPlan
from models import tiny_llama
from tiny_tokenizer import save_tokenizer

SIZES = ["--fit-blocks", "4", "--choose-blocks", "2", "--eval-blocks", "2", "--block-size", "16"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny_llama(vocab_size=300).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("".join(f"Layer {n} passes on a stream, and layer {n * n} adds to it.\n" for n in range(120)))
    return file


def prune(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["prune", *map(str, arguments)])


def test_layers_are_planned_cut_repaired_and_saved(model: Path, text: Path, tmp_path: Path) -> None:
    run = prune(model, "--text", text, "--layers", 2, "--by", "greedy", "--out", tmp_path / "small", *SIZES)
    assert run.exit_code == 0, run.output
    assert "chosen by greedy; losses in nats per token" in run.stdout
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert small.config.num_hidden_layers == 2
    assert AutoTokenizer.from_pretrained(tmp_path / "small")
    plan = CutPlan.load(tmp_path / "small" / "cut_plan.json")
    assert small.config.kept_layers == plan.kept(2)
    rows = [line.split() for line in run.stdout.splitlines() if re.match(r" *[012] ", line)]
    assert [row[0] for row in rows] == ["0", "1", "2"]
    assert f"{plan.loss:.2f}" in rows[0][1]


def test_a_plan_alone_cuts_nothing_and_is_carried_out_later_as_far_as_asked(
    model: Path, text: Path, tmp_path: Path
) -> None:
    common = [model, "--text", text]
    made = prune(*common, "--layers", 2, "--by", "skip", "--plan-only", tmp_path / "plan.json", *SIZES)
    assert made.exit_code == 0, made.output
    assert list(tmp_path.iterdir()) == [tmp_path / "plan.json"]
    run = prune(*common, "--plan", tmp_path / "plan.json", "--layers", 1, "--out", tmp_path / "small", "--quiet")
    assert run.exit_code == 0, run.output
    kept = CutPlan.load(tmp_path / "plan.json").kept(1)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "small").config.kept_layers == kept


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", 1], "Give --out FOLDER"),
        (["--layers", 1, "--out", "a", "--plan-only", "b"], "Give --out FOLDER"),
        (["--layers", 4, "--out", "small"], "has 4, and one has to stay"),
        (["--out", "small"], "Say how far to cut"),
        (["--layers", 1, "--by", "luck", "--out", "small"], "by is 'luck'"),
        (["--layers", 1, "--repair", "glue", "--out", "small"], "repair is 'glue'"),
        (["--layers", 1, "--eval-blocks", 4000, "--out", "small"], "tokens"),
    ],
)
def test_what_cannot_be_done_is_one_message_and_nothing_is_written(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[object], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    run = prune(model, "--text", text, *SIZES, *arguments)
    assert run.exit_code == 2, run.output
    assert message in " ".join(re.sub("[│╭╮╰╯─]", " ", run.stderr).split())
    assert not list(tmp_path.iterdir())
