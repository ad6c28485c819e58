"""Adapters: trained after tokens were added, with a base model that has moved, in a run's checkpoints."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from depthscope import analyze
from depthscope.cli import app
from depthscope.errors import ModelLoadError, SettingsError
from depthscope.hub.cards.read import read_card_data
from depthscope.loading.load import load_model
from models import VOCABULARY, random_blocks, tiny_llama
from tiny_tokenizer import save_tokenizer

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")  # about embeddings that are saved, and ties

ADDED = 4
NEW = list(range(VOCABULARY, VOCABULARY + ADDED))


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def trained(folder: Path, config: Any, *, added: int = ADDED, tied: bool = False, **saving: Any) -> nn.Module:
    """An adapter as after a training on a base model that was resized first, saved to `folder`/adapter."""
    base = folder / "base"
    tiny_llama(2, tie_word_embeddings=tied).save_pretrained(base)
    resized = AutoModelForCausalLM.from_pretrained(base)
    resized.resize_token_embeddings(VOCABULARY + added)
    model = peft.get_peft_model(resized, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder / "adapter", **saving)
    return model.eval()


def lora(**options: Any) -> Any:
    return peft.LoraConfig(task_type="CAUSAL_LM", **{"r": 2, "target_modules": ["q_proj"], **options})


AFTER_ADDING = {
    "whole_embeddings": (lora(), {}),
    "whole_embeddings_tied": (lora(), {"tied": True}),
    "trained_embeddings": (lora(modules_to_save=["embed_tokens", "lm_head"]), {}),
    "trained_embeddings_once": (lora(modules_to_save=["embed_tokens", "lm_head"]), {"save_embedding_layers": False}),
    "trained_embeddings_tied": (lora(modules_to_save=["embed_tokens"]), {"tied": True}),
    "adapted_embeddings": (lora(target_modules=["q_proj", "embed_tokens", "lm_head"]), {}),
    "single_rows": (lora(trainable_token_indices={"embed_tokens": NEW, "lm_head": NEW}), {}),
    "single_rows_alone": (
        lora(trainable_token_indices={"embed_tokens": NEW, "lm_head": NEW}),
        {"save_embedding_layers": False},
    ),
    "single_rows_tied": (lora(trainable_token_indices=NEW), {"tied": True}),
    "only_rows": (peft.TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=NEW), {"tied": True}),
    "tokens_taken_away": (lora(), {"added": -10}),
}


@pytest.mark.parametrize("name", AFTER_ADDING)
def test_an_adapter_trained_after_tokens_were_added_equals_its_merged_model(name: str, tmp_path: Path) -> None:
    config, how = AFTER_ADDING[name]
    model = trained(tmp_path, config, **how)
    rows = VOCABULARY + how.get("added", ADDED)
    loaded = load_model(str(tmp_path / "adapter"), device="cpu")
    ids = torch.arange(rows - 8, rows)[None]
    expected = logits(model, ids)
    assert torch.equal(logits(loaded.model, ids), expected)
    assert loaded.facts["vocab_size"] == rows
    assert not loaded.notes
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, ids), expected, atol=1e-5, rtol=1e-5)


def test_the_analysis_of_such_an_adapter_is_that_of_the_merged_model(tmp_path: Path) -> None:
    model = trained(tmp_path, lora(modules_to_save=["embed_tokens", "lm_head"]))
    blocks = torch.cat([random_blocks(2, 5), torch.tensor(NEW).repeat(2, 1)], 1)
    how = {"blocks": blocks, "fit_blocks": 0, "eval_blocks": 2, "scores": "skip", "progress": False}
    report, merged = analyze(tmp_path / "adapter", **how), analyze(model.merge_and_unload(), **how)
    assert report.scores["loss"] == pytest.approx(merged.scores["loss"], abs=1e-5)


@pytest.mark.parametrize(
    ("config", "how"),
    [
        (lora(target_modules=["q_proj", "embed_tokens", "lm_head"]), {"save_embedding_layers": False}),
        (lora(modules_to_save=["embed_tokens"]), {"save_embedding_layers": False, "tied": True}),
        (lora(trainable_token_indices=NEW[1:]), {"save_embedding_layers": False, "tied": True}),
    ],
)
def test_rows_that_are_stored_nowhere_are_refused(config: Any, how: dict, tmp_path: Path) -> None:
    trained(tmp_path, config, **how)
    with pytest.raises(ModelLoadError, match=f"was trained with {VOCABULARY + ADDED} tokens and its base model has 90"):
        load_model(str(tmp_path / "adapter"))


def test_embeddings_of_two_sizes_are_refused(tmp_path: Path) -> None:
    trained(tmp_path, lora())
    weights = load_file(path := tmp_path / "adapter" / "adapter_model.safetensors")
    weights["base_model.model.lm_head.weight"] = weights["base_model.model.lm_head.weight"][:-1].clone()
    save_file(weights, path)
    with pytest.raises(ModelLoadError, match="vocabularies of different sizes"):
        load_model(str(tmp_path / "adapter"))


def test_a_tokenizer_with_more_tokens_than_rows_is_a_note(tmp_path: Path) -> None:
    trained(tmp_path, lora(), added=0)
    save_tokenizer(tmp_path / "adapter")
    loaded = load_model(str(tmp_path / "adapter"))
    (note,) = loaded.notes
    assert f"has {len(loaded.tokenizer)} tokens but the model has rows for {VOCABULARY}" in note


# Where the base model is


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A project with base/ and runs/one/checkpoint-{20,100}, each an adapter alone."""
    model = trained(tmp_path, lora(), added=0)
    for step in (20, 100):
        model.save_pretrained(tmp_path / "runs" / "one" / f"checkpoint-{step}")
    return tmp_path / "runs" / "one" / "checkpoint-100"


