"""Every decoder-only model type that transformers maps to a causal language model: found, stood in for, analysed."""

import math
from pathlib import Path

import pytest
import torch
import transformers
from packaging import version

from depthscope import LayerStack, analyze
from depthscope.errors import NoLayerStackError, NotCausalError
from depthscope.layers.lanes.lanes import Lanes
from zoo import NO_PLAIN_STACK, NOT_BUILT, NOT_CAUSAL, decoder_only_types, example_ids, tiny_model

# What layers leave behind for later ones, beside the stream: every experiment runs these models from the start.
NOT_RESUMABLE = {
    "gemma3n_text": "later layers reuse keys and values",
    "hy_v4": "later layers reuse the choice of tokens to attend to",
    "inkling2_text": "later layers attend to the outputs of earlier ones",
    "zaya": "the router's state goes from layer to layer",
}

# Models whose experiments do not run side by side, many in one batch.
NOT_BATCHED = {
    "gemma4": "in turn",
    "gemma4_text": "in turn",
    "gemma4_unified": "in turn",
    "gemma4_unified_text": "in turn",
    "rwkv": "alone",
    **dict.fromkeys(NOT_RESUMABLE, "alone"),
}

ANALYSED = sorted(set(decoder_only_types()) - set(NOT_BUILT) - set(NO_PLAIN_STACK) - set(NOT_CAUSAL))


# The documented counts are those of this version; earlier ones know fewer types, and build some of them differently.
DOCUMENTED = version.parse("5.23")
CURRENT = version.parse(transformers.__version__) >= DOCUMENTED
BUILT_OTHERWISE_BEFORE = {"cohere_compass_text"}
if not CURRENT:
    ANALYSED = [name for name in ANALYSED if name not in BUILT_OTHERWISE_BEFORE]

needs_documented_version = pytest.mark.skipif(not CURRENT, reason=f"the counts are those of transformers {DOCUMENTED}")


@needs_documented_version
def test_the_exceptions_are_few() -> None:
    assert len(ANALYSED) >= 147
    assert len(set(ANALYSED) - set(NOT_BATCHED)) >= 139
    assert set(NOT_BUILT) | set(NO_PLAIN_STACK) | set(NOT_CAUSAL) <= set(decoder_only_types())


@pytest.mark.parametrize("model_type", ANALYSED)
def test_a_model_of_any_type_is_analysed(model_type: str) -> None:
    model = tiny_model(model_type)
    ids = example_ids(model, batch=4, length=12)
    with torch.no_grad():
        stack = LayerStack(model)
        with stack.capture() as seen:
            baseline = stack.logits(ids)
        assert stack.resumable == (model_type not in NOT_RESUMABLE)
        assert Lanes(stack).way == NOT_BATCHED.get(model_type, "batched")
        if stack.resumable:
            torch.testing.assert_close(_resumed(stack, ids, seen.resid_pre), baseline, atol=1e-4, rtol=1e-4)
        _skip_replace_and_swap(stack, ids, seen.resid_pre, seen.resid_post, baseline)
    report = analyze(model, blocks=ids, fit_blocks=2, eval_blocks=2, probes=2)
    _is_whole(report, stack)


@pytest.mark.parametrize("model_type", sorted(NO_PLAIN_STACK))
def test_a_type_without_a_plain_stack_is_refused_by_name(model_type: str) -> None:
    with pytest.raises(NoLayerStackError):
        LayerStack(tiny_model(model_type))


@pytest.mark.parametrize("model_type", sorted(NOT_CAUSAL))
def test_a_type_that_looks_ahead_is_refused_as_such(model_type: str) -> None:
    with pytest.raises(NotCausalError):
        LayerStack(tiny_model(model_type))


def _resumed(stack: LayerStack, ids: torch.Tensor, kept: dict[int, torch.Tensor]) -> torch.Tensor:
    middle = stack.num_layers // 2
    with stack.resume_from(middle, kept[middle]):
        return stack.logits(ids)


def _skip_replace_and_swap(
    stack: LayerStack,
    ids: torch.Tensor,
    inputs: dict[int, torch.Tensor],
    outputs: dict[int, torch.Tensor],
    baseline: torch.Tensor,
) -> None:
    for layer in set(range(stack.num_layers)) - set(stack.unskippable):
        with stack.skipping(layer), stack.capture() as seen:
            stack.logits(ids)
        assert torch.equal(stack.flat(seen.resid_post[layer]), stack.flat(seen.resid_pre[layer]))
    flat = stack.flat(inputs[1])
    assert flat.shape == (*ids.shape, stack.width)
    torch.testing.assert_close(stack.unflat(flat), inputs[1])
    for first in range(stack.num_layers - 1):
        if stack.layer_types[first] == stack.layer_types[first + 1]:
            with stack.swapped(first, first + 1):
                stack.logits(ids)
    torch.testing.assert_close(stack.logits(ids), baseline)


def _is_whole(report, stack: LayerStack) -> None:
    assert len(report.layers) == stack.num_layers
    assert math.isfinite(report.scores["loss"])
    everywhere = ("variance", "jacobian", "block_influence", "update_norm")
    by_replacing = ("usefulness_ratio", "skip_ratio")
    for row in report.layers:
        lost = row["layer"] in stack.unskippable
        for name in everywhere:
            assert row[name] is not None, (row["layer"], name)
        for name in by_replacing:
            assert (row[name] is None) == lost, (row["layer"], name)
        assert lost or row["layer"] == stack.num_layers - 1 or row["causal"] is not None


@needs_documented_version
def test_a_type_that_runs_in_float32_only_is_refused_in_words_that_say_so() -> None:
    model = tiny_model("xlstm").to(torch.bfloat16)
    with pytest.raises(NoLayerStackError, match="holds weights in bfloat16: some models run in float32 only"):
        LayerStack(model)


def test_the_documentation_names_every_exception() -> None:
    documented = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    for model_type in (*NOT_BUILT, *NO_PLAIN_STACK, *NOT_CAUSAL, *NOT_RESUMABLE):
        assert f"`{model_type}`" in documented
    assert f"analyse {len(ANALYSED)} of them" in " ".join(documented.split())
