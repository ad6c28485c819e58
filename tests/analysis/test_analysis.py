"""Whole analyses: what goes wrong gets one message, and the model comes back as it was."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from commands import side_by_side
from depthscope import LayerStack, analyze
from depthscope.errors import AnalysisInterrupted, CorpusError, NonFiniteError, OutOfMemoryError, SettingsError
from models import VOCABULARY, gemma_with_shared_keys_and_values, random_blocks, tiny_llama

BLOCKS = random_blocks(8, 16)
SIZES = {"blocks": BLOCKS, "fit_blocks": 4, "eval_blocks": 4}


def state_of(model: nn.Module) -> list[tuple[object, ...]]:
    modules = [
        (name, id(module), module.training, len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ]
    weights = [(name, id(weight), weight.requires_grad) for name, weight in model.named_parameters()]
    return [*modules, *weights]


@pytest.mark.quick
def test_the_model_is_left_as_it_was() -> None:
    model = tiny_llama().train()
    model.model.layers[1].eval()
    model.model.layers[2].requires_grad_(False)
    before, weights = state_of(model), copy.deepcopy(model.state_dict())
    analyze(model, **SIZES)
    assert state_of(model) == before
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, weights[name])
    assert all(weight.grad is None for weight in model.parameters())


def test_nan_weights_are_named_by_layer() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] = float("nan")
    before = state_of(model)
    with pytest.raises(NonFiniteError, match="layer 2"):
        analyze(model, **SIZES)
    assert state_of(model) == before


def test_nan_embeddings_are_named() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(float("inf"))
    with pytest.raises(NonFiniteError, match="embeddings"):
        analyze(model, **SIZES)


class InterruptingLayer(nn.Module):
    """Raises from its n-th call on, as Ctrl-C would at one."""

    def __init__(self, layer: nn.Module, calls: int, error: BaseException) -> None:
        super().__init__()
        self.layer, self.left, self.error = layer, calls, error

    def forward(self, hidden: torch.Tensor, **kwargs: object) -> torch.Tensor:
        self.left -= 1
        if self.left <= 0:
            raise self.error
        return self.layer(hidden, **kwargs)


@pytest.mark.parametrize("calls", [8, 12, 16, 20, 26])
def test_an_interrupted_analysis_says_what_was_done_and_restores_the_model(calls: int) -> None:
    model = tiny_llama()
    model.model.layers[3] = InterruptingLayer(model.model.layers[3], calls, KeyboardInterrupt())
    before = state_of(model)
    with pytest.raises(AnalysisInterrupted, match=r"Interrupted while at .+: [0-4] of 4 blocks had been measured"):
        analyze(model, **SIZES, batch_size=1)
    assert state_of(model) == before


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("MPS backend out of memory (MPS allocated: 9.00 GB). Tried to allocate 2.00 GB on private pool."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError(),
    ],
)
def test_running_out_of_memory_says_what_to_lower(error: BaseException) -> None:
    model = tiny_llama()
    model.model.layers[3] = InterruptingLayer(model.model.layers[3], 17, error)
    with pytest.raises(OutOfMemoryError, match=r"Lower batch_size \(now 2\) or block_size \(16\)"):
        analyze(model, **SIZES, batch_size=2)


def test_another_error_of_the_model_is_not_dressed_up() -> None:
    model = tiny_llama()
    model.model.layers[3] = InterruptingLayer(model.model.layers[3], 20, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        analyze(model, **SIZES, batch_size=1)


def test_one_block_has_no_standard_errors() -> None:
    report = analyze(tiny_llama(), blocks=BLOCKS, fit_blocks=4, eval_blocks=1)
    assert report.scores["loss"] > 0
    assert report.scores["loss_se"] is None
    assert report.layers[0]["skip_ratio_se"] is None
    assert any("no standard error" in note for note in report.notes)


def test_too_few_blocks_are_refused() -> None:
    with pytest.raises(CorpusError, match="8 blocks were given, but fit_blocks=6 and eval_blocks=4 need 10"):
        analyze(tiny_llama(), blocks=BLOCKS, fit_blocks=6, eval_blocks=4)


def test_ids_beyond_the_vocabulary_are_refused() -> None:
    with pytest.raises(CorpusError, match="vocabulary"):
        analyze(tiny_llama(), blocks=BLOCKS + 100, fit_blocks=4, eval_blocks=4)


def test_blocks_longer_than_the_models_positions_are_refused() -> None:
    with pytest.raises(SettingsError, match="block_size is 16, but the model has 8 positions"):
        analyze(tiny_llama(max_position_embeddings=8), **SIZES)


def test_a_fit_on_few_tokens_is_noted() -> None:
    report = analyze(tiny_llama(), blocks=BLOCKS, fit_blocks=1, eval_blocks=2, scores="usefulness")
    assert any("Raise fit_blocks" in note for note in report.notes)
    assert report.scores["usefulness_ratio"] > 0


def test_tied_weights_are_counted_once_and_scored() -> None:
    report = analyze(tiny_llama(tie_word_embeddings=True), **SIZES)
    untied = analyze(tiny_llama(), **SIZES)
    assert untied.model["num_parameters"] - report.model["num_parameters"] == 90 * 24


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_nearly_the_scores_of_float32(dtype: torch.dtype) -> None:
    model = tiny_llama()
    full, half = analyze(model, **SIZES), analyze(copy.deepcopy(model).to(dtype), **SIZES)
    assert half.model["dtype"] == str(dtype).removeprefix("torch.")
    for name in ("loss", "skip_ratio", "usefulness_ratio", "causal", "jacobian", "variance"):
        assert half.scores[name] == pytest.approx(full.scores[name], rel=0.05), name


@pytest.mark.quick
def test_a_single_layer_is_analysed() -> None:
    report = analyze(tiny_llama(num_layers=1), **SIZES)
    assert report.scores["causal"] is None
    assert report.scores["permutation"] is None
    assert report.scores["skip_ratio"] > 0
    assert report.pairs["causal"] == [[None]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scores": "usefulnes"}, "unknown score 'usefulnes'; choose from variance"),
        ({"scores": ()}, "no score was chosen"),
        ({"pairs": "some"}, 'give "all", "adjacent", or the share'),
        ({"pairs": 1.5}, "between 0 and 1"),
        ({"probes": 0}, "probes is 0"),
        ({"probes": "all"}, "probes is 'all'"),
        ({"eval_blocks": 0}, "eval_blocks is 0; give a whole number of at least 1"),
        ({"fit_blocks": 0}, "fit_blocks is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"threshold": float("nan")}, "threshold is nan"),
        ({"ridge": -1.0}, "ridge is -1.0"),
        ({"seed": -1}, "seed is -1"),
        ({"eval_block": 4}, "eval_block: not all of these are options"),
    ],
)
def test_a_bad_option_is_refused_by_name(options: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=message.replace("(", r"\(")):
        analyze(tiny_llama(), **{**SIZES, **options})


def test_layers_that_share_keys_and_values_are_analysed_with_gaps() -> None:
    model = gemma_with_shared_keys_and_values()
    needed = LayerStack(model).unskippable
    report = analyze(model, **SIZES)
    for row in report.layers:
        assert (row["skip_ratio"] is None) == (row["layer"] in needed)
        assert row["jacobian"] is not None
    assert any("cannot be skipped" in note for note in report.notes)


SHARED_RUN = """
import json, sys, time, torch
from models import random_blocks, tiny_llama
from depthscope import analyze
from depthscope.processes import Processes
torch.set_num_threads(1)
for name, fit, measured, vocabulary in json.loads(sys.argv[1]):
    sizes = {"fit_blocks": fit, "eval_blocks": measured}
    report = analyze(tiny_llama(vocab_size=vocabulary), blocks=random_blocks(12, 16), **sizes, progress=False)
    if Processes.here().is_main:
        report.save(name)
