"""Models larger than memory: layers fetch their weights, each once for many experiments, and the report is the same."""

from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import OffloadedWeightsLoader
from torch import Tensor

from depthscope import LayerReport, LayerStack, analyze
from depthscope.errors import ModelLoadError, SettingsError
from depthscope.layers.offloaded import borrowing_weights, holding_weights, is_offloaded
from depthscope.loading import offloading
from depthscope.loading.load import load_model
from zoo import example_ids, tiny_model

LAYERS = 6
SCORES = "variance,block_influence,skip,causal,usefulness,jacobian"
SIZES: dict[str, Any] = {"fit_blocks": 3, "eval_blocks": 3, "probes": 2, "device": "cpu", "progress": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("llama", tmp_path_factory.mktemp("llama"))


def saved(model_type: str, folder: Path) -> Path:
    tiny_model(model_type, num_layers=LAYERS).save_pretrained(folder)
    return folder


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each weight is fetched."""
    counted: Counter[str] = Counter()
    fetch = OffloadedWeightsLoader.__getitem__

    def counting(self: Any, name: str) -> Tensor:
        counted[name] += 1
        return fetch(self, name)

    monkeypatch.setattr(OffloadedWeightsLoader, "__getitem__", counting)
    return counted


def blocks_for(folder: Path) -> Tensor:
    return example_ids(load_model(folder, device="cpu").model, batch=6, length=20)


def assert_same(report: LayerReport, expected: LayerReport) -> None:
    for name, value in expected.scores.items():
        assert report.scores[name] == pytest.approx(value, rel=1e-6, abs=1e-9), name
    for row, other in zip(report.layers, expected.layers, strict=True):
        for name, value in other.items():
            assert row[name] == (pytest.approx(value, rel=1e-6, abs=1e-9) if isinstance(value, float) else value), name


# Mixtral's experts are stored one by one and used as one tensor, so transformers writes them anew.
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma3_text", "mixtral"])
def test_an_offloaded_model_has_the_same_report(model_type: str, tmp_path: Path) -> None:
    folder = saved(model_type, tmp_path)
    blocks = blocks_for(folder)
    expected = analyze(folder, blocks=blocks, scores=SCORES, **SIZES)
    report = analyze(folder, blocks=blocks, scores=SCORES, offload=True, **SIZES)
    assert_same(report, expected)
    assert [note for note in report.notes if "outside of the device's memory" in note]


def test_weights_are_read_once_for_all_experiments(folder: Path, reads: Counter[str]) -> None:
    blocks = blocks_for(folder)
    analyze(folder, blocks=blocks, scores="variance,skip,causal,usefulness", offload=True, **SIZES)
    # Once for the linear maps, once for everything else; the first layer lends its weights to what is tried before.
    first = {name: count for name, count in reads.items() if ".layers.0." in name}
    others = {name: count for name, count in reads.items() if ".layers.0." not in name}
    assert len(others) == (LAYERS - 1) * len(first)
    assert set(others.values()) == {2}
    assert set(first.values()) == {3}


def test_swaps_are_left_out_with_a_note(folder: Path) -> None:
    blocks = blocks_for(folder)
    report = analyze(folder, blocks=blocks, scores="skip,permutation", offload=True, **SIZES)
    assert report.settings["scores"] == ["skip"]
    assert [note for note in report.notes if "permutation score was left out" in note]
    with pytest.raises(SettingsError, match="permutation score needs the weights of two layers"):
        analyze(folder, blocks=blocks, scores="permutation", offload=True, **SIZES)


def test_a_model_that_does_not_fit_is_offloaded_by_itself(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    monkeypatch.setattr(offloading, "free_memory", lambda device: size)
    assert is_offloaded(load_model(folder, device="cpu", offload=None).model)
    assert not is_offloaded(load_model(folder, device="cpu").model), "only an analysis can do with it"
    monkeypatch.setattr(offloading, "free_memory", lambda device: 10 * size)
    assert not is_offloaded(load_model(folder, device="cpu", offload=None).model)


def test_what_cannot_stay_outside_of_memory_is_refused(folder: Path) -> None:
    with pytest.raises(ModelLoadError, match="cannot stay outside of memory"):
        load_model(folder, device="auto", offload=True)


def test_free_memory_is_known() -> None:
    assert 0 < offloading.free_memory(torch.device("cpu")) < 1 << 50


def test_weights_are_held_and_let_go(folder: Path, reads: Counter[str]) -> None:
    model = load_model(folder, device="cpu", offload=True).model
    stack = LayerStack(model)
    layer, hidden = stack.layers[2], torch.randn(1, 4, stack.width)
    positions = {"position_embeddings": model.model.rotary_emb(hidden, torch.arange(4)[None])}
    expected = layer(hidden, **positions)
    reads.clear()
    with suppress(KeyError), holding_weights(layer):
        for _ in range(3):
            assert torch.equal(layer(hidden, **positions), expected)
        raise KeyError
    assert set(reads.values()) == {1}
    assert all(weight.is_meta for weight in layer.parameters())
    assert torch.equal(layer(hidden, **positions), expected)


def test_borrowed_weights_are_given_back(folder: Path) -> None:
    model = load_model(folder, device="cpu", offload=True).model
    ids = example_ids(model)
    expected = model(ids).logits
    with suppress(KeyError), borrowing_weights(model):
        assert not any(weight.is_meta for weight in model.parameters())
        assert not torch.equal(model(ids).logits, expected)
        raise KeyError
    assert torch.equal(model(ids).logits, expected)
    assert all(weight.is_meta for weight in model.model.layers.parameters())
