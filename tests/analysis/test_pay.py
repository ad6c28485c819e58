"""An analysis runs and keeps only what the scores that were asked for need."""

import weakref
from typing import Any

import pytest
import torch

from depthscope import LayerReport, LayerStack, analyze
from models import gemma_with_shared_keys_and_values, random_blocks, tiny_llama

ONE_LAYER_AT_A_TIME = "variance,block_influence,angular_distance,update"
ALONE = {"blocks": random_blocks(4, 16), "fit_blocks": 0, "eval_blocks": 4, "batch_size": 2, "progress": False}


def passes_of(model: Any, scores: str) -> tuple[int, LayerReport]:
    """How often an analysis runs the whole model."""
    calls: list[None] = []
    handle = model.register_forward_pre_hook(lambda *given: calls.append(None))
    report = analyze(model, scores=scores, **ALONE)
    handle.remove()
    return len(calls), report


@pytest.mark.parametrize("make", [tiny_llama, gemma_with_shared_keys_and_values])
def test_scores_of_one_layer_at_a_time_try_no_experiment(make: Any) -> None:
    count, report = passes_of(make(), ONE_LAYER_AT_A_TIME)
    assert count == 1 + 1 + 2  # the example, the same with other tokens, and two batches
    assert not any("experiment" in note or "skipped" in note for note in report.notes)


def test_experiments_are_tried_before_they_are_run() -> None:
    model = gemma_with_shared_keys_and_values()
    assert not LayerStack(model).resumable
    _, report = passes_of(model, "variance,causal")
    assert any("every experiment ran from the start" in note for note in report.notes)


def test_states_are_kept_for_the_jacobian_only() -> None:
    model = tiny_llama()
    outputs: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, args, result: outputs.append(weakref.ref(result)))
    model.model.norm.register_forward_hook(
        lambda module, args, result: alive.append(sum(kept() is not None for kept in outputs))
    )
    analyze(model, scores=ONE_LAYER_AT_A_TIME, **ALONE)
    assert alive[2:] == [1, 1]  # what goes into the final norm, in the passes after those over the example
    alive.clear()
    analyze(model, scores="jacobian", probes=1, **ALONE)
    assert max(alive) >= len(model.model.layers)
