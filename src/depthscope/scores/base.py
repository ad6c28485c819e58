"""What all scores share: a batch of blocks with its baseline pass, sums over tokens kept by block, and their values.

A score never keeps means. It keeps, for every evaluation block, the sums that its formula is made of, and `finish`
turns totals over blocks into values. So the same `finish` gives the score (all blocks) and its standard error (leaving
one block out at a time), and neither depends on the batch size or on how many processes shared the blocks.

The errors are those of the delete-one jackknife. With `f` the function from totals over n blocks to a value and
`f_(-b)` its value when block b is left out,

    se^2 = (n - 1) / n * sum over b of (f_(-b) - mean of f_(-b))^2.

It serves means, ratios of sums, absolute values and norms alike. One block tells no error: NaN. Rows of the sums may be
groups of consecutive blocks, which are left out together.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from copy import copy
from dataclasses import dataclass, field, fields

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

from depthscope.layers.lanes.lane import Lane, Step
from depthscope.layers.lanes.sublayers import sublayers_of
from depthscope.layers.precision import precise, wide
from depthscope.layers.stack import LayerStack
from depthscope.layers.tracing import output_embeddings
from depthscope.scores.work import Extent, own_work
from depthscope.settings import Settings
from depthscope.text.blocks import Blocks

Array = np.ndarray
Sums = Mapping[str, Array]

# Elements of logits that are turned into losses at once: on a CPU few enough to stay in its cache, elsewhere so many
# that starting the work is not what takes the time.
LOSS_CHUNK = {"cpu": 1 << 21, "elsewhere": 1 << 27}

# Elements of a stream that one thread of a CPU reads at once, so few that they stay in its cache from step to step.
STREAM_CHUNK = 1 << 16


@dataclass
class Values:
    """What a score comes to: single numbers, one per layer [L], one per pair of layers [L, L]; NaN where undefined."""

    scores: dict[str, Array | float] = field(default_factory=dict)
    layers: dict[str, Array] = field(default_factory=dict)
    pairs: dict[str, Array] = field(default_factory=dict)


@dataclass
class Batch:
    """A batch of evaluation blocks and what the model did on it before anything was changed."""

    rows: Array  # [B] which evaluation blocks these are
    blocks: Blocks
    token_mask: Tensor  # [B, T] the tokens that count
    target_mask: Tensor  # [B, T - 1] the predictions that count
    loss: Array  # [B] sum of the next-token losses of each block, nats
    # Where a score reads the states of all layers, else empty:
    resid_pre: dict[int, Tensor] = field(default_factory=dict)  # layer -> residual stream before it

    @classmethod
    def of(cls, blocks: Blocks, rows: Array) -> "Batch":
        """A batch whose baseline pass has not run yet."""
        tokens, mask = blocks.token_mask, blocks.attention_mask
        # A prediction counts where it is made at a token that counts, of a token that is there.
        targets = tokens[:, :-1] & (tokens[:, 1:] if mask is None else mask[:, 1:].bool())
        return cls(rows, blocks, tokens, targets, np.full(len(rows), np.nan))

    def token_sums(self, per_token: Tensor) -> Tensor:
        """Sum a quantity [..., B, T] over the tokens that count: [..., B], in float64, on its device if that has it."""
        return precise(torch.where(self.token_mask.to(per_token.device), per_token, 0)).sum(-1)

    def masked_sum(self, per_token: Tensor) -> Array:
        """The same, as an array."""
        return self.token_sums(per_token).cpu().numpy()


class Score(ABC):
    """One score over a layer stack.

    Class attributes:
        name: of its record in `depthscope.report.measures`.
        experiments: it runs the model with something changed, or wants such runs.
        states: it reads the baseline's residual stream at all layers. What looks at one layer at a time gets that
            layer's in `observe`, and none is kept.
        parts: it wants to see, in `observe_part`, what attention and MLP return.
    """

    name: str
    experiments = False
    parts = False
    states = False

    def __init__(self, stack: LayerStack, settings: Settings, num_blocks: int) -> None:
        self.stack = stack
        self.settings = settings
        self.num_blocks = num_blocks
        self.extent = extent_of(stack, experiments=self.experiments, sublayers=settings.sublayers)
        self.sums: dict[str, Array] = {}

    def work(self) -> float:
        """How much it takes for one block, in forward passes of one layer, beyond what the scores share.

        `depthscope.scores.work` says it by the score's name, also for a model that is not loaded.
        """
        return own_work(self.name, self.extent, self.settings)

    def observe(self, batch: Batch, layer: int, before: Tensor, after: Tensor) -> None:
        """See the stream before and after a layer, in the model's own layout, while the baseline pass of a batch runs.

        It comes once for each layer, before `measure`; the loss is not known yet. The tensors are the model's own and
        may change when the next layer runs.
        """
        return

    def observe_part(self, batch: Batch, layer: int, part: str, output: Tensor) -> None:
        """See what the "attention" or the "mlp" of a layer returned, in the same pass."""
        return

    def measure(self, batch: Batch, tick: Callable[[float], None]) -> None:
        """Add a batch to the sums, running what it takes beside lanes; `tick` counts the work done."""
        return

    def lanes(self, rows: Array) -> Iterable[Lane]:
        """The experiments that it wants of the evaluation blocks `rows`; those of equal keys are run once."""
        return ()

    def measure_step(self, batch: Batch, step: Step) -> None:
        """Add what passes a layer in lanes that it wanted watched."""
        return

    def measure_loss(self, batch: Batch, lane: Lane, loss: Array) -> None:
        """Add the losses of a lane of which it wanted the logits: by block, of the lane's rows, nats."""
        return

    @property
    def waits(self) -> bool:
        """Whether how it measures a block depends on the number of blocks, so that this must be known before."""
        return False

    def of_first(self, count: int) -> Self:
        """The score of the first `count` blocks, with sums of its own."""
        first = copy(self)
        first.num_blocks = count
        first.sums = {name: table[:count].copy() for name, table in self.sums.items()}
        return first

    @abstractmethod
    def finish(self, sums: Sums) -> Values:
        """Turn totals over blocks into values."""

    def notes(self) -> list[str]:
        """What a reader of the report must know of the score, in sentences."""
        return []

    def table(self, name: str, *shape: int, rows: int | None = None) -> Array:
        """The sums called `name`: one row [*shape] a block, zero at first."""
        if name not in self.sums:
            self.sums[name] = np.zeros((rows or self.num_blocks, *shape))
        return self.sums[name]


