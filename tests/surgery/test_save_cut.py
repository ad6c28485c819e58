"""A cut model on the disk: proved in a fresh process before its folder appears, and nothing half-written otherwise."""

import json
import os
import re
import resource
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging import version
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from depthscope.errors import NonFiniteError, SettingsError, SurgeryError
from depthscope.loading.load import load_model
from depthscope.surgery import Proof, cut, original_layers, save_cut
from models import random_blocks, tiny_llama
from tiny_tokenizer import save_tokenizer
from zoo import tiny_model

DOCUMENT = (Path(__file__).parents[2] / "docs" / "surgery.md").read_text()
(SNIPPET,) = re.findall(r"<!-- tested -->\n```python\n(.*?)```", DOCUMENT, flags=re.DOTALL)

needs_the_documented_version = pytest.mark.skipif(
    version.parse(transformers.__version__) < version.parse("5.23"), reason="earlier versions build it differently"
)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_llama(5, vocab_size=300)


@pytest.fixture(scope="module")
def saved(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Proof]:
    """What the documentation's example writes."""
    parent = tmp_path_factory.mktemp("cut")
    save_tokenizer(parent / "tokenizer")
    names: dict[str, Any] = {"model": model, "tokenizer": AutoTokenizer.from_pretrained(parent / "tokenizer")}
    (parent / "here").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(parent / "here")
        exec(compile(SNIPPET, "surgery.md", "exec"), names)
    return parent / "here" / "small", names["proof"]


def test_a_saved_cut_is_proved_in_memory_in_decoding_and_in_a_fresh_process(saved: tuple[Path, Proof]) -> None:
    _, proof = saved
    assert (proof.tolerance, proof.new_tokens, proof.notes) == (1e-5, 64, ())
    assert proof.difference <= 1e-5
    assert proof.reloaded is not None
    assert proof.reloaded <= 1e-5


def test_any_tool_loads_a_saved_cut_with_its_tokenizer_and_the_numbers_of_its_layers(
    model: PreTrainedModel, saved: tuple[Path, Proof]
) -> None:
    folder, _ = saved
    assert json.loads((folder / "config.json").read_text())["kept_layers"] == [0, 1, 3]
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert original_layers(loaded.config) == (0, 1, 3)
    ids = random_blocks(2, 30)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, cut(model, [0, 1, 3])(ids).logits)
    again = load_model(folder, device="cpu")
    assert again.tokenizer is not None
    assert again.notes == []
    assert sorted(path.name for path in folder.parent.iterdir()) == ["small"]


@needs_the_documented_version
def test_a_model_that_does_not_load_as_it_was_saved_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(SurgeryError, match=r"other logits in a fresh process.*balancing_biases.*Nothing was written"):
        save_cut(tiny_model("zaya"), [0, 1, 3], tmp_path / "small", new_tokens=2)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing_behind(model: PreTrainedModel, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))  # config.json fits, the weights do not
    try:
        with pytest.raises(SurgeryError, match=r"cannot write .*the file would be larger than the system allows"):
            save_cut(model, [0, 3], tmp_path / "small", new_tokens=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_while_the_fresh_process_loads_leaves_nothing_behind(model: PreTrainedModel, tmp_path: Path) -> None:
    watching = threading.Event()

    def press_when_weights_are_there() -> None:
        while not watching.wait(0.01):
            if list(tmp_path.glob(".small-*/model.safetensors")):
                os.kill(os.getpid(), signal.SIGINT)
                return

    presser = threading.Thread(target=press_when_weights_are_there)
    presser.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            save_cut(model, [0, 3], tmp_path / "small", new_tokens=2)
    finally:
        watching.set()
        presser.join()
    assert list(tmp_path.iterdir()) == []


def test_what_is_refused_is_refused_before_anything_is_written(model: PreTrainedModel, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    with pytest.raises(SurgeryError, match="exists already; give the name of a new folder"):
        save_cut(model, [0, 3], full)
    with pytest.raises(SettingsError, match="names all layers"):
        save_cut(model, range(5), tmp_path / "small")
    with pytest.raises(SurgeryError, match="attn_layer_period"):
        save_cut(tiny_model("jamba"), [0, 1, 3], tmp_path / "small")
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"folder": None}, "None is not the path of a folder"),
        ({"folder": ""}, "'' is not the path of a folder"),
        ({"tokenizer": "gpt2"}, "str is not a tokenizer"),
        ({"new_tokens": -1}, "new_tokens is -1"),
        ({"ids": [[1, 2]]}, "ids must be a tensor of whole token ids"),
        ({"ids": torch.rand(2, 3)}, "ids must be a tensor of whole token ids"),
        ({"ids": torch.tensor([[1, 300]])}, "ids must be from 0 to 299; they go from 1 to 300"),
    ]
    for arguments, message in wrong:
        with pytest.raises(SettingsError, match=message):
            save_cut(model, [0, 3], **{"folder": tmp_path / "small", **arguments})
    broken = tiny_llama()
    torch.nn.init.constant_(broken.lm_head.weight, float("inf"))
    with pytest.raises(NonFiniteError):
        save_cut(broken, [0, 3], tmp_path / "small")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_code_of_a_repository_is_not_run_to_prove_what_was_saved(model: PreTrainedModel, tmp_path: Path) -> None:
    class_of_a_repository = type("Foreign", (type(model),), {"__module__": "transformers_modules.someone.modeling"})
    foreign = class_of_a_repository(model.config).eval()
    assert type(cut(foreign, [0, 3])) is class_of_a_repository
    with pytest.raises(SurgeryError, match="code from the model's repository"):
        save_cut(foreign, [0, 3], tmp_path / "small")
    assert list(tmp_path.iterdir()) == []
