"""From a model and blocks of text to a `CutPlan`: layers chosen one by one, each loss measured on other text."""

import math
from contextlib import ExitStack
from datetime import datetime, timezone
from typing import Any, cast

import torch
from torch import Tensor, nn

from depthscope.analysis.assemble import versions
from depthscope.analysis.measure import require_finite
from depthscope.console.progress import Listener, Progress, showing_progress
from depthscope.errors import CorpusError, SettingsError
from depthscope.layers.facts import model_facts
from depthscope.layers.lanes.lanes import Lanes
from depthscope.layers.modes import evaluating
from depthscope.layers.stack import LayerStack
from depthscope.processes import Processes
from depthscope.report.cut_plan import CutPlan, CutStep
from depthscope.settings import Settings
from depthscope.surgery.plans.choosing import CRITERIA, Evidence, require_criterion
from depthscope.surgery.plans.gaps import Cut
from depthscope.surgery.plans.maps import Calibration
from depthscope.surgery.plans.trials import Losses, losses_of
from depthscope.text.blocks import Blocks
from depthscope.wording.numeric import require_number, require_whole

__all__ = ["batch_size_of", "parameters_of", "plan_cut"]

# Pulls maps towards the identity; relative to the mean variance of a feature.
RIDGE = 1e-4
TOKENS_AT_ONCE = 2048


def plan_cut(
    model: nn.Module,
    blocks: Blocks | Tensor,
    *,
    layers: int | None = None,
    max_loss: float | None = None,
    keep_parameters: float | None = None,
    by: str = "repaired",
    fit_blocks: int = 16,
    choose_blocks: int = 8,
    eval_blocks: int = 16,
    candidates: int | None = None,
    ridge: float = RIDGE,
    exact_losses: bool = False,
    seed: int = 0,
    facts: dict[str, Any] | None = None,
    progress: bool | Listener = True,
) -> CutPlan:
    """Plan which layers to remove, and measure the loss after each removal, with nothing in the gaps and repaired.

    Args:
        model: a loaded causal language model; it is not changed.
        blocks: `Blocks`, or token ids [N, T]: the first `fit_blocks` fit maps, the next `choose_blocks` decide which
            layer goes, the next `eval_blocks` measure the losses in the plan.
        layers: how many layers to remove.
        max_loss: remove layers as long as the loss, repaired or not, stays at most this, nats per token.
        keep_parameters: remove layers as long as this share of the parameters is left, in (0, 1).
        by: the criterion; see `depthscope.surgery.plans.choosing`.
        fit_blocks: blocks to fit maps on.
        choose_blocks: blocks to choose layers on.
        eval_blocks: blocks to measure losses on.
        candidates: among how many layers each removal is chosen, the cheapest at the removal before; None for all.
        ridge: pulls the maps towards the identity; relative to the mean variance of a feature.
        exact_losses: as in `Settings`.
        seed: of sampled positions.
        facts: of the model, for the plan; by default what can be read off it.
        progress: show a progress bar on a terminal, or a function that is told instead.

    Raises:
        SettingsError: an option has a value that is not allowed.
        CorpusError: there are too few blocks.
        NoLayerStackError: the model has no plain stack of decoder layers.
        NonFiniteError: activations or losses are NaN or infinite.
    """
    require_criterion(by)
    sizes = {"fit_blocks": fit_blocks, "choose_blocks": choose_blocks, "eval_blocks": eval_blocks}
    for name, value in sizes.items():
        require_whole(name, value, least=1)
    if candidates is not None:
        require_whole("candidates", candidates, least=1)
    require_number("ridge", ridge, "a number from 0 up to 1, such as 0 or 1e-4", least=0, below=1)
    blocks = Blocks.given(blocks, None)
    if len(blocks) < sum(sizes.values()):
        wanted = ", ".join(f"{name}={value}" for name, value in sizes.items())
        raise CorpusError(
            f"{len(blocks)} blocks were given, but {wanted} need {sum(sizes.values())}. Give more text, or lower one "
            "of them."
        )
    settings = Settings(
        scores=("skip",), fit_blocks=0, block_size=blocks.input_ids.shape[1], exact_losses=exact_losses, seed=seed
    )
    processes = Processes.here()
    with processes.together(), evaluating(model), torch.no_grad(), ExitStack() as around:
        stack = LayerStack(model)
        around.enter_context(stack.as_written())
        require_finite(stack)
        end = _End(stack, layers, max_loss, keep_parameters)
        lanes = Lanes(stack)
        lanes.prepare()
        fit, chosen_on = blocks[:fit_blocks], blocks[fit_blocks : fit_blocks + choose_blocks]
        held_out = blocks[fit_blocks + choose_blocks : sum(sizes.values())]
        calibration = Calibration(stack, fit, batch_size_of(blocks), ridge, processes)
        listener = progress if callable(progress) else None
        shown = around.enter_context(
            showing_progress(end.most, visible=bool(progress) and processes.is_main, listener=listener)
        )
        evidence = Evidence(
            lanes, calibration, chosen_on, settings, processes, Progress(0.0, None), candidates=candidates
        )
        steps, whole = [], None
        for removed in CRITERIA[by](evidence):
            shown.at(f"{len(removed)} layers removed")
            whole = _measured(evidence, removed, held_out)
            step = _step(stack, removed, whole)
            if not end.allows(step):
                break
            steps.append(step)
            shown.advance(1)
            if end.is_reached(len(steps)):
                break
        if whole is None:
            raise SettingsError("A model of one layer has none to spare.")
    chosen: dict[str, Any] = {"by": by, **sizes, "candidates": candidates, "ridge": ridge}
    return CutPlan(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        model=cast("Any", {**(facts or model_facts(model)), "num_layers": stack.num_layers}),
        data=cast("Any", {"name": blocks.name, "fingerprint": blocks.fingerprint, "block_size": settings.block_size}),
        settings={**chosen, "block_size": settings.block_size, "exact_losses": exact_losses, "seed": seed},
        versions=versions(),
        notes=whole.notes,
        loss=float(whole.model.sum() / whole.predictions.sum()),
        loss_se=_number(whole.error_of_model()),
        parameters=parameters_of(stack),
        steps=steps,
    )


