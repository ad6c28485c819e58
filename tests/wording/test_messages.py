"""One of something is said of one, and several of several."""

import pytest
import torch

import depthscope
from depthscope import Blocks, LayerStack
from depthscope.errors import CorpusError, NonFiniteError
from depthscope.wording.messages import counted
from models import random_blocks, tiny_llama


def test_one_is_not_said_in_the_plural() -> None:
    assert [counted(number, "block") for number in (0, 1, 2, 2000)] == [
        "0 blocks",
        "1 block",
        "2 blocks",
        "2,000 blocks",
    ]
    assert "1 layer)" in repr(LayerStack(tiny_llama(1)))
    assert next(row.value for row in depthscope.recipe(1, 64, vocab_size=300, tokens=2e6).evidence) == "1 layer"
    with pytest.raises(CorpusError, match=r"^1 block was given, but"):
        depthscope.analyze(tiny_llama(), blocks=Blocks.from_ids([[1, 2, 3]]), fit_blocks=1, eval_blocks=4)


def test_a_layer_whose_output_is_not_finite_is_one_layer() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0] = float("nan")
    with pytest.raises(NonFiniteError, match="the output of layer 1 is not finite"):
        depthscope.analyze(model, blocks=random_blocks(2, 8), scores="variance", fit_blocks=0, eval_blocks=2)
