"""EffectivenessCallback: the scores of an analysis, at the right steps, within its time, unnoticed by the training."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from depthlm import tiny_depthlm
from depthscope import Blocks, LayerReport, analyze
from depthscope.callbacks import EffectivenessCallback, SparsityCallback, VarianceCallback, read_history
from depthscope.callbacks import effectiveness as module
from depthscope.errors import SettingsError
from models import random_blocks, tiny_llama
from runs import trainer

BLOCKS = random_blocks(4, 12)


def test_scores_are_those_of_an_analysis_of_the_weights_at_that_step(tmp_path: Path) -> None:
    model = tiny_llama()
    callback = EffectivenessCallback(BLOCKS, scores="skip,causal,usefulness", every=4, max_overhead=None)
    run = trainer(model, tmp_path, [callback], save_strategy="steps", save_steps=4)
    run.train()
    saved = type(model).from_pretrained(tmp_path / "checkpoint-4")
    expected = analyze(saved, blocks=BLOCKS, fit_blocks=2, eval_blocks=2, scores="skip,causal,usefulness")
    report = LayerReport.load(tmp_path / "layer_reports" / "step-4.json")
    for row, other in zip(report.layers, expected.layers, strict=True):
        for name in ("skip_ratio", "causal", "usefulness_ratio"):
            assert row[name] == (None if other[name] is None else pytest.approx(other[name], rel=1e-5))
    row = next(row for row in read_history(tmp_path) if row["step"] == 4)
    assert row["layers"]["skip_ratio"] == [layer["skip_ratio"] for layer in report.layers]
    assert row["values"]["causal"] == report.scores["causal"]
    logged = run.state.log_history[0]
    assert logged["layers/skip_ratio/2"] == row["layers"]["skip_ratio"][2]
    assert logged["layers/causal"] == row["values"]["causal"]
    assert not any(name.endswith("_se") for name in logged)


@pytest.mark.parametrize("kind", ["llama", "moe"])
@pytest.mark.parametrize(
    "settings", [{}, {"gradient_checkpointing": True, "bf16": True, "gradient_accumulation_steps": 2}], ids=str
)
def test_training_does_not_notice(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    weights = []
    for callbacks in ([], [EffectivenessCallback(BLOCKS, scores="all", every=1, max_overhead=None, probes=2)]):
        model = tiny_llama() if kind == "llama" else tiny_depthlm("moe", initializer_range=0.3)
        model.config.attention_dropout = 0.1  # so that random states matter
        trainer(model, tmp_path, callbacks, **{"max_steps": 3, "logging_steps": 1, **settings}).train()
        assert model.training
        weights.append(model.state_dict())
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())


def test_it_spaces_itself_out_to_stay_within_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is ours: a step takes 1 second, an analysis 3."""
    now = 0.0
    monkeypatch.setattr(module.time, "perf_counter", lambda: now)
    monkeypatch.setattr(module, "_estimate", lambda *_: 3.0)
    callback = EffectivenessCallback(BLOCKS, scores="block_influence", every=5, max_overhead=0.1)
    analyse = callback._analyse

    def slow(*args: Any) -> None:
        nonlocal now
        analyse(*args)
        now += 3.0
        callback.cost = 3.0

    monkeypatch.setattr(callback, "_analyse", slow)

    class Clock(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 10**4

        def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
            nonlocal now
            now += 0.25  # four rows per step
            return {"input_ids": BLOCKS[0], "labels": BLOCKS[0]}

    trainer(tiny_llama(), tmp_path, [callback], Clock(), max_steps=100, logging_steps=50).train()
    steps = [row["step"] for row in read_history(tmp_path) if row["kind"] == "effectiveness"]
    assert steps == [30, 60, 90]
    assert callback.spent <= 0.1 * callback.trained


def test_the_first_analysis_is_not_begun_where_its_estimate_is_over_the_budget(tmp_path: Path) -> None:
    callback = EffectivenessCallback(BLOCKS, scores="all", every=1, max_overhead=1e-6, probes=2)
    trainer(tiny_llama(), tmp_path, [callback]).train()
    assert not (tmp_path / "layer_reports").exists()


def test_an_analysis_that_takes_longer_than_estimated_ends_with_the_blocks_so_far(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock is ours: a step takes 10 seconds, and each block takes one in the last layer of an analysis."""
    now = 0.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    monkeypatch.setattr("time.monotonic", lambda: now)
    monkeypatch.setattr(module, "_estimate", lambda *_: 1.0)
    callback = EffectivenessCallback(random_blocks(40, 12), scores="skip", every=1, max_overhead=2.5)

    def later(seconds: float) -> None:
        nonlocal now
        now += seconds

    class Steps(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            later(10.0)

    model = tiny_llama()
    model.model.layers[-1].register_forward_hook(lambda layer, args, _: None if layer.training else later(len(args[0])))
    trainer(model, tmp_path, [callback, Steps()], max_steps=40, logging_steps=40).train()
    reports = [LayerReport.load(path) for path in (tmp_path / "layer_reports").glob("step-*.json")]
    first, *later_ones = sorted(reports, key=lambda report: report.data["eval_blocks"])
    assert first.budget is not None
    assert first.budget["stopped"] == "time"
    assert 2 <= first.data["eval_blocks"] < 40
    assert later_ones, "the others waited until there was time for all blocks"
    for report in later_ones:
        assert (report.data["eval_blocks"], report.budget, report.settings["budget"]) == (40, None, None)
        assert not any("budget" in note for note in report.notes)


def test_both_callbacks_share_one_history_without_sharing_names(tmp_path: Path) -> None:
    effectiveness = EffectivenessCallback(BLOCKS, scores="variance,update,skip", every=4, max_overhead=None)
    run = trainer(tiny_llama(), tmp_path, [effectiveness, VarianceCallback()])
    run.train()
    assert [row["kind"] for row in read_history(tmp_path)] == ["effectiveness", "variance"] * 2
    logged = run.state.log_history[0]
    assert logged["layers/variance/1"] != logged["layers/blocks_variance/1"]


def test_a_model_that_diverges_goes_on_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_llama()
    callback = EffectivenessCallback(BLOCKS, every=2, max_overhead=None)
    run = trainer(model, tmp_path, [callback])

    def poison(layer: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output * float("nan") if run.state.global_step >= 4 else output

    model.model.layers[1].register_forward_hook(poison)
    run.train()
    assert [row["step"] for row in read_history(tmp_path)] == [2]
    assert "Step 4 was not analysed" in caplog.text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"every": 0}, "every is 0"),
        ({"max_overhead": 0}, "max_overhead is 0"),
        ({"log": "all"}, "log is 'all'"),
        ({"scores": "luck"}, "unknown score 'luck'"),
        ({"probe": 3}, "probe: some of these"),
        ({"fit_blocks": 4}, "eval_blocks is 0"),
    ],
    ids=str,
)
def test_arguments_that_are_not_allowed(options: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        EffectivenessCallback(BLOCKS, **options)


def restored(callback: Any) -> Any:
    """The callback that a checkpoint gives back."""
    return type(callback).from_state(json.loads(json.dumps(callback.state())))


def test_a_restored_callback_measures_the_same_tokens() -> None:
    mask = torch.ones(4, 8, dtype=torch.long)
    mask[:, :3] = 0
    blocks = Blocks.from_ids(torch.randint(0, 100, (4, 8)), mask, special_ids=[5, 7], name="mine")
    again = restored(EffectivenessCallback(blocks, scores="skip"))
    assert (again.blocks.fingerprint, again.blocks.name) == (blocks.fingerprint, "mine")
    assert torch.equal(again.blocks.token_mask, blocks.token_mask)


def test_ids_whose_tokenizer_is_not_known_yet_stay_open_to_it() -> None:
    ids = torch.randint(0, 100, (4, 8))
    assert restored(EffectivenessCallback(ids, scores="skip"))._as_ids
    known = EffectivenessCallback(ids, scores="skip")
    known.blocks = Blocks.from_ids(ids, special_ids=[int(ids[0, 0])])  # as a Trainer's tokenizer says
    assert restored(known).blocks.special_ids == known.blocks.special_ids


@pytest.mark.parametrize(
    "callback",
    [
        VarianceCallback(every=3, sublayers=False, moments_every=7, log="summary", history=False),
        SparsityCallback(every=3, sequences=1, weights=False, log="none", history=False),
        EffectivenessCallback(
            random_blocks(4, 12), "usefulness", 9, None, 3, "none", False, ridge=0.1, bos="no", batch_size=2, seed=4
        ),
    ],
    ids=lambda callback: type(callback).__name__,
)
def test_every_argument_outlasts_a_checkpoint(callback: Any) -> None:
    arguments = set(inspect.signature(type(callback)).parameters) - {"options"}
    assert arguments <= set(callback.state()["args"])
    assert restored(callback).state() == callback.state()
