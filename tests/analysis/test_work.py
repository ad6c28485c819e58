"""The work of an analysis: what the scores say beforehand, what is counted, and what is said of a model not loaded."""

from typing import Any

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel

from depthscope import Blocks, LayerStack, Settings
from depthscope.analysis.measure import measure, total_work
from depthscope.console.progress import Progress
from depthscope.layers.lanes.lanes import Lanes
from depthscope.processes import Processes
from depthscope.scores import SCORES
from depthscope.scores.base import head_work
from depthscope.scores.work import Extent, estimated_work
from models import VOCABULARY, gemma_with_shared_keys_and_values, random_blocks, tiny_llama

BLOCKS = Blocks.given(random_blocks(8, 16), None)


def tiny_mixtral() -> PreTrainedModel:
    size = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    experts = {"num_hidden_layers": 3, "num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": VOCABULARY}
    return MixtralForCausalLM(MixtralConfig(**size, **experts)).eval()


@pytest.mark.parametrize("make", [tiny_llama, gemma_with_shared_keys_and_values, tiny_mixtral])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pairs": "adjacent", "probes": "exact"},
        {"pairs": 0.5, "in_sample": True, "fit_blocks": 0},
        {"scores": "causal"},
        {"scores": "causal,skip,usefulness", "sublayers": True},
        {"scores": "variance,skip,jacobian"},
    ],
)
def test_the_work_is_known_before_a_model_is_loaded(make: Any, options: dict[str, Any]) -> None:
    settings = Settings(**{"scores": ",".join(SCORES), "fit_blocks": 4, "eval_blocks": 4, "block_size": 16, **options})
    stack = LayerStack(make())
    scores = {name: SCORES[name](stack, settings, settings.eval_blocks) for name in settings.scores}
    total = total_work(stack, scores, settings)
    progress = Progress(total, None)
    with torch.no_grad():
        measure(Lanes(stack), scores, BLOCKS, settings, Processes.here(), progress)
    assert progress.done == pytest.approx(total) or stack.unskippable  # what cannot be left out takes nothing
    experts = isinstance(stack.model, MixtralForCausalLM)
    extent = Extent(stack.num_layers, stack.width, head_work(stack), stack.layer_types, stack.resumable, experts)
    assert estimated_work(extent, scores, settings) == pytest.approx(total, rel=0.02)
