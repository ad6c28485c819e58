"""Models that torch.compile compiled: analysed as they were written, and watched while they train compiled."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.utils import compile_regions

from depthscope import AnalysisError, LayerStack, analyze
from models import random_blocks, tiny_llama

LAYERS = 2
BACKEND = "eager"  # what is compiled is the same with all of them, and this one is quick


def whole(model: Any) -> Any:
    return torch.compile(model, backend=BACKEND)


def in_place(model: Any) -> Any:
    model.compile(backend=BACKEND)
    return model


def forward(model: Any) -> Any:
    model.forward = torch.compile(model.forward, backend=BACKEND)
    return model


def decoder(model: Any) -> Any:
    model.model = torch.compile(model.model, backend=BACKEND)
    return model


def each_layer(model: Any) -> Any:
    for index in range(len(model.model.layers)):
        model.model.layers[index] = torch.compile(model.model.layers[index], backend=BACKEND)
    return model


def each_layer_in_place(model: Any) -> Any:
    for layer in model.model.layers:
        layer.compile(backend=BACKEND)
    return model


def first_layers(model: Any) -> Any:
    for index in range(1):
        model.model.layers[index] = torch.compile(model.model.layers[index], backend=BACKEND)
    return model


def sublayers(model: Any) -> Any:
    for layer in model.model.layers:
        layer.self_attn.compile(backend=BACKEND)
        layer.mlp = torch.compile(layer.mlp, backend=BACKEND)
    return model


def regions(model: Any) -> Any:
    return compile_regions(model, backend=BACKEND)


def hidden(model: Any) -> Any:
    """A function inside the model is compiled: nothing on its modules says so."""
    inner = model.model.forward
    compiled = torch.compile(inner, backend=BACKEND)
    model.model.forward = lambda *args, **kwargs: compiled(*args, **kwargs)
    return model


WAYS: list[Callable[[Any], Any]] = [
    whole, in_place, forward, decoder, each_layer, each_layer_in_place, first_layers, sublayers, regions, hidden,
]  # fmt: skip


@pytest.fixture(autouse=True)
def _anew() -> Any:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_compiled_model_is_analysed_as_the_model_that_it_was(way: Callable[[Any], Any]) -> None:
    ids = random_blocks(3, 12)
    options: dict[str, Any] = {"fit_blocks": 1, "eval_blocks": 2, "progress": False}
    options |= {"scores": "variance,skip,usefulness,permutation,attention_sparsity"}
    expected = analyze(tiny_llama(LAYERS), blocks=ids, **options)
    model = way(tiny_llama(LAYERS))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False, return_dict=True)  # as its owner had used it
    found = analyze(model, blocks=ids, **options)
    assert [row["kind"] for row in found.layers] == [row["kind"] for row in expected.layers]
    for row, other in zip(found.layers, expected.layers, strict=True):
        assert {name: row[name] for name in other if name != "kind"} == pytest.approx(
            {name: value for name, value in other.items() if name != "kind"}, rel=1e-4, abs=1e-6
        )
    assert found.model["architecture"] == expected.model["architecture"]
    assert found.model["num_parameters"] == expected.model["num_parameters"]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_inside_a_context_the_model_itself_may_be_called() -> None:
    model, ids = forward(tiny_llama(LAYERS)), random_blocks(2, 12)
    with torch.no_grad():
        model(ids)
        stack = LayerStack(model)
        with stack.capturing() as seen:
            model(ids)
    assert sorted(seen.outputs) == [0, 1]


def test_layers_that_were_not_seen_are_an_error() -> None:
    model, ids = tiny_llama(LAYERS), random_blocks(2, 12)
    stack = LayerStack(model)
    with stack.capturing() as seen:
        stack.logits(ids)
    model.model.layers = copy.deepcopy(model.model.layers)
    for context in (stack.capturing(), stack.resuming_at(1, seen.inputs[1])):
        with torch.no_grad(), pytest.raises(AnalysisError, match="were not seen"), context:
            stack.logits(ids)
