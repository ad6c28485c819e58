"""DepthLM learns, its router losses are what the papers define, and it equals the models that it contains."""

import logging
import math
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainingArguments,
)
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from depthlm import (
    HIDDEN,
    KINDS,
    LAYERS,
    MOE_KINDS,
    VOCABULARY,
    expert_layers,
    naive_logits,
    random_ids,
    tiny_config,
    tiny_depthlm,
)
from depthscope.models import DepthLMForCausalLM

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
needs_traceable_experts = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="before transformers 5.23 the backward pass of experts on a CPU is not to be traced",
)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=MOE_KINDS)
def moe_kind(request: pytest.FixtureRequest) -> str:
    return request.param


def batch_to_memorise() -> Tensor:
    """Token ids [4, 16] of which only the first ones cannot be predicted."""
    ids = random_ids(4, 16)
    ids[:, 0] = torch.arange(3, 7)
    return ids


def steps_to_memorise(
    model: nn.Module,
    forward: Callable | None = None,
    precision: Callable[[], AbstractContextManager] = nullcontext,
    learning_rate: float = 1e-2,
) -> int:
    """Steps of AdamW until the cross-entropy falls below 0.1; it starts at more than ln(vocabulary), about 4.6."""
    ids = batch_to_memorise()
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], learning_rate)
    assert plain_loss(model, ids) > 4
    for step in range(1, 301):
        model.train()
        with precision():
            loss = (model if forward is None else forward)(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 and plain_loss(model, ids) < 0.1:
            return step
    raise AssertionError(f"the loss is {plain_loss(model, ids)} after {step} steps")


@torch.no_grad()
def plain_loss(model: nn.Module, ids: Tensor) -> float:
    """Cross-entropy without router losses."""
    return model.eval()(ids, labels=ids).loss.item()


def gradients(model: nn.Module, ids: Tensor, **inputs: object) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss in training mode, and the gradient of every weight."""
    model.train().zero_grad()
    loss = model(input_ids=ids, labels=ids, **inputs).loss
    loss.backward()
    return loss.detach(), {name: weight.grad.clone() for name, weight in model.named_parameters()}


# --- learning -------------------------------------------------------------------------------------------------------


def test_every_kind_memorises_a_batch(kind: str) -> None:
    assert steps_to_memorise(tiny_depthlm(kind)) <= 100


def test_every_weight_of_every_kind_has_a_gradient(kind: str) -> None:
    _, grads = gradients(tiny_depthlm(kind), random_ids(8, 32))
    assert all(grad.isfinite().all() and grad.abs().max() > 0 for grad in grads.values())
    # With 256 tokens for eight experts, none goes without.
    for name, grad in grads.items():
        if ".experts." in name:
            assert (grad.abs().amax(dim=(1, 2)) > 0).all()


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_memorising_in_bfloat16_autocast(kind: str) -> None:
    model = tiny_depthlm(kind)
    assert steps_to_memorise(model, precision=lambda: torch.autocast("cpu", torch.bfloat16)) <= 100
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_memorising_with_gradient_checkpointing(kind: str) -> None:
    model = tiny_depthlm(kind)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert steps_to_memorise(model) <= 100


@pytest.mark.parametrize(
    "kind",
    [
        "dense",
        pytest.param("moe", marks=needs_traceable_experts),
        pytest.param("moe_shared", marks=needs_traceable_experts),
    ],
)
def test_one_graph_holds_the_whole_training_step(kind: str) -> None:
    # Captured, differentiated and run in one graph, without the minutes that generating code for it takes.
    layers, ids = {"num_hidden_layers": 2}, random_ids(2, 12)  # of moe_shared, the second has experts
    model = tiny_depthlm(kind, **layers)
    expected_loss, expected = gradients(tiny_depthlm(kind, **layers), ids)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled.train()
    loss = compiled(input_ids=ids, labels=ids).loss
    loss.backward()
    torch.testing.assert_close(loss, expected_loss)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, expected[name], rtol=1e-4, atol=1e-6)


@needs_compiler
@needs_traceable_experts
def test_memorising_compiled() -> None:
    # One dense layer and one with experts, so that one compilation covers both.
    model = tiny_depthlm("moe", num_hidden_layers=2, moe_layers=2)
    assert steps_to_memorise(model, torch.compile(model, fullgraph=True)) <= 100


# --- adapters -------------------------------------------------------------------------------------------------------

ATTENTION = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
EXPERTS = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}


@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("gqa", ATTENTION),
        ("scaled_peri", {"target_modules": "all-linear"}),
        ("moe", ATTENTION),
        ("moe", ATTENTION | EXPERTS),
        ("moe_shared", ATTENTION | EXPERTS),
        ("moe", ATTENTION | {"target_parameters": ["mlp.gate.weight"]}),
    ],
)
def test_low_rank_adapters_learn_alone_and_survive_saving_and_merging(kind: str, targets: dict, tmp_path: Path) -> None:
    ids = batch_to_memorise()
    before = {name: weight.clone() for name, weight in tiny_depthlm(kind).state_dict().items()}
    base = tiny_depthlm(kind)
    torch.manual_seed(1)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, **targets))
    first = plain_loss(model, ids)

    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], 1e-2)
    for _ in range(60):
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        learning = {name for name, weight in model.named_parameters() if weight.grad is not None}
        assert learning == {name for name, weight in model.named_parameters() if "lora_" in name}
        optimizer.step()
        optimizer.zero_grad()
    assert plain_loss(model, ids) < first - 2
    frozen = {name: weight for name, weight in model.named_parameters() if "lora_" not in name}
    for name, weight in before.items():
        (kept,) = (value for key, value in frozen.items() if key.replace("base_layer.", "").endswith(f"model.{name}"))
        assert torch.equal(kept, weight)

    with torch.no_grad():
        logits = model(ids).logits
        model.save_pretrained(tmp_path / "adapter")
        again = PeftModel.from_pretrained(tiny_depthlm(kind), tmp_path / "adapter").eval()
        assert torch.equal(again(ids).logits, logits)
        merged = again.merge_and_unload()
        assert type(merged) is DepthLMForCausalLM
        torch.testing.assert_close(merged(ids).logits, logits, rtol=0, atol=1e-4)
        merged.save_pretrained(tmp_path / "merged")
        assert torch.equal(DepthLMForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits, merged(ids).logits)


# --- gradient checkpointing -----------------------------------------------------------------------------------------


def test_gradient_checkpointing_changes_neither_loss_nor_gradients(kind: str) -> None:
    ids, mask = random_ids(2, 12), torch.ones(2, 12).long()
    mask[0, :4] = 0
    model = tiny_depthlm(kind)
    expected_loss, expected = gradients(model, ids, attention_mask=mask)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    recomputed: list[nn.Module] = []
    model.model.layers[0].self_attn.register_forward_hook(lambda module, *_: recomputed.append(module))
    loss, grads = gradients(model, ids, attention_mask=mask)
    assert len(recomputed) == 2
    assert torch.equal(loss, expected_loss)
    assert grads.keys() == expected.keys()
    assert all(torch.equal(grad, expected[name]) for name, grad in grads.items())


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpointing_is_refused_where_routers_would_stop_learning(moe_kind: str) -> None:
    model, ids = tiny_depthlm(moe_kind), random_ids(2, 12)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(RuntimeError, match=r'"use_reentrant": False'):
        model.train()(ids, labels=ids)
    # Nothing is lost where nothing learns.
    with torch.no_grad():
        model(ids, labels=ids)
    model.eval()(ids, labels=ids)
    for layer in expert_layers(model):
        layer.mlp.gate.requires_grad_(False)
    model.train()(ids, labels=ids).loss.backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().max() > 0


def test_reentrant_checkpointing_of_a_dense_model_is_nothing_to_refuse() -> None:
    model, ids = tiny_depthlm(), random_ids(2, 12)
    _, expected = gradients(model, ids)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    _, grads = gradients(model, ids)
    assert all(torch.equal(grad, expected[name]) for name, grad in grads.items())


# --- router losses --------------------------------------------------------------------------------------------------


def left_padding(rows: int, length: int) -> Tensor:
    """A mask [rows, length] that leaves out 0, 2, 4, ... tokens of the rows."""
    mask = torch.ones(rows, length).long()
    for row in range(rows):
        mask[row, : 2 * row] = 0
    return mask


def naive_router_losses(model: DepthLMForCausalLM, ids: Tensor, mask: Tensor | None) -> tuple[float, float]:
    """Load-balancing loss and z-loss, the means over the layers, counted token by token in float64."""
    streams: list[Tensor] = []
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda module, inputs, output: streams.append(inputs[0]))
        for layer in expert_layers(model)
    ]
    with torch.no_grad():
        model(ids, attention_mask=mask)
    for hook in hooks:
        hook.remove()
    config = model.config
    real = [True] * ids.numel() if mask is None else [bool(value) for value in mask.flatten()]
    balance, z = 0.0, 0.0
    for layer, stream in zip(expert_layers(model), streams, strict=True):
        chosen = [0] * config.num_experts
        odds = [0.0] * config.num_experts
        squares = 0.0
        for token in range(ids.numel()):
            if not real[token]:
                continue
            scores = (layer.mlp.gate.weight.double() @ stream[token].double()).tolist()
            total = sum(math.exp(score) for score in scores)
            squares += math.log(total) ** 2
            ranking = sorted(range(config.num_experts), key=lambda expert: -scores[expert])
            for expert in ranking[: config.num_experts_per_tok]:
                chosen[expert] += 1
            for expert in range(config.num_experts):
                odds[expert] += math.exp(scores[expert]) / total
        tokens = sum(real)
        shares = zip(chosen, odds, strict=True)
        balance += config.num_experts * sum(count / tokens * odd / tokens for count, odd in shares)
        z += squares / tokens
    return balance / len(streams), z / len(streams)


@pytest.mark.parametrize("padded", [False, True])
def test_router_losses_are_what_the_papers_define(moe_kind: str, padded: bool) -> None:
    model, ids = tiny_depthlm(moe_kind), random_ids(3, 9)
    mask = left_padding(3, 9) if padded else None
    balance, z = naive_router_losses(model, ids, mask)
    outputs = model(ids, attention_mask=mask, output_router_logits=True)
    assert outputs.aux_loss.item() == pytest.approx(balance, rel=1e-5)
    assert outputs.z_loss.item() == pytest.approx(z, rel=1e-5)
    if padded:
        # The padding would have counted for something.
        without_mask = model(ids, output_router_logits=True)
        assert abs(without_mask.aux_loss.item() - balance) > 1e-3
        assert abs(without_mask.z_loss.item() - z) > 1e-3


def test_an_even_load_costs_as_much_as_there_are_experts_a_token() -> None:
    model = tiny_depthlm("moe")
    for layer in model.model.layers:
        nn.init.zeros_(layer.mlp.gate.weight)
    outputs = model(random_ids(2, 12), output_router_logits=True)
    assert outputs.aux_loss.item() == pytest.approx(2)
    assert outputs.z_loss.item() == pytest.approx(math.log(8) ** 2)


@pytest.mark.parametrize("asked", [None, False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_router_losses_are_part_of_the_loss_in_training(moe_kind: str, asked: bool | None, padded: bool) -> None:
    model = tiny_depthlm(moe_kind, router_aux_loss_coef=0.3, router_z_loss_coef=0.2)
    ids, mask = random_ids(3, 9), left_padding(3, 9) if padded else None
    labels = ids if mask is None else ids.masked_fill(mask == 0, -100)
    cross_entropy = model(ids, attention_mask=mask, labels=labels).loss.item()
    balance, z = naive_router_losses(model, ids, mask)
    outputs = model.train()(ids, attention_mask=mask, labels=labels, output_router_logits=asked)
    assert outputs.loss.item() == pytest.approx(cross_entropy + 0.3 * balance + 0.2 * z, rel=1e-5)
    assert (outputs.router_logits is not None) == bool(asked)


def test_router_losses_stay_out_of_the_evaluation_loss_unless_asked_for(moe_kind: str) -> None:
    ids = random_ids(3, 9)
    model = tiny_depthlm(moe_kind)
    plain = model(ids, labels=ids)
    cross_entropy = nn.functional.cross_entropy(plain.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(plain.loss, cross_entropy)
    assert plain.aux_loss is plain.z_loss is plain.router_logits is None
    for outputs in (
        model(ids, labels=ids, output_router_logits=True),
        tiny_depthlm(moe_kind, output_router_logits=True)(ids, labels=ids),
    ):
        expected = cross_entropy + 0.01 * outputs.aux_loss + 0.001 * outputs.z_loss
        torch.testing.assert_close(outputs.loss, expected)
        assert outputs.loss > cross_entropy + 0.01


@pytest.mark.parametrize("coefficient", ["router_aux_loss_coef", "router_z_loss_coef"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_router_loss_moves_the_routers(moe_kind: str, coefficient: str, checkpointing: bool) -> None:
    ids = random_ids(2, 12)
    none = {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0}
    _, without = gradients(tiny_depthlm(moe_kind, **none), ids)
    model = tiny_depthlm(moe_kind, **(none | {coefficient: 1.0}))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    _, grads = gradients(model, ids)
    outputs = model(ids, output_router_logits=True)
    router_loss = outputs.aux_loss if "aux" in coefficient else outputs.z_loss
    gates = [name for name in grads if name.endswith("gate.weight")]
    alone = torch.autograd.grad(router_loss, [model.get_parameter(name) for name in gates])
    assert len(gates) == len(expert_layers(model))
    for name, grad in zip(gates, alone, strict=True):
        assert grad.abs().max() > 1e-3
        torch.testing.assert_close(grads[name] - without[name], grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("padded", [False, True])
def test_one_expert_layer_has_the_load_balancing_loss_of_transformers(padded: bool) -> None:
    model, ids = tiny_depthlm("moe_shared", moe_layers=[2]), random_ids(3, 9)
    mask = left_padding(3, 9) if padded else None
    outputs = model(ids, attention_mask=mask, output_router_logits=True)
    expected = load_balancing_loss_func(outputs.router_logits, 8, 2, mask)
    torch.testing.assert_close(outputs.aux_loss, expected)


def test_the_parts_of_a_step_add_up_to_one_router_loss(moe_kind: str) -> None:
    model = tiny_depthlm(moe_kind, router_aux_loss_coef=0.3, router_z_loss_coef=0.2).train()
    ids = random_ids(4, 12)
    labels = ids.clone()
    # The four parts have 2, 5, 8 and 11 tokens that count.
    for row in range(4):
        labels[row, : 9 - 3 * row] = -100
    counts = [(labels[row, 1:] != -100).sum().item() for row in range(4)]
    assert counts == [3, 6, 9, 11]
    items = torch.tensor(sum(counts))

    parts = [model(ids[row : row + 1], labels=labels[row : row + 1], num_items_in_batch=items) for row in range(4)]
    router_losses = [0.3 * part.aux_loss + 0.2 * part.z_loss for part in parts]
    whole = model(ids, labels=labels)
    cross_entropy = whole.loss - 0.3 * whole.aux_loss - 0.2 * whole.z_loss
    shared_out = sum(count / items * loss for count, loss in zip(counts, router_losses, strict=True))
    torch.testing.assert_close(sum(part.loss for part in parts), cross_entropy + shared_out)
    # Four times the router loss would be well outside of this.
    assert min(router_losses) < shared_out < max(router_losses)


def test_labels_that_come_shifted_are_counted_as_they_are() -> None:
    model = tiny_depthlm("moe", router_aux_loss_coef=0.3, router_z_loss_coef=0.2).train()
    ids = random_ids(2, 12)
    shifted = nn.functional.pad(ids, (0, 1), value=-100)[:, 1:].contiguous()
    for items in ({}, {"num_items_in_batch": torch.tensor(30)}):
        expected = model(ids, labels=ids, **items).loss
        torch.testing.assert_close(model(ids, labels=ids, shift_labels=shifted, **items).loss, expected)


# --- Trainer --------------------------------------------------------------------------------------------------------


def examples(rows: int) -> list[dict[str, Tensor]]:
    """Texts whose beginnings, of different lengths, are not to be learnt."""
    ids = random_ids(rows, 12)
    labels = ids.clone()
    for row in range(rows):
        labels[row, : 3 * (row % 4)] = -100
    return [{"input_ids": ids[row], "labels": labels[row]} for row in range(rows)]


def trainer_of(model: nn.Module, folder: Path, **options: object) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    return Trainer(model, arguments, train_dataset=examples(4), eval_dataset=examples(4))


def test_the_trainer_counts_the_router_losses_of_an_accumulated_step_once(moe_kind: str, tmp_path: Path) -> None:
    model = tiny_depthlm(moe_kind, router_aux_loss_coef=0.3, router_z_loss_coef=0.2)
    trainer = trainer_of(model, tmp_path, max_steps=1, learning_rate=0.0)
    trainer.train()
    logged = trainer.state.log_history[0]["loss"]
    model.train()
    expected, tokens = 0.0, 0
    for example in examples(4):
        count = (example["labels"][1:] != -100).sum().item()
        expected += model(**{name: value[None] for name, value in example.items()}).loss.item() * count
        tokens += count
    assert logged == pytest.approx(expected / tokens, abs=1e-3)


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_the_trainer_trains_and_evaluates(kind: str, tmp_path: Path) -> None:
    model = tiny_depthlm(kind)
    trainer = trainer_of(model, tmp_path, max_steps=20, learning_rate=1e-2)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 20
    assert losses[-1] < losses[0] / 4
    # The evaluation loss is the cross-entropy alone.
    evaluated = trainer.evaluate()["eval_loss"]
    batch = {name: torch.stack([example[name] for example in examples(4)]) for name in ("input_ids", "labels")}
    with torch.no_grad():
        assert evaluated == pytest.approx(model.eval()(**batch).loss.item(), rel=1e-4)


# --- balance --------------------------------------------------------------------------------------------------------


def walks(rows: int, length: int, generator: torch.Generator) -> Tensor:
    """Texts [rows, length] in which one of two tokens follows each token, all tokens being equally frequent."""
    rule = torch.Generator().manual_seed(5)
    followers = torch.stack([torch.randperm(VOCABULARY, generator=rule) for _ in range(2)], dim=1)
    ids = torch.randint(0, VOCABULARY, (rows, length), generator=generator)
    for at in range(1, length):
        ids[:, at] = followers[ids[:, at - 1], torch.randint(0, 2, (rows,), generator=generator)]
    return ids


@torch.no_grad()
def worst_load(model: DepthLMForCausalLM) -> float:
    """The load of the busiest expert over the mean load, in the layer where that is largest."""
    held_out = walks(16, 32, torch.Generator().manual_seed(99))
    loads = [
        logits.topk(2).indices.flatten().bincount(minlength=8).float()
        for logits in model.eval()(held_out, output_router_logits=True).router_logits
    ]
    return max((load.max() / load.mean()).item() for load in loads)


def load_after_training(seed: int, **coefficients: float) -> float:
    """The worst load of a model whose embeddings all point one way, which sends every token to the same two experts."""
    model = tiny_depthlm("moe", seed=seed, num_hidden_layers=2, **coefficients)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model.model.embed_tokens.weight += 0.5 * torch.randn(HIDDEN, generator=generator)
    assert worst_load(model) > 3.5
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / 200)
        ids = walks(8, 32, generator)
        model.train()(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    # ln 2 would be perfect.
    assert plain_loss(model, walks(16, 32, generator)) < 1
    return worst_load(model)


@pytest.mark.parametrize("seed", range(3))
def test_the_router_losses_balance_the_experts(seed: int) -> None:
    # Ten times the default weight, because there are 200 steps here and not tens of thousands. Over eight seeds the
    # worst load was 1.4 at most with the losses, and 2.7 at least without.
    assert load_after_training(seed, router_aux_loss_coef=0.1) < 1.5
    assert load_after_training(seed, router_aux_loss_coef=0.0, router_z_loss_coef=0.0) > 2


# --- initialisation -------------------------------------------------------------------------------------------------

STREAM_WRITERS = ("o_proj.weight", "mlp.down_proj.weight", "experts.down_proj", "shared_expert.down_proj.weight")


def spreads(**changes: object) -> dict[str, float]:
    """The standard deviation of every weight matrix of a fresh model that has all the kinds of them."""
    torch.manual_seed(0)
    wide = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 64, "num_key_value_heads": 2}
    config = KINDS["moe_shared"](**wide, shared_expert_intermediate_size=64, initializer_range=0.02, **changes)
    weights = DepthLMForCausalLM(config).named_parameters()
    return {name: weight.std().item() for name, weight in weights if weight.dim() > 1}


def test_a_plain_initialisation_has_one_spread() -> None:
    for name, spread in spreads().items():
        # The standard error of the spread of the smallest one, 8 by 64, is 3%.
        assert spread == pytest.approx(0.02, rel=0.12), name


def test_depth_scaled_initialisation_shrinks_what_writes_to_the_stream_and_nothing_else() -> None:
    scaled = spreads(depth_scaled_init=True)
    writers = [name for name in scaled if name.endswith(STREAM_WRITERS)]
    # Four attentions, two dense MLPs, two sets of experts, two shared experts.
    assert len(writers) == 10
    for name, spread in scaled.items():
        expected = 0.02 / math.sqrt(2 * LAYERS) if name in writers else 0.02
        assert spread == pytest.approx(expected, rel=0.12), name


def test_norms_begin_at_one_and_biases_at_zero() -> None:
    changes = {"norm_placement": "peri", "qk_norm": "head", "attention_bias": True, "mlp_bias": True}
    model = DepthLMForCausalLM(tiny_config(**changes))
    vectors = {name: weight for name, weight in model.named_parameters() if weight.dim() == 1}
    assert len(vectors) == LAYERS * (4 + 2 + 4 + 3) + 1
    assert all((weight == (0 if name.endswith("bias") else 1)).all() for name, weight in vectors.items())


def test_depth_scaling_twice_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        tiny_config(norm_scaling="depth")
        tiny_config(depth_scaled_init=True)
        assert not caplog.records
        tiny_config(norm_scaling="depth", depth_scaled_init=True)
    assert "norm_scaling='depth' loses its effect" in caplog.text


# --- the models that DepthLM contains -------------------------------------------------------------------------------


def test_every_kind_is_the_network_written_out_in_plain_operations(kind: str) -> None:
    model, ids = tiny_depthlm(kind), random_ids(1, 13)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits[0], naive_logits(model, ids[0]).float(), rtol=0, atol=1e-5)


COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
BIASES = {"attention_bias": True, "mlp_bias": True}
SLIDING = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"] * 2}
DENSE_TWINS = [
    ("gqa", {}, LlamaForCausalLM, LlamaConfig(**COMMON, intermediate_size=48)),
    ("gqa", BIASES, LlamaForCausalLM, LlamaConfig(**COMMON, intermediate_size=48, **BIASES)),
    ("qk_norm_head", {}, Qwen3ForCausalLM, Qwen3Config(**COMMON, intermediate_size=48)),
    (
        "qk_norm_head",
        SLIDING,
        Qwen3ForCausalLM,
        Qwen3Config(**COMMON, intermediate_size=48, use_sliding_window=True, **SLIDING),
    ),
]


def twins(kind: str, changes: dict, stock_class: type, stock_config: object) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A DepthLM and a model of transformers with the same weights, biases included."""
    model = tiny_depthlm(kind, **changes)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(weight, std=0.2)
    stock = stock_class(stock_config).eval()
    stock.load_state_dict(model.state_dict())
    return model, stock


@pytest.mark.parametrize(("kind", "changes", "stock_class", "stock_config"), DENSE_TWINS)
def test_a_dense_model_equals_its_stock_twin_exactly(
    kind: str, changes: dict, stock_class: type, stock_config: object
) -> None:
    model, stock = twins(kind, changes, stock_class, stock_config)
    ids = random_ids(3, 12)
    for inputs in ({}, {"attention_mask": left_padding(3, 12)}):
        with torch.no_grad():
            assert torch.equal(model(ids, **inputs).logits, stock(ids, **inputs).logits)
        loss, grads = gradients(model, ids, **inputs)
        stock_loss, stock_grads = gradients(stock, ids, **inputs)
        assert torch.equal(loss, stock_loss)
        assert all(torch.equal(grads[name], grad) for name, grad in stock_grads.items())
        assert len(grads) == len(stock_grads)


MIXTRAL = MixtralConfig(**COMMON, intermediate_size=24, num_local_experts=8, num_experts_per_tok=2, sliding_window=None)
OLMOE = OlmoeConfig(**COMMON, intermediate_size=24, num_experts=8, num_experts_per_tok=2, norm_topk_prob=False)
MOE_TWINS = [
    ({"norm_topk_prob": True}, MixtralForCausalLM, MIXTRAL),
    ({"qk_norm": "full"}, OlmoeForCausalLM, OLMOE),
]


@pytest.mark.parametrize(("changes", "stock_class", "stock_config"), MOE_TWINS)
def test_a_model_with_experts_equals_its_stock_twin(changes: dict, stock_class: type, stock_config: object) -> None:
    # Without router losses: stock models concatenate the layers before they balance them.
    changes = {"num_key_value_heads": 2, "router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0, **changes}
    model, stock = twins("moe", changes, stock_class, stock_config)
    ids = random_ids(3, 12)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, stock(ids).logits, rtol=0, atol=1e-6)
    loss, grads = gradients(model, ids)
    stock_loss, stock_grads = gradients(stock, ids)
    torch.testing.assert_close(loss, stock_loss, rtol=0, atol=1e-6)
    for name, grad in stock_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=0, atol=1e-6)
    assert len(grads) == len(stock_grads)


