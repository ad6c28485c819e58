"""An attention that does not run here is no reason to refuse a model: another one computes the same."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from typer.main import get_command
from typer.testing import CliRunner

from depthscope import analyze
from depthscope.cli import app
from depthscope.errors import ModelLoadError, SettingsError
from depthscope.loading.attn_implementation import require_attn_implementation
from depthscope.loading.load import load_model
from models import random_blocks, tiny_llama

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_llama(2).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def name_attention(folder: Path, name: Any, key: str = "attn_implementation") -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: name}))


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("flash_attention_2", "does not run on a CPU"),
        ("flash_attention_3", "does not run on a CPU"),
        ({"": "flash_attention_2"}, "does not run on a CPU"),
        ("flex_attention", "has no derivatives on a CPU"),
        ("paged|eager", "serves many requests"),
        ("someone/kernel", "is code from another repository"),
    ],
)
def test_another_attention_is_taken_and_said(name: Any, why: str, key: str, folder: Path) -> None:
    name_attention(folder, name, key)
    loaded = load_model(str(folder), device="cpu")
    assert why in loaded.notes[0]
    ids = random_blocks(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(ids).logits, tiny_llama(2)(ids).logits)


def test_the_report_says_which_attention_was_not_taken(folder: Path) -> None:
    name_attention(folder, "flash_attention_2")
    how = {"blocks": random_blocks(2, 9), "fit_blocks": 0, "eval_blocks": 2, "scores": "skip", "progress": False}
    report = analyze(folder, device="cpu", **how)
    assert "'flash_attention_2', which does not run on a CPU" in report.notes[0]
    assert not analyze(folder, device="cpu", attn_implementation="eager", **how).notes


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_the_attention_that_was_asked_for_is_taken(name: str, folder: Path) -> None:
    name_attention(folder, "nonsense")
    loaded = load_model(str(folder), device="cpu", attn_implementation=name)
    assert loaded.model.config._attn_implementation == name
    assert not loaded.notes


def test_an_attention_that_the_user_has_registered_can_be_asked_for(folder: Path) -> None:
    AttentionInterface.register("mine", sdpa_attention_forward)
    try:
        assert load_model(str(folder), attn_implementation="mine").model.config._attn_implementation == "mine"
    finally:
        del AttentionInterface._global_mapping["mine"]


def test_what_is_no_attention_is_refused_with_what_there_is(folder: Path) -> None:
    with pytest.raises(
        SettingsError, match=r"'nonsense' is not an attention implementation; choose from eager, .*sdpa"
    ):
        load_model(str(folder), attn_implementation="nonsense")
    with pytest.raises(ModelLoadError, match=r"'flash_attention_2' does not run on a CPU. Choose from eager, sdpa"):
        load_model(str(folder), device="cpu", attn_implementation="flash_attention_2")
    name_attention(folder, "nonsense")
    with pytest.raises(ModelLoadError, match="--attn-implementation"):
        load_model(str(folder), device="cpu")


def test_flash_attention_computes_in_half_precision_only() -> None:
    with pytest.raises(ModelLoadError, match="half precision only"):
        require_attn_implementation("flash_attention_2", torch.device("cuda"), torch.float32)


@pytest.mark.parametrize("command", ["analyze", "sparsity", "convert", "prune"])
def test_what_is_no_attention_ends_a_command(command: str, folder: Path) -> None:
    out = {"convert": [str(folder.parent / "out")], "prune": ["--layers", "1", "--out", str(folder.parent / "out")]}
    told = CliRunner().invoke(app, [command, str(folder), *out.get(command, []), "--attn-implementation", "nonsense"])
    assert told.exit_code == 2
    assert "is not an attention implementation" in " ".join(told.output.split())


def test_every_command_that_loads_a_model_has_the_option() -> None:
    commands = get_command(app).commands
    takes = {name for name, command in commands.items() if "attn_implementation" in {p.name for p in command.params}}
    assert takes == {"analyze", "sparsity", "evaluate", "convert", "prune"}
