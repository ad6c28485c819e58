"""A DepthLM that was saved by depthscope as it was in November 2026 computes today what it computed then."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from depthscope.models import DepthLMForCausalLM
from forks import Forks
from without_depthscope import run_elsewhere

FOLDER = Path(__file__).with_name("checkpoint_of_2026_11")

ELSEWHERE = """
import sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, output_loading_info=True)
assert not any(info.values()), info
assert type(model).__module__.startswith("transformers_modules."), type(model)
expected = load_file(sys.argv[1] + "/expected.safetensors")
with torch.no_grad():
    torch.testing.assert_close(model(expected["ids"]).logits, expected["logits"], rtol=1e-5, atol=1e-5)
"""


def test_it_computes_the_same_with_depthscope() -> None:
    model = AutoModelForCausalLM.from_pretrained(FOLDER)
    assert type(model) is DepthLMForCausalLM
    expected = load_file(FOLDER / "expected.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(model(expected["ids"]).logits, expected["logits"], rtol=1e-5, atol=1e-5)


def test_it_computes_the_same_by_its_own_code(elsewhere: Forks, tmp_path: Path) -> None:
    done = run_elsewhere(elsewhere, ELSEWHERE, FOLDER, cache=tmp_path)
    assert done.returncode == 0, done.stderr