def batch_size_of(blocks: Blocks) -> int:
    """How many blocks run at once where layers are watched."""
    return max(1, TOKENS_AT_ONCE // blocks.input_ids.shape[1])


class _End:
    """How far a plan goes."""

    def __init__(
        self, stack: LayerStack, layers: int | None, max_loss: float | None, keep_parameters: float | None
    ) -> None:
        given = {"layers": layers, "max_loss": max_loss, "keep_parameters": keep_parameters}
        named = [name for name, value in given.items() if value is not None]
        if not named:
            raise SettingsError("Say how far to cut: layers, max_loss or keep_parameters.")
        last = stack.num_layers - 1
        self.most = last if layers is None else require_whole("layers", layers, least=1)
        if self.most > last:
            raise SettingsError(
                f"layers is {layers}, but the model has {stack.num_layers}, and one has to stay; give at most {last}."
            )
        if max_loss is not None:
            require_number("max_loss", max_loss, "a loss in nats per token, such as 3.5", above=0)
        if keep_parameters is not None:
            require_number(
                "keep_parameters", keep_parameters, "a share of the parameters, such as 0.8", above=0, below=1
            )
        self.max_loss = math.inf if max_loss is None else max_loss
        self.fewest = 0 if keep_parameters is None else keep_parameters * parameters_of(stack)

    def allows(self, step: CutStep) -> bool:
        """Whether a step may be a part of the plan."""
        loss = math.inf if step.best_loss is None else step.best_loss
        return loss <= self.max_loss and step.parameters >= self.fewest

    def is_reached(self, count: int) -> bool:
        """Whether no more layers are to go."""
        return count >= self.most


def _measured(evidence: Evidence, removed: frozenset[int], blocks: Blocks) -> Losses:
    """The losses of the whole model, of a cut one, and of the cut one with maps, on other text."""
    trials = {
        "cut": Cut(removed).replacements(),
        "map": evidence.calibration.repaired(removed).replacements(),
        "weights": evidence.calibration.repaired(removed, "weights").replacements(),
    }
    return losses_of(evidence.lanes, trials, blocks, evidence.settings, evidence.processes, evidence.shown)


def _step(stack: LayerStack, removed: frozenset[int], losses: Losses) -> CutStep:
    return CutStep(
        removed=sorted(removed),
        loss=_number(losses.of("cut")),
        loss_se=_number(losses.error("cut")),
        map_loss=_number(losses.of("map")),
        map_loss_se=_number(losses.error("map")),
        weights_loss=_number(losses.of("weights")),
        weights_loss_se=_number(losses.error("weights")),
        parameters=parameters_of(stack, removed),
    )


def parameters_of(stack: LayerStack, removed: frozenset[int] = frozenset()) -> int:
    """The parameters of the model without some layers."""
    gone = {id(weight) for layer in removed for weight in stack.layers[layer].parameters()}
    return sum(weight.numel() for weight in stack.model.parameters() if id(weight) not in gone)


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
