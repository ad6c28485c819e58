"""Whatever is handed to the public functions in place of what they take, an error of ours says so, by name."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

import depthscope
from depthscope import Blocks, DepthscopeError, LayerReport, LayerStack, Settings
from depthscope.callbacks import EffectivenessCallback
from depthscope.conversion import to_depthlm, to_native
from depthscope.views.run_terminal import RunHistory
from reports import sample_report

REPORT = sample_report(num_layers=3)
CALLS: dict[str, Callable[[Any], Any]] = {
    "analyze": depthscope.analyze,
    "load_model": depthscope.load_model,
    "load_blocks": lambda value: depthscope.load_blocks(["A text."], value, num_blocks=1, block_size=4),
    "load_blocks, blocks": lambda value: depthscope.load_blocks(["A text."], object(), num_blocks=value, block_size=4),
    "load_blocks, size": lambda value: depthscope.load_blocks(["A text."], object(), num_blocks=1, block_size=value),
    "Blocks": Blocks.from_ids,
    "Blocks.given": Blocks.given,
    "compare": depthscope.compare,
    "compare, two": lambda value: depthscope.compare([REPORT, value]),
    "LayerReport.load": LayerReport.load,
    "LayerReport.from_json": LayerReport.from_json,
    "LayerReport.save": REPORT.save,
    "write_page, path": lambda value: depthscope.write_page(value, REPORT),
    "write_page, report": lambda value: depthscope.write_page("/nowhere/page.html", value),
    "LayerStack": LayerStack,
    "Settings": lambda value: Settings(scores=value),
    "recipe": lambda value: depthscope.recipe(value, 64, tokens=1e6),
    "recipe, width": lambda value: depthscope.recipe(2, value, tokens=1e6),
    "push": lambda value: depthscope.push(value, "me", dry_run="/nowhere/out"),
    "push, to": lambda value: depthscope.push("/nowhere", value),
    "RunHistory": RunHistory.load,
    "EffectivenessCallback": EffectivenessCallback,
    "EffectivenessCallback, every": lambda value: EffectivenessCallback([[1, 2, 3]] * 2, every=value),
    "HubCheckpointCallback": depthscope.HubCheckpointCallback,
    "to_depthlm": to_depthlm,
    "to_native": to_native,
}


@pytest.mark.parametrize("name", CALLS)
def test_nothing_in_place_of_an_argument_is_an_error_of_ours(name: str) -> None:
    for value in (None, 2.5, object(), {}):
        if name.startswith("load_blocks") and name == "load_blocks" and value is not None:
            continue  # any object may be a tokenizer
        if name == "LayerReport.from_json" and value == {}:
            continue
        with pytest.raises(DepthscopeError) as caught:
            CALLS[name](value)
        assert len(str(caught.value)) > 20


def test_a_loaded_model_has_neither_a_revision_nor_another_base() -> None:
    for option in ({"revision": "main"}, {"base_model": "base"}, {"attn_implementation": "eager"}):
        with pytest.raises(DepthscopeError, match=f"leave out {next(iter(option))}"):
            depthscope.analyze(nn.Linear(2, 2), **option)


def test_maps_of_more_layers_than_a_report_holds_are_refused_before_they_are_measured() -> None:
    from depthscope.analysis.analyze import _require_maps

    class Deep:
        num_layers = 1601

    with pytest.raises(DepthscopeError, match=r"1,601 layers.*leave causal and permutation out"):
        _require_maps(Deep(), Settings())  # type: ignore[arg-type]
    _require_maps(Deep(), Settings(scores="skip,variance"))  # type: ignore[arg-type]
