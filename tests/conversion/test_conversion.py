"""`depthscope convert` and `presets`, run as a user runs them."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

from depthlm import tiny_depthlm
from depthscope.cli import app
from depthscope.conversion.assemble import largest_logit_difference
from depthscope.conversion.checkpoint import convert_checkpoint
from hub import LocalHub
from models import random_blocks, tiny_llama
from tiny_tokenizer import save_tokenizer


def convert(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


@pytest.fixture
def scaled(tmp_path: Path) -> Path:
    """A DepthLM with LayerNorm Scaling, and a tokenizer."""
    folder = tmp_path / "scaled"
    tiny_depthlm("scaled_pre", vocab_size=300).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def test_a_checkpoint_becomes_native_with_its_tokenizer(scaled: Path, tmp_path: Path) -> None:
    result = convert(scaled, tmp_path / "native")
    assert result.exit_code == 0, result.output
    assert "DepthLMForCausalLM -> LlamaForCausalLM" in result.output
    assert "computes the same function" in result.output
    native = AutoModelForCausalLM.from_pretrained(tmp_path / "native")
    assert largest_logit_difference(native, AutoModelForCausalLM.from_pretrained(scaled)) < 1e-5
    assert AutoTokenizer.from_pretrained(tmp_path / "native")("a text").input_ids
    assert not list((tmp_path / "native").glob("*.py"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["native", "scaled"]


def test_a_native_checkpoint_becomes_a_depthlm_of_another_shape(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "llama")
    result = convert(
        tmp_path / "llama", tmp_path / "out", "--to", "depthlm", "--kv-heads", 4, "--experts", 4, "--top-k", 2,
        "--layers", 6, "--preserve-function",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "computes the same function" in result.output
    assert "Without a tokenizer" in result.output
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    config = model.config
    assert (config.num_key_value_heads, config.num_experts, config.num_hidden_layers) == (4, 4, 6)
    assert largest_logit_difference(model, tiny_llama()) < 1e-4
    assert {path.name for path in (tmp_path / "out").glob("*.py")} == {
        "configuration_depthlm.py",
        "modeling_depthlm.py",
        "presets_depthlm.py",
    }


def test_a_reshaped_model_may_go_back_to_where_it_came_from(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "llama")
    result = convert(tmp_path / "llama", tmp_path / "pooled", "--kv-heads", 1)
    assert result.exit_code == 0, result.output
    assert "needs training" in result.output
    pooled = AutoModelForCausalLM.from_pretrained(tmp_path / "pooled")
    assert (pooled.config.model_type, pooled.config.num_key_value_heads) == ("llama", 1)


def test_the_dtype_is_the_checkpoints_own_where_that_loses_nothing(tmp_path: Path) -> None:
    for kind, dtype in (("dense", torch.bfloat16), ("scaled_pre", torch.float32)):
        tiny_depthlm(kind).to(torch.bfloat16).save_pretrained(tmp_path / kind)
        result = convert(tmp_path / kind, tmp_path / f"{kind}-native")
        assert result.exit_code == 0, result.output
        assert ("bfloat16 would round" in result.output) == (dtype == torch.float32)
        assert AutoModelForCausalLM.from_pretrained(tmp_path / f"{kind}-native").dtype == dtype
    result = convert(tmp_path / "scaled_pre", tmp_path / "rounded", "--dtype", "bfloat16")
    assert "rounded to bfloat16" in result.output
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "rounded").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--to", "gpt2"], "'gpt2' is not a target of conversion"),
        (["--kv-heads", 3], "key and value heads can become 1, 2 or 4, not 3"),
        (["--experts", 4], "experts and top_k belong together"),
        (["--experts", 2, "--top-k", 3], "num_experts_per_tok must be from 1 to num_experts (2), got 3"),
        (["--layers", 3], "deepen needs more than that"),
        (["--preserve-function"], "give the number of layers too"),
        (["--to", "qwen3"], "Qwen3 cannot have qk_norm=None"),
        (["--dtype", "int8"], "int8"),
    ],
    ids=str,
)
def test_what_cannot_be_done_ends_with_one_message_and_no_folder(
    options: list[object], said: str, scaled: Path, tmp_path: Path
) -> None:
    result = convert(scaled, tmp_path / "out", *options)
    assert result.exit_code == 2
    assert said in " ".join(result.output.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scaled"]


def test_places_that_cannot_be_written_are_refused_before_the_work(scaled: Path, tmp_path: Path) -> None:
    assert "exists already" in convert(scaled, scaled.parent).output
    assert "would overwrite" in convert(scaled, scaled).output
    assert "does not exist; create it" in " ".join(convert(scaled, tmp_path / "no" / "out").output.split())


def test_a_damaged_checkpoint_is_refused(scaled: Path, tmp_path: Path) -> None:
    weights = scaled / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    result = convert(scaled, tmp_path / "out")
    assert result.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_a_merged_adapter_is_converted(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    tiny_llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    result = convert(tmp_path / "adapter", tmp_path / "out", "--to", "depthlm")
    assert result.exit_code == 0, result.output
    ids = random_blocks(1, 8)
    expected = adapted.eval()(ids).logits
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits, expected)


def test_presets_are_listed() -> None:
    result = CliRunner().invoke(app, ["presets"])
    assert result.exit_code == 0
    assert "moe-2b-400m" in result.output
    assert all(len(line) <= 80 for line in result.output.splitlines())
    assert CliRunner().invoke(app, ["presets", "--markdown"]).output.startswith("| preset |")


def test_a_branch_that_moves_meanwhile_does_not_change_the_type_that_is_written(hub: LocalHub, tmp_path: Path) -> None:
    hub.client.create_repo("ada/net")
    tiny_llama().to(torch.bfloat16).save_pretrained(tmp_path / "bfloat16")
    tiny_llama().save_pretrained(tmp_path / "float32")
    hub.client.upload_folder(repo_id="ada/net", folder_path=tmp_path / "bfloat16")
    hub.client.create_branch("ada/net", branch="trial")

    def move(stage: str) -> None:
        if stage == "Converting":
            hub.client.upload_folder(repo_id="ada/net", folder_path=tmp_path / "float32", revision="trial")

    convert_checkpoint("ada/net", tmp_path / "out", to="depthlm", revision="trial", stage=move)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_an_adapter_is_written_in_the_type_of_its_base_where_that_loses_nothing(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    tiny_llama().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    untrained = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(base, untrained).save_pretrained(tmp_path / "adapter")
    convert_checkpoint(str(tmp_path / "adapter"), tmp_path / "out", to="depthlm")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
