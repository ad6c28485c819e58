"""The Auto classes know DepthLM once depthscope is imported, in whatever order, and importing it costs nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

from depthlm import tiny_depthlm
from forks import new_python


def run(code: str, *arguments: str) -> str:
    done = new_python("-c", code, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    tiny_depthlm("moe").save_pretrained(folder)
    return folder


ORDERS = {
    "depthscope first": "import depthscope; from transformers import AutoConfig, AutoModel, AutoModelForCausalLM",
    "depthscope last": "from transformers import AutoConfig, AutoModel, AutoModelForCausalLM; import depthscope",
    "depthscope between": "import transformers.models.auto.configuration_auto; import depthscope;"
    "from transformers import AutoConfig, AutoModel, AutoModelForCausalLM",
    "its classes first": "from depthscope import DepthLMForCausalLM;"
    "from transformers import AutoConfig, AutoModel, AutoModelForCausalLM",
    "its config last": "from transformers import AutoConfig, AutoModel, AutoModelForCausalLM;"
    "from depthscope import DepthLMConfig",
}


@pytest.mark.parametrize("order", ORDERS)
def test_the_auto_classes_know_depthlm(order: str, saved: Path) -> None:
    code = f"""{ORDERS[order]}
import sys
from depthscope.models import DepthLMConfig, DepthLMModel, DepthLMForCausalLM
assert type(AutoConfig.from_pretrained(sys.argv[1])) is DepthLMConfig
assert type(AutoModel.from_pretrained(sys.argv[1])) is DepthLMModel
assert type(AutoModelForCausalLM.from_pretrained(sys.argv[1])) is DepthLMForCausalLM
# The code in the folder is not run where depthscope is installed, trusted or not.
assert type(AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)) is DepthLMForCausalLM
assert type(AutoModelForCausalLM.from_config(AutoConfig.for_model("depthlm", num_hidden_layers=1, hidden_size=16,
    vocab_size=9, intermediate_size=8, num_attention_heads=2))) is DepthLMForCausalLM
import inspect
assert "class AutoModelForCausalLM" in inspect.getsource(sys.modules[AutoModelForCausalLM.__module__])
"""
    run(code, str(saved))


def test_importing_depthscope_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, depthscope, depthscope.models; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_transformers_that_keeps_its_tables_otherwise_is_still_imported() -> None:
    code = """
import warnings, depthscope.models.registration as registration
def gone(auto): raise AttributeError("no such table")
registration._STEPS["transformers.models.auto.configuration_auto"] = gone
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    from transformers import AutoConfig
assert any("DepthLMForCausalLM.from_pretrained" in str(warning.message) for warning in seen)
"""
    run(code)
