"""Carrying out a plan: the layers cut, the gaps repaired by other weights, a native model saved and proved."""

from contextlib import ExitStack
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from depthscope.errors import CorpusError, PlanError, SettingsError
from depthscope.layers.modes import evaluating
from depthscope.layers.stack import LayerStack
from depthscope.processes import Processes
from depthscope.report.cut_plan import CutPlan
from depthscope.surgery.plans.gaps import Cut
from depthscope.surgery.plans.last_matrix import OtherWeights
from depthscope.surgery.plans.maps import Calibration
from depthscope.surgery.plans.planning import batch_size_of, parameters_of
from depthscope.surgery.proof import Proof
from depthscope.surgery.save import save_cut
from depthscope.text.blocks import Blocks

__all__ = ["PLAN_FILE", "Repairing", "prune", "require_repair"]

PLAN_FILE = "cut_plan.json"

Repairing = Literal["auto", "weights", "none"]


def prune(
    model: nn.Module,
    plan: CutPlan,
    folder: str | PathLike[str],
    *,
    layers: int | None = None,
    blocks: Blocks | Tensor | None = None,
    repair: Repairing = "auto",
    tokenizer: Any = None,
) -> Proof:
    """Cut layers out of a model as a plan says, repair the gaps, and save a native model beside the plan.

    Args:
        model: the model that the plan is of; it is not changed.
        plan: what `plan_cut` gave.
        folder: the folder to write; it must not exist, or be empty.
        layers: how many layers to remove; all of the plan by default.
        blocks: the blocks that the plan was made with, whose first fit the repair; not needed without repair.
        repair: "weights" fits the last matrix before each gap anew; "none" leaves all weights as they are; "auto" takes
            what has the lower loss in the plan.
        tokenizer: to save beside the model.

    Raises:
        PlanError: the plan is of another model, or does not go so far.
        CorpusError: the repair needs blocks, or they are not those of the plan.
        SurgeryError: the remaining layers cannot be a native model; nothing is written.
    """
    require_repair(repair)
    count = len(plan.steps) if layers is None else layers
    removed = plan.removed(count)
    if not removed:
        raise PlanError("No layer is to be removed; give at least 1.")
    stack = LayerStack(model)
    _require_same_model(stack, plan)
    repaired = _is_repaired(plan, count, repair)
    cut = _repaired(stack, plan, removed, blocks) if repaired else Cut(frozenset(removed))
    with ExitStack() as installed:
        for module in (module for by in cut.repairs.values() for module in by.values()):
            if isinstance(module, OtherWeights):
                installed.enter_context(module.installed())
        proof = save_cut(model, plan.kept(count), folder, tokenizer)
    plan.save(Path(folder) / PLAN_FILE)
    return proof


def require_repair(repair: str) -> None:
    """Refuse a way to repair that there is not.

    Raises:
        SettingsError: there is none of that name.
    """
    if repair not in get_args(Repairing):
        raise SettingsError(f"repair is {repair!r}; choose from {', '.join(get_args(Repairing))}.")


def _is_repaired(plan: CutPlan, count: int, repair: Repairing) -> bool:
    step = plan.steps[count - 1]
    if repair == "auto":
        return step.weights_loss is not None and (step.loss is None or step.weights_loss < step.loss)
    return repair == "weights"


def _repaired(stack: LayerStack, plan: CutPlan, removed: list[int], blocks: Blocks | Tensor | None) -> Cut:
    if blocks is None:
        raise CorpusError('To repair the gaps, give the blocks that the plan was made with; or repair="none".')
    blocks = Blocks.given(blocks, None)
    if blocks.fingerprint != plan.data["fingerprint"]:
        raise CorpusError(
            f"The blocks (fingerprint {blocks.fingerprint}) are not those of the plan "
            f"({plan.data['fingerprint']}); give the same text, tokenizer and sizes."
        )
    fit, ridge = int(str(plan.settings["fit_blocks"])), float(str(plan.settings["ridge"]))
    size = batch_size_of(blocks)
    with evaluating(stack.model), torch.no_grad(), stack.as_written():
        return Calibration(stack, blocks[:fit], size, ridge, Processes.here()).repaired(removed, "weights")


def _require_same_model(stack: LayerStack, plan: CutPlan) -> None:
    parameters = parameters_of(stack)
    if (stack.num_layers, parameters) != (plan.model["num_layers"], plan.parameters):
        raise PlanError(
            f"The plan is of {plan.model['name']} with {plan.model['num_layers']} layers and {plan.parameters:,} "
            f"parameters, but the model has {stack.num_layers} layers and {parameters:,}; make a plan of this model."
        )