@pytest.mark.parametrize(("changes", "stock_class", "stock_config"), MOE_TWINS)
def test_one_layer_of_experts_equals_its_stock_twin_with_load_balancing(
    changes: dict, stock_class: type, stock_config: object
) -> None:
    one_layer = stock_config.to_dict() | {"num_hidden_layers": 1, "router_aux_loss_coef": 0.3}
    one_layer = type(stock_config)(**{name: value for name, value in one_layer.items() if name != "layer_types"})
    changes = {"num_key_value_heads": 2, "num_hidden_layers": 1, **changes}
    model, stock = twins(
        "moe", changes | {"router_aux_loss_coef": 0.3, "router_z_loss_coef": 0.0}, stock_class, one_layer
    )
    ids, mask = random_ids(3, 12), left_padding(3, 12)
    loss, grads = gradients(model, ids, attention_mask=mask)
    stock_loss, stock_grads = gradients(stock, ids, attention_mask=mask, output_router_logits=True)
    torch.testing.assert_close(loss, stock_loss, rtol=0, atol=1e-6)
    for name, grad in stock_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=0, atol=1e-6)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("kind", ["dense", "moe", "moe_shared"])
def test_a_training_goes_on_from_a_checkpoint_with_all_its_weights(kind: str, sharded: bool, tmp_path: Path) -> None:
    """The Trainer hands a checkpoint's tensors to load_state_dict, where experts come one by one."""
    from runs import trainer

    def train(resume: str | None = None) -> dict[str, Tensor]:
        model = tiny_depthlm(kind)
        if sharded:
            save = model.save_pretrained
            model.save_pretrained = lambda *args, **kwargs: save(*args, **{**kwargs, "max_shard_size": "10KB"})
        run = trainer(model, tmp_path, max_steps=4, logging_steps=4, save_strategy="steps", save_steps=2)
        run.train(resume_from_checkpoint=resume)
        return model.state_dict()

    whole, again = train(), train(str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(weight, again[name]) for name, weight in whole.items())


