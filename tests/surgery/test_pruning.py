"""Plans that are carried out: a folder that plain transformers loads, with the loss that the plan promised."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import naive
from depthscope.errors import CorpusError, PlanError, SettingsError
from depthscope.report.cut_plan import CutPlan
from depthscope.surgery import plan_cut, prune
from depthscope.surgery.pruning import PLAN_FILE
from models import random_blocks, tiny_llama

FIT, CHOOSE, EVAL = 8, 2, 3
IDS = random_blocks(FIT + CHOOSE + EVAL, 32)
SIZES: dict[str, Any] = {"fit_blocks": FIT, "choose_blocks": CHOOSE, "eval_blocks": EVAL, "progress": False}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_llama(num_layers=5)


@pytest.fixture(scope="module")
def plan(model: PreTrainedModel) -> CutPlan:
    return plan_cut(model, IDS, layers=2, by="greedy", **SIZES)


@pytest.mark.parametrize("repair", ["weights", "none"])
def test_the_saved_model_has_the_loss_of_the_plan(
    model: PreTrainedModel, plan: CutPlan, tmp_path: Path, repair: Any
) -> None:
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    prune(model, plan, tmp_path / "small", blocks=IDS, repair=repair)
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32).eval()
    promised = plan.steps[1].weights_loss if repair == "weights" else plan.steps[1].loss
    assert naive.loss(small, IDS[FIT + CHOOSE :]) == pytest.approx(promised, rel=1e-5)
    assert small.config.kept_layers == plan.kept(2)
    assert CutPlan.load(tmp_path / "small" / PLAN_FILE) == plan
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items()), "as it was"


def test_what_does_not_belong_to_the_plan_is_refused_and_nothing_is_written(
    model: PreTrainedModel, plan: CutPlan, tmp_path: Path
) -> None:
    folder = tmp_path / "small"
    with pytest.raises(PlanError, match="5 layers"):
        prune(tiny_llama(num_layers=4), plan, folder, repair="none")
    with pytest.raises(PlanError, match="the plan removes 0 to 2"):
        prune(model, plan, folder, layers=3, repair="none")
    with pytest.raises(PlanError, match="at least 1"):
        prune(model, plan, folder, layers=0, repair="none")
    with pytest.raises(CorpusError, match="give the blocks"):
        prune(model, plan, folder, repair="weights")
    with pytest.raises(CorpusError, match="are not those of the plan"):
        prune(model, plan, folder, blocks=random_blocks(13, 32, seed=1), repair="weights")
    with pytest.raises(SettingsError, match="repair is 'glue'"):
        prune(model, plan, folder, repair="glue")  # type: ignore[arg-type]
    assert not folder.exists()
