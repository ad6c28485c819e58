"""Weight, attention and expert sparsity against slow recomputations, in every way that attention is computed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DogeConfig,
    Gemma2Config,
    GPT2Config,
    GptOssConfig,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedModel,
    Qwen3Config,
)
from transformers.utils.output_capturing import OutputRecorder
from typer.testing import CliRunner

from depthlm import random_ids, tiny_depthlm
from depthscope import LayerReport, LayerStack, analyze
from depthscope.cli import app
from depthscope.errors import SettingsError
from depthscope.layers.routers import Router
from depthscope.scores.attention_sparsity import ATTENTION_METRICS, AttentionProbe, probing_attention
from depthscope.scores.expert_load import EXPERT_METRICS, find_routers, router_sums, router_values
from depthscope.scores.weight_sparsity import WEIGHT_METRICS, weight_sparsity
from models import random_blocks, tiny_llama
from routing import expert_metrics, probabilities
from zoo import NO_PLAIN_STACK, NOT_BUILT, NOT_CAUSAL, decoder_only_types, example_ids
from zoo import tiny_model as model_of_type

SMALL: dict[str, Any] = {
    "vocab_size": 90,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def build(config: Any, attention: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


MODELS = {
    "llama": lambda attention: tiny_llama(attn_implementation=attention),
    "qwen3": lambda attention: build(Qwen3Config(**SMALL), attention),
    "mistral": lambda attention: build(MistralConfig(**SMALL, sliding_window=5), attention),
    "gemma2": lambda attention: build(Gemma2Config(**SMALL, sliding_window=5), attention),
    "gpt2": lambda attention: build(
        GPT2Config(vocab_size=90, n_embd=32, n_layer=3, n_head=4, initializer_range=0.3), attention
    ),
    "olmoe": lambda attention: build(
        OlmoeConfig(**{**SMALL, "num_key_value_heads": 4}, num_experts=4, num_experts_per_tok=2), attention
    ),
    "gpt_oss": lambda attention: build(
        GptOssConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2, sliding_window=5), attention
    ),
    "depthlm": lambda attention: tiny_depthlm("sliding", attn_implementation=attention),
}
NOT_IN_SDPA = {"gemma2", "gpt_oss"}  # softcapping and sinks


def probe_of(model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None) -> tuple[AttentionProbe, Tensor]:
    stack = LayerStack(model)
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    probe = AttentionProbe(stack, real)
    with torch.no_grad(), probing_attention(stack, probe):
        logits = stack.logits(ids, mask)
    return probe, logits


def naive(attentions: tuple[Tensor, ...], mask: Tensor, window: int | None = None) -> np.ndarray:
    """The metrics [L, metrics] from whole matrices of probabilities, query by query."""
    found = []
    for matrix in attentions:
        rows = []
        for batch, row_mask in zip(matrix.double(), mask.bool(), strict=True):
            for head in batch:
                for query in range(len(row_mask)):
                    seen = [k for k in range(query + 1) if row_mask[k]]
                    if window is not None:
                        seen = [k for k in seen if k > query - window]
                    if not row_mask[query] or len(seen) < 2:
                        continue
                    p, n = head[query][seen].numpy(), len(seen)
                    context = np.exp(-(p[p > 0] * np.log(p[p > 0])).sum())
                    rows.append([(p < 1 / n).mean(), (p < 0.1 / n).mean(), context, context / n, p[0]])
        found.append(np.mean(rows, 0))
    return np.array(found)


def values(probe: AttentionProbe) -> np.ndarray:
    return (probe.sums.sum(1) / probe.counts.sum(1)[:, None]).numpy()


@pytest.mark.parametrize("padded", [None, "left", "right"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", MODELS)
def test_attention_equals_the_whole_matrix(name: str, attention: str, padded: str | None) -> None:
    if attention == "sdpa" and name in NOT_IN_SDPA:
        pytest.skip(f"{name} does not run sdpa")
    ids = random_blocks(2, 14)
    mask = torch.ones_like(ids)
    if padded is not None:
        mask[1, slice(0, 4) if padded == "left" else slice(10, 14)] = 0
    probe, _ = probe_of(MODELS[name](attention), ids, None if padded is None else mask)
    with torch.no_grad():
        expected = MODELS[name]("eager")(
            ids, attention_mask=None if padded is None else mask, output_attentions=True
        ).attentions
    windows = {"mistral": [5] * 3, "gemma2": [5, None, 5], "gpt_oss": [5, None, 5], "depthlm": [5, None] * 2}
    by_layer = windows.get(name, [None] * len(expected))
    wanted = np.concatenate([naive((m,), mask, w) for m, w in zip(expected, by_layer, strict=True)])
    np.testing.assert_allclose(values(probe), wanted, rtol=1e-4, atol=1e-5)


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """flex_attention compiles itself, which takes half a minute and changes nothing about what can be read of it."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_the_probe_changes_nothing_and_leaves_nothing(attention: str) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model, ids = tiny_llama(attn_implementation=attention), random_blocks(2, 14)
    with torch.no_grad():
        before = model(ids, use_cache=False).logits
    local = dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    probe, logits = probe_of(model, ids)
    assert torch.equal(logits, before)
    assert local == ALL_ATTENTION_FUNCTIONS._local_mapping
    stack = LayerStack(model)
    with pytest.raises(KeyError), probing_attention(stack, probe):
        raise KeyError
    assert local == ALL_ATTENTION_FUNCTIONS._local_mapping


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_what_cannot_be_read_is_left_out() -> None:
    """flex_attention hides its mask from us; no number is better than a wrong one."""
    probe, _ = probe_of(tiny_llama(attn_implementation="flex_attention"), random_blocks(2, 14))
    assert (probe.counts == 0).all()