def test_an_expert_that_is_missing_is_missed() -> None:
    model = tiny_depthlm("moe")
    state = model.state_dict()
    prefix = "model.layers.1.mlp.experts."
    fused = state.pop(prefix + "down_proj")
    for index, expert in enumerate(fused[:-1]):
        state[f"{prefix}{index}.down_proj.weight"] = expert
    assert model.load_state_dict(state, strict=False).missing_keys == [prefix + "down_proj"]
    with pytest.raises(RuntimeError, match="down_proj"):
        model.load_state_dict(state)
    state[f"{prefix}{len(fused) - 1}.down_proj.weight"] = fused[-1]
    assert not model.load_state_dict(state).missing_keys


def test_router_losses_that_are_in_no_loss_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    from depthscope.models.modeling_depthlm import logger

    ids = random_ids(2, 8)
    logger.warning_once.cache_clear()
    logger.addHandler(caplog.handler)
    try:
        tiny_depthlm("moe").train()(ids, labels=ids)
        tiny_depthlm("moe").eval()(ids, output_router_logits=True)
        tiny_depthlm("dense").train()(ids)
        assert "router losses" not in caplog.text
        outputs = tiny_depthlm("moe").train()(ids)
        assert "no loss includes the router losses" in caplog.text
        assert outputs.aux_loss.requires_grad
    finally:
        logger.removeHandler(caplog.handler)
