"""The passes over the layers that run lanes: side by side, in turn, or one after the other."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from depthscope.layers.lanes.arguments import learn_arguments
from depthscope.layers.lanes.head import Head, Vocabulary
from depthscope.layers.lanes.lane import Lane, Limits, Step
from depthscope.layers.memory import is_out_of_memory
from depthscope.layers.offloaded import holding_weights
from depthscope.layers.stack import LayerStack
from depthscope.layers.stand_ins import LayerResult, StandIn, hidden_among, hidden_of, with_hidden

__all__ = ["LanePass", "OneByOne"]

Args: TypeAlias = tuple[Any, ...]
Kwargs: TypeAlias = dict[str, Any]
T = TypeVar("T")


class LanePass:
    """The lanes of one batch.

    The pass of the model that is made inside `beside` runs the first lanes, as many as memory holds; `logits` gives
    what they came to, and runs those that are left.
    """

    def __init__(
        self,
        stack: LayerStack,
        limits: Limits,
        batch: tuple[Tensor, Tensor | None],
        lanes: list[Lane],
        observe: Callable[[Step], None] | None,
        tick: Callable[[float], None] | None,
        *,
        is_batched: bool,
    ) -> None:
        self.stack, self.limits = stack, limits
        self.input_ids, self.attention_mask = batch
        self.observe, self.tick = observe or _ignore, tick or _ignore
        self.lanes = sorted(lanes, key=lambda lane: lane.start)
        self._arguments = learn_arguments(stack, *batch) if is_batched else None
        self._groups = self._grouped()
        self._states: dict[Lane, Tensor] = {}
        self._kept: dict[int, Tensor] = {}  # the model's own state where a later group begins

    @property
    def is_batched(self) -> bool:
        """Whether a layer takes several lanes at once."""
        return self._arguments is not None

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Run the first lanes beside the pass of the model that is made inside."""
        with self._beside(self._groups[0], keep={group[0].start for group in self._groups[1:]}):
            yield

    def ended(self) -> Iterator[list[Lane]]:
        """The lanes whose logits are wanted, as many as are at the end of the layers; `beside` must have been left.

        What `logits_of` gives of them can be had until the next ones come.
        """
        for number, group in enumerate(self._groups):
            if number:
                start = group[0].start
                with self._beside(group), self.stack.resume_from(start, self._kept[start]):
                    self.stack.run_through(self.stack.num_layers - 1, self.input_ids, self.attention_mask)
            yield [lane for lane in group if lane.logits]
            self._states.clear()

    def logits(self) -> Iterator[tuple[Lane, Tensor]]:
        """Each lane that wants them with its logits, [R, T, V]; `beside` must have been left."""
        for lanes in self.ended():
            yield from self.logits_of(lanes)

    def logits_of(self, lanes: Iterable[Lane]) -> Iterator[tuple[Lane, Tensor]]:
        """Lanes that `ended` gave, each with its logits [R, T, V]."""
        size = self.input_ids.shape[1] * self.stack.vocabulary
        for lane, logits in self._read(lanes, self._rows, size, lambda lanes: nullcontext()):
            yield lane, logits if self.carries(lane) else logits[lane.rows]

    def logits_on_vocabularies(
        self, lanes: Iterable[Lane], head: Head, vocabularies: Sequence[Vocabulary]
    ) -> Iterator[tuple[Lane, Tensor]]:
        """Lanes that `ended` gave, each with its logits [R, T, K]: of one vocabulary for each sequence of the batch."""
        size = self.input_ids.shape[1] * len(vocabularies[0].ids)
        yield from self._read(
            lanes,
            self._rows,
            size,
            lambda lanes: head.on_vocabularies([vocabularies[row] for row in self._which(lanes).tolist()]),
        )

    def logits_on_tokens(self, tokens: Mapping[Lane, Tensor], head: Head) -> Iterator[tuple[Lane, Tensor]]:
        """Lanes that `ended` gave, each with its logits [M, V] at the M tokens of its mask [R, T], row by row."""
        counts = {lane: int(mask.sum()) for lane, mask in tokens.items()}
        for lane, logits in self._read(
            tokens,
            counts.__getitem__,
            self.stack.vocabulary,
            lambda lanes: head.on_tokens(torch.cat([tokens[lane] for lane in lanes])),
            axis=1,
        ):
            yield lane, logits[0]

    def carries(self, lane: Lane) -> bool:
        """Whether just the sequences of a lane are carried along for it, and not the whole batch."""
        return lane.rows is None or self.is_batched

    def _grouped(self) -> list[list[Lane]]:
        """Lanes in the order of their first layers, in groups whose states fit in memory."""
        groups: list[list[Lane]] = [[]]
        room = self.limits.state_bytes
        for lane in self.lanes:
            size = self._rows(lane) * self.input_ids.shape[1] * self.stack.width * 4
            if groups[-1] and room < size:
                groups.append([])
                room = self.limits.state_bytes
            groups[-1].append(lane)
            room -= size
        return groups

    def _rows(self, lane: Lane) -> int:
        """How many sequences of the batch are carried along for a lane: all, where layers take no others."""
        return len(self.input_ids) if lane.rows is None or not self.is_batched else len(lane.rows)

    def _which(self, lanes: Sequence[Lane]) -> Tensor:
        """The rows of the batch that lanes carry, one lane after the other."""
        every = torch.arange(len(self.input_ids))
        return torch.cat([every if lane.rows is None or not self.is_batched else lane.rows for lane in lanes])

    @contextmanager
    def _beside(self, group: list[Lane], keep: Collection[int] = ()) -> Iterator[None]:
        if not group:
            yield
            return
        layers = enumerate(self.stack.layers)
        with self.stack.replacing({i: _Position(self, i, layer, group, i in keep) for i, layer in layers}):
            yield

    def advance(self, position: "_Position", args: Args, kwargs: Kwargs, before: Tensor, after: Tensor) -> None:
        """Take the lanes through a layer that the model's own rows have just gone through.

        Args:
            position: the layer's place.
            args: what the layer got, by position.
            kwargs: and by name.
            before: the model's own residual stream before the layer.
            after: and after it.
        """
        index, own = position.index, (before, after)
        if position.keep:
            self._kept[index] = before
        unchanged = []
        for lane in position.group:
            if lane.start == index:
                everything = self._rows(lane) == len(self.input_ids)
                self._states[lane] = before if everything else self.stack.select(before, self._which([lane]))
            if index in lane.replacements:
                module = self.stack.bound(lane.replacements[index], index)
                self._run(module, [lane], index, args, kwargs, own)
                self.tick(self._rows(lane) * getattr(module, "layer_forwards", 1))
            elif lane.start < index:
                unchanged.append(lane)
        unchanged.sort(key=lambda lane: not lane.watched)

        def run(lanes: list[Lane]) -> None:
            self._run(position.layer, lanes, index, args, kwargs, own)

        for lanes, _ in self._some_at_a_time(unchanged, self._rows_of_chunk, self._rows, run):
            self.tick(sum(map(self._rows, lanes)))

    def _run(
        self, module: nn.Module, lanes: list[Lane], index: int, args: Args, kwargs: Kwargs, own: tuple[Tensor, Tensor]
    ) -> None:
        """Run some lanes through a module at a layer's place, in one batch."""
        axis, rows = self.stack.batch_axis, [self._rows(lane) for lane in lanes]
        entered = _joined([self._states[lane] for lane in lanes], axis)
        if self._arguments is not None and (len(lanes) > 1 or lanes[0].rows is not None):
            args, kwargs = self._arguments[index].of_rows(args, kwargs, self._which(lanes))
        # Of a layer that writes into what it gets, the model and other lanes must see nothing.
        hidden = entered.clone() if self.stack.changes_in_place else entered
        args, kwargs = with_hidden(args, kwargs, hidden)
        left = hidden_of(module(*args, **kwargs))
        watched = [lane for lane in lanes if lane.watched and lane.start < index]
        if watched:  # they come first
            length = sum(map(self._rows, watched))
            self.observe(Step(watched, index, entered.narrow(axis, 0, length), left.narrow(axis, 0, length), *own))
        self._states.update(zip(lanes, left.split(rows, axis), strict=True))

    def _read(
        self,
        lanes: Iterable[Lane],
        length: Callable[[Lane], int],
        size: int,
        around: Callable[[list[Lane]], AbstractContextManager[None]],
        axis: int = 0,
    ) -> Iterator[tuple[Lane, Tensor]]:
        """The model's own final norm and head on the final states of lanes.

        Args:
            lanes: which.
            length: how much of the result is a lane's: sequences, or tokens.
            size: how many logits belong to one of them.
            around: what the head is run in.
            axis: along which axis of the logits the lanes lie.
        """

        def run(lanes: list[Lane]) -> Tensor:
            which = self._which(lanes)
            states = _joined([self._states[lane] for lane in lanes], self.stack.batch_axis)
            mask = None if self.attention_mask is None else self.attention_mask[which]
            with around(lanes), self.stack.resume_after(self.stack.num_layers - 1, states):
                return self.stack.logits(self.input_ids[which], mask)

        def at_once() -> int:
            return self.limits.logits_bytes // (4 * size)

        for some, logits in self._some_at_a_time(list(lanes), at_once, length, run):
            yield from zip(some, logits.split([length(lane) for lane in some], axis), strict=True)

    def _some_at_a_time(
        self,
        lanes: list[Lane],
        at_once: Callable[[], int],
        length: Callable[[Lane], int],
        run: Callable[[list[Lane]], T],
    ) -> Iterator[tuple[list[Lane], T]]:
        """Do something with lanes, as many as have a length together; with fewer where memory runs out."""
        done = 0
        while done < len(lanes):
            some, room = [lanes[done]], at_once() - length(lanes[done])
            for lane in lanes[done + 1 :]:
                room -= length(lane)
                if room < 0 or not self.is_batched:
                    break
                some.append(lane)
            try:
                result = run(some)
            except (MemoryError, RuntimeError) as error:
                if len(some) == 1 or not is_out_of_memory(error):
                    raise
                self.limits.halve()
                continue
            yield some, result
            done += len(some)

    def _rows_of_chunk(self) -> int:
        return self.limits.chunk_tokens // self.input_ids.shape[1]


