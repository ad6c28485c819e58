"""The scores on DepthLM: what belongs to a place in the stack stays there when layers change places."""

import contextlib
from pathlib import Path

import pytest
import torch

from depthlm import KINDS, random_ids, tiny_depthlm
from depthscope import LayerStack, analyze


def test_swapped_layers_take_the_norm_factor_of_their_new_place() -> None:
    model, ids = tiny_depthlm("scaled_pre"), random_ids(2, 12)
    stack = LayerStack(model)
    with torch.no_grad():
        baseline = stack.logits(ids)
        with stack.swapped(0, 3):
            swapped = stack.logits(ids)
        # The obvious way: the weights change places, and nothing else does.
        first, last = (model.model.layers[layer].state_dict() for layer in (0, 3))
        first, last = ({name: weight.clone() for name, weight in state.items()} for state in (first, last))
        model.model.layers[0].load_state_dict(last)
        model.model.layers[3].load_state_dict(first)
        expected = stack.logits(ids)
        model.model.layers[0].load_state_dict(first)
        model.model.layers[3].load_state_dict(last)
        assert torch.equal(stack.logits(ids), baseline)
    torch.testing.assert_close(swapped, expected)
    assert (swapped - baseline).abs().max() > 0.01
    assert [layer.norm_factor for layer in model.model.layers] == pytest.approx([1, 2**-0.5, 3**-0.5, 0.5])


def test_the_factors_are_restored_when_something_fails_inside() -> None:
    model = tiny_depthlm("scaled_pre")
    with contextlib.suppress(KeyError), LayerStack(model).swapped(1, 2):
        assert [layer.norm_factor for layer in model.model.layers] == pytest.approx([1, 2**-0.5, 3**-0.5, 0.5])
        assert model.model.layers[1].self_attn.layer_idx == 2
        raise KeyError
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2, 3]
    assert [layer.norm_factor for layer in model.model.layers] == pytest.approx([1, 2**-0.5, 3**-0.5, 0.5])


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_analysed_with_every_score(kind: str) -> None:
    report = analyze(tiny_depthlm(kind), blocks=random_ids(4, 16), fit_blocks=2, eval_blocks=2, probes=2)
    assert len(report.layers) == 4
    for score in ("usefulness_ratio", "skip_ratio", "jacobian", "variance"):
        assert all(layer[score] is not None for layer in report.layers)


def test_a_saved_depthlm_is_analysed_by_its_folder(tmp_path: Path) -> None:
    tiny_depthlm("moe").save_pretrained(tmp_path)
    report = analyze(str(tmp_path), blocks=random_ids(4, 16), fit_blocks=2, eval_blocks=2, scores="variance,skip")
    assert (report.model["model_type"], report.model["num_experts"], report.model["num_experts_per_tok"]) == (
        "depthlm",
        8,
        2,
    )
