"""A saved DepthLM where depthscope is not installed: its own code loads it, exactly, and can go on with it."""

import sys
from pathlib import Path

import pytest
import torch

from depthlm import KINDS, random_ids, tiny_depthlm
from forks import Forks
from without_depthscope import run_elsewhere

# Loads by all three Auto classes, generates, trains a step, saves, loads again; compares with what was computed before.
USE = """
import importlib.util, sys, torch
assert importlib.util.find_spec("depthscope") is None, "depthscope is installed after all"
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
folder, again = sys.argv[1:]
expected = torch.load(folder + "/expected.pt", weights_only=True)
ids = expected["ids"]

def load(place):
    model, info = AutoModelForCausalLM.from_pretrained(place, trust_remote_code=True, output_loading_info=True)
    assert not any(info.values()), info
    return model

model = load(folder)
assert type(model).__module__.startswith("transformers_modules."), type(model)
assert AutoConfig.from_pretrained(folder, trust_remote_code=True).model_type == "depthlm"
base = AutoModel.from_pretrained(folder, trust_remote_code=True)
with torch.no_grad():
    assert torch.equal(model(ids).logits, expected["logits"])
    assert torch.equal(model.lm_head(base(ids).last_hidden_state), expected["logits"])
    generated = model.generate(ids[:1, :5], max_new_tokens=8, do_sample=False)
assert torch.equal(generated, expected["generated"])
if model.config.num_experts:
    assert model.config._experts_implementation == "grouped_mm"
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
model.train()
loss = model(ids, labels=ids).loss
loss.backward()
optimizer.step()
assert model.eval()(ids, labels=ids).loss < loss
model.save_pretrained(again)
trained = load(again)
assert torch.equal(trained(ids).logits, model(ids).logits)
"""


def save(kind: str, folder: Path) -> None:
    model = tiny_depthlm(kind)
    model.save_pretrained(folder)
    ids = random_ids(2, 12)
    with torch.no_grad():
        expected = {
            "ids": ids,
            "logits": model(ids).logits,
            "generated": model.generate(ids[:1, :5], max_new_tokens=8, do_sample=False),
        }
    torch.save(expected, folder / "expected.pt")


@pytest.mark.parametrize("kind", ["dense", "moe_shared", "scaled_peri"])
def test_a_saved_model_works_where_depthscope_is_not_installed(kind: str, elsewhere: Forks, tmp_path: Path) -> None:
    save(kind, tmp_path / "model")
    done = run_elsewhere(elsewhere, USE, tmp_path / "model", tmp_path / "again", cache=tmp_path)
    assert done.returncode == 0, done.stderr


def test_without_trust_transformers_refuses_in_its_own_words(elsewhere: Forks, tmp_path: Path) -> None:
    save("dense", tmp_path / "model")
    code = "import sys; from transformers import AutoModelForCausalLM as A; A.from_pretrained(sys.argv[1])"
    done = run_elsewhere(elsewhere, code, tmp_path / "model", cache=tmp_path)
    assert done.returncode == 1
    assert "trust_remote_code=True" in done.stderr.splitlines()[-1]


def test_the_code_in_a_repository_is_this_code(tmp_path: Path) -> None:
    models = Path(sys.modules["depthscope.models"].__path__[0])
    for kind in KINDS:
        tiny_depthlm(kind).save_pretrained(tmp_path / kind)
        saved = sorted(path.name for path in (tmp_path / kind).glob("*.py"))
        assert saved == ["configuration_depthlm.py", "modeling_depthlm.py", "presets_depthlm.py"]
        for name in saved:
            assert (tmp_path / kind / name).read_text() == (models / name).read_text()
