"""A model that sees what it should predict is refused: it is asked, not looked up."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    Gemma3TextConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from depthscope import LayerStack, analyze
from depthscope.errors import BatchDependentError, NoLayerStackError, NotCausalError
from depthscope.layers.causality import require_causal
from models import VOCABULARY, random_blocks, tiny_llama
from zoo import tiny_config, tiny_model

SHAPE = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 90}


def built(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def gemma(**changes: object) -> PreTrainedModel:
    return built(tiny_config(Gemma3TextConfig, 2).__class__(**SHAPE, num_key_value_heads=2, head_dim=8, **changes))


class Masked(LlamaForCausalLM):
    """A Llama whose tokens see what `sees(query, key)` says."""

    sees: Callable[[Tensor, Tensor], Tensor]

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: object) -> object:
        steps = torch.arange(input_ids.shape[1])
        mask = self.sees(steps[:, None], steps[None]) | torch.eye(len(steps), dtype=torch.bool)
        return super().forward(input_ids, attention_mask=mask.expand(len(input_ids), 1, -1, -1), **options)


def masked(sees: Callable[[Tensor, Tensor], Tensor], **changes: object) -> PreTrainedModel:
    model = tiny_llama(2, **changes)
    model.__class__, model.sees = Masked, sees
    return model


class ExpertsChoose(nn.Module):
    """Four experts, each for the half of the batch's tokens that it finds the most fitting."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.experts, self.gate = nn.ModuleList([copy.deepcopy(mlp) for _ in range(4)]), nn.Linear(24, 4)

    def forward(self, hidden: Tensor) -> Tensor:
        fit = self.gate(hidden)
        chosen = fit > fit.flatten(0, 1).median(0).values
        return sum(expert(hidden) * chosen[..., index, None] for index, expert in enumerate(self.experts))


class Dropping(nn.Module):
    """Dropout that goes on in evaluation mode."""

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.dropout(hidden, 0.2)


def with_mlp(change: Callable[[nn.Module], nn.Module]) -> PreTrainedModel:
    model = tiny_llama(2)
    for layer in model.model.layers:
        layer.mlp = change(layer.mlp)
    return model.eval()


