"""Models that torch.compile compiled: analysed as they were written, and watched while they train compiled."""

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import compile_regions
from transformers import Trainer

from depthscope import LayerStack, analyze
from depthscope.callbacks import SparsityCallback, VarianceCallback, read_history
from depthscope.errors import AnalysisError
from models import random_blocks, tiny_llama
from runs import Sentences, arguments, trainer

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
        with stack.capture() as seen:
            model(ids)
    assert sorted(seen.resid_post) == [0, 1]


def test_layers_that_were_not_seen_are_an_error() -> None:
    model, ids = tiny_llama(LAYERS), random_blocks(2, 12)
    stack = LayerStack(model)
    with stack.capture() as seen:
        stack.logits(ids)
    model.model.layers = copy.deepcopy(model.model.layers)
    for context in (stack.capture(), stack.resume_from(1, seen.resid_pre[1])):
        with torch.no_grad(), pytest.raises(AnalysisError, match="were not seen"), context:
            stack.logits(ids)


def train(model: Any, folder: Path, callbacks: list[Any]) -> None:
    settings = {"max_steps": 2, "logging_steps": 2, "remove_unused_columns": False}
    trainer(model, folder, callbacks, **settings).train()


# The two that differ most: nothing is seen, and a part.
@pytest.mark.parametrize("way", [whole, first_layers], ids=lambda way: way.__name__)
def test_what_its_owner_compiled_and_trained_before_is_watched_in_training(
    way: Callable[[Any], Any], tmp_path: Path
) -> None:
    start = tiny_llama(LAYERS)
    model = way(copy.deepcopy(start))
    train(model, tmp_path / "before", [])
    with torch.no_grad():
        for weight, original in zip(model.parameters(), start.parameters(), strict=True):
            weight.copy_(original)
    train(model, tmp_path / "compiled", [VarianceCallback(), SparsityCallback()])
    train(start, tmp_path / "plain", [VarianceCallback(), SparsityCallback()])
    for compiled, plain in zip(read_history(tmp_path / "compiled"), read_history(tmp_path / "plain"), strict=True):
        assert compiled["layers"].keys() == plain["layers"].keys()
        assert compiled.get("tokens") == plain.get("tokens")
        for metric, column in plain["layers"].items():
            assert compiled["layers"][metric] == pytest.approx(column, rel=1e-3, abs=1e-5), metric


def test_what_does_not_look_compiled_is_compiled_anew_after_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = hidden(tiny_llama(LAYERS))
    train(model, tmp_path / "before", [])
    train(model, tmp_path / "after", [VarianceCallback()])
    row = read_history(tmp_path / "after")[0]
    assert 0 < row["tokens"] < sum(int(mask.sum()) for mask in Sentences().masks[:8])
    assert not [name for name, column in row["layers"].items() if None in column]
    # And once the callback has gone, nothing of it is called by what was compiled with its hooks.
    called: list[int] = []
    monkeypatch.setattr(VarianceCallback, "_on_layer", lambda self, index, *streams: called.append(index))
    model.train()(**{name: tensor[None] for name, tensor in Sentences()[0].items()})
    assert not called


def test_a_training_whose_layers_cannot_be_seen_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Untrained(Trainer):
        """Trains in evaluation mode: not in training passes."""

        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = model.eval()(**inputs).loss
            loss.backward()
            return loss.detach()

    callbacks = [VarianceCallback(), SparsityCallback()]
    run = Untrained(
        tiny_llama(LAYERS), arguments(tmp_path, max_steps=3), train_dataset=Sentences(), callbacks=callbacks
    )
    with caplog.at_level(logging.WARNING):
        run.train()
    said = [record.getMessage() for record in caplog.records if "has not seen any training pass" in record.getMessage()]
    assert [text.split()[0] for text in said] == ["VarianceCallback", "SparsityCallback"]


def test_watching_does_not_break_the_graph(tmp_path: Path) -> None:
    model = torch.compile(tiny_llama(LAYERS), backend=BACKEND, fullgraph=True)
    train(model, tmp_path, [VarianceCallback(moments_every=1), SparsityCallback()])
    assert [row["kind"] for row in read_history(tmp_path)] == ["variance", "sparsity"]