class PerToken(Score):
    """A score that is a sum over tokens of something read off the stream before and after one layer.

    It is read while the baseline pass runs, as each layer returns, so that no state is kept. `finish` gets sums [L] by
    the names that `read` gives them, and the number of "tokens".
    """

    def __init__(self, stack: LayerStack, settings: Settings, num_blocks: int) -> None:
        super().__init__(stack, settings, num_blocks)
        self._seen: dict[str, dict[int, Tensor]] = {}  # of the running pass: name -> layer -> sums [B]

    def read(self, before: Tensor, after: Tensor) -> dict[str, Tensor]:
        """What to sum over tokens: streams [n, S, d] of n tokens, in at least float32 -> [n] by name."""
        raise NotImplementedError

    def observe(self, batch: Batch, layer: int, before: Tensor, after: Tensor) -> None:
        """Read one layer."""
        one, other = (self.stack.features(stream).flatten(0, 1) for stream in (before, after))
        for name, per_token in by_chunk(self.read, one, other).items():
            self.keep(batch, layer, name, per_token.view(batch.token_mask.shape))

    def keep(self, batch: Batch, layer: int, name: str, per_token: Tensor) -> None:
        """Sum a quantity [B, T] of a layer over the tokens that count; the sums stay on its device for now."""
        self._seen.setdefault(name, {})[layer] = batch.token_sums(per_token)

    def measure(self, batch: Batch, tick: Callable[[float], None]) -> None:
        """Fetch the sums of the pass: one transfer a quantity."""
        self.table("tokens")[batch.rows] = batch.token_mask.sum(1).cpu().numpy()
        for name, of_layers in self._seen.items():
            layers, sums = list(of_layers), list(of_layers.values())
            fetched = torch.stack([each.to(sums[0].device) for each in sums], 1).cpu().numpy()  # [B, layers]
            self.table(name, self.stack.num_layers)[batch.rows[:, None], layers] = fetched
        self._seen = {}