def test_queries_are_sampled_in_long_sequences() -> None:
    model = tiny_llama(max_position_embeddings=256)
    probe, _ = probe_of(model, random_blocks(1, 200))
    assert probe.counts[0, 0] in (63 * 4, 64 * 4)  # the first query of all may be among them, which has no choice


def test_weight_sparsity_equals_a_naive_computation() -> None:
    for model in (tiny_llama(), tiny_depthlm("moe_shared")):
        for layer in LayerStack(model).layers:
            rows, sizes = [], []
            for weight in layer.parameters():
                for matrix in [weight] if weight.dim() == 2 else list(weight) if weight.dim() == 3 else []:
                    w = matrix.detach().double().abs().flatten().numpy()
                    n, rms = len(w), np.sqrt((w**2).mean())
                    hoyer = (np.sqrt(n) - w.sum() / np.sqrt((w**2).sum())) / (np.sqrt(n) - 1)
                    rows.append([(w < 0.01 * rms).mean(), (w < 0.1 * rms).mean(), (w < 0.5 * rms).mean(), hoyer])
                    sizes.append(n)
            found = weight_sparsity(layer)
            np.testing.assert_allclose([found[name] for name in WEIGHT_METRICS], np.average(rows, 0, sizes), rtol=1e-4)


def test_weight_sparsity_of_extremes() -> None:
    linear = nn.Linear(8, 8, bias=False)
    with torch.no_grad():
        linear.weight.fill_(0.3)
    assert weight_sparsity(linear)["weight_hoyer"] == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        linear.weight.zero_()
        linear.weight[3, 3] = 2.0
    assert weight_sparsity(linear)["weight_hoyer"] == pytest.approx(1)
    assert weight_sparsity(linear)["weights_below_1pct"] == pytest.approx(63 / 64)
    with torch.no_grad():
        linear.weight.zero_()
    assert weight_sparsity(linear)["weight_hoyer"] == pytest.approx(1)
    assert all(np.isnan(value) for value in weight_sparsity(nn.LayerNorm(4)).values())


ROUTED = {
    "depthlm": lambda: tiny_depthlm("moe_shared"),
    "olmoe": lambda: MODELS["olmoe"]("eager"),
    "mixtral": lambda: build(MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2), "eager"),
}


@pytest.mark.parametrize("name", ROUTED)
def test_expert_load_equals_a_naive_count(name: str) -> None:
    model, ids = ROUTED[name](), random_blocks(3, 14)
    report = analyze(model, blocks=ids, fit_blocks=0, eval_blocks=3, scores="expert_load")
    with torch.no_grad():
        logits = model(ids, output_router_logits=True, use_cache=False).router_logits
    layers = sorted(find_routers(LayerStack(model)))
    assert len(layers) == len(logits)
    experts, top_k = logits[0].shape[-1], 2
    for layer, scores in zip(layers, logits, strict=True):
        p = torch.softmax(scores.double(), -1)
        chosen = p.topk(top_k, -1).indices
        load = np.bincount(chosen.flatten().numpy(), minlength=experts)
        share = load / load.sum()
        expected = [
            share.max() * experts,
            share.min() * experts,
            -(share[share > 0] * np.log(share[share > 0])).sum() / np.log(experts),
            (share * experts < 0.01).mean(),
            p.gather(-1, chosen).sum(-1).mean().item(),
            p.amax(-1).mean().item(),
            torch.special.entr(p).sum(-1).mean().item() / np.log(experts),
        ]
        row = report.layers[layer]
        np.testing.assert_allclose([row[metric] for metric in EXPERT_METRICS], expected, rtol=1e-4)
        assert row["expert_load_max_se"] is not None
    assert all(
        report.layers[layer]["expert_load_max"] is None for layer in set(range(len(report.layers))) - set(layers)
    )


