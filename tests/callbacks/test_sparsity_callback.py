"""SparsityCallback: the same numbers as an analysis gives, in training, at its own pace, unnoticed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from depthlm import tiny_depthlm
from depthscope import analyze
from depthscope.callbacks import SparsityCallback, VarianceCallback, read_history
from depthscope.errors import SettingsError
from depthscope.scores.attention_sparsity import ATTENTION_METRICS
from depthscope.scores.expert_load import EXPERT_METRICS
from depthscope.scores.weight_sparsity import WEIGHT_METRICS, weight_sparsity
from models import tiny_llama
from runs import Sentences, trainer

SORTS = {"llama": tiny_llama, "moe": lambda: tiny_depthlm("moe_shared", initializer_range=0.3)}


def test_weights_are_those_at_the_log(tmp_path: Path) -> None:
    model = tiny_llama()
    trainer(model, tmp_path, [SparsityCallback(every=4)], max_steps=8, logging_steps=4).train()
    rows = read_history(tmp_path)
    assert [row["step"] for row in rows] == [4, 8]
    for layer in range(4):
        expected = weight_sparsity(model.model.layers[layer])
        assert {name: rows[1]["layers"][name][layer] for name in WEIGHT_METRICS} == pytest.approx(expected)


def test_weights_and_attention_keep_their_own_pace(tmp_path: Path) -> None:
    run = trainer(SORTS["moe"](), tmp_path, [SparsityCallback(every=6)], max_steps=14, logging_steps=2)
    run.train()
    with_weights = [row["step"] for row in read_history(tmp_path) if "weight_hoyer" in row["layers"]]
    assert with_weights == [2, 8, 14]
    assert all("expert_load_max" in row["layers"] for row in read_history(tmp_path))
    assert "layers/weight_hoyer/0" in run.state.log_history[0]
    assert "layers/weight_hoyer/0" not in run.state.log_history[1]


def test_attention_is_that_of_an_analysis_of_the_last_batch(tmp_path: Path) -> None:
    model = tiny_llama()
    data = Sentences(rows=4, padded=False)
    trainer(model, tmp_path, [SparsityCallback(every=1, sequences=4)], data, max_steps=2, logging_steps=1).train()
    report = analyze(model, blocks=data.ids, fit_blocks=0, eval_blocks=4, scores="attention_sparsity")
    row = read_history(tmp_path)[-1]
    for name in ATTENTION_METRICS:
        # The batch holds the same four sentences in another order.
        np.testing.assert_allclose(row["layers"][name], [layer[name] for layer in report.layers], rtol=1e-4)


def test_expert_load_counts_the_real_tokens_of_every_pass(tmp_path: Path) -> None:
    model = SORTS["moe"]()
    counted: dict[int, np.ndarray] = {}
    data = Sentences()
    masks: list[torch.Tensor] = []
    model.register_forward_pre_hook(
        lambda m, a, k: masks.append(k["attention_mask"]) if "attention_mask" in k else None, with_kwargs=True
    )
    for layer in model.config.moe_layer_indices:

        def count(module: Any, args: Any, output: Any, layer: int = layer) -> None:
            if module.training and torch.is_grad_enabled():
                real = masks[-1].bool().flatten()
                load = np.bincount(output[2][real].flatten().numpy(), minlength=8)
                counted[layer] = counted.get(layer, 0) + load

        model.model.layers[layer].mlp.gate.register_forward_hook(count)
    trainer(
        model, tmp_path, [SparsityCallback()], data, max_steps=3, logging_steps=3, gradient_accumulation_steps=2
    ).train()
    row = read_history(tmp_path)[0]
    for layer, load in counted.items():
        relative = load / load.mean()
        assert row["layers"]["expert_load_max"][layer] == pytest.approx(relative.max())
        assert row["layers"]["expert_load_min"][layer] == pytest.approx(relative.min())
    assert row["layers"]["expert_load_max"][0] is None  # a dense layer
    assert row["values"]["kv_sharing"] == 2
    assert row["values"]["aux_loss"] > 0
    assert row["values"]["z_loss"] > 0


@pytest.mark.parametrize("name", SORTS)
def test_training_does_not_notice(name: str, tmp_path: Path) -> None:
    weights = []
    for callbacks in ([], [SparsityCallback(every=1)]):
        model = SORTS[name]()
        model.config.attention_dropout = 0.1
        trainer(model, tmp_path, callbacks, logging_steps=1).train()
        weights.append(model.state_dict())
        assert model.training
    assert all(torch.equal(weight, weights[1][key]) for key, weight in weights[0].items())


def test_gradient_checkpointing_counts_once(tmp_path: Path) -> None:
    rows = []
    for settings in ({}, {"gradient_checkpointing": True}):
        trainer(SORTS["moe"](), tmp_path, [SparsityCallback()], **settings).train()
        rows.append(read_history(tmp_path)[-1]["layers"])
    for metric in EXPERT_METRICS:
        np.testing.assert_allclose(np.array(rows[0][metric], float), np.array(rows[1][metric], float), rtol=1e-5)


def test_it_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    rhythm = {"max_steps": 12, "logging_steps": 5, "save_strategy": "steps", "save_steps": 3}

    def run(folder: Path, resume: str | None = None) -> list[dict[str, Any]]:
        callbacks = [SparsityCallback(every=5), VarianceCallback()]
        trainer(SORTS["moe"](), folder, callbacks, **rhythm).train(resume_from_checkpoint=resume)
        return read_history(folder)

    whole = run(tmp_path)
    for step in (3, 6, 9):
        assert run(tmp_path, str(tmp_path / f"checkpoint-{step}")) == whole


def test_nothing_stays_on_the_model(tmp_path: Path) -> None:
    model = SORTS["moe"]()
    before = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    trainer(model, tmp_path, [SparsityCallback(every=1)]).train()
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == before


@pytest.mark.parametrize("options", [{"every": 0}, {"sequences": -1}, {"log": "all"}], ids=str)
def test_arguments_that_are_not_allowed(options: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=next(iter(options))):
        SparsityCallback(**options)
