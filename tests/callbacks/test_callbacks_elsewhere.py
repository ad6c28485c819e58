"""The callbacks in trainers and with trackers that others wrote: TRL's, TensorBoard, trackio."""

import os
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

from commands import python
from depthscope.callbacks import VarianceCallback, read_history
from models import tiny_llama
from runs import trainer
from tiny_tokenizer import save_tokenizer

trl = pytest.importorskip("trl", reason="trl is not installed")

COMMON: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "max_steps": 4,
    "logging_steps": 2,
    "report_to": [],
    "use_cpu": True,
    "save_strategy": "no",
    "disable_tqdm": True,
}
TEXT = "The layers of a model pass on a stream."


@pytest.fixture
def model(tmp_path: Path) -> Any:
    """A tiny Llama that was loaded from a folder, as TRL may load it again; its tokenizer beside it."""
    tiny_llama(vocab_size=300).save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    return AutoModelForCausalLM.from_pretrained(tmp_path / "model")


@pytest.fixture
def tokenizer(model: Any) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path)
    tokenizer.pad_token = "</s>"
    return tokenizer


def supervised(model: Any, tokenizer: Any, folder: Path, callback: TrainerCallback) -> Any:
    data = Dataset.from_dict({"text": [TEXT, TEXT + TEXT] * 8})
    settings = trl.SFTConfig(str(folder), max_length=32, **COMMON)
    return trl.SFTTrainer(model, settings, train_dataset=data, processing_class=tokenizer, callbacks=[callback])


def packed(model: Any, tokenizer: Any, folder: Path, callback: TrainerCallback) -> Any:
    data = Dataset.from_dict({"text": [TEXT] * 64})
    settings = trl.SFTConfig(str(folder), max_length=24, packing=True, packing_strategy="wrapped", **COMMON)
    return trl.SFTTrainer(model, settings, train_dataset=data, processing_class=tokenizer, callbacks=[callback])


def preferences(model: Any, tokenizer: Any, folder: Path, callback: TrainerCallback) -> Any:
    data = Dataset.from_dict(
        {"prompt": ["The layers"] * 16, "chosen": [" pass on a stream."] * 16, "rejected": [" add nothing."] * 16}
    )
    settings = trl.DPOConfig(str(folder), max_length=32, **COMMON)
    return trl.DPOTrainer(model, args=settings, train_dataset=data, processing_class=tokenizer, callbacks=[callback])


def reinforcement(model: Any, tokenizer: Any, folder: Path, callback: TrainerCallback) -> Any:
    data = Dataset.from_dict({"prompt": ["The layers"] * 16})
    settings = trl.GRPOConfig(str(folder), max_completion_length=8, num_generations=2, **COMMON)
    return trl.GRPOTrainer(
        model,
        reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
        args=settings,
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=[callback],
    )


def rewards(model: Any, tokenizer: Any, folder: Path, callback: TrainerCallback) -> Any:
    reward_model = AutoModelForSequenceClassification.from_pretrained(model.config._name_or_path, num_labels=1)
    data = Dataset.from_dict({"chosen": [TEXT] * 16, "rejected": ["Layers add nothing."] * 16})
    settings = trl.RewardConfig(str(folder), max_length=64, **COMMON)
    return trl.RewardTrainer(
        reward_model, args=settings, train_dataset=data, processing_class=tokenizer, callbacks=[callback]
    )


@pytest.mark.parametrize("build", [supervised, packed, preferences, reinforcement, rewards])
def test_trl(build: Any, model: Any, tokenizer: Any, tmp_path: Path) -> None:
    run = build(model, tokenizer, tmp_path / "out", VarianceCallback())
    run.train()
    rows = read_history(tmp_path / "out")
    assert [row["step"] for row in rows] == [2, 4]
    assert all(row["tokens"] > 0 and None not in row["layers"]["variance"] for row in rows)
    logged = next(entry for entry in run.state.log_history if "loss" in entry)
    assert logged["layers/variance/3"] == rows[0]["layers"]["variance"][3]
    assert not any(module._forward_hooks for module in run.model.model.layers.modules())


def test_packing_counts_every_token(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    packed(model, tokenizer, tmp_path / "out", VarianceCallback()).train()
    assert read_history(tmp_path / "out")[0]["tokens"] == 2 * 2 * 24


def test_tensorboard_shows_the_layers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    os.environ["TENSORBOARD_LOGGING_DIR"] = str(tmp_path / "runs")
    try:
        trainer(tiny_llama(), tmp_path, [VarianceCallback()], report_to=["tensorboard"]).train()
    finally:
        del os.environ["TENSORBOARD_LOGGING_DIR"]
    events = EventAccumulator(str(tmp_path / "runs"))
    events.Reload()
    shown = [(event.step, event.value) for event in events.Scalars("train/layers/variance/2")]
    rows = read_history(tmp_path)
    assert shown == [(row["step"], pytest.approx(row["layers"]["variance"][2])) for row in rows]


def test_trackio_shows_the_layers(tmp_path: Path) -> None:
    pytest.importorskip("trackio", reason="trackio is not installed")
    code = """
import sys
from pathlib import Path
from depthscope.callbacks import VarianceCallback
from models import tiny_llama
from runs import trainer
trainer(tiny_llama(), Path(sys.argv[1]), [VarianceCallback()], report_to=["trackio"], run_name="run").train()
"""
    done = python("-c", code, tmp_path, TRACKIO_DIR=str(tmp_path / "trackio"))
    assert done.returncode == 0, done.stderr[-2000:]
    stored = ""
    for database in (tmp_path / "trackio").glob("*.db"):
        with sqlite3.connect(database) as connection:
            stored += str(connection.execute("SELECT metrics FROM metrics").fetchall())
    assert "layers/variance/2" in stored


def test_what_is_printed_stays_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trainer(tiny_llama(), tmp_path, [VarianceCallback()])
    run.train()
    printed = capsys.readouterr().out
    assert "'loss'" in printed
    assert "layers/" not in printed
    assert "layers/variance/2" in run.state.log_history[0]