# Each process has a clock of its own, on which a pass through a layer takes one second a block or a thousand.
now, pace = [0.0], 1 if Processes.here().is_main else 1000
time.monotonic = lambda: now[0]
for name, options in json.loads(sys.argv[2]):
    model, partial = tiny_llama(), []
    model.model.layers[3].register_forward_hook(lambda *ran: now.__setitem__(0, now[0] + pace * len(ran[1][0])))
    sizes = {"fit_blocks": 2, "on_partial": partial.append}
    report = analyze(model, blocks=random_blocks(12, 16).repeat(3, 1), progress=False, **sizes, **options)
    if Processes.here().is_main:
        report.model_copy(update={"notes": [str(part.data["eval_blocks"]) for part in partial]}).save(name)
    else:
        assert not partial
"""


LARGE = 8192  # a vocabulary over which losses are estimated


@pytest.mark.parametrize(
    ("processes", "sizes"),
    [(2, [(5, 7, VOCABULARY)]), (3, [(5, 7, VOCABULARY), (2, 2, VOCABULARY), (4, 8, LARGE)])],
)
def test_processes_share_the_work_and_agree_with_one(
    tmp_path: Path, processes: int, sizes: list[tuple[int, int, int]]
) -> None:
    script = tmp_path / "run.py"
    script.write_text(SHARED_RUN)
    files = [tmp_path / f"{fit}-{measured}.json" for fit, measured, _ in sizes]
    runs = json.dumps([(str(out), *both) for out, both in zip(files, sizes, strict=True)])
    bounded: dict[str, dict[str, Any]] = {
        "time": {"budget": 90, "scores": "variance,skip,usefulness"},
        "precision": {"precision": 0.04},
        "blocks": {"precision": 0.0001, "eval_blocks": 5},
    }
    ended = {end: tmp_path / f"{end}.json" for end in bounded}
    for done in side_by_side(processes, script, runs, json.dumps([(str(ended[end]), bounded[end]) for end in bounded])):
        assert done.returncode == 0, done.stderr[-3000:]
    for out, of_run in zip(files, sizes, strict=True):
        is_that_of_one_process(json.loads(out.read_text()), *of_run)
    for end, out in ended.items():
        shared = json.loads(out.read_text())
        assert shared["budget"]["stopped"] == end
        measured = shared["data"]["eval_blocks"]
        assert processes <= measured < 34
        assert int(shared["notes"][-1]) == measured
        is_that_of_one_process(shared, 2, measured, scores=bounded[end].get("scores", "all"))


def is_that_of_one_process(
    shared: dict[str, Any], fit: int, measured: int, vocabulary: int = VOCABULARY, scores: str = "all"
) -> None:
    blocks, model = random_blocks(12, 16).repeat(3, 1), tiny_llama(vocab_size=vocabulary)
    alone = analyze(model, blocks=blocks, fit_blocks=fit, eval_blocks=measured, scores=scores)
    noted = [[note for note in notes if "were estimated" in note] for notes in (alone.notes, shared["notes"])]
    assert len(noted[0]) == (vocabulary == LARGE)
    assert noted[0] == noted[1]
    for name, value in alone.scores.items():
        assert shared["scores"][name] == pytest.approx(value, rel=1e-5, abs=1e-9), name
    for row, other in zip(alone.layers, shared["layers"], strict=True):
        for name, value in row.items():
            assert other[name] == (pytest.approx(value, rel=1e-5, abs=1e-8) if isinstance(value, float) else value)