LOOKS_AHEAD = {
    "is_causal": lambda: tiny_llama(2, is_causal=False),
    "is_causal_in_half_precision": lambda: tiny_llama(2, is_causal=False).bfloat16(),
    "is_causal_with_eager_attention": lambda: tiny_llama(2, is_causal=False, attn_implementation="eager"),
    "use_bidirectional_attention": lambda: gemma(use_bidirectional_attention=True),
    "an_encoder_as_decoder": lambda: BertLMHeadModel(BertConfig(**SHAPE, is_decoder=False)).eval(),
    "a_masked_language_model": lambda: BertForMaskedLM(BertConfig(**SHAPE)).eval(),
    "a_permutation_language_model": lambda: tiny_model("xlnet", num_layers=2),
    "tokens_behind_a_prompt": lambda: tiny_model("cpmant", num_layers=2),
    "a_prefix": lambda: masked(lambda query, key: (key <= query) | (key < 4)),
    "blocks_as_of_block_diffusion": lambda: masked(lambda query, key: key // 4 <= query // 4),
    "a_window_to_both_sides": lambda: masked(lambda query, key: (query - key).abs() <= 1),
    "the_next_token_alone": lambda: masked(lambda query, key: key <= query + 1),
    "the_last_token": lambda: masked(lambda query, key: (key <= query) | (key == key.max())),
}


@pytest.mark.parametrize("name", LOOKS_AHEAD)
def test_a_model_that_looks_ahead_is_refused(name: str) -> None:
    model = LOOKS_AHEAD[name]()
    with pytest.raises(NotCausalError, match="is not causal: when later tokens"):
        analyze(model, blocks=random_blocks(2, 9), fit_blocks=0, eval_blocks=2, scores="skip", progress=False)


def test_one_layer_that_looks_ahead_is_enough() -> None:
    model = tiny_llama(6)
    attention = model.model.layers[5].self_attn
    plain = attention.forward
    attention.forward = lambda *args, **options: plain(*args, **{**options, "attention_mask": torch.ones(1, 1, 13, 13)})
    with pytest.raises(NotCausalError):
        LayerStack(model)


LOOKS_BACK = {
    "a_window": lambda: tiny_llama(2, sliding_window=3),
    "gemma": lambda: gemma(sliding_window=4),
    "chunks": lambda: masked(lambda query, key: (key <= query) & (key // 4 == query // 4)),
    "sinks": lambda: masked(lambda query, key: (key <= query) & ((key < 2) | (query - key < 3))),
    "bert_as_a_decoder": lambda: BertLMHeadModel(BertConfig(**SHAPE, is_decoder=True)).eval(),
    "half_precision": lambda: tiny_llama(2).half(),
    "experts_in_half_precision": lambda: tiny_model("olmoe", num_layers=2).bfloat16(),
    "a_vocabulary_partly_ruled_out": lambda: _with_impossible_tokens(tiny_llama(2), -1e9),
    "a_vocabulary_partly_impossible": lambda: _with_impossible_tokens(tiny_llama(2), -float("inf")),
}


@pytest.mark.parametrize("name", LOOKS_BACK)
def test_a_model_that_looks_back_only_is_analysed(name: str) -> None:
    assert LayerStack(LOOKS_BACK[name]()).num_layers == 2


@pytest.mark.parametrize("never", [-1e9, -float("inf"), torch.finfo(torch.float32).min])
def test_impossible_tokens_do_not_hide_a_look_ahead(never: float) -> None:
    with pytest.raises(NotCausalError):
        LayerStack(_with_impossible_tokens(tiny_llama(2, is_causal=False), never))


def _with_impossible_tokens(model: PreTrainedModel, logit: float) -> PreTrainedModel:
    """Tokens that the model never predicts, as Chameleon its image tokens."""

    def forbid(module: nn.Module, args: object, logits: Tensor) -> Tensor:
        return torch.cat([logits[..., :-30], torch.full_like(logits[..., -30:], logit)], -1)

    model.lm_head.register_forward_hook(forbid)
    return model


def test_a_model_whose_experts_choose_their_tokens_is_refused() -> None:
    with pytest.raises(NoLayerStackError, match=r"is not causal|other texts of its batch"):
        LayerStack(with_mlp(ExpertsChoose))


def test_a_model_that_answers_differently_each_time_is_refused() -> None:
    with pytest.raises(BatchDependentError, match="gives another answer each time"):
        LayerStack(with_mlp(lambda mlp: nn.Sequential(mlp, Dropping())))


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_activations_quantised_by_the_batch_are_rounding_and_noted() -> None:
    model = torch.ao.quantization.quantize_dynamic(tiny_llama(2), {nn.Linear})
    report = analyze(model, blocks=random_blocks(2, 9), fit_blocks=0, eval_blocks=2, scores="skip", progress=False)
    assert any("the other texts of its batch" in note for note in report.notes)


# What half precision on an accelerator does to experts is not had on every machine, so the model is a function here.


def noisy(leak: float, *, rounding: float, flips: float) -> Callable[[Tensor], Tensor]:
    """Logits of a token and those before it, with rounding and rare jumps that depend on the whole batch."""
    table = torch.randn(VOCABULARY, 50, generator=torch.Generator().manual_seed(0))

    def ask(ids: Tensor) -> Tensor:
        chance = torch.Generator().manual_seed(int((ids * torch.arange(ids.numel()).view(ids.shape)).sum()))
        seen = table[ids]
        logits = seen.cumsum(1) + leak * seen.sum(1, keepdim=True)
        jumps = torch.rand(ids.shape, generator=chance)[..., None] < flips
        noise = torch.randn(logits.shape, generator=chance)
        return logits * (1 + rounding * noise) + jumps * 0.2 * noise

    return ask


def examples() -> tuple[Tensor, list[Tensor]]:
    first, *others = torch.randint(VOCABULARY, (7, 3, 13), generator=torch.Generator().manual_seed(1))
    return first, others


@pytest.mark.parametrize("flips", [0.0, 0.02, 0.1, 0.5])
def test_experts_that_flip_in_half_precision_are_no_look_ahead(flips: float) -> None:
    example, others = examples()
    ask = noisy(0.0, rounding=0.01, flips=flips)
    effect = require_causal("it", ask, example, ask(example), others, epsilon=2**-7)
    assert effect > 0.01


@pytest.mark.parametrize("flips", [0.0, 0.02, 0.1])
def test_experts_that_flip_in_half_precision_do_not_hide_a_look_ahead(flips: float) -> None:
    example, others = examples()
    ask = noisy(0.3, rounding=0.01, flips=flips)
    with pytest.raises(NotCausalError, match="it is not causal"):
        require_causal("it", ask, example, ask(example), others, epsilon=2**-7)


def test_a_causal_model_is_asked_once() -> None:
    example, others = examples()
    ask, asked = noisy(0.0, rounding=0.0, flips=0.0), []
    require_causal("it", lambda ids: ask(asked.append(ids) or ids), example, ask(example), others, epsilon=2**-23)
    assert len(asked) == 1


def test_the_look_at_a_model_leaves_it_as_it_was() -> None:
    model = tiny_llama(2).train()
    before = copy.deepcopy(model.state_dict())
    LayerStack(model)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_layers_that_are_only_watched_may_look_ahead() -> None:
    assert LayerStack(tiny_llama(2, is_causal=False), head=False).num_layers == 2