def block_losses(logits: Tensor, input_ids: Tensor, target_mask: Tensor) -> Array:
    """Sum each block's next-token cross-entropy: logits [B, T, V], ids [B, T], mask [B, T - 1] -> [B], nats.

    Computed in float32 and summed in float64, a few positions at a time: the whole of the logits in float32, once more,
    would be the largest tensor of an analysis.
    """
    targets, mask = input_ids[:, 1:].clamp_min(0).to(logits.device), target_mask.to(logits.device)  # placeholders
    totals = []
    for row, aim, keep in zip(logits[:, :-1], targets, mask, strict=True):
        losses = log_partition(row) - row.gather(-1, aim[:, None])[:, 0].float()
        totals.append(precise(torch.where(keep, losses, 0)).sum())
    return torch.stack(totals).cpu().numpy()


def log_partition(logits: Tensor) -> Tensor:
    """The log of the sum of exponentials: logits [N, V] -> [N], float32, a few rows at a time."""
    chunk = LOSS_CHUNK["cpu" if logits.device.type == "cpu" else "elsewhere"]
    parts = logits.split(max(1, chunk // logits.shape[-1]))
    return torch.cat([torch.logsumexp(part.float(), -1) for part in parts])


def by_chunk(read: Callable[..., dict[str, Tensor]], *streams: Tensor) -> dict[str, Tensor]:
    """Apply `read` to streams [n, ...], a few tokens at a time on a CPU, whose cache they fit: name -> [n]."""
    rows = len(streams[0])
    if streams[0].device.type == "cpu":
        rows = max(1, STREAM_CHUNK * torch.get_num_threads() // streams[0][0].numel())
    parts = [read(*map(wide, chunk)) for chunk in zip(*(stream.split(rows) for stream in streams), strict=True)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def head_work(stack: LayerStack) -> float:
    """What head and loss cost, in forward passes of one layer: an estimate by their parameters, for progress."""
    head = output_embeddings(stack.model)
    of_layer = sum(weight.numel() for weight in stack.layers.parameters()) / stack.num_layers
    of_head = sum(weight.numel() for weight in head.parameters()) if head is not None else 0
    return of_head / max(of_layer, 1)


def extent_of(stack: LayerStack, *, experiments: bool, sublayers: bool = False) -> Extent:
    """What the work of an analysis of this stack depends on; whether it can resume is tried for experiments only."""
    resumable = stack.resumable if experiments else True
    parts = None
    if experiments and sublayers:
        of_layers = [part.layer for part in sublayers_of(stack).usable]
        parts = tuple(map(of_layers.count, range(stack.num_layers)))
    size = (stack.num_layers, stack.width, head_work(stack))
    return Extent(*size, stack.layer_types, resumable, vocabulary=stack.vocabulary, parts=parts)


def ratio(above: Array, below: Array) -> Array:
    """Divide, with NaN where there is nothing to divide by."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(below != 0, above / np.where(below != 0, below, 1), np.nan)


def mean(values: Array) -> float:
    """The mean of what is defined; NaN if nothing is."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else float("nan")


def effective_depth(ratios: Array) -> float:
    """The participation ratio of the loss increases, `(sum e)^2 / sum e^2` with `e = max(ratio - 1, 0)`.

    It is L when all layers matter alike, 1 when one layer does all the work, 0 when none does, and NaN where no layer
    has a ratio.
    """
    defined = ratios[~np.isnan(ratios)]
    if not defined.size:
        return float("nan")
    increases = np.clip(defined - 1, 0, None)
    squares = float((increases**2).sum())
    return float(increases.sum() ** 2 / squares) if squares else 0.0


def values_with_errors(finish: Callable[[Sums], Values], tables: Mapping[str, Array]) -> tuple[Values, Values]:
    """The values from all blocks, and their standard errors.

    Args:
        finish: totals over blocks -> values.
        tables: sums, one row [...] a block (or group of blocks), the same number of rows in each.
    """
    totals = {name: table.sum(0) for name, table in tables.items()}
    values = finish(totals)
    (count,) = {len(table) for table in tables.values()}
    left_out = range(count) if count > 1 else ()  # without its only block nothing is left to finish
    without = [finish({name: totals[name] - table[block] for name, table in tables.items()}) for block in left_out]
    errors = Values()
    for part in fields(Values):
        for key, value in getattr(values, part.name).items():
            getattr(errors, part.name)[key] = jackknife([getattr(each, part.name)[key] for each in without], value)
    return values, errors


def jackknife(without: list[Array | float], value: Array | float) -> Array:
    """The standard error of a value from what it is without each block; NaN from fewer than two."""
    if len(without) < 2:
        return np.full(np.shape(value), np.nan)
    each, count = np.array(without, dtype=float), len(without)
    return np.sqrt((count - 1) / count * np.square(each - each.mean(0)).sum(0))
