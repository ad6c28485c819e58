"""Attention and MLP alone: their scores against whole runs of the model with a plain hook on the one module."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from typer.testing import CliRunner

import naive
from depthscope import LayerReport, LayerStack, Settings, analyze, compare
from depthscope.cli import app
from depthscope.console.progress import Progress
from depthscope.errors import SettingsError
from depthscope.layers.lanes.sublayers import sublayers_of
from depthscope.views.report_page import render_page
from depthscope.views.terminal import layer_table
from models import random_blocks, tiny_llama
from zoo import example_ids, tiny_model

FIT, EVAL, LENGTH, LAYERS = 8, 3, 16, 3
SCORES = "skip,causal,usefulness"
NAMES = {"attention": {"gpt_neox": "attention", "mamba": "mixer"}, "mlp": {}}
USUAL = {"attention": "self_attn", "mlp": "mlp"}
NUMBERS = [f"{part}_{name}" for part in USUAL for name in ("skip_ratio", "causal", "usefulness_ratio")]


def measured(model_type: str) -> tuple[LayerReport, nn.Module, nn.ModuleList, Tensor]:
    model = tiny_model(model_type, num_layers=LAYERS)
    ids = example_ids(model, batch=FIT + EVAL, length=LENGTH)
    report = analyze(model, blocks=ids, fit_blocks=FIT, eval_blocks=EVAL, scores=SCORES, sublayers=True)
    return report, model, LayerStack(model).layers, ids


def column(report: LayerReport, name: str) -> np.ndarray:
    return np.array(report.column(name), dtype=float)


@contextmanager
def returning(module: nn.Module, function: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
    """Let a module return a function of what it is given and what it returns."""

    def hook(module: nn.Module, args: Any, kwargs: Any, result: Any) -> Any:
        out = function(args[0] if args else kwargs["hidden_states"], result[0] if isinstance(result, tuple) else result)
        return (out, *result[1:]) if isinstance(result, tuple) else out

    handle = module.register_forward_hook(hook, with_kwargs=True)
    yield
    handle.remove()


def assert_is_what_a_hook_gives(
    report: LayerReport, model: nn.Module, layers: nn.ModuleList, ids: Tensor, part: str, name: str
) -> None:
    baseline = naive.loss(model, ids[FIT:])
    before, after = naive.streams(model, layers, ids[FIT:])
    for index, layer in enumerate(layers):
        module = layer.get_submodule(name)
        seen: list[tuple[Tensor, Tensor]] = []

        def keep(given: Tensor, returned: Tensor, seen: list[tuple[Tensor, Tensor]] = seen) -> Tensor:
            seen.append((given.double(), returned.double().view(*given.shape[:-1], -1)))
            return returned

        with returning(module, keep):
            naive.loss(model, ids[:FIT])
        matrix, bias = naive.affine_fit(*(torch.cat(each) for each in zip(*seen, strict=True)))
        with returning(module, lambda given, out, m=matrix, b=bias: (given.double() @ m + b).to(out).view(out.shape)):
            linear = naive.loss(model, ids[FIT:]) / baseline
        with returning(module, lambda given, out: torch.zeros_like(out)):
            skipped = naive.loss(model, ids[FIT:]) / baseline
            less, more = naive.streams(model, layers, ids[FIT:])
        effects = []
        for later in range(index + 1, len(layers)):
            own, then = after[later] - before[later], more[later] - less[later]
            effects.append(((then - own).norm(dim=-1).mean() / own.norm(dim=-1).mean()).item())
        row = report.layers[index]
        assert row[f"{part}_skip_ratio"] == pytest.approx(skipped, rel=1e-5)
        assert row[f"{part}_usefulness_ratio"] == pytest.approx(linear, rel=1e-4)
        assert row[f"{part}_causal"] == (pytest.approx(np.mean(effects), rel=1e-4) if effects else None)
        assert row[f"{part}_skip_ratio_se"] > 0


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox", "mixtral", "gemma3_text"])
def test_attention_and_mlp_alone_are_what_a_plain_hook_on_each_gives(model_type: str) -> None:
    report, *rest = measured(model_type)
    for part, usual in USUAL.items():
        assert_is_what_a_hook_gives(report, *rest, part, NAMES[part].get(model_type, usual))
    parallel = [note for note in report.notes if "are parallel in layers 0-2" in note]
    assert len(parallel) == (model_type == "gpt_neox")
    assert len([note for note in report.notes if note.startswith("sublayers")]) == len(parallel)


@pytest.mark.parametrize("model_type", ["opt", "mamba"])
def test_a_layer_without_a_module_for_its_mlp_has_scores_of_the_other_part_and_a_note(model_type: str) -> None:
    report, *rest = measured(model_type)
    assert_is_what_a_hook_gives(report, *rest, "attention", NAMES["attention"].get(model_type, "self_attn"))
    assert not any(report.has(name) for name in NUMBERS if name.startswith("mlp"))
    (note,) = (note for note in report.notes if note.startswith("sublayers"))
    assert "the MLP of layers 0-2: there is no such module" in note


def test_parts_that_add_the_residual_stream_themselves_have_no_scores_and_one_note() -> None:
    report, *_ = measured("bloom")
    assert not any(report.has(name) for name in NUMBERS)
    assert report.has("skip_ratio")
    (note,) = (note for note in report.notes if note.startswith("sublayers"))
    assert "the attention of layers 0-2, the MLP of layers 0-2" in note
    assert "would cut the stream" in note


@pytest.mark.parametrize("model_type", ["olmoe", "qwen3_moe", "granitemoe"])
def test_the_attention_of_a_model_with_experts_in_its_name_is_not_taken_for_its_mlp(model_type: str) -> None:
    stack = LayerStack(tiny_model(model_type, num_layers=1))
    assert stack.sublayer(0, "attention") is stack.layers[0].self_attn
    mlp = stack.sublayer(0, "mlp")
    assert mlp is not None
    assert mlp in set(stack.layers[0].children()) - {stack.layers[0].self_attn}


@pytest.mark.parametrize("model_type", ["openai-gpt", "deepseek_v4", "gemma3n_text"])
def test_norms_after_a_part_and_parallel_streams_are_no_cut(model_type: str) -> None:
    parts = sublayers_of(LayerStack(tiny_model(model_type, num_layers=2)))
    assert not parts.cutting
    assert [(part.layer, part.name) for part in parts.usable] == [(i, part) for i in (0, 1) for part in USUAL]


def test_a_part_that_returns_zeros_is_not_missed() -> None:
    model = tiny_llama()
    ids = random_blocks(FIT + EVAL, LENGTH)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
        model.model.layers[2].mlp.down_proj.weight.zero_()
    report = analyze(model, blocks=ids, fit_blocks=FIT, eval_blocks=EVAL, scores=SCORES, sublayers=True)
    for name, layer in (("attention", 1), ("mlp", 2)):
        row = report.layers[layer]
        assert row[f"{name}_skip_ratio"] == pytest.approx(1, abs=1e-6)
        assert row[f"{name}_usefulness_ratio"] == pytest.approx(1, abs=1e-6)
        assert row[f"{name}_causal"] == pytest.approx(0, abs=1e-5)
        assert abs(report.layers[layer + 1 - 2 * (layer == 2)][f"{name}_skip_ratio"] - 1) > 1e-4
    assert report.notes == []


@pytest.fixture(scope="module")
def pair() -> tuple[LayerReport, LayerReport]:
    model, ids = tiny_llama(), random_blocks(FIT + EVAL, LENGTH)
    options = {"blocks": ids, "fit_blocks": FIT, "eval_blocks": EVAL, "scores": SCORES}
    return analyze(copy.deepcopy(model), **options), analyze(model, **options, sublayers=True)


def test_the_other_scores_are_the_same_with_sublayers(pair: tuple[LayerReport, LayerReport]) -> None:
    without, with_parts = pair
    for plain, row in zip(without.layers, with_parts.layers, strict=True):
        assert not any(name.startswith(("attention", "mlp")) for name in plain)
        rest = {name: value for name, value in row.items() if name in plain}
        assert rest == {
            name: value if isinstance(value, str) else pytest.approx(value) for name, value in plain.items()
        }
        assert set(row) - set(plain) == {column for name in NUMBERS for column in (name, f"{name}_se")}
    assert without.settings == {**with_parts.settings, "sublayers": False}
    assert without.pairs.keys() == with_parts.pairs.keys()


def table(report: LayerReport) -> str:
    console = Console(width=400)
    with console.capture() as shown:
        console.print(layer_table(report))
    return shown.get()


def test_what_is_shown_has_the_parts_where_they_were_asked_for(pair: tuple[LayerReport, LayerReport]) -> None:
    without, with_parts = pair
    assert LayerReport.from_json(with_parts.to_json()) == with_parts
    for shown in (table, render_page, LayerReport.to_markdown):
        for heading in ("attn skip", "MLP linear") if shown is table else ("attention skip ratio", "MLP causal"):
            assert heading not in shown(without)
            assert heading in shown(with_parts)
    assert not compare([without, with_parts]).warnings
    assert set(NUMBERS) <= set(compare([with_parts, with_parts]).layer_scores)


def test_the_share_of_the_work_that_is_done_ends_at_all_of_it() -> None:
    shares: list[float] = []
    model = tiny_model("opt", num_layers=LAYERS)  # one part a layer
    ids = example_ids(model, batch=FIT + EVAL, length=LENGTH)
    options = {"fit_blocks": FIT, "eval_blocks": EVAL, "scores": SCORES, "sublayers": True}
    done: list[float] = []
    advance = Progress.advance

    def counting(self: Progress, amount: float) -> None:
        done.append(amount)
        advance(self, amount)
        shares.append(self.done / self.total)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "advance", counting)
        analyze(model, blocks=ids, **options)
    assert sum(done) > 0
    assert shares[-1] == pytest.approx(1)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"scores": "variance,permutation"}, "without any of the scores that it is for"),
        ({"paper_code": True}, "whole layers only"),
        ({"sublayers": "yes"}, "give True or False"),
    ],
)
def test_sublayers_that_nothing_could_be_measured_of_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(SettingsError, match=reason):
        Settings(**{"sublayers": True, **options})


def test_the_command_measures_them_with_its_flag(tmp_path: Any) -> None:
    refused = CliRunner().invoke(app, ["analyze", str(tmp_path), "--sublayers", "--scores", "variance"])
    assert refused.exit_code == 2
    assert "sublayers" in refused.output
