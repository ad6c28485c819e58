"""VarianceCallback: right in every kind of training, unnoticed by it, and gone afterwards."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSeq2SeqLM, Seq2SeqTrainer, T5Config, Trainer, TrainerCallback

from depthlm import tiny_depthlm
from depthscope import LayerStack
from depthscope.callbacks import SparsityCallback, VarianceCallback, read_history
from depthscope.callbacks.variance import _Spread
from depthscope.errors import NoLayerStackError, SettingsError
from models import tiny_llama, token_first_llama
from runs import Recorder, Sentences, arguments, naive_variances, trainer


def hooks_on(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def close(found: list[float], expected: np.ndarray, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(
        np.array(found, float), expected, rtol=tolerance, atol=tolerance * np.abs(expected).max()
    )


MODELS = {
    "llama": tiny_llama,
    "moe": lambda: tiny_depthlm("moe_shared", initializer_range=0.3),
    "lora": lambda: get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"])),
}


@pytest.mark.quick
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("name", MODELS)
def test_equals_a_naive_computation(name: str, accumulation: int, tmp_path: Path) -> None:
    model = MODELS[name]()
    layers = LayerStack(model).layers
    run = Recorder(
        model,
        arguments(tmp_path, gradient_accumulation_steps=accumulation, max_steps=4, logging_steps=2),
        train_dataset=Sentences(),
        callbacks=[VarianceCallback()],
        layers=list(layers),
    )
    run.train()
    rows = read_history(tmp_path)
    assert [row["step"] for row in rows] == [2, 4]
    for row, steps in zip(rows, ((0, 1), (2, 3)), strict=True):
        seen = [entry for entry in run.seen if entry[0] in steps]
        assert len(seen) == 2 * accumulation
        for metric, expected in naive_variances(seen).items():
            close(row["layers"][metric], expected)
        assert row["tokens"] == sum(int(mask.sum()) for _, _, mask in seen)


def test_a_stream_with_its_tokens_first_gives_the_same_values(tmp_path: Path) -> None:
    rows = []
    for name, build in (("one", tiny_llama), ("other", token_first_llama)):
        trainer(build(), tmp_path / name, [VarianceCallback(moments_every=1)], max_steps=2, logging_steps=2).train()
        rows.append(read_history(tmp_path / name)[0]["layers"])
    for metric, column in rows[0].items():
        close(rows[1][metric], np.array(column))


@pytest.mark.parametrize("changed", [False, True])
def test_a_stream_is_measured_once_unless_it_is_changed_in_place(
    changed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scale(stream: torch.Tensor) -> None:
        stream.mul_(2)

    measured = []
    of = _Spread.of
    monkeypatch.setattr(_Spread, "of", lambda *args: measured.append(args) or of(*args))
    model = tiny_llama()
    run = Recorder(
        model,
        arguments(tmp_path, max_steps=1, logging_steps=1),
        train_dataset=Sentences(),
        callbacks=[VarianceCallback(sublayers=False)],
        layers=list(model.model.layers),
    )
    if changed:
        model.model.layers[2].register_forward_pre_hook(lambda module, args: scale(args[0]))
    run.train()
    # Four outputs, the embeddings, and what the third layer gets if that is no longer what the second gave.
    assert len(measured) == 4 + 1 + changed
    for metric, expected in naive_variances(run.seen).items():
        close(read_history(tmp_path)[0]["layers"][metric], expected)


def test_the_default_type_of_tensors_does_not_matter(tmp_path: Path) -> None:
    model = tiny_llama()
    run = Recorder(
        model,
        arguments(tmp_path, max_steps=1, logging_steps=1),
        train_dataset=Sentences(),
        callbacks=[VarianceCallback()],
        layers=list(model.model.layers),
    )
    torch.set_default_dtype(torch.bfloat16)
    try:
        run.train()
    finally:
        torch.set_default_dtype(torch.float32)
    for metric, expected in naive_variances(run.seen).items():
        close(read_history(tmp_path)[0]["layers"][metric], expected)


def test_sublayers_are_what_attention_and_mlp_return(tmp_path: Path) -> None:
    model = tiny_llama()
    kept: dict[str, list[torch.Tensor]] = {"attention": [], "mlp": []}
    layer = model.model.layers[2]
    layer.self_attn.register_forward_hook(lambda m, a, o: kept["attention"].append(o[0].detach()))
    layer.mlp.register_forward_hook(lambda m, a, o: kept["mlp"].append(o.detach()))
    trainer(
        model, tmp_path, [VarianceCallback()], Sentences(padded=False), max_steps=2, logging_steps=2,
    ).train()  # fmt: skip
    row = read_history(tmp_path)[0]
    for part in ("attention", "mlp"):
        # The first call of each is the trace that finds the layers.
        outputs = torch.cat(kept[part][-2:]).double()
        assert row["layers"][f"{part}_variance"][2] == pytest.approx(outputs.var(-1).mean().item(), rel=1e-5)
        assert row["layers"][f"{part}_norm"][2] == pytest.approx(outputs.norm(dim=-1).mean().item(), rel=1e-5)


def test_moments(tmp_path: Path) -> None:
    model = tiny_llama()
    run = Recorder(
        model,
        arguments(tmp_path, max_steps=4, logging_steps=4),
        train_dataset=Sentences(),
        callbacks=[VarianceCallback(moments_every=2)],
        layers=list(model.model.layers),
    )
    run.train()
    row = read_history(tmp_path)[0]
    outputs = [
        torch.cat([states[layer][1][mask.bool()] for step, states, mask in run.seen if step % 2 == 0]).double()
        for layer in range(4)
    ]
    z = [(out - out.mean(-1, keepdim=True)) / out.std(-1, keepdim=True, correction=0) for out in outputs]
    close(row["layers"]["skewness"], np.array([(v**3).mean().item() for v in z]))
    close(row["layers"]["kurtosis"], np.array([(v**4).mean().item() for v in z]))
    close(row["layers"]["outliers"], np.array([(v.abs() > 3).double().mean().item() for v in z]))
    close(row["layers"]["max_activation"], np.array([out.abs().max().item() for out in outputs]))


def test_bf16_autocast(tmp_path: Path) -> None:
    model = tiny_llama()
    run = Recorder(
        model,
        arguments(tmp_path, bf16=True, max_steps=2, logging_steps=2),
        train_dataset=Sentences(),
        callbacks=[VarianceCallback()],
        layers=list(model.model.layers),
    )
    run.train()
    for metric, expected in naive_variances(run.seen).items():
        close(read_history(tmp_path)[0]["layers"][metric], expected, 1e-2)


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2, "bf16": True}], ids=str)
@pytest.mark.parametrize("name", ["llama", "moe"])
def test_training_does_not_notice(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    weights = []
    for callbacks in ([], [VarianceCallback(moments_every=1)]):
        model = MODELS[name]()
        model.config.attention_dropout = 0.1
        trainer(model, tmp_path, callbacks, **settings).train()
        weights.append(model.state_dict())
    assert all(torch.equal(weight, weights[1][key]) for key, weight in weights[0].items())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_counts_once(reentrant: bool, tmp_path: Path) -> None:
    rows = []
    for settings in (
        {},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}},
    ):
        trainer(tiny_llama(), tmp_path, [VarianceCallback()], **settings).train()
        rows.append(read_history(tmp_path))
    for plain, checkpointed in zip(*rows, strict=True):
        assert plain["tokens"] == checkpointed["tokens"]
        for metric, column in plain["layers"].items():
            close(checkpointed["layers"][metric], np.array(column))


def test_compiled_training(tmp_path: Path) -> None:
    rows = []
    for settings in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        trainer(tiny_llama(2), tmp_path, [VarianceCallback()], max_steps=4, logging_steps=2, **settings).train()
        rows.append(read_history(tmp_path))
    for plain, compiled in zip(*rows, strict=True):
        assert plain["tokens"] == compiled["tokens"]
        for metric, column in plain["layers"].items():
            close(compiled["layers"][metric], np.array(column), 1e-4)


def test_evaluation_and_generation_are_left_out(tmp_path: Path) -> None:
    rows = []
    for settings in ({}, {"eval_strategy": "steps", "eval_steps": 1}):
        model = tiny_llama()
        run = Trainer(
            model,
            arguments(tmp_path, **settings),
            train_dataset=Sentences(),
            eval_dataset=Sentences(rows=8),
            callbacks=[VarianceCallback()],
        )
        run.train()
        rows.append(read_history(tmp_path))
    assert rows[0] == rows[1]


def test_every_nth_step_is_measured(tmp_path: Path) -> None:
    run = Recorder(
        model := tiny_llama(),
        arguments(tmp_path, max_steps=6, logging_steps=6),
        train_dataset=Sentences(),
        callbacks=[VarianceCallback(every=3)],
        layers=list(model.model.layers),
    )
    run.train()
    expected = naive_variances([entry for entry in run.seen if entry[0] in (0, 3)])
    close(read_history(tmp_path)[0]["layers"]["variance"], expected["variance"])


def test_values_reach_the_log_and_what_it_logs_is_bounded(tmp_path: Path) -> None:
    def logged(log: str) -> dict[str, float]:
        run = trainer(tiny_llama(), tmp_path, [VarianceCallback(log=log, sublayers=False)])
        run.train()
        first = run.state.log_history[0]
        assert "loss" in first
        return {name: value for name, value in first.items() if name.startswith("layers/")}

    everything, summary, single = logged("layers"), logged("summary"), logged("none")
    row = read_history(tmp_path)[0]
    assert set(everything) == {"layers/variance", "layers/variance_growth"} | {
        f"layers/{metric}/{layer}" for metric in row["layers"] for layer in range(4)
    }
    assert [everything[f"layers/variance/{layer}"] for layer in range(4)] == row["layers"]["variance"]
    assert {name.rpartition("/")[2] for name in summary if "variance/" in name} == {
        "first",
        "q1",
        "median",
        "q3",
        "last",
    }
    assert summary["layers/variance/median"] == pytest.approx(np.median(row["layers"]["variance"]))
    assert set(single) == {"layers/variance", "layers/variance_growth"}


def test_nothing_stays_on_the_model(tmp_path: Path) -> None:
    model = tiny_llama()
    before = hooks_on(model)
    trainer(model, tmp_path, [VarianceCallback()]).train()
    assert hooks_on(model) == before


# A callback that is added after the Trainer was built hears of failures in passes only.
@pytest.mark.parametrize(("place", "late"), [("data", False), ("forward", False), ("step", False), ("forward", True)])
def test_nothing_stays_on_the_model_after_an_exception(place: str, late: bool, tmp_path: Path) -> None:
    class Broken(Sentences):
        def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
            if place == "data" and self.calls > 8:
                raise RuntimeError("broken")
            self.calls += 1
            return super().__getitem__(row)

        calls = 0

    model = tiny_llama()
    before = hooks_on(model)
    run = trainer(model, tmp_path, [] if late else [VarianceCallback()], Broken())
    if late:
        run.add_callback(VarianceCallback())
    if place == "forward":
        mlp = model.model.layers[1].mlp
        original = mlp.forward

        def forward(hidden: torch.Tensor) -> torch.Tensor:
            if run.state.global_step == 2:
                raise RuntimeError("broken")
            return original(hidden)

        mlp.forward = forward
    if place == "step":
        run.create_optimizer()
        run.optimizer.step = lambda *args, **kwargs: (_ for _ in ()).throw(RuntimeError("broken"))
    with pytest.raises(RuntimeError, match="broken"):
        run.train()
    assert hooks_on(model) == before


@pytest.mark.parametrize("kind", [VarianceCallback, SparsityCallback])
def test_one_callback_leaves_nothing_behind_in_several_trainers_that_fail(kind: type, tmp_path: Path) -> None:
    class Breaks(TrainerCallback):
        def on_step_end(self, *args: Any, model: torch.nn.Module, **kwargs: Any) -> None:
            seen.append(hooks_on(model))
            raise RuntimeError("broken")

    callback = kind(every=1, history=False)
    runs = [trainer(tiny_llama(), tmp_path, [callback, Breaks()]) for _ in range(2)]
    before = hooks_on(runs[0].model)
    for run in [runs[0], runs[1], runs[1], runs[0]]:  # also one that fails again, and the first once more
        seen: list[int] = []
        with pytest.raises(RuntimeError, match="broken"):
            run.train()
        assert seen[0] > before
        assert hooks_on(run.model) == before


def test_a_late_callback_reports_too(tmp_path: Path) -> None:
    run = trainer(tiny_llama(), tmp_path)
    run.add_callback(VarianceCallback())
    run.train()
    assert "layers/variance/0" in run.state.log_history[0]


def test_activations_that_are_not_finite_are_reported_and_do_no_harm(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_llama()
    run = trainer(model, tmp_path, [VarianceCallback()], max_steps=6, logging_steps=3)

    def poison(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output * float("nan") if run.state.global_step >= 4 else output

    model.model.layers[2].register_forward_hook(poison)
    with caplog.at_level(logging.WARNING):
        run.train()
    first, second = read_history(tmp_path)
    assert "not_finite" not in first
    # Step 5 is the first whose activations are not finite: the fifth, with layers 0 and 1 in order.
    assert second["not_finite"] == {"step": 5, "layer": 2}
    assert "first after layer 2, in step 5" in caplog.text
    assert second["layers"]["variance"][0] is not None
    assert run.state.log_history[1]["layers/not_finite_layer"] == 2
    json.dumps(run.state.log_history, allow_nan=True)


@pytest.mark.parametrize("options", [{"every": 0}, {"every": 1.5}, {"log": "all"}, {"moments_every": 0}], ids=str)
def test_arguments_that_are_not_allowed(options: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=next(iter(options))):
        VarianceCallback(**options)


def test_an_encoder_decoder_is_refused_when_the_trainer_is_built(tmp_path: Path) -> None:
    config = T5Config(vocab_size=50, d_model=16, d_ff=16, num_layers=2, num_heads=2, d_kv=8, decoder_start_token_id=0)
    with pytest.raises(NoLayerStackError):
        Seq2SeqTrainer(
            AutoModelForSeq2SeqLM.from_config(config),
            arguments(tmp_path),
            train_dataset=Sentences(),
            callbacks=[VarianceCallback()],
        )


@pytest.mark.parametrize("callback", [VarianceCallback, SparsityCallback])
def test_a_pass_that_failed_is_left_out_of_its_window(callback: type, tmp_path: Path) -> None:
    """A Trainer may go on after a batch that was too large; its first layers were measured, its last ones never ran."""

    class GoesOn(Recorder):
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            try:
                return super().training_step(*args, **kwargs)
            except torch.OutOfMemoryError:
                return torch.tensor(0.0)

    model = tiny_depthlm("moe", initializer_range=0.3)
    run = GoesOn(
        model,
        arguments(tmp_path, max_steps=4, logging_steps=4),
        train_dataset=Sentences(),
        callbacks=[callback()],
        layers=list(model.model.layers),
    )
    loads: list[torch.Tensor] = []

    def fail(module: Any, args: Any) -> None:
        if module.training and run.state.global_step in (1, 3):
            raise torch.OutOfMemoryError("as a device may")

    model.model.layers[2].register_forward_pre_hook(fail)
    gate = model.model.layers[1].mlp.gate
    gate.register_forward_hook(lambda module, args, output: loads.append(output[2]) if module.training else None)
    run.train()
    row = read_history(tmp_path)[0]
    if callback is VarianceCallback:
        assert len(run.seen) == 2
        for metric, expected in naive_variances(run.seen).items():
            close(row["layers"][metric], expected)
        assert row["tokens"] == sum(int(mask.sum()) for _, _, mask in run.seen)
    else:
        real = [mask.bool().flatten() for _, _, mask in run.seen]
        whole = [loads[0], loads[2]]  # the passes of steps 0 and 2
        load = sum(np.bincount(choice[mask].flatten(), minlength=8) for choice, mask in zip(whole, real, strict=True))
        assert row["layers"]["expert_load_max"][1] == pytest.approx((load / load.mean()).max())
