"""Lanes: experiments beside the model's own pass give what each gives in a pass of its own."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from depthscope import LayerStack, analyze
from depthscope.layers.lanes.lane import Lane, Step
from depthscope.layers.lanes.lanes import Lanes, Way
from depthscope.layers.stand_ins import Moved, PassThrough
from zoo import example_ids, tiny_model

LAYERS, BATCH, TOKENS = 4, 3, 10


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def padded(ids: Tensor) -> Tensor:
    """A mask that leaves out the first tokens of the first sequence."""
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return mask


def experiments(stack: LayerStack) -> list[Lane]:
    halved = nn.Linear(stack.width, stack.width, bias=False)
    halved.weight.copy_(torch.eye(stack.width) / 2)
    layers = stack.layers
    rows = torch.tensor([0, 2])
    return [
        *(Lane(("skip", index), {index: PassThrough()}, logits=True, watched=True) for index in range(LAYERS)),
        Lane("halved", {1: halved}, logits=True),
        Lane("two", {1: PassThrough(), 3: halved}, rows, logits=True),
        Lane("swapped", {0: Moved(layers[2]), 2: Moved(layers[0])}, torch.tensor([1]), logits=True),
        Lane("watched only", {2: PassThrough()}, watched=True),
    ]


def alone(stack: LayerStack, lane: Lane, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, dict[int, Any]]:
    """What an experiment gives in a pass of its own, from the start."""
    rows = slice(None) if lane.rows is None else lane.rows
    with stack.replacing(lane.replacements), stack.capture() as seen:
        logits = stack.logits(ids[rows], None if mask is None else mask[rows])
    streams = {index: (seen.resid_pre[index], seen.resid_post[index]) for index in range(lane.start + 1, LAYERS)}
    return logits, streams


@pytest.mark.parametrize("has_padding", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "bloom", "gemma3_text", "mixtral", "jamba"])
@pytest.mark.parametrize("way", ["batched", "in turn", "alone"])
@pytest.mark.parametrize("limits", [{}, {"state_bytes": 1, "chunk_tokens": 1, "logits_bytes": 1}])
def test_lanes_give_what_each_experiment_gives_alone(
    model_type: str, way: Way, limits: dict[str, int], has_padding: bool
) -> None:
    model = tiny_model(model_type, num_layers=LAYERS).eval()
    stack, ids = LayerStack(model), example_ids(model, batch=BATCH, length=TOKENS)
    mask = padded(ids) if has_padding else None
    lanes = Lanes(stack, way)
    for name, value in limits.items():
        setattr(lanes.limits, name, value)
    wanted, seen = experiments(stack), {}

    def observe(step: Step) -> None:
        for number, lane in enumerate(step.lanes):
            part = slice(number * BATCH, (number + 1) * BATCH)
            seen[lane.key, step.layer] = step.resid_pre[part].clone(), step.resid_post[part].clone()

    own, _ = alone(stack, Lane("own", {LAYERS - 1: stack.layers[LAYERS - 1]}), ids, mask)
    run = lanes.over(ids, mask, wanted, observe=observe)
    with run.beside():
        assert torch.equal(stack.logits(ids, mask), own), "the model's own pass is as it was"
    results = {lane.key: logits for lane, logits in run.logits()}
    assert set(results) == {lane.key for lane in wanted if lane.logits}
    here = slice(None) if mask is None else mask[:, :, None].bool()
    for lane in wanted:
        logits, streams = alone(stack, lane, ids, mask)
        if lane.logits:
            keep = torch.ones(TOKENS, dtype=torch.bool) if mask is None else torch.arange(TOKENS) >= 3
            torch.testing.assert_close(results[lane.key][:, keep], logits[:, keep], atol=2e-5, rtol=2e-5)
        if lane.watched:
            assert {layer for key, layer in seen if key == lane.key} == set(streams)
            for layer, expected in streams.items():
                for stream, one in zip(seen[lane.key, layer], expected, strict=True):
                    if mask is not None:
                        stream, one = torch.where(here, stream, 0), torch.where(here, one, 0)
                    torch.testing.assert_close(stream, one, atol=2e-5, rtol=2e-5)


class ShortOfMemory(nn.Module):
    """A layer that runs out of memory when it gets more than some sequences at once."""

    def __init__(self, layer: nn.Module, most: int) -> None:
        super().__init__()
        self.layer, self.most, self.largest = layer, most, 0

    def forward(self, hidden: Tensor, **kwargs: Any) -> Any:
        if len(hidden) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        self.largest = max(self.largest, len(hidden))
        return self.layer(hidden, **kwargs)


def test_fewer_lanes_run_at_once_where_memory_runs_out_and_the_report_says_so() -> None:
    model = tiny_model("llama", num_layers=6).eval()
    settings = {"blocks": example_ids(model, batch=4, length=16), "fit_blocks": 2, "eval_blocks": 2, "batch_size": 1}
    short = model.model.layers[5] = ShortOfMemory(model.model.layers[5], most=100)
    expected = analyze(model, **settings, scores="skip,causal,permutation", progress=False)
    assert short.largest > 7
    assert not any("Memory ran out" in note for note in expected.notes)
    short.most, short.largest = 7, 0
    report = analyze(model, **settings, scores="skip,causal,permutation", progress=False)
    assert 4 <= short.largest <= 7
    assert [note for note in report.notes if "Memory ran out" in note]
    for name, value in expected.scores.items():
        assert report.scores[name] == pytest.approx(value, rel=1e-5)


def test_one_lane_that_is_not_finite_leaves_the_others_as_they_are() -> None:
    model = tiny_model("llama", num_layers=LAYERS).eval()
    stack, ids = LayerStack(model), example_ids(model, batch=BATCH, length=TOKENS)
    broken = nn.Linear(stack.width, stack.width)
    broken.weight.fill_(float("nan"))
    skipped = Lane("skipped", {1: PassThrough()}, logits=True)
    run = Lanes(stack, "batched").over(ids, None, [Lane("broken", {1: broken}, logits=True), skipped])
    with run.beside():
        assert torch.isfinite(stack.logits(ids)).all()
    results = {lane.key: logits for lane, logits in run.logits()}
    assert results["broken"].isnan().all()
    torch.testing.assert_close(results["skipped"], alone(stack, skipped, ids, None)[0])


def test_the_model_is_restored_whatever_happens_beside_it() -> None:
    model = tiny_model("llama", num_layers=LAYERS).eval()
    stack, ids = LayerStack(model), example_ids(model, batch=BATCH, length=TOKENS)
    before, layers = stack.logits(ids), list(stack.layers)

    def interrupt(step: Step) -> None:
        raise KeyboardInterrupt

    run = Lanes(stack, "batched").over(ids, None, experiments(stack), observe=interrupt)
    with pytest.raises(KeyboardInterrupt), run.beside():
        stack.logits(ids)
    assert list(stack.layers) == layers
    assert torch.equal(stack.logits(ids), before)


def test_each_layer_is_called_once_for_many_experiments() -> None:
    model = tiny_model("llama", num_layers=LAYERS).eval()
    stack, ids = LayerStack(model), example_ids(model, batch=BATCH, length=TOKENS)
    lanes = Lanes(stack, "batched")
    run = lanes.over(ids, None, [Lane(index, {index: PassThrough()}, logits=True) for index in range(LAYERS)])
    calls: list[int] = []
    handles = [
        layer.register_forward_hook(lambda module, args, result, index=index: calls.append(index))
        for index, layer in enumerate(stack.layers)
    ]
    with run.beside():
        stack.logits(ids)
    assert len(list(run.logits())) == LAYERS
    for handle in handles:
        handle.remove()
    assert [calls.count(index) for index in range(LAYERS)] == [1, 2, 2, 2]
