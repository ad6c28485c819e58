"""The losses of experiments: exact, or estimated where the head is most of the work.

With a large vocabulary, turning a final state into a loss costs as much as many layers: z_v for all tokens v, only to
add up exp(z_v). What an experiment changes in that sum shows in a few thousand tokens already. So its log is estimated
at every position from the K tokens that the model itself finds likeliest in the block, the block's own among them,

    A' = A_0 + log sum over K of exp(z_v) - log sum over K of exp(z_0v),        A_0 = log sum over all v of exp(z_0v),

with z_0 the logits of the unchanged model; and what A' misses is measured on a sample of n of the block's N positions,

    loss' = sum over N of (A' - z_target) + N / n * sum over the sample of (A - A').

That is unbiased whatever the experiment does (two-phase sampling with a difference estimator; Cochran, Sampling
Techniques, 1977, section 12.9). Positions are sampled in equal steps from a seeded start, for each block its own, the
same for all experiments, so that they stay paired. A standard error over blocks holds the error of sampling by itself.

How many positions an experiment needs is read off the first block, with a larger sample: with v_e the variance of
A - A' there, and v_r that of the loss beside the unchanged model's (less their ratio times it), a share f of the
positions multiplies the squared standard error by 1 + (1 / f - 1) v_e / v_r if positions do not depend on each other,
and by less if those of a block are alike.
"""

import math
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from depthscope.layers.lanes.head import Head, Vocabulary
from depthscope.layers.lanes.lane import Lane
from depthscope.layers.lanes.lanes import Lanes
from depthscope.layers.lanes.passes import LanePass
from depthscope.layers.precision import precise
from depthscope.layers.stack import LayerStack
from depthscope.processes import Processes
from depthscope.scores.base import LOSS_CHUNK, Array, Batch, block_losses, extent_of, head_work, log_partition
from depthscope.scores.work import ESTIMATED_HEAD, estimates_losses
from depthscope.settings import Settings

__all__ = ["EstimatedLosses", "Losses"]

# How much of the vocabulary is read at all positions: this share, but no more tokens than that.
NARROW, MOST_NARROW = 1 / 8, 8192
# By how much sampling may raise a squared standard error; less than 1.1 squared, as one block does not tell for sure.
SLACK = 0.05
# The fewest positions of a block that are sampled, and the largest share: above it all are measured.
LEAST_POSITIONS, MOST_POSITIONS = 16, 0.5
# The share that is sampled in the first block, to tell how many the others need.
PILOT = 0.25


class Losses:
    """The exact losses of the model and of its lanes, by block."""

    is_estimated = False

    def __init__(self, stack: LayerStack) -> None:
        self.work = head_work(stack)  # of a loss, in forward passes of one layer
        self.tables: dict[str, Array] = {}  # sums by block that `notes` reads

    @staticmethod
    def of(lanes: Lanes, settings: Settings, keys: Iterable[Hashable]) -> "Losses":
        """Exact losses, or estimated ones where they pay and the model's head allows it.

        Args:
            lanes: of the model.
            settings: of the analysis.
            keys: of the lanes whose losses are wanted.
        """
        stack, wanted = lanes.stack, list(keys)
        if not wanted or stack.is_offloaded or lanes.way == "alone":
            return Losses(stack)
        narrow = max(min(int(NARROW * stack.vocabulary), MOST_NARROW), 2 * settings.block_size)
        pays = estimates_losses(extent_of(stack, experiments=True), settings) and 4 * narrow <= stack.vocabulary
        if not (pays and (head := Head(stack)).is_selective):
            return Losses(stack)
        return EstimatedLosses(head, narrow, settings, wanted)

    def of_model(self, batch: Batch, logits: Tensor) -> None:
        """Set the losses of the unchanged model on a batch, from its logits [B, T, V]."""
        batch.loss = block_losses(logits, batch.blocks.input_ids, batch.target_mask)

    def of_lanes(self, run: LanePass, batch: Batch) -> Iterator[tuple[Lane, Array]]:
        """The losses of all lanes that want them: by block of the lane's rows, nats."""
        for lanes in run.ended():
            yield from self._exact(run, batch, lanes)

    def _exact(self, run: LanePass, batch: Batch, lanes: Iterable[Lane]) -> Iterator[tuple[Lane, Array]]:
        for lane, logits in run.logits_of(lanes):
            some = slice(None) if lane.rows is None else lane.rows
            yield lane, block_losses(logits, batch.blocks.input_ids[some], batch.target_mask[some])

    def agree(self, processes: Processes) -> None:
        """Tell all processes what the one with the first block found."""
        return

    def notes(self) -> list[str]:
        """What a reader of the report must know of the losses, in sentences."""
        return []


