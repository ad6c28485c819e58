"""Reward models, classifiers, encoders, owners' wrappers: variance and sparsity need no language-modelling head."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
    MixtralConfig,
    MixtralForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    PreTrainedModel,
    T5Config,
    T5ForSequenceClassification,
)

from depthscope import LayerStack
from depthscope.callbacks import EffectivenessCallback, SparsityCallback, VarianceCallback, read_history
from depthscope.errors import NoLayerStackError
from models import random_blocks, tiny_llama
from runs import LENGTH, Recorder, Sentences, arguments, naive_variances, trainer

SMALL: dict[str, Any] = {
    "vocab_size": 90,
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
}


class Labelled(Sentences):
    """The same tokens, with the labels that a head wants."""

    def __init__(self, labels: dict[str, Any]) -> None:
        super().__init__()
        self.labels = labels

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {**super().__getitem__(row), **self.labels}


class Preferences(Dataset):
    """Pairs, as the owner of a wrapper feeds them to it."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        chosen, rejected = random_blocks(2, LENGTH, seed=row)
        return {"chosen": chosen, "rejected": rejected}


class Preferring(nn.Module):
    """A value head on a language model, called with pairs of texts: not with token ids."""

    def __init__(self) -> None:
        super().__init__()
        self.language_model = tiny_llama(3)
        self.value = nn.Linear(24, 1)

    def forward(self, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
        both = torch.cat([chosen, rejected])
        hidden = self.language_model.model(both, attention_mask=torch.ones_like(both)).last_hidden_state
        better, worse = self.value(hidden[:, -1]).chunk(2)
        return {"loss": -nn.functional.logsigmoid(better - worse).mean()}


def seeded(kind: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return kind(config)


ONES = torch.ones(LENGTH, dtype=torch.long)
CASES: dict[str, tuple[Callable[[], nn.Module], Dataset]] = {
    "reward": (
        lambda: seeded(LlamaForSequenceClassification, LlamaConfig(**SMALL, pad_token_id=2, num_labels=1)),
        Labelled({"labels": 1.0}),
    ),
    "tokens": (lambda: seeded(LlamaForTokenClassification, LlamaConfig(**SMALL)), Labelled({"labels": ONES})),
    "answers": (
        lambda: seeded(LlamaForQuestionAnswering, LlamaConfig(**SMALL)),
        Labelled({"start_positions": 1, "end_positions": 2}),
    ),
    "experts": (
        lambda: seeded(
            MixtralForSequenceClassification,
            MixtralConfig(**SMALL, num_local_experts=4, num_key_value_heads=4, pad_token_id=2),
        ),
        Labelled({"labels": 1}),
    ),
    "encoder": (lambda: seeded(BertForSequenceClassification, BertConfig(**SMALL)), Labelled({"labels": 1})),
    "masked": (lambda: seeded(BertForMaskedLM, BertConfig(**SMALL)), Labelled({"labels": ONES})),
    "modern encoder": (
        lambda: seeded(ModernBertForSequenceClassification, ModernBertConfig(**SMALL, pad_token_id=0)),
        Labelled({"labels": 1}),
    ),
    "wrapper": (Preferring, Preferences()),
}


def layers_of(model: nn.Module) -> list[nn.Module]:
    return list(next(part for part in model.modules() if isinstance(part, nn.ModuleList)))


@pytest.mark.parametrize("case", CASES)
def test_variance_under_any_head_equals_a_naive_computation(case: str, tmp_path: Path) -> None:
    build, data = CASES[case]
    model = build()
    run = Recorder(
        model,
        arguments(tmp_path, max_steps=2, logging_steps=2),
        train_dataset=data,
        callbacks=[VarianceCallback(), SparsityCallback(every=1)],
        layers=layers_of(model),
    )
    run.train()
    variance, sparsity = read_history(tmp_path)
    for metric, expected in naive_variances(run.seen).items():
        np.testing.assert_allclose(variance["layers"][metric], expected, rtol=1e-4, atol=1e-4)
    assert variance["tokens"] == sum(2 * 4 * LENGTH if mask is None else int(mask.sum()) for _, _, mask in run.seen)
    assert None not in sparsity["layers"]["weight_hoyer"]
    assert None not in sparsity["layers"]["attention_context"]
    assert ("expert_load_max" in sparsity["layers"]) == (case == "experts")


def test_a_reward_model_without_a_padding_token_is_watched(tmp_path: Path) -> None:
    """It refuses batches of several sequences, such as the one its layers are found with, but only after its layers."""
    model = seeded(LlamaForSequenceClassification, LlamaConfig(**SMALL, num_labels=1))
    data = Labelled({"labels": 1.0})
    trainer(model, tmp_path, [VarianceCallback()], data, per_device_train_batch_size=1).train()
    assert None not in read_history(tmp_path)[0]["layers"]["variance"]


@pytest.mark.parametrize("padded", [False, True])
def test_attention_of_an_encoder_equals_the_whole_matrix(padded: bool, tmp_path: Path) -> None:
    """Its tokens see what comes after them too."""
    build, _ = CASES["encoder"]
    model = build()
    data = Labelled({"labels": 1})
    if not padded:
        data.masks = torch.ones_like(data.masks)
    callback = SparsityCallback(every=1, sequences=4)
    run = trainer(model, tmp_path, [callback], data, max_steps=1, logging_steps=1)
    rows: list[dict[str, Tensor]] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(dict(kwargs)) if module.training else None, with_kwargs=True
    )
    run.train()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        ids, mask = rows[0]["input_ids"], rows[0]["attention_mask"]
        attentions = model.eval()(ids, attention_mask=mask, output_attentions=True).attentions
    found = read_history(tmp_path)[0]["layers"]["attention_context"]
    for layer, matrix in enumerate(attentions):
        p = matrix.double()[mask.bool()[:, None, :].expand(matrix.shape[:3])]
        assert found[layer] == pytest.approx(torch.special.entr(p).sum(-1).exp().mean().item(), rel=1e-3)


def test_models_without_a_plain_stack_are_refused(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.policy, self.value = tiny_llama(2), LlamaModel(LlamaConfig(**SMALL))

        def forward(self, pairs: Tensor) -> Tensor:
            return self.policy(pairs).logits.mean() + self.value(pairs).last_hidden_state.mean()

    shared = seeded(AlbertForSequenceClassification, AlbertConfig(**SMALL))
    both = T5ForSequenceClassification(T5Config(vocab_size=90, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2))
    for model, said in (
        (Two(), "several models \\(policy, value\\)"),
        (shared, "no plain stack"),
        (both, "encoder-decoder"),
        (nn.Linear(2, 2), "no vocabulary"),
    ):
        with pytest.raises(NoLayerStackError, match=said):
            trainer(model, tmp_path, [VarianceCallback()])


def test_a_reward_model_has_layers_but_no_logits(tmp_path: Path) -> None:
    model = CASES["reward"][0]()
    stack = LayerStack(model, head=False)
    with stack.capture() as seen:
        stack.run_through(2, random_blocks(2, 8))
    assert sorted(seen.resid_post) == [0, 1, 2]
    with pytest.raises(NoLayerStackError, match="without a language-modelling head"):
        stack.logits(random_blocks(2, 8))
    with pytest.raises(NoLayerStackError, match="no language-modelling head"):
        trainer(model, tmp_path, [EffectivenessCallback(random_blocks(2, 8))]).train()