def name_base(adapter: Path, name: str) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": name}))


def test_a_run_of_adapters_points_to_its_last_checkpoint(adapter: Path) -> None:
    with pytest.raises(ModelLoadError) as caught:
        load_model(str(adapter.parent))
    assert f"Did you mean {str(adapter)!r}?" in str(caught.value)


@pytest.mark.parametrize("name", ["../../../base", "./base", "base"])
def test_a_base_model_named_by_a_relative_path_is_found_from_the_adapter(
    name: str, adapter: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = logits(load_model(str(adapter)).model, random_blocks(1, 9))
    name_base(adapter, name)
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    loaded = load_model(str(adapter))
    assert torch.equal(logits(loaded.model, random_blocks(1, 9)), expected)
    assert loaded.notes == [
        f"The base model {name!r} of the adapter was found relative to the adapter's folder, not to the current one."
    ]
    assert loaded.facts["base_model"] == "base"


def test_a_card_does_not_take_a_folder_beside_the_adapter_for_a_repository(
    adapter: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    name_base(adapter, "runs/base")
    shutil.move(adapter.parents[2] / "base", adapter.parents[1] / "base")
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert read_card_data(adapter, repo_id="me/it").base_model is None
    name_base(adapter, "some/base")
    assert read_card_data(adapter, repo_id="me/it").base_model == "some/base"


def test_a_base_model_that_moved_is_given(adapter: Path, tmp_path: Path) -> None:
    expected = logits(load_model(str(adapter)).model, random_blocks(1, 9))
    name_base(adapter, "/gone/base")
    with pytest.raises(ModelLoadError, match="--base-model"):
        load_model(str(adapter))
    loaded = load_model(str(adapter), base_model=str(tmp_path / "base"))
    assert torch.equal(logits(loaded.model, random_blocks(1, 9)), expected)
    with pytest.raises(ModelLoadError, match="There is no file or folder '/no/where'"):
        load_model(str(adapter), base_model="/no/where")
    with pytest.raises(SettingsError, match="is no adapter"):
        load_model(str(tmp_path / "base"), base_model="base")


def test_the_base_model_is_given_on_the_command_line(adapter: Path, tmp_path: Path) -> None:
    name_base(adapter, "/gone/base")
    base, out = str(tmp_path / "base"), tmp_path / "native"
    told = CliRunner().invoke(app, ["convert", str(adapter), str(out), "--base-model", base])
    assert told.exit_code == 0, told.output
    ids = random_blocks(1, 9)
    torch.testing.assert_close(
        logits(load_model(str(out)).model, ids), logits(load_model(str(adapter), base_model=base).model, ids)
    )