@dataclass
class _Block:
    """What the unchanged model says of a block: of the N predictions that count, on the device of the logits."""

    there: Tensor  # [T - 1], which predictions count
    targets: Tensor  # [N], the tokens that are predicted
    start: float  # where the sample begins, in [0, 1) of its step
    vocabulary: Vocabulary  # what is read at all positions
    places: Tensor  # [N], where in it the predicted tokens are
    whole: Tensor  # [N], A_0
    narrow: Tensor  # [N], its part over the vocabulary
    loss: Tensor  # [N]

    def estimate(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """A' and A' - z_target, [N] each: from logits over the vocabulary, [T, K]."""
        ahead = logits[:-1][self.there]
        whole = self.whole + log_partition(ahead) - self.narrow
        return whole, whole - _picked(ahead, self.places)

    def sample(self, share: float) -> Tensor:
        """Some of the N predictions, in equal steps, [n]."""
        count = len(self.targets)
        few = min(max(LEAST_POSITIONS, math.ceil(share * count)), count)
        steps = (self.start + np.arange(few)) * count / max(few, 1)
        return torch.from_numpy(steps.astype(np.int64)).to(self.there.device)

    def tokens(self, sample: Tensor) -> Tensor:
        """The mask [T] of the positions in a sample."""
        mask = torch.zeros(len(self.there) + 1, dtype=torch.bool, device=self.there.device)
        mask[self.there.nonzero()[:, 0][sample]] = True
        return mask

    def corrected(self, whole: Tensor, loss: Tensor, sample: Tensor, exact: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of the losses, corrected by what a sample tells of A, and the variance of sampling, float64.

        Args:
            whole: A', [N].
            loss: A' - z_target, [N].
            sample: [n].
            exact: A, [n].
        """
        count, few, missed = len(loss), len(sample), precise(exact - whole[sample])
        total = precise(loss).sum() + (count * missed.mean() if few else 0)
        if few == count:
            return total, torch.zeros_like(total)
        return total, count**2 * (1 - few / count) / few * missed.var()

    def share_needed(self, whole: Tensor, loss: Tensor, sample: Tensor, exact: Tensor) -> float:
        """Which share of the positions keeps the error of sampling small; 1 where that cannot be told."""
        missed, beside = exact - whole[sample], loss - loss.sum() / self.loss.sum() * self.loss
        ours, full = (float(precise(each).var()) for each in (missed, beside))
        share = 1 / (1 + SLACK * full / ours) if ours > 0 else 0.0
        return share if math.isfinite(share) and len(sample) > 1 else 1.0


class EstimatedLosses(Losses):
    """Losses of lanes that are estimated from some of the vocabulary at all positions, and all of it at some."""

    is_estimated = True

    def __init__(self, head: Head, narrow: int, settings: Settings, keys: list[Hashable]) -> None:
        super().__init__(head.stack)
        self.work *= ESTIMATED_HEAD
        self.head, self.narrow, self.settings = head, narrow, settings
        self.columns = {key: column for column, key in enumerate(keys)}
        self.shares = np.zeros(len(keys))  # of the positions, for each lane
        self.tables = {name: np.zeros((settings.eval_blocks, len(keys))) for name in ("loss", "sampling", "positions")}
        self.tables["model"] = np.zeros((settings.eval_blocks, 1))

    def agree(self, processes: Processes) -> None:
        """Tell all processes which share of the positions each lane needs."""
        shares = torch.from_numpy(self.shares)
        processes.add_up(shares)
        self.shares = shares.numpy()

    def of_model(self, batch: Batch, logits: Tensor) -> None:
        """Set the losses of the unchanged model, and keep what lanes are estimated from."""
        super().of_model(batch, logits)
        self.tables["model"][batch.rows, 0] = batch.loss
        blocks = zip(logits, batch.blocks.input_ids, batch.target_mask, batch.rows.tolist(), strict=True)
        self._blocks = [self._read(*of_block) for of_block in blocks]

    def _read(self, logits: Tensor, ids: Tensor, there: Tensor, row: int) -> _Block:
        there = there.to(logits.device)
        ahead, targets = logits[:-1][there], ids[1:].to(logits.device)[there]
        whole = log_partition(ahead)
        likely = torch.zeros(logits.shape[-1], device=logits.device)
        step = max(1, LOSS_CHUNK["cpu" if logits.device.type == "cpu" else "elsewhere"] // logits.shape[-1])
        for some, total in zip(ahead.split(step), whole.split(step), strict=True):
            likely += (some.float() - total[:, None]).exp().sum(0)
        likely[targets] = torch.inf  # what is predicted must be among them
        ids = likely.topk(self.narrow).indices.sort().values
        return _Block(
            there,
            targets,
            float(np.random.default_rng([self.settings.seed, row]).random()),
            self.head.vocabulary(ids),
            places=torch.searchsorted(ids, targets),
            whole=whole,
            narrow=log_partition(ahead.index_select(-1, ids)),
            loss=whole - _picked(ahead, targets),
        )

    def of_lanes(self, run: LanePass, batch: Batch) -> Iterator[tuple[Lane, Array]]:
        """The losses of all lanes that want them: by block of the lane's rows, nats."""
        is_first = list(batch.rows) == [0]
        for lanes in run.ended():
            shares = {lane: PILOT if is_first else self._share(lane) for lane in lanes}
            sampled = [lane for lane in lanes if run.carries(lane) and shares[lane] <= MOST_POSITIONS]
            for lane, loss in self._exact(run, batch, [lane for lane in lanes if lane not in sampled]):
                self._keep(batch, lane, loss, sampling=0.0, positions=1.0)
                yield lane, loss
            if sampled:
                yield from self._estimated(run, batch, {lane: shares[lane] for lane in sampled}, is_first=is_first)

    def _estimated(
        self, run: LanePass, batch: Batch, shares: dict[Lane, float], *, is_first: bool
    ) -> Iterator[tuple[Lane, Array]]:
        def of(lane: Lane) -> list[_Block]:
            return self._blocks if lane.rows is None else [self._blocks[row] for row in lane.rows]

        samples = {lane: [block.sample(share) for block in of(lane)] for lane, share in shares.items()}
        estimates = {
            lane: [block.estimate(of_block) for block, of_block in zip(of(lane), logits, strict=True)]
            for lane, logits in run.logits_on_vocabularies(
                shares, self.head, [each.vocabulary for each in self._blocks]
            )
        }
        tokens = {
            lane: torch.stack([block.tokens(sample) for block, sample in zip(of(lane), samples[lane], strict=True)])
            for lane in shares
        }
        for lane, logits in run.logits_on_tokens(tokens, self.head):
            exact = log_partition(logits).split([len(sample) for sample in samples[lane]])
            read = list(zip(of(lane), estimates.pop(lane), samples[lane], exact, strict=True))
            corrected = [torch.stack(block.corrected(*estimate, *measured)) for block, estimate, *measured in read]
            loss, sampling = torch.stack(corrected, 1).cpu().numpy()
            if is_first and lane.key in self.columns:
                ((block, estimate, *measured),) = read
                self.shares[self.columns[lane.key]] = block.share_needed(*estimate, *measured)
            positions = np.array([len(sample) / max(len(block.loss), 1) for block, _, sample, _ in read])
            self._keep(batch, lane, loss, sampling=sampling, positions=positions)
            yield lane, loss

    def _share(self, lane: Lane) -> float:
        column = self.columns.get(lane.key)
        return 1.0 if column is None else float(self.shares[column])

    def _keep(
        self, batch: Batch, lane: Lane, loss: Array, *, sampling: float | Array, positions: float | Array
    ) -> None:
        if (column := self.columns.get(lane.key)) is not None:
            rows = batch.rows if lane.rows is None else batch.rows[lane.rows.numpy()]
            for name, value in (("loss", loss), ("sampling", sampling), ("positions", positions)):
                self.tables[name][rows, column] = value

    def notes(self) -> list[str]:
        """How the losses were estimated, and what that adds to their standard errors."""
        positions = self.tables["positions"]
        there = positions > 0
        if not there.any():
            return []
        model = np.where(there, self.tables["model"], 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            beside = self.tables["loss"] - self.tables["loss"].sum(0) / model.sum(0) * model
            counts = there.sum(0)
            squared = counts / (counts - 1) * np.square(beside).sum(0)
            factors = 1 / np.sqrt(1 - self.tables["sampling"].sum(0) / squared)
        known = factors[np.isfinite(factors)]
        added = f"by about {np.median(known):.3g}" if known.size else "by what one block does not tell"
        return [
            f"The losses of changed models were estimated: from {self.narrow:,} of the {self.head.stack.vocabulary:,} "
            f"tokens of the vocabulary at all positions, and from all of them at {positions[there].mean():.0%} of the "
            f"positions. That multiplies their standard errors {added}; they hold it already. Exact losses take "
            "exact_losses=True (--exact-losses)."
        ]


def _picked(logits: Tensor, places: Tensor) -> Tensor:
    """One logit of each row: logits [N, V], places [N] -> [N]."""
    return logits.gather(-1, places[:, None])[:, 0].float()
