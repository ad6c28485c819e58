"""Plans of cuts: each loss is that of a model whose layers were deleted by hand, each repair an explicit `lstsq`."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import naive
from depthscope import LayerStack
from depthscope.errors import CorpusError, NonFiniteError, PlanError, SettingsError
from depthscope.report.cut_plan import CutPlan
from depthscope.surgery import plan_cut
from depthscope.surgery.plans.choosing import CRITERIA
from depthscope.surgery.plans.last_matrix import last_matrix
from models import random_blocks, tiny_llama
from zoo import example_ids, tiny_model

LAYERS, FIT, CHOOSE, EVAL, TOKENS = 5, 10, 3, 3, 16
IDS = random_blocks(FIT + CHOOSE + EVAL, TOKENS)
SIZES: dict[str, Any] = {"fit_blocks": FIT, "choose_blocks": CHOOSE, "eval_blocks": EVAL, "progress": False}
CHOSEN_ON, HELD_OUT = IDS[FIT : FIT + CHOOSE], IDS[FIT + CHOOSE :]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_llama(num_layers=LAYERS)


def without(model: PreTrainedModel, removed: Any) -> Any:
    """A copy whose layers were deleted by hand."""
    small: Any = copy.deepcopy(model)
    small.model.layers = nn.ModuleList(layer for index, layer in enumerate(small.model.layers) if index not in removed)
    return small


def stream(model: Any, ids: Tensor, layer: int) -> Tensor:
    """The stream after a layer (before the first one for -1), one row a token, float64."""
    inputs, outputs = naive.streams(model, model.model.layers, ids)
    hidden = inputs[0] if layer < 0 else outputs[layer]
    return hidden.flatten(0, 1)


@pytest.mark.parametrize("by", CRITERIA)
def test_the_losses_of_a_plan_are_those_of_models_whose_layers_were_deleted(model: PreTrainedModel, by: str) -> None:
    plan = plan_cut(model, IDS, layers=3, by=by, **SIZES)
    assert plan.loss == pytest.approx(naive.loss(model, HELD_OUT), rel=1e-5)
    assert [len(step.removed) for step in plan.steps] == [1, 2, 3]
    for step in plan.steps:
        small = without(model, step.removed)
        assert step.loss == pytest.approx(naive.loss(small, HELD_OUT), rel=1e-5)
        assert step.parameters == sum(weight.numel() for weight in small.parameters())
        differences = naive.block_losses(small, HELD_OUT) - naive.block_losses(model, HELD_OUT)
        assert step.loss_se == pytest.approx(differences.std(ddof=1) / np.sqrt(EVAL), rel=1e-4)
    assert plan.kept(2) == [layer for layer in range(LAYERS) if layer not in plan.removed(2)]


def test_greedy_removes_what_a_loop_over_whole_forward_passes_removes(model: PreTrainedModel) -> None:
    removed: set[int] = set()
    for step in plan_cut(model, IDS, layers=3, by="greedy", **SIZES).steps:
        left = [layer for layer in range(LAYERS) if layer not in removed]
        removed.add(min(left, key=lambda layer: naive.loss(without(model, {*removed, layer}), CHOSEN_ON)))
        assert step.removed == sorted(removed)


def test_angular_removes_the_run_of_layers_over_which_the_stream_turns_least(model: PreTrainedModel) -> None:
    streams = [stream(model, IDS[:FIT], layer) for layer in range(-1, LAYERS)]
    for length, step in enumerate(plan_cut(model, IDS, layers=3, by="angular", **SIZES).steps, 1):
        angles = [
            torch.arccos(torch.cosine_similarity(streams[first], streams[first + length], dim=-1)).mean()
            for first in range(LAYERS - length + 1)
        ]
        first = int(np.argmin(angles))
        assert step.removed == list(range(first, first + length))


def with_maps(model: Any, removed: list[int]) -> Any:
    """The model with an affine map in the place of each run of removed layers, by `lstsq` on explicit matrices."""
    whole, cut = copy.deepcopy(model), copy.deepcopy(model)
    for layer in removed:
        if layer - 1 in removed:
            cut.model.layers[layer] = naive.Mapped(cut.model.layers[layer], lambda hidden: hidden)
            continue
        last = next(end for end in range(layer, LAYERS) if end + 1 not in removed)
        x = stream(cut, IDS[:FIT], layer - 1)
        design = torch.cat([x, torch.ones(len(x), 1).double()], 1)
        solution = torch.linalg.lstsq(design, stream(whole, IDS[:FIT], last), driver="gelsd").solution

        def mapped(hidden: Tensor, solution: Tensor = solution) -> Tensor:
            return (hidden.double() @ solution[:-1] + solution[-1]).float()

        cut.model.layers[layer] = naive.Mapped(cut.model.layers[layer], mapped)
    return cut


def with_weights(model: Any, removed: list[int]) -> Any:
    """The model without layers, with `down_proj` before each run of them fitted by `lstsq` on explicit matrices."""
    whole, cut = copy.deepcopy(model), copy.deepcopy(model)
    for layer in removed:
        cut.model.layers[layer] = naive.Mapped(cut.model.layers[layer], lambda hidden: hidden)
    for layer in removed:
        if layer - 1 in removed or layer == 0:
            continue
        last = next(end for end in range(layer, LAYERS) if end + 1 not in removed)
        down = cut.model.layers[layer - 1].mlp.down_proj
        given: list[Tensor] = []

        def keep(module: nn.Module, args: tuple[Tensor], result: Tensor, given: list[Tensor] = given) -> None:
            given.append(args[0])

        handle = down.register_forward_hook(keep)
        with torch.no_grad():
            after = stream(cut, IDS[:FIT], layer - 1)
        handle.remove()
        m = torch.cat([each.flatten(0, 1) for each in given]).double()
        missing = stream(whole, IDS[:FIT], last) - after
        solution = torch.linalg.lstsq(m, missing, driver="gelsd").solution
        with torch.no_grad():
            down.weight += solution.T.float()
    return cut


@pytest.mark.parametrize("removed", [[2], [1, 2], [1, 3], [0, 3, 4]])
def test_repairs_are_least_squares_on_what_the_cut_model_makes(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, removed: list[int]
) -> None:
    orders = (frozenset(removed[:count]) for count in range(1, len(removed) + 1))
    monkeypatch.setitem(CRITERIA, "given", lambda evidence: orders)
    plan = plan_cut(model, IDS, layers=len(removed), by="given", ridge=0, **SIZES)
    step = plan.steps[-1]
    assert step.removed == removed
    assert step.map_loss == pytest.approx(naive.loss(with_maps(model, removed), HELD_OUT), rel=1e-4)
    assert step.weights_loss == pytest.approx(naive.loss(with_weights(model, removed), HELD_OUT), rel=1e-4)


def test_the_repaired_criterion_finds_no_worse_a_step_than_any_other_layer(model: PreTrainedModel) -> None:
    first = plan_cut(model, IDS, layers=1, by="repaired", ridge=0, **SIZES).steps[0]
    losses = [naive.loss(with_maps(model, [layer]), CHOSEN_ON) for layer in range(LAYERS)]
    assert first.removed == [int(np.argmin(losses))]


def test_a_plan_ends_where_the_loss_or_the_parameters_say(model: PreTrainedModel) -> None:
    whole = plan_cut(model, IDS, layers=4, by="greedy", **SIZES)
    best = [step.best_loss or 0.0 for step in whole.steps]
    limit = max(best[:2]) + 1e-6
    expected = next((count for count, loss in enumerate(best) if loss > limit), 4)
    assert len(plan_cut(model, IDS, max_loss=limit, by="greedy", **SIZES).steps) == expected
    share = whole.steps[1].parameters / whole.parameters
    assert len(plan_cut(model, IDS, keep_parameters=share, by="greedy", **SIZES).steps) == 2
    assert whole.most_within(limit) >= expected


def test_fewer_candidates_are_those_that_were_cheapest_before(model: PreTrainedModel) -> None:
    few = plan_cut(model, IDS, layers=3, by="greedy", candidates=1, **SIZES)
    shot = plan_cut(model, IDS, layers=1, by="skip", **SIZES)
    assert few.steps[0].removed == shot.steps[0].removed
    assert len(few.steps) == 3


@pytest.mark.parametrize(
    ("model_type", "has_matrix"),
    [("llama", True), ("gpt2", True), ("opt", False), ("gemma3_text", False), ("mixtral", False), ("qwen3", True)],
)
def test_other_weights_repair_where_the_mlp_adds_all_that_its_last_matrix_makes(
    model_type: str, has_matrix: bool
) -> None:
    model = tiny_model(model_type)
    stack = LayerStack(model)
    found = last_matrix(stack, 1)
    assert (found is not None) == has_matrix
    plan = plan_cut(model, example_ids(model, batch=16, length=12), layers=2, by="angular", **SIZES)
    for step in plan.steps:
        assert step.map_loss is not None
        unrepaired = step.weights_loss == pytest.approx(step.loss, rel=1e-6)
        assert unrepaired == (not has_matrix or step.removed[0] == 0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layers": 5}, SettingsError, "the model has 5, and one has to stay"),
        ({"layers": 0}, SettingsError, "layers is 0"),
        ({}, SettingsError, "Say how far to cut"),
        ({"layers": 1, "by": "luck"}, SettingsError, "by is 'luck'; choose from skip"),
        ({"layers": 1, "fit_blocks": 0}, SettingsError, "fit_blocks is 0"),
        ({"layers": 1, "candidates": 0}, SettingsError, "candidates is 0"),
        ({"layers": 1, "eval_blocks": 4}, CorpusError, "16 blocks were given"),
        ({"max_loss": float("nan")}, SettingsError, "max_loss is nan"),
        ({"keep_parameters": 1.5}, SettingsError, "keep_parameters is 1.5"),
    ],
)
def test_what_cannot_be_planned_is_refused(
    model: PreTrainedModel, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        plan_cut(model, IDS, **{**SIZES, **options})


def test_broken_weights_are_refused() -> None:
    broken = tiny_llama()
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError):
        plan_cut(broken, IDS, layers=1, **SIZES)


def test_a_plan_is_saved_and_read_again_and_damage_is_named(model: PreTrainedModel, tmp_path: Path) -> None:
    plan = plan_cut(model, IDS, layers=2, by="skip", **SIZES)
    file = plan.save(tmp_path / "plan.json")
    assert CutPlan.load(file) == plan
    content = json.loads(file.read_text())
    damages: list[dict[str, Any]] = [
        {"kind": "cake"},
        {"steps": [{**content["steps"][0], "removed": [7]}]},
        {"steps": [{**content["steps"][0], "removed": [1, 1]}]},
        {"steps": [{**content["steps"][0], "loss": "low"}]},
        {"parameters": -1},
        {"surprise": 1},
    ]
    for damage in damages:
        file.write_text(json.dumps({**content, **damage}))
        with pytest.raises(PlanError):
            CutPlan.load(file)
    with pytest.raises(PlanError, match="the plan removes 0 to 2"):
        plan.removed(3)