def test_experts_that_are_pairs_of_keys_are_read_as_pairs() -> None:
    """Doge; its routers mix the tokens of a batch, so that only a training can be watched."""
    sizes = {"num_hidden_layers": 2, "num_experts": 16, "num_experts_per_tok": 3, "is_moe": True}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(DogeConfig(**{**SMALL, **sizes}), attn_implementation="eager").eval()
    routers = find_routers(LayerStack(model, head=False))
    routings, looked_up = [], []
    for layer, (router,) in routers.items():
        router.module.register_forward_hook(lambda m, a, out, r=router: routings.append((r.read(out), out[1])))
        model.model.layers[layer].mlp.down_embed.register_forward_pre_hook(lambda m, a: looked_up.append(a[0]))
    with torch.no_grad():
        model(random_blocks(2, 10), use_cache=False)
    assert len(routings) == 2
    for (routing, logits), chosen in zip(routings, looked_up, strict=True):
        torch.testing.assert_close(routing.choice.sort().values, chosen.sort().values)
        torch.testing.assert_close(routing.probabilities.double(), probabilities("doge", logits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("said", ["logits", "probabilities", "sigmoid"])
def test_a_router_is_read_by_its_values(said: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 6, generator=generator)
    scores = torch.sigmoid(logits) if said == "sigmoid" else torch.softmax(logits, -1)
    biased = (scores + torch.rand(6, generator=generator)).topk(2).indices
    weights = scores.gather(-1, biased)
    output = (
        scores if said == "probabilities" else logits,
        (2.5 * weights / weights.sum(-1, keepdim=True)).to(dtype),
        biased,
    )
    router = Router(nn.Identity(), 0, 2, 6)
    # At first all logits are alike, which tells nothing of how they become scores.
    even = torch.full_like(logits, 1 / 6 if said == "probabilities" else 0)
    for given in ((even, torch.full_like(output[1], 0.5), biased), output, output):
        routing = router.read(given)
        assert torch.equal(routing.choice, biased)
    torch.testing.assert_close(routing.probabilities, scores / scores.sum(-1, keepdim=True))
    assert router_sums(router, (torch.ones(3),)) is None
    assert router_sums(router, output, torch.ones(7)) is None


def test_a_choice_without_weights_is_no_expert() -> None:
    """ZAYA's router may choose to skip, and says so by expert 0 with the weight 0."""
    logits = torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.0, 3.0], [0.0, 2.0, 0.0]])
    p = torch.softmax(logits, -1)
    output = (logits, torch.tensor([[p[0, 0]], [0.0], [p[2, 1]]]), torch.tensor([[0], [0], [1]]))
    sums = router_sums(Router(nn.Identity(), 0, 1, 2), output).numpy()
    assert sums[:2].tolist() == [1, 1]
    assert router_values([sums])["router_confidence"] == pytest.approx((p[0, 0] + p[1, 2] + p[2, 1]).item() / 3)


