"""Which layers to remove, by one of several criteria.

skip             lowest loss without the layer, one shot
block_influence  lowest 1 - cosine of the layer's input and output, one shot (ShortGPT, arXiv 2403.03853)
usefulness       lowest loss with the layer's best affine map in its place, one shot
angular          the run of consecutive layers over which the stream turns least, for each number of layers its own
(PruneMe, arXiv 2403.17887)
greedy           lowest loss without the layer, measured again after each removal (SLEB, arXiv 2402.09025)
repaired         lowest loss with a map over the gap that the layer is in, fitted and measured again after each
removal
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from depthscope.console.progress import Progress
from depthscope.errors import SettingsError, SurgeryError
from depthscope.layers.lanes.lanes import Lanes
from depthscope.layers.precision import precise
from depthscope.processes import Processes
from depthscope.settings import Settings
from depthscope.surgery.plans.gaps import Cut, Repair, standing_in
from depthscope.surgery.plans.maps import Calibration
from depthscope.surgery.plans.trials import losses_of
from depthscope.text.blocks import Blocks

__all__ = ["CRITERIA", "Choice", "Evidence", "require_criterion"]


@dataclass(frozen=True)
class Evidence:
    """What layers are chosen by.

    Attributes:
        lanes: of the whole model.
        calibration: what maps are fitted on.
        chosen_on: the blocks whose losses decide.
        settings: of losses.
        processes: that share the blocks.
        shown: counts the work.
        candidates: how many layers a removal is chosen among, the cheapest of the removal before; None for all.
    """

    lanes: Lanes
    calibration: Calibration
    chosen_on: Blocks
    settings: Settings
    processes: Processes
    shown: Progress
    candidates: int | None = None

    def losses(self, trials: Mapping[int, Mapping[int, nn.Module]], cut: Cut) -> dict[int, float]:
        """The mean loss of each trial beside a cut model; infinite where it is not finite."""
        with self.lanes.stack.replacing(cut.replacements()):
            measured = losses_of(self.lanes, trials, self.chosen_on, self.settings, self.processes, self.shown)
        found = {key: measured.of(key) for key in trials}
        return {key: loss if math.isfinite(loss) else math.inf for key, loss in found.items()}


# Gives the removed layers after removing 1, 2, ... layers, as many as are asked of it.
Choice = Callable[[Evidence], Iterator[frozenset[int]]]


def by_skip(evidence: Evidence) -> Iterator[frozenset[int]]:
    """One shot, by the loss without each layer."""
    layers = range(evidence.lanes.stack.num_layers)
    losses = evidence.losses({layer: standing_in(range(layer, layer + 1), {}) for layer in layers}, Cut())
    yield from _one_after_the_other(losses)


def by_usefulness(evidence: Evidence) -> Iterator[frozenset[int]]:
    """One shot, by the loss with each layer's affine map in its place."""
    gaps = [range(layer, layer + 1) for layer in range(evidence.lanes.stack.num_layers)]
    maps = evidence.calibration.repairs_of(Cut(), gaps)
    losses = evidence.losses({gap.start: standing_in(gap, repair) for gap, repair in maps}, Cut())
    yield from _one_after_the_other(losses)


def by_block_influence(evidence: Evidence) -> Iterator[frozenset[int]]:
    """One shot, by one less the mean cosine of each layer's input and output."""
    cosines = _mean_cosines(evidence, 1)
    yield from _one_after_the_other({layer: 1 - cosine for layer, cosine in enumerate(cosines)})


def by_angle(evidence: Evidence) -> Iterator[frozenset[int]]:
    """For each number of layers the run of that length over which the stream turns least."""
    count = evidence.lanes.stack.num_layers
    for length in range(1, count):
        angles = _mean_cosines(evidence, length, angle=True)
        first = min(range(len(angles)), key=lambda start, angles=angles: (angles[start], start))  # type: ignore[misc]
        yield frozenset(range(first, first + length))


def greedily(evidence: Evidence) -> Iterator[frozenset[int]]:
    """By the loss without the layer, measured again after each removal."""
    yield from (cut.removed for cut in _growing(evidence, lambda cut, gaps: {}))


def by_repaired_loss(evidence: Evidence) -> Iterator[frozenset[int]]:
    """By the loss with a map over the gap that the layer is in, measured again after each removal."""

    def repairs(cut: Cut, gaps: list[range]) -> dict[range, Repair]:
        return dict(evidence.calibration.repairs_of(cut, gaps))

    yield from (cut.removed for cut in _growing(evidence, repairs))


CRITERIA: dict[str, Choice] = {
    "skip": by_skip,
    "block_influence": by_block_influence,
    "usefulness": by_usefulness,
    "angular": by_angle,
    "greedy": greedily,
    "repaired": by_repaired_loss,
}


def require_criterion(by: str) -> None:
    """Refuse a criterion that there is not.

    Raises:
        SettingsError: there is none of that name.
    """
    if by not in CRITERIA:
        raise SettingsError(f"by is {by!r}; choose from {', '.join(CRITERIA)}.")


def _growing(evidence: Evidence, repairs_for: Callable[[Cut, list[range]], Mapping[range, Repair]]) -> Iterator[Cut]:
    """Remove the layer without which the loss is lowest, again and again; what came before the gap is not run twice."""
    cut = Cut()
    costs: dict[int, float] = {}
    layers = list(range(evidence.lanes.stack.num_layers))
    while len(layers) > 1:
        tried = layers
        if evidence.candidates is not None and costs:
            tried = sorted(layers, key=lambda layer: (costs.get(layer, math.inf), layer))[: evidence.candidates]
        gaps = {layer: cut.gap_with(layer) for layer in tried}
        repairs = repairs_for(cut, list(dict.fromkeys(gaps.values())))
        trials = {layer: standing_in(gap, repairs.get(gap, {})) for layer, gap in gaps.items()}
        losses = evidence.losses(trials, cut)
        costs |= losses
        best = min(losses, key=lambda layer: (losses[layer], layer))
        if not math.isfinite(losses[best]):
            raise SurgeryError("Without any further layer the loss is not finite (NaN or infinity); remove fewer.")
        cut = cut.and_without(gaps[best], repairs.get(gaps[best]))
        layers.remove(best)
        yield cut


def _one_after_the_other(costs: Mapping[int, float]) -> Iterator[frozenset[int]]:
    """The cheapest layer, the two cheapest, ..."""
    order = sorted(costs, key=lambda layer: (costs[layer], layer))
    for count in range(1, len(order)):
        yield frozenset(order[:count])


def _mean_cosines(evidence: Evidence, length: int, *, angle: bool = False) -> list[float]:
    """Of the stream before and after each run of so many layers, on the calibration text: mean cosine or angle / pi."""
    calibration, stack = evidence.calibration, evidence.lanes.stack
    starts = range(stack.num_layers - length + 1)
    totals = torch.zeros(len(starts) + 1, dtype=torch.float64)
    for number, blocks in enumerate(calibration.batches):
        streams, there = calibration.streams(number), blocks.token_mask
        for start in starts:
            cosine = _cosine(stack.flat(streams[start]), stack.flat(streams[start + length]))
            value = torch.arccos(cosine.clamp(-1, 1)) / math.pi if angle else cosine
            totals[start] += float(value[there.to(value.device)].sum())
        totals[-1] += float(there.sum())
    evidence.processes.add_up(totals)
    return [float(total / totals[-1]) for total in totals[:-1]]


def _cosine(one: Tensor, other: Tensor) -> Tensor:
    return torch.cosine_similarity(precise(one), precise(other), dim=-1)
