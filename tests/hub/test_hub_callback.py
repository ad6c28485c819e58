"""HubCheckpointCallback: checkpoints reach the Hub while a real Trainer trains, and never stand in its way."""

import logging
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

import depthscope
from depthlm import random_ids, tiny_depthlm
from depthscope import HubCheckpointCallback
from depthscope.errors import SettingsError
from depthscope.hub import callback as module
from hub import LocalHub
from tiny_tokenizer import save_tokenizer

STEPS = [0, 1, 2, 4]


class Snapshots(TrainerCallback):
    """Keeps the weights of every step, and how much was pushed by then."""

    def __init__(self, watched: HubCheckpointCallback | None = None) -> None:
        self.weights: dict[int, dict[str, torch.Tensor]] = {}
        self.pushed: dict[int, int] = {}
        self.watched = watched

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        weights = kwargs["model"].state_dict()
        self.weights[state.global_step] = {name: tensor.clone() for name, tensor in weights.items()}
        self.pushed[state.global_step] = len(self.watched.pushed) if self.watched else 0

    on_train_begin = on_step_end


def train(
    folder: Path, *callbacks: TrainerCallback, model: nn.Module | None = None, steps: int = 5, **options: Any
) -> Trainer:
    rows = [{"input_ids": row, "labels": row} for row in random_ids(8, 8)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    torch.manual_seed(0)
    model = model or tiny_depthlm("dense")
    options |= {"data_collator": default_data_collator, "callbacks": list(callbacks)}
    trainer = Trainer(model, arguments, train_dataset=rows, **options)
    trainer.train()
    return trainer


def test_checkpoints_are_on_their_branches_and_load(hub: LocalHub, tmp_path: Path) -> None:
    callback, snapshots = HubCheckpointCallback("ada/run", private=True), Snapshots()
    save_tokenizer(tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    train(tmp_path / "run", callback, snapshots, processing_class=tokenizer)
    assert (callback.pushed, callback.failed) == (STEPS, {})
    repository = hub.repository("ada/run")
    assert repository.private
    assert sorted(repository.branches) == ["main", *(f"step{step}" for step in STEPS)]
    assert repository.files().keys() == {".gitattributes"}
    for step in STEPS:
        assert {"modeling_depthlm.py", "tokenizer.json"} <= repository.files(f"step{step}").keys()
        loaded = AutoModelForCausalLM.from_pretrained("ada/run", revision=f"step{step}").state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in snapshots.weights[step].items())


def test_training_does_not_wait_for_a_slow_hub(hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub answers only when the last step is done."""
    callback = HubCheckpointCallback("ada/run")
    snapshots, over, original = Snapshots(callback), threading.Event(), module.push_trees

    def held(*arguments: Any, **options: Any) -> Any:
        assert over.wait(60)
        return original(*arguments, **options)

    class Over(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == state.max_steps:
                over.set()

    monkeypatch.setattr(module, "push_trees", held)
    train(tmp_path, callback, snapshots, Over())
    assert snapshots.pushed[4] == 0
    assert callback.pushed == STEPS


def test_what_failed_is_tried_again_at_the_end(hub: LocalHub, tmp_path: Path) -> None:
    hub.faults.next("commit", times=2, status=403)
    callback = HubCheckpointCallback("ada/run")
    train(tmp_path, callback)
    assert callback.pushed == [2, 4, 0, 1]
    assert callback.failed == {}


def test_a_hub_that_refuses_changes_nothing_about_the_training(
    hub: LocalHub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    alone = train(tmp_path / "alone").model.state_dict()
    hub.expire(hub.token)
    callback = HubCheckpointCallback("ada/run")
    beside = train(tmp_path / "beside", callback).model.state_dict()
    assert all(torch.equal(beside[name], tensor) for name, tensor in alone.items())
    assert callback.pushed == []
    assert sorted(callback.failed) == STEPS
    assert all("does not accept the token" in reason for reason in callback.failed.values())
    assert "Not on the Hub (ada/run): step0: Cannot open ada/run" in caplog.text
    assert hub.token not in caplog.text


def test_a_model_that_cannot_be_saved_is_listed_and_trained(hub: LocalHub, tmp_path: Path) -> None:
    model = tiny_depthlm("dense")

    def refuse(*arguments: Any, **options: Any) -> None:
        raise OSError("No space left on device")

    model.save_pretrained = refuse  # type: ignore[method-assign]
    callback = HubCheckpointCallback("ada/run")
    assert train(tmp_path, callback, model=model).state.global_step == 5
    assert callback.failed == dict.fromkeys(STEPS, "could not be saved: No space left on device.")
    assert not hub.sent()


def test_as_many_wait_as_were_allowed(hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    callback, started, over = HubCheckpointCallback("ada/run", waiting=2), threading.Event(), threading.Event()
    original = module.push_trees

    def held(*arguments: Any, **options: Any) -> Any:
        started.set()
        assert over.wait(60)
        return original(*arguments, **options)

    class Over(TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            over.set()

    monkeypatch.setattr(module, "push_trees", held)
    train(tmp_path, Over(), callback)
    assert started.is_set()
    assert callback.pushed == [0, 1]
    assert callback.failed == dict.fromkeys((2, 4), "2 earlier checkpoints were still waiting for the Hub")


def test_the_end_of_a_training_does_not_wait_for_ever(hub: LocalHub, tmp_path: Path) -> None:
    hub.faults.always("commit", status=503)
    callback = HubCheckpointCallback("ada/run", patience=0.5)
    train(tmp_path, callback, steps=2)
    assert callback.pushed == []
    assert sorted(callback.failed) == [0, 1, 2]


class Plain(nn.Module):
    """No transformers model: a table of logits."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(128, 128)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.table(input_ids)  # [B, T, V]
        return {"loss": nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())}


def test_any_module_is_pushed(hub: LocalHub, tmp_path: Path) -> None:
    callback, snapshots = HubCheckpointCallback("ada/plain"), Snapshots()
    train(tmp_path, callback, snapshots, model=Plain(), steps=2)
    loaded = load_file(hf_hub_download("ada/plain", "model.safetensors", revision="step2"))
    assert torch.equal(loaded["table.weight"], snapshots.weights[2]["table.weight"])


def test_weights_that_are_shared_out_are_gathered(tmp_path: Path) -> None:
    """FSDP in one process: its parameters are DTensors all the same."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model = tiny_depthlm("moe_shared")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        whole, weights = module._gathered(model)
        assert whole
        module._save(model, weights, None, str(tmp_path))
    finally:
        torch.distributed.destroy_process_group()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert loaded.keys() == before.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in before.items())


def test_weights_that_cannot_be_gathered_are_named(hub: LocalHub) -> None:
    model = Plain()
    model.table.weight.ds_id = 0  # type: ignore[assignment]  # as DeepSpeed's stage 3 marks it
    callback = HubCheckpointCallback("ada/run")
    state = SimpleNamespace(global_step=0, is_world_process_zero=True)
    callback.on_train_begin(None, state, None, model=model)
    callback.on_train_end(None, state, None)
    assert list(callback.failed) == [0]
    assert "cannot gather" in callback.failed[0]
    assert not hub.sent()


def test_what_failed_and_was_pushed_can_be_read_while_a_thread_adds_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "push_trees", lambda *arguments, **options: None)
    monkeypatch.setattr(module, "client", lambda token: None)
    callback, model = HubCheckpointCallback("ada/run"), Plain()
    model.table.weight.ds_id = 0  # type: ignore[assignment]  # not gathered: each step fails at once
    state = SimpleNamespace(global_step=0, is_world_process_zero=True)
    callback.on_train_begin(None, state, None, model=model)
    for step in callback.failed:
        state.global_step = step + 1
        callback.on_step_end(None, state, None, model=model)
    assert list(callback.failed) == [0, 1]
    callback.pushed.append(7)
    assert callback.pushed == []


def test_the_thread_of_a_training_that_has_ended_adds_nothing_to_the_next_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reached, go_on, pushed = threading.Event(), threading.Event(), []

    def slow(api: object, trees: list[Any], *arguments: Any, **options: Any) -> None:
        reached.set()
        assert go_on.wait(20)
        pushed.append(trees[0].revision)

    monkeypatch.setattr(module, "push_trees", slow)
    monkeypatch.setattr(module, "client", lambda token: None)
    monkeypatch.setattr(module, "LAST_WAIT", 0.01)
    callback = HubCheckpointCallback("ada/run", patience=0.01)
    state = SimpleNamespace(global_step=0, is_world_process_zero=True)
    callback.on_train_begin(None, state, None, model=Plain())
    assert reached.wait(20)
    threads = [thread for thread in threading.enumerate() if thread.name == "hub-checkpoints"]
    callback.on_train_end(None, state, None)
    assert list(callback.failed) == [0]
    state.global_step = 3  # the next training goes on from a checkpoint, and has pushed nothing
    callback.on_train_begin(None, state, None, model=Plain())
    go_on.set()
    for thread in threads:
        thread.join(20)
    assert pushed == ["step0"]
    assert not any(thread.is_alive() for thread in threads)
    assert (callback.pushed, callback.failed) == ([], {})


def test_steps_and_processes_that_push(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    callback, saved = HubCheckpointCallback("ada/run", every=300), []
    monkeypatch.setattr(module, "_save", lambda *arguments: saved.append(arguments))
    monkeypatch.setattr(HubCheckpointCallback, "_push", lambda self, run, checkpoint: True)
    for is_main in (True, False):
        published = []
        for step in range(1300):
            before = len(saved)
            state = SimpleNamespace(global_step=step, is_world_process_zero=is_main)
            tell = callback.on_step_end if step else callback.on_train_begin
            tell(None, state, None, model=Plain())
            published += [step] * (len(saved) - before)
        callback.on_train_end(None, state, None)
        expected = [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 600, 900, 1200]
        assert published == (expected if is_main else [])
    # A run that goes on from a checkpoint has pushed its first steps before.
    callback.on_train_begin(None, SimpleNamespace(global_step=7, is_world_process_zero=True), None, model=Plain())
    assert len(saved) == 14


@pytest.mark.parametrize(
    ("repo_id", "options"),
    [("a b/c", {}), ("name", {}), ("a/b", {"every": 0}), ("a/b", {"waiting": 0}), ("a/b", {"every": 1.5})],
)
def test_bad_arguments_are_refused_before_a_training_starts(repo_id: str, options: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        HubCheckpointCallback(repo_id, **options)
    assert depthscope.HubCheckpointCallback is HubCheckpointCallback