@pytest.mark.parametrize("recorded", ["class", "name", "list"])
def test_routers_are_found_by_the_rules_of_transformers(recorded: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ROUTED["mixtral"]()
    kind = type(model.model.layers[0].mlp.gate)
    specs = {
        "class": kind,  # without an index it is the second part of the output
        "name": OutputRecorder(None, 0, class_name="mlp.gate"),
        "list": [OutputRecorder(kind, 0, layer_name="elsewhere"), OutputRecorder(kind, 0, layer_name="mlp.gate")],
    }
    monkeypatch.setattr(type(model.model), "_can_record_outputs", {"router_logits": specs[recorded]})
    monkeypatch.setattr(type(model), "_can_record_outputs", {})
    found = find_routers(LayerStack(model))
    at = 1 if recorded == "class" else 0
    assert {layer: [(r.module, r.index, r.top_k, r.experts) for r in routers] for layer, routers in found.items()} == {
        layer: [(model.model.layers[layer].mlp.gate, at, 2, 4)] for layer in range(3)
    }


def test_padding_does_not_count() -> None:
    ids = random_ids(1, 12)
    short = analyze(tiny_depthlm("moe"), blocks=ids[:, :8], fit_blocks=0, eval_blocks=1, scores="expert_load")
    from depthscope import Blocks

    mask = torch.tensor([[1] * 8 + [0] * 4])
    padded = Blocks(ids, attention_mask=mask.bool())
    long = analyze(tiny_depthlm("moe"), blocks=padded, fit_blocks=0, eval_blocks=1, scores="expert_load")
    for one, other in zip(short.layers, long.layers, strict=True):
        assert [one[name] for name in EXPERT_METRICS] == pytest.approx([other[name] for name in EXPERT_METRICS])


def test_a_dense_model_has_no_columns_of_experts() -> None:
    report = analyze(tiny_llama(), blocks=random_blocks(2, 12), fit_blocks=0, eval_blocks=2, scores="expert_load")
    assert not any(name in report.layers[0] for name in EXPERT_METRICS)


def test_all_means_effectiveness_and_sparsity_is_asked_for_by_name() -> None:
    from depthscope import Settings

    assert "weight_sparsity" not in Settings(scores="all").scores
    assert Settings(scores="all,expert_load").scores[-1] == "expert_load"
    with pytest.raises(SettingsError, match="weight_sparsity, attention_sparsity, expert_load"):
        Settings(scores="luck")


def test_weights_have_no_error_over_blocks() -> None:
    report = analyze(tiny_llama(), blocks=random_blocks(3, 12), fit_blocks=0, eval_blocks=3, scores="weight_sparsity")
    assert report.layers[1]["weight_hoyer_se"] == 0
    assert report.layers[1]["weight_hoyer"] == pytest.approx(
        weight_sparsity(tiny_llama().model.layers[1])["weight_hoyer"]
    )


@pytest.mark.parametrize(
    "model_type", sorted(set(decoder_only_types()) - set(NOT_BUILT) - set(NO_PLAIN_STACK) - set(NOT_CAUSAL))
)
def test_any_type_of_model_is_measured_or_left_out(model_type: str) -> None:
    model = model_of_type(model_type)
    ids = example_ids(model, batch=2, length=12)
    with torch.no_grad():
        before = LayerStack(model).logits(ids)
    report = analyze(
        model, blocks=ids, fit_blocks=0, eval_blocks=2, scores="weight_sparsity,attention_sparsity,expert_load"
    )
    with torch.no_grad():
        assert torch.equal(LayerStack(model).logits(ids), before)
    expected = expert_metrics(model, LayerStack(model).layers, ids, model_type)
    for row in report.layers:
        if row["layer"] in expected:
            found = [row[name] for name in EXPERT_METRICS]
            np.testing.assert_allclose(found, expected[row["layer"]], rtol=1e-4, atol=1e-6)
        else:
            assert row.get("expert_load_max") is None
        assert 0 <= row["weight_hoyer"] <= 1
        seen = [row[name] for name in ATTENTION_METRICS]
        assert None not in seen or seen == [None] * len(seen)
        if seen[0] is not None:
            assert 0 <= row["attention_below_tenth"] <= row["attention_below_fair"] <= 1
            assert 0 <= row["attention_first"] <= 1.001
            assert 0.99 <= row["attention_context"] <= 12.01


def test_the_command(tmp_path: Path) -> None:
    tiny_depthlm("moe", vocab_size=300).save_pretrained(tmp_path / "model")
    from tiny_tokenizer import save_tokenizer

    save_tokenizer(tmp_path / "model")
    arguments = ["sparsity", str(tmp_path / "model"), "--blocks", "2", "--block-size", "32"]
    result = CliRunner().invoke(
        app, [*arguments, "--out", str(tmp_path / "report.json"), "--html", str(tmp_path / "p.html")]
    )
    assert result.exit_code == 0, result.output
    assert "mean Hoyer sparsity" in result.output
    report = LayerReport.load(tmp_path / "report.json")
    assert {"weight_hoyer", "attention_context", "expert_load_max"} <= report.layers[0].keys()
    assert CliRunner().invoke(app, [*arguments, "--text", "a", "--dataset", "b"]).exit_code == 2