class OneByOne(LanePass):
    """Gives each experiment a pass of its own, from its first changed layer where the model can be resumed there."""

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Keep what the model's own pass shows of itself."""
        with self.stack.capture(resid_post=any(lane.watched for lane in self.lanes)) as self._own:
            yield

    def ended(self) -> Iterator[list[Lane]]:
        """Run each experiment."""
        for lane in self.lanes:
            logits = self._experiment(lane)
            if logits is not None:
                self._logits = logits
                yield [lane]

    def logits_of(self, lanes: Iterable[Lane]) -> Iterator[tuple[Lane, Tensor]]:
        """The lane that `ended` gave, with its logits [R, T, V]."""
        for lane in lanes:
            yield lane, self._logits

    def _experiment(self, lane: Lane) -> Tensor | None:
        stack, start, own = self.stack, lane.start, self._own
        ids, mask, hidden = self.input_ids, self.attention_mask, own.resid_pre[start]
        if lane.rows is not None:
            ids, mask, hidden = (
                ids[lane.rows],
                None if mask is None else mask[lane.rows],
                stack.select(hidden, lane.rows),
            )
        with ExitStack() as around:
            around.enter_context(stack.replacing(lane.replacements))
            if stack.resumable:
                around.enter_context(stack.resume_from(start, hidden))
            first = start + 1 if lane.watched else stack.num_layers
            seen = around.enter_context(stack.capture(first=first))
            logits = stack.logits(ids, mask) if lane.logits else None
            if not lane.logits:
                stack.run_through(stack.num_layers - 1, ids, mask)
        for index in sorted(seen.resid_post):
            streams = (seen.resid_pre[index], seen.resid_post[index], own.resid_pre[index], own.resid_post[index])
            self.observe(Step([lane], index, *streams))
        ran = stack.num_layers - (start + 1 if stack.resumable else 1)
        ran += sum(getattr(module, "layer_forwards", 1) for module in lane.replacements.values())
        self.tick(len(ids) * ran)
        return logits


class _Position(StandIn):
    """A layer's place: runs the layer on the model's own rows, then the lanes that have begun."""

    def __init__(self, owner: LanePass, index: int, layer: nn.Module, group: list[Lane], keep: bool) -> None:
        super().__init__(nn.Identity())
        self.index, self.group, self.keep = index, [lane for lane in group if lane.start <= index], keep
        object.__setattr__(self, "layer", layer)  # it stays a submodule of the model alone
        object.__setattr__(self, "owner", owner)

    def forward(self, *args: Any, **kwargs: Any) -> LayerResult:
        """Return what the layer returns."""
        stack = self.owner.stack
        before = hidden_among(args, kwargs)
        before = before.clone() if stack.changes_in_place else before
        with holding_weights(self.layer):
            result: LayerResult = self.layer(*args, **kwargs)
            after = hidden_of(result)
            with stack.aside():
                self.owner.advance(self, args, kwargs, before, after)
        return result


def _joined(states: list[Tensor], axis: int) -> Tensor:
    return states[0] if len(states) == 1 else torch.cat(states, axis)


def _ignore(_: Any) -> None:
    return
